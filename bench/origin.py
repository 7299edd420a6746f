"""Small TCP servers on loopback, a thread a connection; among them the web server of the demo and the tests.

``python -m bench.origin`` runs the web server as a process of its own; its log line has the form of
the daemons' (``ready: listening on ADDRESS``).
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import socket
import sys
import threading
from functools import cache, lru_cache
from io import BufferedReader
from types import TracebackType
from typing import Final, Self

# A prime below 1 MiB: no two pieces at offsets that are multiples of a buffer's size are alike,
# so that bytes that come out in another order give another digest.
BLOCK_SIZE: Final = 1_048_573
HELLO: Final = (b"hello from the origin\n" * 6)[:128]
BACKLOG: Final = 1024  # hundreds of clients connect at once


@cache
def block() -> bytes:
    """The seeded bytes that ``/bytes/N`` repeats."""
    return random.Random(1).randbytes(BLOCK_SIZE)  # noqa: S311 - wanted: the same bytes each time


@lru_cache(maxsize=64)
def expected_sha256(size: int) -> str:
    """Hex SHA-256 of what ``/bytes/{size}`` answers."""
    digest = hashlib.sha256()
    whole, rest = divmod(size, BLOCK_SIZE)
    for _ in range(whole):
        digest.update(block())
    digest.update(block()[:rest])
    return digest.hexdigest()


class LoopbackServer:
    """A TCP server that gives each connection to ``serve`` in a thread of its own.

    Listens from construction on, at ``host``:``port`` (``port`` 0: a free one, then the real one).
    Leaving the context closes the listener and cuts what is still open.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self.connections = 0  # accepted so far
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="accepts", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """``host:port``, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def serve(self, sock: socket.socket) -> None:
        """Serve one connection; the caller closes it. An OSError ends it quietly."""
        raise NotImplementedError

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed by stop()
            with self._lock:
                if self._stopped:
                    sock.close()
                    return
                self.connections += 1
                self._sockets.add(sock)
            threading.Thread(target=self._run, args=(sock,), name=type(self).__name__, daemon=True).start()

    def _run(self, sock: socket.socket) -> None:
        try:
            with sock, contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.serve(sock)
        finally:
            with self._lock:
                self._sockets.discard(sock)

    def stop(self) -> None:
        """Close the listener and every connection. May be called twice."""
        with self._lock:
            self._stopped = True
            sockets = list(self._sockets)
        # shutdown, not close: it wakes the threads that wait in accept and recv.
        for sock in (self._listener, *sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Origin(LoopbackServer):
    """A web server, HTTP/1.1 with keep-alive.

    - ``GET /hello``: the 128 bytes of HELLO
    - ``GET /bytes/N``: N bytes, ``expected_sha256(N)``
    - ``POST`` or ``PUT /upload``: ``SHA-256 LENGTH\\n`` of the body, which needs a Content-Length
    """

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def serve(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as reader:
            while self._serve_request(sock, reader):
                pass

    def _serve_request(self, sock: socket.socket, reader: BufferedReader) -> bool:
        """Serve one request; tells whether another may follow."""
        start = reader.readline(65_536).split()
        if len(start) != 3:
            return False  # the connection has ended, or this is not HTTP
        method, path, version = (part.decode("latin-1") for part in start)
        headers: dict[str, str] = {}
        while (line := reader.readline(65_536)) not in (b"\r\n", b"\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"

        if method in ("POST", "PUT") and path == "/upload":
            if not headers.get("content-length", "").isdecimal():
                _answer(sock, "411 Length Required", b"", keep_alive=False)
                return False
            if headers.get("expect", "").lower() == "100-continue":
                sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            _answer(sock, "200 OK", _digest_body(reader, int(headers["content-length"])), keep_alive=keep_alive)
        elif method in ("GET", "HEAD") and path == "/hello":
            _answer(sock, "200 OK", HELLO, keep_alive=keep_alive, head_only=method == "HEAD")
        elif method == "GET" and path.startswith("/bytes/") and path[7:].isdecimal():
            size = int(path[7:])
            sock.sendall(_head("200 OK", size, keep_alive=keep_alive))
            whole, rest = divmod(size, BLOCK_SIZE)
            for _ in range(whole):
                sock.sendall(block())
            sock.sendall(memoryview(block())[:rest])
        else:
            _answer(sock, "404 Not Found", b"not found\n", keep_alive=False)
            return False
        return keep_alive


def _head(status: str, size: int, *, keep_alive: bool) -> bytes:
    connection = "keep-alive" if keep_alive else "close"
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {size}\r\nConnection: {connection}\r\n\r\n"
    ).encode()


def _answer(sock: socket.socket, status: str, body: bytes, *, keep_alive: bool, head_only: bool = False) -> None:
    sock.sendall(_head(status, len(body), keep_alive=keep_alive) + (b"" if head_only else body))


def _digest_body(reader: BufferedReader, size: int) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(262_144))
    left = size
    while left:
        received = reader.readinto(buffer[: min(left, len(buffer))])
        if not received:
            raise ConnectionError(f"the body ended {left} bytes early")
        digest.update(buffer[:received])
        left -= received
    return f"{digest.hexdigest()} {size}\n".encode()


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before any thread: they inherit it
    with Origin() as origin:
        print(f"ready: listening on {origin.address}", file=sys.stderr, flush=True)
        signal.sigwait(signals)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
