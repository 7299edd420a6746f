"""Both daemons, a target and their clients in one event loop, so that one process can be looked into.

    client (a coroutine) -> SOCKS5 -> Outbound -> TUNNEL -> Inbound -> echo server

The daemons are those that the console scripts run, with their listeners and real sockets on loopback.
The clients and the echo server keep a buffer each and allocate next to nothing themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from types import TracebackType
from typing import Final, Self
from unittest import mock

from reflex.config import (
    HostPort,
    InboundSettings,
    ListenSettings,
    OutboundSettings,
    PoolSettings,
    Secret,
    ServerSettings,
    TargetRule,
    TargetSettings,
    UserSettings,
)
from reflex.inbound import Inbound
from reflex.outbound import Outbound
from reflex.protocol.handshake import ServerCredentials
from reflex.protocol.pools import Pools
from reflex.protocol.wire import KEY_SIZE

ANY_PORT: Final = "127.0.0.1:0"
SETTLE_S: Final = 10.0  # for the last connections to be gone in both halves; they need milliseconds
SETTLE_STEP_S: Final = 0.02
REQUEST_SIZE: Final = 128
PIECE_SIZE: Final = 4_096
BULK_PIECE_SIZE: Final = 65_536
STALL_S: Final = 0.3  # no byte taken for so long: what is sent waits for its reader
# What the sockets of clients and the echo server may hold: little, so that what a late reader does not
# take has to be kept by the daemons.
SOCKET_BUFFER_SIZE: Final = 65_536
SOCKS_REPLY_SIZE: Final = 4 + 4 + 2  # version to address type, IPv4 address, port


def limit_buffers(sock: socket.socket) -> None:
    """Let the socket hold SOCKET_BUFFER_SIZE in either direction, before it is connected."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_SIZE)


class Echo:
    """A TCP server that sends back what it receives. ``open_connections`` is how many it has now."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1_024)
        self._listener.setblocking(False)
        limit_buffers(self._listener)  # those that it accepts inherit it
        self.port: int = self._listener.getsockname()[1]
        self.open_connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        self.open_connections += 1
        task = self._loop.create_task(self._serve(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        buffer = memoryview(bytearray(BULK_PIECE_SIZE))
        try:
            with sock:
                while size := await self._loop.sock_recv_into(sock, buffer):
                    await self._loop.sock_sendall(sock, buffer[:size])
        except OSError:
            return  # reset: this one is over
        finally:
            self.open_connections -= 1

    def close(self) -> None:
        """Listen no more, and cut what is open."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self._tasks:
            task.cancel()


class PairInProcess:
    """Both daemons and the echo server, running in this loop from ``async with`` on.

    Args:
        pooled: whether the daemons' pools keep anything.

    Attributes:
        pools: of the inbound and of the outbound half.
    """

    def __init__(self, *, pooled: bool) -> None:
        self.pools = {"inbound": Pools(pooled=pooled), "outbound": Pools(pooled=pooled)}
        self._buffer = memoryview(bytearray(BULK_PIECE_SIZE))  # what clients receive is not looked at, but counted

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._echo = Echo(self._loop)
        user_id, user_key, private_key = uuid.uuid4(), os.urandom(KEY_SIZE), os.urandom(KEY_SIZE)
        target = f"127.0.0.1:{self._echo.port}"
        with mock.patch("reflex.inbound.Pools", return_value=self.pools["inbound"]):
            self._inbound = Inbound(
                InboundSettings(
                    listen=(HostPort.parse_listen(ANY_PORT),),
                    private_key=Secret(private_key),
                    users=(UserSettings(name="bench", id=user_id, key=Secret(user_key)),),
                    targets=TargetSettings(allow=(TargetRule.parse(target),)),
                )
            )
        (server,) = await self._inbound.start()
        with mock.patch("reflex.outbound.Pools", return_value=self.pools["outbound"]):
            self._outbound = Outbound(
                OutboundSettings(
                    listen=(ListenSettings(address=HostPort.parse_listen(ANY_PORT)),),
                    servers=(
                        ServerSettings(
                            address=HostPort.parse(server),
                            public_key=ServerCredentials(private_key, {}).server_public,
                            user_id=user_id,
                            user_key=Secret(user_key),
                            cipher="aes-256-gcm",
                        ),
                    ),
                    # No spare beside bulk data: what a tunnel costs that comes or goes is not of the relay path.
                    pool=PoolSettings(max_tunnels=1),
                )
            )
        (socks,) = await self._outbound.start()
        self._socks = ("127.0.0.1", int(socks.rpartition(":")[2]))
        self._connect = b"\x05\x01\x00\x01\x7f\x00\x00\x01" + self._echo.port.to_bytes(2)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self._outbound.drain()
            await self._inbound.drain()
        else:
            self._outbound.abort()
            self._inbound.abort()
        self._echo.close()

    # Clients.

    async def connect(self) -> socket.socket:
        """A connection to the echo server, through the tunnel."""
        loop = self._loop
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            limit_buffers(sock)
            await loop.sock_connect(sock, self._socks)
            await loop.sock_sendall(sock, b"\x05\x01\x00")
            await self._receive(sock, 2)
            await loop.sock_sendall(sock, self._connect)
            await self._receive(sock, SOCKS_REPLY_SIZE)
            if self._buffer[1]:
                raise ConnectionError(f"SOCKS5 reply {self._buffer[1]}")
        except BaseException:
            sock.close()
            raise
        return sock

    async def _receive(self, sock: socket.socket, size_bytes: int) -> None:
        received = 0
        while received < size_bytes:
            size = await self._loop.sock_recv_into(sock, self._buffer[: size_bytes - received])
            if not size:
                raise ConnectionError(f"the connection ended after {received} of {size_bytes} bytes")
            received += size

    async def exchange(self, sock: socket.socket, data: bytes, *, times: int = 1) -> None:
        """Send ``data``, of at most PIECE_SIZE bytes, and receive as much, so many times."""
        for _ in range(times):
            await self._loop.sock_sendall(sock, data)
            await self._receive(sock, len(data))

    async def fill(self, sock: socket.socket) -> int:
        """Send, and receive nothing, until nothing moves any more; returns how many bytes that took."""
        piece = bytes(BULK_PIECE_SIZE)
        sent = 0
        try:
            while True:
                async with asyncio.timeout(STALL_S):
                    await self._writable(sock)
                with contextlib.suppress(BlockingIOError):
                    sent += sock.send(piece)
        except TimeoutError:
            return sent

    async def _writable(self, sock: socket.socket) -> None:
        ready = asyncio.Event()
        self._loop.add_writer(sock, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_writer(sock)

    async def receive(self, sock: socket.socket, size_bytes: int) -> None:
        """Receive exactly so many bytes, and drop them."""
        for start in range(0, size_bytes, BULK_PIECE_SIZE):
            await self._receive(sock, min(BULK_PIECE_SIZE, size_bytes - start))

    async def requests(self, count: int, *, at_once: int) -> None:
        """``count`` connections of one request of REQUEST_SIZE bytes each; returns when all are gone."""
        left = iter(range(count))
        data = bytes(REQUEST_SIZE)

        async def client() -> None:
            for _ in left:
                sock = await self.connect()
                with sock:
                    await self.exchange(sock, data)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, count)):
                group.create_task(client())
        await self.settle()

    async def settle(self) -> None:
        """Wait until no connection is left in either half. Raises TimeoutError after SETTLE_S."""
        async with asyncio.timeout(SETTLE_S):
            # The pools tell nobody when they are whole: they are looked at.
            while self._echo.open_connections or any(pools.in_use for pools in self.pools.values()):  # noqa: ASYNC110
                await asyncio.sleep(SETTLE_STEP_S)
        await asyncio.sleep(SETTLE_STEP_S)
