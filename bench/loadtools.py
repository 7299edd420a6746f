"""The tools that make the load, and the servers they load: nginx, wrk, iperf3. Started, and their output read."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bench.halves import LOOPBACK, Program, StartFailed, free_port, wait_listening
from bench.systems import which

TOOLS: Final = {"nginx": ("nginx", "-v"), "wrk": ("wrk", "-v"), "iperf3": ("iperf3", "-v")}
FILE_BYTES: Final = 128
PERCENTILES: Final = ("1", "10", "25", "50", "75", "90", "95", "99", "99.5", "99.9", "99.99")
GRACE_S: Final = 20.0  # what a tool may take beyond its measuring time before it counts as stuck
WRK_TIMEOUT_S: Final = 5
REPORT_INTERVAL_S: Final = 0.1  # of iperf3, where a part of a run is wanted

# One worker, and no process beside it. Connections last as long as their client wants.
_NGINX: Final = """daemon off;
master_process off;
pid nginx.pid;
worker_rlimit_nofile 16384;
error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  keepalive_timeout 1h;
  keepalive_requests 1000000000;
  client_body_temp_path temporary;
  proxy_temp_path temporary;
  fastcgi_temp_path temporary;
  uwsgi_temp_path temporary;
  scgi_temp_path temporary;
  server {{ listen {address} backlog=4096; root .; location / {{ }} }}
}}
"""

# wrk's own text rounds; its script interface has the microseconds.
_LUA: Final = """done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("requests %d\\nduration_us %d\\n", summary.requests, summary.duration))
  io.write(string.format("errors %d\\n", e.connect + e.read + e.write + e.timeout + e.status))
  for _, p in pairs({ PERCENTILES }) do
    io.write(string.format("p%s_us %d\\n", p, latency:percentile(tonumber(p))))
  end
end
"""


class ToolFailed(Exception):
    """A load tool, or what it measured, did not do what it was to do."""


@contextmanager
def web_server() -> Iterator[int]:
    """nginx with a file of 128 bytes at ``/f``; yields its port."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-nginx-") as name:
        directory = Path(name)
        (directory / "f").write_bytes(b"x" * FILE_BYTES)
        (directory / "nginx.conf").write_text(_NGINX.format(address=f"{LOOPBACK}:{port}"))
        command = [which("nginx"), "-p", name, "-c", "nginx.conf", "-e", "stderr"]
        with Program("nginx", command, directory / "log") as program:
            wait_listening([port], [program])
            yield port


@contextmanager
def bulk_server() -> Iterator[int]:
    """iperf3's server, fresh; yields its port."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-iperf3-") as name:
        command = [which("iperf3"), "-s", "-B", LOOPBACK, "-p", str(port)]
        with Program("iperf3", command, Path(name) / "log") as program:
            wait_listening([port], [program])
            yield port


def run_wrk(port: int, *, connections: int, seconds: float, headers: Sequence[str] = ()) -> dict[str, float]:
    """Load ``/f`` at ``port`` from one thread; returns what :func:`parse_wrk` returns."""
    with tempfile.NamedTemporaryFile("w", prefix="bench-wrk-", suffix=".lua") as script:
        script.write(_LUA.replace("PERCENTILES", ", ".join(f'"{each}"' for each in PERCENTILES)))
        script.flush()
        # wrk takes whole seconds.
        command = [which("wrk"), "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", script.name]
        command += ["--timeout", f"{WRK_TIMEOUT_S}s"]
        for header in headers:
            command += ["-H", header]
        return parse_wrk(_run([*command, f"http://{LOOPBACK}:{port}/f"], seconds + GRACE_S))


def parse_wrk(text: str) -> dict[str, float]:
    """``requests``, ``requests_s``, ``errors`` and ``pN_us`` from what wrk and our script of it print.

    Raises ToolFailed where nothing was answered, or more than one in a thousand went wrong.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name in {"requests", "duration_us", "errors"} or (name.startswith("p") and name.endswith("_us")):
            with contextlib.suppress(ValueError):
                found[name] = float(value)
    if not found.get("requests"):
        raise ToolFailed(f"wrk: nothing was answered: {text.strip()[-300:]}")
    if found["errors"] > found["requests"] / 1000:
        raise ToolFailed(f"wrk: {found['errors']:.0f} errors in {found['requests']:.0f} requests")
    found["requests_s"] = found["requests"] / (found.pop("duration_us") / 1e6)
    return found


def iperf3_command(port: int, *, seconds: float, streams: int, down: int) -> list[str]:
    """iperf3's client, which prints JSON at its end. ``down`` 1: the server sends."""
    command = [which("iperf3"), "-c", LOOPBACK, "-p", str(port), "-J", "-t", f"{max(1, round(seconds))}"]
    return [*command, "-i", str(REPORT_INTERVAL_S), "-P", str(streams), *["-R"][:down]]


def run_iperf3(port: int, *, seconds: float, streams: int = 1, down: int = 0) -> dict[str, float]:
    """Bulk through ``port``; returns what :func:`parse_iperf3` returns."""
    command = iperf3_command(port, seconds=seconds, streams=streams, down=down)
    return parse_iperf3(_run(command, seconds + GRACE_S))


@contextmanager
def iperf3_beside(port: int, *, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A download that runs while the block does; ended with it."""
    command = iperf3_command(port, seconds=seconds, streams=1, down=1)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def parse_iperf3(text: str, *, from_s: float = 0.0, until_s: float | None = None) -> dict[str, float]:
    """``bytes`` and ``gbit_s`` that arrived; of the whole run, or of the intervals in a part of it.

    Raises ToolFailed with iperf3's own words where it has some.
    """
    try:
        report: Mapping[str, Any] = json.loads(text)
    except ValueError:
        raise ToolFailed(f"iperf3: no JSON: {text.strip()[-300:]}") from None
    if "error" in report:
        raise ToolFailed(f"iperf3: {report['error']}")
    if until_s is None:
        received = report["end"]["sum_received"]
        return {"bytes": float(received["bytes"]), "gbit_s": received["bits_per_second"] / 1e9}
    sums = [interval["sum"] for interval in report["intervals"]]
    part = [each for each in sums if each["start"] >= from_s and each["end"] <= until_s]
    if not part:
        raise ToolFailed("iperf3: no interval in the part that was measured")
    moved, taken_s = sum(each["bytes"] for each in part), sum(each["seconds"] for each in part)
    return {"bytes": float(moved), "gbit_s": moved * 8 / taken_s / 1e9}


def _run(command: Sequence[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ToolFailed(f"{Path(command[0]).name}: stuck for {timeout_s:g} s") from None
    return done.stdout + done.stderr


__all__ = ["StartFailed", "ToolFailed", "bulk_server", "parse_iperf3", "parse_wrk", "run_iperf3", "run_wrk"]
