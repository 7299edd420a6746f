"""The comparison: every system by every figure, in turn, several rounds; a table and JSON.

``python -m bench.peers [--rounds N] [--seconds S] [--systems a,b] [--figures x,y] [--congestion NAME] [--json OUT]``

Each figure starts each system fresh. Within a round a figure goes through all systems before the next
figure begins, and each round starts with another system, so that what changes on the machine meanwhile
meets all of them. What is reported are medians over the rounds. With ``--congestion cubic`` all of it happens in a
network of its own, where that is TCP's default: one that paces (bbr) costs the peers on loopback, where Reflex
switches it off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.figures import FIGURES, applies, raise_descriptor_limit
from bench.halves import StartFailed
from bench.loadtools import TOOLS, ToolFailed
from bench.machine import describe
from bench.network import enter_own_network
from bench.systems import OURS, SYSTEMS, program_version, which
from bench.targets import ROWS, Medians, best_peer, medians, short, value_by_system, verdict_text, verdicts

DEFAULT_ROUNDS: Final = 5
DEFAULT_SECONDS: Final = 3.0
SIGNIFICANT_DIGITS: Final = 6  # in the file; more are noise
COLUMN_WIDTH: Final = 12

Results = dict[str, Any]


def choose(names: str | None, known: Sequence[str]) -> list[str]:
    """The comma-separated ``names``, all of ``known`` where there are none. Raises SystemExit on another."""
    chosen = names.split(",") if names else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return chosen


def compare(
    *,
    rounds: int,
    seconds: float,
    systems: Sequence[str],
    figures: Sequence[str],
    system_congestion_control: str | None = None,
    results: Results | None = None,
) -> Results:
    """Measure; returns what is written as JSON. ``results``, if given, is filled and can be kept when interrupted.

    ``system_congestion_control`` is written down; it differs from what is in use in a network of the run's own.
    """
    results = {} if results is None else results
    missing = [tool for tool, command in TOOLS.items() if which(command[0]) == command[0]]
    if missing:
        raise SystemExit(f"the comparison needs {', '.join(missing)} (Debian: apt-get install {' '.join(missing)})")
    raise_descriptor_limit()
    left_out = {name: SYSTEMS[name].package for name in systems if not SYSTEMS[name].is_installed}
    chosen = [name for name in systems if name not in left_out]
    for name, package in left_out.items():
        print(f"left out: {SYSTEMS[name].label} is not installed (Debian: {package})", flush=True)
    results |= {
        "machine": describe(system_congestion_control=system_congestion_control),
        "versions": {name: version for name in chosen if (version := SYSTEMS[name].version())}
        | {tool: program_version(command) for tool, command in TOOLS.items()},
        "left_out": left_out,
        "rounds": rounds,
        "seconds": seconds,
        "figures": {},
        "failures": [],
    }
    started_s = time.monotonic()
    total = rounds * len(figures)
    done = 0
    for number in range(rounds):
        order = chosen[number % len(chosen) :] + chosen[: number % len(chosen)]
        for figure in figures:
            for name in order:
                if applies(figure, name):
                    _measure(results, figure, name, seconds)
            done += 1
            taken_s = time.monotonic() - started_s
            print(
                f"round {number + 1}/{rounds} {figure}: {taken_s / 60:.1f} min gone, "
                f"about {taken_s / done * (total - done) / 60:.1f} left",
                flush=True,
            )
    return results


def _measure(results: Results, figure: str, name: str, seconds: float) -> None:
    """One system by one figure, once; a failure is written down, and the run goes on."""
    try:
        found = FIGURES[figure].measure(SYSTEMS[name], seconds)
    except (ToolFailed, StartFailed, OSError) as error:
        results["failures"].append({"figure": figure, "system": name, "error": str(error)[:500]})
        print(f"  {figure} {name}: failed: {str(error)[:200]}", flush=True)
        return
    if stalled := found.get("stalled"):
        print(f"  {figure} {name}: {stalled:.0f} connections stalled and were tried anew", flush=True)
    rounded = {metric: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for metric, value in found.items()}
    entry = results["figures"].setdefault(figure, {}).setdefault(name, {"rounds": []})
    entry["rounds"].append(rounded)
    entry["median"] = medians(entry["rounds"])


def medians_of(results: Mapping[str, Any]) -> Medians:
    """figure -> system -> metric -> median, from what was written as JSON."""
    return {
        figure: {system: entry["median"] for system, entry in systems.items()}
        for figure, systems in results.get("figures", {}).items()
    }


def congestion_text(machine: Mapping[str, str]) -> str:
    """``congestion control: cubic, in a network of the run's own; the system's: bbr``."""
    control, default = machine.get("congestion control", "unknown"), machine.get("the system's congestion control")
    own = f", in a network of the run's own; the system's: {default}" if default not in (None, control) else ""
    return f"congestion control: {control}{own}"


def add_congestion_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--congestion", metavar="NAME", help="TCP's congestion control for all, in a network of the run's own; as root"
    )


def table(results: Mapping[str, Any]) -> str:
    """Rows by systems with medians, then what was aimed at and how it came out."""
    found = medians_of(results)
    measured = {name for systems in found.values() for name in systems}
    names = [name for name in SYSTEMS if name in measured]
    lines = [congestion_text(results.get("machine", {}))]
    lines += [f"{'':<34}" + "".join(f"{name:>{COLUMN_WIDTH}}" for name in names)]
    held = []
    for row in ROWS:
        values = value_by_system(row, found)
        if not values:
            continue
        label = f"{row.label}{', ' + row.unit if row.unit else ''}"
        cells = (short(values[name]) if name in values else "–" for name in names)
        lines.append(f"{label:<34}" + "".join(f"{cell:>{COLUMN_WIDTH}}" for cell in cells))
        best = best_peer(row, found)
        if OURS in values:
            who = f"{row.label} (best: {best[0]})" if best else row.label
            held += [
                f"  {who:<44}{verdict_text(verdict)}" for verdict in verdicts(row, found) if verdict.is_met is not None
            ]
    return "\n".join([*lines, "", *held])


def unwind_on_sigterm() -> None:
    """SIGTERM ends this process as Ctrl-C does: through every ``finally``."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="Reflex beside its peers on loopback")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS, metavar="N")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, metavar="S", help="of each measurement")
    parser.add_argument("--systems", metavar="A,B", help=f"of: {', '.join(SYSTEMS)}")
    parser.add_argument("--figures", metavar="X,Y", help=f"of: {', '.join(FIGURES)}")
    add_congestion_option(parser)
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    arguments = parser.parse_args()
    unwind_on_sigterm()
    systems, figures = choose(arguments.systems, list(SYSTEMS)), choose(arguments.figures, list(FIGURES))
    system_control = enter_own_network(arguments.congestion) if arguments.congestion else None
    results: Results = {}
    status = 0
    try:
        compare(
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            systems=systems,
            figures=figures,
            system_congestion_control=system_control,
            results=results,
        )
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured so far:", file=sys.stderr)
        status = 130
    with contextlib.suppress(BrokenPipeError):
        print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
