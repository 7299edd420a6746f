"""A recorded hello, played again to the server as a process: refused whatever happened in between.

A hello that is accepted gets an answer, and one that is not gets nothing, so a single byte tells. What must never
be refused is a user's own new hello.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sqlite3
import stat
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
    kept_port,
    receive_exactly,
    socks_connect,
    start_inbound,
    start_outbound,
)
from tests.test_supervisor import children
from tests.webserver import running_nginx

BOUND_S: Final = 20.0
NOW_S: Final = 1_900_000_000
LIMIT: Final = HELLO_TIME_LIMIT_S
SILENT: Final = {"limits": {"handshake_timeout_s": 600}}


@pytest.fixture
def keys() -> Keys:
    return Keys.generate()


@pytest.fixture
def port() -> Iterator[int]:
    """The server's, also after a restart."""
    with kept_port() as port:
        yield port


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
def server(
    directory: Path,
    keys: Keys,
    *,
    port: int = 0,
    workers: int = 1,
    prelude: str = "",
    replay_file: str | None = None,
    fallback: str | None = None,
) -> Iterator[Process]:
    own = {"replay_file": replay_file, "fallback": fallback}
    overrides = {**SILENT, "listen": [f"127.0.0.1:{port}"], "workers": workers, **own}
    # At debug each refusal is told; as a warning, one of each kind in a while.
    with start_inbound(directory, keys, overrides, arguments=["--log-level", "debug"], prelude=prelude) as process:
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


def test_a_hello_is_refused_when_the_worker_that_took_it_was_killed(tmp_path: Path, keys: Keys) -> None:
    with server(tmp_path, keys, workers=2) as process:
        port = process.wait_ready()[0][1]
        hello = hello_bytes(keys)
        is_answered(port, hello)
        for victim in children(process):  # it was one of them
            since = len(process.lines)
            os.kill(victim, signal.SIGKILL)
            process.wait_for_line(r"worker \d is ready again", timeout_s=BOUND_S, since=since)
            for _ in range(5):  # at either worker, mostly
                is_refused(process, port, hello, "hello seen before")
            is_answered(port, hello_bytes(keys))


@pytest.mark.parametrize(("end", "workers"), [("stop", 1), ("kill", 2)])
def test_a_hello_from_before_a_restart_is_refused_and_new_ones_are_not(
    tmp_path: Path, keys: Keys, port: int, end: str, workers: int
) -> None:
    with server(tmp_path, keys, port=port, workers=workers) as process:
        process.wait_ready()
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

# By more than a start takes, and by less than the minute for which the server of the first test has run.
BEHIND: Final = "import time\n_time = time.time\ntime.time = lambda: _time() - 30"


def test_a_slow_client_that_had_a_session_before_the_restart_is_let_in_at_once(
    tmp_path: Path, keys: Keys, port: int
) -> None:
    """It learned the server's time there. No fallback could tell it."""
    is_a_minute_ago = tmp_path / "a minute ago"
    is_a_minute_ago.touch()
    prelude = f"""
import os, time
_time = time.time
time.time = lambda: _time() - 60 * os.path.exists({str(is_a_minute_ago)!r})
"""
    with EchoServer() as echo, contextlib.ExitStack() as stack:
        with server(tmp_path, keys, port=port, prelude=prelude) as process:
            process.wait_ready()
            is_a_minute_ago.unlink()  # it has run for a minute now
            client = stack.enter_context(start_outbound(tmp_path, keys, port, prelude=BEHIND))
            socks_port = client.wait_ready()[0][1]
            echo_through(socks_port, echo.port)
            process.kill()
        with server(tmp_path, keys, port=port) as process:
            process.wait_ready()
            echo_through(socks_port, echo.port)
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


# Dated ahead: the time alone does not tell it from a new one.

SAVED: Final = "replay.sqlite"
AHEAD_S: Final = 100  # far more than a restart takes here, and less than would be refused


@pytest.mark.parametrize(("end", "workers"), [("kill", 1), ("kill", 2), ("stop", 1), ("stop", 2)])
def test_a_hello_dated_ahead_is_refused_after_a_restart(
    tmp_path: Path, keys: Keys, port: int, end: str, workers: int
) -> None:
    """Where it is saved; and a client whose clock is ahead is let in at once."""
    with server(tmp_path, keys, port=port, workers=workers, replay_file=SAVED) as process:
        process.wait_ready()
        hellos = [hello_bytes(keys, time_s=int(time.time()) + AHEAD_S) for _ in range(3)]
        for hello in hellos:
            is_answered(port, hello)
        if end == "kill":
            process.kill()
        else:
            assert process.stop() == 0
            assert [path.name for path in tmp_path.glob(f"{SAVED}*")] == [SAVED]  # all is in the one file
    assert stat.S_IMODE((tmp_path / SAVED).stat().st_mode) == 0o600
    for _ in range(2):
        with server(tmp_path, keys, port=port, workers=workers, replay_file=SAVED) as process:
            process.wait_ready()
            for hello in hellos:
                is_refused(process, port, hello, "hello seen before")
            is_answered(port, hello_bytes(keys, time_s=int(time.time()) + AHEAD_S))
            is_answered(port, hello_bytes(keys, time_s=int(time.time()) + 1))
            process.kill()


def test_a_hello_dated_ahead_gets_the_fallback_after_a_restart(tmp_path: Path, keys: Keys, port: int) -> None:
    hello = hello_bytes(keys, time_s=int(time.time()) + AHEAD_S)
    (tmp_path / "nginx").mkdir()
    with running_nginx(tmp_path / "nginx", patience_s=60) as (_, nginx_port):
        fallback = f"127.0.0.1:{nginx_port}"
        with server(tmp_path, keys, port=port, replay_file=SAVED, fallback=fallback) as process:
            process.wait_ready()
            is_answered(port, hello)
            process.kill()
        with server(tmp_path, keys, port=port, replay_file=SAVED, fallback=fallback) as process:
            process.wait_ready()
            with play(port, hello + b"\r\n\r\n") as sock, sock.makefile("rb") as reader:
                assert b"400 Bad Request" in reader.read()
            process.wait_for_line("hello refused: hello seen before")


def test_a_client_whose_clock_is_ahead_is_let_in_right_after_a_restart(tmp_path: Path, keys: Keys, port: int) -> None:
    ahead = f"import time\n_time = time.time\ntime.time = lambda: _time() + {AHEAD_S}"
    with EchoServer() as echo, contextlib.ExitStack() as stack:
        with server(tmp_path, keys, port=port, replay_file=SAVED) as process:
            process.wait_ready()
            client = stack.enter_context(start_outbound(tmp_path, keys, port, prelude=ahead))
            socks_port = client.wait_ready()[0][1]
            echo_through(socks_port, echo.port)
            process.kill()
        with server(tmp_path, keys, port=port, replay_file=SAVED) as process:
            process.wait_ready()
            echo_through(socks_port, echo.port)
            assert not any("hello refused" in line for line in process.lines)


def test_without_a_replay_file_a_hello_dated_ahead_is_answered_once_more(tmp_path: Path, keys: Keys, port: int) -> None:
    """As docs/protocol.md says: 40 bytes, once in each run."""
    hello = hello_bytes(keys, time_s=int(time.time()) + AHEAD_S)
    for _ in range(2):
        with server(tmp_path, keys, port=port) as process:
            process.wait_ready()
            is_answered(port, hello)
            is_refused(process, port, hello, "hello seen before")
            process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["inbound.toml"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_locks_nobody_out_and_what_was_taken_meanwhile_is_written_later(
    tmp_path: Path, keys: Keys, port: int, workers: int
) -> None:
    """A bound of the size of its files stands for the disk's."""

    def rows() -> int:
        with contextlib.closing(sqlite3.connect(tmp_path / SAVED)) as database:
            return int(database.execute("SELECT count(*) FROM hellos").fetchone()[0])

    def ahead() -> bytes:
        return hello_bytes(keys, time_s=int(time.time()) + AHEAD_S)

    with server(tmp_path, keys, port=port, workers=workers, replay_file=SAVED) as process:
        process.wait_ready()
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, hard))
        taken = [ahead() for _ in range(5)]
        for hello in taken:
            is_answered(port, hello)
            is_refused(process, port, hello, "hello seen before")
        complaint = f"cannot write the replay file {tmp_path / SAVED}: .*; tried again"
        process.wait_for_line(complaint)
        assert sum("cannot write the replay file" in line for line in process.lines) == 1
        assert rows() == 0
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))

        def is_caught_up() -> bool:
            taken.append(ahead())
            is_answered(port, taken[-1])
            return rows() == len(taken)

        assert eventually(is_caught_up)
        process.wait_for_line("the replay file .* can be written again")
        process.kill()
    with server(tmp_path, keys, port=port, workers=workers, replay_file=SAVED) as process:
        process.wait_ready()
        for hello in taken[:15]:  # no more failures than one address may have at once
            is_refused(process, port, hello, "hello seen before")


@pytest.mark.parametrize(("path", "workers"), [("missing/replay.sqlite", 1), ("inbound.toml", 1), ("inbound.toml", 2)])
def test_a_replay_file_that_cannot_be_written_prevents_the_start(
    tmp_path: Path, keys: Keys, path: str, workers: int
) -> None:
    with start_inbound(tmp_path, keys, {"replay_file": path, "workers": workers}) as process:
        process.wait_for_line(f"cannot start: replay_file: cannot (open|write) {tmp_path / path}: ")
        assert process.wait() == 2


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
