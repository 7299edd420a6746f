"""Limits of a user's own, as real processes: curl through the pair, restarts, kill -9, several workers."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import os
import re
import signal
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from bench.local import Process
from reflex.users import WRITE_INTERVAL_S
from tests.conftest import require_program
from tests.keys import Keys as RawKeys
from tests.loops import in_loop
from tests.processes import (
    EchoServer,
    Keys,
    LoopbackServer,
    Origin,
    Pair,
    eventually,
    hello_through,
    make_pair,
    receive_exactly,
    run_curl,
    socks_connect,
    start_inbound,
)
from tests.remote import Remote, raw_client
from tests.test_supervisor import children, statistics

MIB: Final = 1_048_576
# curl's exit codes.
PARTIAL_FILE = 18
RECEIVE_FAILED = 56
PROXY_FAILED = 97
# SOCKS5's replies (RFC 1928, section 6).
GENERAL_FAILURE = 1
NOT_ALLOWED = 2


@pytest.fixture(scope="module", autouse=True)
def _curl() -> None:
    require_program("curl")


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with Origin() as server:
        yield server


def limited_pair(folder: Path, *, pool: dict[str, object] | None = None, workers: int = 1, **limits: object) -> Pair:
    """A pair whose user has these limits."""
    inbound: dict[str, object] = {"users": [limits], "workers": workers}
    if "monthly_bytes" in limits:
        inbound["usage_file"] = "usage.sqlite"
    return make_pair(folder, inbound=inbound, outbound={"pool": pool or {}})


def curl(pair: Pair, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return run_curl("--proxy", f"socks5h://127.0.0.1:{pair.socks_port}", *arguments)


def refusal(done: subprocess.CompletedProcess[bytes]) -> int:
    """The SOCKS5 reply that curl tells of."""
    assert done.returncode == PROXY_FAILED, done.stderr.decode()
    found = re.search(r"complete SOCKS5 connection to .* \((\d+)\)", done.stderr.decode())
    assert found
    return int(found.group(1))


def counters(process: Process) -> dict[str, int]:
    since = len(process.lines)
    process.send_signal(signal.SIGUSR1)
    found: dict[str, Any] = json.loads(process.wait_for_line(r"statistics: (\{.*\})", since=since).group(1))
    return dict(found["counters"])


def used_bytes(folder: Path) -> int:
    """What the file says of all users and months."""
    database = sqlite3.connect(folder / "usage.sqlite", timeout=10)
    try:
        return int(database.execute("SELECT COALESCE(SUM(bytes), 0) FROM usage").fetchone()[0])
    finally:
        database.close()


def test_a_tunnel_too_many(tmp_path: Path, origin: Origin) -> None:
    with limited_pair(tmp_path, max_tunnels=1, pool={"max_streams": 1}) as pair:
        held = socks_connect(pair.socks_port, "127.0.0.1", origin.port)
        assert refusal(curl(pair, f"{origin.url}/hello")) == GENERAL_FAILURE
        pair.outbound.wait_for_line("the server closed the new tunnel: this user has as many as it may have there")
        pair.inbound.wait_for_line(r"INFO .*alice is over its max_tunnels \(1\): a tunnel was closed at once")
        held.close()
        assert eventually(lambda: curl(pair, f"{origin.url}/hello").returncode == 0)
        assert 1 <= counters(pair.inbound)["tunnels_limited"] <= 5  # it was not dialled again and again


def test_a_stream_too_many_and_dials_that_wait_for_their_turn(tmp_path: Path, origin: Origin) -> None:
    with limited_pair(tmp_path, max_streams=2, dials_per_s=1, pool={"max_streams": 1}) as pair:
        began_s = time.monotonic()
        done = curl(pair, "--header", "Connection: close", *[f"{origin.url}/hello"] * 3)
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - began_s > 1.5  # one at once, then one a second
        assert 1 <= counters(pair.inbound)["dials_delayed"] <= 2
        pair.inbound.wait_for_line(r"INFO .*alice is over its dials_per_s \(1\): dials wait")

        held = [socks_connect(pair.socks_port, "127.0.0.1", origin.port) for _ in range(2)]
        assert refusal(curl(pair, f"{origin.url}/hello")) == GENERAL_FAILURE
        pair.inbound.wait_for_line(r"INFO .*alice is over its max_streams \(2\): a stream was refused")
        held.pop().close()
        assert eventually(lambda: curl(pair, f"{origin.url}/hello").returncode == 0)
        held.pop().close()


def test_a_download_and_an_upload_keep_the_pace(tmp_path: Path, origin: Origin) -> None:
    """And a small request beside the upload does not wait for it. How smooth it is, test_pace shows by its clock."""
    size = 4 * MIB
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    with limited_pair(tmp_path, bytes_per_s=MIB) as pair, concurrent.futures.ThreadPoolExecutor(2) as pool:
        began_s = time.monotonic()
        down = pool.submit(curl, pair, "--output", str(tmp_path / "got"), f"{origin.url}/bytes/{size}")
        up = pool.submit(curl, pair, "--upload-file", str(file), f"{origin.url}/upload")
        pair.inbound.wait_for_line(r"INFO .*alice is over its bytes_per_s \(1048576\): its streams are slowed down")
        hello_through(pair.socks_port, origin)
        assert not up.done()
        assert up.result().stdout.endswith(b" %d\n" % size)
        assert down.result().returncode == 0
        assert time.monotonic() - began_s > 3.85
    assert (tmp_path / "got").stat().st_size == size


def test_a_slow_pace_leaves_the_tunnel_alive(tmp_path: Path, origin: Origin) -> None:
    """8 KiB a second, and more on its way than a minute can take: the tunnel answers, and a new stream is opened."""
    with (
        limited_pair(tmp_path, bytes_per_s=8_192) as pair,
        socks_connect(pair.socks_port, "127.0.0.1", origin.port) as down,
    ):
        down.sendall(b"GET /bytes/1000000 HTTP/1.1\r\n\r\n")
        assert receive_exactly(down, 3_000)
        assert curl(pair, f"{origin.url}/hello").returncode == 0


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_month_that_is_used_up_stays_so_over_a_restart(tmp_path: Path, origin: Origin, end: str) -> None:
    with limited_pair(tmp_path, monthly_bytes=3 * MIB) as pair:
        assert curl(pair, f"{origin.url}/hello").returncode == 0
        with socks_connect(pair.socks_port, "127.0.0.1", origin.port) as idle:
            done = curl(pair, "--limit-rate", "8M", "--output", "/dev/null", f"{origin.url}/bytes/{100 * MIB}")
            assert done.returncode in (PARTIAL_FILE, RECEIVE_FAILED)
            with pytest.raises(ConnectionResetError):
                idle.recv(1)
        assert refusal(curl(pair, f"{origin.url}/hello")) == NOT_ALLOWED
        line = (
            r"WARNING .*alice has used up monthly_bytes \(3145728\): its streams are reset, and new ones refused"
            r" until \d{4}-\d\d-01 00:00 UTC"
        )
        pair.inbound.wait_for_line(line)
        assert sum("has used up" in text for text in pair.inbound.lines) == 1
        if end == "stop":
            assert pair.inbound.stop() == 0
        else:
            assert eventually(lambda: used_bytes(tmp_path) >= 3 * MIB, within_s=5 * WRITE_INTERVAL_S)
            pair.inbound.kill()
        before = used_bytes(tmp_path)
        assert before >= 3 * MIB
        pair.restart_inbound()
        assert eventually(lambda: curl(pair, f"{origin.url}/hello").returncode == PROXY_FAILED)
        assert eventually(lambda: refusal(curl(pair, f"{origin.url}/hello")) == NOT_ALLOWED)
        assert used_bytes(tmp_path) == before
        mode = (tmp_path / "usage.sqlite").stat().st_mode & 0o777
        assert mode == 0o600


def test_a_killed_server_forgets_the_last_seconds_alone(tmp_path: Path, origin: Origin) -> None:
    size = 2 * MIB
    with limited_pair(tmp_path, monthly_bytes=10**12) as pair:
        for _ in range(2):
            assert curl(pair, "--output", "/dev/null", f"{origin.url}/bytes/{size}").returncode == 0
        assert eventually(lambda: used_bytes(tmp_path) >= 2 * size, within_s=5 * WRITE_INTERVAL_S)
        before = used_bytes(tmp_path)
        assert curl(pair, "--output", "/dev/null", f"{origin.url}/bytes/{size}").returncode == 0
        pair.inbound.kill()
        assert before <= used_bytes(tmp_path) <= before + size + 1_000
        kept = used_bytes(tmp_path)
        pair.restart_inbound()
        assert eventually(lambda: curl(pair, f"{origin.url}/hello").returncode == 0)
        pair.inbound.stop()
        assert kept < used_bytes(tmp_path) < kept + 1_000


def test_a_second_signal_writes_what_was_counted(tmp_path: Path, origin: Origin) -> None:
    with limited_pair(tmp_path, monthly_bytes=10**12) as pair:
        with socks_connect(pair.socks_port, "127.0.0.1", origin.port) as sock:
            sock.sendall(b"GET /bytes/100000 HTTP/1.1\r\n\r\n")
            receive_exactly(sock, 100_000)
            pair.inbound.send_signal(signal.SIGTERM)
            pair.inbound.wait_for_line("draining; a second signal")
            pair.inbound.send_signal(signal.SIGTERM)
            pair.inbound.wait()
        assert used_bytes(tmp_path) >= 100_000


@pytest.mark.parametrize(("usage_file", "workers"), [("missing/usage.sqlite", 1), ("inbound.toml", 2)])
def test_a_usage_file_that_cannot_be_written(tmp_path: Path, usage_file: str, workers: int) -> None:
    overrides = {"users": [{"monthly_bytes": 1}], "usage_file": usage_file, "workers": workers}
    with start_inbound(tmp_path, Keys.generate(), overrides) as inbound:
        inbound.wait_for_line(f"cannot start: usage_file: cannot (open|write) {tmp_path}")
        assert inbound.wait() == 2


# Several workers


def raw_keys(keys: Keys) -> RawKeys:
    private, public, user_key = (base64.b64decode(text) for text in (keys.private_key, keys.public_key, keys.user_key))
    return RawKeys(private, public, uuid.UUID(keys.user_id), user_key)


def test_max_tunnels_is_of_all_workers(tmp_path: Path) -> None:
    keys = Keys.generate()
    overrides = {"users": [{"max_tunnels": 6}], "workers": 2}

    @in_loop
    async def run() -> None:
        remotes: list[Remote] = []

        async def tunnels(count: int) -> int:
            """Open so many; return how many of them may be used."""
            new = [await raw_client(port, raw_keys(keys)) for _ in range(count)]
            remotes.extend(new)
            return sum(remote.session.has_room for remote in new)

        assert await tunnels(20) == 6
        figures = statistics(inbound, workers=2)
        limited = [each["counters"]["tunnels_limited"] for each in figures.values()]
        assert sum(limited) == 14
        assert all(limited), "the kernel gave all of them to one worker"
        held = {number: each["counters"]["tunnels_opened"] - limited[number - 1] for number, each in figures.items()}
        # A worker that dies gives back what it had.
        victim = next(number for number, count in held.items() if count)
        os.kill(children(inbound)[victim - 1], signal.SIGKILL)
        inbound.wait_for_line(rf"worker {victim} is ready again")
        assert await tunnels(20) == held[victim]
        for remote in remotes:
            remote.end.close()
            remote.session.close_buffers()

    with start_inbound(tmp_path, keys, overrides) as inbound:
        ((_, port),) = inbound.wait_ready()
        run()


class Tally(LoopbackServer):
    """Sends so many bytes to whoever connects."""

    SIZE = 150_000

    def serve(self, sock: Any) -> None:
        sock.sendall(bytes(self.SIZE))


def test_bytes_of_all_workers_go_into_one_file_and_one_pace(tmp_path: Path) -> None:
    streams = 8
    with (
        Tally() as target,
        limited_pair(tmp_path, workers=2, pool={"max_streams": 1}, bytes_per_s=MIB, monthly_bytes=10**12) as pair,
    ):

        def fetch() -> None:
            with socks_connect(pair.socks_port, "127.0.0.1", target.port) as sock:
                receive_exactly(sock, Tally.SIZE)
                assert sock.recv(1) == b""

        began_s = time.monotonic()
        threads = [threading.Thread(target=fetch) for _ in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began_s > 0.85 * streams * Tally.SIZE / MIB - 0.25  # each worker has a burst
        figures = statistics(pair.inbound, workers=2)
        moved = [each["counters"]["bytes_into_tunnels"] for each in figures.values()]
        assert sum(moved) == streams * Tally.SIZE
        assert pair.inbound.stop() == 0
    assert used_bytes(tmp_path) == streams * Tally.SIZE


def test_a_month_is_used_up_for_all_workers(tmp_path: Path) -> None:
    with (
        EchoServer() as target,
        limited_pair(tmp_path, workers=2, pool={"max_streams": 1}, monthly_bytes=1_000_000) as pair,
    ):
        socks = [socks_connect(pair.socks_port, "127.0.0.1", target.port) for _ in range(8)]
        socks[0].sendall(bytes(600_000))
        receive_exactly(socks[0], 600_000)
        for sock in socks:  # on either worker
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            sock.close()
        figures = statistics(pair.inbound, workers=2)
        assert sum(each["gauges"]["streams"] for each in figures.values()) == 0
        assert sum("has used up" in line for line in pair.inbound.lines) == 1
