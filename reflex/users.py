"""The users of a server, as its daemon serves them: what there is of each one, and who counts what they use.

:class:`Users` holds the users' names and their shares of the memory for waiting bytes. For those that have limits
of their own it makes the :class:`UserLimits`, on the table that all workers share; where one of them has
``monthly_bytes``, it opens the usage file and looks at it twice a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from reflex.config import InboundSettings
from reflex.errors import StartError
from reflex.net.limits import UserLimits
from reflex.protocol.share import Share
from reflex.protocol.window import Budget
from reflex.worker import UserTable, WorkerContext

if TYPE_CHECKING:
    from reflex.usage import MonthlyUsage

METER_INTERVAL_S: Final = 0.5  # how often what users have used of their month is looked at
WRITE_INTERVAL_S: Final = 2.0  # how often that is written
METERS_PER_WRITE: Final = round(WRITE_INTERVAL_S / METER_INTERVAL_S)


class Users:
    """Every user of inbound.toml. ``start``, then ``close`` or ``close_now``.

    Args:
        settings: what inbound.toml says.
        budget: of the process's memory for waiting bytes, of which each user gets a share.
        shared: what this worker shares with the others, where it is one of several.
        has_tunnels: whether there is any tunnel, of whichever user.

    Attributes:
        names: by user id, as all of these; for the log.
        shares: of the memory for waiting bytes.
        limits: of those users that have limits of their own; filled by ``start``.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: InboundSettings,
        budget: Budget,
        *,
        shared: WorkerContext | None,
        has_tunnels: Callable[[], bool],
    ) -> None:
        self._loop = loop
        self._settings = settings
        self._shared = shared
        self._has_tunnels = has_tunnels
        self.names = {user.id.bytes: user.name for user in settings.users}
        self.shares = {user.id.bytes: Share(budget) for user in settings.users}
        self.limits: dict[bytes, UserLimits] = {}
        self._usage: MonthlyUsage | None = None
        self._meter_timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Make what counts for users with limits of their own. Raises StartError."""
        settings, shared = self._settings, self._shared
        users = settings.limited_users
        metered = {str(user.id): user.name for user in users if user.monthly_bytes is not None}
        if metered and settings.usage_file is not None:
            try:
                from reflex.usage import MonthlyUsage  # noqa: PLC0415 - most servers need no SQLite
            except ImportError as error:
                raise StartError(f"usage_file: this Python has no SQLite: {error}") from None
            self._usage = MonthlyUsage(settings.usage_file, metered)
            self._meter_timer = self._loop.call_later(METER_INTERVAL_S, self._meter, METERS_PER_WRITE)
        table = UserTable(1, len(users)) if shared is None or shared.users is None else shared.users
        for position, user in enumerate(users):
            self.limits[user.id.bytes] = UserLimits(
                self._loop,
                user.name,
                str(user.id),
                table.row(1 if shared is None else shared.number, position),
                max_tunnels=user.max_tunnels,
                max_streams=user.max_streams,
                dials_per_s=user.dials_per_s,
                bytes_per_s=user.bytes_per_s,
                monthly_bytes=user.monthly_bytes,
                max_wait_s=settings.limits.dial_timeout_s,
                usage=None if user.monthly_bytes is None else self._usage,
            )

    def _meter(self, until_write: int) -> None:
        for user in self.limits.values():
            user.meter()
        usage = self._usage
        # Where nothing was counted, a worker still reads what the others wrote, while it has something to judge.
        judges = self._shared is not None and self._has_tunnels()
        if usage is not None and until_write <= 1 and (usage.is_counting or judges):
            usage.write()
        until_write = until_write - 1 if until_write > 1 else METERS_PER_WRITE
        self._meter_timer = self._loop.call_later(METER_INTERVAL_S, self._meter, until_write)

    async def close(self) -> None:
        """Count to the end, write it, and let go of the usage file. Nothing may be used afterwards."""
        self._stop_metering()
        if self._usage is not None:
            await self._usage.close()

    def close_now(self) -> None:
        """The same without the loop, in bounded time: for a process that ends at once."""
        self._stop_metering()
        if self._usage is not None:
            self._usage.close_now()

    def _stop_metering(self) -> None:
        if self._meter_timer is not None:
            self._meter_timer.cancel()
            self._meter_timer = None
        for user in self.limits.values():
            user.meter()
