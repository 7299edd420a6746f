"""Who wants a tunnel gets one: a kept one with room, or one that is dialled; never more than are needed.

Servers are tried in their order: the first that can be had is used, the next ones are for when it
cannot. After a failure a server is left alone for a while that grows; requests that come meanwhile
wait for the next attempt, and fail with it. While a later server is in use, an earlier one is tried
again in the background, and used again from then on.

A path that was gone and is back does not help a dial that began before: its SYN, or its hello, waits
for TCP's next try, which is seconds away. So who waits does not depend on an old dial alone: another
one is begun beside it, and a dial that fails takes nobody along while another may yet succeed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Final, Protocol

from reflex.complaints import Complaints
from reflex.errors import TunnelError
from reflex.net.server import Server
from reflex.net.tunnel import Tunnel
from reflex.net.tunnels import TunnelPool
from reflex.protocol.handshake import SessionSecrets
from reflex.protocol.wire import Code

log = logging.getLogger(__name__)

OF_NO_USE: Final = "the tunnel ended, or took no streams, right after the handshake"
# A dial is relied on for so long: with the next doubling of TCP's first time-out (RFC 6298: 1 s, then 3 s
# after the start) its packets become rarer than what a request may wait.
FRESH_DIAL_S: Final = 2.5
PATIENCE_S: Final = 20.0
SPARE_PAUSE_S: Final = 600.0  # where a server did not take one more
COMPLAINT_INTERVAL_S: Final = 60.0  # between two warnings about the same trouble with the same server


class Waiter(Protocol):
    """Who wants a tunnel. One of the two is called, perhaps at once."""

    def on_tunnel(self, tunnel: Tunnel) -> None:
        """Open one stream, now: the room is the waiter's during this call."""

    def on_no_tunnel(self, error: TunnelError) -> None:
        """There is none to be had."""


class Connector:
    """Draws tunnels from the pool and dials what is missing.

    Args:
        servers: in order of preference.
        pool: by server.
        make_tunnel: from a connected socket and its secrets; adds it to the pool.
        max_tunnels: per server.
        max_streams: per tunnel.
        patience_s: who has waited for longer fails with the next dial that fails, whatever else is under way.
        wait_settled: returns, in bounded time, when it is known how many streams the new tunnel's server
            allows; until then nobody dials another because this one seems full.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        servers: Sequence[Server],
        pool: TunnelPool[Tunnel],
        make_tunnel: Callable[[Server, socket.socket, SessionSecrets], Tunnel],
        *,
        max_tunnels: int,
        max_streams: int,
        patience_s: float = PATIENCE_S,
        wait_settled: Callable[[Tunnel], Awaitable[None]] | None = None,
    ) -> None:
        self._loop = loop
        self._servers = servers
        self._pool = pool
        self._make_tunnel = make_tunnel
        self._wait_settled = wait_settled
        self._max_tunnels = max_tunnels
        self._max_streams = max_streams
        self._patience_s = patience_s
        self._waiting: OrderedDict[Waiter, float] = OrderedDict()  # and since when
        self._dials: dict[asyncio.Task[None], float] = {}  # and when it begins to connect
        self._no_spare_before_s = 0.0
        self._complaints: dict[str, Complaints] = {}  # by what they are about: a server's address, or room
        self._is_closed = False

    def request(self, waiter: Waiter) -> None:
        """Give the waiter a tunnel as soon as there is one."""
        if not self._waiting:
            tunnel = self._available()
            if tunnel is not None:
                waiter.on_tunnel(tunnel)
                self._try_preferred()
                return
        self._waiting[waiter] = self._loop.time()
        if self._is_closed:
            self._fail_waiting(TunnelError("shutting down"))
        else:
            self._dial_as_needed()

    def cancel(self, waiter: Waiter) -> None:
        """The waiter does not want one any more; nothing where it does not wait."""
        self._waiting.pop(waiter, None)

    def _available(self) -> Tunnel | None:
        for server in self._servers:
            tunnel = self._pool.acquire(server)
            if tunnel is not None:
                return tunnel
        return None

    def room_was_made(self) -> None:
        """A stream has ended or a tunnel was opened: serve those who wait."""
        while self._waiting and (tunnel := self._available()) is not None:
            self._waiting.popitem(last=False)[0].on_tunnel(tunnel)

    def _try_preferred(self) -> None:
        """Where a later server is in use, see whether the first one is back."""
        first = self._servers[0]
        if self._is_closed or self._dials or self._pool.count(first):
            return
        if first.not_before_s <= self._loop.time():
            self._start_dial([first], is_probe=True)

    def _start_dial(self, candidates: list[Server], *, is_probe: bool = False, is_spare: bool = False) -> None:
        task = self._loop.create_task(self._dial(candidates, is_probe=is_probe, is_spare=is_spare))
        self._dials[task] = max(candidates[0].not_before_s, self._loop.time())
        task.add_done_callback(self._dial_ended)

    def keep_warm(self) -> None:
        """Dial what is missing of the tunnels that are to be there before anybody asks."""
        if not self._is_closed:
            self._dial_as_needed()
            self._dial_spare()

    def _dial_spare(self) -> None:
        """Where all tunnels carry bulk data, dial one more: small requests must not queue behind it."""
        now_s = self._loop.time()
        if self._dials or now_s < self._no_spare_before_s:
            return
        for server in self._servers:
            is_allowed = server.not_before_s <= now_s and self._pool.count(server) < self._max_tunnels
            if is_allowed and self._pool.wants_spare(server):
                self._start_dial([server], is_spare=True)
                return

    def expire(self) -> list[tuple[Hashable, Tunnel]]:
        """The idle tunnels that are to be closed, now.

        While somebody waits none that takes streams: it was dialled for him, and has him as soon as it has settled.
        """
        expired = self._pool.expire(self._loop.time(), self._servers[0])
        return [each for each in expired if not (self._waiting and each[1].has_room)]

    def _dial_as_needed(self) -> None:
        for_waiting = -(-len(self._waiting) // self._max_streams)
        missing = self._pool.missing()
        fresh_since_s = self._loop.time() - FRESH_DIAL_S
        fresh = sum(began_s >= fresh_since_s for began_s in self._dials.values())
        while fresh < for_waiting or len(self._dials) < missing:
            candidates = self._candidates()
            if not candidates:
                break
            self._start_dial(candidates)
            fresh += 1
        if not self._dials and self._waiting:
            reason = f"no tunnel has room: there are as many as there may be, {self._max_tunnels} for each server"
            self._warn("pool", reason)
            self._fail_waiting(TunnelError(reason))

    def _candidates(self) -> list[Server]:
        """Servers to which one more tunnel may be dialled, in the order in which to try them."""
        allowed = [each for each in self._servers if self._pool.count(each) + len(self._dials) < self._max_tunnels]
        now_s = self._loop.time()
        return sorted(allowed, key=lambda server: max(server.not_before_s, now_s))

    async def _dial(self, candidates: list[Server], *, is_probe: bool, is_spare: bool) -> None:
        reasons: list[str] = []
        for server in candidates:
            delay_s = server.not_before_s - self._loop.time()
            if delay_s > 0 and reasons:
                reasons.append(f"{server.address}: failed shortly before")
                continue  # it has its time to recover; the first one has waited for all
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            try:
                sock, secrets = await server.connect()
            except TunnelError as error:
                server.failed(self._loop.time())
                self._warn(str(server.address), str(error))
                reasons.append(f"{server.address}: {error}")
                continue
            except Exception:
                server.failed(self._loop.time())  # nor may a mistake of ours be made again without a pause
                raise
            tunnel = self._make_tunnel(server, sock, secrets)
            if self._wait_settled is not None:
                await self._wait_settled(tunnel)
            if not tunnel.has_room and not tunnel.stream_count:
                # Dialled again at once it would end in the same, and who changes what passes could make it do so.
                server.failed(self._loop.time())
                reason = _why_of_no_use(tunnel)
                self._warn(str(server.address), reason)
                reasons.append(f"{server.address}: {reason}")
                continue
            server.succeeded()
            self._complaints.pop(str(server.address), None)  # the next trouble is a new one
            self.room_was_made()
            return
        # Nobody waits for a probe or a spare tunnel; who came meanwhile gets a dial of its own.
        if is_spare:
            self._no_spare_before_s = self._loop.time() + SPARE_PAUSE_S
        elif not is_probe:
            self._dial_failed(asyncio.current_task(), TunnelError("; ".join(reasons)))

    def _warn(self, whose: str, text: str) -> None:
        """Log a trouble as a warning when it is new and now and then, else at debug: who waits asks often."""
        complaints = self._complaints.setdefault(whose, Complaints(self._loop.time, interval_s=COMPLAINT_INTERVAL_S))
        is_due = complaints.is_due(text.partition(";")[0])  # what follows may tell the time
        log.log(logging.WARNING if is_due else logging.DEBUG, "%s: %s", whose, text)

    def _dial_failed(self, task: asyncio.Task[None] | None, error: TunnelError) -> None:
        """Who waits fails with it; where other dials have begun to connect, only who has waited for too long."""
        if task is not None:
            self._dials.pop(task, None)
        now_s = self._loop.time()
        if any(begins_s <= now_s for begins_s in self._dials.values()):
            self._fail_waiting(error, joined_before_s=now_s - self._patience_s)
        else:
            self._fail_waiting(error)

    def _dial_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("dialling failed unexpectedly", exc_info=error)
            self._dial_failed(task, TunnelError(f"internal error: {error}"))
        self._dials.pop(task, None)
        if not self._is_closed and not task.cancelled():
            self._dial_as_needed()

    def _fail_waiting(self, error: TunnelError, *, joined_before_s: float = math.inf) -> None:
        failed = [waiter for waiter, joined_s in self._waiting.items() if joined_s <= joined_before_s]
        for waiter in failed:
            self._waiting.pop(waiter, None)  # what one is told may make another leave
        for waiter in failed:
            waiter.on_no_tunnel(error)

    def close(self) -> None:
        """Dial nothing more; who waits gets nothing."""
        self._is_closed = True
        for task in self._dials:
            task.cancel()
        self._fail_waiting(TunnelError("shutting down"))


def _why_of_no_use(tunnel: Tunnel) -> str:
    """Why nothing can be opened on a tunnel that was made just now."""
    if tunnel.close_code == Code.LIMIT:
        return "the server closed the new tunnel: this user has as many as it may have there"
    return OF_NO_USE
