"""reflex.pool's debug switch: who holds what, and the report of what was never returned."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from reflex.pool import (
    BufferPool,
    report_leaks,
)

ROOT = Path(__file__).parents[1]
SIZE = 64


@pytest.fixture
def recording() -> Iterator[BufferPool]:
    """A pool that records holders, and is made whole when the test ends, so that the exit report stays empty."""
    pool = BufferPool(SIZE, 4, name="recording pool")
    pool.record_holders()
    yield pool
    for buffer in [item for slot in pool._slots.values() for item in slot if item is not pool]:
        pool.release(buffer)


def test_holders_are_not_recorded_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "0"):
        if value is None:
            monkeypatch.delenv("REFLEX_POOL_DEBUG", raising=False)
        else:
            monkeypatch.setenv("REFLEX_POOL_DEBUG", value)
        pool = BufferPool(SIZE, 1)
        pool.acquire()
        assert pool.leaks() == []


def test_the_environment_switches_recording_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFLEX_POOL_DEBUG", "1")
    pool = BufferPool(SIZE, 1)
    buffer = pool.acquire()
    assert len(pool.leaks()) == 1
    pool.release(buffer)
    assert pool.leaks() == []


def test_a_leak_names_the_place_that_borrowed(recording: BufferPool) -> None:
    def forgetful() -> None:
        recording.acquire()

    forgetful()
    recording.release(recording.acquire())
    (holder,) = recording.leaks()
    assert "in forgetful" in holder
    assert Path(__file__).name in holder


def test_recording_twice_forgets_nothing(recording: BufferPool) -> None:
    recording.acquire()
    recording.record_holders()
    assert len(recording.leaks()) == 1


def test_what_was_lent_before_recording_began_can_be_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFLEX_POOL_DEBUG", raising=False)
    pool = BufferPool(SIZE, 1)
    buffer = pool.acquire()
    pool.record_holders()
    assert pool.leaks() == []
    pool.release(buffer)
    assert pool.in_use == 0


def test_the_report_writes_every_leak_and_counts_them(
    recording: BufferPool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = report_leaks()
    capsys.readouterr()
    held = [recording.acquire() for _ in range(3)]
    assert report_leaks() == before + 3
    written = capsys.readouterr().err
    assert written.count("recording pool: never returned, borrowed at\n") == 3
    for buffer in held:
        recording.release(buffer)
    assert report_leaks() == before
    assert "recording pool" not in capsys.readouterr().err


def test_a_buffer_that_is_lent_again_while_its_return_ends_keeps_its_new_holder(recording: BufferPool) -> None:
    """Between putting a buffer back and the end of ``release``, another thread may borrow it: done here by hand."""

    class TakenAtOnce(deque[memoryview]):
        def append(self, item: memoryview) -> None:
            super().append(item)
            borrowed_again.append(recording.acquire())

    borrowed_again: list[memoryview] = []
    recording._free = TakenAtOnce()
    buffer = recording.acquire()
    recording.release(buffer)
    assert borrowed_again == [buffer]
    assert recording.in_use == len(recording.leaks()) == 1


LEAKING_PROGRAM = """
from reflex.pool import BufferPool, TieredPool

def borrows_and_forgets():
    return tiers.acquire(100)

tiers = TieredPool()
hellos = BufferPool(76, 1, name="hellos")
hellos.release(hellos.acquire())
forgotten = borrows_and_forgets()
"""


@pytest.mark.parametrize(("switch", "reported"), [("1", True), ("0", False), ("", False)])
def test_leaks_are_reported_when_the_process_ends(switch: str, reported: bool) -> None:  # noqa: FBT001
    done = subprocess.run(
        [sys.executable, "-c", LEAKING_PROGRAM],
        env={**os.environ, "REFLEX_POOL_DEBUG": switch},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ("pool of 2048-byte buffers: never returned, borrowed at" in done.stderr) == reported
    assert ("borrows_and_forgets" in done.stderr) == reported
    assert "hellos" not in done.stderr
