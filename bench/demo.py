"""The demo: both daemons on loopback, data moved and verified, a short table.

``python -m bench.demo``. The way of the bytes, each arrow a TCP connection on loopback::

    this process -> SOCKS5 -> reflex-outbound -> TUNNEL -> reflex-inbound -> web server

Exits 1 when a digest differs, a request fails or a process misbehaves. Everything that it started is
ended, and nothing is left on disk.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.local import ExpectationError, Process, peak_rss_bytes, socks_connect, start_daemon, to_toml
from bench.origin import HELLO, block, expected_sha256
from reflex.errors import ReflexError
from reflex.protocol.handshake import ClientCredentials, ClientHandshake, ServerCredentials, accept_hello
from reflex.protocol.replay import ReplaySet
from reflex.protocol.wire import CLIENT_HELLO_SIZE, KEY_SIZE, SERVER_HELLO_SIZE, USER_ID_SIZE, Suite

MIB: Final = 1 << 20
DOWNLOAD_SIZE: Final = 256 * MIB
UPLOAD_SIZE: Final = 64 * MIB
READ_SIZE: Final = MIB
CLIENTS: Final = 20
REQUESTS_PER_CLIENT: Final = 10
HANDSHAKES: Final = 51
SERVER_NAME: Final = "127.0.0.1:1"  # for `reflex init`; the real port is known once the server listens
BAR_WIDTH: Final = 30
BAR_INTERVAL_S: Final = 0.1
TIERS: Final = (
    ("2048", "2 KiB"),
    ("8192", "8 KiB"),
    ("32768", "32 KiB"),
    ("131072", "128 KiB"),
    ("frames", "frames"),
    ("client_hello", "client hello"),
    ("server_hello", "server hello"),
)


class DemoFailed(Exception):
    """Something did not come out right; the text is one line for the user."""


class Progress:
    """A bar that is redrawn on a terminal, and four plain lines in a pipe."""

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._live = sys.stdout.isatty()
        self._next_s = 0.0
        self._next_quarter = 1

    def show(self, done: int) -> None:
        """Tell that ``done`` bytes of the total have been moved. Cheap enough for every read."""
        if self._live:
            now_s = time.monotonic()
            if now_s >= self._next_s or done == self._total:
                self._next_s = now_s + BAR_INTERVAL_S
                filled = BAR_WIDTH * done // self._total
                bar = "#" * filled + "-" * (BAR_WIDTH - filled)
                end = "\n" if done == self._total else ""
                print(f"\r  {self._label:<9}[{bar}] {self._figures(done)}", end=end, flush=True)
        elif done * 4 >= self._total * self._next_quarter:
            self._next_quarter = done * 4 // self._total + 1
            print(f"  {self._label:<9}{self._figures(done)}", flush=True)

    def _figures(self, done: int) -> str:
        return f"{done // MIB:4} of {self._total // MIB} MiB  {100 * done // self._total:3} %"


@dataclass(frozen=True)
class Halves:
    """Both daemons and the ports that matter."""

    inbound: Process
    outbound: Process
    socks_port: int
    origin: tuple[str, int]

    def connect(self) -> http.client.HTTPConnection:
        """A connection to the web server, through the tunnel."""
        host, port = self.origin
        connection = http.client.HTTPConnection(host, port)
        connection.sock = socks_connect(self.socks_port, host, port)
        return connection


def start_everything(stack: ExitStack, directory: Path) -> Halves:
    """Start the web server and both halves with fresh keys; ``stack`` ends them."""
    origin = stack.enter_context(Process("web server", [sys.executable, "-m", "bench.origin"]))
    ((origin_host, origin_port),) = origin.wait_ready()

    conf = directory / "conf"
    code = "from reflex.cli import main; raise SystemExit(main())"
    init = subprocess.run(
        [sys.executable, "-c", code, "init", "--server", SERVER_NAME, "--dir", str(conf)],
        capture_output=True,
        text=True,
        check=False,
    )
    if init.returncode:
        raise DemoFailed(f"reflex init failed: {init.stderr.strip() or init.stdout.strip()}")

    inbound_file, outbound_file = conf / "inbound.toml", conf / "outbound.toml"
    settings = tomllib.loads(inbound_file.read_text())
    settings["listen"] = ["127.0.0.1:0"]
    settings["targets"] = {"allow": [f"{origin_host}:{origin_port}"]}
    inbound_file.write_text(to_toml(settings))
    inbound = stack.enter_context(start_daemon("reflex-inbound", inbound_file))
    server_port = inbound.wait_ready()[0][1]

    settings = tomllib.loads(outbound_file.read_text())
    settings["listen"] = [{"protocol": "socks5", "address": "127.0.0.1:0"}]
    settings["servers"][0]["address"] = f"127.0.0.1:{server_port}"
    outbound_file.write_text(to_toml(settings))
    outbound = stack.enter_context(start_daemon("reflex-outbound", outbound_file))
    return Halves(inbound, outbound, outbound.wait_ready()[0][1], (origin_host, origin_port))


def download(halves: Halves) -> float:
    """Move the bytes down and return the seconds it took; the digest is made after the clock."""
    connection = halves.connect()
    progress = Progress("download", DOWNLOAD_SIZE)
    received = memoryview(bytearray(DOWNLOAD_SIZE))
    started_s = time.perf_counter()
    connection.request("GET", f"/bytes/{DOWNLOAD_SIZE}")
    with connection.getresponse() as response:
        if response.status != http.HTTPStatus.OK:
            raise DemoFailed(f"download: status {response.status}")
        done = 0
        while done < DOWNLOAD_SIZE:
            size = response.readinto(received[done : done + READ_SIZE])
            if not size:
                raise DemoFailed(f"download: ended after {done} of {DOWNLOAD_SIZE} bytes")
            done += size
            progress.show(done)
    taken_s = time.perf_counter() - started_s
    connection.close()
    compare("download", hashlib.sha256(received).hexdigest(), expected_sha256(DOWNLOAD_SIZE))
    return taken_s


def upload(halves: Halves) -> float:
    """Move the bytes up and return the seconds until the web server had them all, and their digest."""
    expected = expected_sha256(UPLOAD_SIZE)
    connection = halves.connect()
    progress = Progress("upload", UPLOAD_SIZE)
    started_s = time.perf_counter()
    connection.putrequest("PUT", "/upload")
    connection.putheader("Content-Length", str(UPLOAD_SIZE))
    connection.endheaders()
    done = 0
    while done < UPLOAD_SIZE:
        piece = block()[: UPLOAD_SIZE - done]
        connection.send(piece)
        done += len(piece)
        progress.show(done)
    with connection.getresponse() as response:
        digest = response.read().decode().split(" ")[0]
    taken_s = time.perf_counter() - started_s
    connection.close()
    compare("upload", digest, expected)
    return taken_s


def compare(what: str, digest: str, expected: str) -> None:
    """Raise DemoFailed where the digests differ."""
    if digest != expected:
        raise DemoFailed(f"{what}: SHA-256 is {digest or 'missing'}, expected {expected}")


def small_requests(halves: Halves) -> float:
    """Every client makes its requests, each on a new connection; return the seconds they all took."""

    def client(_number: int) -> None:
        for _ in range(REQUESTS_PER_CLIENT):
            connection = halves.connect()
            connection.request("GET", "/hello", headers={"Connection": "close"})
            with connection.getresponse() as response:
                if response.status != http.HTTPStatus.OK or response.read() != HELLO:
                    raise DemoFailed(f"a small request got status {response.status} or wrong bytes")
            connection.close()

    started_s = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(client, range(CLIENTS)))
    return time.perf_counter() - started_s


def handshake_s() -> float:
    """Median time of one handshake, both roles one after the other in this process, no network."""
    private_key, user_id, user_key = os.urandom(KEY_SIZE), os.urandom(USER_ID_SIZE), os.urandom(KEY_SIZE)
    server = ServerCredentials(private_key, {user_id: user_key})
    client = ClientCredentials(server.server_public, user_id, user_key)
    now_s = int(time.time())
    replay = ReplaySet(now_s)
    hello, answer = memoryview(bytearray(CLIENT_HELLO_SIZE)), memoryview(bytearray(SERVER_HELLO_SIZE))

    def once() -> None:
        ours = ClientHandshake(client, suite=Suite.AES_256_GCM, time_s=now_s, random_bytes=os.urandom)
        ours.write_hello(hello)
        accepted = accept_hello(hello, server, now_s=now_s, replay=replay, random_bytes=os.urandom)
        accepted.write_answer(answer, random_bytes=os.urandom)
        ours.read_answer(answer)

    return statistics.median(timed(once) for _ in range(HANDSHAKES))


def timed(call: Callable[[], None]) -> float:
    """The seconds that one call takes."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def pool_figures(process: Process) -> dict[str, Any]:
    """Ask a daemon for its statistics and return the part about pools."""
    seen = len(process.lines)
    process.send_signal(signal.SIGUSR1)
    text = process.wait_for_line(r"statistics: (\{.*\})", since=seen).group(1)
    figures: dict[str, Any] = json.loads(text)["pools"]
    return figures


def print_pools(name: str, figures: dict[str, Any]) -> None:
    """One line for each pool that was used."""
    print(f"\n  pools of {name:<24}{'created':>9}{'reused':>9}{'hit rate':>10}")
    for key, label in TIERS:
        pool = figures.get(key)
        if pool and pool["acquired"]:
            print(f"    {label:<29}{pool['created']:>9}{pool['hits']:>9}{pool['hit_rate']:>10.1%}")


def run(directory: Path) -> None:
    """The whole demo; raises what went wrong."""
    with ExitStack() as stack:
        print("Starting the web server, reflex-inbound and reflex-outbound on loopback ...", flush=True)
        halves = start_everything(stack, directory)
        download_s = download(halves)
        upload_s = upload(halves)
        requests = CLIENTS * REQUESTS_PER_CLIENT
        requests_s = small_requests(halves)
        print(f"  requests {requests:4} of {requests} by {CLIENTS} clients", flush=True)
        print("  SHA-256 of both directions as expected, every request answered")

        daemons = (halves.inbound, halves.outbound)
        pools = [pool_figures(daemon) for daemon in daemons]
        peaks = [peak_rss_bytes(daemon.pid) for daemon in daemons]
        for daemon in daemons[::-1]:
            if code := daemon.stop():
                raise DemoFailed(f"{daemon.name} ended with exit code {code}; {daemon.log}")

    print(f"\n  {'handshake':<22}{handshake_s() * 1e6:>8.0f} µs     both roles in one process, median")
    print(f"  {'download':<22}{DOWNLOAD_SIZE * 8 / download_s / 1e9:>8.2f} Gbit/s {DOWNLOAD_SIZE // MIB} MiB")
    print(f"  {'upload':<22}{UPLOAD_SIZE * 8 / upload_s / 1e9:>8.2f} Gbit/s {UPLOAD_SIZE // MIB} MiB, hashed there")
    print(f"  {'small requests':<22}{requests / requests_s:>8.0f} /s     each on a new connection")
    for daemon, peak in zip(daemons, peaks, strict=True):
        print(f"  {'peak memory':<22}{peak / MIB:>8.1f} MiB    {daemon.name}")
    for daemon, figures in zip(daemons, pools, strict=True):
        print_pools(daemon.name, figures)


def main() -> int:
    """Run in a temporary directory; 0, or 1 with one clear reason."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))  # unwinds, so that all is ended
    try:
        with tempfile.TemporaryDirectory(prefix="reflex-demo-") as directory:
            run(Path(directory))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (DemoFailed, ExpectationError, ReflexError, OSError, http.client.HTTPException) as error:
        print(f"\nthe demo failed: {type(error).__name__}: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
