"""A relay between the two daemons that changes what passes: curl gets an error, and never a wrong byte."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from bench.origin import block
from reflex.net.doors import ATTEMPTS
from reflex.protocol.wire import CLIENT_HELLO_SIZE, FATAL_DISCARD_BYTES, SERVER_HELLO_SIZE
from tests.conftest import require_program
from tests.processes import (
    Keys,
    LoopbackServer,
    Origin,
    eventually,
    expected_sha256,
    run_curl,
    start_inbound,
    start_outbound,
)

MIB: Final = 1 << 20
DOWNLOAD_BYTES: Final = 4 * MIB
UPLOAD_BYTES: Final = 4 * MIB
BOUND_S: Final = 20
# curl's exit codes: a proxy that gives no connection; an end before Content-Length; errors of sending and receiving.
PROXY_FAILED: Final = 97
BROKEN_TRANSFER: Final = {18, 52, 55, 56}

Change = Callable[[bytes], bytes]


class Middle(LoopbackServer):
    """Joins each connection with one to the server, and changes what passes in one direction behind a given byte.

    Attributes:
        at: the bytes of each connection that pass unchanged; None: all of them.
        to_server: which direction is changed.
        change: makes of what comes next what is passed on; that one piece alone.
        changes: how often that was.
    """

    def __init__(self, port: int) -> None:
        self._target_port = port
        self.at: int | None = None
        self.to_server = True
        self.change: Change = bytes
        self.changes = 0
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._target_port), BOUND_S) as server:
            server.settimeout(None)
            back = threading.Thread(target=self._copy, args=(server, sock), kwargs={"to_server": False}, daemon=True)
            back.start()
            self._copy(sock, server, to_server=True)
            back.join(BOUND_S)

    def _copy(self, source: socket.socket, sink: socket.socket, *, to_server: bool) -> None:
        left = self.at if self.to_server == to_server else None
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if left is None or len(data) <= left:
                    passed = data
                    left = None if left is None else left - len(data)
                else:
                    self.changes += 1
                    passed = data[:left] + self.change(data[left:])
                    left = None
                sink.sendall(passed)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def content(size: int) -> bytes:
    """What the origin sends for ``/bytes/{size}``."""
    return (block() * (size // len(block()) + 1))[:size]


def flip_first_bit(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def cut(data: bytes) -> bytes:
    """FIN comes next, in this direction."""
    raise ConnectionAbortedError


CHANGES: Final[dict[str, Change]] = {
    "a bit is turned": flip_first_bit,
    "a byte is missing": lambda data: data[1:],
    "a byte is added": lambda data: b"\x00" + data,
    "the bytes come twice": lambda data: data + data,
    "the bytes are others": lambda data: os.urandom(len(data)),
    "a piece is missing": lambda _: b"",
    "it is cut": cut,
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with Origin() as server:
        yield server


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Middle, int]]:
    """The middle between both daemons, and the client's SOCKS5 port."""
    require_program("curl")
    impatient = {"limits": {"handshake_timeout_s": 1, "connect_timeout_s": 1}}
    keys = Keys.generate()
    directory = tmp_path_factory.mktemp("attacked")
    with (
        start_inbound(directory, keys) as inbound,
        Middle(inbound.wait_ready()[0][1]) as middle,
        start_outbound(directory, keys, middle.port, impatient) as outbound,
    ):
        yield middle, outbound.wait_ready()[0][1]


def curl(socks_port: int, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return run_curl("--proxy", f"socks5h://127.0.0.1:{socks_port}", *arguments)


@each_change
def test_a_download_that_is_changed_on_the_way_fails_and_what_came_is_right(
    attacked: tuple[Middle, int], origin: Origin, change: Change
) -> None:
    middle, socks_port = attacked
    middle.at, middle.to_server, middle.change, before = MIB, False, change, middle.changes
    done = curl(socks_port, f"{origin.url}/bytes/{DOWNLOAD_BYTES}")
    assert middle.changes > before
    assert done.returncode in BROKEN_TRANSFER, done.stderr
    assert len(done.stdout) < DOWNLOAD_BYTES
    assert content(DOWNLOAD_BYTES).startswith(done.stdout)


class Sink(LoopbackServer):
    """Reads, and answers nothing; ``got`` has what came on each connection."""

    def __init__(self) -> None:
        self.got: list[bytearray] = []
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        got = bytearray()
        self.got.append(got)
        while data := sock.recv(65_536):
            got += data


@each_change
def test_an_upload_that_is_changed_on_the_way_fails_and_what_came_is_right(
    tmp_path: Path, attacked: tuple[Middle, int], change: Change
) -> None:
    middle, socks_port = attacked
    # What follows is discarded, for up to 30 s or 64 KiB: the middle sends those at once, and the test need not wait.
    middle.change = lambda data: change(data) + bytes(FATAL_DISCARD_BYTES + 1)
    middle.at, middle.to_server, before = MIB, True, middle.changes
    upload = tmp_path / "upload"
    upload.write_bytes(content(UPLOAD_BYTES))
    with Sink() as sink:
        done = curl(socks_port, "--header", "Expect:", "--data-binary", f"@{upload}", f"http://{sink.address}/")
        assert eventually(lambda: bool(sink.got)), "its thread may not have had its turn before all was over"
    assert middle.changes > before
    assert done.returncode in BROKEN_TRANSFER, done.stderr
    assert done.stdout == b""
    (got,) = sink.got
    body = bytes(got.partition(b"\r\n\r\n")[2])
    assert len(body) < UPLOAD_BYTES
    assert content(UPLOAD_BYTES).startswith(body)


@pytest.mark.parametrize("at", [CLIENT_HELLO_SIZE - 1], ids="byte {}".format)
def test_a_changed_hello_gives_no_tunnel(attacked: tuple[Middle, int], origin: Origin, at: int) -> None:
    middle, socks_port = attacked
    middle.at, middle.to_server, middle.change, before = at, True, flip_first_bit, middle.changes
    done = curl(socks_port, f"{origin.url}/hello")
    assert middle.changes > before
    assert (done.returncode, done.stdout) == (PROXY_FAILED, b"")


@pytest.mark.parametrize("at", [SERVER_HELLO_SIZE - 1, SERVER_HELLO_SIZE], ids="byte {}".format)
def test_a_changed_answer_or_first_record_gives_no_answer(
    attacked: tuple[Middle, int], origin: Origin, at: int
) -> None:
    middle, socks_port = attacked
    middle.at, middle.to_server, middle.change, before = at, False, flip_first_bit, middle.changes
    done = curl(socks_port, f"{origin.url}/hello")
    assert 1 <= middle.changes - before <= ATTEMPTS  # it does not storm the server
    assert (done.returncode, done.stdout) == (PROXY_FAILED, b"")


def test_behind_all_that_a_middle_that_changes_nothing_is_not_noticed(
    attacked: tuple[Middle, int], origin: Origin
) -> None:
    middle, socks_port = attacked
    middle.at = None
    done = curl(
        socks_port,
        "--retry",
        "20",
        "--retry-all-errors",
        "--retry-max-time",
        "15",
        f"{origin.url}/bytes/{DOWNLOAD_BYTES}",
    )
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(done.stdout).hexdigest() == expected_sha256(DOWNLOAD_BYTES)
