"""reflex.usage: what users have used of a month, in a file that several processes share."""

from __future__ import annotations

import logging
import sqlite3
import stat
import threading
from pathlib import Path
from typing import Final

import pytest

from reflex import usage as usage_module
from reflex.errors import StartError
from reflex.usage import Amounts, MonthlyUsage, UsageFile
from tests.loops import in_loop, until

ALICE: Final = "b831381d-6324-4d53-ad4f-8cda48b30811"
BOB: Final = "b831381d-6324-4d53-ad4f-8cda48b30812"
NAMES: Final = {ALICE: "alice", BOB: "bob"}
NOVEMBER_S: Final = 1_793_491_200.0 + 30 * 86_400 - 1  # 2026-11-30 23:59:59 UTC


class Clock:
    def __init__(self) -> None:
        self.now_s = NOVEMBER_S

    def __call__(self) -> float:
        return self.now_s


def rows(path: Path) -> list[tuple[str, str, str, int]]:
    database = sqlite3.connect(path)
    try:
        return database.execute("SELECT user_id, month, name, bytes FROM usage ORDER BY month, name").fetchall()
    finally:
        database.close()


# The file


def test_a_new_file_is_its_owners_alone_and_an_old_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    file = UsageFile(path, NAMES)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert file.add({(ALICE, "2026-11"): 5, (BOB, "2026-10"): 7}, "2026-11") == {ALICE: 5}
    file.close()
    again = UsageFile(path, {**NAMES, ALICE: "alicia"})
    assert again.add({}, "2026-10") == {BOB: 7}
    assert again.add({(ALICE, "2026-11"): 10**15}, "2026-11") == {ALICE: 10**15 + 5}
    again.close()
    assert rows(path) == [(BOB, "2026-10", "bob", 7), (ALICE, "2026-11", "alicia", 10**15 + 5)]


def test_a_file_that_is_there_is_opened_without_a_write(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    UsageFile(path, NAMES).close()
    before = path.read_bytes()
    UsageFile(path, NAMES).close()
    assert path.read_bytes() == before, "each write counts in the file's head"


def test_two_who_write_add_up(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    files = [UsageFile(path, NAMES) for _ in range(2)]

    def write(file: UsageFile) -> None:
        for _ in range(20):
            file.add({(ALICE, "2026-11"): 1}, "2026-11")

    threads = [threading.Thread(target=write, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [file.add({}, "2026-11") for file in files] == [{ALICE: 40}] * 2
    for file in files:
        file.close()


def test_what_is_no_place_for_the_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("this is no database, although it is long enough to be looked at as one\n" * 20)
    other = tmp_path / "other.sqlite"
    database = sqlite3.connect(other)
    database.execute("CREATE TABLE usage (colour TEXT)")
    database.close()
    for path, reason in (
        (tmp_path / "missing" / "usage.sqlite", "open .*: No such file or directory"),
        (tmp_path, "open .*: unable to open database file"),
        (text, "write .*: file is not a database"),
        (other, "write .*: no such column: user_id"),
        (Path("/proc/version"), "write .*: unable to open database file"),
    ):
        with pytest.raises(StartError, match=f"usage_file: cannot (?:{reason})") as caught:
            UsageFile(path, NAMES)
        assert str(path) in str(caught.value)
    assert "colour" in str(sqlite3.connect(other).execute("SELECT sql FROM sqlite_master").fetchall())


def test_an_addition_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    file = UsageFile(path, NAMES)
    file.add({(ALICE, "2026-11"): 5}, "2026-11")
    with pytest.raises(OverflowError):
        file.add({(ALICE, "2026-11"): 1, (BOB, "2026-11"): 2**70}, "2026-11")
    assert file.add({}, "2026-11") == {ALICE: 5}
    file.close()


def test_where_it_cannot_be_read_nothing_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "usage.sqlite"
    file = UsageFile(path, NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(usage_module, "_READ", "SELECT user_id, bytes FROM missing WHERE month = ?")
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            file.add({(ALICE, "2026-11"): 5}, "2026-11")
    assert file.add({(ALICE, "2026-11"): 5}, "2026-11") == {ALICE: 5}
    file.close()


# Counting


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_counted_written_and_kept(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "usage.sqlite"

    @in_loop
    async def first() -> None:
        usage = MonthlyUsage(path, NAMES, clock=clock)
        usage.count(ALICE, 100)
        usage.count(BOB, 0)
        assert (usage.used(ALICE), usage.used(BOB), usage.is_counting) == (100, 0, True)
        assert rows(path) == []
        usage.write()
        usage.write()  # the first one is still to come
        usage.count(ALICE, 1)
        await until(lambda: rows(path))
        assert rows(path)[0][3] in (100, 101)
        assert usage.used(ALICE) == 101
        await usage.close()
        assert not usage.is_counting
        await usage.close()
        usage.close_now()
        usage.write()

    @in_loop
    async def second() -> None:
        usage = MonthlyUsage(path, NAMES, clock=clock)
        assert usage.used(ALICE) == 101
        usage.count(ALICE, 9)
        usage.close_now()
        usage.close_now()

    first()
    second()
    assert rows(path) == [(ALICE, "2026-11", "alice", 110)]


def test_a_new_month_begins_with_nothing(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "usage.sqlite"

    @in_loop
    async def run() -> None:
        usage = MonthlyUsage(path, NAMES, clock=clock)
        assert (usage.month, usage.next_month) == ("2026-11", "2026-12-01 00:00 UTC")
        usage.count(ALICE, 100)
        usage.write()
        await until(lambda: rows(path))
        usage.count(ALICE, 1)
        clock.now_s += 1
        assert (usage.month, usage.next_month) == ("2026-12", "2027-01-01 00:00 UTC")
        assert usage.used(ALICE) == 0
        usage.count(ALICE, 7)
        assert usage.used(ALICE) == 7
        await usage.close()
        assert usage.used(ALICE) == 7

    run()
    assert [row[1:] for row in rows(path)] == [("2026-11", "alice", 101), ("2026-12", "alice", 7)]


def test_what_another_process_has_written_is_known_after_the_next_write(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "usage.sqlite"

    @in_loop
    async def run() -> None:
        ours, theirs = (MonthlyUsage(path, NAMES, clock=clock) for _ in range(2))
        theirs.count(ALICE, 50)
        await theirs.close()
        assert ours.used(ALICE) == 0
        ours.count(ALICE, 1)
        ours.write()
        await until(lambda: ours.used(ALICE) == 51)
        await ours.close()

    run()


def test_what_cannot_be_written_is_kept_and_written_later(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "usage.sqlite"
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(usage_module, "BUSY_TIMEOUT_S", 0.01)

    @in_loop
    async def run() -> None:
        usage = MonthlyUsage(path, NAMES, clock=clock)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        usage.count(ALICE, 100)
        for _ in range(2):
            usage.write()
            await until(lambda: not usage._in_writing and usage._counted)
            assert usage._task is not None
            await usage._task
        assert [record.getMessage() for record in caplog.records] == [
            f"cannot write the usage file {path}: database is locked; tried again"
        ]
        assert usage.used(ALICE) == 100
        other.execute("COMMIT")
        other.close()
        await usage.close()

    run()
    assert rows(path) == [(ALICE, "2026-11", "alice", 100)]


def test_a_last_write_that_cannot_be_made_is_told(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "usage.sqlite"
    monkeypatch.setattr(usage_module, "LAST_WRITE_S", 0.05)
    usage = MonthlyUsage(path, NAMES, clock=clock)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    usage.count(ALICE, 100)
    usage.close_now()
    assert caplog.messages == [
        f"cannot write the usage file {path}: TimeoutError; up to 100 bytes of what users have used are lost"
    ]
    other.execute("COMMIT")
    other.close()
    usage._thread.shutdown()  # it was only late
    assert rows(path) == [(ALICE, "2026-11", "alice", 100)]


@pytest.mark.parametrize("has_complained", [False, True])
def test_an_orderly_end_whose_last_write_fails_says_what_is_lost(
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    has_complained: bool,
) -> None:
    path = tmp_path / "usage.sqlite"
    monkeypatch.setattr(usage_module, "BUSY_TIMEOUT_S", 0.01)

    @in_loop
    async def run() -> None:
        usage = MonthlyUsage(path, NAMES, clock=clock)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        usage.count(ALICE, 100)
        if has_complained:
            usage.write()
        usage.count(BOB, 5)
        await usage.close()
        other.close()

    run()
    assert caplog.messages[int(has_complained) :] == [
        f"cannot write the usage file {path}: database is locked; up to 105 bytes of what users have used are lost"
    ]


@pytest.mark.parametrize("fails", [True, False])
def test_at_an_end_at_once_the_amounts_of_a_write_under_way_are_added_if_it_fails_and_only_then(
    tmp_path: Path, clock: Clock, *, fails: bool
) -> None:
    path = tmp_path / "usage.sqlite"
    begun, go_on = threading.Event(), threading.Event()

    @in_loop
    async def run() -> None:
        usage = MonthlyUsage(path, NAMES, clock=clock)
        add = usage._file.add

        def add_late(amounts: Amounts, month: str) -> dict[str, int]:
            usage._file.add = add  # type: ignore[method-assign]
            begun.set()
            go_on.wait()
            if fails:
                raise sqlite3.OperationalError("disk I/O error")
            return add(amounts, month)

        usage._file.add = add_late  # type: ignore[method-assign]
        usage.count(ALICE, 100)
        usage.write()
        await until(begun.is_set)
        usage.count(ALICE, 1)
        threading.Timer(0.01, go_on.set).start()
        usage.close_now()
        await until(lambda: not usage._in_writing)

    run()
    assert rows(path) == [(ALICE, "2026-11", "alice", 101)]
