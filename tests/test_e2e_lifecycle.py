"""Starting and stopping a half: what it says where it cannot start, and what signals do to running work."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bench.local import DAEMONS, start_daemon
from reflex import __version__
from tests.processes import (
    HELLO,
    EchoServer,
    Keys,
    LoopbackServer,
    Origin,
    Pair,
    Process,
    Settings,
    SocksReplyError,
    eventually,
    hello_through,
    make_pair,
    never_reading,
    receive_exactly,
    socks_connect,
    start_inbound,
    start_outbound,
)

MIB = 1 << 20
BOUND_S = 20
GENERAL_FAILURE = 1  # SOCKS5's reply (RFC 1928, section 6)
EXIT_NOT_STARTED = 2
HALVES = ["inbound", "outbound"]


# A half is told to stop.


class TwoParts(LoopbackServer):
    """Sends a half, waits until it is told, sends the other half, ends."""

    HALF = 2 * MIB

    def __init__(self) -> None:
        self.go_on = threading.Event()
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        sock.sendall(b"1" * self.HALF)
        self.go_on.wait(BOUND_S)
        sock.sendall(b"2" * self.HALF)


def half_of(pair: Pair, name: str) -> tuple[Process, int]:
    """The process and its port."""
    return (pair.inbound, pair.inbound_port) if name == "inbound" else (pair.outbound, pair.socks_port)


def refuses(port: int) -> bool:
    """Whether nobody listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), BOUND_S).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # it was in the queue of a listener that was being closed
    return False


@pytest.mark.parametrize("name", HALVES)
def test_sigterm_lets_a_running_transfer_end_whole_and_takes_nothing_new(tmp_path: Path, name: str) -> None:
    with (
        make_pair(tmp_path) as pair,
        TwoParts() as server,
        socks_connect(pair.socks_port, "127.0.0.1", server.port, timeout_s=BOUND_S) as sock,
    ):
        half, port = half_of(pair, name)
        assert receive_exactly(sock, server.HALF) == b"1" * server.HALF
        half.send_signal(signal.SIGTERM)
        half.wait_for_line("SIGTERM: draining")
        assert eventually(lambda: refuses(port))
        if name == "inbound":
            with pytest.raises(SocksReplyError) as caught:
                socks_connect(pair.socks_port, "127.0.0.1", server.port, timeout_s=BOUND_S)
            assert caught.value.status == GENERAL_FAILURE
        server.go_on.set()
        assert receive_exactly(sock, server.HALF) == b"2" * server.HALF
        assert sock.recv(1) == b""
        sock.close()
        assert half.wait() == 0


@pytest.mark.parametrize("name", HALVES)
def test_an_idle_half_stops_at_once(tmp_path: Path, name: str) -> None:
    with make_pair(tmp_path) as pair, Origin() as origin:
        assert hello_through(pair.socks_port, origin) == HELLO  # a tunnel is there, and kept
        half, _ = half_of(pair, name)
        assert half.stop(timeout_s=5) == 0


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(tmp_path: Path, name: str, number: signal.Signals) -> None:
    with (
        make_pair(tmp_path) as pair,
        EchoServer() as server,
        socks_connect(pair.socks_port, "127.0.0.1", server.port, timeout_s=BOUND_S) as sock,
    ):
        half, _ = half_of(pair, name)
        half.send_signal(number)
        half.wait_for_line(f"{number.name}: draining")
        half.send_signal(number)
        assert half.wait(timeout_s=5) == 128 + number
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


@pytest.mark.parametrize("name", HALVES)
def test_what_still_runs_after_drain_s_is_reset(tmp_path: Path, name: str) -> None:
    limits = {"limits": {"drain_s": 0.5}}
    with (
        make_pair(tmp_path, inbound=limits, outbound=limits) as pair,
        EchoServer() as server,
        socks_connect(pair.socks_port, "127.0.0.1", server.port, timeout_s=BOUND_S) as sock,
    ):
        half, _ = half_of(pair, name)
        half.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert half.wait() == 0
        half.wait_for_line(r"after 0\.5 s: reset")


# It cannot start.


def assert_one_clear_line(process: Process, *words: str) -> None:
    """It ended with 2, and said why on one line."""
    assert process.wait() == EXIT_NOT_STARTED
    assert len(process.lines) == 1, process.log
    for word in words:
        assert word in process.lines[0]


def start_half(name: str, directory: Path, overrides: Settings) -> Process:
    if name == "inbound":
        return start_inbound(directory, Keys.generate(), overrides)
    return start_outbound(directory, Keys.generate(), 1, overrides)


def test_a_busy_port_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with never_reading() as port:
        address = f"127.0.0.1:{port}"
        with start_half("inbound", tmp_path, {"listen": [address]}) as process:
            assert_one_clear_line(process, "cannot listen on", address, "Address already in use")
        with start_half("outbound", tmp_path, {"listen": [{"address": address}]}) as process:
            assert_one_clear_line(process, "cannot listen on", address, "Address already in use")


@pytest.mark.parametrize(
    ("name", "overrides", "key"),
    [
        ("inbound", {"private_key": None}, "private_key"),
        ("inbound", {"users": [{"key": None}]}, "users[0].key"),
        ("outbound", {"servers": [{"public_key": None}]}, "servers[0].public_key"),
        ("outbound", {"servers": [{"user_key": None}]}, "servers[0].user_key"),
    ],
)
def test_a_missing_key_is_one_line_and_exit_2(tmp_path: Path, name: str, overrides: Settings, key: str) -> None:
    with start_half(name, tmp_path, overrides) as process:
        assert_one_clear_line(process, f"{name}.toml", key)


@pytest.mark.parametrize(
    ("name", "overrides", "key"),
    [
        ("inbound", {"private_key": None, "private_key_file": "not-there"}, "private_key_file"),
        ("outbound", {"servers": [{"user_key": None, "user_key_file": "not-there"}]}, "servers[0].user_key_file"),
    ],
)
def test_a_missing_key_file_is_one_line_and_exit_2(tmp_path: Path, name: str, overrides: Settings, key: str) -> None:
    with start_half(name, tmp_path, overrides) as process:
        assert_one_clear_line(process, key, "not-there", "No such file or directory")


@pytest.mark.parametrize("name", HALVES)
def test_an_unreadable_settings_file_is_one_line_and_exit_2(tmp_path: Path, name: str) -> None:
    for path, why in ((tmp_path / "absent.toml", "No such file or directory"), (tmp_path, "Is a directory")):
        with start_daemon(f"reflex-{name}", path) as process:
            assert_one_clear_line(process, str(path), why)


# Root may read everything: it becomes "nobody" while it reads the settings.
AS_NOBODY = """
import os, reflex.cli

def as_nobody(load):
    def load_as_nobody(path):
        os.seteuid(65534)
        try:
            return load(path)
        finally:
            os.seteuid(0)
    return load_as_nobody

if os.geteuid() == 0:
    reflex.cli.load_inbound = as_nobody(reflex.cli.load_inbound)
    reflex.cli.load_outbound = as_nobody(reflex.cli.load_outbound)
"""


@pytest.mark.parametrize("name", HALVES)
def test_a_settings_file_of_somebody_else_is_one_line_and_exit_2(tmp_path: Path, name: str) -> None:
    path = tmp_path / "locked.toml"
    path.touch(mode=0)
    with start_daemon(f"reflex-{name}", path, prelude=AS_NOBODY) as process:
        assert_one_clear_line(process, str(path), "Permission denied")


# What it says of itself.


def run_half(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"from reflex.cli import {DAEMONS[name]} as main; raise SystemExit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=BOUND_S, check=False
    )


@pytest.mark.parametrize("name", DAEMONS)
def test_version_and_help_are_on_stdout(name: str) -> None:
    version = run_half(name, "--version")
    assert (version.returncode, version.stdout, version.stderr) == (0, f"{name} {__version__}\n", "")
    help_text = run_half(name, "--help")
    assert (help_text.returncode, help_text.stderr) == (0, "")
    for word in ("--config FILE", "--log-level", "--version", "examples:", f"{name} -c"):
        assert word in help_text.stdout


@pytest.mark.parametrize("name", DAEMONS)
def test_a_wrong_command_line_is_exit_2_without_a_traceback(name: str) -> None:
    for arguments in ([], ["-c"], ["-c", "x.toml", "--log-level", "loud"]):
        done = run_half(name, *arguments)
        assert (done.returncode, done.stdout) == (EXIT_NOT_STARTED, "")
        assert done.stderr.startswith("usage: ")
        assert "Traceback" not in done.stderr
