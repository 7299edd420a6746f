"""The harness itself, without the daemons: what it serves, waits for, measures and ends."""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from reflex.net.listener import open_listening, open_shared
from tests.check_coverage import shortfalls
from tests.conftest import require_ipv6, require_program
from tests.processes import (
    HELLO,
    EchoServer,
    ExpectationError,
    HalfCloseServer,
    Keys,
    LoopbackServer,
    Origin,
    Process,
    SocksReplyError,
    cpu_seconds,
    expected_sha256,
    inbound_settings,
    kept_port,
    merged,
    never_reading,
    open_descriptors,
    outbound_settings,
    peak_rss_bytes,
    pss_bytes,
    receive_exactly,
    refusing_port,
    rss_bytes,
    run_curl,
    socks_connect,
    to_toml,
)

WAIT_FOR_SIGTERM = "import signal, sys; signal.sigwait({signal.SIGTERM}); sys.exit(3)"
BLOCKED = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1});"


def python(code: str) -> Process:
    return Process("the program", [sys.executable, "-c", code])


def say(text: str) -> str:
    return f"import sys; print({text!r}, file=sys.stderr, flush=True);"


# Processes.


def test_waits_for_a_line_and_stops() -> None:
    with python(BLOCKED + say("one\nvalue 42") + WAIT_FOR_SIGTERM) as process:
        assert process.wait_for_line(r"value (\d+)").group(1) == "42"
        assert process.lines == ["one", "value 42"]
        assert process.is_running
        assert process.stop() == 3
        assert not process.is_running


def test_since_skips_earlier_lines() -> None:
    wait_once = "signal.sigwait({signal.SIGUSR1});"
    code = BLOCKED + say("tick") + wait_once + say("tick") + WAIT_FOR_SIGTERM
    with python(code) as process:
        process.wait_for_line("tick")
        seen = len(process.lines)
        process.send_signal(signal.SIGUSR1)
        process.wait_for_line("tick", since=seen)
        assert process.lines == ["tick", "tick"]


def test_reads_every_address_of_the_ready_line() -> None:
    line = "INFO ready: listening on 127.0.0.1:1080 (socks5), [::1]:8443, localhost:99"
    with python(BLOCKED + say(line) + WAIT_FOR_SIGTERM) as process:
        assert process.wait_ready() == [("127.0.0.1", 1080), ("::1", 8443), ("localhost", 99)]


def test_a_line_that_does_not_come_shows_the_log() -> None:
    with python(BLOCKED + say("something else") + WAIT_FOR_SIGTERM) as process:
        process.wait_for_line("else")
        with pytest.raises(ExpectationError, match=r"had not a line with 'ready'(.|\n)*something else"):
            process.wait_for_line("ready", timeout_s=0.05)


def test_an_early_end_is_told_at_once() -> None:
    with (
        python(say("no such file")) as process,
        pytest.raises(ExpectationError, match=r"ended without(.|\n)*no such file"),
    ):
        process.wait_for_line("ready", timeout_s=60)


def test_an_exception_in_the_context_carries_the_log_and_ends_the_program() -> None:
    process = python(BLOCKED + say("last words") + WAIT_FOR_SIGTERM)

    def fail() -> None:
        with process:
            process.wait_for_line("last words")
            raise RuntimeError("the test's own")

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert "last words" in "\n".join(caught.value.__notes__)
    assert not process.is_running


def test_kill() -> None:
    with python(BLOCKED + say("up") + WAIT_FOR_SIGTERM) as process:
        process.wait_for_line("up")
        assert process.kill() == -signal.SIGKILL


def test_proc_readers() -> None:
    with python(BLOCKED + "held = bytearray(b'x' * 50_000_000);" + say("up") + WAIT_FOR_SIGTERM) as process:
        process.wait_for_line("up")
        assert rss_bytes(process.pid) > 50_000_000
        assert pss_bytes(process.pid) > 50_000_000
        assert peak_rss_bytes(process.pid) >= rss_bytes(process.pid)
        assert 3 <= open_descriptors(process.pid) < 20
        assert 0 <= cpu_seconds(process.pid) < 10


def test_cpu_seconds_is_what_the_kernel_says() -> None:
    assert cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.5)


# Settings.


def test_toml_comes_back() -> None:
    keys = Keys.generate()
    awkward = {"text": 'quote " backslash \\ newline \n ü 🙂', "yes": True, "n": 3, "f": 1.5, "t": {"u": {"v": []}}}
    for settings in (inbound_settings(keys), outbound_settings(keys, 8443), awkward):
        assert tomllib.loads(to_toml(settings)) == settings


def test_overrides_are_merged() -> None:
    base = {"a": {"b": 1, "c": 2}, "l": [1, 2], "t": [{"x": 1, "y": 1}, {"x": 2}], "gone": 1}
    over = {"a": {"c": 3}, "l": [9], "t": [{"x": 7}], "gone": None, "new": {"k": 1}}
    assert merged(base, over) == {
        "a": {"b": 1, "c": 3},
        "l": [9],
        "t": [{"x": 7, "y": 1}, {"x": 2}],
        "new": {"k": 1},
    }
    assert merged({"t": [{"x": 1}]}, {"t": [{}, {"x": 2}]}) == {"t": [{"x": 1}, {"x": 2}]}


# Servers.


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_origin_serves_on_one_connection(host: str) -> None:
    if ":" in host:
        require_ipv6()
    body = bytes(range(256)) * 5_000
    with Origin(host) as origin:
        client = http.client.HTTPConnection(host, origin.port, timeout=10)
        for _ in range(2):
            client.request("GET", "/hello")
            assert client.getresponse().read() == HELLO
            client.request("GET", "/bytes/3000000")
            answer = client.getresponse().read()
            assert len(answer) == 3_000_000
            assert hashlib.sha256(answer).hexdigest() == expected_sha256(3_000_000)
            client.request("PUT", "/upload", body)
            assert client.getresponse().read().decode() == f"{hashlib.sha256(body).hexdigest()} {len(body)}\n"
        client.close()
        assert origin.connections == 1
        assert len(HELLO) == 128


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/bytes/x", 404)])
def test_origin_answers_what_it_does_not_know(path: str, status: int) -> None:
    with Origin() as origin:
        client = http.client.HTTPConnection(origin.host, origin.port, timeout=10)
        client.request("GET", path)
        assert client.getresponse().status == status
        client.close()


def test_curl_reaches_the_origin(tmp_path: Path) -> None:
    require_program("curl")
    upload = tmp_path / "upload"
    upload.write_bytes(b"u" * 3_000_000)  # large enough for curl to say "Expect: 100-continue"
    with Origin() as origin:
        assert run_curl(f"{origin.url}/hello").stdout == HELLO
        answer = run_curl("--upload-file", str(upload), f"{origin.url}/upload").stdout.decode()
        assert answer == f"{hashlib.sha256(upload.read_bytes()).hexdigest()} 3000000\n"
    with refusing_port() as port:
        assert run_curl(f"http://127.0.0.1:{port}/").returncode == 7  # curl's "failed to connect"


def test_the_origin_as_a_process() -> None:
    with Process("origin", [sys.executable, "-m", "bench.origin"]) as process:
        ((host, port),) = process.wait_ready()
        client = http.client.HTTPConnection(host, port, timeout=10)
        client.request("GET", "/hello")
        assert client.getresponse().read() == HELLO
        client.close()
        assert process.stop() == 0


def test_echo_until_the_end() -> None:
    with EchoServer() as server, socket.create_connection((server.host, server.port), 10) as sock:
        sock.sendall(b"ping")
        assert receive_exactly(sock, 4) == b"ping"
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
        with pytest.raises(ConnectionError, match="0 of 5"):
            receive_exactly(sock, 5)


def test_half_close_is_answered() -> None:
    require_ipv6()
    with HalfCloseServer("::1") as server, socket.create_connection((server.host, server.port), 10) as sock:
        sock.sendall(b"x" * 100_000)
        sock.shutdown(socket.SHUT_WR)
        assert receive_exactly(sock, 7) == b"100000\n"


def test_leaving_a_server_cuts_its_connections() -> None:
    with EchoServer() as server:
        sock = socket.create_connection((server.host, server.port), 10)
        sock.sendall(b"x")
        receive_exactly(sock, 1)
    with sock:
        assert sock.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, server.port), 10)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_kept_port_is_for_those_who_name_it(host: str) -> None:
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with kept_port(host) as port:
        for count in (1, 2, 2):  # listeners, as many as a server has workers; each time they end
            sockets = open_shared(host, port, count=count) if count > 1 else [open_listening(host, port)]
            with socket.create_connection((host, port), 10):
                pass
            for sock in sockets:
                sock.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), 10)
        with socket.socket(family) as other, pytest.raises(OSError, match="in use"):
            other.bind((host, port))


def test_never_reading_fills_up() -> None:
    with never_reading() as port, socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.setblocking(False)
        chunk = bytes(1_048_576)
        with pytest.raises(BlockingIOError):
            sum(sock.send(chunk) for _ in range(1_000))


# The SOCKS5 client, against a server that follows a script.


class SocksScript(LoopbackServer):
    """Answers each message of a known size with a given answer, and keeps what it was sent."""

    def __init__(self, steps: list[tuple[int, bytes]]) -> None:
        self.steps = steps
        self.received = b""
        self.done = threading.Event()
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        for size, answer in self.steps:
            self.received += receive_exactly(sock, size)
            sock.sendall(answer)
        self.done.set()


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.1.2.3", b"\x01\x0a\x01\x02\x03"),
        ("::1", b"\x04" + bytes(15) + b"\x01"),
        ("example.org", b"\x03\x0bexample.org"),
    ],
)
def test_socks_client(host: str, address: bytes) -> None:
    request = b"\x05\x01\x00" + address + b"\x01\xbb"
    granted = b"\x05\x00\x00\x01" + bytes(6)
    with SocksScript([(3, b"\x05\x00"), (len(request), granted + b"hi")]) as server:
        with socks_connect(server.port, host, 443, timeout_s=10) as sock:
            assert receive_exactly(sock, 2) == b"hi"
        assert server.done.wait(10)
        assert server.received == b"\x05\x01\x00" + request


def test_socks_client_logs_in_and_reads_a_refusal() -> None:
    steps = [(3, b"\x05\x02"), (5, b"\x01\x00"), (10, b"\x05\x05\x00\x01" + bytes(6))]
    with SocksScript(steps) as server, pytest.raises(SocksReplyError) as caught:
        socks_connect(server.port, "127.0.0.1", 80, login=("u", "p"), timeout_s=10)
    assert caught.value.status == 5
    assert server.received[3:8] == b"\x01\x01u\x01p"


# The coverage check.


def test_coverage_check_names_what_is_missing() -> None:
    def measured(covered: float, lines: list[int], branches: list[list[int]]) -> dict[str, Any]:
        summary = {"percent_covered": covered}
        return {"summary": summary, "missing_lines": lines, "missing_branches": branches}

    files = {
        "reflex/protocol/good.py": measured(100.0, [], []),
        "reflex/protocol/bad.py": measured(98.2, [7], [[3, 9]]),
        "reflex/inbound.py": measured(50.0, [1], []),
    }
    modules = [*map(Path, files), Path("reflex/protocol/absent.py")]
    assert shortfalls({"files": files}, modules) == [
        "reflex/protocol/bad.py: 98.2 %, 100 % required; missing: line 7, branch 3 to 9",
        "reflex/protocol/absent.py: not measured; 100 % of lines and branches required",
    ]


def test_coverage_check_as_a_program(tmp_path: Path) -> None:
    report = tmp_path / "coverage.json"
    report.write_text('{"files": {}}')
    done = subprocess.run(
        [sys.executable, "tests/check_coverage.py", str(report)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "reflex/protocol/wire.py: not measured" in done.stderr
