"""A connected pair of sessions in memory, and a peer that may do what it must not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from reflex.protocol.address import Address
from reflex.protocol.events import Event, EventKind
from reflex.protocol.frames import FrameDecoder
from reflex.protocol.handshake import SessionSecrets
from reflex.protocol.keys import CipherState
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.streams import Stream
from reflex.protocol.window import Budget
from reflex.protocol.wire import (
    CODE,
    DEFAULT_MAX_STREAMS,
    FRAME_HEADER,
    GOAWAY,
    INCREMENT,
    KEEPALIVE_S,
    RECORD_OVERHEAD,
    FrameType,
    Network,
    Suite,
)

TARGET: Final = Address.parse("example.org:443")
TO_TARGET: Final = bytes([Network.TCP]) + TARGET.encode()  # what an OPEN carries
TO_UDP: Final = bytes([Network.UDP])
START_S: Final = 1000.0  # what the clock shows when a session begins
CLIENT_TIME_MS: Final = 1_900_000_000_123
SERVER_TIME_MS: Final = 1_900_000_007_456

SECRETS: Final = SessionSecrets(
    suite=Suite.CHACHA20_POLY1305,
    root_client_to_server=bytes(range(32)),
    root_server_to_client=bytes(range(32, 64)),
    exporter=bytes(32),
    handshake_hash=bytes(32),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What an event said, for keeping. ``stream_id`` is 0 for the session, as on the wire."""

    kind: EventKind
    stream_id: int = 0
    data: bytes = b""
    number: int = 0
    address: Address | None = None


RawFrame = tuple[int, int, bytes]  # type, stream id, payload


class Side:
    """One session and its application: it keeps what it saw, and by default consumes at once.

    Attributes:
        seen: every event but DATA, in order.
        got: the bytes that arrived, by stream id.
        streams: every stream that was ever opened here or seen, by id; live or not.
        reads: whether what arrives is consumed at once; else :meth:`consume` does.
        written: how many bytes the session gave out.
    """

    def __init__(self, session: Session, budget: Budget) -> None:
        self.session = session
        self.budget = budget
        self.seen: list[Seen] = []
        self.got: dict[int, bytearray] = {}
        self.streams: dict[int, Stream] = {}
        self.reads = True
        self.written = 0

    def open(self) -> Stream:
        stream = self.session.open(TARGET)
        self.streams[stream.id] = stream
        return stream

    def feed(self, data: bytes) -> None:
        for event in self.session.feed(data):
            self.keep(event)

    def keep(self, event: Event) -> None:
        stream = event.stream
        if stream is not None:
            self.streams[stream.id] = stream
        if event.kind is EventKind.DATA:
            assert stream is not None
            self.got.setdefault(stream.id, bytearray()).extend(event.data)
        else:
            number = event.number
            self.seen.append(
                Seen(event.kind, stream.id if stream else 0, bytes(event.data), number, event.address),
            )
        if self.reads and stream is not None and event.data:
            self.session.consumed(stream, len(event.data))

    def take_seen(self) -> list[Seen]:
        """What was seen since the last time."""
        seen, self.seen = self.seen, []
        return seen

    def take_output(self) -> bytes:
        data = self.session.data_to_send()
        self.written += len(data)
        return data

    def consume(self, stream: Stream | None = None) -> None:
        """Consume all that is held, of one stream or of every one."""
        for each in self.streams.values() if stream is None else [stream]:
            if each.held_bytes:
                self.session.consumed(each, each.held_bytes)

    def end(self) -> None:
        """Give everything back, and check that nothing is left."""
        self.session.close_buffers()
        self.consume()
        assert self.budget.growth == 0
        assert self.budget.buffered == 0
        assert not self.session.streams
        assert all(stream.held_bytes == 0 for stream in self.streams.values())


def split(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Cut ``data`` into pieces of these sizes, and what is left."""
    rest = data
    for size in sizes:
        if not rest:
            return
        yield rest[:size]
        rest = rest[size:]
    if rest:
        yield rest


class Pair:
    """A client's and a server's side, and the connection between them."""

    def __init__(
        self,
        pools: Pools,
        *,
        secrets: SessionSecrets = SECRETS,
        max_streams: int = DEFAULT_MAX_STREAMS,
        keepalive_s: float = KEEPALIVE_S,
        now_s: float = START_S,
        client_budget: Budget | None = None,
        server_budget: Budget | None = None,
    ) -> None:
        client_budget = client_budget or Budget()
        server_budget = server_budget or Budget()
        self.client = Side(
            Session.client(
                secrets, pools, time_ms=CLIENT_TIME_MS, now_s=now_s, keepalive_s=keepalive_s, budget=client_budget
            ),
            client_budget,
        )
        self.server = Side(
            Session.server(
                secrets,
                pools,
                time_ms=SERVER_TIME_MS,
                now_s=now_s,
                max_streams=max_streams,
                keepalive_s=keepalive_s,
                budget=server_budget,
            ),
            server_budget,
        )

    def set_time(self, now_s: float) -> None:
        self.client.session.now_s = self.server.session.now_s = now_s

    def pump(self, sizes: Iterable[int] = ()) -> None:
        """Move what waits, both ways, until nothing waits; each piece cut into ``sizes`` and the rest."""
        sizes = tuple(sizes)
        while (there := self.client.take_output()) + (back := self.server.take_output()):
            for piece in split(there, sizes):
                self.server.feed(piece)
            for piece in split(back, sizes):
                self.client.feed(piece)

    def open(self) -> tuple[Stream, Stream]:
        """A stream that the server has accepted: the client's view of it and the server's."""
        near = self.client.open()
        self.pump()
        far = self.server.streams[near.id]
        self.server.session.accept(far)
        self.pump()
        self.client.take_seen()
        self.server.take_seen()
        return near, far

    def end(self) -> None:
        self.client.end()
        self.server.end()


@contextmanager
def connected(
    pools: Pools,
    *,
    max_streams: int = DEFAULT_MAX_STREAMS,
    keepalive_s: float = KEEPALIVE_S,
    client_budget: Budget | None = None,
    server_budget: Budget | None = None,
) -> Iterator[Pair]:
    """A pair whose SETTINGS have been exchanged; whole pools and budgets are checked at the end."""
    pair = Pair(
        pools,
        max_streams=max_streams,
        keepalive_s=keepalive_s,
        client_budget=client_budget,
        server_budget=server_budget,
    )
    try:
        pair.pump()
        pair.client.take_seen()
        pair.server.take_seen()
        yield pair
        pair.end()
    finally:
        pair.client.session.close_buffers()
        pair.server.session.close_buffers()
    assert pools.in_use == 0


class Peer:
    """Whoever is at the other end of a session: it writes what it likes, properly sealed."""

    def __init__(
        self, pools: Pools, *, of_server: bool, max_streams: int = DEFAULT_MAX_STREAMS, budget: Budget | None = None
    ) -> None:
        self.budget = budget or Budget()
        if of_server:
            self.session = Session.server(
                SECRETS, pools, time_ms=SERVER_TIME_MS, now_s=START_S, max_streams=max_streams, budget=self.budget
            )
        else:
            self.session = Session.client(SECRETS, pools, time_ms=CLIENT_TIME_MS, now_s=START_S, budget=self.budget)
        self.side = Side(self.session, self.budget)
        outgoing, incoming = SECRETS.root_client_to_server, SECRETS.root_server_to_client
        if not of_server:
            outgoing, incoming = incoming, outgoing
        self._cipher = CipherState(SECRETS.suite, outgoing)
        self._decoder = FrameDecoder(CipherState(SECRETS.suite, incoming), pools.buffers, pools.frames)

    def write(self, frame_type: int, stream_id: int = 0, payload: bytes = b"") -> None:
        """Write a frame, in a record of its own, that the session receives at once."""
        self.write_body(frame(frame_type, stream_id, payload))

    def write_body(self, body: bytes) -> None:
        """Seal any bytes as the body of one record, that the session receives at once."""
        self.side.feed(self.seal(body))

    def seal(self, body: bytes) -> bytes:
        """Seal any bytes as the body of one record."""
        record = bytearray(len(body) + RECORD_OVERHEAD)
        self._cipher.seal(memoryview(body), memoryview(record))
        return bytes(record)

    def call(self, stream_id: int) -> Stream:
        """Open a stream at a server; the answer is still to be given."""
        self.write(FrameType.OPEN, stream_id, TO_TARGET)
        self.side.take_seen()
        return self.side.streams[stream_id]

    def open(self, stream_id: int) -> Stream:
        """Open a stream at a server that accepts it."""
        stream = self.call(stream_id)
        self.session.accept(stream)
        self.answers()
        return stream

    def answers(self) -> list[RawFrame]:
        """The frames that the session has written since the last time."""
        frames = []
        rest = self.session.data_to_send()
        while rest:
            rest = rest[self._decoder.feed(rest) :]
            frames += [each.copy() for each in self._decoder]
        return frames

    def end(self) -> None:
        self.side.end()
        self._decoder.close()


@contextmanager
def peer_of(
    pools: Pools, *, of_server: bool, max_streams: int = DEFAULT_MAX_STREAMS, budget: Budget | None = None
) -> Iterator[Peer]:
    """A peer of a server, or of a client, that has read the session's SETTINGS."""
    peer = Peer(pools, of_server=of_server, max_streams=max_streams, budget=budget)
    try:
        peer.answers()
        yield peer
    finally:
        peer.end()
    assert pools.in_use == 0


def frame(frame_type: int, stream_id: int = 0, payload: bytes = b"") -> bytes:
    return FRAME_HEADER.pack(frame_type << 24 | len(payload), stream_id) + payload


def code(number: int) -> bytes:
    return CODE.pack(number)


def increment(size_bytes: int) -> bytes:
    return INCREMENT.pack(size_bytes)


def goaway(last_id: int, number: int) -> bytes:
    return GOAWAY.pack(last_id, number)
