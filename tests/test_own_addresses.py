"""reflex.net.own_addresses: which addresses are this machine's."""

from __future__ import annotations

import errno
import socket

import pytest

from reflex.net import own_addresses
from reflex.net.own_addresses import is_own
from tests.conftest import require_ipv6


def addresses_of_this_machine() -> list[str]:
    """Its addresses towards the outside, where it has any."""
    found = []
    for family, far in ((socket.AF_INET, "192.0.2.77"), (socket.AF_INET6, "2001:db8::77")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((far, 9))
            except OSError:
                continue
            found.append(probe.getsockname()[0])
    return found


@pytest.mark.parametrize("ip", ["127.0.0.1", "127.3.2.1", "::1", *addresses_of_this_machine()])
def test_own(ip: str) -> None:
    if ip == "::1":
        require_ipv6()
    assert is_own(ip)


@pytest.mark.parametrize("ip", ["8.8.8.8", "192.0.2.200", "2606:4700::1111", "2001:db8::2"])
def test_not_own(ip: str) -> None:
    assert not is_own(ip)


@pytest.mark.parametrize("ip", addresses_of_this_machine())
def test_where_everybody_may_bind_everything_the_source_tells(ip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_addresses, "_is_bindable", lambda *_: True)
    assert is_own(ip)
    assert not is_own("8.8.8.8")
    assert not is_own("2606:4700::1111")


def test_without_a_descriptor_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socket", no_socket)
    with pytest.raises(OSError, match="Too many open files"):
        is_own("8.8.8.8")


def test_a_machine_without_ipv6_has_no_ipv6_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", no_socket)
    assert not is_own("2606:4700::1111")


def test_where_everybody_may_bind_everything_an_address_without_a_way_to_it_is_not_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_addresses, "_is_bindable", lambda *_: True)
    assert not is_own("fe80::1")  # no link is named
