"""What the figures are held against: each row of the table, its targets, and the verdict. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from bench.systems import DIRECT, FLOOR, OURS, SYSTEMS

BEST: Final = "best"  # the best encrypted peer for that row
ITSELF: Final = "itself"  # the figure is held against a number, not against somebody

Medians = Mapping[str, Mapping[str, Mapping[str, float]]]  # figure -> system -> metric -> median


@dataclass(frozen=True)
class Bound:
    """Ours ``relation`` ``factor`` x the reference's: a system's name, BEST, or ITSELF for a plain number."""

    relation: Literal["≥", "≤"]
    factor: float
    reference: str = BEST

    def text(self) -> str:
        if self.reference == ITSELF:
            return f"{self.relation} {self.factor:g}"
        name = {BEST: "best", DIRECT: "without tunnel"}.get(self.reference, self.reference)
        return f"{self.relation} {self.factor:g} × {name}"

    def is_met(self, ours: float, reference: float) -> bool:
        limit = self.factor * reference
        return ours >= limit if self.relation == "≥" else ours <= limit


@dataclass(frozen=True)
class Row:
    """One line of the table: a metric of a figure. ``is_higher_better`` decides who is best.

    Every row is drawn beside the best peer; ``is_drawn`` is False where another row has the same in another unit.
    """

    label: str
    figure: str
    metric: str
    unit: str
    is_higher_better: bool
    bounds: tuple[Bound, ...] = ()
    is_drawn: bool = True

    @property
    def key(self) -> str:
        return f"{self.figure}.{self.metric}"


@dataclass(frozen=True)
class Verdict:
    """A bound and how it came out. ``ratio`` is ours over the reference; None: the reference is missing."""

    bound: Bound
    ratio: float | None
    is_met: bool | None


_BULK: Final = (Bound("≥", 1.3), Bound("≥", 2.5, "shadowsocks"), Bound("≥", 1.0, FLOOR))
_CPU_BULK: Final = (Bound("≤", 0.75),)
_CPU_REQUEST: Final = (Bound("≤", 0.9),)

ROWS: Final = (
    Row("bulk up", "bulk_up", "gbit_s", "Gbit/s", True, _BULK),
    Row("bulk up, CPU", "bulk_up", "cpu_s_per_gb", "s/GB", False, _CPU_BULK),
    Row("bulk down", "bulk_down", "gbit_s", "Gbit/s", True, _BULK),
    Row("bulk down, CPU", "bulk_down", "cpu_s_per_gb", "s/GB", False, _CPU_BULK),
    Row("bulk, 8 streams", "bulk_8", "gbit_s", "Gbit/s", True, (Bound("≥", 1.1),)),
    Row("bulk, 8 streams, CPU", "bulk_8", "cpu_s_per_gb", "s/GB", False, _CPU_BULK),
    Row("requests, 32 connections", "requests_32", "requests_s", "/s", True, (Bound("≥", 1.15),)),
    Row("requests, 32, CPU", "requests_32", "cpu_us", "µs", False, _CPU_REQUEST),
    Row("requests, 256 connections", "requests_256", "requests_s", "/s", True, (Bound("≥", 1.3),)),
    Row("requests, 256, CPU", "requests_256", "cpu_us", "µs", False, _CPU_REQUEST),
    Row("new connections", "new", "requests_s", "/s", True, (Bound("≥", 1.15),)),
    Row("new connections, CPU", "new", "cpu_us", "µs", False),
    Row("round trip, median", "round_trip", "p50_us", "µs", False, (Bound("≤", 1.05),)),
    Row("round trip, 99th", "round_trip", "p99_us", "µs", False, (Bound("≤", 1.0),)),
    Row("round trip, CPU", "round_trip", "cpu_us", "µs", False),
    Row("requests beside bulk, median", "beside_bulk", "p50_us", "µs", False),
    Row("requests beside bulk, 99th", "beside_bulk", "p99_us", "µs", False, (Bound("≤", 1.0),)),
    Row("requests beside bulk", "beside_bulk", "requests_s", "/s", True),
    Row("bulk kept beside requests", "beside_bulk", "kept", "", True, (Bound("≥", 0.6, ITSELF),)),
    Row("memory at the start", "idle_memory", "start_mib", "MiB", False),
    Row("idle connection", "idle_memory", "kib_per_connection", "KiB", False, (Bound("≤", 4.0, ITSELF),)),
    Row("growth after 10,000", "churn_memory", "grown_mib", "MiB", False, (Bound("≤", 1.0, ITSELF),)),
    # The relative one says little of who is large from the start.
    Row("growth, of the start", "churn_memory", "growth", "", False, (Bound("≤", 0.05, ITSELF),), is_drawn=False),
    Row("100 ms round trip", "far", "gbit_s", "Gbit/s", True, (Bound("≥", 0.9, DIRECT),)),
    Row("100 ms at 1 Gbit/s", "far_1g", "gbit_s", "Gbit/s", True, (Bound("≥", 0.9, DIRECT),)),
)


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of every metric over the rounds that have it."""
    names = {name: None for each in rounds for name in each}
    return {name: statistics.median(each[name] for each in rounds if name in each) for name in names}


def peers(names: Iterable[str]) -> list[str]:
    """The encrypted peers among ``names``; ours is none."""
    return [name for name in names if name != OURS and name in SYSTEMS and SYSTEMS[name].is_encrypted]


def best_peer(row: Row, found: Medians) -> tuple[str, float] | None:
    """Who of the encrypted peers is best in ``row``, and with what; None where none was measured."""
    values = value_by_system(row, found)
    candidates = [(name, values[name]) for name in peers(values)]
    if not candidates:
        return None
    return (max if row.is_higher_better else min)(candidates, key=lambda each: each[1])


def value_by_system(row: Row, found: Medians) -> dict[str, float]:
    """The row's median of every system that has one; without halves there is no processor time of theirs."""
    return {
        system: metrics[row.metric]
        for system, metrics in found.get(row.figure, {}).items()
        if row.metric in metrics and not (system == DIRECT and row.metric.startswith("cpu_"))
    }


def ratio_to_best(row: Row, found: Medians) -> float | None:
    """Ours over the best peer's; None where either is missing or the peer's is 0."""
    ours, best = value_by_system(row, found).get(OURS), best_peer(row, found)
    return None if ours is None or best is None or best[1] == 0 else ours / best[1]


def verdicts(row: Row, found: Medians) -> list[Verdict]:
    """How each of the row's bounds came out; none where ours was not measured."""
    values = value_by_system(row, found)
    best = best_peer(row, found)
    known = values | {ITSELF: 1.0} | ({BEST: best[1]} if best else {})
    out = []
    if OURS not in values:
        return []
    for bound in row.bounds:
        reference = known.get(bound.reference)
        if reference is None:
            out.append(Verdict(bound, None, None))
            continue
        ratio = values[OURS] / reference if reference else None
        out.append(Verdict(bound, ratio, bound.is_met(values[OURS], reference)))
    return out


def short(value: float) -> str:
    """Three digits that matter, thousands with a comma."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def verdict_text(verdict: Verdict) -> str:
    """``≥ 1.3 × best: 1.42, met``; the ratio is left out for a plain number."""
    text = verdict.bound.text()
    if verdict.is_met is None:
        return f"{text}: not measured"
    ratio = "" if verdict.ratio is None or verdict.bound.reference == ITSELF else f"{verdict.ratio:.2f}, "
    return f"{text}: {ratio}{'met' if verdict.is_met else 'NOT met'}"
