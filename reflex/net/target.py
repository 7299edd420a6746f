"""The server's relay: dials the target, answers OPEN by how that went, then relays."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from reflex.errors import DialError
from reflex.loop import DirectLoop
from reflex.metrics import Counters
from reflex.net.dial import begin_connect, dial, finish_connect, is_connected
from reflex.net.options import is_loopback, set_reset_on_close
from reflex.net.relay import BULK_BYTES, Relay
from reflex.net.resolver import Resolver
from reflex.net.targets import TargetPolicy
from reflex.net.tunnel import Tunnel
from reflex.pool import TieredPool
from reflex.protocol.address import Address
from reflex.protocol.streams import Stream
from reflex.protocol.wire import AddressType, Code, Status

log = logging.getLogger(__name__)

# Connections that are begun for one user in one turn of the loop: each costs some 50 µs, an OPEN only 16 bytes.
DIALS_PER_TURN: Final = 32


class Dialling:
    """What every target of one server shares: the policy, the time-out, the options of sockets, the resolver."""

    __slots__ = ("keepalive_s", "nodelay", "policy", "resolver", "timeout_s")

    def __init__(self, *, policy: TargetPolicy, timeout_s: float, nodelay: bool, keepalive_s: int) -> None:
        self.policy = policy
        self.resolver = Resolver()
        self.timeout_s = timeout_s
        self.nodelay = nodelay
        self.keepalive_s = keepalive_s


class TargetRelay(Relay):
    """A relay whose socket is dialled first, by :meth:`dial`. Data that comes before is kept, within the
    stream's window.

    An IP address is connected to from callbacks alone; a name is resolved and raced by a task.
    ``delay_s`` is how long the target waits until it is dialled.
    """

    __slots__ = ("_address", "_attempt", "_delay_s", "_dialling", "_task", "_timer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tunnel: Tunnel,
        stream: Stream,
        address: Address,
        dialling: Dialling,
        *,
        buffers: TieredPool,
        counters: Counters,
        on_end: Callable[[Relay], None],
        delay_s: float = 0.0,
    ) -> None:
        super().__init__(loop, tunnel, stream, buffers=buffers, counters=counters, on_end=on_end)
        self._address: Address | None = address
        self._dialling = dialling
        self._attempt: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._delay_s = delay_s

    def dial(self) -> None:
        """Begin to connect, when its time has come. Once; nothing where the stream was reset meanwhile."""
        if self.ended or self._address is None:
            return
        if self._delay_s:
            self._timer = self._loop.call_later(self._delay_s, self._begin, self._address)
        else:
            self._begin(self._address)

    def _begin(self, address: Address) -> None:
        loop, dialling = self._loop, self._dialling
        self._timer = None
        if address.kind == AddressType.NAME:
            self._task = loop.create_task(self._dial(address))
            return
        try:
            sock = self._attempt = begin_connect(
                address,
                nodelay=dialling.nodelay,
                keepalive_s=dialling.keepalive_s,
                policy=dialling.policy,
                reset_on_close=True,
            )
            if is_connected(sock, address):
                self._attempt = None
                self._accept(sock)
                return
        except DialError as error:
            self._refuse(error)
            return
        loop.add_writer(self._attempt, self._on_connected)
        self._timer = loop.call_later(dialling.timeout_s, self._on_timeout)

    async def _dial(self, address: Address) -> None:
        dialling = self._dialling
        try:
            sock = await dial(
                address,
                timeout_s=dialling.timeout_s,
                nodelay=dialling.nodelay,
                keepalive_s=dialling.keepalive_s,
                policy=dialling.policy,
                look_up=partial(dialling.resolver.resolve, self.tunnel.session.share),  # the share stands for its user
            )
        except DialError as error:
            self._task = None
            self._refuse(error)
            return
        self._task = None
        if self.ended:
            sock.close()
        else:
            set_reset_on_close(sock)
            self._accept(sock)

    def _on_connected(self) -> None:
        sock = self._attempt
        assert sock is not None  # noqa: S101  # it is the one that became writable
        try:
            finish_connect(sock)
        except DialError as error:
            self._refuse(error)
            return
        self._accept(sock)
        # Only now, when it is read: the loop's registration is changed, not given up and made again.
        if self._attempt is not None:
            self._attempt = None
            if not self._is_writing:
                self._loop.remove_writer(sock)

    def _on_timeout(self) -> None:
        self._refuse(DialError(Status.TIMED_OUT, f"no connection within {self._dialling.timeout_s:g} s"))

    def _accept(self, sock: socket.socket) -> None:
        self._stop_timer()
        if self._address is not None and is_loopback(self._address.host):
            self._unpace_from = BULK_BYTES
        self._address = None
        self.tunnel.session.accept(self.stream)
        self.tunnel.flush_soon()
        self.connected(sock)

    def _refuse(self, error: DialError) -> None:
        log.debug("%r: %s refused: %s", self.tunnel, self._address, error)
        tunnel = self.tunnel
        if not self.ended and not self.stream.is_closed:
            tunnel.session.refuse(self.stream, Status(error.status))
            tunnel.flush_soon()
            self._counters.streams_refused += 1
            tunnel.stream_ended()
        self.end(reset=False)

    def limit_reached(self) -> None:
        """The user may not go on: the stream and its target are reset."""
        self._reset_stream(Code.LIMIT)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end(self, *, reset: bool) -> None:
        """As of every relay; what is being dialled is given up."""
        if not self.ended:
            self._stop_timer()
            if self._task is not None:
                self._task.cancel()
                self._task = None
            if self._attempt is not None:
                self._loop.remove_writer(self._attempt)
                if self._attempt is not self._sock:
                    set_reset_on_close(self._attempt)
                    self._attempt.close()
                self._attempt = None
        super().end(reset=reset)


class DialQueue:
    """Begins the dials of one user, of all its tunnels: DIALS_PER_TURN at once, the others in the turns that follow.

    What waits is bounded by the tunnels' streams; a stream that is reset while it waits is never dialled.
    """

    __slots__ = ("__weakref__", "_at_turn_end", "_begun", "_loop", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._at_turn_end = loop.at_turn_end if isinstance(loop, DirectLoop) else loop.call_soon
        self._begun = 0  # in this turn
        self._waiting: deque[TargetRelay] = deque()

    def add(self, relay: TargetRelay) -> None:
        """Dial for the relay, now or soon."""
        if self._begun < DIALS_PER_TURN and not self._waiting:
            self._count()
            relay.dial()
        else:
            self._waiting.append(relay)

    def _count(self) -> None:
        if not self._begun:
            self._at_turn_end(self._end_turn)
        self._begun += 1

    def _end_turn(self) -> None:
        self._begun = 0
        if self._waiting:
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        while self._waiting and self._begun < DIALS_PER_TURN:
            relay = self._waiting.popleft()
            if not relay.ended:
                self._count()
                relay.dial()
