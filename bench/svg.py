"""Charts as SVG, drawn by hand: bars with a reference line, and lines on linear or logarithmic axes.

Every picture has a background of its own, so that it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 900  # pixels; what a README shows without shrinking
BACKGROUND: Final = "#ffffff"
FRAME: Final = "#d0d7de"
GRID: Final = "#e4e8ec"
TEXT: Final = "#1f2328"
FAINT: Final = "#59636e"
OURS_COLOUR: Final = "#0b62d6"
MISSED_COLOUR: Final = "#c4541a"
PEER_COLOUR: Final = "#aab4bf"
# Told apart by people who see red and green alike; the first is ours.
LINE_COLOURS: Final = (
    OURS_COLOUR,
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#8a6d00",
    "#56b4e9",
    "#7a4fbf",
    "#444444",
    "#aa3333",
    "#94a3b3",
)
FONT: Final = "font-family='DejaVu Sans, Verdana, Segoe UI, Helvetica, Arial, sans-serif'"
MARGIN: Final = 24
TITLE_SPACE: Final = 62


class Drawing:
    """An SVG under construction; coordinates are pixels from the top left."""

    def __init__(self, height: float, title: str, subtitle: str) -> None:
        self._height = height
        self._parts = [f"<title>{escape(title)}</title>"]
        self.box(0.5, 0.5, WIDTH - 1, height - 1, BACKGROUND, radius=8, stroke=FRAME)
        self.text(MARGIN, 32, title, size=18, weight="bold")
        self.text(MARGIN, 52, subtitle, size=12, colour=FAINT)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, *, radius: float = 0, stroke: str = "none"
    ) -> None:
        self._parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(width, 0):.1f}' height='{height:.1f}' rx='{radius:g}' "
            f"fill='{fill}' stroke='{stroke}'/>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, *, colour: str = GRID, dash: str = "none") -> None:
        self._parts.append(
            f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' "
            f"stroke='{colour}' stroke-dasharray='{dash}'/>"
        )

    def path(self, points: Sequence[tuple[float, float]], *, colour: str, width: float) -> None:
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f"<polyline points='{text}' fill='none' stroke='{colour}' "
            f"stroke-width='{width:g}' stroke-linejoin='round'/>"
        )

    def dot(self, x: float, y: float, *, colour: str, radius: float = 3) -> None:
        self._parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius:g}' fill='{colour}'/>")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        colour: str = TEXT,
        anchor: str = "start",
        weight: str = "normal",
    ) -> None:
        self._parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size:g}' fill='{colour}' text-anchor='{anchor}' "
            f"font-weight='{weight}'>{escape(text)}</text>"
        )

    def finish(self) -> str:
        body = "\n".join(self._parts)
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {self._height:g}' width='{WIDTH}' "
            f"height='{self._height:g}' {FONT}>\n{body}\n</svg>\n"
        )


# Bars


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart. ``advantage`` is how many times better than the best peer; 1 is level."""

    label: str
    advantage: float
    ours: str
    best: str


BAR_STEP: Final = 26
BAR_HEIGHT: Final = 18
NUMBER_WIDTH: Final = 42
LABEL_SPACE: Final = 212
VALUE_SPACE: Final = 292
MAX_ADVANTAGE: Final = 3.0  # a longer bar is cut, and its number says so


def bars(title: str, subtitle: str, rows: Sequence[Bar], *, reference: str, columns: tuple[str, str]) -> str:
    """Horizontal bars of ``advantage``; the line at 1 is ``reference``. ``columns`` head the two values."""
    head = TITLE_SPACE + 30
    drawing = Drawing(head + BAR_STEP * len(rows) + 20, title, subtitle)
    left, right = MARGIN + LABEL_SPACE, WIDTH - MARGIN - VALUE_SPACE
    longest = min(MAX_ADVANTAGE, max([row.advantage for row in rows] + [1.5]))
    scale = (right - left) / longest
    bottom = head + BAR_STEP * len(rows)
    ours_x, best_x = right + 138, right + 150
    drawing.text(ours_x, head - 12, columns[0], size=11, colour=FAINT, anchor="end")
    drawing.text(best_x, head - 12, columns[1], size=11, colour=FAINT)
    drawing.line(left + scale, head - 4, left + scale, bottom + 2, colour=TEXT, dash="4 3")
    drawing.text(left + scale, head - 12, reference, size=11, colour=FAINT, anchor="middle")
    for number, row in enumerate(rows):
        y = head + BAR_STEP * number
        middle = y + BAR_STEP / 2 + 4
        width = min(row.advantage, longest) * scale
        colour = OURS_COLOUR if row.advantage >= 1 else MISSED_COLOUR
        drawing.text(left - 10, middle, row.label, anchor="end")
        drawing.box(left, y + (BAR_STEP - BAR_HEIGHT) / 2, width, BAR_HEIGHT, colour, radius=2)
        drawing.box(
            left + width + 2, y + (BAR_STEP - BAR_HEIGHT) / 2, NUMBER_WIDTH, BAR_HEIGHT, BACKGROUND
        )  # the line at 1 does not cross it
        number_text = f"{row.advantage:.2f}×" if row.advantage < 10 else f"{row.advantage:.0f}×"
        drawing.text(left + width + 5, middle, number_text, weight="bold")
        drawing.text(ours_x, middle, row.ours, anchor="end", weight="bold")
        drawing.text(best_x, middle, row.best, size=11, colour=FAINT)
    drawing.line(left, head - 4, left, bottom + 2, colour=FRAME)
    return drawing.finish()


# Lines


@dataclass(frozen=True)
class Line:
    """A named line through points (x, y). ``style`` is an index into LINE_COLOURS; 0, ours, is drawn thicker."""

    label: str
    points: Sequence[tuple[float, float]]
    style: int


@dataclass(frozen=True)
class Axis:
    """``ticks`` are (value, label), from the lowest to the highest, which bound the axis."""

    label: str
    ticks: Sequence[tuple[float, str]]
    is_logarithmic: bool = False

    def place(self, start: float, end: float) -> Callable[[float], float]:
        """A function from values to pixels."""

        def rise(value: float) -> float:
            return math.log10(max(value, self.ticks[0][0])) if self.is_logarithmic else value

        low, high = rise(self.ticks[0][0]), rise(self.ticks[-1][0])
        return lambda value: start + (rise(value) - low) / (high - low) * (end - start)


def linear_axis(label: str, highest: float, *, steps: int = 5) -> Axis:
    """From 0 to a round number not below ``highest``."""
    raw = max(highest, 1e-9) / steps
    power = 10 ** math.floor(math.log10(raw))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= raw)
    count = math.ceil(highest / step - 1e-9)
    return Axis(label, [(step * number, f"{step * number:,.10g}") for number in range(max(count, 1) + 1)])


def decade_axis(label: str, lowest: float, highest: float) -> Axis:
    """Powers of ten around both."""
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    decades = range(first, max(last, first + 1) + 1)
    return Axis(label, [(10.0**each, f"{10.0**each:,.10g}") for each in decades], is_logarithmic=True)


CHART_HEIGHT: Final = 420
LEGEND_SPACE: Final = 150
LEGEND_STEP: Final = 15


def lines(title: str, subtitle: str, chart: Sequence[Line], *, x_axis: Axis, y_axis: Axis) -> str:
    """A line chart, each line named at its end."""
    drawing = Drawing(CHART_HEIGHT, title, subtitle)
    left, right, top, bottom = MARGIN + 60, WIDTH - MARGIN - LEGEND_SPACE, TITLE_SPACE + 28, CHART_HEIGHT - 52
    to_x, to_y = x_axis.place(left, right), y_axis.place(bottom, top)
    for value, label in y_axis.ticks:
        drawing.line(left, to_y(value), right, to_y(value))
        drawing.text(left - 8, to_y(value) + 4, label, size=11, colour=FAINT, anchor="end")
    for value, label in x_axis.ticks:
        drawing.line(to_x(value), top, to_x(value), bottom)
        drawing.text(to_x(value), bottom + 18, label, size=11, colour=FAINT, anchor="middle")
    drawing.text(left, top - 12, y_axis.label, size=11, colour=FAINT)
    drawing.text((left + right) / 2, bottom + 38, x_axis.label, size=11, colour=FAINT, anchor="middle")
    styled = [(line, LINE_COLOURS[line.style % len(LINE_COLOURS)]) for line in chart if line.points]
    for line, colour in sorted(styled, key=lambda each: -each[0].style):  # ours last, on top
        points = [(to_x(x), to_y(y)) for x, y in line.points]
        drawing.path(points, colour=colour, width=3 if line.style == 0 else 1.6)
        for x, y in points:
            drawing.dot(x, y, colour=colour)
    ends = [to_y(line.points[-1][1]) + 4 for line, _ in styled]
    for (line, colour), y in zip(styled, spread(ends, step=LEGEND_STEP, highest=bottom), strict=True):
        weight = "bold" if line.style == 0 else "normal"
        drawing.text(right + 10, y, line.label, colour=colour, weight=weight)
    return drawing.finish()


def spread(places: Sequence[float], *, step: float, highest: float) -> list[float]:
    """``places`` moved apart to ``step`` at least, order kept, none above ``highest`` unless all would not fit."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    out = list(places)
    for before, index in itertools.pairwise(order):
        out[index] = max(out[index], out[before] + step)
    limit = highest
    for index in reversed(order):
        out[index] = min(out[index], limit)
        limit = out[index] - step
    return out
