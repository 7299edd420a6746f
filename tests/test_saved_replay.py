"""reflex.saved_replay: no hello is taken twice, over any sequence of clocks and runs; and nobody is kept out."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Final, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.errors import Replayed, StartError
from reflex.protocol.wire import HELLO_TIME_LIMIT_S
from reflex.replay_file import Hello, ReplayFile
from reflex.saved_replay import COMPLAINT_INTERVAL_S, RETRY_S, SavedReplaySet

NOW: Final = 1_900_000_000
LIMIT: Final = HELLO_TIME_LIMIT_S
ALICE: Final = b"a" * 16


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


class Time:
    """Both clocks of a server: what time it is, and how long it runs."""

    def __init__(self) -> None:
        self.now_s = NOW
        self.elapsed_s = 0.0

    def __call__(self) -> float:
        return self.now_s + 0.9

    def elapsed(self) -> float:
        return self.elapsed_s

    def start(self, path: Path | None) -> SavedReplaySet:
        """A new run of the server."""
        return SavedReplaySet(path, clock=self, elapsed=self.elapsed)

    def takes(self, replay: SavedReplaySet, number: int, time_s: int) -> bool:
        try:
            replay.check_and_insert(key(number), ALICE, time_s, self.now_s)
        except Replayed:
            return False
        return True


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "replay.sqlite"


def written(path: Path) -> list[Hello]:
    file = ReplayFile(path)
    try:
        return sorted(file.hellos(0))
    finally:
        file.close()


def test_a_hello_dated_ahead_is_refused_by_the_next_run_as_well(time: Time, path: Path) -> None:
    first = time.start(path)
    ahead = [(1, NOW), (2, NOW + 5), (3, NOW + LIMIT)]
    behind = [(4, NOW - 1), (5, NOW - LIMIT)]
    assert all(time.takes(first, *hello) for hello in ahead)
    assert not any(time.takes(first, *hello) for hello in behind)  # from before its start
    # The first one is not closed: it was killed.
    second = time.start(path)
    assert len(second) == 3
    assert not any(time.takes(second, *hello) for hello in ahead + behind)
    assert time.takes(second, 6, NOW)
    assert time.takes(second, 7, NOW + LIMIT)
    second.close()
    second.close()
    time.now_s += 3
    third = time.start(path)
    assert len(third) == 3  # what is dated before its start needs no memory
    assert not any(time.takes(third, *hello) for hello in [*ahead, (6, NOW), (7, NOW + LIMIT)])
    assert len(written(path)) == 5
    third.close()


def test_without_a_file_the_next_run_takes_what_is_dated_ahead_once_more(time: Time) -> None:
    first = time.start(None)
    assert time.takes(first, 1, NOW)
    assert time.takes(first, 2, NOW + 5)
    first.close()
    time.now_s += 1
    second = time.start(None)
    assert not time.takes(second, 1, NOW)
    assert time.takes(second, 2, NOW + 5)
    assert not time.takes(second, 2, NOW + 5)
    assert len(second) == 1


def test_what_has_expired_is_deleted_while_it_runs_and_at_the_start(time: Time, path: Path) -> None:
    replay = time.start(path)
    for number in range(1_000):
        time.now_s += 1
        assert time.takes(replay, number, time.now_s)
        assert len(replay) <= LIMIT + 1
    assert written(path) == [(time.now_s - back, key(999 - back)) for back in range(LIMIT, -1, -1)]
    time.now_s += LIMIT + 1
    time.start(path).close()
    assert written(path) == []
    replay.close()


def test_a_clock_that_steps_back_between_two_runs_makes_nothing_good_again(
    time: Time, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = time.start(path)
    assert time.takes(first, 1, NOW)
    time.now_s += 1_000
    assert time.takes(first, 2, time.now_s)  # now the other is forgotten
    first.close()
    time.now_s -= 2
    second = time.start(path)
    assert not time.takes(second, 2, NOW + 1_000)  # an amount that a margin covers
    second.close()
    assert not caplog.records
    time.now_s = NOW - 50
    third = time.start(path)  # and one that nobody would think of
    assert not time.takes(third, 1, NOW)
    assert not time.takes(third, 3, NOW)
    assert time.takes(third, 4, NOW + 1)
    assert [record.getMessage() for record in caplog.records] == [
        "the clock was ahead in an earlier run: hellos are refused for the next 51 s, "
        f"or until the server is started without {path}"
    ]
    third.close()


def test_two_servers_with_one_file_take_no_hello_twice(time: Time, path: Path) -> None:
    one, other = time.start(path), time.start(path)
    assert time.takes(one, 1, NOW)
    with pytest.raises(Replayed, match="by another process"):
        other.check_and_insert(key(1), ALICE, NOW, NOW)
    one.close()
    other.close()


def test_a_file_that_cannot_be_written_stops_nobody_and_is_caught_up_with(
    time: Time, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    replay = time.start(path)
    assert time.takes(replay, 0, NOW)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert all(time.takes(replay, number, NOW + 60) for number in (1, 2))
        assert not any(time.takes(replay, number, NOW + 60) for number in (1, 2))
        time.elapsed_s += COMPLAINT_INTERVAL_S / 2
        assert time.takes(replay, 3, NOW + 60)  # is tried, and fails again
        assert len(caplog.records) == 1
        time.elapsed_s += COMPLAINT_INTERVAL_S / 2
        assert time.takes(replay, 4, NOW - 1 + 60)
        assert len(caplog.records) == 2
        time.now_s += LIMIT + 60
        time.elapsed_s += RETRY_S
        assert time.takes(replay, 5, time.now_s)
        assert len(replay._unsaved) == 4  # one of them has expired
        other.execute("COMMIT")
    assert time.takes(replay, 6, time.now_s)
    assert written(path) == [(NOW, key(0))]  # it is not tried for each
    time.elapsed_s += RETRY_S
    assert time.takes(replay, 7, time.now_s)
    ahead = [(time.now_s, key(number)) for number in (5, 6, 7)]
    assert written(path) == [(NOW + 60, key(number)) for number in (1, 2, 3)] + ahead
    assert replay._unsaved == []
    complaint = f"cannot write the replay file {path}: database is locked; tried again"
    again = f"the replay file {path} can be written again"
    assert [record.getMessage() for record in caplog.records] == [complaint, complaint, again]
    replay.close()


def test_after_it_is_closed_it_still_remembers(time: Time, path: Path) -> None:
    replay = time.start(path)
    replay.close()
    assert time.takes(replay, 1, NOW)
    assert not time.takes(replay, 1, NOW)


def test_what_prevents_the_start_names_key_and_path(time: Time, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match=f"replay_file: cannot open {path.parent}: "):
        time.start(path.parent)

    def fail(file: ReplayFile, before_s: int) -> None:
        raise OSError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(ReplayFile, "forget", fail)
        with pytest.raises(StartError, match=f"replay_file: cannot write {path}: disk I/O error"):
            time.start(path)
    monkeypatch.setitem(sys.modules, "reflex.replay_file", None)
    with pytest.raises(StartError, match="replay_file: this Python has no SQLite"):
        time.start(path)


# A step: what happens first, how far the clock steps, and then a hello: its key, and its time less the clock.
# Few keys and few times, so that hellos come again.
Between = Literal["nothing", "stop", "kill"]
steps = st.lists(
    st.tuples(
        st.sampled_from(["nothing", "nothing", "nothing", "stop", "kill"]),
        st.sampled_from([0, 0, 0, 1, -1, 3, -3, LIMIT, -LIMIT, 2 * LIMIT + 1, -2 * LIMIT - 1, 3_600, -3_600]),
        st.integers(0, 3),
        st.sampled_from([-LIMIT, -1, 0, 0, 1, 2, LIMIT]),
    ),
    max_size=40,
)


@given(steps=steps)
def test_no_hello_is_taken_twice_over_any_sequence_of_hellos_clock_steps_and_restarts(
    steps: list[tuple[Between, int, int, int]],
) -> None:
    """Each step tries its hello, and then every one that was taken before, if its time is acceptable."""
    time = Time()
    runs: list[SavedReplaySet] = []
    taken: list[Hello] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replay.sqlite"
        runs.append(time.start(path))
        for between, step_s, number, offset_s in steps:
            time.now_s += step_s
            if between == "stop":
                runs[-1].close()
            if between != "nothing":
                runs.append(time.start(path))  # who was killed keeps its file open, and no lock on it
            for time_s, ephemeral in taken:
                if abs(time_s - time.now_s) <= LIMIT:
                    assert not time.takes(runs[-1], int.from_bytes(ephemeral, "big"), time_s)
            if time.takes(runs[-1], number, time.now_s + offset_s):
                taken.append((time.now_s + offset_s, key(number)))
        for run in runs:
            run.close()


@given(hellos=st.lists(st.tuples(st.booleans(), st.integers(0, LIMIT), st.integers(0, 60)), min_size=1, max_size=30))
def test_over_restarts_with_a_steady_clock_a_new_hello_from_now_on_is_always_taken(
    hellos: list[tuple[bool, int, int]],
) -> None:
    time = Time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replay.sqlite"
        replay = time.start(path)
        for number, (is_restarted, offset_s, step_s) in enumerate(hellos):
            time.now_s += step_s
            if is_restarted:
                replay.close()
                replay = time.start(path)
            assert time.takes(replay, number, time.now_s + offset_s)
        replay.close()
