"""What happens when memory runs out, as real processes; descriptors: tests/test_e2e_descriptors.py."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.processes import (
    EchoServer,
    Keys,
    LoopbackServer,
    Process,
    SocksReplyError,
    anonymous_bytes,
    echo,
    eventually,
    receive_exactly,
    socks_connect,
    start_inbound,
    start_outbound,
)

BOUND_S = 20


def statistics(process: Process) -> dict[str, Any]:
    seen = len(process.lines)
    process.send_signal(signal.SIGUSR1)
    found: dict[str, Any] = json.loads(process.wait_for_line(r"statistics: (\{.*)", since=seen).group(1))
    return found


MIB = 1 << 20
LIMIT_BYTES = 32 * MIB
# What a process takes besides waiting bytes: pools, a record of each tunnel, the allocator's rounding, threads.
BESIDES_BYTES = 12 * MIB


@contextlib.contextmanager
def never_reading() -> Iterator[int]:
    """A port that takes connections (the kernel does) into the smallest of buffers, and never reads a byte."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.bind(("127.0.0.1", 0))
        sock.listen(512)
        yield sock.getsockname()[1]


def send_while_taken(sock: socket.socket, size: int) -> int:
    """Send until nothing more is taken for a while, or it is reset; give how much that was."""
    sock.settimeout(1.0)
    block = bytes(65_536)
    sent = 0
    with contextlib.suppress(TimeoutError, ConnectionError):
        while sent < size:
            sent += sock.send(block)
    return sent


class PeakMemory:
    """The most memory of its own that a process had while it was watched, looked at all the time."""

    def __init__(self, process: Process) -> None:
        self.before_bytes = anonymous_bytes(process.pid)
        self.most_bytes = self.before_bytes
        self._process = process
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._is_over.wait(0.05):
            self.most_bytes = max(self.most_bytes, anonymous_bytes(self._process.pid))

    @property
    def growth_bytes(self) -> int:
        return self.most_bytes - self.before_bytes

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


# The kernel would take megabytes for each target that does not read, before the server has to keep anything.
SMALL_SEND_BUFFERS = """
import socket
from reflex.net import target
_begin = target.begin_connect
def _begin_small(*arguments, **options):
    sock = _begin(*arguments, **options)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return sock
target.begin_connect = _begin_small
"""


@contextlib.contextmanager
def clients(directory: Path, count: int, limits: dict[str, object]) -> Iterator[tuple[Process, list[Process]]]:
    """A server with those limits, and clients with a user each."""
    keys = [Keys.generate() for _ in range(count)]
    users = [{"name": f"user{n}", "id": each.user_id, "key": each.user_key} for n, each in enumerate(keys)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            start_inbound(directory, keys[0], {"users": users, "limits": limits}, prelude=SMALL_SEND_BUFFERS)
        )
        port = server.wait_ready()[0][1]
        started = []
        for number, each in enumerate(keys):
            own = directory / f"client{number}"
            own.mkdir()
            both = Keys(keys[0].private_key, keys[0].public_key, each.user_id, each.user_key)
            pool = {"pool": {"max_streams": 16, "max_tunnels": 16}}
            started.append(stack.enter_context(start_outbound(own, both, port, pool)))
        yield server, started


def open_streams(socks_port: int, target_port: int, count: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    """So many connections to a target, those left out that were refused for want of memory."""
    sockets = []
    for _ in range(count):
        with contextlib.suppress(SocksReplyError):
            sockets.append(stack.enter_context(socks_connect(socks_port, "127.0.0.1", target_port)))
    return sockets


def pass_on(sock: socket.socket, size: int, threads: ThreadPoolExecutor) -> None:
    """Send so many bytes to an echo, and get all of them back."""
    data = secrets.token_bytes(size)
    sender = threads.submit(sock.sendall, data)
    assert receive_exactly(sock, size) == data
    sender.result(BOUND_S)


def test_slow_readers_of_one_user_get_a_share_of_the_servers_memory_and_others_go_on(tmp_path: Path) -> None:
    with (
        never_reading() as slow,
        EchoServer() as target,
        clients(tmp_path, 2, {"buffered_bytes": LIMIT_BYTES}) as (server, [mallory, alice]),
        ThreadPoolExecutor(128) as threads,
        contextlib.ExitStack() as stack,
    ):
        ports = [each.wait_ready()[0][1] for each in (mallory, alice)]
        with socks_connect(ports[1], "127.0.0.1", target.port) as running, PeakMemory(server) as memory:
            echo(running)
            sockets = open_streams(ports[0], slow, 120, stack)
            assert len(sockets) == 120
            sending = [threads.submit(send_while_taken, sock, 2 * MIB) for sock in sockets]
            # Half of it, and what had credit already: a first window for each of 8 tunnels.
            assert eventually(lambda: statistics(server)["gauges"]["buffered_bytes"] >= LIMIT_BYTES / 2)
            for size in (5, 3 * MIB):
                pass_on(running, size, threads)  # who reads is served
            with socks_connect(ports[1], "127.0.0.1", target.port) as sock:
                echo(sock)
            for each in sending:
                each.result(BOUND_S)
        found = statistics(server)
        print("\nserver grew by", memory.growth_bytes / MIB, "MiB;", found["gauges"], found["counters"])
        assert found["gauges"]["buffered_bytes_high_water"] <= LIMIT_BYTES
        assert memory.growth_bytes < LIMIT_BYTES + BESIDES_BYTES
        mallory.kill()
        assert eventually(lambda: statistics(server)["gauges"]["buffered_bytes"] == 0, within_s=BOUND_S)


def test_where_more_arrives_than_fits_streams_that_keep_most_are_reset_and_others_go_on(tmp_path: Path) -> None:
    limit_bytes = 2 * MIB  # less than what 8 tunnels may send before anybody says anything
    with (
        never_reading() as slow,
        EchoServer() as target,
        clients(tmp_path, 2, {"buffered_bytes": limit_bytes}) as (server, [mallory, alice]),
        ThreadPoolExecutor(128) as threads,
        contextlib.ExitStack() as stack,
    ):
        ports = [each.wait_ready()[0][1] for each in (mallory, alice)]
        with socks_connect(ports[1], "127.0.0.1", target.port) as running, PeakMemory(server) as memory:
            echo(running)
            sockets = open_streams(ports[0], slow, 120, stack)
            assert len(sockets) == 120
            sending = [threads.submit(send_while_taken, sock, 2 * MIB) for sock in sockets]
            for _ in range(20):
                pass_on(running, 300_000, threads)  # never so much at once that she keeps more than he
            for each in sending:
                each.result(BOUND_S)
            pass_on(running, 300_000, threads)
        found = statistics(server)
        print("\nserver grew by", memory.growth_bytes / MIB, "MiB;", found["gauges"], found["counters"])
        assert found["counters"]["streams_shed"] > 0
        assert found["counters"]["protocol_errors"] == found["counters"]["tunnels_lost"] == 0
        assert found["gauges"]["buffered_bytes_high_water"] <= limit_bytes
        assert memory.growth_bytes < limit_bytes + BESIDES_BYTES
        mallory.kill()
        assert eventually(lambda: statistics(server)["gauges"]["buffered_bytes"] == 0, within_s=BOUND_S)
        with socks_connect(ports[1], "127.0.0.1", target.port) as sock:
            echo(sock)


# The same for the client's local connections; its tunnels get them as well.
SMALL_LOCAL_SEND_BUFFERS = """
import socket
from reflex.net import dial
_set_options = dial.set_options
def _set_small(sock, **options):
    _set_options(sock, **options)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
dial.set_options = _set_small
"""


class Pouring(LoopbackServer):
    """Sends without end."""

    def serve(self, sock: socket.socket) -> None:
        block = bytes(65_536)
        with contextlib.suppress(ConnectionError):
            while True:
                sock.sendall(block)


def test_applications_that_do_not_read_get_a_share_of_the_clients_memory_and_others_go_on(tmp_path: Path) -> None:
    keys = Keys.generate()
    limit_bytes = 16 * MIB  # less than the windows of 120 streams
    with (
        Pouring() as origin,
        EchoServer() as target,
        start_inbound(tmp_path, keys) as server,
        ThreadPoolExecutor(4) as threads,
        contextlib.ExitStack() as stack,
        start_outbound(
            tmp_path,
            keys,
            server.wait_ready()[0][1],
            {"limits": {"buffered_bytes": limit_bytes}, "pool": {"max_streams": 16}},
            prelude=SMALL_LOCAL_SEND_BUFFERS,
        ) as client,
    ):
        port = client.wait_ready()[0][1]
        with socks_connect(port, "127.0.0.1", target.port) as running, PeakMemory(client) as memory:
            echo(running)
            sockets = open_streams(port, origin.port, 120, stack)
            assert eventually(lambda: statistics(client)["gauges"]["buffered_bytes"] > 0.9 * limit_bytes)
            for size in (5, 3 * MIB):
                pass_on(running, size, threads)  # through a tunnel that it shares with those who do not read
        found = statistics(client)
        print("\nclient grew by", memory.growth_bytes / MIB, "MiB;", found["gauges"], found["counters"])
        assert found["gauges"]["buffered_bytes_high_water"] <= limit_bytes
        assert found["counters"]["protocol_errors"] == found["counters"]["tunnels_lost"] == 0
        # Streams were reset, or those who came when 95 % were used up were told so, and the log has it.
        assert found["counters"]["connections_refused"] + found["counters"]["streams_shed"] > 0
        assert found["counters"]["connections_refused"] == 120 - len(sockets)
        if len(sockets) < 120:
            client.wait_for_line(r"WARNING .*local connections are refused: \d+ of \d+ bytes")
        assert memory.growth_bytes < limit_bytes + BESIDES_BYTES


def test_what_a_burst_took_goes_back_to_the_system(tmp_path: Path) -> None:
    keys = Keys.generate()
    with (
        Pouring() as origin,
        EchoServer() as target,
        start_inbound(tmp_path, keys) as server,
        start_outbound(
            tmp_path,
            keys,
            server.wait_ready()[0][1],
            {"pool": {"max_streams": 16}},
            prelude=SMALL_LOCAL_SEND_BUFFERS + "from reflex.net import trimmer\ntrimmer.TRIM_INTERVAL_S = 0.5\n",
        ) as client,
    ):
        port = client.wait_ready()[0][1]
        with socks_connect(port, "127.0.0.1", target.port) as running:
            echo(running)
            before_bytes = anonymous_bytes(client.pid)
            with contextlib.ExitStack() as stack:
                open_streams(port, origin.port, 160, stack)
                assert eventually(lambda: statistics(client)["gauges"]["buffered_bytes"] > 30 * MIB)
                most_bytes = anonymous_bytes(client.pid)
                assert most_bytes > before_bytes + 30 * MIB
            assert eventually(lambda: statistics(client)["gauges"]["buffered_bytes"] == 0)
            is_back = eventually(lambda: anonymous_bytes(client.pid) < before_bytes + BESIDES_BYTES)
            after_bytes = anonymous_bytes(client.pid)
            print("client:", *(size / MIB for size in (before_bytes, most_bytes, after_bytes)), "MiB")
            assert is_back
            echo(running)
