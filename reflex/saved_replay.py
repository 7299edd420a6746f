"""The replay set of a server's process, saved in a file where the settings name one (``replay_file``).

Without a file a server that was started again refuses what is dated before its start, and nothing more: a hello that
an earlier run took is taken once more if its client's clock was ahead of the restart. With a file no hello is taken
twice, whatever clocks and runs do. The argument looks at no clock:

1. A hello (its key and its time t) is in the file before it is answered.
2. Rows are deleted by their time, and in the same transaction ``forgotten_before_s`` rises above the times of all
   that are deleted.
3. So when a run starts, the hello is in the file, or t lies before ``forgotten_before_s``. The set of that run refuses
   all times before ``known_since_s``, which is ``forgotten_before_s`` or the run's start, whichever is later, and holds
   every row from there on. Fact 2 of :mod:`reflex.protocol.replay` covers the rest of the run.

Why every hello is written, and not only those dated after the present second: a hello with the right time arrives
within the second of its date, so that these are nearly all; and a clock that steps back between two runs, by whatever
amount, would need a margin that nobody knows.

The start counts although the file would allow more: nobody knows whether there was a run without it in between.

A file that cannot be written stops nobody (with workers, one whose writes hang does: who asks waits for a second, then
refuses the hello). The hello is answered, remembered as if there were no file, and written as
soon as that succeeds: the worst that follows is what holds without a file, 40 bytes for a hello that is played after
a restart, and no session. To refuse would lock every user out because a disk is full.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from reflex.complaints import Complaints
from reflex.errors import Replayed, StartError
from reflex.protocol.replay import ReplaySet
from reflex.protocol.wire import HELLO_TIME_LIMIT_S

if TYPE_CHECKING:
    from reflex.replay_file import Hello, ReplayFile

log = logging.getLogger(__name__)

RETRY_S: Final = 1.0  # after a write that failed, which may have waited
COMPLAINT_INTERVAL_S: Final = 60.0


class SavedReplaySet:
    """A server's replay set: :class:`reflex.protocol.replay.ReplaySet`, and the file behind it. ``len()`` is the set's.

    Belongs to one process, and is not for those that are forked off.

    Args:
        path: the file; None for a set that is not saved.
        clock: seconds since 1970; asked once, for the start.
        elapsed: seconds of a clock that is never set, for the pauses after a failure.

    Raises:
        StartError: the file cannot be opened, read or written, or is something else.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._elapsed = elapsed
        self._file: ReplayFile | None = None
        self._unsaved: list[Hello] = []
        self._forgot_at_s = 0
        self._retry_at_s = -float("inf")
        self._complaints = Complaints(elapsed, interval_s=COMPLAINT_INTERVAL_S)
        known_since_s = started_s = int(clock())
        hellos: list[Hello] = []
        if path is not None:
            self._file = _open(path)
            try:
                self._file.forget(started_s - HELLO_TIME_LIMIT_S)
                known_since_s = max(started_s, self._file.forgotten_before_s)
                hellos = self._file.hellos(known_since_s)  # those before are refused by their time
            except OSError as error:
                self._file.close()
                raise StartError(f"replay_file: cannot write {path}: {error}") from None
            if known_since_s > started_s:
                log.warning(
                    "the clock was ahead in an earlier run: hellos are refused for the next %d s, "
                    "or until the server is started without %s",
                    known_since_s - started_s,
                    path,
                )
        self._set = ReplaySet(known_since_s)
        for time_s, ephemeral in hellos:
            self._set.restore(ephemeral, time_s)

    def __len__(self) -> int:
        return len(self._set)

    def check_and_insert(self, ephemeral: bytes, user_id: bytes, time_s: int, now_s: int) -> None:
        """As :meth:`reflex.protocol.replay.ReplaySet.check_and_insert`; what is taken is in the file afterwards."""
        self._set.check_and_insert(ephemeral, user_id, time_s, now_s)
        if self._file is not None and not self._save(self._file, (time_s, ephemeral), now_s - HELLO_TIME_LIMIT_S):
            raise Replayed("hello seen before, by another process with the same replay file")

    def _save(self, file: ReplayFile, hello: Hello, expired_before_s: int) -> bool:
        """Returns whether the hello may be answered: False where it is in the file already."""
        if self._unsaved and self._elapsed() < self._retry_at_s:
            self._unsaved.append(hello)
            return True
        try:
            if self._unsaved:
                # Those that have expired are left out, so that they are no more than the set holds.
                self._unsaved = [each for each in self._unsaved if each[0] >= expired_before_s]
                file.add(self._unsaved)
                self._unsaved.clear()
                log.info("the replay file %s can be written again", self._path)
            if expired_before_s != self._forgot_at_s:  # once a second, so that it is little each time
                file.forget(expired_before_s)
                self._forgot_at_s = expired_before_s
            return file.add_one(hello)
        except OSError as error:
            self._unsaved.append(hello)
            self._retry_at_s = self._elapsed() + RETRY_S
            if self._complaints.is_due():
                log.error("cannot write the replay file %s: %s; tried again", self._path, error)
            return True

    def close(self) -> None:
        """Let go of the file; further hellos are remembered in memory alone. More than once is no fault."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _open(path: Path) -> ReplayFile:
    try:
        from reflex.replay_file import ReplayFile  # noqa: PLC0415 - without a file no SQLite is needed
    except ImportError as error:
        raise StartError(f"replay_file: this Python has no SQLite: {error}") from None
    return ReplayFile(path)
