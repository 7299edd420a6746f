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
from tests.processes import Keys, Process, eventually, hello_bytes, receive_exactly, start_inbound

BOUND_S: Final = 20.0
SILENT: Final = {"limits": {"handshake_timeout_s": 600}}


@pytest.fixture
def keys() -> Keys:
    return Keys.generate()


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


def wait_for_the_next_second() -> int:
    """Seconds since 1970, just begun."""
    now_s = int(time.time())
    assert eventually(lambda: int(time.time()) > now_s)
    return int(time.time())


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


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("end", ["stop", "kill"])
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


# The edges of the time window, with a clock that the test holds in its hands.

CLOCK: Final = """
import time
_time = time.time
time.time = lambda: _time() + float(open({path!r}).read())
"""


def test_at_the_edges_of_the_window_and_with_a_clock_that_steps(tmp_path: Path, keys: Keys) -> None:
    """±120 s is accepted once; beyond that it is refused; no step of the clock makes a taken hello good again."""
    clock = tmp_path / "clock"
    clock.write_text("-200")

    def step_to(offset_s: int) -> None:
        clock.write_text(str(offset_s))

    with server(tmp_path, keys, prelude=CLOCK.format(path=str(clock))) as process:
        port = process.wait_ready()[0][1]
        step_to(0)  # it has run for 200 s now
        now_s = wait_for_the_next_second()
        limit = HELLO_TIME_LIMIT_S
        late, early = hello_bytes(keys, time_s=now_s - limit + 1), hello_bytes(keys, time_s=now_s + limit)
        is_answered(port, late)
        is_answered(port, early)
        for hello in (late, early):
            is_refused(process, port, hello, "hello seen before")
        is_refused(process, port, hello_bytes(keys, time_s=now_s - limit - 1), "clock is off by")
        is_refused(process, port, hello_bytes(keys, time_s=now_s + limit + 60), "clock is off by")
        # Forward: the late one is out of time, the early one is in its middle.
        step_to(limit)
        is_refused(process, port, late, "clock is off by")
        is_refused(process, port, early, "hello seen before")
        is_answered(port, hello_bytes(keys, time_s=now_s + limit))  # which frees the late one
        # And back: it would be in time again.
        step_to(0)
        is_refused(process, port, late, "hello seen before|knows nothing")
        is_refused(process, port, early, "hello seen before")
        is_answered(port, hello_bytes(keys))
        # Far ahead and back, as a clock that is set wrong and right again: all is freed, nothing is good again.
        step_to(10 * limit)
        is_answered(port, hello_bytes(keys, time_s=now_s + 10 * limit))
        step_to(0)
        for hello in (late, early):
            is_refused(process, port, hello, "hello seen before|knows nothing")
