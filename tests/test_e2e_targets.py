"""What the server dials and what it does not, as real processes: addresses, names, resolvers, silent targets."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ends import NO_SUCH_NAME
from tests.processes import (
    EchoServer,
    Keys,
    LoopbackServer,
    Process,
    Settings,
    SocksReplyError,
    eventually,
    receive_exactly,
    refusing_port,
    socks_connect,
    start_inbound,
    start_outbound,
)

BOUND_S = 20
AT_ONCE_S = 2.0  # for what waits for nothing, on a busy machine
GENERAL_FAILURE, NOT_ALLOWED, HOST_UNREACHABLE, REFUSED, TIMED_OUT = 1, 2, 4, 5, 6  # SOCKS5's replies
NO_RULES: Settings = {"targets": {"allow": None}}


@contextlib.contextmanager
def running(
    directory: Path, inbound: Settings, *, prelude: str = "", users: int = 1
) -> Iterator[tuple[Process, list[int]]]:
    """A server, and the SOCKS5 ports of so many clients, each with a user of its own."""
    keys = [Keys.generate() for _ in range(users)]
    entries = [{"name": f"user{n}", "id": each.user_id, "key": each.user_key} for n, each in enumerate(keys)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(start_inbound(directory, keys[0], {**inbound, "users": entries}, prelude=prelude))
        port = server.wait_ready()[0][1]
        ports = []
        for number, each in enumerate(keys):
            own = directory / f"client{number}"
            own.mkdir()
            both = Keys(keys[0].private_key, keys[0].public_key, each.user_id, each.user_key)
            client = stack.enter_context(start_outbound(own, both, port))
            ports.append(client.wait_ready()[0][1])
        yield server, ports


def status_of(socks_port: int, host: str, port: int) -> tuple[int, float]:
    """The reply to a request that fails, and how long it took."""
    started_s = time.monotonic()
    with pytest.raises(SocksReplyError) as caught:
        socks_connect(socks_port, host, port, timeout_s=BOUND_S).close()
    return caught.value.status, time.monotonic() - started_s


def statistics(process: Process) -> dict[str, Any]:
    seen = len(process.lines)
    process.send_signal(signal.SIGUSR1)
    found: dict[str, Any] = json.loads(process.wait_for_line(r"statistics: (\{.*)", since=seen).group(1))
    return found


def own_addresses() -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.77", 9))
        except OSError:
            return []
        return [probe.getsockname()[0]]


# Addresses.

FORBIDDEN = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "169.254.169.254",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "64:ff9b::127.0.0.1",
    "64:ff9b:1::10.0.0.1",
    "2002:7f00:1::",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "localhost",
    "LOCALHOST",
]


def test_without_rules_nothing_of_the_inner_network_is_dialled_and_time_tells_nothing(tmp_path: Path) -> None:
    with (
        running(tmp_path, NO_RULES) as (server, [socks]),
        socket.create_server(("0.0.0.0", 0)) as listener,
        refusing_port() as closed,
    ):
        listener.settimeout(0)
        port = listener.getsockname()[1]
        slowest = {}
        for host in [*FORBIDDEN, *own_addresses()]:
            for each in (port, closed):
                status, took_s = status_of(socks, host, each)
                assert status == NOT_ALLOWED, host
                slowest[host, each] = took_s
        assert max(slowest.values()) < AT_ONCE_S
        with pytest.raises(BlockingIOError):
            listener.accept()  # nobody was there: open, closed and absent look the same because none is asked
        # The server's own port as well: but for the clients' tunnel nobody connected to it.
        own_port = int(server.wait_for_line(r"ready: listening on \S+:(\d+)").group(1))
        assert status_of(socks, "127.0.0.1", own_port)[0] == NOT_ALLOWED
        assert statistics(server)["counters"]["connections_accepted"] == 1


# As if this machine's addresses were public ones.
PUBLIC_LOOPBACK = """
from reflex.net import targets
targets._V4_RANGES = tuple(each for each in targets._V4_RANGES if each[0] >> 24 != 127)
"""


def test_a_public_address_of_the_servers_own_machine_is_refused_until_a_rule_allows_it(tmp_path: Path) -> None:
    with EchoServer() as echo:
        with running(tmp_path, NO_RULES, prelude=PUBLIC_LOOPBACK) as (server, [socks]):
            for host in ("127.0.0.1", "127.0.0.2", "::ffff:127.0.0.1", "localhost"):
                assert status_of(socks, host, echo.port)[0] == NOT_ALLOWED
            own_port = int(server.wait_for_line(r"ready: listening on \S+:(\d+)").group(1))
            assert status_of(socks, "127.0.0.1", own_port)[0] == NOT_ALLOWED
            assert statistics(server)["counters"]["connections_accepted"] == 1
        allowed = tmp_path / "allowed"
        allowed.mkdir()
        rules: Settings = {"targets": {"allow": [f"127.0.0.1:{echo.port}"]}}
        with (
            running(allowed, rules, prelude=PUBLIC_LOOPBACK) as (_, [socks]),
            socks_connect(socks, "127.0.0.1", echo.port) as sock,
        ):
            sock.sendall(b"allowed")
            assert receive_exactly(sock, 7) == b"allowed"


# Names.

# `*.turn.example` is 127.0.0.2 at its first look-up and 127.0.0.1 from then on; `both.example` is both.
TURNING = """
import socket
_real, _asked = socket.getaddrinfo, set()
def _getaddrinfo(host, port, *rest, **more):
    if isinstance(host, str) or not host.endswith(b".example"):
        return _real(host, port, *rest, **more)
    ips = ["127.0.0.1"] if host in _asked else ["127.0.0.2"]
    _asked.add(host)
    if host == b"both.example":
        ips = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ips]
socket.getaddrinfo = _getaddrinfo
"""


class WhereTo(LoopbackServer):
    """Answers with the address at which it was reached."""

    def serve(self, sock: socket.socket) -> None:
        sock.sendall(sock.getsockname()[0].encode().ljust(15))


def reached(socks_port: int, host: str, port: int) -> str:
    with socks_connect(socks_port, host, port) as sock:
        return receive_exactly(sock, 15).decode().strip()


def test_the_address_that_was_judged_is_the_one_that_is_dialled(tmp_path: Path) -> None:
    rules: Settings = {"targets": {"allow": ["127.0.0.2:*"]}}
    with (
        WhereTo("0.0.0.0") as target,
        running(tmp_path, rules, prelude=TURNING) as (_, [socks]),
    ):
        for number in range(5):
            name = f"{number}.turn.example"
            assert reached(socks, name, target.port) == "127.0.0.2"
            assert status_of(socks, name, target.port)[0] == NOT_ALLOWED  # by its second address
        for _ in range(5):
            assert reached(socks, "both.example", target.port) == "127.0.0.2"


# `hang*` hangs, `late*` is answered after a second, `fail*` fails at once; others are the system's.
HANGING = """
import socket, time
_real = socket.getaddrinfo
def _getaddrinfo(host, port, *rest, **more):
    host = host if isinstance(host, bytes) else host.encode()
    if host.startswith(b"hang"):
        time.sleep(3600)
    if host.startswith(b"late"):
        time.sleep(1)
        host = b"localhost"
    if host.startswith(b"fail"):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return _real(host, port, *rest, **more)
socket.getaddrinfo = _getaddrinfo
"""


def test_names_that_hang_stop_nobody_else(tmp_path: Path) -> None:
    rules: Settings = {"targets": {"allow": ["127.0.0.1:*", "[::1]:*"]}, "limits": {"dial_timeout_s": 2}}
    with (
        EchoServer() as echo,
        running(tmp_path, rules, prelude=HANGING, users=2) as (server, [mallory, alice]),
        contextlib.ExitStack() as stack,
    ):
        answers: list[tuple[int, float]] = []

        def ask(number: int) -> None:
            answers.append(status_of(mallory, f"hang{number}", 80))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(150)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join, BOUND_S)
        assert eventually(lambda: statistics(server)["gauges"]["look_ups"] == 32, within_s=BOUND_S)
        for _ in range(10):
            started_s = time.monotonic()
            with socks_connect(alice, "localhost", echo.port) as sock:
                sock.sendall(b"alive")
                assert receive_exactly(sock, 5) == b"alive"
            assert time.monotonic() - started_s < AT_ONCE_S
        assert status_of(alice, "fail", 80)[0] == HOST_UNREACHABLE
        with socks_connect(alice, "late", echo.port) as sock:
            sock.sendall(b"late")
            assert receive_exactly(sock, 4) == b"late"
        for thread in threads:
            thread.join(BOUND_S)
        assert [status for status, _ in answers] == [TIMED_OUT] * 150
        assert min(took_s for _, took_s in answers) > 1.9
        gauges = statistics(server)["gauges"]
        assert gauges["look_ups"] <= 33  # the threads that hang; nobody waits for them any more
        assert gauges["look_ups_waiting"] == gauges["streams"] == 0
        # With half of the threads gone for good she is served all the same, and the server can be stopped.
        with socks_connect(alice, "localhost", echo.port) as sock:
            sock.sendall(b"still")
            assert receive_exactly(sock, 5) == b"still"
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout_s=BOUND_S) == 0


# Targets that do nothing, refuse, or reset.


class Resetting(LoopbackServer):
    """Resets at the first byte."""

    def serve(self, sock: socket.socket) -> None:
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


class Silent(LoopbackServer):
    """Says nothing, and reads to the end."""

    def serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(65_536):
                pass


@contextlib.contextmanager
def unanswering_port() -> Iterator[int]:
    """A port whose connections are never made: its listener's queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_targets_that_refuse_say_nothing_or_reset_are_told_as_promised(tmp_path: Path) -> None:
    limits: Settings = {"limits": {"dial_timeout_s": 1, "idle_timeout_s": 1}}
    with (
        running(tmp_path, limits) as (_, [socks]),
        refusing_port() as closed,
        unanswering_port() as unanswering,
        Resetting() as resetting,
        Silent() as silent,
    ):
        status, took_s = status_of(socks, "127.0.0.1", closed)
        assert status == REFUSED
        assert took_s < AT_ONCE_S
        status, took_s = status_of(socks, "127.0.0.1", unanswering)
        assert status == TIMED_OUT
        assert 1 <= took_s < 1 + AT_ONCE_S
        status, took_s = status_of(socks, NO_SUCH_NAME, 80)
        assert status == HOST_UNREACHABLE
        with socks_connect(socks, "127.0.0.1", resetting.port, timeout_s=BOUND_S) as sock:
            sock.sendall(b"x")
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        started_s = time.monotonic()
        with socks_connect(socks, "127.0.0.1", silent.port, timeout_s=BOUND_S) as sock:
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            assert 1 <= time.monotonic() - started_s < 1 + AT_ONCE_S
