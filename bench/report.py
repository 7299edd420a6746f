"""From the JSON of a run to ``docs/benchmarks.md`` and its pictures.

``python -m bench.report RESULTS.json`` writes them; with ``--compare OLD.json`` it prints two runs side by
side instead. Every part of the results may be missing; what is there is shown.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.figures import DELAY_MIN_S, FIGURES, IDLE_STEPS
from bench.loadtools import PERCENTILES
from bench.peers import congestion_text, medians_of
from bench.svg import Axis, Bar, Line, bars, decade_axis, linear_axis, lines
from bench.systems import DIRECT, FLOOR, OURS, SYSTEMS
from bench.targets import ROWS, Row, best_peer, short, value_by_system, verdict_text, verdicts
from reflex.loop import WATCH_S

DOCS: Final = Path(__file__).parents[1] / "docs"
LATENCY_FIGURE: Final = "requests_32"
UNPACED: Final = ("reno", "cubic")  # Reflex leaves these as they are
Results = Mapping[str, Any]


def with_unit(row: Row, value: float) -> str:
    return f"{short(value)} {row.unit}".replace(" /s", "/s").strip()


def style(system: str) -> int:
    """The same colour for a system in every picture."""
    return list(SYSTEMS).index(system)


def advantages(results: Results) -> list[Bar]:
    """How many times better than the best peer ours is, for every row that has one: no choice of what looks well."""
    found = medians_of(results)
    out = []
    for row in (each for each in ROWS if each.is_drawn):
        ours, best = value_by_system(row, found).get(OURS), best_peer(row, found)
        if not ours or best is None or not best[1]:
            continue
        advantage = ours / best[1] if row.is_higher_better else best[1] / ours
        label = SYSTEMS[best[0]].label
        out.append(Bar(row.label, advantage, with_unit(row, ours), f"{with_unit(row, best[1])}, {label}"))
    return out


def pictures(results: Results) -> dict[str, str]:
    """File name to SVG, of those pictures that the results have figures for."""
    out = {}
    found = medians_of(results)
    machine = results.get("machine", {})
    where = ", ".join(filter(None, [machine.get("processor"), f"{machine.get('cores', '?')} cores"]))
    if rows := advantages(results):
        subtitle = f"loopback, medians of {results['rounds']} rounds; longer is better. {where}"
        out["benchmarks.svg"] = bars(
            "Reflex beside the best of its peers, figure by figure",
            subtitle,
            rows,
            reference="best encrypted peer",
            columns=("Reflex", "best peer"),
        )
    order = [name for name in SYSTEMS if name != DIRECT]
    memory = found.get("idle_memory", {})
    drawn = [
        Line(SYSTEMS[name].label, [(0, 0), *((n, memory[name][f"kib_at_{n}"] / 1024) for n in IDLE_STEPS)], style(name))
        for name in order
        if name in memory
    ]
    if drawn:
        highest = max(y for line in drawn for _, y in line.points)
        out["benchmarks-memory.svg"] = lines(
            "Memory that idle connections take",
            f"both halves together, above their start; one request each before. {where}",
            drawn,
            x_axis=linear_axis("idle connections", IDLE_STEPS[-1], steps=4),
            y_axis=linear_axis("MiB", highest),
        )
    latency = found.get(LATENCY_FIGURE, {})
    # Percentiles by how rare the rest is: every step to the right is ten times rarer.
    rare = [(1 / (1 - float(each) / 100), each) for each in PERCENTILES if float(each) >= 50]
    drawn = [
        Line(SYSTEMS[name].label, [(x, latency[name][f"p{p}_us"] / 1000) for x, p in rare], style(name))
        for name in [*order, DIRECT]
        if name in latency
    ]
    if drawn:
        values = [y for line in drawn for _, y in line.points]
        named = ((1 / (1 - float(p) / 100), f"{p} %") for p in ("50", "90", "99", "99.9", "99.99"))
        out["benchmarks-latency.svg"] = lines(
            "How long small requests take",
            f"128 bytes, keep-alive, 32 connections; both axes logarithmic, lower is better. {where}",
            drawn,
            x_axis=Axis("requests that take no longer", list(named), is_logarithmic=True),
            y_axis=decade_axis("ms", max(min(values), 1e-3), max(values)),
        )
    if records := results.get("codec", {}).get("records"):
        out["benchmarks-records.svg"] = _records_picture(records, where)
    return out


def _records_picture(records: Sequence[Mapping[str, Any]], where: str) -> str:
    suites = list(dict.fromkeys(each["suite"] for each in records))
    kinds = {"pooled": "pools", "unpooled": "no pools", "plain": "plain"}
    drawn: list[Line] = []
    for suite in suites:
        short_name = "AES" if suite.startswith("AES") else "ChaCha20"
        for kind, name in kinds.items():
            points = [
                (r["body_bytes"], r[kind]["mb_per_s"] / 1000) for r in records if r["suite"] == suite and kind in r
            ]
            drawn.append(Line(f"{short_name}, {name}", sorted(points), len(drawn)))
    sizes = sorted({r["body_bytes"] for r in records})
    x_axis = Axis("bytes in a record", [(s, f"{s:,}") for s in sizes], is_logarithmic=True)
    highest = max(y for line in drawn for _, y in line.points)
    return lines(
        "Records sealed and opened, by size",
        f"one thread, both halves one after the other; higher is better. {where}",
        drawn,
        x_axis=x_axis,
        y_axis=linear_axis("GB/s", highest),
    )


def document(results: Results, names: Sequence[str]) -> str:
    """The text of docs/benchmarks.md; ``names`` are the pictures that were written."""
    return "\n".join(_document_lines(results, names)).rstrip() + "\n"


def _document_lines(results: Results, names: Sequence[str]) -> Iterator[str]:
    machine = results.get("machine", {})
    found = medians_of(results)
    yield "# Benchmarks\n"
    yield f"Written by `{results.get('command', 'make bench')}` on {machine.get('date', 'an unknown date')}.\n"
    yield "| | |\n|---|---|"
    yield from (f"| {key} | {value} |" for key, value in machine.items() if key != "date" and value)
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    if versions:
        yield f"| versions | {versions} |"
    if left_out := results.get("left_out"):
        yield f"| not installed, left out | {', '.join(left_out)} |"
    yield ""
    if found:
        yield from _comparison_lines(results, names)
    yield from _code_lines(results, names)


def _comparison_lines(results: Results, names: Sequence[str]) -> Iterator[str]:
    found = medians_of(results)
    if "benchmarks.svg" in names:
        yield "![Reflex beside the best of its peers](benchmarks.svg)\n"
    yield "## How it was measured\n"
    yield (
        "Every system is a port forward on loopback through both of its halves: client → client half → server half → "
        "target. Targets are iperf3 for bulk, and nginx (one worker) with a file of 128 bytes for requests, asked "
        "by wrk (one thread). Every system is started fresh for each figure; all take their turns in one run of "
        f"{results['rounds']} rounds, {results['seconds']:g} s each, over 100 ms "
        f"{max(results['seconds'], DELAY_MIN_S):g} s, the order rotated; the figures are medians. "
        "Processor time is that of both halves, from `/proc`; memory is PSS, of both halves together.\n"
    )
    yield (
        "Reflex runs as `reflex init` sets it up, every check, limit and counter on, one worker a half. Ciphers: "
        "AES-256-GCM for Reflex and shadowsocks, AES-128-GCM for OpenSSH and v2ray, what TLS agrees on for trojan and "
        "stunnel, spiped's own. Otherwise peers run with their defaults, but for `TCP_NODELAY` where they have a "
        "switch, as many connections as they are given, 60 s for spiped's handshake, and one thread for haproxy.\n"
    )
    yield f"{_congestion_text(results.get('machine', {}))}\n"
    yield (
        "The median round trip through Reflex can be shorter than without any proxy: in a conversation with a near "
        f"peer its daemons watch for the answer for up to {WATCH_S * 1000:g} ms before they sleep, giving way to "
        "whoever wants the processor (`reflex/loop.py`). A processor that nobody uses goes to sleep, and waking it "
        "takes longer than two daemons that keep it awake; *round trip, CPU* is the price.\n"
    )
    yield (
        f"*best* is the best encrypted peer of the row. {SYSTEMS[FLOOR].label.split(',')[0]}, two hops without "
        "encryption, is the floor and no peer. The 100 ms round trip is made by `bench/delay.py` between the halves, "
        "and for *no proxy* between client and target.\n"
    )
    yield "## Targets\n"
    yield "| figure | Reflex | best peer | target and outcome |\n|---|---|---|---|"
    for row in ROWS:
        values = value_by_system(row, found)
        if OURS not in values:
            continue
        best = best_peer(row, found)
        peer = f"{with_unit(row, best[1])} ({SYSTEMS[best[0]].label})" if best else "–"
        outcome = "; ".join(verdict_text(verdict) for verdict in verdicts(row, found)) or "–"
        yield f"| {row.label} | {with_unit(row, values[OURS])} | {peer} | {outcome} |"
    yield "\n## Every system\n"
    measured = {name for systems in found.values() for name in systems}
    order = [name for name in SYSTEMS if name in measured]
    yield "| figure | " + " | ".join(SYSTEMS[name].label for name in order) + " |"
    yield "|---" * (len(order) + 1) + "|"
    for row in ROWS:
        values = value_by_system(row, found)
        if values:
            cells = (short(values[name]) if name in values else "–" for name in order)
            yield f"| {row.label}{', ' + row.unit if row.unit else ''} | {' | '.join(cells)} |"
    yield ""
    yield from (f"- {figure.what}" for figure in FIGURES.values() if figure.name in found)
    if failures := results.get("failures"):
        yield "\nMeasurements that failed; where others of the same did not, the medians are of those:\n"
        counted = Counter((each["figure"], each["system"], each["error"][:160]) for each in failures)
        for (figure, system, error), count in sorted(counted.items()):
            yield f"- {figure}, {SYSTEMS[system].label}: {count} of {results['rounds']}: {error}"
    yield ""
    for name, title in (("benchmarks-memory.svg", "Memory"), ("benchmarks-latency.svg", "Latency")):
        if name in names:
            yield f"## {title}\n\n![{title}]({name})\n"


def _congestion_text(machine: Mapping[str, Any]) -> str:
    text = congestion_text(machine).replace("congestion control:", "TCP's congestion control was")
    if machine.get("congestion control") in UNPACED:
        return f"{text}. It was the same for Reflex and its peers."
    return (
        f"{text}. Where that paces what is sent (bbr does), Reflex asks for reno on loopback connections, here as "
        "everywhere, which gains it about a fifth in bulk; its peers were paced. `make bench BENCH_ARGS='--congestion "
        "cubic'`, as root, measures with the same for all."
    )


def _code_lines(results: Results, names: Sequence[str]) -> Iterator[str]:
    if rows := results.get("codec", {}).get("rows"):
        yield "## In process\n"
        yield (
            "Best of many rounds. *No pools* is the same code with pools that keep nothing; *plain* is the same work "
            "written without pools.\n"
        )
        yield "| | Reflex | no pools | plain | target |\n|---|---|---|---|---|"
        for row in rows:
            others = (f"{short(row[each]['best'])}" if each in row else "–" for each in ("unpooled", "plain"))
            target = "–"
            if row.get("target"):
                target = f"≤ {row['target']:g} {row['unit']}: {'met' if row.get('met') else 'NOT met'}"
            yield f"| {row['name']} | {short(row['best'])} {row['unit']} | {' | '.join(others)} | {target} |"
        yield ""
    if "benchmarks-records.svg" in names:
        yield "## Records\n\n![Records](benchmarks-records.svg)\n"
    if claims := results.get("allocations", {}).get("claims"):
        yield "## Allocations\n"
        loop = results["allocations"].get("loop") or "asyncio's event loop, not the daemons' own"
        yield f"Both daemons in one process, on {loop}, with one tunnel (`max_tunnels = 1`).\n"
        yield from (f"- {'holds' if claim['holds'] else 'does NOT hold'}: {claim['text']}" for claim in claims)
        yield ""
    if text := results.get("allocations_table"):
        yield f"```text\n{text.rstrip()}\n```\n"


def flat(results: Results) -> dict[str, float]:
    """Every figure of ours under one name, for comparing runs."""
    out = {f"{row['name']} [{row['unit']}]": row["best"] for row in results.get("codec", {}).get("rows", [])}
    for record in results.get("codec", {}).get("records", []):
        out[f"{record['suite']}, {record['body_bytes']} bytes [MB/s]"] = record["pooled"]["mb_per_s"]
    found = medians_of(results)
    for row in ROWS:
        values = value_by_system(row, found)
        if OURS in values:
            out[f"{row.label} [{row.unit}]"] = values[OURS]
    return out


def comparison(old: Results, new: Results) -> str:
    """Two runs side by side: what was, what is, and the ratio of the two."""
    before, after = flat(old), flat(new)
    lines_ = [f"{'':<52}{'before':>12}{'after':>12}{'after/before':>14}"]
    for name in list(dict.fromkeys([*before, *after])):
        values = before.get(name), after.get(name)
        cells = [short(value) if value is not None else "–" for value in values]
        ratio = f"{values[1] / values[0]:.2f}" if values[0] and values[1] is not None else "–"
        lines_.append(f"{name:<52}{cells[0]:>12}{cells[1]:>12}{ratio:>14}")
    return "\n".join(lines_)


def write(results: Results, directory: Path = DOCS) -> list[Path]:
    """Write the document and its pictures; returns what was written."""
    drawn = pictures(results)
    files = {"benchmarks.md": document(results, list(drawn))} | drawn
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    return [directory / name for name in files]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="the report of a run")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print both side by side, write nothing")
    parser.add_argument("--to", type=Path, default=DOCS, metavar="DIRECTORY")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    if arguments.compare:
        print(comparison(json.loads(arguments.compare.read_text()), results))
        return 0
    for path in write(results, arguments.to):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
