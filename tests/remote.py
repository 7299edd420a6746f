"""The other half of a tunnel, played by the test: a session by hand over one end of a connection."""

from __future__ import annotations

import time
from collections.abc import Callable

from reflex.protocol.address import Address
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.streams import Stream
from reflex.protocol.window import Budget
from reflex.protocol.wire import SERVER_HELLO_SIZE, Network
from tests.ends import End, connect
from tests.keys import Keys
from tests.sessions import Seen, Side


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
