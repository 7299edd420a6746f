"""One tunnel over a pair of sockets: what a test of relays and of the tunnel itself holds in its hands."""

from __future__ import annotations

import asyncio
from typing import Self

from reflex.metrics import Counters
from reflex.net.options import set_reset_on_close
from reflex.net.relay import Relay
from reflex.net.tunnel import Tunnel
from reflex.protocol.address import Address
from reflex.protocol.events import Event, EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.streams import Stream
from reflex.protocol.window import Budget
from tests.ends import End, tcp_pair
from tests.loops import until
from tests.remote import Remote
from tests.sessions import SECRETS, Side

SMALL_BUFFERS = 4_096
PATTERN = bytes(range(251)) * 5000  # 1.2 MB; no power of two divides its period


class Rig:
    """A tunnel, of the server's half or the client's, and its remote: ``async with Rig(pools, ...) as rig``.

    Attributes:
        opened: the streams of OPEN events, for a server's tunnel.
        times_ms: what SETTINGS told of the peer's clock.
        looks: how often the tunnel said that streams may have ended.
        ends: how often it said that it has ended.
    """

    def __init__(
        self,
        pools: Pools,
        *,
        is_client: bool = False,
        idle_timeout_s: float = 3600.0,
        keepalive_s: float = 3600.0,
        max_streams: int = 100,
        buffer_bytes: int = 0,
    ) -> None:
        self.pools = pools
        self.loop = asyncio.get_running_loop()
        self.budget = Budget()
        self.counters = Counters()
        self.opened: list[Stream] = []
        self.addresses: list[Address | None] = []
        self.times_ms: list[int] = []
        self.looks = 0
        self.ends = 0
        remote_pools, remote_budget = Pools(), Budget()
        near, far = tcp_pair(buffer_bytes=buffer_bytes)
        if is_client:
            session = Session.client(SECRETS, pools, time_ms=1, keepalive_s=keepalive_s, budget=self.budget)
            other = Session.server(SECRETS, remote_pools, time_ms=2, max_streams=max_streams, budget=remote_budget)
        else:
            session = Session.server(
                SECRETS, pools, time_ms=1, keepalive_s=keepalive_s, max_streams=max_streams, budget=self.budget
            )
            other = Session.client(SECRETS, remote_pools, time_ms=2, budget=remote_budget)
        session.now_s = self.loop.time()
        self.remote = Remote(End(near), Side(other, remote_budget))
        self.tunnel = Tunnel(
            self.loop,
            far,
            session,
            counters=self.counters,
            idle_timeout_s=idle_timeout_s,
            label="peer",
            on_end=self._on_end,
            on_open=self._on_open,
            on_settings=self.times_ms.append,
            on_stream_end=self._on_stream_end,
        )

    def _on_open(self, tunnel: Tunnel, event: Event) -> None:
        assert tunnel is self.tunnel
        assert event.stream is not None
        self.opened.append(event.stream)
        self.addresses.append(event.address)

    def _on_stream_end(self, tunnel: Tunnel) -> None:
        assert tunnel is self.tunnel
        self.looks += 1

    def _on_end(self, tunnel: Tunnel) -> None:
        assert tunnel is self.tunnel
        self.ends += 1

    @property
    def session(self) -> Session:
        return self.tunnel.session

    async def settle(self) -> None:
        """Both halves have the other one's SETTINGS."""
        await self.remote.flush()
        await until(lambda: self.times_ms)
        await self.remote.see(EventKind.SETTINGS)

    async def accept(self) -> tuple[Stream, Stream]:
        """A stream that the remote has opened and nobody has answered: the tunnel's view of it and the remote's."""
        theirs = await self.remote.open()
        await until(lambda: self.opened and self.opened[-1].id == theirs.id)
        return self.opened[-1], theirs

    async def __aenter__(self) -> Self:
        await self.settle()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.tunnel.cut("the test is over")
        if self.tunnel.silence is not None and self.tunnel._sock.fileno() >= 0:
            self.tunnel.silence.end()
        self.remote.end.close()
        self.remote.session.close_buffers()
        if kind is None:
            assert self.ends == 1
            assert self.pools.in_use == 0
            assert self.budget.buffered == 0
            assert self.budget.growth == 0


class Owner:
    """A stream's owner that keeps what it is told, and consumes at once unless told otherwise."""

    def __init__(self, rig: Rig, stream: Stream) -> None:
        self.rig = rig
        self.stream = stream
        self.last_tick = rig.tunnel.tick
        self.told: list[object] = []
        self.ended = False
        self.fd = -1
        self.waiting_bytes = 0
        self.got = bytearray()
        stream.owner = self

    def on_opened(self) -> None:
        self.told.append("opened")

    def on_refused(self, status: int) -> None:
        self.told.append(("refused", status))

    def on_data(self, data: memoryview) -> None:
        self.got += data
        self.rig.session.consumed(self.stream, len(data))

    def on_fin(self) -> None:
        self.told.append("fin")

    def on_reset(self, code: int) -> None:
        self.told.append(("reset", code))

    def on_writable(self) -> None:
        self.told.append("writable")

    def on_idle(self) -> None:
        self.told.append("idle")
        self.last_tick = self.rig.tunnel.tick

    def on_hang_up(self) -> None:
        self.told.append("hang-up")


async def accepted(rig: Rig) -> tuple[Owner, Stream]:
    """A stream that is open both ways: its owner at the tunnel, and the remote's view of it."""
    ours, theirs = await rig.accept()
    owner = Owner(rig, ours)
    rig.session.accept(ours)
    rig.tunnel.flush_soon()
    await rig.remote.see(EventKind.OPENED, theirs.id)
    return owner, theirs


class Relayed:
    """A stream that a relay joins with a local socket.

    Attributes:
        local: the other end of the local socket, the test's.
        theirs: the remote's view of the stream.
        ends: how often the relay said that it has ended.
    """

    def __init__(self, rig: Rig, stream: Stream, theirs: Stream, *, buffer_bytes: int = 0) -> None:
        near, far = tcp_pair(buffer_bytes=buffer_bytes)
        set_reset_on_close(far)
        self.local = End(near)
        self.theirs = theirs
        self.ends: list[Relay] = []
        self.relay = Relay(
            rig.loop,
            rig.tunnel,
            stream,
            buffers=rig.pools.buffers,
            counters=rig.counters,
            on_end=self.ends.append,
            sock=far,
        )

    async def ended(self) -> None:
        await until(lambda: self.ends)
        assert self.ends == [self.relay]
        assert self.relay.ended


async def relayed(rig: Rig, *, buffer_bytes: int = 0) -> Relayed:
    """A stream that the remote has opened, joined with a local socket."""
    ours, theirs = await rig.accept()
    joined = Relayed(rig, ours, theirs, buffer_bytes=buffer_bytes)
    rig.session.accept(ours)
    rig.tunnel.flush_soon()
    joined.relay.start_reading()
    await rig.remote.see(EventKind.OPENED, theirs.id)
    return joined


def arrived(rig: Rig, size: int) -> bool:
    """Whether so many bytes have come out of the tunnel."""
    return rig.counters.bytes_out_of_tunnels == size


async def send_into(rig: Rig, theirs: Stream, data: bytes) -> None:
    """Send all of it on the stream, as the windows allow."""
    rest = memoryview(data)
    while True:
        rest = rest[rig.remote.session.send(theirs, rest) :]
        await rig.remote.flush()
        if not rest:
            return
        await rig.remote.read()
