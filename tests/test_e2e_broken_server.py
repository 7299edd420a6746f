"""A server whose sessions end by protocol errors again and again, against a real client: it is tried again once, at
once, and then left alone for growing times; who has another server uses that.

Figures are told with ``pytest -rP``.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from reflex.net.server import FIRST_DELAY_S, MAX_DELAY_S
from reflex.protocol.wire import FrameType, Status
from tests.hostile import TIMEOUT_S, HostileServer
from tests.processes import (
    HELLO,
    Keys,
    Origin,
    SocksReplyError,
    hello_through,
    socks_connect,
    start_inbound,
    start_outbound,
)
from tests.sessions import frame

NEVER_ASKED_FOR = frame(FrameType.OPENED, 99, b"\0")
GENERAL_FAILURE = 1  # SOCKS5's reply
JITTER = 0.5  # the part of a delay that is never taken off


@dataclass
class Breaker:
    """Breaks the sessions of a server, each as soon as a stream is opened on it."""

    server: HostileServer
    began_s: list[float] = field(default_factory=list)  # when each of the sessions was there
    broke_s: list[float] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                peer = self.server.tunnels.get(timeout=0.05)
            except queue.Empty:
                continue
            self.began_s.append(time.monotonic())
            with contextlib.suppress(OSError):
                peer.receive_until(FrameType.OPEN, 1)
                self.broke_s.append(time.monotonic())
                peer.send(NEVER_ASKED_FOR)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, name="breaker", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for peer in list(self.server.tunnels.queue):
                peer.close()
            thread.join(TIMEOUT_S)

    def check_delays(self) -> None:
        """The first session is followed at once by the second, and each one behind it by a longer pause at least."""
        pauses = [after - before for before, after in zip(self.broke_s, self.began_s[1:], strict=False)]
        print("pauses, s:", ", ".join(f"{pause:.2f}" for pause in pauses))
        for number, pause in enumerate(pauses[1:]):
            assert pause >= JITTER * min(FIRST_DELAY_S * 2**number, MAX_DELAY_S)


def test_a_server_that_breaks_every_session_is_asked_ever_more_seldom(tmp_path: Path) -> None:
    keys = Keys.generate()
    with (
        HostileServer(keys) as server,
        start_outbound(tmp_path, keys, server.port) as client,
    ):
        socks_port = client.wait_ready()[0][1]
        breaker = Breaker(server)
        with breaker.at_work():
            refused = 0
            while len(breaker.broke_s) < 6:
                started_s = time.monotonic()
                try:
                    socks_connect(socks_port, "127.0.0.1", 80, timeout_s=TIMEOUT_S).close()
                except SocksReplyError as error:
                    if error.status != GENERAL_FAILURE:
                        raise
                    refused += 1
                assert time.monotonic() - started_s < TIMEOUT_S
            assert refused
        breaker.check_delays()
        # It behaves again: the next request is served, and so is the one after a clean end, without any delay.
        for _ in range(2):
            app = threading.Thread(
                target=lambda: socks_connect(socks_port, "127.0.0.1", 80, timeout_s=TIMEOUT_S).close()
            )
            app.start()
            peer = server.next_tunnel()
            peer.receive_until(FrameType.OPEN, 1)
            peer.send(frame(FrameType.OPENED, 1, bytes([Status.SUCCEEDED])))
            app.join(TIMEOUT_S)
            assert not app.is_alive()
            peer.send(frame(FrameType.CLOSE, 0, bytes(4)))
            peer.wait_for_end()


def test_who_has_another_server_is_served_by_that_all_the_while(tmp_path: Path) -> None:
    keys = Keys.generate()
    with (
        Origin() as origin,
        HostileServer(keys) as server,
        start_inbound(tmp_path, keys) as inbound,
        start_outbound(
            tmp_path,
            keys,
            server.port,
            {
                "servers": [
                    {},
                    {
                        "address": f"127.0.0.1:{inbound.wait_ready()[0][1]}",
                        "public_key": keys.public_key,
                        "user_id": keys.user_id,
                        "user_key": keys.user_key,
                    },
                ]
            },
        ) as client,
    ):
        socks_port = client.wait_ready()[0][1]
        breaker = Breaker(server)
        with breaker.at_work():
            served = 0
            while len(breaker.broke_s) < 4:  # it is tried again in the background now and then, as any first server is
                assert hello_through(socks_port, origin) == HELLO
                served += 1
        print(f"{served} requests were served while {len(breaker.broke_s)} sessions broke")
        breaker.check_delays()
