"""Everything in one command: what ``make bench`` and ``make bench-quick`` run.

``python -m bench.run`` measures the codec, the allocations and the comparison with the peers, keeps the
figures as JSON and writes ``docs/benchmarks.md`` with its pictures. ``--quick`` measures ours alone, in
short, in under two minutes, and prints a table. ``--compare OLD.json`` prints both runs side by side.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from bench.figures import FIGURES
from bench.network import enter_own_network
from bench.peers import (
    DEFAULT_ROUNDS,
    DEFAULT_SECONDS,
    Results,
    add_congestion_option,
    choose,
    compare,
    table,
    unwind_on_sigterm,
)
from bench.report import comparison, write
from bench.systems import OURS, SYSTEMS

RESULTS: Final = Path(__file__).parent / "results"
QUICK_SECONDS: Final = 1.0
QUICK_FIGURES: Final = ("bulk_up", "bulk_down", "requests_32", "requests_256", "new", "round_trip", "idle_memory")
IN_PROCESS: Final = ("codec", "allocations")


def module(name: str) -> ModuleType | None:
    """``bench.NAME``, or None where it is not there."""
    try:
        return importlib.import_module(f"bench.{name}")
    except ModuleNotFoundError as error:
        print(f"left out: {name}: {error}", flush=True)
        return None


def measure_in_process(results: Results, *, quick: bool) -> None:
    """Codec and allocations: their figures into ``results``, their tables printed."""
    for name in IN_PROCESS:
        if (tool := module(name)) is None:
            continue
        print(f"{name} ...", flush=True)
        # The side without pools costs as long again, and a change is judged by the side with them.
        options = {"pools": (True,)} if quick and name == "allocations" else {}
        found: dict[str, Any] = tool.measure(quick=quick, **options)
        text: str = tool.table(found)
        print(f"{text}\n", flush=True)
        if name == "allocations":  # the table says it all; the sites behind it are many
            results["allocations_table"] = text
            results["allocations"] = {"claims": found.get("claims", []), "loop": found.get("loop")}
        else:
            results[name] = found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="the benchmarks")
    parser.add_argument("--quick", action="store_true", help="under two minutes, no peers, no report")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default: {DEFAULT_ROUNDS}; quick: 1")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"default: {DEFAULT_SECONDS:g}; {QUICK_SECONDS:g}")
    parser.add_argument("--systems", metavar="A,B", help="default: all")
    parser.add_argument("--figures", metavar="X,Y", help="default: all")
    add_congestion_option(parser)
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="default: bench/results/latest.json; quick.json")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print this run beside an earlier one")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    old = json.loads(arguments.compare.read_text()) if arguments.compare else None  # it may be the file written below
    out: Path = arguments.json or RESULTS / ("quick.json" if quick else "latest.json")
    systems = [OURS] if quick and not arguments.systems else choose(arguments.systems, list(SYSTEMS))
    figures = list(QUICK_FIGURES) if quick and not arguments.figures else choose(arguments.figures, list(FIGURES))
    results: Results = {"command": "make bench-quick" if quick else "make bench"}
    if any((arguments.rounds, arguments.seconds, arguments.systems, arguments.figures, arguments.congestion)):
        results["command"] = "python -m bench.run " + " ".join(sys.argv[1:])
    unwind_on_sigterm()
    system_control = enter_own_network(arguments.congestion) if arguments.congestion else None
    try:
        measure_in_process(results, quick=quick)
        compare(
            rounds=arguments.rounds or (1 if quick else DEFAULT_ROUNDS),
            seconds=arguments.seconds or (QUICK_SECONDS if quick else DEFAULT_SECONDS),
            systems=systems,
            figures=figures,
            system_congestion_control=system_control,
            results=results,
        )
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is written", file=sys.stderr)
        return 130
    print(f"\n{table(results)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwrote {out}")
    if not quick:
        for path in write(results):
            print(f"wrote {path}")
    if old is not None:
        print(f"\n{comparison(old, results)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
