"""The server's relay: dials the target, answers OPEN by how that went, then relays."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from reflex.errors import DialError
from reflex.metrics import Counters
from reflex.net.dial import begin_connect, dial, finish_connect, is_connected
from reflex.net.relay import Relay, set_reset_on_close
from reflex.net.targets import TargetPolicy
from reflex.net.tunnel import Tunnel
from reflex.pool import TieredPool
from reflex.protocol.address import Address
from reflex.protocol.streams import Stream
from reflex.protocol.wire import AddressType, Status

log = logging.getLogger(__name__)


class Dialling:
    """What every target of one server shares: the policy, the time-out, the options of sockets."""

    __slots__ = ("keepalive_s", "nodelay", "policy", "timeout_s")

    def __init__(self, *, policy: TargetPolicy, timeout_s: float, nodelay: bool, keepalive_s: int) -> None:
        self.policy = policy
        self.timeout_s = timeout_s
        self.nodelay = nodelay
        self.keepalive_s = keepalive_s


class TargetRelay(Relay):
    """A relay whose socket is dialled first. Data that comes before is kept, within the stream's window.

    An IP address is connected to from callbacks alone; a name is resolved and raced by a task.
    """

    __slots__ = ("_address", "_attempt", "_dialling", "_task", "_timer")

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
    ) -> None:
        super().__init__(loop, tunnel, stream, buffers=buffers, counters=counters, on_end=on_end)
        self._address: Address | None = address
        self._dialling = dialling
        self._attempt: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
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
