"""What happens when a process may open no more files, as real processes.

Figures are told with ``pytest -rP``.
"""

from __future__ import annotations

import contextlib
import json
import resource
import secrets
import select
import signal
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reflex.protocol.wire import SERVER_HELLO_SIZE
from tests.processes import (
    EchoServer,
    Keys,
    Process,
    SocksReplyError,
    cpu_seconds,
    echo,
    eventually,
    hello_bytes,
    make_pair,
    receive_exactly,
    socks_connect,
    start_inbound,
    start_outbound,
)
from tests.webserver import Answer, converse, tls_hello

BOUND_S = 20
RECOVERY_S = 1.9  # a server that had failed too often would be left alone for 2 s at least
WATCHED_S = 1.0  # how long a process without descriptors is watched
CPU_SHARE = 0.5  # of one processor, at most, while it waits for descriptors
GENERAL_FAILURE = 1  # SOCKS5's reply


def statistics(process: Process, of: str = "") -> dict[str, Any]:
    """The daemon's own figures, asked for now; ``of`` begins the line of the worker that is meant."""
    seen = len(process.lines)
    process.send_signal(signal.SIGUSR1)
    found: dict[str, Any] = json.loads(process.wait_for_line(rf"{of}statistics: (\{{.*)", since=seen).group(1))
    return found


def check_recovery(made_s: float) -> None:
    """It works again, and not long after there was room."""
    took_s = time.monotonic() - made_s
    print(f"served {took_s:.2f} s after there was room")
    assert took_s < RECOVERY_S


class Descriptors:
    """The limit of a running process's open files."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    def leave(self, count: int) -> None:
        """Let the process open so many files more."""
        used = {int(path.name) for path in Path(f"/proc/{self._pid}/fd").iterdir()}
        limit = 0
        while count or limit in used:
            count -= limit not in used
            limit += 1
        resource.prlimit(self._pid, resource.RLIMIT_NOFILE, (limit, self._before[1]))

    def make_room(self) -> None:
        resource.prlimit(self._pid, resource.RLIMIT_NOFILE, self._before)


def watch_cpu_and_echo(pid: int, *socks: socket.socket) -> float:
    """Use connections for a while; give the share of a processor that the process took."""
    started_s, before_s = time.monotonic(), cpu_seconds(pid)
    while time.monotonic() - started_s < WATCHED_S:
        for sock in socks:
            echo(sock)
        time.sleep(0.1)
    share = (cpu_seconds(pid) - before_s) / (time.monotonic() - started_s)
    print(f"without descriptors: {share:.1%} of a processor")
    return share


def test_a_server_without_descriptors_pauses_accepting_and_goes_on_with_the_rest(tmp_path: Path) -> None:
    with (
        EchoServer() as target,
        make_pair(tmp_path) as pair,
        socks_connect(pair.socks_port, "127.0.0.1", target.port) as running,
        ThreadPoolExecutor() as threads,
    ):
        echo(running)
        descriptors = Descriptors(pair.inbound.pid)
        descriptors.leave(0)
        second = tmp_path / "second"
        second.mkdir()
        with start_outbound(second, pair.keys, pair.inbound_port) as other:
            port = other.wait_ready()[0][1]
            waiting = threads.submit(socks_connect, port, "127.0.0.1", target.port)
            pair.inbound.wait_for_line("cannot accept on .*: Too many open files; pausing")
            assert watch_cpu_and_echo(pair.inbound.pid, running) < CPU_SHARE
            for host in ("127.0.0.1", "localhost"):
                with pytest.raises(SocksReplyError) as caught:
                    socks_connect(pair.socks_port, host, target.port)
                assert caught.value.status == GENERAL_FAILURE  # the name is not at fault
            assert sum("; pausing" in line for line in pair.inbound.lines) == 1
            assert not waiting.done()
            assert statistics(pair.inbound)["counters"]["accept_pauses"] >= 2
            made_s = time.monotonic()
            descriptors.make_room()
            with waiting.result(BOUND_S) as served:
                check_recovery(made_s)
                echo(served)
            with socks_connect(pair.socks_port, "localhost", target.port) as sock:
                echo(sock)
            echo(running)


def test_a_client_without_descriptors_pauses_accepting_and_goes_on_with_the_rest(tmp_path: Path) -> None:
    with (
        EchoServer() as target,
        make_pair(tmp_path) as pair,
        socks_connect(pair.socks_port, "127.0.0.1", target.port) as running,
        ThreadPoolExecutor() as threads,
    ):
        echo(running)
        descriptors = Descriptors(pair.outbound.pid)
        descriptors.leave(0)
        waiting = threads.submit(socks_connect, pair.socks_port, "127.0.0.1", target.port)
        pair.outbound.wait_for_line("cannot accept on .*: Too many open files; pausing")
        assert watch_cpu_and_echo(pair.outbound.pid, running) < CPU_SHARE
        assert not waiting.done()
        made_s = time.monotonic()
        descriptors.make_room()
        with waiting.result(BOUND_S) as served:
            check_recovery(made_s)
            echo(served)
        echo(running)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_client_without_a_descriptor_for_a_tunnel_says_so_and_recovers_at_once(tmp_path: Path, host: str) -> None:
    keys = Keys.generate()
    with EchoServer() as target, start_inbound(tmp_path, keys) as server:
        servers = {"servers": [{"address": f"{host}:{server.wait_ready()[0][1]}"}]}
        with start_outbound(tmp_path, keys, 1, servers) as client:
            port = client.wait_ready()[0][1]
            descriptors = Descriptors(client.pid)
            descriptors.leave(1)  # for the application's connection
            for _ in range(6):  # a server that fails so often would be left alone for 2 to 4 s
                with pytest.raises(SocksReplyError) as caught:
                    socks_connect(port, "127.0.0.1", target.port)
                assert caught.value.status == GENERAL_FAILURE
            client.wait_for_line("WARNING .*cannot connect to the server: .*: Too many open files")
            made_s = time.monotonic()
            descriptors.make_room()
            with socks_connect(port, "127.0.0.1", target.port) as sock:
                check_recovery(made_s)
                echo(sock)


# One of two workers is out.


def greet(port: int, keys: Keys) -> socket.socket:
    """A connection that has sent a user's hello, and reads no answer yet."""
    sock = socket.create_connection(("127.0.0.1", port), BOUND_S)
    sock.sendall(hello_bytes(keys))
    return sock


def answered(socks: Sequence[socket.socket]) -> int:
    """How many of them something has come for."""
    return len(select.select(socks, [], [], 0)[0])


def test_a_worker_without_descriptors_pauses_accepting_and_the_other_one_serves(tmp_path: Path) -> None:
    count = 24  # enough that the kernel gives some to either worker
    with (
        EchoServer() as target,
        make_pair(tmp_path, inbound={"workers": 2}) as pair,
        socks_connect(pair.socks_port, "127.0.0.1", target.port) as running,
        contextlib.ExitStack() as stack,
    ):
        echo(running)
        parent = pair.inbound.pid
        workers = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        tunnels = [statistics(pair.inbound, f"worker {each}: ")["gauges"]["tunnels"] for each in (1, 2)]
        assert sorted(tunnels) == [0, 1]
        number = tunnels.index(1) + 1  # the one that has something to lose
        worker = int(workers[number - 1])
        descriptors = Descriptors(worker)
        descriptors.leave(0)
        socks = [stack.enter_context(greet(pair.inbound_port, pair.keys)) for _ in range(count)]
        pair.inbound.wait_for_line(rf"worker {number}: cannot accept on .*: Too many open files; pausing")
        other = f"worker {3 - number}: "
        assert eventually(lambda: statistics(pair.inbound, other)["counters"]["handshakes_completed"] > 0)
        assert watch_cpu_and_echo(worker, running) < CPU_SHARE
        served = statistics(pair.inbound, other)["counters"]["handshakes_completed"]
        assert eventually(lambda: answered(socks) == served)
        assert 0 < served < count
        figures = statistics(pair.inbound, f"worker {number}: ")
        assert figures["counters"]["accept_pauses"] >= 2
        assert figures["gauges"]["tunnels"] == 1
        assert sum("; pausing" in line for line in pair.inbound.lines) == 1
        print(f"{served} of {count} served by the other worker meanwhile")
        made_s = time.monotonic()
        descriptors.make_room()
        for sock in socks:
            receive_exactly(sock, SERVER_HELLO_SIZE)
        check_recovery(made_s)
        echo(running)
        assert Path(f"/proc/{parent}/task/{parent}/children").read_text().split() == workers  # none was replaced


# The last descriptor goes to a stranger, and there is none for the fallback.

STRANGERS = {
    "http": b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "tls": tls_hello(),
    "a failed hello": b"\x00" + secrets.token_bytes(75),
    "a part of one": b"\x00" + secrets.token_bytes(37),
}


def test_where_the_fallback_cannot_be_dialled_strangers_are_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    count = 100
    with (
        EchoServer() as target,
        EchoServer() as web,
        make_pair(tmp_path, inbound={"fallback": web.address}) as pair,
        socks_connect(pair.socks_port, "127.0.0.1", target.port) as running,
        socket.create_connection(("127.0.0.1", pair.inbound_port), BOUND_S) as browser,
    ):
        echo(running)
        echo(browser)
        pid = pair.inbound.pid
        descriptors = Descriptors(pid)
        descriptors.leave(1)
        # As where the web server's machine refuses: the same for whoever is no user.
        for name, said in STRANGERS.items():
            assert converse(pair.inbound_port, [said]) == Answer(b"", "RST"), name
        pair.inbound.wait_for_line("WARNING .*fallback .*: Too many open files")
        # Many at once, who say nothing: one has the last descriptor, the others wait, and none costs anything.
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(socket.create_connection(("127.0.0.1", pair.inbound_port), BOUND_S))
            pair.inbound.wait_for_line("cannot accept on .*: Too many open files; pausing")
            assert watch_cpu_and_echo(pid, running, browser) < CPU_SHARE
        made_s = time.monotonic()
        descriptors.make_room()
        with socket.create_connection(("127.0.0.1", pair.inbound_port), BOUND_S) as another:
            echo(another)
            check_recovery(made_s)
        with socks_connect(pair.socks_port, "127.0.0.1", target.port) as sock:
            echo(sock)
        echo(running)
        echo(browser)
        figures = statistics(pair.inbound)
        assert figures["counters"]["handshakes_completed"] == 1
        assert figures["counters"]["tunnels_lost"] == 0
        assert not [line for line in pair.inbound.lines if "Traceback" in line or "internal error" in line]
