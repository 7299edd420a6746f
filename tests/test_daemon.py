"""run_daemon: signals, log and exit codes; in this process, and in real ones that are told to stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from reflex import daemon as daemon_module
from reflex.daemon import run_daemon
from reflex.errors import StartError
from reflex.pool import TIER_SIZES

TIMEOUT_S = 30
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\w+) ([\w.]+): (.*)")


@pytest.fixture(autouse=True)
def _logging_is_put_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


class FakeDaemon:
    """Sends its own process the signals that it is made with: before start, once started, and while draining."""

    def __init__(
        self,
        *,
        starting: Sequence[int] = (),
        started: Sequence[int] = (),
        draining: Sequence[int] = (),
        fails: Exception | None = None,
    ) -> None:
        self.calls: list[str] = []
        self._starting = starting
        self._started = started
        self._draining = draining
        self._fails = fails
        self._reported = asyncio.Event()
        self._aborted = asyncio.Event()

    async def start(self) -> Sequence[str]:
        self.calls.append("start")
        _send(self._starting)
        if self._fails is not None:
            raise self._fails
        asyncio.get_running_loop().call_soon(_send, self._started)
        return ["127.0.0.1:1", "[::1]:2"]

    async def drain(self) -> None:
        self.calls.append("drain")
        _send(self._draining)
        if signal.SIGUSR1 in self._draining:
            await self._reported.wait()
        elif self._draining:
            await self._aborted.wait()

    def abort(self) -> None:
        self.calls.append("abort")
        self._aborted.set()

    def report(self) -> None:
        self.calls.append("report")
        self._reported.set()


def _send(signals: Sequence[int]) -> None:
    for signum in signals:
        os.kill(os.getpid(), signum)


def lines(text: str) -> list[tuple[str, ...]]:
    """Level, logger and text of each line of a log."""
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    return [line.groups() for line in found if line is not None]


@pytest.fixture(params=["direct", "uvloop", "asyncio"])
def _every_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFLEX_LOOP", request.param)


@pytest.mark.usefixtures("_every_loop")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_drains(capfd: pytest.CaptureFixture[str], signum: signal.Signals) -> None:
    made: list[FakeDaemon] = []

    def make() -> FakeDaemon:
        made.append(FakeDaemon(started=[signum]))
        return made[0]

    assert run_daemon(make, name="reflex.fake", log_level="info") == 0
    assert made[0].calls == ["start", "drain"]
    assert lines(capfd.readouterr().err) == [
        ("INFO", "reflex.fake", "ready: listening on 127.0.0.1:1, [::1]:2"),
        ("INFO", "reflex.fake", f"{signum.name}: draining; a second signal ends at once"),
        ("INFO", "reflex.fake", "stopped"),
    ]


def test_signal_while_starting_drains_once_started(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_daemon(lambda: FakeDaemon(starting=[signal.SIGTERM]), name="reflex.fake", log_level="error") == 0
    assert lines(capfd.readouterr().err) == [("INFO", "reflex.fake", "ready: listening on 127.0.0.1:1, [::1]:2")]


@pytest.mark.usefixtures("_every_loop")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_aborts(monkeypatch: pytest.MonkeyPatch, signum: signal.Signals) -> None:
    ended: list[int] = []
    made: list[FakeDaemon] = []
    monkeypatch.setattr(daemon_module, "_end_process", ended.append)

    def make() -> FakeDaemon:
        made.append(FakeDaemon(started=[signal.SIGINT], draining=[signum]))
        return made[0]

    run_daemon(make, name="reflex.fake", log_level="info")
    assert ended == [128 + signum]
    assert made[0].calls == ["start", "drain", "abort"]


def test_report_on_request() -> None:
    made: list[FakeDaemon] = []

    def make() -> FakeDaemon:
        made.append(FakeDaemon(started=[signal.SIGTERM], draining=[signal.SIGUSR1]))
        return made[0]

    assert run_daemon(make, name="reflex.fake", log_level="info") == 0
    assert made[0].calls == ["start", "drain", "report"]


def test_signals_before_there_is_a_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the loop still turns to see them is its own affair: they do no harm either way."""
    monkeypatch.setattr(daemon_module, "_end_process", lambda _code: None)

    def make() -> FakeDaemon:
        _send([signal.SIGUSR1, signal.SIGINT, signal.SIGTERM])
        raise StartError("no")

    assert run_daemon(make, name="reflex.fake", log_level="info") == 2


def test_the_end_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int | str] = []
    monkeypatch.setattr(logging, "shutdown", lambda: ended.append("log written"))
    monkeypatch.setattr(os, "_exit", ended.append)
    daemon_module._end_process(130)
    assert ended == ["log written", 130]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (StartError("127.0.0.1:1080 is in use"), "127.0.0.1:1080 is in use"),
        (StartError("two\nlines"), "two lines"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "Address already in use"),
        (FileNotFoundError(errno.ENOENT, "No such file", "conf/x"), "conf/x: No such file"),
        (OSError("odd"), "odd"),
        (OSError(), "OSError"),
    ],
)
def test_what_cannot_start_says_so_on_one_line(capfd: pytest.CaptureFixture[str], error: Exception, text: str) -> None:
    assert run_daemon(lambda: FakeDaemon(fails=error), name="reflex.fake", log_level="error") == 2
    err = capfd.readouterr().err
    assert lines(err) == [("ERROR", "reflex.fake", f"cannot start: {text}")]
    assert err.count("\n") == 1


def test_file_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = min(before[1], 512) if before[1] != resource.RLIM_INFINITY else 512
    log = logging.getLogger("reflex.fake")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        daemon_module._raise_file_limit(log)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
        daemon_module._raise_file_limit(log)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_file_limit_that_cannot_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_what: int, _limits: tuple[int, int]) -> None:
        raise ValueError

    monkeypatch.setattr(resource, "getrlimit", lambda _what: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    daemon_module._raise_file_limit(logging.getLogger("reflex.fake"))


# Real processes

SCRIPT = """
import asyncio, logging, sys, threading

from reflex.daemon import run_daemon

log = logging.getLogger("reflex.fake")


class Fake:
    def __init__(self):
        self.forever = asyncio.Event()

    async def start(self):
        log.info("loop: %s.", type(asyncio.get_running_loop()).__module__)
        return ["127.0.0.1:1"]

    async def drain(self):
        if "quick" not in sys.argv:
            if "hangs" in sys.argv:
                asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
            log.warning("draining")
            await self.forever.wait()

    def abort(self):
        log.warning("aborted")

    def report(self):
        log.info("statistics")


sys.exit(run_daemon(Fake, name="reflex.fake", log_level=sys.argv[1]))
"""


class Process:
    """The script above as a process, whose log is waited for line by line."""

    def __init__(self, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments], stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )
        assert self.popen.stderr is not None
        self._stderr = self.popen.stderr

    def wait_for(self, text: str) -> None:
        seen = ""
        while text not in seen:
            line = self._stderr.readline()
            assert line, f"ended without {text!r}: {seen}"
            seen += line

    def end(self) -> tuple[int, str]:
        """Exit code and the rest of the log."""
        _, rest = self.popen.communicate(timeout=TIMEOUT_S)
        return self.popen.returncode, rest


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.popen.kill()
        process.popen.communicate(timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    ("wanted", "module"),
    [("", "reflex.loop"), ("direct", "reflex.loop"), ("uvloop", "uvloop"), ("asyncio", "asyncio.unix_events")],
)
def test_process_reports_and_drains(
    processes: list[Process], wanted: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFLEX_LOOP", wanted)
    process = Process("info", "quick")
    processes.append(process)
    process.wait_for(f"loop: {module}.")
    process.wait_for("INFO reflex.fake: ready: listening on 127.0.0.1:1")
    process.popen.send_signal(signal.SIGUSR1)
    process.wait_for("statistics")
    process.popen.send_signal(signal.SIGTERM)
    code, rest = process.end()
    assert code == 0
    assert "Traceback" not in rest


@pytest.mark.parametrize("level", ["debug", "warning", "error"])
def test_a_report_that_was_asked_for_is_shown_at_every_log_level(processes: list[Process], level: str) -> None:
    process = Process(level, "quick")
    processes.append(process)
    process.wait_for("ready: ")
    process.popen.send_signal(signal.SIGUSR1)
    process.wait_for("INFO reflex.fake: statistics")
    process.popen.send_signal(signal.SIGTERM)
    code, rest = process.end()
    assert code == 0
    assert ("stopped" in rest) == (level == "debug")  # and what was not is not


@pytest.mark.parametrize("hangs", ["", "hangs"])
@pytest.mark.parametrize(("second", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_process_ends_at_once_on_a_second_signal(
    processes: list[Process], second: signal.Signals, expected: int, hangs: str
) -> None:
    process = Process("warning", hangs)
    processes.append(process)
    process.wait_for("ready: ")
    process.popen.send_signal(signal.SIGTERM)
    process.wait_for("draining")
    process.popen.send_signal(second)
    code, rest = process.end()
    assert code == expected
    assert [line[2] for line in lines(rest)] == [f"{second.name}: ending at once", "aborted"]


class _OtherLibrary:
    """A C library without mallopt."""

    def __init__(self, name: str | None) -> None:
        assert name is None


def test_a_c_library_without_glibcs_calls_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reflex.daemon.ctypes.CDLL", _OtherLibrary)
    daemon_module._return_large_buffers_to_the_system()


def test_large_buffers_leave_the_process_when_they_are_freed() -> None:
    assert daemon_module.LARGE_BYTES in TIER_SIZES
    program = """
from pathlib import Path
from reflex.daemon import prepare_process
def held_kib():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])
if __name__ == "__main__":
    prepare_process("test", log_level="info")
    before_kib = held_kib()
    kept, freed = [], []
    for _ in range(200):
        freed.append(bytearray(131_072))
        freed.append(bytearray(32_768))
        kept.append(bytearray(2_048))  # a hole in the heap would stay behind each
    assert held_kib() > before_kib + 30_000
    freed.clear()
    grown_kib = held_kib() - before_kib
    assert grown_kib < 4_000, grown_kib
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=TIMEOUT_S)
