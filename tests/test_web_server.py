"""reflex.net.web_server: the fallback's address, which answers if any does, and is never the server's own."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from reflex.errors import StartError
from reflex.net import web_server
from reflex.net.listener import open_listening
from reflex.net.web_server import MAX_TRIED, find_web_server, web_server_address
from tests.conftest import require_ipv6
from tests.ends import HOST, NO_SUCH_NAME, refusing_port
from tests.loops import in_loop


@contextlib.contextmanager
def listening(host: str = HOST, port: int = 0) -> Iterator[tuple[socket.socket, int]]:
    with open_listening(host, port) as sock:
        yield sock, sock.getsockname()[1]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what addresses every name has."""

    real = socket.getaddrinfo

    def have(*addresses: str) -> None:
        def getaddrinfo(host: str, port: int, *more: Any, **others: Any) -> list[Any]:
            if host in addresses:
                return list(real(host, port, *more, **others))
            families = [socket.AF_INET6 if ":" in each else socket.AF_INET for each in addresses]
            return [
                (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
                for family, address in zip(families, addresses, strict=True)
            ]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return have


def test_of_several_addresses_the_first_that_answers_is_taken(
    names: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    names("127.0.0.5", "::1", HOST, "127.0.0.7")
    with listening() as (_, port):
        assert find_web_server("localhost", port, []).host == HOST
    assert not caplog.records


def test_where_none_answers_it_is_the_first_and_the_log_says_so(
    names: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    names("127.0.0.5", "127.0.0.7")
    with refusing_port() as port:
        assert find_web_server("web.example", port, []).host == "127.0.0.5"
    assert caplog.record_tuples == [
        (
            "reflex.net.web_server",
            logging.WARNING,
            f"fallback: the web server at web.example:{port} does not answer now; 127.0.0.5:{port} is taken for it",
        )
    ]


def test_a_long_list_is_not_tried_to_its_end(names: Callable[..., None]) -> None:
    silent = [f"127.0.0.{number}" for number in range(10, 10 + MAX_TRIED)]
    names(*silent, HOST)
    with listening() as (_, port):
        assert find_web_server("web.example", port, []).host == silent[0]


def test_a_single_address_is_taken_without_a_try() -> None:
    with listening() as (sock, port):
        assert str(find_web_server(HOST, port, [])) == f"{HOST}:{port}"
        with pytest.raises(BlockingIOError):
            sock.accept()


@pytest.mark.parametrize(
    ("listen", "fallback"),
    [
        (HOST, HOST),
        (HOST, "::ffff:127.0.0.1"),
        (HOST, "0.0.0.0"),
        ("0.0.0.0", "127.0.0.9"),
        ("0.0.0.0", "0.0.0.0"),
        ("::1", "::1"),
        ("::", "::1"),
        ("::", "::"),
    ],
)
def test_the_server_itself_is_no_web_server(listen: str, fallback: str) -> None:
    if listen == "::1":
        require_ipv6()
    with listening(listen) as (sock, port), pytest.raises(StartError, match=r"^fallback: .* is this server itself$"):
        find_web_server(fallback, port, [sock])


def test_any_address_of_the_machine_is_the_server_itself_where_that_listens_on_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web_server, "is_own", lambda ip: ip == "192.0.2.7")
    with listening("0.0.0.0") as (sock, port):
        with pytest.raises(StartError, match=rf"^fallback: 192\.0\.2\.7:{port} is this server itself$"):
            find_web_server("192.0.2.7", port, [sock])
        assert find_web_server("192.0.2.8", port, [sock]).host == "192.0.2.8"
        assert find_web_server("::1", port, [sock]).host == "::1"  # which 0.0.0.0 does not cover


def test_another_port_or_another_address_of_this_machine_is_another_server(names: Callable[..., None]) -> None:
    with listening() as (sock, port), listening() as (_, other):
        assert find_web_server(HOST, other, [sock]).port == other
        assert find_web_server("127.0.0.2", port, [sock]).host == "127.0.0.2"
        names(HOST, "127.0.0.2")
        assert find_web_server("localhost", port, [sock]).host == "127.0.0.2"


def test_a_name_without_an_address_is_an_error(names: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(StartError, match=rf"^fallback: cannot resolve {NO_SUCH_NAME}: "):
        find_web_server(NO_SUCH_NAME, 80, [])
    names()
    with pytest.raises(StartError, match=r"^fallback: cannot resolve nobody: it has no address$"):
        find_web_server("nobody", 80, [])
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(StartError, match=r"^fallback: cannot resolve nobody: Name or service not known$"):
        find_web_server("nobody", 80, [])


@pytest.mark.usefixtures("each_loop")
@in_loop
async def test_it_is_found_beside_a_running_loop() -> None:
    with listening() as (_, port):
        for name in (HOST, "localhost"):
            assert (await web_server_address(name, port, [])).port == port
