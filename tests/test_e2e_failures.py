"""The pair where something is wrong: keys, clocks, a half that is killed."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.processes import (
    HELLO,
    Keys,
    LoopbackServer,
    Origin,
    Pair,
    Settings,
    SocksReplyError,
    hello_through,
    make_pair,
    receive_exactly,
    socks_connect,
    start_inbound,
    start_outbound,
)

MIB = 1 << 20
BOUND_S = 20
AT_ONCE_S = 10  # on a busy machine; the keepalive takes 40 s
HANDSHAKE_TIMEOUT_S = 1
DATE_TIMEOUT_S = 1  # how long the client waits for a fallback's Date, where its hello was not answered
GENERAL_FAILURE = 1  # SOCKS5's reply (RFC 1928, section 6)
# For a client that is to fail: how long it tries.
IMPATIENT: Settings = {"limits": {"handshake_timeout_s": HANDSHAKE_TIMEOUT_S, "connect_timeout_s": DATE_TIMEOUT_S}}


def clock_off_by(seconds: int) -> str:
    """Python that puts a process's clock off, before the daemon is imported."""
    return f"import time; _true_time = time.time; time.time = lambda: _true_time() + {seconds}"


# Wrong keys, wrong clocks.


class Recorder(LoopbackServer):
    """Joins each connection with one to ``port``, and keeps what comes from there."""

    def __init__(self, port: int) -> None:
        self.from_server = bytearray()
        self.from_clients = bytearray()
        self._target_port = port
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._target_port), BOUND_S) as server:
            back = threading.Thread(target=self._copy, args=(server, sock, self.from_server), daemon=True)
            back.start()
            self._copy(sock, server, self.from_clients)
            back.join(BOUND_S)

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                record += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


class DateServer(LoopbackServer):
    """The least of a web server: answers everything with an error, and says what time it is."""

    def serve(self, sock: socket.socket) -> None:
        sock.recv(65_536)
        sock.sendall(f"HTTP/1.1 400 Bad Request\r\nDate: {formatdate(usegmt=True)}\r\n\r\n".encode())


WRONG = {
    "user key": ({"servers": [{"user_key": Keys.generate().user_key}]}, ""),
    "server key": ({"servers": [{"public_key": Keys.generate().public_key}]}, ""),
    "clock": ({}, clock_off_by(-3600)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_client_with_a_wrong_key_or_clock_is_told_nothing_and_says_what_may_be_wrong(
    tmp_path: Path, wrong: str
) -> None:
    keys = Keys.generate()
    overrides, prelude = WRONG[wrong]
    with (
        start_inbound(tmp_path, keys) as inbound,
        Recorder(inbound.wait_ready()[0][1]) as recorder,
        start_outbound(tmp_path, keys, recorder.port, {**IMPATIENT, **overrides}, prelude=prelude) as outbound,
    ):
        socks_port = outbound.wait_ready()[0][1]
        started_s = time.monotonic()
        with pytest.raises(SocksReplyError) as caught:
            socks_connect(socks_port, "127.0.0.1", 80, timeout_s=BOUND_S)
        assert (
            time.monotonic() - started_s < HANDSHAKE_TIMEOUT_S + DATE_TIMEOUT_S + 8
        )  # with one of the daemon's own: 11
        assert caught.value.status == GENERAL_FAILURE
        outbound.wait_for_line(
            rf"WARNING .*:{recorder.port}: the server did not answer the hello within {HANDSHAKE_TIMEOUT_S} s;"
            r" the server's public key, the user id or the user key is wrong,"
            r" or this machine's clock is off by more than 120 s \(it says [-0-9]+ [:0-9]+ UTC\)"
        )
        assert len(recorder.from_clients) >= 76
        assert bytes(recorder.from_server) == b""
        if wrong == "clock":  # the hello was authentic: its operator learns of it
            inbound.wait_for_line("WARNING .*hello refused: ")


@pytest.mark.parametrize(("seconds", "word"), [(-3600, "behind"), (3600, "ahead of")])
def test_a_client_whose_clock_is_off_recovers_by_the_fallbacks_date(tmp_path: Path, seconds: int, word: str) -> None:
    keys = Keys.generate()
    with (
        Origin() as origin,
        DateServer() as web,
        start_inbound(tmp_path, keys, {"fallback": web.address}) as inbound,
        start_outbound(tmp_path, keys, inbound.wait_ready()[0][1], prelude=clock_off_by(seconds)) as outbound,
    ):
        assert hello_through(outbound.wait_ready()[0][1], origin) == HELLO
        found = outbound.wait_for_line(rf"WARNING .*this machine's clock is (\d+) s {word} the server's")
        assert abs(int(found.group(1)) - abs(seconds)) <= 20


@pytest.mark.parametrize(
    ("overrides", "prelude", "line"),
    [
        (WRONG["user key"][0], "", "the clocks agree within 120 s, so the server's public key, .* is wrong"),
        (
            {},
            clock_off_by(-100_000),
            r"clock is off by -(100|99)\d\d\d s, too much to make up for: set it right",
        ),
    ],
    ids=["user key", "clock off by more than a day"],
)
def test_with_a_fallbacks_date_the_client_knows_whether_keys_or_clock_are_wrong(
    tmp_path: Path, overrides: Settings, prelude: str, line: str
) -> None:
    keys = Keys.generate()
    with (
        DateServer() as web,
        start_inbound(tmp_path, keys, {"fallback": web.address}) as inbound,
        start_outbound(tmp_path, keys, inbound.wait_ready()[0][1], overrides, prelude=prelude) as outbound,
    ):
        socks_port = outbound.wait_ready()[0][1]
        with pytest.raises(SocksReplyError) as caught:
            socks_connect(socks_port, "127.0.0.1", 80, timeout_s=BOUND_S)
        assert caught.value.status == GENERAL_FAILURE
        outbound.wait_for_line(f"WARNING .*{line}")


# A half is killed.


def send_without_end(sock: socket.socket) -> None:
    while True:
        sock.sendall(bytes(65_536))


def receive_to_the_end(sock: socket.socket) -> None:
    while sock.recv(65_536):
        pass


class Target(LoopbackServer):
    """Does what a connection's first byte says, and notes when and how the connection ended.

    ``d``: it sends without end; ``u``: it reads without end; ``i``: it waits.
    """

    def __init__(self) -> None:
        self.endings: queue.Queue[tuple[str, str, float]] = queue.Queue()
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        manner = receive_exactly(sock, 1).decode()
        sock.sendall(b"!")
        ending = "FIN"
        try:
            if manner == "d":
                send_without_end(sock)
            receive_to_the_end(sock)
        except (ConnectionResetError, BrokenPipeError):
            ending = "RST"
        self.endings.put((manner, ending, time.monotonic()))


@contextlib.contextmanager
def three_at_work(pair: Pair, target: Target) -> Iterator[dict[str, socket.socket]]:
    """Three applications, amid a download, amid an upload, and idle."""
    with contextlib.ExitStack() as open_sockets:
        sockets = {}
        for manner in "dui":
            sock = socks_connect(pair.socks_port, "127.0.0.1", target.port, timeout_s=BOUND_S)
            sockets[manner] = open_sockets.enter_context(sock)
            sock.sendall(manner.encode())
            assert receive_exactly(sock, 1) == b"!"
        receive_exactly(sockets["d"], MIB)
        sockets["u"].sendall(bytes(MIB))
        yield sockets


def test_when_the_server_is_killed_applications_are_reset_at_once_and_can_go_on_once_it_is_back(
    tmp_path: Path,
) -> None:
    with make_pair(tmp_path) as pair, Target() as target, Origin() as origin:
        with three_at_work(pair, target) as sockets:
            killed_s = time.monotonic()
            pair.inbound.kill()
            with pytest.raises(ConnectionResetError):
                sockets["i"].recv(1)
            with pytest.raises(ConnectionResetError):
                receive_to_the_end(sockets["d"])
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                send_without_end(sockets["u"])
            assert time.monotonic() - killed_s < AT_ONCE_S
        with pytest.raises(SocksReplyError) as caught:
            hello_through(pair.socks_port, origin)
        assert caught.value.status == GENERAL_FAILURE
        pair.outbound.wait_for_line("WARNING .*cannot connect to the server: ")
        pair.restart_inbound()
        assert hello_through(pair.socks_port, origin) == HELLO


def test_when_the_client_is_killed_targets_are_reset_at_once_and_new_requests_work_once_it_is_back(
    tmp_path: Path,
) -> None:
    with make_pair(tmp_path) as pair, Target() as target, Origin() as origin:
        with three_at_work(pair, target):
            killed_s = time.monotonic()
            pair.outbound.kill()
            endings = [target.endings.get(timeout=BOUND_S) for _ in range(3)]
        assert {(manner, how) for manner, how, _ in endings} == {("d", "RST"), ("u", "RST"), ("i", "RST")}
        assert max(at_s for _, _, at_s in endings) - killed_s < AT_ONCE_S
        pair.restart_outbound()
        assert hello_through(pair.socks_port, origin) == HELLO
