"""Much data, many connections, slow readers and half-closes through the real pair."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.origin import BLOCK_SIZE, block
from tests.processes import (
    EchoServer,
    HalfCloseServer,
    LoopbackServer,
    Pair,
    Process,
    anonymous_bytes,
    eventually,
    expected_sha256,
    make_pair,
    never_reading,
    open_descriptors,
    receive_exactly,
    socks_connect,
)

MIB = 1 << 20
READ_SIZE = MIB
BOUND_S = 60  # nothing here takes nearly as long
CONNECTIONS = 500


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with make_pair(tmp_path) as both:
        yield both


@pytest.fixture
def one_tunnel(tmp_path: Path) -> Iterator[Pair]:
    """A pair whose streams have to share, whatever they carry."""
    with make_pair(tmp_path, outbound={"pool": {"max_tunnels": 1}}) as both:
        yield both


@contextlib.contextmanager
def origin_process() -> Iterator[int]:
    """The web server as a process of its own: it does not share a lock with the test's hashing."""
    with Process("origin", [sys.executable, "-m", "bench.origin"]) as process:
        yield process.wait_ready()[0][1]


def digest_of(read: Callable[[memoryview], int], size: int) -> str:
    """SHA-256 of the next ``size`` bytes of a reader with ``readinto``'s manners."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_SIZE))
    left = size
    while left:
        received = read(buffer[: min(left, READ_SIZE)])
        assert received, f"the end came {left} bytes early"
        digest.update(buffer[:received])
        left -= received
    return digest.hexdigest()


def send_blocks(sock: socket.socket, size: int) -> None:
    """Send the first ``size`` bytes of what ``expected_sha256`` is about."""
    whole, rest = divmod(size, BLOCK_SIZE)
    for _ in range(whole):
        sock.sendall(block())
    sock.sendall(memoryview(block())[:rest])


def download(pair: Pair, port: int, size: int) -> None:
    """Get ``size`` bytes from the web server through SOCKS5 and compare their SHA-256."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=BOUND_S)
    client.sock = socks_connect(pair.socks_port, "127.0.0.1", port, timeout_s=BOUND_S)
    try:
        client.request("GET", f"/bytes/{size}")
        answer = client.getresponse()
        assert answer.status == 200
        assert digest_of(answer.readinto, size) == expected_sha256(size)
    finally:
        client.close()


def statistics(process: Process) -> dict[str, Any]:
    """What a daemon says on SIGUSR1."""
    seen = len(process.lines)
    process.send_signal(signal.SIGUSR1)
    found = process.wait_for_line(r"statistics: (\{.*\})$", since=seen)
    result: dict[str, Any] = json.loads(found.group(1))
    return result


# Volume.


def test_a_gibibyte_comes_down_whole(pair: Pair) -> None:
    with origin_process() as port:
        download(pair, port, 1024 * MIB)


class BothWays(LoopbackServer):
    """Sends ``size`` bytes and receives as many at the same time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.received_sha256 = ""
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        sender = threading.Thread(target=send_blocks, args=(sock, self.size), daemon=True)
        sender.start()
        self.received_sha256 = digest_of(sock.recv_into, self.size)
        sender.join(BOUND_S)
        sock.sendall(b"received")


def test_a_connection_carries_bytes_both_ways_at_the_same_time(pair: Pair) -> None:
    size = 96 * MIB
    with BothWays(size) as server, socks_connect(pair.socks_port, "127.0.0.1", server.port) as sock:
        sender = threading.Thread(target=send_blocks, args=(sock, size), daemon=True)
        sender.start()
        assert digest_of(sock.recv_into, size) == expected_sha256(size)
        sender.join(BOUND_S)
        assert receive_exactly(sock, 8) == b"received"
        assert server.received_sha256 == expected_sha256(size)


# Number.


async def echo_exactly(proxy_port: int, port: int, payload: bytes, everybody: asyncio.Barrier) -> None:
    """Connect; when everybody has connected, send the payload, and get it back to the last byte."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy_port)
    try:
        writer.write(b"\x05\x01\x00")
        assert await reader.readexactly(2) == b"\x05\x00"
        writer.write(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + port.to_bytes(2))
        assert (await reader.readexactly(10))[1] == 0
        await everybody.wait()
        writer.write(payload)
        writer.write_eof()
        assert await reader.read(-1) == payload
    finally:
        writer.close()


async def echo_all(proxy_port: int, port: int) -> None:
    everybody = asyncio.Barrier(CONNECTIONS)
    source = random.Random(500)
    payloads = [source.randbytes(source.randrange(1, 4_000)) for _ in range(CONNECTIONS)]
    async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as group:
        for payload in payloads:
            group.create_task(echo_exactly(proxy_port, port, payload, everybody))


def test_five_hundred_connections_at_once_are_exact_and_leave_no_descriptor_behind(tmp_path: Path) -> None:
    keep_none = {"pool": {"max_idle": 0}}
    with make_pair(tmp_path, outbound=keep_none) as pair, EchoServer() as server:
        halves = (pair.inbound, pair.outbound)
        before = [open_descriptors(half.pid) for half in halves]
        asyncio.run(echo_all(pair.socks_port, server.port))
        assert server.connections == CONNECTIONS
        for half, baseline in zip(halves, before, strict=True):
            assert eventually(lambda: open_descriptors(half.pid) <= baseline), half.name  # noqa: B023
            figures = statistics(half)
            assert figures["gauges"]["streams"] == 0
            assert {name: pool["in_use"] for name, pool in figures["pools"].items() if pool["in_use"]} == {}


# Half-closes.


def test_a_client_that_has_ended_its_side_still_gets_the_answer(pair: Pair) -> None:
    size = 5 * MIB + 1
    with HalfCloseServer() as server, socks_connect(pair.socks_port, "127.0.0.1", server.port) as sock:
        send_blocks(sock, size)
        sock.shutdown(socket.SHUT_WR)
        answer = b"%d\n" % size
        assert receive_exactly(sock, len(answer)) == answer
        assert sock.recv(1) == b""


class EndsFirst(LoopbackServer):
    """Says a word, ends its side, and reads on to the client's end."""

    def __init__(self) -> None:
        self.received = 0
        self.is_done = threading.Event()
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        sock.sendall(b"go on")
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(READ_SIZE):
            self.received += len(data)
        self.is_done.set()


def test_a_client_goes_on_sending_after_the_server_has_ended_its_side(pair: Pair) -> None:
    size = 5 * MIB + 1
    with EndsFirst() as server, socks_connect(pair.socks_port, "127.0.0.1", server.port) as sock:
        assert receive_exactly(sock, 5) == b"go on"
        assert sock.recv(1) == b""  # before a byte was sent
        send_blocks(sock, size)
        sock.shutdown(socket.SHUT_WR)
        assert server.is_done.wait(BOUND_S)
        assert server.received == size


# Slow readers.


# What a stream's reader has not taken waits in the half next to it, and is at most the stream's receive
# window: 256 KiB at first, and up to 16 MiB where the reader was fast before. The buffers that hold it are
# filled to the end, so they take no more than that. The half that sends holds for a stalled stream
# nothing but a few sealed records of 128 KiB. The slack is for those, for the buffers of the stream that
# goes on meanwhile, and for pages that the allocator keeps. Without windows it would be hundreds of MiB.
MAX_WINDOW_BYTES = 16 * MIB
SLACK_BYTES = 8 * MIB


def assert_within_windows(half: Process, before: int, *, windows: int) -> None:
    """``windows``: how many streams' bytes may wait in that half for their reader."""
    grown = anonymous_bytes(half.pid) - before
    assert grown < windows * MAX_WINDOW_BYTES + SLACK_BYTES, f"{half.name} has grown by {grown:,} bytes"


def test_a_reader_that_stalls_costs_its_window_and_holds_nobody_up(one_tunnel: Pair) -> None:
    pair = one_tunnel
    fast = 64 * MIB
    with origin_process() as port:
        download(pair, port, fast)  # code is loaded, pools are filled
        before_outbound, before_inbound = anonymous_bytes(pair.outbound.pid), anonymous_bytes(pair.inbound.pid)
        with socks_connect(pair.socks_port, "127.0.0.1", port, timeout_s=BOUND_S) as stalled:
            stalled.sendall(b"GET /bytes/%d HTTP/1.1\r\nHost: x\r\n\r\n" % (1024 * MIB))
            answer = http.client.HTTPResponse(stalled)
            answer.begin()
            digest_of(answer.readinto, fast)  # fast enough for the window to grow
            for _ in range(4):
                download(pair, port, fast)  # meanwhile all that may come for the stalled stream has come
                assert_within_windows(pair.outbound, before_outbound, windows=2)  # its own, and the download's
                assert_within_windows(pair.inbound, before_inbound, windows=0)
            assert statistics(pair.outbound)["counters"]["tunnels_opened"] == 1  # they did share one
            # It reads on, and nothing was lost.
            assert digest_of(answer.readinto, fast) == block_digest(fast, fast)


def block_digest(start: int, size: int) -> str:
    """SHA-256 of ``size`` bytes of the web server's, from ``start`` on."""
    repeated = block() * (size // BLOCK_SIZE + 2)
    first = start % BLOCK_SIZE
    return hashlib.sha256(memoryview(repeated)[first : first + size]).hexdigest()


def test_a_target_that_does_not_read_costs_its_window_and_holds_nobody_up(one_tunnel: Pair) -> None:
    pair = one_tunnel
    size = 64 * MIB
    with never_reading() as deaf, origin_process() as port:
        download(pair, port, size)
        before_outbound, before_inbound = anonymous_bytes(pair.outbound.pid), anonymous_bytes(pair.inbound.pid)
        with socks_connect(pair.socks_port, "127.0.0.1", deaf, timeout_s=BOUND_S) as sock:
            sender = threading.Thread(target=send_until_shut, args=(sock, 1024 * MIB), daemon=True)
            sender.start()
            for _ in range(3):
                download(pair, port, size)
                assert_within_windows(pair.outbound, before_outbound, windows=1)  # the download's
                assert_within_windows(pair.inbound, before_inbound, windows=1)  # its own
            assert statistics(pair.outbound)["counters"]["tunnels_opened"] == 1
            assert sender.is_alive()  # it was held back, all the way to the application
            sock.shutdown(socket.SHUT_RDWR)
            sender.join(BOUND_S)


def send_until_shut(sock: socket.socket, size: int) -> None:
    with contextlib.suppress(OSError):
        send_blocks(sock, size)
