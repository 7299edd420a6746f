"""``pool.min_idle``: tunnels that are there before the first request, and stay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflex.errors import TunnelError
from reflex.net.connector import Connector
from reflex.net.tunnels import TunnelPool
from tests.processes import EchoServer, make_pair, receive_exactly, socks_connect

TIMEOUT_S = 20


@dataclass(eq=False)
class FakeTunnel:
    stream_count: int = 0
    has_room: bool = True
    is_blocked: bool = False
    is_suspect: bool = False
    is_bulk: bool = False
    idle_since_s: float = 0.0
    ended: bool = False


class FakeServer:
    """Can be had after so many attempts; counts them."""

    address = "a server"

    def __init__(self, *, failures: int = 0) -> None:
        self.not_before_s = 0.0
        self.attempts = 0
        self._failures = failures

    async def connect(self) -> tuple[None, None]:
        self.attempts += 1
        is_early = self.attempts <= self._failures
        await asyncio.sleep(0)
        if is_early:
            raise TunnelError("not yet")
        return None, None

    def succeeded(self) -> None:
        self.not_before_s = 0.0

    def failed(self, now_s: float) -> None:
        self.not_before_s = now_s + 0.01


class Warm:
    """A connector of fakes that is to hold two tunnels."""

    def __init__(self, *servers: FakeServer) -> None:
        self.pool: TunnelPool[Any] = TunnelPool(min_idle=2, max_idle=2, idle_timeout_s=60, max_streams=9)
        self._opened = asyncio.Event()

        def make_tunnel(server: Any, _sock: object, _secrets: object) -> Any:
            tunnel = FakeTunnel()
            self.pool.add(server, tunnel)
            self._opened.set()
            return tunnel

        loop = asyncio.get_running_loop()
        fakes: Any = servers
        self.connector = Connector(loop, fakes, self.pool, make_tunnel, max_tunnels=8, max_streams=9)

    async def have(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.pool) < count:
                self._opened.clear()
                await self._opened.wait()


def test_what_is_missing_is_dialled_once() -> None:
    async def run() -> None:
        server = FakeServer()
        warm = Warm(server)
        for _ in range(3):
            warm.connector.keep_warm()
        await warm.have(2)
        warm.connector.keep_warm()
        await asyncio.sleep(0)
        assert (len(warm.pool), server.attempts) == (2, 2)
        (first, _) = warm.pool
        warm.pool.remove(server, first)
        warm.connector.keep_warm()
        await warm.have(2)
        assert server.attempts == 3

    asyncio.run(run())


def test_after_a_failure_it_goes_on_without_being_asked() -> None:
    async def run() -> None:
        server = FakeServer(failures=5)
        warm = Warm(server)
        warm.connector.keep_warm()
        await warm.have(2)
        assert server.attempts == 7

    asyncio.run(run())


def test_tunnels_to_a_stand_in_do_not_stay_for_ever() -> None:
    async def run() -> None:
        first, second = FakeServer(failures=2), FakeServer()
        warm = Warm(first, second)
        warm.connector.keep_warm()
        await warm.have(2)
        assert warm.pool.count(second) == 2
        for tunnel in warm.pool:
            tunnel.idle_since_s = asyncio.get_running_loop().time() - 61
        first.not_before_s = 0.0  # its time to recover is over
        expired = warm.connector.expire()
        assert len(expired) == 2
        for key, tunnel in expired:
            warm.pool.remove(key, tunnel)
        warm.connector.keep_warm()
        await warm.have(2)
        for tunnel in warm.pool:
            tunnel.idle_since_s = asyncio.get_running_loop().time() - 61
        assert warm.pool.count(first) == 2
        assert warm.connector.expire() == []

    asyncio.run(run())


def test_nothing_is_dialled_once_it_is_closed() -> None:
    async def run() -> None:
        server = FakeServer()
        warm = Warm(server)
        warm.connector.close()
        warm.connector.keep_warm()
        await asyncio.sleep(0)
        assert server.attempts == 0

    asyncio.run(run())


def until(condition: Callable[[], bool]) -> None:
    """Wait for what no line tells."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_two_tunnels_are_there_before_the_first_request_and_stay(tmp_path: Path) -> None:
    pool = {"min_idle": 2, "idle_timeout_s": 0.3, "max_streams": 1}
    with EchoServer() as target, make_pair(tmp_path, outbound={"pool": pool}) as pair:

        def figures(kind: str) -> dict[str, int]:
            since = len(pair.outbound.lines)
            pair.outbound.send_signal(signal.SIGUSR1)
            found = json.loads(pair.outbound.wait_for_line(r"statistics: (\{.*\})", since=since).group(1))
            return dict(found[kind])

        def echo_over(tunnels: int) -> None:
            data = os.urandom(100)
            with contextlib.ExitStack() as streams:
                for _ in range(tunnels):  # each has room for one stream
                    sock = streams.enter_context(socks_connect(pair.socks_port, "127.0.0.1", target.port))
                    sock.sendall(data)
                    assert receive_exactly(sock, len(data)) == data

        until(lambda: figures("gauges")["idle_tunnels"] == 2)
        assert figures("counters")["connections_accepted"] == 0
        # A third one, then all idle for so long: that the third is gone shows that the others were looked at too.
        echo_over(3)
        until(lambda: figures("gauges")["tunnels"] == 2)
        echo_over(2)
        assert figures("counters")["tunnels_opened"] == 3
        # Lost, and dialled again as soon as the server is back.
        pair.inbound.kill()
        until(lambda: figures("gauges")["tunnels"] == 0)
        pair.restart_inbound()
        until(lambda: figures("gauges")["idle_tunnels"] == 2)
        echo_over(2)
        assert figures("counters")["tunnels_opened"] == 5
        assert pair.outbound.stop() == 0
