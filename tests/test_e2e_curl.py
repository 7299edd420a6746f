"""curl through SOCKS5 and a forward, to a local server: what works, and what curl is told where it does not.

curl -> reflex-outbound -> TUNNEL -> reflex-inbound -> web server
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require_ipv6, require_program
from tests.processes import (
    HELLO,
    Origin,
    Pair,
    SocksReplyError,
    make_pair,
    receive_exactly,
    refusing_port,
    run_curl,
    socks_connect,
)

DIAL_TIMEOUT_S = 1
# curl's exit codes.
CONNECT_FAILED = 7
SEND_FAILED = 55
RECEIVE_FAILED = 56
PROXY_FAILED = 97
# SOCKS5's replies (RFC 1928, section 6).
NOT_ALLOWED = 2
HOST_UNREACHABLE = 4
REFUSED = 5
TIMED_OUT = 6
COMMAND_NOT_SUPPORTED = 7

LOGIN = {"username": "ursula", "password": "p:ss@wörd"}


@pytest.fixture(scope="module", autouse=True)
def _curl() -> None:
    require_program("curl")


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with Origin() as server:
        yield server


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, origin: Origin) -> Iterator[Pair]:
    """Listeners: SOCKS5, SOCKS5 with a login, a forward to the web server, a forward to nobody."""
    with refusing_port() as refusing:
        listen = [
            {},
            {"protocol": "socks5", "address": "127.0.0.1:0", **LOGIN},
            {"protocol": "forward", "address": "127.0.0.1:0", "target": f"localhost:{origin.port}"},
            {"protocol": "forward", "address": "127.0.0.1:0", "target": f"127.0.0.1:{refusing}"},
        ]
        limits = {"dial_timeout_s": DIAL_TIMEOUT_S}
        directory = tmp_path_factory.mktemp("pair")
        with make_pair(directory, inbound={"limits": limits}, outbound={"listen": listen}) as both:
            yield both


def curl_by_socks(pair: Pair, url: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return run_curl("--proxy", f"socks5h://127.0.0.1:{pair.socks_port}", *arguments, url)


def curl_by_login(pair: Pair, url: str, user: str, password: str) -> subprocess.CompletedProcess[bytes]:
    port = pair.outbound_addresses[1][1]
    return run_curl("--proxy", f"socks5h://127.0.0.1:{port}", "--proxy-user", f"{user}:{password}", url)


def socks_reply(done: subprocess.CompletedProcess[bytes]) -> int:
    """The reply's code, as ``curl --verbose`` prints it."""
    assert done.returncode == PROXY_FAILED, done.stderr.decode()
    found = re.search(r"complete SOCKS5 connection to .* \((\d+)\)", done.stderr.decode())
    assert found, done.stderr.decode()
    return int(found.group(1))


# What works.


def test_curl_reaches_a_server_by_its_name(pair: Pair, origin: Origin) -> None:
    done = curl_by_socks(pair, f"http://localhost:{origin.port}/hello")
    assert (done.returncode, done.stdout) == (0, HELLO), done.stderr


def test_curl_reaches_a_server_by_its_ipv4_address(pair: Pair, origin: Origin) -> None:
    done = curl_by_socks(pair, f"http://127.0.0.1:{origin.port}/hello")
    assert (done.returncode, done.stdout) == (0, HELLO), done.stderr


def test_curl_reaches_a_server_by_its_ipv6_address(pair: Pair) -> None:
    require_ipv6()
    with Origin("::1") as origin:
        done = curl_by_socks(pair, f"http://[::1]:{origin.port}/hello")
    assert (done.returncode, done.stdout) == (0, HELLO), done.stderr


def test_curl_comes_by_ipv6(tmp_path: Path, origin: Origin) -> None:
    require_ipv6()
    with make_pair(tmp_path, outbound={"listen": [{"address": "[::1]:0"}]}) as pair:
        done = run_curl("--proxy", f"socks5h://[::1]:{pair.socks_port}", f"{origin.url}/hello")
    assert (done.returncode, done.stdout) == (0, HELLO), done.stderr


def test_curl_makes_several_requests_on_one_connection(pair: Pair, origin: Origin) -> None:
    before = origin.connections
    done = curl_by_socks(pair, f"{origin.url}/hello", f"{origin.url}/hello", f"{origin.url}/hello")
    assert (done.returncode, done.stdout) == (0, HELLO * 3), done.stderr
    assert origin.connections == before + 1


def test_curl_goes_through_a_forward_without_knowing_it(pair: Pair) -> None:
    done = run_curl(f"http://127.0.0.1:{pair.outbound_addresses[2][1]}/hello")
    assert (done.returncode, done.stdout) == (0, HELLO), done.stderr


# A login.


def test_curl_logs_in_with_user_and_password(pair: Pair, origin: Origin) -> None:
    done = curl_by_login(pair, f"{origin.url}/hello", LOGIN["username"], LOGIN["password"])
    assert (done.returncode, done.stdout) == (0, HELLO), done.stderr


@pytest.mark.parametrize(
    ("user", "password"), [(LOGIN["username"], "guess"), ("someone", LOGIN["password"])], ids=["password", "user"]
)
def test_curl_is_rejected_with_a_wrong_user_or_password(pair: Pair, origin: Origin, user: str, password: str) -> None:
    before = origin.connections
    done = curl_by_login(pair, f"{origin.url}/hello", user, password)
    assert done.returncode == PROXY_FAILED
    assert b"rejected by the SOCKS5 server" in done.stderr
    assert origin.connections == before


def test_curl_is_rejected_without_a_login_where_one_is_asked_for(pair: Pair, origin: Origin) -> None:
    done = run_curl("--proxy", f"socks5h://127.0.0.1:{pair.outbound_addresses[1][1]}", f"{origin.url}/hello")
    assert done.returncode == PROXY_FAILED
    assert b"No authentication method was acceptable" in done.stderr


# What does not work: the reply tells the truth.


def test_curl_is_told_that_a_target_refuses(pair: Pair) -> None:
    with refusing_port() as port:
        assert socks_reply(curl_by_socks(pair, f"http://127.0.0.1:{port}/")) == REFUSED
        assert socks_reply(curl_by_socks(pair, f"http://localhost:{port}/")) == REFUSED


def test_curl_is_told_that_a_name_has_no_address(pair: Pair) -> None:
    # A label of 64 characters is no name (RFC 1035, section 2.3.4): the answer needs no name server.
    assert socks_reply(curl_by_socks(pair, f"http://{'n' * 64}.invalid/")) == HOST_UNREACHABLE


@pytest.mark.parametrize("host", ["127.0.0.2", "10.11.12.13", "169.254.169.254", "[::ffff:10.1.2.3]", "[fd00::1]"])
def test_curl_is_told_that_a_target_is_not_allowed(pair: Pair, host: str) -> None:
    assert socks_reply(curl_by_socks(pair, f"http://{host}/")) == NOT_ALLOWED


def test_curl_is_told_that_a_name_leads_to_an_address_that_is_not_allowed(tmp_path: Path, origin: Origin) -> None:
    with make_pair(tmp_path, inbound={"targets": {"allow": []}}) as pair:
        assert socks_reply(curl_by_socks(pair, f"http://localhost:{origin.port}/hello")) == NOT_ALLOWED


def test_curl_is_told_that_a_target_does_not_answer(pair: Pair) -> None:
    with silent_port() as port:
        assert socks_reply(curl_by_socks(pair, f"http://127.0.0.1:{port}/")) == TIMED_OUT
        assert socks_reply(curl_by_socks(pair, f"http://localhost:{port}/")) == TIMED_OUT


def test_curl_is_reset_by_a_forward_whose_target_refuses(pair: Pair) -> None:
    done = run_curl(f"http://127.0.0.1:{pair.outbound_addresses[3][1]}/")
    # A busy curl may meet the reset while it still sends its request, or before it has looked whether it is connected.
    assert done.returncode in (RECEIVE_FAILED, SEND_FAILED, CONNECT_FAILED), done.stderr
    assert b"reset" in done.stderr or done.returncode == CONNECT_FAILED


def test_requests_still_work_after_all_that_failed(pair: Pair, origin: Origin) -> None:
    with refusing_port() as port:
        for _ in range(3):
            with pytest.raises(SocksReplyError) as caught:
                socks_connect(pair.socks_port, "127.0.0.1", port)
            assert caught.value.status == REFUSED
    done = curl_by_socks(pair, f"{origin.url}/hello")
    assert (done.returncode, done.stdout) == (0, HELLO), done.stderr


@pytest.mark.parametrize("command", [2, 3], ids=["BIND", "UDP ASSOCIATE"])
def test_commands_other_than_connect_are_not_supported(pair: Pair, command: int) -> None:
    with socket.create_connection(("127.0.0.1", pair.socks_port), 10) as sock:
        sock.sendall(b"\x05\x01\x00" + bytes([5, command, 0, 1, 127, 0, 0, 1, 0, 80]))
        assert receive_exactly(sock, 2) == b"\x05\x00"
        assert receive_exactly(sock, 10)[1] == COMMAND_NOT_SUPPORTED
        assert sock.recv(1) == b""


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port where a connection is neither taken nor refused: its queue is full, so SYNs are dropped."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(64):
            sock = sockets.enter_context(socket.socket())
            sock.settimeout(0.2)
            try:
                sock.connect(listener.getsockname())
            except TimeoutError:
                yield listener.getsockname()[1]
                return
        pytest.skip("this system takes connections without end: no port can be made silent")
