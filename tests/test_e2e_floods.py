"""Floods at both halves' doors, as processes: streams that are there go on, limits hold, and users get in.

What a flood costs a stream is seen by turns: quiet, flooded, quiet, flooded, and so on within one run; what counts
are the medians. The generator (tests/junk.py) and all else share the machine's processors, so a stream is given a
fixed load that it must keep, far below what the pair can do.

A machine that is busy with something else can fail any such comparison. So the short forms try again, with a smaller
flood each time, and one success is enough: a server that cannot stand the flood fails each time. The long ones take
more turns instead. Figures are told with ``pytest -rP``.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import pytest

from reflex.protocol.wire import SERVER_HELLO_SIZE
from tests.distributions import quantile
from tests.processes import (
    EchoServer,
    Keys,
    LoopbackServer,
    Pair,
    Process,
    cpu_seconds,
    eventually,
    hello_bytes,
    make_pair,
    receive_exactly,
    socks_connect,
    start_inbound,
    start_outbound,
)
from tests.webserver import running_nginx

KEPT_SHARE: Final = 0.8  # of a stream's goodput
WEB_PATIENCE_S: Final = 60
# The short forms run among other tests: they find what stalls, the long ones what doubles.
SHORT_GRACE_S: Final = 0.2
MBIT: Final = 1e6 / 8


def statistics(process: Process) -> dict[str, Any]:
    """The daemon's own figures, asked for now."""
    since = len(process.lines)
    process.send_signal(signal.SIGUSR1)
    found: dict[str, Any] = json.loads(process.wait_for_line(r"statistics: (\{.*\})", since=since).group(1))
    return found


@contextlib.contextmanager
def junk(port: int, rate: int, seconds: float, *options: str) -> Iterator[Process]:
    """The flood, running."""
    command = [sys.executable, "-m", "tests.junk", str(port), str(rate), str(seconds), *options]
    with Process("junk", command) as process:
        yield process


@dataclass(frozen=True)
class Made:
    """What came of a flood."""

    made: int
    attempted: int
    seconds: float  # that it took to begin them


def made(process: Process, *, timeout_s: float) -> Made:
    """What the flood made; waits for the last."""
    found = process.wait_for_line(r"junk: made (\d+), attempted (\d+), seconds ([\d.]+)", timeout_s=timeout_s)
    return Made(int(found.group(1)), int(found.group(2)), float(found.group(3)))


@contextlib.contextmanager
def pair_before(directory: Path, behind: str, **inbound: object) -> Iterator[tuple[Pair, int]]:
    """Both halves, and the port of an nginx: the server's fallback, or (behind "nothing") only there."""
    (directory / "nginx").mkdir()
    with running_nginx(directory / "nginx", patience_s=WEB_PATIENCE_S, connections=7_000) as (_, nginx_port):
        overrides = dict(inbound)
        if behind == "nginx":
            overrides["fallback"] = f"127.0.0.1:{nginx_port}"
        # One tunnel, and no spare beside bulk data: what else comes to the server is counted.
        with make_pair(directory, inbound=overrides, outbound={"pool": {"max_tunnels": 1}}) as pair:
            yield pair, nginx_port


# 5,000 strangers a second.


class Feed(LoopbackServer):
    """Sends at a fixed rate for as long as it is read."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        block = bytes(65_536)
        begun_s, sent = time.monotonic(), 0
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(block)
                sent += len(block)
                ahead_s = sent / self._bytes_per_s - (time.monotonic() - begun_s)
                if ahead_s > 0:
                    time.sleep(ahead_s)


class Counted:
    """A stream that is read to its end, and how much of it has come."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.size = 0
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        buffer = bytearray(262_144)
        with contextlib.suppress(OSError):
            while size := self._sock.recv_into(buffer):
                self.size += size

    def goodput(self, seconds: float) -> float:
        """Bytes a second, for so long from now on."""
        before, begun_s = self.size, time.monotonic()
        time.sleep(seconds)
        return (self.size - before) / (time.monotonic() - begun_s)

    def end(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()


def check_goodput(
    directory: Path, *, behind: str, rates: Sequence[int], seconds: float, stream_mbit: float, options: Sequence[str]
) -> None:
    """Quiet and flooded turns, one for each of ``rates``, each turn ``seconds`` long.

    The same rate all the time: the medians decide. Different ones: one that is stood is enough.
    """
    goodput: dict[str, list[float]] = {"quiet": [], "flooded": []}
    with pair_before(directory, behind) as (pair, _), Feed(stream_mbit * MBIT) as feed:
        stream = Counted(socks_connect(pair.socks_port, "127.0.0.1", feed.port))
        pid = pair.inbound.pid
        begun, accepted = 0, 1  # the client's tunnel
        try:
            for rate in rates:
                goodput["quiet"].append(stream.goodput(seconds) / MBIT)
                before_s = cpu_seconds(pid)
                with junk(pair.inbound_port, rate, seconds, *options) as flood:
                    goodput["flooded"].append(stream.goodput(seconds) / MBIT)
                    share = (cpu_seconds(pid) - before_s) / seconds
                    result = made(flood, timeout_s=seconds + 60)
                # Behind all of them: what the kernel has kept of the flood is accepted before this user.
                get_in(pair)
                before, accepted = accepted, statistics(pair.inbound)["counters"]["connections_accepted"]
                begun += result.attempted
                print(
                    f"{result.attempted / result.seconds:.0f} strangers a second attempted,"
                    f" {(accepted - before - 1) / result.seconds:.0f} accepted;"
                    f" the stream: {goodput['quiet'][-1]:.1f} Mbit/s before, {goodput['flooded'][-1]:.1f} during;"
                    f" the server: {share:.0%} of a processor"
                )
                if len(set(rates)) > 1 and goodput["flooded"][-1] >= KEPT_SHARE * goodput["quiet"][-1]:
                    break
            else:
                quiet, flooded = (median(goodput[each]) for each in ("quiet", "flooded"))
                print(f"medians of {len(rates)} turns: {quiet:.1f} Mbit/s quiet, {flooded:.1f} flooded")
                assert flooded >= KEPT_SHARE * quiet, goodput
        finally:
            stream.end()
        counters = statistics(pair.inbound)["counters"]
        # They did come, and were not let in.
        assert counters["handshakes_failed"] + counters["hellos_not_tried"] >= begun / 4
        assert counters["handshakes_completed"] == 1 + len(goodput["flooded"])
        assert statistics(pair.inbound)["gauges"]["tunnels"] >= 1
        if "--one-address" in options:
            assert counters["hellos_not_tried"] > 3 * counters["handshakes_failed"]
        else:
            assert counters["hellos_not_tried"] == 0


def get_in(pair: Pair) -> None:
    """A user's hello, and the answer."""
    with socket.create_connection(("127.0.0.1", pair.inbound_port), 60) as sock:
        sock.sendall(hello_bytes(pair.keys))
        receive_exactly(sock, SERVER_HELLO_SIZE)


def test_a_stream_keeps_its_goodput_beside_strangers(tmp_path: Path) -> None:
    check_goodput(tmp_path, behind="nginx", rates=[1_000, 500, 250], seconds=1, stream_mbit=50, options=[])


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [[], ["--one-address"]], ids=["many addresses", "one address"])
@pytest.mark.parametrize("behind", ["nothing", "nginx"])
def test_a_stream_keeps_its_goodput_beside_5000_strangers_a_second(
    tmp_path: Path, behind: str, options: list[str]
) -> None:
    check_goodput(tmp_path, behind=behind, rates=[5_000] * 3, seconds=20, stream_mbit=200, options=options)


# Those who never finish.


def round_trips_s(sock: socket.socket, count: int) -> list[float]:
    """How long so many requests of 100 bytes took, one after the other."""
    found = []
    request = bytes(100)
    for _ in range(count):
        begun_s = time.perf_counter()
        sock.sendall(request)
        receive_exactly(sock, len(request))
        found.append(time.perf_counter() - begun_s)
    return found


@dataclass
class Percentiles:
    """99th percentiles of a stream's round trips, by turns: quiet, beside strangers, quiet, and so on."""

    sock: socket.socket
    requests: int  # of a turn
    quiet_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)

    def take(self, found_s: list[float]) -> None:
        found_s.append(quantile(round_trips_s(self.sock, self.requests), 0.99))

    def is_kept(self, *, grace_s: float) -> bool:
        """At most twice that of the quiet turns, or so little above it as the machine's own noise; medians."""
        quiet_s, beside_s = median(self.quiet_s), median(self.beside_s)
        for name, each in (("quiet", self.quiet_s), ("beside strangers", self.beside_s)):
            print(f"99th percentiles, {name}, us: {[round(value * 1e6) for value in each]}")
        print(f"medians: {quiet_s * 1e6:.0f} us quiet, {beside_s * 1e6:.0f} us beside them")
        return beside_s <= 2 * quiet_s + grace_s


def one_is_stood(directory: Path, is_stood: Callable[[Path, int], bool]) -> bool:
    """A short form: floods of so many, in a directory of its own each, until one is stood."""
    for count in (500, 250, 125):
        own = directory / str(count)
        own.mkdir()
        if is_stood(own, count):
            return True
    return False


def check_unfinished_hellos(
    directory: Path, *, behind: str, strangers: int, requests: int, turns: int, grace_s: float
) -> bool:
    """Whether the round trips were kept; all else is asserted."""
    limit = strangers * 3 // 5
    displaced = strangers + 1 - limit
    with (
        EchoServer() as echo,
        pair_before(directory, behind, limits={"max_connections": limit, "handshake_timeout_s": 600}) as (pair, _),
        socks_connect(pair.socks_port, "127.0.0.1", echo.port) as sock,
    ):
        percentiles = Percentiles(sock, requests)
        for turn in range(1, turns + 1):
            percentiles.take(percentiles.quiet_s)
            # Not faster than they can be accepted on a busy machine: it is their number that counts.
            with junk(pair.inbound_port, 500, strangers / 500, "--hold") as flood:
                assert made(flood, timeout_s=60).made == strangers
                accepted = turn * strangers + 1
                assert eventually(
                    lambda: statistics(pair.inbound)["counters"]["connections_accepted"] == accepted  # noqa: B023
                )
                percentiles.take(percentiles.beside_s)
                figures = statistics(pair.inbound)
                assert figures["gauges"]["greetings"] + figures["gauges"]["tunnels"] == limit
                assert figures["counters"]["connections_displaced"] == turn * displaced
                if turn == turns:
                    # Who has the keys gets in all the same, and what was there is still there.
                    with start_outbound(directory, pair.keys, pair.inbound_port) as another:
                        port = another.wait_ready()[0][1]
                        with socks_connect(port, "127.0.0.1", echo.port) as second:
                            round_trips_s(second, 10)
                    round_trips_s(sock, 10)
                    figures = statistics(pair.inbound)["counters"]
                    assert (figures["handshakes_completed"], figures["connections_refused"]) == (2, 0)
            assert eventually(lambda: statistics(pair.inbound)["gauges"]["greetings"] == 0, within_s=30)
        return percentiles.is_kept(grace_s=grace_s)


def test_hellos_that_are_never_finished_take_no_users_place(tmp_path: Path) -> None:
    assert one_is_stood(
        tmp_path,
        lambda directory, strangers: check_unfinished_hellos(
            directory, behind="nginx", strangers=strangers, requests=300, turns=2, grace_s=SHORT_GRACE_S
        ),
    )


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("behind", ["nothing", "nginx"])
def test_5000_hellos_that_are_never_finished_take_no_users_place(tmp_path: Path, behind: str) -> None:
    assert check_unfinished_hellos(tmp_path, behind=behind, strangers=5_000, requests=5_000, turns=5, grace_s=0.0)


def test_hellos_that_are_never_finished_are_let_go_in_time(tmp_path: Path) -> None:
    keys = Keys.generate()
    prelude = "import reflex.net.greeting as g; g.SILENCE_MAX_MS = 500"
    with start_inbound(tmp_path, keys, {"limits": {"handshake_timeout_s": 1}}, prelude=prelude) as inbound:
        port = inbound.wait_ready()[0][1]
        with junk(port, 500, 1, "--hold") as flood:
            assert made(flood, timeout_s=30).made == 500
            assert eventually(lambda: statistics(inbound)["counters"]["connections_accepted"] == 500)
            assert eventually(lambda: statistics(inbound)["gauges"]["greetings"] == 0)
        assert all(pool["in_use"] == 0 for pool in statistics(inbound)["pools"].values())


def check_unfinished_socks(
    directory: Path, *, visitors: int, requests: int, turns: int, timeout_s: float, grace_s: float
) -> bool:
    """Whether the round trips were kept; all else is asserted."""
    limit = visitors * 3 // 5
    limits = {"max_connections": limit, "handshake_timeout_s": timeout_s}
    with (
        EchoServer() as echo,
        make_pair(directory, outbound={"limits": limits}) as pair,
        socks_connect(pair.socks_port, "127.0.0.1", echo.port) as sock,
    ):
        percentiles = Percentiles(sock, requests)

        def counted() -> tuple[int, int]:
            counters = statistics(pair.outbound)["counters"]
            return counters["connections_accepted"], counters["connections_refused"]

        for turn in range(1, turns + 1):
            percentiles.take(percentiles.quiet_s)
            with contextlib.ExitStack() as stack:
                for number in range(visitors):
                    visitor = stack.enter_context(socket.create_connection(("127.0.0.1", pair.socks_port), 20))
                    # At any point of the conversation: nothing, a version, half a list of methods.
                    with contextlib.suppress(ConnectionError):  # refused already
                        visitor.sendall(b"\x05\x02\x00"[: number % 4])
                expected = (turn * (limit - 1) + 1, turn * (visitors + 1 - limit))
                assert eventually(lambda: sum(counted()) == sum(expected))  # noqa: B023
                assert counted() == expected
                percentiles.take(percentiles.beside_s)
                # They are let go while they still hold on.
                assert eventually(
                    lambda: statistics(pair.outbound)["gauges"]["connections"] == 1, within_s=timeout_s + 10
                )
        with socks_connect(pair.socks_port, "127.0.0.1", echo.port) as second:
            round_trips_s(second, 10)
        round_trips_s(sock, 10)
        return percentiles.is_kept(grace_s=grace_s)


def test_socks_requests_that_are_never_finished_are_bounded_and_let_go_in_time(tmp_path: Path) -> None:
    # They all come within the time-out, on a busy machine too.
    assert one_is_stood(
        tmp_path,
        lambda directory, visitors: check_unfinished_socks(
            directory, visitors=visitors, requests=300, turns=1, timeout_s=10, grace_s=SHORT_GRACE_S
        ),
    )


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_5000_socks_requests_that_are_never_finished_are_bounded(tmp_path: Path) -> None:
    assert check_unfinished_socks(tmp_path, visitors=5_000, requests=5_000, turns=3, timeout_s=20, grace_s=0.0)
