"""No key gets out of running daemons: not by a log line at debug level, not by a traceback, not by /proc."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Final

import pytest

from reflex.protocol.keys import traffic_key
from reflex.protocol.wire import Suite
from tests.processes import (
    HELLO,
    Keys,
    LoopbackServer,
    Origin,
    Process,
    Settings,
    SocksReplyError,
    hello_through,
    refusing_port,
    socks_connect,
    start_inbound,
    start_outbound,
)
from tests.test_secrets import PASSWORD, keys_of, leaks

BOUND_S: Final = 20
# Python that runs in a daemon first: what a handshake gives is written to a file, so that the test can look for it.
TELL_ROOTS: Final = """
import os
from reflex.protocol.noise import Transcript
_split = Transcript.split
def _telling(self):
    secrets = _split(self)
    with open({path!r}, "ab") as file:
        file.write(b"".join(secrets[:3]) + self._chaining_key + self._key)
    return secrets
Transcript.split = _telling
"""
# And that has the daemon fail where it holds keys: while it opens a hello, and in the middle of a record.
BREAK_HELLOS: Final = """
from reflex.protocol import handshake
def _broken(*args, **kwargs):
    raise RuntimeError("a bug in the handshake")
handshake._mask_id = _broken
"""
BREAK_RECORDS: Final = """
from reflex.protocol.keys import CipherState
def _broken(self, *args):
    raise RuntimeError("a bug in a record")
CipherState.open_body = _broken
"""


def told_roots(path: Path) -> list[bytes]:
    content = path.read_bytes()
    assert content
    assert len(content) % 32 == 0
    return sorted({content[at : at + 32] for at in range(0, len(content), 32)})


def seen_of(process: Process) -> str:
    """What others on the machine can see of a process and its children."""
    pids = [process.pid]
    for pid in pids:
        pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    kinds = ("cmdline", "environ", "status", "comm")
    parts = [Path(f"/proc/{pid}/{kind}").read_bytes() for pid in pids for kind in kinds]
    assert b"-c" in parts[0]
    return b"\n".join(parts).decode(errors="surrogateescape")


def log_of(process: Process) -> str:
    return "\n".join(process.lines)


class Garbler(LoopbackServer):
    """Joins a connection with one to ``port`` and answers behind the server's hello with bytes of its own."""

    def __init__(self, port: int) -> None:
        self._target_port = port
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._target_port), BOUND_S) as server:
            server.sendall(sock.recv(65_536))
            sock.sendall(server.recv(40) + os.urandom(1_000))
            while sock.recv(65_536):
                pass


def refused(socks_port: int, target_port: int = 80, *, login: tuple[str, str] | None = None) -> None:
    with pytest.raises((SocksReplyError, ConnectionError, TimeoutError)):
        socks_connect(socks_port, "127.0.0.1", target_port, login=login, timeout_s=BOUND_S).close()


# A greeting without a password, and CONNECT to 127.0.0.1:80 (RFC 1928, sections 3 and 4).
SOCKS_REQUEST: Final = bytes.fromhex("050100 05010001 7f000001 0050")
DEBUG: Final = ["--log-level", "debug"]
IMPATIENT: Final[Settings] = {"limits": {"handshake_timeout_s": 0.5, "connect_timeout_s": 0.5, "drain_s": 1}}


def test_two_daemons_show_no_key_through_what_goes_well_and_what_does_not(tmp_path: Path) -> None:
    keys, other = Keys.generate(), Keys.generate()
    listen: Settings = {"listen": [{}, {"address": "127.0.0.1:0", "username": "ursula", "password": PASSWORD}]}
    roots_file = tmp_path / "roots"
    tell = TELL_ROOTS.format(path=str(roots_file))
    inbound_more = {"workers": 2, "targets": {"deny": ["127.0.0.1:9"]}}
    folders = [tmp_path / name for name in ("right", "wrong user", "wrong server", "garbled")]
    for folder in folders:
        folder.mkdir()
    with contextlib.ExitStack() as stack:
        origin = stack.enter_context(Origin())
        refusing = stack.enter_context(refusing_port())
        inbound = stack.enter_context(start_inbound(tmp_path, keys, inbound_more, arguments=DEBUG, prelude=tell))
        port = inbound.wait_ready()[0][1]
        garbler = stack.enter_context(Garbler(port))
        wrong_user: Settings = {"servers": [{"user_key": other.user_key}], **IMPATIENT}
        wrong_server: Settings = {"servers": [{"public_key": other.public_key}], **IMPATIENT}
        clients = [
            stack.enter_context(start_outbound(folder, keys, to, overrides, arguments=DEBUG, prelude=tell))
            for folder, to, overrides in zip(
                folders,
                (port, port, port, garbler.port),
                (listen, wrong_user, wrong_server, IMPATIENT),
                strict=True,
            )
        ]
        right, login = (address[1] for address in clients[0].wait_ready())
        assert hello_through(right, origin) == HELLO
        with socks_connect(login, "127.0.0.1", origin.port, login=("ursula", PASSWORD)):
            pass
        refused(login, login=("ursula", "a wrong password"))
        refused(right, refusing)
        refused(right, 9)
        for each in clients[1:]:
            refused(each.wait_ready()[0][1])
        with socket.create_connection(("127.0.0.1", port), BOUND_S) as stray:
            stray.sendall(os.urandom(76) + base64.b64decode(other.user_key))
        with socket.create_connection(("127.0.0.1", right), BOUND_S) as stray:
            stray.sendall(b"GET / HTTP/1.1\r\n\r\n")
        inbound.wait_for_line("DEBUG .*hello refused")
        clients[1].wait_for_line("the user key is wrong")
        clients[3].wait_for_line("protocol error")
        processes = [inbound, *clients]
        shown = [seen_of(process) for process in processes]
        for process in processes:
            process.send_signal(signal.SIGUSR1)
            process.wait_for_line("statistics: ")
        for process in reversed(processes):
            process.stop()
        shown += [log_of(process) for process in processes]
    secrets = [*keys_of(keys), base64.b64decode(other.user_key), *told_roots(roots_file)]
    for root in told_roots(roots_file):
        for suite in Suite:
            secrets += traffic_key(root, suite)
    assert [found for each in shown if (found := leaks(each, *secrets))] == []


@pytest.mark.parametrize("breakage", [BREAK_HELLOS, BREAK_RECORDS], ids=["in a hello", "in a record"])
@pytest.mark.parametrize("half", ["inbound", "outbound"])
def test_a_traceback_of_a_daemon_shows_no_key(half: str, breakage: str, tmp_path: Path) -> None:
    keys = Keys.generate()
    roots_file = tmp_path / "roots"
    tell = TELL_ROOTS.format(path=str(roots_file))
    broken = tell + breakage
    with (
        start_inbound(tmp_path, keys, arguments=DEBUG, prelude=broken if half == "inbound" else tell) as inbound,
        start_outbound(
            tmp_path,
            keys,
            inbound.wait_ready()[0][1],
            IMPATIENT,
            arguments=DEBUG,
            prelude=broken if half == "outbound" else tell,
        ) as outbound,
    ):
        with socket.create_connection(("127.0.0.1", outbound.wait_ready()[0][1]), BOUND_S) as application:
            application.sendall(SOCKS_REQUEST)
            (inbound if half == "inbound" else outbound).wait_for_line("RuntimeError: a bug")
        shown = log_of(inbound) + log_of(outbound)
        assert "Traceback" in shown
    secrets = keys_of(keys) + (told_roots(roots_file) if roots_file.exists() else [])
    assert leaks(log_of(inbound) + log_of(outbound), *secrets) == []
