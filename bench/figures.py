"""The figures that every system is measured by. Each starts the system fresh and returns plain numbers.

A figure is a function ``(system, seconds) -> {metric: number}``; the unit ends the metric's name.
"""

from __future__ import annotations

import resource
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.halves import LOOPBACK, Program, Running, free_port, wait_listening
from bench.loadtools import (
    FILE_BYTES,
    ToolFailed,
    bulk_server,
    iperf3_beside,
    parse_iperf3,
    run_iperf3,
    run_wrk,
    web_server,
)
from bench.systems import DIRECT, System

KIB: Final = 1024
MIB: Final = 1024 * KIB
BULK_STREAMS: Final = 8
BESIDE_CONNECTIONS: Final = 8  # of the small requests beside a bulk download
BESIDE_LEAD_S: Final = 0.5  # the download is up to speed before the small requests begin
NEW_CONNECTIONS: Final = 16
# From the first connection to the last that the issue asks for; the points are the picture's.
IDLE_STEPS: Final = (250, 500, 1000, 1500, 2000)
CHURN_CONNECTIONS: Final = 10_000
CHURN_AT_ONCE: Final = 100
STEP_SETTLE_S: Final = 0.3  # between the points of the picture
SETTLE_S: Final = 1.5  # longer than the timers by which the halves tidy up
ONE_WAY_MS: Final = 50.0
LINK_MBIT: Final = 1000.0  # a fast line at the other end of the world
# A slow start over 100 ms takes seconds; a run that is shorter measures nothing else.
DELAY_MIN_S: Final = 4.0
SOCKET_TIMEOUT_S: Final = 5.0
MAX_STALLED: Final = 5  # of thousands; v2ray has one now and then
REQUEST: Final = b"GET /f HTTP/1.1\r\nHost: localhost\r\n\r\n"
DESCRIPTORS: Final = 16_384  # 2,000 connections are 4,000 in haproxy and nginx inherits ours

Metrics = dict[str, float]


@dataclass(frozen=True)
class Figure:
    """``measure(system, seconds)`` returns the metrics. ``what`` is one line for a person."""

    name: str
    what: str
    measure: Callable[[System, float], Metrics]


def raise_descriptor_limit() -> None:
    """Let this process, and what it starts, have as many descriptors as the figures need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _with_web(system: System) -> Iterator[Running]:
    with web_server() as port, system.start([port]) as running:
        yield running


@contextmanager
def _with_bulk(system: System) -> Iterator[Running]:
    with bulk_server() as port, system.start([port]) as running:
        yield running


def _bulk(*, streams: int, down: int) -> Callable[[System, float], Metrics]:
    def measure(system: System, seconds: float) -> Metrics:
        with _with_bulk(system) as running:
            before_s = running.cpu_seconds()
            found = run_iperf3(running.ports[0], seconds=seconds, streams=streams, down=down)
            used_s = running.cpu_seconds() - before_s
        return {"gbit_s": found["gbit_s"], "cpu_s_per_gb": used_s / (found["bytes"] / 1e9)}

    return measure


def _requests(connections: int, *headers: str) -> Callable[[System, float], Metrics]:
    def measure(system: System, seconds: float) -> Metrics:
        with _with_web(system) as running:
            before_s = running.cpu_seconds()
            found = run_wrk(running.ports[0], connections=connections, seconds=seconds, headers=headers)
            used_s = running.cpu_seconds() - before_s
        requests = found.pop("requests")
        return found | {"cpu_us": used_s / requests * 1e6}

    return measure


def _beside_bulk(system: System, seconds: float) -> Metrics:
    with web_server() as web, bulk_server() as bulk, system.start([web, bulk]) as running:
        web_port, bulk_port = running.ports
        alone = run_iperf3(bulk_port, seconds=seconds, down=1)
        with iperf3_beside(bulk_port, seconds=seconds + 2 * BESIDE_LEAD_S) as download:
            time.sleep(BESIDE_LEAD_S)
            found = run_wrk(web_port, connections=BESIDE_CONNECTIONS, seconds=seconds)
            text, _ = download.communicate()
    beside = parse_iperf3(text, from_s=BESIDE_LEAD_S, until_s=BESIDE_LEAD_S + seconds)
    return {
        "p50_us": found["p50_us"],
        "p99_us": found["p99_us"],
        "requests_s": found["requests_s"],
        "gbit_s": beside["gbit_s"],
        "alone_gbit_s": alone["gbit_s"],
        "kept": beside["gbit_s"] / alone["gbit_s"],
    }


# Memory


def _receive_answer(sock: socket.socket) -> None:
    """Receive one answer to REQUEST whole."""
    received = b""
    while True:
        head, end, body = received.partition(b"\r\n\r\n")
        if end and len(body) >= FILE_BYTES:
            return
        data = sock.recv(4096)
        if not data:
            raise ConnectionError(f"a connection ended after {len(head) + len(body)} bytes of an answer")
        received += data


def _connect(port: int, count: int, stalled: list[str]) -> list[socket.socket]:
    """Open ``count`` connections, each with one request and its answer; all stay open.

    One after the other: a peer whose handshake is slow would let many at once run into its time limit.
    A connection that is not answered is written down in ``stalled`` and tried anew; when more than
    MAX_STALLED stand there, ToolFailed is raised.
    """
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            try:
                sockets.append(_connect_one(port))
            except OSError as error:
                stalled.append(str(error))
                if len(stalled) > MAX_STALLED:
                    raise ToolFailed(f"{len(stalled)} connections without an answer: {error}") from error
    except BaseException:
        _close(sockets)
        raise
    return sockets


def _connect_one(port: int) -> socket.socket:
    sock = socket.create_connection((LOOPBACK, port), SOCKET_TIMEOUT_S)
    try:
        sock.sendall(REQUEST)
        _receive_answer(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _idle_memory(system: System, _seconds: float) -> Metrics:
    metrics: Metrics = {}
    stalled: list[str] = []
    with _with_web(system) as running:
        sockets = _connect(running.ports[0], 1, stalled)  # what the first one loads is no cost of a connection
        try:
            time.sleep(SETTLE_S)
            before = running.pss_bytes()
            metrics["start_mib"] = before / MIB
            for count in IDLE_STEPS:
                sockets += _connect(running.ports[0], count - len(sockets), stalled)
                time.sleep(SETTLE_S if count == IDLE_STEPS[-1] else STEP_SETTLE_S)
                metrics[f"kib_at_{count}"] = (running.pss_bytes() - before) / KIB
        finally:
            _close(sockets)
    metrics["kib_per_connection"] = metrics[f"kib_at_{IDLE_STEPS[-1]}"] / (IDLE_STEPS[-1] - 1)
    metrics["stalled"] = float(len(stalled))
    return metrics


def _churn_memory(system: System, _seconds: float) -> Metrics:
    stalled: list[str] = []
    with _with_web(system) as running:
        _close(_connect(running.ports[0], 1, stalled))
        time.sleep(SETTLE_S)
        before = running.pss_bytes()
        for _ in range(0, CHURN_CONNECTIONS, CHURN_AT_ONCE):
            _close(_connect(running.ports[0], CHURN_AT_ONCE, stalled))
        time.sleep(2 * SETTLE_S)
        after = running.pss_bytes()
    return {
        "before_mib": before / MIB,
        "after_mib": after / MIB,
        "grown_mib": (after - before) / MIB,
        "growth": after / before - 1 if before else 0.0,
        "stalled": float(len(stalled)),
    }


# A long way


@contextmanager
def delaying_relay(to_port: int, *, rate_mbit: float) -> Iterator[int]:
    """``bench.delay`` in front of ``to_port``; yields its own port."""
    port = free_port()
    command = [sys.executable, "-m", "bench.delay", "--listen", str(port), "--to", str(to_port)]
    command += ["--delay-ms", f"{ONE_WAY_MS:g}", "--rate-mbit", f"{rate_mbit:g}"]
    with (
        tempfile.TemporaryDirectory(prefix="bench-delay-") as name,
        Program("bench.delay", command, Path(name) / "log") as relay,
    ):
        wait_listening([port], [relay])
        yield port


def _far_away(rate_mbit: float) -> Callable[[System, float], Metrics]:
    def measure(system: System, seconds: float) -> Metrics:
        with ExitStack() as stack:
            target = stack.enter_context(bulk_server())

            def via(port: int) -> int:
                return stack.enter_context(delaying_relay(port, rate_mbit=rate_mbit))

            running = stack.enter_context(system.start([target], via=via))
            found = run_iperf3(running.ports[0], seconds=max(seconds, DELAY_MIN_S))
        return {"gbit_s": found["gbit_s"]}

    return measure


FIGURES: Final[Mapping[str, Figure]] = {
    figure.name: figure
    for figure in (
        Figure("bulk_up", "bulk, one stream up: iperf3", _bulk(streams=1, down=0)),
        Figure("bulk_down", "bulk, one stream down: iperf3 -R", _bulk(streams=1, down=1)),
        Figure("bulk_8", "bulk, 8 streams: iperf3 -P 8", _bulk(streams=BULK_STREAMS, down=0)),
        Figure("requests_32", "small requests, keep-alive, 32 connections: wrk, nginx", _requests(32)),
        Figure("requests_256", "small requests, keep-alive, 256 connections: wrk, nginx", _requests(256)),
        Figure(
            "new", "new connections, one request each, 16 at once: wrk", _requests(NEW_CONNECTIONS, "Connection: close")
        ),
        Figure("round_trip", "round trip, one connection: wrk -c1", _requests(1)),
        Figure("beside_bulk", "small requests while a bulk download runs: wrk -c8 beside iperf3 -R", _beside_bulk),
        Figure("idle_memory", "memory of 2,000 idle connections: PSS", _idle_memory),
        Figure("churn_memory", "memory after 10,000 connections came and went: PSS", _churn_memory),
        Figure("far", "100 ms round trip, one stream: iperf3 through a delaying relay", _far_away(0.0)),
        Figure("far_1g", "100 ms round trip at 1 Gbit/s, one stream: iperf3", _far_away(LINK_MBIT)),
    )
}

# Without halves there is nothing of theirs to measure.
NO_HALVES: Final = frozenset({"idle_memory", "churn_memory"})


def applies(figure: str, system: str) -> bool:
    """Whether ``figure`` says anything about ``system``."""
    return not (system == DIRECT and figure in NO_HALVES)
