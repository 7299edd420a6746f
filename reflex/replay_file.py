"""Hellos that were taken, in an SQLite file that outlives the server. Who decides what goes in, and what a file
that cannot be written means, is :mod:`reflex.saved_replay`.

A row is a hello's time and its ephemeral key, which everybody on its way has seen; whose it was is not written.

What was added is in the file as the operating system has it (a write-ahead log) before the call returns, so that
a process that is killed loses nothing. It is not waited for until it is on the disk, but for once in a thousand
pages: a machine that loses its power may lose the last rows, and never the file.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from reflex.database import in_transaction, open_database

START_TIMEOUT_S: Final = 5.0  # while another process writes, at the start
BUSY_TIMEOUT_S: Final = 0.05  # and later, when every connection waits
FILE_VERSION: Final = 1

_CREATE: Final = (
    """
CREATE TABLE IF NOT EXISTS hellos (
    time_s INTEGER NOT NULL,
    ephemeral BLOB NOT NULL,
    PRIMARY KEY (time_s, ephemeral)
) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS forgotten (before_s INTEGER NOT NULL)",  # one row, or none
)
_ADD: Final = "INSERT OR IGNORE INTO hellos (time_s, ephemeral) VALUES (?, ?)"
_LAST: Final = "SELECT max(time_s) FROM hellos WHERE time_s < ?"
_DELETE: Final = "DELETE FROM hellos WHERE time_s < ?"
_FROM: Final = "SELECT time_s, ephemeral FROM hellos WHERE time_s >= ? ORDER BY time_s DESC"
_FORGOTTEN: Final = "SELECT coalesce(max(before_s), 0) FROM forgotten"

Hello = tuple[int, bytes]  # its time, in seconds since 1970, and its ephemeral key, 32 bytes


class ReplayFile:
    """The file. Every call blocks, for microseconds as a rule; all from one thread.

    Several processes may have it open. A process that was forked off must leave it alone.

    Args:
        path: created, for its owner alone, where it is not there.

    Raises:
        StartError: it cannot be opened or written, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self._database = open_database(path, _prepare, setting="replay_file", timeout_s=START_TIMEOUT_S)
        self._database.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")

    @property
    def forgotten_before_s(self) -> int:
        """Of hellos with a time before this one, in seconds since 1970, rows may have been deleted. 0: none was."""
        with _os_errors():
            return int(self._database.execute(_FORGOTTEN).fetchone()[0])

    def hellos(self, from_s: int) -> list[Hello]:
        """Those with this time or a later one, the latest first. Raises OSError."""
        with _os_errors():
            return self._database.execute(_FROM, (from_s,)).fetchall()

    def add(self, hellos: Iterable[Hello]) -> None:
        """Write them, all or none; those that are there already stay. Raises OSError."""
        with _os_errors():
            in_transaction(self._database, lambda: self._database.executemany(_ADD, hellos))

    def add_one(self, hello: Hello) -> bool:
        """Write one; returns whether it was not there before. Raises OSError."""
        try:
            return self._database.execute(_ADD, hello).rowcount > 0
        except sqlite3.Error as error:
            raise OSError(str(error)) from None

    def forget(self, before_s: int) -> None:
        """Delete those with a time before this one, and remember up to where there were any. Raises OSError."""
        with _os_errors():
            if self._database.execute(_LAST, (before_s,)).fetchone() != (None,):  # else there is nothing to write
                in_transaction(self._database, lambda: self._forget(before_s))

    def _forget(self, before_s: int) -> None:
        (last_s,) = self._database.execute(_LAST, (before_s,)).fetchone()
        if last_s is None:
            return  # another process was first
        (forgotten_s,) = self._database.execute(_FORGOTTEN).fetchone()
        self._database.execute(_DELETE, (before_s,))
        self._database.execute("DELETE FROM forgotten")
        self._database.execute("INSERT INTO forgotten VALUES (?)", (max(forgotten_s, last_s + 1),))

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()


def _prepare(database: sqlite3.Connection) -> None:
    # Where there is no write-ahead log every row would wait for the disk.
    (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise sqlite3.OperationalError("this place allows no write-ahead log")
    database.execute("PRAGMA synchronous = NORMAL")

    def create() -> None:
        for statement in _CREATE:
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {FILE_VERSION}")  # written each time: shows that it can be
        database.execute(_FROM, (0,))  # another program's tables have other columns
        database.execute(_FORGOTTEN)

    in_transaction(database, create)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(str(error)) from None
