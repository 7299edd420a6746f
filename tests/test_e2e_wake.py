"""The pair when the machine sleeps, the network goes, or a clock is set: new requests work again at once.

Most short forms run with a keepalive of 2 s, a grace of 1 s and a shorter patience of the vigil, by a
prelude in both halves; the first one and the long ones with the real figures.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.chaos import ChaosRelay
from tests.processes import (
    HELLO,
    EchoServer,
    Keys,
    LoopbackServer,
    Origin,
    Process,
    Settings,
    SocksReplyError,
    hello_through,
    receive_exactly,
    socks_connect,
    start_inbound,
    start_outbound,
)
from tests.transfers import HEAD, TransferTarget, content

AGAIN_S = 5.0  # a new request works so soon
HANDSHAKE_TIMEOUT_S = 2
LOWERED_VIGIL = (
    "import reflex.net.vigil as vigil; vigil.QUIET_S = vigil.ANSWER_MIN_S = 0.3; vigil.ANSWER_UNKNOWN_S = 0.5"
)
LOWERED = (
    "import reflex.protocol.wire as wire; wire.KEEPALIVE_S = 2; wire.KEEPALIVE_GRACE_S = 1;"
    "import reflex.net.clock as clock; clock.WAKE_S = 1;" + LOWERED_VIGIL
)
LOWERED_S = 3  # silence after which a peer is dead
REAL_S = 40
QUICK: Settings = {"limits": {"idle_timeout_s": 4}}  # ticks of a second: what a keepalive of 2 s needs
LOST = "no sign of life from the peer"
GENERAL_FAILURE = 1  # SOCKS5's reply


@dataclass
class Ground:
    """Both halves with a relay between them, and one tunnel that was used and is idle."""

    inbound: Process
    outbound: Process
    relay: ChaosRelay
    origin: Origin

    @property
    def socks_port(self) -> int:
        return self.outbound.wait_ready()[0][1]

    def works_within(self, seconds: float) -> None:
        """A new request is served, and so soon."""
        begun_s = time.monotonic()
        assert hello_through(self.socks_port, self.origin) == HELLO
        took_s = time.monotonic() - begun_s
        assert took_s < seconds, f"served only after {took_s:.1f} s"


@contextlib.contextmanager
def ground(directory: Path, *, prelude: str = LOWERED, settings: Settings = QUICK) -> Iterator[Ground]:
    keys = Keys.generate()
    with (
        Origin() as origin,
        start_inbound(directory, keys, settings, prelude=prelude) as inbound,
        ChaosRelay(inbound.wait_ready()[0][1]) as relay,
        start_outbound(directory, keys, relay.port, settings, prelude=prelude) as outbound,
    ):
        it = Ground(inbound, outbound, relay, origin)
        it.works_within(AGAIN_S)
        yield it


# The path dies.


def test_a_request_is_served_by_a_fresh_tunnel_where_the_path_of_the_old_one_died(tmp_path: Path) -> None:
    with ground(tmp_path, prelude="", settings={}) as it:
        it.relay.bury()
        it.works_within(AGAIN_S)
        it.outbound.wait_for_line("does not answer: new streams go elsewhere")
        it.works_within(0.95)  # at once: the dead one is not asked again, which takes 1 s
        assert not [line for line in it.outbound.lines if LOST in line]  # long before the keepalive finds it


def dead_tunnels_are_found(directory: Path, *, after_s: float, prelude: str, settings: Settings) -> None:
    with ground(directory, prelude=prelude, settings=settings) as it:
        with socks_connect(it.socks_port, "127.0.0.1", it.origin.port) as sock:
            sock.settimeout(after_s + 5)
            it.relay.bury()
            begun_s = time.monotonic()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            found_s = time.monotonic() - begun_s
        # What the peer said last may be a little older than the burial.
        assert after_s / 4 < found_s < after_s + 4
        for half in (it.outbound, it.inbound):
            half.wait_for_line(LOST)
        it.works_within(AGAIN_S)


def test_dead_tunnels_are_found_in_time(tmp_path: Path) -> None:
    dead_tunnels_are_found(tmp_path, after_s=LOWERED_S, prelude=LOWERED, settings=QUICK)


@pytest.mark.soak
def test_dead_tunnels_are_found_within_keepalive_and_10_s(tmp_path: Path) -> None:
    dead_tunnels_are_found(tmp_path, after_s=REAL_S, prelude="", settings={})


def test_a_forward_that_has_sent_bytes_waits_and_is_never_served_twice(tmp_path: Path) -> None:
    with EchoServer() as server:
        keys = Keys.generate()
        doors = {
            "listen": [
                {"protocol": "forward", "address": "127.0.0.1:0", "target": server.address},
                {"protocol": "socks5", "address": "127.0.0.1:0"},
            ],
            "limits": {"idle_timeout_s": 30},
        }
        with (
            start_inbound(tmp_path, keys) as inbound,
            ChaosRelay(inbound.wait_ready()[0][1]) as relay,
            start_outbound(tmp_path, keys, relay.port, doors, prelude=LOWERED_VIGIL) as outbound,
        ):
            address = outbound.wait_ready()[0]
            with socket.create_connection(address, 20) as warm:
                warm.sendall(b"x")
                assert receive_exactly(warm, 1) == b"x"
            relay.freeze()
            with socket.create_connection(address, 20) as sender, socket.create_connection(address, 20) as silent:
                sender.sendall(b"once")
                outbound.wait_for_line("does not answer: new streams go elsewhere")
                silent.sendall(b"later")
                connections = server.connections
                relay.thaw()
                assert receive_exactly(sender, 4) == b"once"
                assert receive_exactly(silent, 5) == b"later"
                outbound.wait_for_line("> answers")
            # The silent one's OPEN may have reached the server on the old tunnel too, the sender's once.
            assert 2 <= server.connections - connections <= 3


# The network is gone, and comes back.


def the_network_comes_back(directory: Path, *, gone_s: float, prelude: str, settings: Settings) -> None:
    with ground(directory, prelude=prelude, settings=settings) as it:
        it.relay.freeze()
        begun_s = time.monotonic()
        asked = 0
        while time.monotonic() - begun_s < gone_s:
            asked += 1
            with pytest.raises(OSError, match=r"SOCKS5 reply 1|timed out"):
                socks_connect(it.socks_port, "127.0.0.1", it.origin.port, timeout_s=max(1.0, gone_s / 4))
        assert asked
        it.relay.thaw()
        it.works_within(AGAIN_S)
        it.works_within(AGAIN_S)


def test_after_the_network_was_gone_a_new_request_works_within_5_s(tmp_path: Path) -> None:
    limits = {"limits": {"idle_timeout_s": 4, "handshake_timeout_s": HANDSHAKE_TIMEOUT_S}}
    the_network_comes_back(tmp_path, gone_s=2.5, prelude=LOWERED, settings=limits)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_after_ten_minutes_without_network_a_new_request_works_within_5_s(tmp_path: Path) -> None:
    the_network_comes_back(tmp_path, gone_s=600, prelude="", settings={})


def test_a_transfer_outlives_a_path_that_is_gone_for_less_than_the_keepalive(tmp_path: Path) -> None:
    size = 3_000_000
    with (
        ground(tmp_path, prelude=LOWERED_VIGIL, settings={}) as it,
        TransferTarget() as target,
        socks_connect(it.socks_port, "127.0.0.1", target.port) as sock,
    ):
        sock.sendall(HEAD.pack(b"d", 7, size))
        first = receive_exactly(sock, 100_000)
        it.relay.freeze()
        with pytest.raises(TimeoutError):
            socks_connect(it.socks_port, "127.0.0.1", target.port, timeout_s=1)
        it.relay.thaw()
        assert first + receive_exactly(sock, size - len(first)) == content(7, size)
        assert sock.recv(1) == b""


# The machine sleeps.


def the_machine_sleeps(directory: Path, *, asleep_s: float, prelude: str, settings: Settings) -> None:
    """The client's process is stopped, and meanwhile all its connections die without a word."""
    with ground(directory, prelude=prelude, settings=settings) as it:
        it.outbound.send_signal(signal.SIGSTOP)
        it.relay.bury()
        time.sleep(asleep_s)
        it.outbound.send_signal(signal.SIGCONT)
        it.works_within(AGAIN_S)
        it.outbound.wait_for_line("s are missing, by the clock: every tunnel is asked")


def test_after_a_sleep_a_new_request_works_within_5_s(tmp_path: Path) -> None:
    # Shorter than the keepalive: nothing but the sleep itself tells that the tunnel is dead.
    the_machine_sleeps(tmp_path, asleep_s=2.2, prelude=LOWERED, settings=QUICK)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("asleep_s", [20, 600])
def test_after_a_real_sleep_a_new_request_works_within_5_s(tmp_path: Path, asleep_s: float) -> None:
    the_machine_sleeps(tmp_path, asleep_s=asleep_s, prelude="", settings={})


def test_while_the_server_sleeps_requests_wait_or_fail_and_what_ran_goes_on(tmp_path: Path) -> None:
    size = 40_000_000  # more than windows and sockets hold on the client's side
    with (
        ground(tmp_path, prelude=LOWERED_VIGIL, settings={}) as it,
        TransferTarget() as target,
        socks_connect(it.socks_port, "127.0.0.1", target.port) as sock,
        ThreadPoolExecutor(1) as threads,
    ):
        sock.sendall(HEAD.pack(b"d", 7, size))
        first = receive_exactly(sock, 100_000)
        it.inbound.send_signal(signal.SIGSTOP)
        waiting = threads.submit(hello_through, it.socks_port, it.origin)
        with pytest.raises(OSError, match=r"SOCKS5 reply 1|timed out"):
            socks_connect(it.socks_port, "127.0.0.1", target.port, timeout_s=2)
        it.inbound.send_signal(signal.SIGCONT)
        it.works_within(AGAIN_S)
        failure = waiting.exception()
        if failure is None:
            assert waiting.result() == HELLO
        else:
            assert isinstance(failure, SocksReplyError)
            assert failure.status == GENERAL_FAILURE
        assert first + receive_exactly(sock, size - len(first)) == content(7, size)
        assert sock.recv(1) == b""
        it.works_within(AGAIN_S)


# A clock is set.


def settable_clock(path: Path) -> str:
    """Python that makes a process's wall clock show what it is told by a file: so many seconds more."""
    return (
        "import time, pathlib\n"
        "_true_time = time.time\n"
        f"_path = pathlib.Path({str(path)!r})\n"
        "time.time = lambda: _true_time() + (float(_path.read_text()) if _path.exists() else 0)"
    )


class DateServer(LoopbackServer):
    """The least of a web server, on the server's machine: it shows that machine's time."""

    ahead_s = 0.0

    def serve(self, sock: socket.socket) -> None:
        sock.recv(65_536)
        date = formatdate(time.time() + self.ahead_s, usegmt=True)
        sock.sendall(f"HTTP/1.1 400 Bad Request\r\nDate: {date}\r\n\r\n".encode())


@pytest.mark.parametrize("jump_s", [-3600, pytest.param(3600, marks=pytest.mark.soak)])
def test_when_the_clients_clock_jumps_new_tunnels_are_made_as_before(tmp_path: Path, jump_s: int) -> None:
    clock = tmp_path / "jump"
    keys = Keys.generate()
    with (
        Origin() as origin,
        start_inbound(tmp_path, keys) as inbound,
        ChaosRelay(inbound.wait_ready()[0][1]) as relay,
        start_outbound(tmp_path, keys, relay.port, prelude=LOWERED_VIGIL + "\n" + settable_clock(clock)) as outbound,
    ):
        it = Ground(inbound, outbound, relay, origin)
        it.works_within(AGAIN_S)
        clock.write_text(str(jump_s))
        relay.bury()  # there is no fallback: only what was learnt can help
        it.works_within(AGAIN_S)
        outbound.wait_for_line(f"this machine's clock is 3600 s {'ahead of' if jump_s > 0 else 'behind'} the server's")
        assert not [line for line in inbound.lines if "hello refused" in line]
        if jump_s > 0:
            outbound.wait_for_line("s are missing, by the clock")


def test_when_the_servers_clock_jumps_a_client_recovers_by_the_fallbacks_date(tmp_path: Path) -> None:
    clock = tmp_path / "jump"
    keys = Keys.generate()
    with (
        Origin() as origin,
        DateServer() as web,
        start_inbound(tmp_path, keys, {"fallback": web.address}, prelude=settable_clock(clock)) as inbound,
        ChaosRelay(inbound.wait_ready()[0][1]) as relay,
        start_outbound(tmp_path, keys, relay.port, prelude=LOWERED_VIGIL) as outbound,
    ):
        it = Ground(inbound, outbound, relay, origin)
        it.works_within(AGAIN_S)
        web.ahead_s = 3600
        clock.write_text("3600")
        relay.bury()
        it.works_within(AGAIN_S)
        outbound.wait_for_line(r"this machine's clock is 3\d\d\d s behind the server's")
