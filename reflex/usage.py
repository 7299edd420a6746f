"""What users have used of their month, kept in an SQLite file over restarts.

:class:`UsageFile` is the file: one row for each user and month, to which amounts are added, so that several
processes may write to it. Its calls block. :class:`MonthlyUsage` counts in memory and has a thread add what was
counted to the file every few seconds; a process that is killed loses no more than that. Months are UTC's.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from reflex.complaints import Complaints
from reflex.database import in_transaction, open_database, reason_of

log = logging.getLogger(__name__)

BUSY_TIMEOUT_S: Final = 5.0  # while another process writes, which takes milliseconds
LAST_WRITE_S: Final = 2.0  # for the last write of a process that ends at once
COMPLAINT_INTERVAL_S: Final = 60.0
FILE_VERSION: Final = 1

_CREATE: Final = """
CREATE TABLE IF NOT EXISTS usage (
    user_id TEXT NOT NULL,
    month TEXT NOT NULL,
    name TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (user_id, month)
)"""
_ADD: Final = """
INSERT INTO usage (user_id, month, name, bytes) VALUES (?, ?, ?, ?)
ON CONFLICT (user_id, month) DO UPDATE SET bytes = bytes + excluded.bytes, name = excluded.name"""
_READ: Final = "SELECT user_id, bytes FROM usage WHERE month = ?"

Amounts = dict[tuple[str, str], int]  # by user id and month: bytes


class UsageFile:
    """The file. Every call blocks; one at a time, from any thread.

    Args:
        path: created, for its owner alone, where it is not there.
        names: of the users by id; written beside the figures, for who reads them.

    Raises:
        StartError: it cannot be opened or written, or is something else.
    """

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        self._names = names
        self._database = open_database(
            path, _prepare, setting="usage_file", timeout_s=BUSY_TIMEOUT_S, check_same_thread=False
        )

    def add(self, amounts: Amounts, month: str) -> dict[str, int]:
        """Add the amounts, all or none; return every user's bytes of ``month`` afterwards. Raises sqlite3.Error."""
        rows = [(user_id, of, self._names[user_id], size) for (user_id, of), size in amounts.items()]

        def read() -> dict[str, int]:
            return dict(self._database.execute(_READ, (month,)))

        def add_and_read() -> dict[str, int]:
            self._database.executemany(_ADD, rows)
            return read()  # before they are added for good: where it fails, the caller adds them again

        return in_transaction(self._database, add_and_read) if rows else read()

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()


def _prepare(database: sqlite3.Connection) -> None:
    def prepare() -> None:
        database.execute(_CREATE)
        # Written only where it must be: on a full disk a worker that has died could not be replaced.
        if database.execute("PRAGMA user_version").fetchone() != (FILE_VERSION,):
            database.execute(f"PRAGMA user_version = {FILE_VERSION}")
        database.execute(_READ, ("",))  # another program's table has other columns

    in_transaction(database, prepare)


class MonthlyUsage:
    """What users have used of this month. All calls from the event loop's thread.

    Args:
        path: of the file.
        names: of the users that are counted, by id.
        clock: seconds since 1970.

    Raises:
        StartError: as of :class:`UsageFile`.
    """

    def __init__(self, path: Path, names: Mapping[str, str], *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._path = path
        self._file = UsageFile(path, names)
        self._stored_month = self.month
        self._stored = self._file.add({}, self._stored_month)
        self._counted: Counter[tuple[str, str]] = Counter()  # and not yet given to the thread
        self._in_writing: Amounts = {}
        self._under_way: Future[dict[str, int]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="usage")
        self._task: asyncio.Task[None] | None = None
        self._complaints = Complaints(interval_s=COMPLAINT_INTERVAL_S)
        self._is_closed = False

    @property
    def month(self) -> str:
        """The month that it is, such as 2026-11."""
        return time.strftime("%Y-%m", time.gmtime(self._clock()))

    @property
    def next_month(self) -> str:
        """When the next month begins, for the log."""
        now = time.gmtime(self._clock())
        year, month = divmod(now.tm_year * 12 + now.tm_mon, 12)
        return f"{year}-{month + 1:02}-01 00:00 UTC"

    @property
    def is_counting(self) -> bool:
        """Whether anything was counted since the last write."""
        return bool(self._counted)

    def count(self, user_id: str, size_bytes: int) -> None:
        """The user has used so many bytes more."""
        if size_bytes:
            self._counted[user_id, self.month] += size_bytes

    def used(self, user_id: str) -> int:
        """What the user has used of this month, bytes; by other processes, as of the last write."""
        month = self.month
        stored = self._stored.get(user_id, 0) if month == self._stored_month else 0
        return stored + self._in_writing.get((user_id, month), 0) + self._counted.get((user_id, month), 0)

    def write(self) -> None:
        """Have the thread write what was counted, and read what others wrote; nothing while it still does."""
        if not self._is_closed and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        try:
            await self._add_counted()
        except sqlite3.Error as error:
            if self._complaints.is_due():
                log.error("cannot write the usage file %s: %s; tried again", self._path, reason_of(error))

    async def _add_counted(self) -> None:
        """Raises sqlite3.Error; what was counted waits then for the next time."""
        month = self.month
        self._in_writing, self._counted = dict(self._counted), Counter()
        self._under_way = self._thread.submit(self._file.add, self._in_writing, month)
        try:
            self._stored = await asyncio.wrap_future(self._under_way)
            self._stored_month = month
        except sqlite3.Error:
            self._counted.update(self._in_writing)
            raise
        finally:
            self._in_writing = {}
            self._under_way = None

    async def close(self) -> None:
        """Write what is left, and let go of the file. Nothing may be counted afterwards."""
        if self._task is not None:
            await self._task
        if not self._is_closed:
            try:
                await self._add_counted()
            except sqlite3.Error as error:
                self._say_lost(error, self._counted)
            self._is_closed = True
            self._thread.shutdown()
            self._file.close()

    def close_now(self) -> None:
        """The same without the loop, in bounded time: for a process that ends at once."""
        if self._is_closed:
            return
        self._is_closed = True
        counted, in_writing, under_way = self._counted, self._in_writing, self._under_way

        def unwritten() -> Amounts:
            if under_way is None or (under_way.done() and not under_way.cancelled() and under_way.exception() is None):
                return counted
            return counted + Counter(in_writing)

        def add_unwritten() -> None:
            self._file.add(unwritten(), self.month)  # behind the write that is under way: it is done

        try:
            self._thread.submit(add_unwritten).result(LAST_WRITE_S)
        except (sqlite3.Error, TimeoutError) as error:
            self._say_lost(error, unwritten())
            return
        finally:
            self._thread.shutdown(wait=False)
        self._file.close()

    def _say_lost(self, error: Exception, amounts: Amounts) -> None:
        log.error(
            "cannot write the usage file %s: %s; up to %d bytes of what users have used are lost",
            self._path,
            reason_of(error),
            sum(amounts.values()),
        )
