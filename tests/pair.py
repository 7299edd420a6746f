"""Both halves in one event loop over loopback, and the ends of connections that a test holds in its hands.

A test of this kind is a coroutine under :func:`in_loop`. It waits for events: :func:`until` for what has no
event of its own, the methods of :class:`End` for bytes, FIN and RST. Each of them gives up after DEADLINE_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import secrets
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, ParamSpec, Self

import pytest
import uvloop
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from reflex.config import (
    HostPort,
    InboundLimits,
    InboundSettings,
    ListenSettings,
    OutboundLimits,
    OutboundSettings,
    PoolSettings,
    Secret,
    ServerSettings,
    TargetRule,
    TargetSettings,
    TcpSettings,
    UserSettings,
)
from reflex.inbound import Inbound
from reflex.loop import DirectLoop
from reflex.outbound import Outbound
from reflex.protocol.address import Address
from reflex.protocol.events import EventKind
from reflex.protocol.handshake import (
    AcceptedHello,
    ClientCredentials,
    ClientHandshake,
    ServerCredentials,
    SessionSecrets,
)
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.share import Share
from reflex.protocol.socks5 import CONNECT, METHOD_NONE, VERSION
from reflex.protocol.streams import Stream
from reflex.protocol.window import Budget
from reflex.protocol.wire import CLIENT_HELLO_SIZE, SERVER_HELLO_SIZE, Status, Suite
from tests.sessions import Seen, Side

P = ParamSpec("P")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]

DEADLINE_S: Final = 20.0  # for what takes milliseconds on an idle machine
POLL_S: Final = 0.001
HOST: Final = "127.0.0.1"
REPLY_SIZE: Final = 10  # of SOCKS5's answer to the request, with an IPv4 address
NOW_S: Final = 1_900_000_000  # a time for whoever needs one

# The params of the fixture `each_loop`, for tests that run on the daemons' loop and on another; all others
# run on asyncio's.
LOOPS: Final = (pytest.param(DirectLoop, id="direct"), pytest.param(uvloop.new_event_loop, id="uvloop"))
_factory: LoopFactory = asyncio.new_event_loop


@contextlib.contextmanager
def loops_from(factory: LoopFactory) -> Iterator[None]:
    """While this is open, :func:`in_loop` runs its tests on loops of this kind."""
    global _factory  # noqa: PLW0603 - pytest calls the tests, and hands them nothing that they did not ask for
    old, _factory = _factory, factory
    try:
        yield
    finally:
        _factory = old


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make a coroutine function a test. It fails as well where a callback of the loop has raised."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        errors: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
            await test(*args, **kwargs)

        with asyncio.Runner(loop_factory=_factory) as runner:
            runner.run(main())
        assert not errors, errors

    return run


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what it looks at tells nobody of its changes
            await asyncio.sleep(POLL_S)


async def turns(count: int = 3) -> None:
    """Let the loop turn so many times: what was due is done then."""
    for _ in range(count):
        await asyncio.sleep(0)


class End:
    """One end of a TCP connection, in the hands of a test."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    def fill(self) -> int:
        """Send zeros until the connection takes no more; return how many it took."""
        block = bytes(65_536)
        size = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                size += self.sock.send(block)
        return size

    async def receive_some(self, size: int = 65_536) -> bytes:
        """What comes next; empty at FIN. Raises ConnectionResetError at RST."""
        async with asyncio.timeout(DEADLINE_S):
            return await asyncio.get_running_loop().sock_recv(self.sock, size)

    async def receive(self, size: int) -> bytes:
        """Exactly so many bytes."""
        data = bytearray()
        while len(data) < size:
            part = await self.receive_some(size - len(data))
            assert part, f"the connection ended after {len(data)} of {size} bytes"
            data += part
        return bytes(data)

    async def receive_all(self) -> bytes:
        """Everything up to FIN."""
        parts = []
        while part := await self.receive_some():
            parts.append(part)
        return b"".join(parts)

    async def expect_fin(self) -> None:
        """The next thing is FIN."""
        assert await self.receive_some() == b""

    async def expect_reset(self) -> None:
        """RST comes, whatever comes before it."""
        try:
            size = len(await self.receive_all())
        except ConnectionResetError:
            return
        pytest.fail(f"FIN came after {size} bytes, where RST was due")

    @property
    def is_silent(self) -> bool:
        """Whether nothing has come: no byte, no end."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    def finish(self) -> None:
        """Send FIN."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Send RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tcp_pair(*, buffer_bytes: int = 0) -> tuple[socket.socket, socket.socket]:
    """Two non-blocking sockets that are connected over loopback; with send and receive buffers of this size."""
    with socket.socket() as listener:
        if buffer_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        listener.bind((HOST, 0))
        listener.listen(1)
        near = socket.socket()
        if buffer_bytes:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        near.connect(listener.getsockname())
        far = listener.accept()[0]
    for sock in (near, far):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


class Origin:
    """Listens on loopback; whoever connects is handed to the test."""

    def __init__(self, *, backlog: int = 128, receive_buffer_bytes: int = 0) -> None:
        self._sock = socket.socket()
        if receive_buffer_bytes:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self._sock.bind((HOST, 0))
        self._sock.listen(backlog)
        self._sock.setblocking(False)
        self.port: int = self._sock.getsockname()[1]
        self.address = Address.of(HOST, self.port)
        self.ends: list[End] = []

    async def accept(self) -> End:
        """The next connection."""
        async with asyncio.timeout(DEADLINE_S):
            sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
        self.ends.append(End(sock))
        return self.ends[-1]

    @property
    def is_unvisited(self) -> bool:
        """Whether nobody waits to be accepted."""
        try:
            self._sock.accept()[0].close()
        except BlockingIOError:
            return True
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
        for end in self.ends:
            end.close()


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """A port that refuses: it is bound, so that nobody else takes it, and does not listen."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        yield sock.getsockname()[1]


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port whose connections are never made: its listener's queue is full, so that a SYN is dropped."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind((HOST, 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


# Keys, and the handshake by hand.


@dataclass(frozen=True)
class Keys:
    """What the two halves share."""

    private_key: bytes
    public_key: bytes
    user_id: uuid.UUID
    user_key: bytes

    @classmethod
    def generate(cls) -> Keys:
        private = X25519PrivateKey.generate()
        return cls(
            private.private_bytes_raw(), private.public_key().public_bytes_raw(), uuid.uuid4(), secrets.token_bytes(32)
        )

    @property
    def server(self) -> ServerCredentials:
        return ServerCredentials(self.private_key, {self.user_id.bytes: self.user_key})

    @property
    def client(self) -> ClientCredentials:
        return ClientCredentials(self.public_key, self.user_id.bytes, self.user_key)

    def handshake(self, time_s: int) -> tuple[ClientHandshake, bytes]:
        """A client's handshake, and the hello that it begins with."""
        handshake = ClientHandshake(
            self.client, suite=Suite.AES_256_GCM, time_s=time_s, random_bytes=secrets.token_bytes
        )
        hello = bytearray(CLIENT_HELLO_SIZE)
        handshake.write_hello(memoryview(hello))
        return handshake, bytes(hello)

    def hello(self, time_s: int) -> bytes:
        return self.handshake(time_s)[1]


def answer_of(hello: AcceptedHello) -> tuple[bytes, SessionSecrets]:
    """A server's answer by hand, and the secrets."""
    answer = bytearray(SERVER_HELLO_SIZE)
    session_secrets = hello.write_answer(memoryview(answer), random_bytes=secrets.token_bytes)
    return bytes(answer), session_secrets


# The daemons.

LOOPBACK_TARGETS: Final = TargetSettings(allow=(TargetRule.parse("127.0.0.1:*"), TargetRule.parse("localhost:*")))


def inbound_settings(
    keys: Keys,
    *,
    listen: Sequence[HostPort] = (HostPort(HOST, 0),),
    fallback: int | None = None,
    targets: TargetSettings = LOOPBACK_TARGETS,
    limits: InboundLimits | None = None,
    tcp: TcpSettings | None = None,
) -> InboundSettings:
    """Settings of the server's half. ``fallback`` is a port on loopback."""
    return InboundSettings(
        listen=tuple(listen),
        private_key=Secret(keys.private_key),
        users=(UserSettings(name="alice", id=keys.user_id, key=Secret(keys.user_key)),),
        fallback=None if fallback is None else HostPort(HOST, fallback),
        targets=targets,
        limits=limits or InboundLimits(),
        tcp=tcp or TcpSettings(),
    )


def server_settings(keys: Keys, port: int, *, cipher: str = "auto") -> ServerSettings:
    return ServerSettings(
        address=HostPort(HOST, port),
        public_key=keys.public_key,
        user_id=keys.user_id,
        user_key=Secret(keys.user_key),
        cipher=cipher,
    )


def outbound_settings(
    servers: Sequence[ServerSettings],
    *,
    listen: Sequence[ListenSettings] = (ListenSettings(address=HostPort(HOST, 0)),),
    pool: PoolSettings | None = None,
    limits: OutboundLimits | None = None,
    tcp: TcpSettings | None = None,
) -> OutboundSettings:
    """Settings of the client's half, with a SOCKS5 door."""
    return OutboundSettings(
        listen=tuple(listen),
        servers=tuple(servers),
        pool=pool or PoolSettings(),
        limits=limits or OutboundLimits(),
        tcp=tcp or TcpSettings(),
    )


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@contextlib.asynccontextmanager
async def running_inbound(settings: InboundSettings) -> AsyncIterator[tuple[Inbound, int]]:
    """A server's half and its port; at the end nothing of it is left."""
    inbound = Inbound(settings)
    addresses = await inbound.start()
    try:
        yield inbound, port_of(addresses[0])
    finally:
        inbound.abort()
    await until(lambda: inbound._pools.in_use == 0)
    assert inbound._budget.buffered == 0
    assert inbound._budget.growth == 0
    assert not inbound._greetings
    assert not inbound._tunnels


@contextlib.asynccontextmanager
async def running_outbound(settings: OutboundSettings) -> AsyncIterator[tuple[Outbound, int]]:
    """A client's half and the port of its first door; at the end nothing of it is left."""
    outbound = Outbound(settings)
    addresses = await outbound.start()
    try:
        yield outbound, port_of(addresses[0])
    finally:
        outbound._connector.close()
        outbound.abort()
    await until(lambda: outbound._pools.in_use == 0)
    assert outbound._budget.buffered == 0
    assert outbound._budget.growth == 0
    assert not outbound._visitors
    assert not len(outbound._tunnels)


class Pair:
    """Both halves in one loop: ``async with Pair() as pair``.

    Attributes:
        inbound, outbound: the daemons.
        server_port: where Inbound listens.
        ports: of Outbound's doors, in order; the first one is SOCKS5 unless ``listen`` says otherwise.
    """

    def __init__(
        self,
        *,
        keys: Keys | None = None,
        fallback: int | None = None,
        targets: TargetSettings = LOOPBACK_TARGETS,
        inbound_limits: InboundLimits | None = None,
        listen: Sequence[ListenSettings] = (ListenSettings(address=HostPort(HOST, 0)),),
        pool: PoolSettings | None = None,
        outbound_limits: OutboundLimits | None = None,
        tcp: TcpSettings | None = None,
        cipher: str = "auto",
    ) -> None:
        self.keys = keys or Keys.generate()
        self._inbound_settings = inbound_settings(
            self.keys, fallback=fallback, targets=targets, limits=inbound_limits, tcp=tcp
        )
        self._outbound_options = {"listen": listen, "pool": pool, "limits": outbound_limits, "tcp": tcp}
        self._cipher = cipher
        self._stack = contextlib.AsyncExitStack()
        self.inbound: Inbound
        self.outbound: Outbound
        self.server_port = 0
        self.ports: list[int] = []
        self._ends: list[End] = []

    async def __aenter__(self) -> Self:
        stack = self._stack
        self.inbound, self.server_port = await stack.enter_async_context(running_inbound(self._inbound_settings))
        settings = outbound_settings(
            [server_settings(self.keys, self.server_port, cipher=self._cipher)],
            **self._outbound_options,  # type: ignore[arg-type]  # as __init__ took them
        )
        self.outbound, _ = await stack.enter_async_context(running_outbound(settings))
        self.ports = [port_of(listener.address) for listener in self.outbound._listeners]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)
        for end in self._ends:
            end.close()

    @property
    def tunnels(self) -> int:
        """How many tunnels the server has."""
        return len(self.inbound._tunnels)

    async def connect(self, door: int = 0) -> End:
        """A connection to one of the client's doors."""
        self._ends.append(await connect(self.ports[door]))
        return self._ends[-1]

    async def socks(self, port: int, host: str = HOST) -> End:
        """A connection through SOCKS5 to a target; the target is connected."""
        end = await self.connect()
        assert await socks_request(end, port, host) == Status.SUCCEEDED
        return end

    async def status(self, port: int, host: str = HOST) -> int:
        """How a request through SOCKS5 was answered, where that is not by success; FIN follows."""
        with await self.connect() as end:
            status = await socks_request(end, port, host)
            assert status != Status.SUCCEEDED
            await end.expect_fin()
        return status

    async def stream(self, origin: Origin) -> tuple[End, End]:
        """A stream through everything: the application's end and the target's."""
        near = await self.socks(origin.port)
        return near, await origin.accept()


async def connect(port: int, *, receive_buffer_bytes: int = 0) -> End:
    sock = socket.socket()
    if receive_buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    sock.setblocking(False)
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.get_running_loop().sock_connect(sock, (HOST, port))
    return End(sock)


def socks_head(port: int, host: str = HOST) -> bytes:
    """What an application says to a SOCKS5 server that asks for no password: greeting and request."""
    return bytes([VERSION, 1, METHOD_NONE]) + bytes([VERSION, CONNECT, 0]) + Address.of(host, port).encode()


async def socks_request(end: End, port: int, host: str = HOST) -> int:
    """Ask for a target; the answer's status."""
    await end.send(socks_head(port, host))
    assert await end.receive(2) == bytes([VERSION, METHOD_NONE])
    reply = await end.receive(REPLY_SIZE)
    assert reply[0] == VERSION
    return reply[1]


def statistics(caplog: pytest.LogCaptureFixture, logger: str) -> dict[str, Any]:
    """The last line of statistics that this logger wrote."""
    prefix = "statistics: "
    lines = [
        record.getMessage() for record in caplog.records if record.name == logger and record.levelno == logging.INFO
    ]
    line = [line for line in lines if line.startswith(prefix)][-1]
    found: dict[str, Any] = json.loads(line.removeprefix(prefix))
    return found


# One tunnel whose peer is played by the test.


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


class Hog:
    """Keeps a share of a daemon's memory for waiting bytes, as a stream that nobody reads would."""

    def __init__(self, share: Share, percent: int) -> None:
        self.kept_bytes = 0
        self.moved_at = 0
        self._share = share
        assert share.reserve(self, -(-share.budget.buffered_limit * percent // 100))

    def shed(self) -> None:
        self._share.give_back(self, self.kept_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shed()
