"""reflex.database: a file is opened for its owner alone, or an error names it; changes are whole or none."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from reflex.database import in_transaction, open_database, reason_of
from reflex.errors import StartError


def create(database: sqlite3.Connection) -> None:
    database.execute("CREATE TABLE IF NOT EXISTS numbers (number INTEGER NOT NULL)")


def opened(path: Path) -> sqlite3.Connection:
    return open_database(path, create, setting="a_file", timeout_s=1.0)


def numbers(database: sqlite3.Connection) -> list[int]:
    return [number for (number,) in database.execute("SELECT number FROM numbers")]


def test_it_is_created_for_its_owner_alone_and_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    database = opened(path)
    database.execute("INSERT INTO numbers VALUES (1)")
    database.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = opened(path)
    assert numbers(again) == [1]
    again.close()


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(StartError) as caught:
        opened(path)
    assert str(caught.value) == f"a_file: cannot open {path}: No such file or directory"


def test_what_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"something else\n" * 100)
    with pytest.raises(StartError) as caught:
        opened(path)
    assert str(caught.value) == f"a_file: cannot write {path}: file is not a database"
    assert path.read_bytes() == b"something else\n" * 100


def test_a_change_is_whole_or_none(tmp_path: Path) -> None:
    database = opened(tmp_path / "file")

    def fail() -> None:
        database.execute("INSERT INTO numbers VALUES (1)")
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        in_transaction(database, fail)
    assert numbers(database) == []
    assert in_transaction(database, lambda: database.execute("INSERT INTO numbers VALUES (2)").rowcount) == 1
    assert numbers(database) == [2]
    database.close()


def test_what_has_no_words_is_named_by_its_kind() -> None:
    assert reason_of(OSError(2, "No such file")) == "No such file"
    assert reason_of(sqlite3.OperationalError("disk full")) == "disk full"
    assert reason_of(TimeoutError()) == "TimeoutError"
