"""Halves and workers that are killed or told to stop, again and again, under load: nothing sticks."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import (
    HELLO,
    Origin,
    Pair,
    Process,
    SocksReplyError,
    hello_through,
    make_pair,
    socks_connect,
)
from tests.transfers import HANG_S, HEAD, TransferTarget, content, transfer

LOAD = 6  # applications that transfer one thing after the other
RUNNING = 4  # transfers that are under way when a half is told to stop
RUNNING_BYTES = 3_000_000
DRAIN_S = 20
WORKS_WITHIN_S = 10.0
SEED = 7


class Load:
    """Applications that transfer without a pause, and what became of their transfers."""

    def __init__(self, socks_port: int, target_port: int, seed: int) -> None:
        self._ports = (socks_port, target_port)
        self._is_over = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run, args=(f"{seed}/{n}",), daemon=True) for n in range(LOAD)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: str) -> None:
        luck = random.Random(seed)
        while not self._is_over.is_set():
            try:
                outcome = transfer(*self._ports, luck)
            except OSError:
                outcome = "refused"  # nobody listens at the moment
            if outcome == "refused":
                self._is_over.wait(0.02)
            self.outcomes[outcome] += 1

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(HANG_S + 5)
            if thread.is_alive():
                self.outcomes["hung"] += 1


@contextlib.contextmanager
def under_load(directory: Path, seed: int, *, workers: int = 1) -> Iterator[tuple[Pair, TransferTarget, Load]]:
    limits = {"workers": workers, "limits": {"drain_s": DRAIN_S}}
    with (
        make_pair(directory, inbound=limits, outbound={"limits": {"drain_s": DRAIN_S}}) as pair,
        TransferTarget() as target,
    ):
        load = Load(pair.socks_port, target.port, seed)
        try:
            yield pair, target, load
        finally:
            load.stop()


def works_again(pair: Pair, origin: Origin) -> float:
    """The next request works; how long that took. A refusal is tried again, until WORKS_WITHIN_S are over."""
    begun_s = time.monotonic()
    while True:
        try:
            assert hello_through(pair.socks_port, origin) == HELLO
        except (SocksReplyError, ConnectionError):
            assert time.monotonic() - begun_s < WORKS_WITHIN_S
            time.sleep(0.05)
            continue
        return time.monotonic() - begun_s


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def slow_download(pair: Pair, target: TransferTarget, results: list[str], begun: threading.Barrier) -> None:
    """A download that is read slowly, so that it is under way when the signal comes."""
    try:
        with socks_connect(pair.socks_port, "127.0.0.1", target.port) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            sock.sendall(HEAD.pack(b"d", 3, RUNNING_BYTES))
            got = bytearray(sock.recv(65_536))
            begun.wait(HANG_S)
            while data := sock.recv(65_536):
                got += data
                time.sleep(0.005)
        results.append("drained" if got == content(3, RUNNING_BYTES) else "false end")
    except ConnectionResetError:
        results.append("cut")


def kill_once(pair: Pair, luck: random.Random) -> str:
    """SIGKILL to a half or to a worker of the server; the half is started again."""
    what = luck.choice(["inbound", "outbound", "worker"])
    if what == "worker":
        os.kill(luck.choice(children(pair.inbound.pid)), signal.SIGKILL)
    elif what == "inbound":
        workers = children(pair.inbound.pid)
        pair.inbound.kill()
        for worker in workers:  # they drain by themselves; the port is theirs until they are told once more
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        pair.restart_inbound()
    else:
        pair.outbound.kill()
        pair.restart_outbound()
    return what


def stop_once(pair: Pair, target: TransferTarget, luck: random.Random) -> tuple[str, list[str]]:
    """SIGTERM to a half with downloads under way; what became of these. The half is started again."""
    what = luck.choice(["inbound", "outbound"])
    half: Process = pair.inbound if what == "inbound" else pair.outbound
    results: list[str] = []
    begun = threading.Barrier(RUNNING + 1)
    threads = [
        threading.Thread(target=slow_download, args=(pair, target, results, begun), daemon=True) for _ in range(RUNNING)
    ]
    for thread in threads:
        thread.start()
    begun.wait(HANG_S)
    half.send_signal(signal.SIGTERM)
    assert half.wait(timeout_s=DRAIN_S + 10) == 0
    for thread in threads:
        thread.join(HANG_S)
    if what == "inbound":
        pair.restart_inbound()
    else:
        pair.restart_outbound()
    return what, results


def kill_and_stop(directory: Path, times: int, capsys: pytest.CaptureFixture[str]) -> None:
    luck = random.Random(SEED)
    counts: Counter[str] = Counter()
    slowest_s = 0.0
    with Origin() as origin, under_load(directory, SEED, workers=2) as (pair, target, load):
        works_again(pair, origin)
        for number in range(times):
            if number % 2:
                what, results = stop_once(pair, target, luck)
                counts[f"SIGTERM {what}"] += 1
                counts.update(results)
                assert results == ["drained"] * RUNNING, (what, results)
            else:
                counts[f"SIGKILL {kill_once(pair, luck)}"] += 1
            slowest_s = max(slowest_s, works_again(pair, origin))
        load.stop()
    with capsys.disabled():
        done = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        load_done = ", ".join(f"{count} {name}" for name, count in sorted(load.outcomes.items()))
        print(f"\nkills: {done}; meanwhile: {load_done}; the next request worked after {slowest_s:.1f} s at most")
    assert not load.outcomes["hung"]
    assert not load.outcomes["damaged"]
    assert not load.outcomes["false end"]
    assert target.damaged == 0
    assert target.false_ends == 0
    assert load.outcomes["whole"]


def test_killed_and_stopped_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kill_and_stop(tmp_path, 4, capsys)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_and_stopped_two_hundred_times_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kill_and_stop(tmp_path, 200, capsys)
