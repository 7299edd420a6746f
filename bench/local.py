"""Programs on this machine: started, listened to, measured and ended.

Shared by the demo and the tests that drive real processes. Everything stays on loopback.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

LOG_LINES_SHOWN: Final = 60
# For what a program does at once: with coverage, on a machine that does much else. Less than a drain may take (30 s),
# which must not pass for an end.
PATIENCE_S: Final = 25
READY: Final = re.compile(r"ready: listening on (.+)")
ADDRESS: Final = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s,:\[\]]+)):(\d+)")
DAEMONS: Final = {"reflex-inbound": "inbound_main", "reflex-outbound": "outbound_main"}


class ExpectationError(AssertionError):
    """A program did not do what was waited for; the text ends with what it logged."""


class SocksReplyError(OSError):
    """The SOCKS5 server answered with ``status`` (RFC 1928, section 6) instead of success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"SOCKS5 reply {status}")
        self.status = status


class Process:
    """A program whose stderr is collected line by line.

    As a context manager it ends the program on leaving, by its own process id, and adds what it
    logged to an exception that passes through. Safe from any number of threads.
    """

    def __init__(self, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        """Start ``command``. ``name`` is for messages; ``env`` is added to this process's own."""
        self.name = name
        self.killed = False  # by a signal of ours that it could not handle
        self._lines: list[str] = []
        self._ended = False  # stderr is at its end
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            env={**os.environ, **(env or {})},
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._collect, name=f"log of {name}", daemon=True)
        self._reader.start()

    def _collect(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in stderr:
                with self._news:
                    self._lines.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    @property
    def lines(self) -> list[str]:
        """What stands on stderr so far, a copy, one entry a line."""
        with self._news:
            return list(self._lines)

    @property
    def log(self) -> str:
        """The last lines of stderr, for a message to a person."""
        lines = self.lines
        shown = "\n".join(f"    {line}" for line in lines[-LOG_LINES_SHOWN:]) or "    (nothing)"
        return f"{self.name} (process {self.pid}) logged:\n{shown}"

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_for_line(
        self, pattern: str | re.Pattern[str], *, timeout_s: float = PATIENCE_S, since: int = 0
    ) -> re.Match[str]:
        """Wait until ``pattern`` is found in a line of stderr, at index ``since`` or later.

        Lines that are already there count. Returns the match. Raises ExpectationError when the
        time is over or the program ends without such a line.
        """
        compiled = re.compile(pattern)
        deadline = time.monotonic() + timeout_s
        index = since
        with self._news:
            while True:
                for line in self._lines[index:]:
                    if match := compiled.search(line):
                        return match
                index = max(index, len(self._lines))
                left_s = deadline - time.monotonic()
                if self._ended or left_s <= 0:
                    break
                self._news.wait(left_s)
        why = "ended without" if self._ended else f"within {timeout_s} s had not"
        raise ExpectationError(f"{self.name} {why} a line with {compiled.pattern!r}; {self.log}")

    def wait_ready(self, *, timeout_s: float = PATIENCE_S) -> list[tuple[str, int]]:
        """Wait for the ready line and return every (host, port) in it, in its order."""
        found = ADDRESS.findall(self.wait_for_line(READY, timeout_s=timeout_s).group(1))
        if not found:
            raise ExpectationError(f"{self.name}: no address in its ready line; {self.log}")
        return [(ipv6 or host, int(port)) for ipv6, host, port in found]

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; a process that has ended gets none."""
        self._process.send_signal(number)

    def wait(self, *, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end and return the exit code; negative: the signal that ended it."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ExpectationError(f"{self.name} had not ended within {timeout_s} s; {self.log}") from None
        self._reader.join(1)  # a grandchild may hold stderr open; it is not waited for
        return code

    def stop(self, *, timeout_s: float = PATIENCE_S) -> int:
        """Send SIGTERM and return the exit code. A daemon with open streams drains first."""
        self.send_signal(signal.SIGTERM)
        return self.wait(timeout_s=timeout_s)

    def kill(self) -> int:
        """Send SIGKILL and return the exit code."""
        self.killed = True
        self._process.kill()
        return self.wait()

    def end(self) -> None:
        """End it whatever it does: SIGTERM, again (which ends a drain), SIGKILL.

        Raises ExpectationError when nothing less than SIGKILL helped.
        """
        for patience_s in (0.5, 20):  # together less than a drain may take
            self.send_signal(signal.SIGTERM)
            try:
                self.wait(timeout_s=patience_s)
            except ExpectationError:
                continue
            return
        self.kill()
        raise ExpectationError(f"{self.name} did not end on two SIGTERM, only on SIGKILL; {self.log}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.end()
        except ExpectationError:
            if error is None:
                raise
        finally:
            if error is not None:
                error.add_note(self.log)


def start_daemon(name: str, config: Path, *arguments: str, prelude: str = "") -> Process:
    """Start ``reflex-inbound`` or ``reflex-outbound`` on a settings file.

    ``prelude`` is Python that runs in the new process before the daemon is imported. The console
    script is gone round, so that this works wherever ``reflex`` can be imported.
    """
    main = DAEMONS[name]
    code = f"{prelude}\nfrom reflex.cli import {main}\nraise SystemExit({main}())"
    return Process(name, [sys.executable, "-c", code, "-c", str(config), *arguments])


def socks_connect(
    proxy_port: int,
    host: str,
    port: int,
    *,
    proxy_host: str = "127.0.0.1",
    login: tuple[str, str] | None = None,
    timeout_s: float = 30,
) -> socket.socket:
    """Connect to ``host`` through a SOCKS5 server and return the socket, ready for the target.

    An IP address goes as such, everything else as a name for the other side to resolve. The
    socket keeps ``timeout_s``. Raises SocksReplyError with the server's status, OSError or
    ConnectionError where the connection itself fails.
    """
    sock = socket.create_connection((proxy_host, proxy_port), timeout_s)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(b"\x05\x01\x00" if login is None else b"\x05\x01\x02")
        method = receive_exactly(sock, 2)[1]
        if method == 0xFF:
            raise SocksReplyError(method)
        if login is not None:
            user, password = (text.encode() for text in login)
            sock.sendall(bytes([1, len(user)]) + user + bytes([len(password)]) + password)
            if status := receive_exactly(sock, 2)[1]:
                raise SocksReplyError(status)
        sock.sendall(b"\x05\x01\x00" + _socks_address(host) + port.to_bytes(2))
        _version, status, _reserved, kind = receive_exactly(sock, 4)
        if status:
            raise SocksReplyError(status)
        bound_size = {1: 4, 4: 16}[kind] if kind != 3 else receive_exactly(sock, 1)[0]
        receive_exactly(sock, bound_size + 2)
    except BaseException:
        sock.close()
        raise
    return sock


def _socks_address(host: str) -> bytes:
    for family, kind in ((socket.AF_INET, b"\x01"), (socket.AF_INET6, b"\x04")):
        try:
            return kind + socket.inet_pton(family, host)
        except OSError:
            continue
    name = host.encode()
    return b"\x03" + bytes([len(name)]) + name


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Receive ``size`` bytes. Raises ConnectionError at an early end."""
    received = bytearray()
    while len(received) < size:
        chunk = sock.recv(size - len(received))
        if not chunk:
            raise ConnectionError(f"the connection ended after {len(received)} of {size} bytes")
        received += chunk
    return bytes(received)


def to_toml(settings: Mapping[str, object]) -> str:
    """Write settings as TOML: scalars, lists of scalars, tables and lists of tables, any depth."""
    return "\n".join(_toml_lines(settings, ())) + "\n"


def _toml_lines(table: Mapping[str, object], path: tuple[str, ...]) -> list[str]:
    """One table's lines; what is itself a table comes last, as TOML wants it."""
    plain, tables = [], []
    for key, value in table.items():
        inner = (*path, key)
        if isinstance(value, Mapping):
            tables += [f"[{'.'.join(inner)}]", *_toml_lines(value, inner)]
        elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            for entry in value:
                tables += [f"[[{'.'.join(inner)}]]", *_toml_lines(entry, inner)]
        else:
            # Strings, numbers, booleans and lists of them are written alike in JSON and TOML.
            plain.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return plain + tables


def rss_bytes(pid: int) -> int:
    """Memory that the process has in RAM, shared pages counted whole."""
    return _status_bytes(pid, "VmRSS")


def peak_rss_bytes(pid: int) -> int:
    """The highest ``rss_bytes`` so far."""
    return _status_bytes(pid, "VmHWM")


def pss_bytes(pid: int) -> int:
    """Memory that the process has in RAM, shared pages divided by those who share them."""
    return _proc_field_bytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss")


def anonymous_bytes(pid: int) -> int:
    """The part of ``pss_bytes`` that stands for no file: what can leak, and no other program has a say in."""
    return _proc_field_bytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss_Anon")


def _status_bytes(pid: int, field: str) -> int:
    return _proc_field_bytes(Path(f"/proc/{pid}/status"), field)


def _proc_field_bytes(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024  # /proc writes kB and means KiB
    raise ProcessLookupError(f"{path} has no {field}; the process has ended")


def open_descriptors(pid: int) -> int:
    """How many file descriptors the process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def cpu_seconds(pid: int) -> float:
    """Processor time the process has used, user and system together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = int(fields[11]), int(fields[12])  # fields 14 and 15 of proc(5); two are cut off
    return (user + system) / os.sysconf("SC_CLK_TCK")
