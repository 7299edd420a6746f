"""A recorded hello, played again to the server as a process: refused whatever happened in between.

A hello that is accepted gets an answer, and one that is not gets nothing, so a single byte tells. What must never
be refused is a user's own new hello.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from reflex.protocol.wire import HELLO_TIME_LIMIT_S, SERVER_HELLO_SIZE
from tests.processes import (
    EchoServer,
    Keys,
    Process,
    eventually,
    hello_bytes,
    receive_exactly,
    socks_connect,
    start_inbound,
    start_outbound,
)
from tests.webserver import running_nginx

BOUND_S: Final = 20.0
NOW_S: Final = 1_900_000_000
LIMIT: Final = HELLO_TIME_LIMIT_S
SILENT: Final = {"limits": {"handshake_timeout_s": 600}}


@pytest.fixture
def keys() -> Keys:
    return Keys.generate()


class Clock:
    """A daemon's clock in the hands of a test: it stands still until it is set. Seconds since 1970."""

    def __init__(self, path: Path, now_s: float) -> None:
        self._path = path
        self.prelude = f"import time; time.time = lambda: float(open({str(path)!r}).read())"
        self.set(now_s)

    def set(self, now_s: float) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(str(now_s))
        new.replace(self._path)  # at once: the daemon reads whenever it likes


def play(port: int, hello: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), BOUND_S)
    sock.sendall(hello)
    return sock


def is_answered(port: int, hello: bytes) -> None:
    """The hello opens a session: its answer comes."""
    with play(port, hello) as sock:
        receive_exactly(sock, SERVER_HELLO_SIZE)


def is_refused(process: Process, port: int, hello: bytes, why: str) -> None:
    """The hello is refused for this reason, and not one byte comes back."""
    since = len(process.lines)
    with play(port, hello) as sock:
        process.wait_for_line(f"hello refused: .*{why}", since=since)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)


def wait_for_the_next_second() -> None:
    now_s = int(time.time())
    assert eventually(lambda: int(time.time()) > now_s)


@contextlib.contextmanager
def server(directory: Path, keys: Keys, *, port: int = 0, workers: int = 1, prelude: str = "") -> Iterator[Process]:
    overrides = {**SILENT, "listen": [f"127.0.0.1:{port}"], "workers": workers}
    with start_inbound(directory, keys, overrides, prelude=prelude) as process:
        yield process


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_hello_again_is_refused_and_new_ones_never(tmp_path: Path, keys: Keys, workers: int) -> None:
    with server(tmp_path, keys, workers=workers) as process:
        port = process.wait_ready()[0][1]
        hello = hello_bytes(keys)
        is_answered(port, hello)
        for _ in range(10):  # the kernel chooses the worker: that all ten get to the first one's is rare, and no fault
            is_refused(process, port, hello, "hello seen before")
            is_answered(port, hello_bytes(keys))


@pytest.mark.parametrize(("end", "workers"), [("stop", 1), ("kill", 2)])
def test_a_hello_from_before_a_restart_is_refused_and_new_ones_are_not(
    tmp_path: Path, keys: Keys, end: str, workers: int
) -> None:
    with server(tmp_path, keys, workers=workers) as process:
        port = process.wait_ready()[0][1]
        hello = hello_bytes(keys)
        is_answered(port, hello)
        if end == "stop":
            assert process.stop() == 0
        else:
            process.kill()
    wait_for_the_next_second()
    with server(tmp_path, keys, port=port, workers=workers) as process:
        process.wait_ready()
        is_answered(port, hello_bytes(keys))
        is_refused(process, port, hello, "a time about which the replay set knows nothing")
        is_answered(port, hello_bytes(keys))


# A client whose clock is behind, just after a restart.

BEHIND: Final = "import time\n_time = time.time\ntime.time = lambda: _time() - 5"


def test_a_slow_client_that_had_a_session_before_the_restart_is_let_in_at_once(tmp_path: Path, keys: Keys) -> None:
    """It learned the server's time there. No fallback could tell it."""
    is_a_minute_ago = tmp_path / "a minute ago"
    is_a_minute_ago.touch()
    prelude = f"""
import os, time
_time = time.time
time.time = lambda: _time() - 60 * os.path.exists({str(is_a_minute_ago)!r})
"""
    with EchoServer() as echo, contextlib.ExitStack() as stack:
        with server(tmp_path, keys, prelude=prelude) as process:
            server_port = process.wait_ready()[0][1]
            is_a_minute_ago.unlink()  # it has run for a minute now
            client = stack.enter_context(start_outbound(tmp_path, keys, server_port, prelude=BEHIND))
            port = client.wait_ready()[0][1]
            echo_through(port, echo.port)
            process.kill()
        with server(tmp_path, keys, port=server_port) as process:
            process.wait_ready()
            echo_through(port, echo.port)
            assert not any("hello refused" in line for line in process.lines)


def test_a_slow_client_that_comes_first_after_a_restart_is_let_in_by_the_fallbacks_date(
    tmp_path: Path, keys: Keys
) -> None:
    (tmp_path / "nginx").mkdir()
    with (
        EchoServer() as echo,
        running_nginx(tmp_path / "nginx", patience_s=60) as (_, nginx_port),
        start_inbound(tmp_path, keys, {"fallback": f"127.0.0.1:{nginx_port}"}) as process,
        start_outbound(tmp_path, keys, process.wait_ready()[0][1], prelude=BEHIND) as client,
    ):
        echo_through(client.wait_ready()[0][1], echo.port)
        assert sum("knows nothing" in line for line in process.lines) == 1


def echo_through(socks_port: int, target_port: int) -> None:
    with socks_connect(socks_port, "127.0.0.1", target_port) as sock:
        sock.sendall(b"still here")
        assert receive_exactly(sock, 10) == b"still here"


# The edges of the time window.


@pytest.mark.parametrize("workers", [1, 2])
def test_at_the_edges_of_the_window_and_with_a_clock_that_steps(tmp_path: Path, keys: Keys, workers: int) -> None:
    """±120 s is accepted, once; beyond that it is refused; no step of the clock makes a taken hello good again."""
    clock = Clock(tmp_path / "clock", NOW_S - 1_000)

    def hello(offset_s: int) -> bytes:
        return hello_bytes(keys, time_s=NOW_S + offset_s)

    with server(tmp_path, keys, workers=workers, prelude=clock.prelude) as process:
        port = process.wait_ready()[0][1]
        clock.set(NOW_S)
        late, early = hello(-LIMIT), hello(LIMIT)
        for each in (late, early):
            is_answered(port, each)
            is_refused(process, port, each, "hello seen before")
        for offset_s in (-LIMIT - 1, LIMIT + 1):
            is_refused(process, port, hello(offset_s), "clock is off by")
        # Forward by a second: the late one is out of time, and freed.
        clock.set(NOW_S + 1)
        is_refused(process, port, late, "clock is off by")
        is_answered(port, hello(1))
        # And back: it is in time again, but not good again. Those that are new are.
        clock.set(NOW_S)
        is_refused(process, port, late, "knows nothing")
        is_refused(process, port, early, "hello seen before")
        is_answered(port, hello(-LIMIT + 1))
        # To the early one's last second, and beyond it.
        clock.set(NOW_S + 2 * LIMIT)
        is_refused(process, port, early, "hello seen before")
        clock.set(NOW_S + 2 * LIMIT + 1)
        is_refused(process, port, early, "clock is off by")
        is_answered(port, hello(2 * LIMIT + 1))
        clock.set(NOW_S)
        for each in (late, early):
            is_refused(process, port, each, "knows nothing")
