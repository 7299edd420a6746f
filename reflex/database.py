"""What the server's SQLite files have in common: how one is opened, and all-or-nothing changes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from reflex.errors import StartError

Result = TypeVar("Result")

FILE_MODE: Final = 0o600  # SQLite gives its files beside one the same


def open_database(
    path: Path,
    prepare: Callable[[sqlite3.Connection], object],
    *,
    setting: str,
    timeout_s: float,
    check_same_thread: bool = True,
) -> sqlite3.Connection:
    """Open a file, created for its owner alone where it is not there.

    Args:
        prepare: makes the tables, and shows that the file can be written and is what it should be.
        setting: the key that names the file, for errors.
        timeout_s: how long to wait while another process writes.
        check_same_thread: whether only the thread that opened it may use it.

    Raises:
        StartError: it cannot be opened or written, or is something else. It names the setting and the path.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))
        database = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=check_same_thread)
    except (OSError, sqlite3.Error) as error:
        raise StartError(f"{setting}: cannot open {path}: {reason_of(error)}") from None
    try:
        prepare(database)
    except sqlite3.Error as error:
        database.close()
        raise StartError(f"{setting}: cannot write {path}: {reason_of(error)}") from None
    return database


def in_transaction(database: sqlite3.Connection, action: Callable[[], Result]) -> Result:
    """Do it whole or not at all; return what ``action`` returned. Raises sqlite3.Error."""
    database.execute("BEGIN IMMEDIATE")
    try:
        result = action()
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # some errors have rolled it back already
            database.execute("ROLLBACK")
        raise
    return result


def reason_of(error: Exception) -> str:
    """What to tell of it."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
