"""A load tool for a running pair: many clients, many small requests, each on a connection of its own.

    client (a thread) -> SOCKS5 -> reflex-outbound -> TUNNEL -> reflex-inbound -> web server

Without ``--socks`` it starts the web server and both halves itself, on loopback, and ends them. A
latency is that of a whole request: connect, SOCKS5, request, answer. The clients are threads of one
Python process, so what is measured under full load is as much them as the pair; for records use a
load generator in C (the comparison with peers does).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.demo import DemoFailed, start_everything
from bench.local import ADDRESS, ExpectationError, Process, open_descriptors, socks_connect

CLIENTS: Final = 50
REQUESTS: Final = 200
CLIENTS_MAX: Final = 1_000  # threads, and descriptors, of one process
REQUEST_TIMEOUT_S: Final = 30.0
READ_SIZE: Final = 65_536
SAMPLE_INTERVAL_S: Final = 0.1  # how often descriptors are counted while the load runs
STATISTICS_TIMEOUT_S: Final = 5.0
SETTLE_S: Final = 1.0  # for the last connections to be gone before descriptors are counted again
STATISTICS: Final = re.compile(r"statistics: (\{.*\})")
ERRORS_SHOWN: Final = 5

EXAMPLES: Final = """examples:
  python -m bench.load                                    a pair of its own, 50 clients of 200 requests
  python -m bench.load --clients 200 --keep-alive         one connection for all requests of a client
  python -m bench.load --socks 127.0.0.1:1080 --url-host 127.0.0.1:8080 --path /index.html
                                                          a pair that runs already
  python -m bench.load --socks 127.0.0.1:1080 --url-host 127.0.0.1:8080 --pid 4711 --pid 4712
                                                          with its descriptors and, where its log is a
                                                          file, tunnels opened and reused
"""


@dataclass
class Outcome:
    """What the clients of one run saw."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


class Half:
    """One daemon, as far as it can be looked into from outside.

    Args:
        pid: of its process.
        process: the same, where this program started it.
    """

    def __init__(self, pid: int, process: Process | None = None) -> None:
        self.pid = pid
        self._process = process

    def descriptors(self) -> int | None:
        """How many are open; None where the process may not be looked into, or has ended."""
        try:
            return open_descriptors(self.pid)
        except OSError:
            return None

    def statistics(self) -> dict[str, Any] | None:
        """Its counters, pools and gauges, asked for by SIGUSR1; None where they cannot be had.

        Of a process that was not started here they are had where its standard error is a file that may
        be read. A process that does not handle SIGUSR1, and would end by it, is left alone.
        """
        if self._process is not None:
            seen = len(self._process.lines)
            self._process.send_signal(signal.SIGUSR1)
            text = self._process.wait_for_line(STATISTICS, since=seen, timeout_s=STATISTICS_TIMEOUT_S).group(1)
            result: dict[str, Any] = json.loads(text)
            return result
        log = Path(f"/proc/{self.pid}/fd/2")
        try:
            if not handles_usr1(Path(f"/proc/{self.pid}/status").read_text()) or not log.is_file():
                return None
            seen = log.stat().st_size
            os.kill(self.pid, signal.SIGUSR1)
            deadline_s = time.monotonic() + STATISTICS_TIMEOUT_S
            while time.monotonic() < deadline_s:
                with log.open("rb") as file:
                    file.seek(seen)
                    if match := STATISTICS.search(file.read().decode(errors="replace")):
                        found: dict[str, Any] = json.loads(match.group(1))
                        return found
                time.sleep(SAMPLE_INTERVAL_S)
        except (OSError, ValueError):
            return None
        return None


def handles_usr1(status: str) -> bool:
    """Whether a process with this ``/proc/PID/status`` has a handler for SIGUSR1."""
    match = re.search(r"^SigCgt:\s*([0-9a-fA-F]+)$", status, re.MULTILINE)
    return match is not None and bool(int(match.group(1), 16) >> (signal.SIGUSR1 - 1) & 1)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the ordered values that at least ``share`` (0 to 1) of them do not pass; 0.0 of none."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def request(sock: socket.socket, text: bytes) -> None:
    """Send one request and read the whole answer, which must be a 200 with a Content-Length."""
    sock.sendall(text)
    received = b""
    while (head_end := received.find(b"\r\n\r\n")) < 0:
        chunk = sock.recv(READ_SIZE)
        if not chunk:
            raise ConnectionError("the connection ended in the head of an answer")
        received += chunk
    head = received[:head_end]
    length = re.search(rb"\r\nContent-Length: *(\d+)", head, re.IGNORECASE)
    if not head.startswith(b"HTTP/1.1 200") or length is None:
        raise ConnectionError(f"the answer began with {head[:40]!r}")
    left = int(length.group(1)) - (len(received) - head_end - 4)
    while left > 0:
        size = len(sock.recv(min(READ_SIZE, left)))
        if not size:
            raise ConnectionError(f"the answer ended {left} bytes early")
        left -= size


def run_clients(
    connect: Callable[[], socket.socket], text: bytes, *, clients: int, requests: int, keep_alive: bool
) -> Outcome:
    """Run all clients to their end. An error costs its request, and a kept connection is made anew."""
    outcome = Outcome()
    lock = threading.Lock()
    start = threading.Barrier(clients + 1)

    def client() -> None:
        latencies: list[float] = []
        errors: Counter[str] = Counter()
        sock: socket.socket | None = None
        start.wait()
        for _ in range(requests):
            began_s = time.perf_counter()
            try:
                if sock is None:
                    sock = connect()
                request(sock, text)
                latencies.append(time.perf_counter() - began_s)
            except OSError as error:
                errors[f"{type(error).__name__}: {error}"] += 1
                keep = False
            else:
                keep = keep_alive
            if sock is not None and not keep:
                sock.close()
                sock = None
        if sock is not None:
            sock.close()
        with lock:
            outcome.latencies_s += latencies
            outcome.errors += errors

    threads = [threading.Thread(target=client, name=f"client {number}", daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    began_s = time.perf_counter()
    for thread in threads:
        thread.join()
    outcome.seconds = time.perf_counter() - began_s
    return outcome


def measure(
    *,
    clients: int = CLIENTS,
    requests: int = REQUESTS,
    keep_alive: bool = False,
    socks: tuple[str, int] | None = None,
    target: tuple[str, int] | None = None,
    path: str = "/hello",
    pids: Sequence[int] = (),
) -> dict[str, Any]:
    """Load a pair; one of its own where ``socks`` is None.

    Returns:
        ``requests``, ``errors`` (text to count), ``seconds``, ``requests_per_s``, ``latency_ms`` (p50, p90, p99,
        max), ``tunnels`` (opened, streams, reused, reuse_rate; None where no outbound half tells),
        ``descriptors`` (for each half ``name``, before, peak, after).

    Raises:
        ValueError: ``socks`` without ``target``.
    """
    with ExitStack() as stack:
        halves: list[tuple[str, Half]] = [(f"process {pid}", Half(pid)) for pid in pids]
        if socks is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="reflex-load-"))
            own = start_everything(stack, Path(directory))
            socks, target = ("127.0.0.1", own.socks_port), own.origin
            halves = [(each.name, Half(each.pid, each)) for each in (own.inbound, own.outbound)]
        if target is None:
            raise ValueError("a target is needed together with the address of a SOCKS5 server")
        (proxy_host, proxy_port), (host, port) = socks, target

        def connect() -> socket.socket:
            return socks_connect(proxy_port, host, port, proxy_host=proxy_host, timeout_s=REQUEST_TIMEOUT_S)

        connection = "keep-alive" if keep_alive else "close"
        text = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: {connection}\r\n\r\n".encode()
        before = [half.statistics() for _, half in halves]
        descriptors = [{"name": name, "before": half.descriptors(), "peak": None} for name, half in halves]
        ended = threading.Event()
        peaks: list[list[int]] = [[] for _ in halves]

        def sample() -> None:
            while not ended.wait(SAMPLE_INTERVAL_S):
                for (_, half), seen in zip(halves, peaks, strict=True):
                    if (count := half.descriptors()) is not None:
                        seen.append(count)

        sampler = threading.Thread(target=sample, name="sampler", daemon=True)
        sampler.start()
        outcome = run_clients(connect, text, clients=clients, requests=requests, keep_alive=keep_alive)
        ended.set()
        sampler.join()
        time.sleep(SETTLE_S)
        for row, (_, half), seen in zip(descriptors, halves, peaks, strict=True):
            row["peak"], row["after"] = max(seen, default=None), half.descriptors()
        after = [half.statistics() for _, half in halves]
    latencies_s = sorted(outcome.latencies_s)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        "clients": clients,
        "requests": len(latencies_s),
        "errors": dict(outcome.errors),
        "seconds": outcome.seconds,
        "requests_per_s": len(latencies_s) / outcome.seconds if outcome.seconds else 0.0,
        "latency_ms": {name: percentile(latencies_s, share) * 1e3 for name, share in shares.items()},
        "tunnels": tunnels(before, after),
        "descriptors": descriptors,
    }


def tunnels(before: Sequence[dict[str, Any] | None], after: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Tunnels opened and reused by the outbound half in between; None where none of the halves is one that tells.

    A stream that did not need a tunnel of its own has reused one.
    """
    for old, new in zip(before, after, strict=True):
        if old is None or new is None or "idle_tunnels" not in new["gauges"]:
            continue
        opened, streams = (new["counters"][n] - old["counters"][n] for n in ("tunnels_opened", "streams_opened"))
        reused = max(0, streams - opened)
        return {
            "opened": opened,
            "streams": streams,
            "reused": reused,
            "reuse_rate": reused / streams if streams else 0.0,
        }
    return None


def table(result: dict[str, Any]) -> str:
    """The result for a person."""
    latency, used = result["latency_ms"], result["tunnels"]
    lines = [
        f"{'requests':<22}{result['requests']:>10,}   by {result['clients']} clients in {result['seconds']:.2f} s",
        f"{'requests per second':<22}{result['requests_per_s']:>10,.0f}",
        f"{'latency, ms':<22}" + "   ".join(f"{name} {value:.2f}" for name, value in latency.items()),
        f"{'errors':<22}{sum(result['errors'].values()):>10,}",
    ]
    worst = sorted(result["errors"].items(), key=lambda item: -item[1])[:ERRORS_SHOWN]
    lines += [f"  {count:>8,} × {text}" for text, count in worst]
    if used is None:
        lines.append(f"{'tunnels':<22}{'not told':>10}")
    else:
        lines.append(
            f"{'tunnels opened':<22}{used['opened']:>10,}   reused {used['reused']:,} times"
            f" for {used['streams']:,} streams: reuse rate {used['reuse_rate']:.2%}"
        )
    for row in result["descriptors"]:
        cells = ", ".join(
            f"{title} {'?' if row[key] is None else row[key]}"
            for title, key in (("before", "before"), ("during", "peak"), ("after", "after"))
        )
        lines.append(f"{'descriptors':<22}{cells}   {row['name']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, print, write JSON where asked; 1 where a request failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.load",
        description="Small requests through a pair: rates, latencies, tunnels reused, descriptors.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", type=int, default=CLIENTS, help=f"at once (default: {CLIENTS})")
    parser.add_argument("--requests", type=int, default=REQUESTS, help=f"of each client (default: {REQUESTS})")
    parser.add_argument("--keep-alive", action="store_true", help="one connection for all requests of a client")
    parser.add_argument("--socks", type=_address, metavar="HOST:PORT", help="a running pair's SOCKS5 address")
    parser.add_argument("--url-host", type=_address, metavar="HOST:PORT", help="the web server, as seen by the pair")
    parser.add_argument("--path", default="/hello", help="what to GET there (default: /hello)")
    parser.add_argument("--pid", type=int, action="append", default=[], help="of a half that runs already; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    if not 1 <= options.clients <= CLIENTS_MAX or options.requests < 1:
        parser.error(f"expected 1 to {CLIENTS_MAX} clients and 1 or more requests")
    if (options.socks is None) != (options.url_host is None) or (options.pid and options.socks is None):
        parser.error("--socks and --url-host go together, and --pid with them")
    try:
        result = measure(
            clients=options.clients,
            requests=options.requests,
            keep_alive=options.keep_alive,
            socks=options.socks,
            target=options.url_host,
            path=options.path,
            pids=options.pid,
        )
    except (DemoFailed, ExpectationError, OSError) as error:
        print(f"the load could not be run: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if result["errors"] else 0


def _address(text: str) -> tuple[str, int]:
    match = ADDRESS.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}; expected HOST:PORT")
    return match.group(1) or match.group(2), int(match.group(3))


if __name__ == "__main__":
    sys.exit(main())
