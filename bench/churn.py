"""Every allocation that Python code makes, also those that are freed at once, by source line.

``tracemalloc`` alone shows what is still there; what was allocated and freed in between it shows only
as a peak. Here a trace function reads and resets that peak between any two bytecode instructions: by
how much the peak passed what was there before is what that one instruction allocated. Slow (some
microseconds an instruction), but nothing is missed, and nothing is counted that the tracing itself
needs.

What it sees is what asks Python's allocators. Objects from CPython's free lists (small tuples, floats,
short lists) are not asked for, and memory that OpenSSL takes for itself is not Python's. One
instruction that allocates several objects counts once, with their sum. Of an object whose class has an
``__init__`` in Python, what the frame of that call takes (a few hundred bytes at most) is left out.
"""

from __future__ import annotations

import dis
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, Final, Self

import reflex

LARGE_BYTES: Final = 512  # from this size on CPython asks the system's allocator, not its own arenas
# They bind a name and allocate nothing themselves; the dict of locals that tracing keeps may grow there.
_BINDING: Final = frozenset({"STORE_FAST", "STORE_DEREF", "DELETE_FAST", "DELETE_DEREF"})

_ROOTS: Final = (Path(__file__).resolve().parent.parent, Path(reflex.__file__).resolve().parent.parent)
_LIBRARY: Final = Path(dis.__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Site:
    """What one source line allocated: how often, how much in all, the most at once; all in bytes.

    ``file`` is a path below this project, or below the standard library (``lib/…``).
    """

    file: str
    line: int
    count: int
    bytes: int
    largest_bytes: int
    large_count: int
    large_bytes: int

    @property
    def is_ours(self) -> bool:
        """Whether it is the tunnel's own code."""
        return self.file.startswith("reflex/")


class AllocationTracer(AbstractContextManager["AllocationTracer"]):
    """Records allocations of this thread in frames that are entered inside its ``with`` block.

    ``tracemalloc`` must be tracing. No other thread may be allocating meanwhile: its allocations
    would be taken for this one's. What is to be looked at should have run once under another tracer:
    CPython allocates a table for each code object that is traced for the first time.

    Args:
        large_bytes: what counts as large.
    """

    def __init__(self, *, large_bytes: int = LARGE_BYTES) -> None:
        self._large_bytes = large_bytes
        # (code, offset of the instruction) -> count, bytes, largest, count of large, bytes of large
        self._found: dict[tuple[CodeType, int], list[int]] = {}
        self._opcodes: dict[CodeType, bytes] = {}

    def __enter__(self) -> Self:
        if not tracemalloc.is_tracing():
            raise RuntimeError("tracemalloc is not tracing")
        self._traced_before = sys.gettrace()  # a debugger's, or a coverage tool's
        sys.settrace(self._make_trace())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.settrace(self._traced_before)

    def _make_trace(self) -> Callable[[FrameType, str, Any], Any]:
        memory, reset_peak = tracemalloc.get_traced_memory, tracemalloc.reset_peak
        account, call_noise = self._account, _call_noise_bytes
        code: CodeType | None = None
        offset = 0
        before = (0, 0)

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal code, offset, before
            now, peak = memory()
            grown = peak - before[0]
            if grown > 0 and code is not None:
                if event == "call":
                    # Tracing has just made this frame an object: what is there beyond that is the caller's.
                    grown = now - before[0] - call_noise(frame)
                if grown > 0:
                    account(code, offset, grown)
            if event == "call":
                frame.f_trace_opcodes = True
                frame.f_trace_lines = False
            code = frame.f_code
            offset = frame.f_lasti
            # Nothing may be freed between the reset and the next instruction, or as much could be
            # allocated unseen: every number that is held here is let go before.
            now = peak = grown = 0
            before = memory()
            reset_peak()
            return trace

        return trace

    def _account(self, code: CodeType, offset: int, size_bytes: int) -> None:
        opcodes = self._opcodes.get(code)
        if opcodes is None:
            opcodes = self._opcodes[code] = code.co_code
        if offset >= 0 and dis.opname[opcodes[offset]] in _BINDING:
            return
        found = self._found.get((code, offset))
        if found is None:
            found = self._found[code, offset] = [0, 0, 0, 0, 0]
        found[0] += 1
        found[1] += size_bytes
        found[2] = max(found[2], size_bytes)
        if size_bytes >= self._large_bytes:
            found[3] += 1
            found[4] += size_bytes

    def sites(self) -> list[Site]:
        """What was found, by source line, the largest sum first."""
        lines: dict[tuple[str, int], list[int]] = {}
        for (code, offset), found in self._found.items():
            into = lines.setdefault((code.co_filename, _line_of(code, offset)), [0, 0, 0, 0, 0])
            for index, value in enumerate(found):
                into[index] = max(into[index], value) if index == 2 else into[index] + value
        sites = [Site(short_path(file), line, *found) for (file, line), found in lines.items()]
        return sorted(sites, key=lambda site: -site.bytes)


def _call_noise_bytes(frame: FrameType) -> int:
    """What tracing itself allocates when a frame is entered: the frame object and its dict of locals."""
    return sys.getsizeof(frame) + sys.getsizeof(frame.f_locals)


def _line_of(code: CodeType, offset: int) -> int:
    line = code.co_firstlineno
    for start, number in dis.findlinestarts(code):
        if start > offset:
            break
        line = number or line
    return line


def short_path(file: str) -> str:
    """A file's path without what is particular to this machine."""
    path = Path(file)
    for root, prefix in (*((root, Path()) for root in _ROOTS), (_LIBRARY, Path("lib"))):
        if path.is_absolute() and path.is_relative_to(root):
            return str(prefix / path.relative_to(root))
    return path.name if path.is_absolute() else file


def totals(sites: Iterable[Site]) -> dict[str, int]:
    """The sums over sites: ``count`` and ``bytes``, and of the large ones ``large_count`` and ``large_bytes``."""
    result = {"count": 0, "bytes": 0, "large_count": 0, "large_bytes": 0}
    for site in sites:
        result["count"] += site.count
        result["bytes"] += site.bytes
        result["large_count"] += site.large_count
        result["large_bytes"] += site.large_bytes
    return result
