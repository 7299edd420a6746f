"""reflex.net.options: what every TCP socket is set to, and what connections on loopback get instead."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from reflex.net import options
from reflex.net.options import (
    KEEPALIVE_INTERVAL_S,
    NEAR_S,
    PLAIN_CONTROL,
    RESET_ON_CLOSE,
    is_loopback,
    is_near,
    set_fin_on_close,
    set_options,
    set_reset_on_close,
    set_unpaced,
)

ONLY_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what Linux does")


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        yield sock


def keepalive_of(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def control_of(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


@pytest.fixture
def pacing_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose default paces; whether this one's does is another matter."""
    monkeypatch.setattr(options, "_is_paced", lambda: True)


def test_what_the_settings_ask_for_is_set(sock: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    set_options(sock, nodelay=False, keepalive_s=0)
    assert not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert not keepalive_of(sock)
    set_options(sock, nodelay=True, keepalive_s=600)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 600
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == KEEPALIVE_INTERVAL_S
    monkeypatch.delattr(socket, "TCP_KEEPIDLE")
    set_options(sock, nodelay=True, keepalive_s=7)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 7


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.8.7", "::1"])
def test_what_is_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["128.0.0.1", "12.7.0.1", "::2", "0.0.0.0", "localhost"])
def test_what_is_not(host: str) -> None:
    assert not is_loopback(host)


@ONLY_LINUX
@pytest.mark.usefixtures("pacing_system")
def test_on_loopback_nothing_is_paced_and_nobody_is_probed(sock: socket.socket) -> None:
    set_options(sock, nodelay=True, keepalive_s=600, on_loopback=True)
    set_unpaced(sock)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert control_of(sock) == PLAIN_CONTROL
    assert not keepalive_of(sock)


@ONLY_LINUX
@pytest.mark.usefixtures("pacing_system")
def test_elsewhere_the_systems_congestion_control_stays(sock: socket.socket) -> None:
    before = control_of(sock)
    set_options(sock, nodelay=True, keepalive_s=600)
    assert control_of(sock) == before


@ONLY_LINUX
@pytest.mark.parametrize("default", [b"reno", b"cubic", b"bbr", b"bbr2"])
def test_a_default_that_does_not_pace_stays(default: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "getsockopt", lambda *_: default.ljust(16, b"\0"))
    options._is_paced.cache_clear()
    try:
        assert options._is_paced() is default.startswith(b"bbr")
    finally:
        options._is_paced.cache_clear()


def test_a_system_without_the_option_is_left_as_it_is(sock: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_CONGESTION", None)
    before = control_of(sock)
    set_unpaced(sock)
    assert control_of(sock) == before


def test_closing_sends_rst_or_fin_as_was_asked_last(sock: socket.socket) -> None:
    def linger() -> bytes:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)

    before = linger()
    set_reset_on_close(sock)
    assert linger() == RESET_ON_CLOSE
    set_fin_on_close(sock)
    assert linger() == before


def test_how_it_ends_is_asked_of_a_socket_that_is_gone_without_harm(sock: socket.socket) -> None:
    sock.close()
    set_reset_on_close(sock)
    set_fin_on_close(sock)


@pytest.mark.parametrize(
    ("round_trip_us", "near"), [(0, False), (1, True), (int(NEAR_S * 1e6), True), (int(NEAR_S * 1e6) + 1, False)]
)
def test_who_is_near_by_the_kernels_measurement(round_trip_us: int, near: bool) -> None:  # noqa: FBT001
    class Socket:
        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
            return (bytes(68) + round_trip_us.to_bytes(4, sys.byteorder))[:size]

    sock: Any = Socket()
    assert is_near(sock) is near


def test_where_nobody_knows_nobody_is_near(sock: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        def getsockopt(self, *_: int) -> bytes:
            return bytes(60)

    short: Any = Short()
    assert not is_near(short)
    assert not is_near(sock)  # never connected
    sock.close()
    assert not is_near(sock)
    monkeypatch.setattr(options, "_TCP_INFO", None)
    assert not is_near(short)
