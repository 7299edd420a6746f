"""bench: what is pure in it: statistics, verdicts, the tools' output, pictures, the report."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.delay import Way
from bench.figures import FIGURES
from bench.halves import Program, StartFailed, family, free_port, listening_ports, wait_listening
from bench.loadtools import ToolFailed, parse_iperf3, parse_wrk
from bench.machine import congestion_control
from bench.origin import LoopbackServer
from bench.peers import choose, medians_of, table
from bench.report import advantages, comparison, document, pictures, write
from bench.svg import Bar, Line, bars, decade_axis, linear_axis, lines, spread
from bench.systems import DIRECT, OURS, SYSTEMS, Site
from bench.targets import (
    ITSELF,
    ROWS,
    Bound,
    Row,
    best_peer,
    medians,
    peers,
    ratio_to_best,
    short,
    value_by_system,
    verdict_text,
    verdicts,
)
from tests.namespaces import namespace

WRK_TEXT = """Running 1s test @ http://127.0.0.1:1/f
  1 threads and 8 connections
Requests/sec:  10.00
requests 20000
duration_us 2000000
errors 0
p50_us 750
p99_us 2100
"""
ROW = Row("speed", "f", "m", "/s", True, (Bound("≥", 1.5), Bound("≥", 1.0, "haproxy"), Bound("≥", 10, ITSELF)))
SLOW_IS_GOOD = Row("time", "f", "m", "µs", False, (Bound("≤", 0.5),))


def found(**values: float) -> dict[str, dict[str, dict[str, float]]]:
    return {"f": {name.replace("_", "-"): {"m": value} for name, value in values.items()}}


def results(scale: float = 1.0) -> dict[str, Any]:
    """A run in which every row has a figure: ours ``scale``, the peers 2, 3, ... in their order."""
    figures: dict[str, Any] = {}
    for row in ROWS:
        for place, name in enumerate(SYSTEMS, start=1):
            metrics = figures.setdefault(row.figure, {}).setdefault(name, {"rounds": [], "median": {}})["median"]
            metrics[row.metric] = place * (scale if name == OURS else 1.0)
    for place, entry in enumerate(figures["requests_32"].values(), start=1):
        entry["median"] |= {f"p{p}_us": place * 100.0 for p in ("50", "75", "90", "95", "99", "99.5", "99.9", "99.99")}
    for place, entry in enumerate(figures["idle_memory"].values(), start=1):
        entry["median"] |= {f"kib_at_{n}": float(n * place) for n in (250, 500, 1000, 1500, 2000)}
    figure = {"best": 1.5, "median": 2.0, "unit": "µs", "mb_per_s": 700.0}
    return {
        "command": "make bench",
        "machine": {"processor": "A <fast> one & co", "cores": "2", "date": "2026-01-02"},
        "versions": {"wrk": "4.1.0"},
        "left_out": {"spiped": "spiped"},
        "rounds": 5,
        "seconds": 3.0,
        "figures": figures,
        "failures": [{"figure": "new", "system": "v2ray", "error": "stuck"}] * 2,
        "codec": {
            "rows": [{"name": "handshake", "target": 250.0, "met": True, "plain": figure, **figure}],
            "records": [
                {"suite": "AES_256_GCM", "body_bytes": size, "pooled": figure, "plain": figure} for size in (64, 4096)
            ],
        },
        "allocations": {"claims": [{"text": "nothing is allocated", "holds": True}]},
        "allocations_table": "a table",
    }


def test_medians_are_taken_metric_by_metric() -> None:
    assert medians([{"a": 1, "b": 5}, {"a": 9}, {"a": 2, "b": 7}]) == {"a": 2, "b": 6}
    assert medians([]) == {}


def test_the_best_peer_is_encrypted_and_not_ours() -> None:
    values = found(reflex=9, shadowsocks=4, trojan=6, haproxy=8, direct=20)
    assert best_peer(ROW, values) == ("trojan", 6)
    assert best_peer(SLOW_IS_GOOD, values) == ("shadowsocks", 4)
    assert ratio_to_best(ROW, values) == 1.5
    assert peers(values["f"]) == ["shadowsocks", "trojan"]


def test_without_peers_there_is_no_ratio() -> None:
    assert best_peer(ROW, found(reflex=9, haproxy=8)) is None
    assert ratio_to_best(ROW, found(reflex=9, haproxy=8)) is None
    assert ratio_to_best(ROW, found(trojan=8)) is None
    assert ratio_to_best(ROW, {}) is None


def test_verdicts_hold_ours_against_each_reference() -> None:
    texts = [verdict_text(verdict) for verdict in verdicts(ROW, found(reflex=9, trojan=6, haproxy=10))]
    assert texts == ["≥ 1.5 × best: 1.50, met", "≥ 1 × haproxy: 0.90, NOT met", "≥ 10: NOT met"]
    (verdict,) = verdicts(SLOW_IS_GOOD, found(reflex=2, trojan=5))
    assert verdict.is_met
    assert verdict.ratio == 0.4


def test_a_reference_that_is_missing_is_said_to_be() -> None:
    first, second, third = verdicts(ROW, found(reflex=12))
    assert first.is_met is second.is_met is None
    assert verdict_text(first) == "≥ 1.5 × best: not measured"
    assert third.is_met
    assert verdicts(ROW, found(trojan=12)) == []


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.00"), (1.239, "1.24"), (12.34, "12.3"), (12345.6, "12,346")])
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_every_row_is_of_a_known_figure() -> None:
    assert {row.figure for row in ROWS} == set(FIGURES)
    assert len({row.key for row in ROWS}) == len(ROWS)


def test_every_row_is_drawn_that_has_a_best_peer_also_those_that_are_bad_for_us() -> None:
    drawn = [bar.label for bar in advantages(results())]
    assert drawn == [row.label for row in ROWS if row.is_drawn]
    assert [row.key for row in ROWS if not row.is_drawn] == ["churn_memory.growth"]
    assert {"round trip, CPU", "requests beside bulk, median", "memory at the start"} <= set(drawn)


def test_no_proxy_has_no_processor_time() -> None:
    found = medians_of(results())
    for row in ROWS:
        assert (DIRECT in value_by_system(row, found)) == ("CPU" not in row.label)


def test_wrk_output() -> None:
    assert parse_wrk(WRK_TEXT) == {
        "requests": 20000,
        "requests_s": 10000,
        "errors": 0,
        "p50_us": 750,
        "p99_us": 2100,
    }


@pytest.mark.parametrize("text", ["", "unable to connect", WRK_TEXT.replace("errors 0", "errors 900")])
def test_wrk_that_failed(text: str) -> None:
    with pytest.raises(ToolFailed, match="wrk"):
        parse_wrk(text)


def iperf3_text() -> str:
    def part(start: float) -> dict[str, Any]:
        return {"sum": {"start": start, "end": start + 1, "seconds": 1.0, "bytes": int(1e9 * (start + 1))}}

    received = {"bytes": 6_000_000_000, "bits_per_second": 16e9}
    return json.dumps({"intervals": [part(0), part(1), part(2)], "end": {"sum_received": received}})


def test_iperf3_output_whole_and_in_part() -> None:
    assert parse_iperf3(iperf3_text()) == {"bytes": 6e9, "gbit_s": 16}
    assert parse_iperf3(iperf3_text(), from_s=1, until_s=2) == {"bytes": 2e9, "gbit_s": 16}


@pytest.mark.parametrize("text", ["", '{"error": "unable to connect"}'])
def test_iperf3_that_failed(text: str) -> None:
    with pytest.raises(ToolFailed, match="iperf3"):
        parse_iperf3(text)


def test_iperf3_without_the_part_that_is_wanted() -> None:
    with pytest.raises(ToolFailed, match="no interval"):
        parse_iperf3(iperf3_text(), from_s=7, until_s=8)


def test_charts_are_xml_whatever_the_labels() -> None:
    picture = bars(
        "<t> & co", "s", [Bar("a<b", 0.5, "1", "2"), Bar("c", 20, "1", "2")], reference="r", columns=("a", "b")
    )
    ElementTree.fromstring(picture)  # noqa: S314 - our own text
    chart = [Line("a & b", [(1, 1), (10, 100)], 0), Line("none", [], 1), Line("c", [(1, 2), (10, 3)], 2)]
    picture = lines("t", "s", chart, x_axis=linear_axis("x", 10), y_axis=decade_axis("y", 1, 100))
    ElementTree.fromstring(picture)  # noqa: S314


def test_axes() -> None:
    assert [label for _, label in linear_axis("x", 9).ticks] == ["0", "2", "4", "6", "8", "10"]
    assert [value for value, _ in decade_axis("y", 0.5, 20).ticks] == [0.1, 1, 10, 100]
    place = decade_axis("y", 1, 100).place(0, 200)
    assert [place(value) for value in (1, 10, 100)] == [0, 100, 200]


def test_labels_are_moved_apart_and_stay_inside() -> None:
    assert spread([10, 12, 100], step=15, highest=200) == [10, 25, 100]
    assert spread([100, 100], step=15, highest=100) == [85, 100]
    assert spread([], step=15, highest=100) == []


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    paths = write(results(), tmp_path)
    assert {path.name for path in paths} == {
        "benchmarks.md",
        "benchmarks.svg",
        "benchmarks-memory.svg",
        "benchmarks-latency.svg",
        "benchmarks-records.svg",
    }
    for path in paths[1:]:
        ElementTree.parse(path)  # noqa: S314
    text = (tmp_path / "benchmarks.md").read_text()
    for part in ("make bench", "2026-01-02", "wrk 4.1.0", "spiped", "5 rounds", "handshake", "a table", "stuck"):
        assert part in text
    assert "- new, v2ray: 2 of 5: stuck" in text
    assert "over 100 ms 4 s" in text
    assert "| bulk up | 1.00 Gbit/s | 8.00 Gbit/s (OpenSSH) | ≥ 1.3 × best: 0.12, NOT met;" in text


@pytest.mark.parametrize("missing", ["figures", "codec", "allocations", "versions", "machine", "failures"])
def test_every_part_may_be_missing(missing: str) -> None:
    part = {key: value for key, value in results().items() if key != missing}
    assert document(part, list(pictures(part))).startswith("# Benchmarks")
    assert document({}, []).startswith("# Benchmarks")


@pytest.mark.parametrize(
    ("control", "default", "told", "is_even"),
    [
        ("bbr", "bbr", "was bbr. ", False),
        ("cubic", "bbr", "was cubic, in a network of the run's own; the system's: bbr. ", True),
        ("reno", None, "was reno. ", True),
    ],
)
def test_the_report_says_whose_connections_were_paced(
    control: str, default: str | None, told: str, *, is_even: bool
) -> None:
    machine = {"congestion control": control} | ({"the system's congestion control": default} if default else {})
    text = document({**results(), "machine": machine}, [])
    assert told in text
    assert ("the same for Reflex and its peers" in text) == is_even
    assert ("its peers were paced" in text) != is_even
    assert table({"machine": machine}).startswith(f"congestion control: {control}")


def in_own_network(control: str) -> subprocess.CompletedProcess[str]:
    """bench.network in a process, which then prints what it was told and what holds."""
    code = "import sys; from bench import machine, network; default = network.enter_own_network(sys.argv[1]); "
    code += "print(default, *machine.describe(system_congestion_control=default).values(), sep='|')"
    command = [sys.executable, "-c", code, control]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_a_run_may_have_a_network_and_a_congestion_control_of_its_own() -> None:
    with namespace():  # as root, or skipped
        pass
    before = congestion_control()
    done = in_own_network("reno")
    assert done.returncode == 0, done.stderr
    default, *described = done.stdout.strip().split("|")
    assert default == before
    assert described[4:6] == ["reno", before]
    assert congestion_control() == before


def test_an_unknown_congestion_control_is_refused_with_those_that_there_are() -> None:
    done = in_own_network("none-such")
    assert done.returncode == 1
    assert "none-such: this kernel has " in done.stderr
    assert "reno" in done.stderr


def test_two_runs_side_by_side() -> None:
    line = next(line for line in comparison(results(), results(2.0)).splitlines() if line.startswith("bulk up ["))
    assert line.split()[-3:] == ["1.00", "2.00", "2.00"]
    assert "–" in comparison({}, results())


def test_the_table_names_what_was_measured() -> None:
    text = table(results())
    assert "bulk up, Gbit/s" in text
    assert "shadowsocks" in text
    assert "NOT met" in text
    assert medians_of({}) == {}


def test_unknown_names_are_refused() -> None:
    assert choose(None, ["a", "b"]) == ["a", "b"]
    assert choose("b", ["a", "b"]) == ["b"]
    with pytest.raises(SystemExit, match="unknown: c"):
        choose("c", ["a", "b"])


def test_a_program_is_watched_and_ended_with_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with Program("parent", [sys.executable, "-c", code], tmp_path / "log") as program:
        for _ in range(500):
            if len(pids := family([program.pid])) == 2:
                break
            threading.Event().wait(0.01)
        assert len(pids) == 2
    assert family(pids) == []


def test_a_program_that_ends_early_says_why(tmp_path: Path) -> None:
    with (
        Program("short", [sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log") as program,
        pytest.raises(StartFailed, match="no such thing"),
    ):
        wait_listening([free_port()], [program])


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.is_installed])
def test_every_installed_system_has_a_plan(name: str, tmp_path: Path) -> None:
    site = Site(tmp_path, targets=(1, 2), mids=(3, 4), vias=(5, 6), listens=(7, 8))
    try:
        plan = SYSTEMS[name].plan(site)
    except subprocess.CalledProcessError as error:
        pytest.fail(str(error.stderr))
    assert bool(plan.server) == bool(plan.client) == (name != "direct")


class Echo(LoopbackServer):
    def serve(self, sock: Any) -> None:
        while data := sock.recv(65_536):
            sock.sendall(data)


def test_a_way_delays_and_keeps_the_order() -> None:

    near, source = socket.socketpair()
    sink, far = socket.socketpair()
    with near, source, sink, far:
        Way(source, sink, 0.05, 0.0)
        started_s = time.monotonic()
        near.sendall(b"one")
        assert far.recv(10) == b"one"
        assert time.monotonic() - started_s >= 0.05
        near.sendall(b"two")
        near.shutdown(socket.SHUT_WR)
        assert far.recv(10) == b"two"
        assert far.recv(10) == b""


def test_listening_ports_are_seen_without_a_connection() -> None:
    with Echo() as server:
        assert server.port in listening_ports()
        assert server.connections == 0
