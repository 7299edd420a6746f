"""The ends of connections that a test holds in its hands, and ports to connect to.

The methods of :class:`End` wait for bytes, FIN and RST. Each of them gives up after DEADLINE_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Final, Self

import pytest

from reflex.protocol.address import Address
from reflex.protocol.socks5 import CONNECT, METHOD_NONE, VERSION
from tests.loops import DEADLINE_S

HOST: Final = "127.0.0.1"
# A label of 64 characters is no name (RFC 1035, section 2.3.4): that it has no address needs no name server.
NO_SUCH_NAME: Final = "n" * 64 + ".invalid"
REPLY_SIZE: Final = 10  # of SOCKS5's answer to the request, with an IPv4 address


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
