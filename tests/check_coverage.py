"""Hold each module to its share of covered lines and branches.

``python tests/check_coverage.py .coverage.json`` reads what ``coverage json`` wrote, lists every
module that falls short, and exits 1 if there is one. Silent when all is well. (The 95 % over the
whole package is ``fail_under`` in pyproject.toml.)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = Path("reflex")
REQUIRED: Final = {Path("reflex/protocol"): 100.0}  # directory to per cent
MISSING_SHOWN: Final = 20  # per module; the report of `make cover` has them all


def shortfalls(report: Mapping[str, Any], modules: list[Path]) -> list[str]:
    """One line for each of ``modules`` below its share. ``report`` is coverage's JSON, format 3."""
    files = {Path(name): data for name, data in report["files"].items()}
    lines = []
    for module in modules:
        required = max((share for where, share in REQUIRED.items() if where in module.parents), default=0.0)
        if not required:
            continue
        if module not in files:
            lines.append(f"{module}: not measured; {required:g} % of lines and branches required")
            continue
        data = files[module]
        covered = data["summary"]["percent_covered"]
        if covered < required:
            missing = [f"line {line}" for line in data["missing_lines"]]
            missing += [f"branch {start} to {end}" for start, end in data.get("missing_branches", [])]
            more = ", ..." if len(missing) > MISSING_SHOWN else ""
            shown = ", ".join(missing[:MISSING_SHOWN]) + more
            lines.append(f"{module}: {covered:.1f} %, {required:g} % required; missing: {shown}")
    return lines


def main() -> int:
    report = json.loads(Path(sys.argv[1]).read_text())
    lines = shortfalls(report, sorted(PACKAGE.rglob("*.py")))
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
