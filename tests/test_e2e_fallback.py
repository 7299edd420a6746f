"""What is not Reflex gets from the server's port what the web server alone would give: real nginx, byte for byte."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reflex.net.options import set_reset_on_close
from tests.conftest import require_program
from tests.processes import (
    HELLO,
    HalfCloseServer,
    Keys,
    LoopbackServer,
    Origin,
    Pair,
    make_pair,
    receive_exactly,
    run_curl,
    socks_connect,
    start_inbound,
)
from tests.webserver import BOUND_S, Answer, converse, running_nginx, tls_hello, without_dates

MIB = 1 << 20
# How long the web server and the daemon wait for somebody who says nothing.
WEB_PATIENCE_S = 1
DAEMON_PATIENCE_S = 1
PAGE = b"<!doctype html><title>a page</title>\n"
FILE = random.Random(10).randbytes(10 * MIB)

BROWSER_HEADERS = (
    "Host: vpn.example.org\r\n"
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n"
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n"
    "Accept-Language: en-US,en;q=0.5\r\n"
    "Accept-Encoding: gzip, deflate\r\n"
)


@pytest.fixture(scope="module")
def nginx_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    directory = tmp_path_factory.mktemp("nginx")
    site = directory / "site"
    site.mkdir()
    (site / "index.html").write_bytes(PAGE)
    (site / "file").write_bytes(FILE)
    with running_nginx(directory, patience_s=WEB_PATIENCE_S) as (_, port):
        yield port


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, nginx_port: int) -> Iterator[Pair]:
    inbound = {"fallback": f"127.0.0.1:{nginx_port}", "limits": {"handshake_timeout_s": DAEMON_PATIENCE_S}}
    with make_pair(tmp_path_factory.mktemp("pair"), inbound=inbound) as both:
        yield both


# A browser.


def test_a_browsers_get_comes_back_whole(pair: Pair) -> None:
    request = f"GET / HTTP/1.1\r\n{BROWSER_HEADERS}Connection: close\r\n\r\n".encode()
    answer = converse(pair.inbound_port, [request])
    assert answer.received.startswith(b"HTTP/1.1 200 OK\r\nServer: nginx")
    assert answer.received.endswith(b"\r\n\r\n" + PAGE)
    assert answer.ending == "FIN"


def test_a_kept_connection_serves_requests_and_a_large_file(pair: Pair) -> None:
    client = http.client.HTTPConnection("127.0.0.1", pair.inbound_port, timeout=BOUND_S)
    client.connect()
    first_socket = client.sock
    for path, body in (("/", PAGE), ("/file", FILE), ("/", PAGE)):
        client.request("GET", path)
        assert hashlib.sha256(client.getresponse().read()).digest() == hashlib.sha256(body).digest()
        assert client.sock is first_socket
    client.close()


def test_curl_takes_the_servers_port_for_a_web_server(pair: Pair) -> None:
    require_program("curl")
    done = run_curl(f"http://127.0.0.1:{pair.inbound_port}/file")
    assert (done.returncode, done.stdout == FILE) == (0, True), done.stderr


def test_a_real_client_works_on_the_same_port_between_browsers(pair: Pair) -> None:
    with (
        Origin() as origin,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", pair.inbound_port, timeout=BOUND_S)) as browser,
    ):
        browser.request("GET", "/")
        client = http.client.HTTPConnection("127.0.0.1", origin.port)
        client.sock = socks_connect(pair.socks_port, "127.0.0.1", origin.port)
        client.request("GET", "/hello")
        assert client.getresponse().read() == HELLO
        client.close()
        assert browser.getresponse().read() == PAGE


# Everything else: compared with the web server itself.


def random_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


OPENINGS: dict[str, list[bytes]] = {
    "nothing": [],
    "HTTP GET": [f"GET / HTTP/1.1\r\n{BROWSER_HEADERS}\r\n".encode()],
    "HTTP GET in pieces": [b"G", b"ET / HTTP/1.1\r", b"\nHost: x\r\n", b"\r\n"],
    "HTTP GET of nothing": [f"GET /nothing HTTP/1.1\r\n{BROWSER_HEADERS}\r\n".encode()],
    "two HTTP requests at once": [b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n"],
    "HTTP POST": [b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n", b"hello"],
    "HTTP/0.9": [b"GET /\r\n"],
    "HTTP/2 preface": [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)],
    "half an HTTP request": [b"GET / HTTP/1.1\r\nHost: vpn.exam"],
    "a method of its own": [b"BREW /pot HTTP/1.1\r\nHost: x\r\n\r\n"],
    "TLS hello": [tls_hello()],
    "half a TLS hello": [tls_hello()[:100]],
    **{f"{size} random bytes": [random_bytes(size)] for size in (1, 10, 75, 76, 77, 200)},
    "76 capital letters": [bytes(65 + byte % 26 for byte in random_bytes(76))],  # a method without end
    "76 random bytes in pieces": [random_bytes(76)[:40], random_bytes(76)[40:]],
}


def test_everything_gets_byte_for_byte_what_the_web_server_alone_would_send(pair: Pair, nginx_port: int) -> None:
    cases = [(name, then_fin) for name in OPENINGS for then_fin in (False, True)]

    def both(case: tuple[str, bool]) -> tuple[Answer, Answer]:
        name, then_fin = case
        direct, through = (
            without_dates(converse(port, OPENINGS[name], then_fin=then_fin)) for port in (nginx_port, pair.inbound_port)
        )
        return direct, through

    with ThreadPoolExecutor(len(cases)) as threads:  # most of the time they wait for the web server's patience
        answers = dict(zip(cases, threads.map(both, cases), strict=True))
    assert {case: through for case, (_, through) in answers.items()} == {
        case: direct for case, (direct, _) in answers.items()
    }
    # And they are not all the same.
    assert answers["nothing", False][0] == Answer(b"", "FIN")
    assert answers["HTTP GET", False][0].received.startswith(b"HTTP/1.1 200 OK")
    assert answers["TLS hello", False][0].received.startswith(b"HTTP/1.1 400 Bad Request")


# How connections end, with web servers that end them in their own ways.


@contextlib.contextmanager
def inbound_before(directory: Path, server: LoopbackServer) -> Iterator[int]:
    """A server with that fallback; gives its port."""
    with start_inbound(directory, Keys.generate(), {"fallback": server.address}) as process:
        yield process.wait_ready()[0][1]


class ResettingServer(LoopbackServer):
    """Says a word to the first bytes, and resets the connection once it was answered."""

    def serve(self, sock: socket.socket) -> None:
        sock.recv(65_536)
        sock.sendall(b"word")
        sock.recv(65_536)
        set_reset_on_close(sock)


class ResetWitness(LoopbackServer):
    """Answers the first bytes, and notes how the connection ends."""

    def __init__(self) -> None:
        self.ending = ""
        self.has_ended = threading.Event()
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        sock.sendall(sock.recv(65_536))
        try:
            self.ending = "data" if sock.recv(1) else "FIN"
        except ConnectionResetError:
            self.ending = "RST"
        self.has_ended.set()


def test_a_reset_by_the_web_server_is_passed_on(tmp_path: Path) -> None:
    with (
        ResettingServer() as server,
        inbound_before(tmp_path, server) as port,
        socket.create_connection(("127.0.0.1", port), BOUND_S) as sock,
    ):
        sock.sendall(b"hello")
        assert receive_exactly(sock, 4) == b"word"
        sock.sendall(b"and?")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


@pytest.mark.parametrize("ending", ["FIN", "RST"])
def test_the_web_server_sees_how_the_client_ended(tmp_path: Path, ending: str) -> None:
    with ResetWitness() as server, inbound_before(tmp_path, server) as port:
        with socket.create_connection(("127.0.0.1", port), BOUND_S) as sock:
            sock.sendall(b"hello")
            assert receive_exactly(sock, 5) == b"hello"
            if ending == "RST":
                set_reset_on_close(sock)
        assert server.has_ended.wait(BOUND_S)
        assert server.ending == ending


def test_the_web_server_may_answer_after_the_clients_fin(tmp_path: Path) -> None:
    with HalfCloseServer() as server, inbound_before(tmp_path, server) as port:
        answer = converse(port, [random_bytes(76), FILE], then_fin=True)
        assert answer == Answer(b"%d\n" % (76 + len(FILE)), "FIN")
