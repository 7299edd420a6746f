"""reflex.replay_file: what is written stays, for its owner alone; what is no place for it is told."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from reflex.errors import StartError
from reflex.replay_file import ReplayFile

NOW: Final = 1_900_000_000
TIMEOUT_S: Final = 60


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_a_new_file_is_its_owners_alone_and_an_old_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "replay.sqlite"
    file = ReplayFile(path)
    assert (file.forgotten_before_s, file.hellos(0)) == (0, [])
    assert file.add_one((NOW, key(1)))
    assert not file.add_one((NOW, key(1)))
    file.add([(NOW, key(1)), (NOW + 1, key(1)), (NOW + 2, key(2))])
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["replay.sqlite", "replay.sqlite-wal", "replay.sqlite-shm"], 0o600)
    file.close()
    assert [each.name for each in tmp_path.iterdir()] == ["replay.sqlite"]
    again = ReplayFile(path)
    assert again.hellos(NOW + 1) == [(NOW + 2, key(2)), (NOW + 1, key(1))]
    assert again.hellos(0)[2:] == [(NOW, key(1))]
    again.close()


def test_what_is_forgotten_leaves_its_time(tmp_path: Path) -> None:
    file = ReplayFile(tmp_path / "replay.sqlite")
    file.add([(NOW + number, key(number)) for number in range(10)])
    file.forget(NOW)
    assert file.forgotten_before_s == 0
    file.forget(NOW + 4)
    assert file.forgotten_before_s == NOW + 4
    assert len(file.hellos(0)) == 6
    file.add_one((NOW - 100, key(0)))  # the clock has stepped back, and it is forgotten when it has stepped forth
    file.forget(NOW + 4)
    assert file.forgotten_before_s == NOW + 4
    file.forget(NOW + 1_000)
    assert (file.forgotten_before_s, file.hellos(0)) == (NOW + 10, [])
    file.close()


def test_two_who_have_it_open_write_both_and_know_each_others(tmp_path: Path) -> None:
    path = tmp_path / "replay.sqlite"
    one, other = ReplayFile(path), ReplayFile(path)
    assert one.add_one((NOW, key(1)))
    assert not other.add_one((NOW, key(1)))
    assert other.add_one((NOW, key(2)))
    one.forget(NOW + 1)
    other._forget(NOW + 1)  # it looked before the first one forgot
    assert (other.hellos(0), other.forgotten_before_s) == ([], NOW + 1)
    one.close()
    other.close()


def test_a_process_that_is_killed_loses_nothing_that_was_added(tmp_path: Path) -> None:
    path = tmp_path / "replay.sqlite"
    code = f"""
import os, signal
from pathlib import Path
from reflex.replay_file import ReplayFile
file = ReplayFile(Path({str(path)!r}))
for number in range(3000):  # past a checkpoint
    assert file.add_one(({NOW}, number.to_bytes(32, "big")))
file.forget({NOW})
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", code], timeout=TIMEOUT_S, check=False)
    assert run.returncode == -signal.SIGKILL
    file = ReplayFile(path)
    assert sorted(file.hellos(0)) == [(NOW, key(number)) for number in range(3000)]
    file.close()


def test_the_file_grows_no_further_than_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "replay.sqlite"
    file = ReplayFile(path)
    sizes = []
    for minute in range(6):
        for number in range(2_000):
            file.add_one((NOW + 60 * minute, key(10_000 * minute + number)))
        file.forget(NOW + 60 * minute - 30)
        sizes.append(sum(each.stat().st_size for each in tmp_path.iterdir()))
    assert len(file.hellos(0)) == 2_000
    assert max(sizes) < 6_000_000  # of which 4 MiB are the write-ahead log
    file.close()
    assert path.stat().st_size < 600_000


def test_what_is_no_place_for_the_file_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_text("this is no database, although it is long enough to be looked at as one\n" * 20)
    other = tmp_path / "other.sqlite"
    with contextlib.closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE hellos (colour TEXT)")
    for path, reason in (
        (tmp_path / "missing" / "replay.sqlite", "open .*: No such file or directory"),
        (tmp_path, "open .*: unable to open database file"),
        (text, "write .*: file is not a database"),
        (other, "write .*: no such column: time_s"),
        (Path("/proc/version"), "write .*: unable to open database file"),
    ):
        with pytest.raises(StartError, match=f"replay_file: cannot (?:{reason})") as caught:
            ReplayFile(path)
        assert str(path) in str(caught.value)
    with contextlib.closing(sqlite3.connect(other)) as database:
        assert "colour" in str(database.execute("SELECT sql FROM sqlite_master").fetchall())

    class NoLog(sqlite3.Connection):
        """As on a file system where processes share no memory."""

        def execute(self, sql: str, parameters: object = ()) -> sqlite3.Cursor:
            del parameters
            return super().execute("SELECT 'delete'" if "journal_mode" in sql else sql)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: connect(*args, **more, factory=NoLog))
    with pytest.raises(StartError, match=r"replay_file: cannot write .*: this place allows no write-ahead log"):
        ReplayFile(tmp_path / "replay.sqlite")


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """SQLite's own bound of a file's size stands for the disk's."""
    path = tmp_path / "replay.sqlite"
    file = ReplayFile(path)
    file.add_one((NOW, key(0)))
    file._database.execute("PRAGMA max_page_count = 3")
    with pytest.raises(OSError, match="database or disk is full"):
        file.add([(NOW, key(number)) for number in range(1, 1_000)])
    with contextlib.suppress(OSError):
        for number in range(1, 1_000):
            file.add_one((NOW, key(number)))
    held = len(file.hellos(0))
    assert 1 < held < 200
    with pytest.raises(OSError, match="database or disk is full"):
        file.add_one((NOW, key(held)))
    assert len(file.hellos(0)) == held
    file._database.execute("PRAGMA max_page_count = 1000000")
    file.add([(NOW, key(number)) for number in range(1, 1_000)])
    assert len(file.hellos(0)) == 1_000
    file.close()


def test_somebody_who_locks_it_holds_up_for_a_moment_only(tmp_path: Path) -> None:
    path = tmp_path / "replay.sqlite"
    file = ReplayFile(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="locked"):
            file.add_one((NOW, key(0)))
        with pytest.raises(OSError, match="locked"):
            file.add([(NOW, key(0))])
        other.execute("COMMIT")
    assert file.add_one((NOW, key(0)))
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.hellos(0)


def test_the_mode_of_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "replay.sqlite"
    path.touch(mode=0o640)
    path.chmod(0o640)
    ReplayFile(path).close()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640  # its owner's wish
