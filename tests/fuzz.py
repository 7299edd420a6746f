"""The coverage-guided fuzzer for one target: ``python -m tests.fuzz TARGET``; ``make fuzz`` runs every one.

It needs atheris (``pip install '.[fuzz]'``), which exists for some versions of Python only. It runs for
``REFLEX_FUZZ_S`` seconds (15) and ends with an error where it has found something; the input is then in
``crash-...`` in the current folder.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

DEFAULT_SECONDS: Final = 15
MAX_INPUT_BYTES: Final = 4_096
MEMORY_LIMIT_MIB: Final = 1_024  # more than that is a finding: no input may make this side keep much
INPUT_TIMEOUT_S: Final = 5  # so is an input that takes longer
EXIT_USAGE: Final = 2


def main(arguments: list[str]) -> int:
    """Fuzz the target that is named; returns only where it cannot."""
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        atheris = None
    if atheris is None:
        targets = importlib.import_module("tests.fuzz_targets")
    else:
        with atheris.instrument_imports(include=["reflex"]):
            targets = importlib.import_module("tests.fuzz_targets")
    if len(arguments) != 1 or arguments[0] not in targets.TARGETS:
        sys.stderr.write(f"usage: python -m tests.fuzz {'|'.join(targets.TARGETS)}\n")
        return EXIT_USAGE
    if atheris is None:
        sys.stderr.write("this needs atheris: pip install '.[fuzz]'\n")
        return EXIT_USAGE
    name = arguments[0]
    with tempfile.TemporaryDirectory(prefix=f"reflex-fuzz-{name}-") as corpus:
        for number, seed in enumerate(targets.SEEDS[name]):
            (Path(corpus) / str(number)).write_bytes(seed)
        seconds = os.environ.get("REFLEX_FUZZ_S", str(DEFAULT_SECONDS))
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={MAX_INPUT_BYTES}",
            f"-rss_limit_mb={MEMORY_LIMIT_MIB}",
            f"-timeout={INPUT_TIMEOUT_S}",
            "-print_final_stats=0",
            "-verbosity=1",
            corpus,
        ]
        atheris.Setup([sys.argv[0], *options], targets.TARGETS[name])
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
