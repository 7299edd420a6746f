"""One tunnel whose peer is played by the test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Self

from reflex.metrics import Counters
from reflex.net.tunnel import Tunnel
from reflex.protocol.address import Address
from reflex.protocol.events import Event, EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.streams import Stream
from reflex.protocol.window import Budget
from reflex.protocol.wire import SERVER_HELLO_SIZE, Network
from tests.ends import End, connect, tcp_pair
from tests.handshakes import Keys
from tests.loops import until
from tests.sessions import SECRETS, Seen, Side


class Remote:
    """The other half of a tunnel: a session, by the test's hand, over one end of a connection."""

    def __init__(self, end: End, side: Side) -> None:
        self.end = end
        self.side = side

    @property
    def session(self) -> Session:
        return self.side.session

    async def flush(self) -> None:
        """Send what the session has packed."""
        await self.end.send(self.side.take_output())

    async def write(self, frame_type: int, stream_id: int = 0, payload: bytes = b"") -> None:
        """Send any frame, whatever the session thinks of it."""
        self.session._encoder.write(frame_type, stream_id, payload)
        await self.flush()

    async def read(self) -> None:
        """Take what comes next; to be called while something is still to come."""
        data = await self.end.receive_some()
        assert data, "the tunnel has ended"
        self.side.feed(data)

    async def read_until(self, condition: Callable[[], object]) -> None:
        """Read on, answering as a session does, until the condition holds."""
        while not condition():
            await self.read()
            if self.session.unsent_bytes and not self.session.close_received:
                await self.flush()

    async def read_to_end(self) -> None:
        """Read on until FIN."""
        while data := await self.end.receive_some():
            self.side.feed(data)

    async def see(self, kind: EventKind, stream_id: int = 0) -> Seen:
        """The next event of this kind for this stream; those before it are forgotten."""
        found: list[Seen] = []

        def has_come() -> bool:
            found.extend(seen for seen in self.side.take_seen() if (seen.kind, seen.stream_id) == (kind, stream_id))
            return bool(found)

        await self.read_until(has_come)
        return found[0]

    async def receive(self, stream: Stream, size: int) -> bytes:
        """Exactly so many bytes of a stream."""
        await self.read_until(lambda: len(self.side.got.get(stream.id, b"")) >= size)
        got = self.side.got[stream.id]
        data = bytes(got[:size])
        del got[:size]
        return data

    async def open(self) -> Stream:
        """Open a stream; the answer is still to come."""
        stream = self.side.open()
        await self.flush()
        return stream

    async def ask(self, address: Address | None) -> tuple[Stream, Seen]:
        """Open a stream to the address, or for datagrams: it, and how its OPEN was answered."""
        stream = self.session.open(address, Network.UDP if address is None else Network.TCP)
        await self.flush()
        found: list[Seen] = []

        def is_answered() -> bool:
            found.extend(each for each in self.side.take_seen() if each.stream_id == stream.id)
            return bool(found)

        await self.read_until(is_answered)
        return stream, found[0]

    def leave(self) -> None:
        """Close the connection, and give back what the session holds."""
        self.end.close()
        self.session.close_buffers()


async def raw_client(port: int, keys: Keys, behind_hello: bytes = b"") -> Remote:
    """A client by hand: connected to a server, with the handshake done and SETTINGS exchanged.

    ``behind_hello`` is sent in one piece with the hello.
    """
    end = await connect(port)
    handshake, hello = keys.handshake(int(time.time()))
    await end.send(hello + behind_hello)
    session_secrets = handshake.read_answer(memoryview(await end.receive(SERVER_HELLO_SIZE)))
    budget = Budget()
    remote = Remote(end, Side(Session.client(session_secrets, Pools(), time_ms=3, budget=budget), budget))
    await remote.flush()
    await remote.see(EventKind.SETTINGS)
    return remote


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
        if self.tunnel._sock.fileno() >= 0:
            self.tunnel._end_discarding()
        self.remote.end.close()
        self.remote.session.close_buffers()
        if kind is None:
            assert self.ends == 1
            assert self.pools.in_use == 0
            assert self.budget.buffered == 0
            assert self.budget.growth == 0
