"""Programs of a compared system: started in process groups of their own, watched by /proc, and ended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from bench.local import pss_bytes

LOOPBACK: Final = "127.0.0.1"
FIRST_PORT: Final = 20_000  # below what Linux gives to outgoing connections (from 32,768), so that
LAST_PORT: Final = 32_000  # thousands of those never take a port that a program is about to listen on
START_TIMEOUT_S: Final = 10.0
POLL_INTERVAL_S: Final = 0.02
END_PATIENCE_S: Final = (0.5, 3.0)  # after the first and the second SIGTERM; the second ends a drain
LOG_CHARACTERS_SHOWN: Final = 1_500
TCP_LISTEN: Final = "0A"  # a state in /proc/net/tcp
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class StartFailed(Exception):
    """A program did not come up; the text ends with what it wrote."""


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    while True:
        port = random.randint(FIRST_PORT, LAST_PORT)  # noqa: S311 - any will do
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind((LOOPBACK, port))
            return port


def listening_ports() -> set[int]:
    """Every TCP port that somebody listens on, read from /proc: no connection is made for it."""
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == TCP_LISTEN:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


class Program:
    """A program in a session of its own, its output in a file. As a context manager it is ended on leaving."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """The end of what it wrote."""
        return self._log.read_text(errors="backslashreplace")[-LOG_CHARACTERS_SHOWN:].strip() or "(nothing)"

    def end(self) -> None:
        """End it and everything that it started: SIGTERM, again, SIGKILL. Waits for it."""
        started = family([self.pid])  # children may have left its process group, as sshd's do
        for patience_s in END_PATIENCE_S:
            self._signal_group(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
                break
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + END_PATIENCE_S[0]
        while (left := [pid for pid in started if pid != self.pid and _is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"{self.name} wrote: {self.log}")
        self.end()


def wait_listening(ports: Sequence[int], programs: Sequence[Program]) -> None:
    """Wait until all ``ports`` are listened on. Raises StartFailed when a program ends, or time is over."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while missing := set(ports) - listening_ports():
        for program in programs:
            if not program.is_running:
                raise StartFailed(f"{program.name} ended; it wrote: {program.log}")
        if time.monotonic() > deadline:
            logs = "; ".join(f"{program.name}: {program.log}" for program in programs)
            raise StartFailed(f"nobody listens on {sorted(missing)} after {START_TIMEOUT_S:g} s; {logs}")
        time.sleep(POLL_INTERVAL_S)


class Running:
    """A system that is up: ``ports`` to connect to, one a target, and what its halves use, by /proc."""

    def __init__(self, programs: Sequence[Program], ports: Sequence[int]) -> None:
        self.programs = programs
        self.ports = ports

    def pids(self) -> list[int]:
        """Every process of both halves, children included, as they are now."""
        return family([program.pid for program in self.programs])

    def cpu_seconds(self) -> float:
        """Processor time of both halves since their start, of children that have ended too."""
        return sum(_cpu_seconds(pid) for pid in self.pids())

    def pss_bytes(self) -> int:
        """Memory of both halves, shared pages divided by those who share them."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                total += pss_bytes(pid)
        return total


def family(roots: Sequence[int]) -> list[int]:
    """``roots`` that are alive, and everything below them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid for pid in roots if _is_alive(pid)]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on (state, parent, ...); empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _is_alive(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"


def _cpu_seconds(pid: int) -> float:
    # utime, stime, cutime, cstime: fields 14 to 17 of proc(5), of which two are cut off
    return sum(map(int, _stat(pid)[11:15])) / TICKS_PER_S
