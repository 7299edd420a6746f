"""bench.codec, bench.allocations, bench.churn and bench.load: what they count, and a tiny run of each. No timing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import timeit
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reflex.loop
from bench import allocations, codec, load
from bench.churn import AllocationTracer, Site, short_path, totals
from bench.inprocess import PIECE_SIZE, PairInProcess
from reflex.protocol.keys import CipherState
from reflex.protocol.pools import Pools
from reflex.protocol.wire import KEY_SIZE, RECORD_OVERHEAD, Suite


@pytest.fixture
def tracing() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


# bench.codec


@pytest.mark.parametrize("suite", list(Suite))
@pytest.mark.parametrize("size", [1, 64, 4_096])
def test_the_plain_cipher_writes_the_same_records(suite: Suite, size: int) -> None:
    root, body = os.urandom(KEY_SIZE), os.urandom(size)
    out = memoryview(bytearray(size + RECORD_OVERHEAD))
    sealer, plain, opener = CipherState(suite, root), codec.PlainCipher(suite, root), codec.PlainCipher(suite, root)
    for _ in range(3):
        sealer.seal(memoryview(body), out)
        assert plain.seal(body) == bytes(out)
        assert opener.open(bytes(out)) == body


def test_plain_frames_come_out_as_they_went_in() -> None:
    body = codec.plain_frame(1, b"first") + codec.plain_frame(3, b"")
    assert list(codec.plain_frames(body)) == [(codec.DATA, 1, b"first"), (codec.DATA, 3, b"")]


@pytest.mark.parametrize("packed", [False, True])
def test_every_loop_moves_every_frame(packed: bool) -> None:  # noqa: FBT001
    pools = Pools()
    for loop in (codec.frames(pools, packed=packed), codec.plain_frames_loop(packed=packed)):
        assert loop() == codec.FRAMES * codec.FRAME_SIZE
    assert pools.in_use == 0


@pytest.mark.parametrize("pooled", [False, True])
def test_a_handshake_completes(pooled: bool) -> None:  # noqa: FBT001
    codec.handshake(pooled=pooled)()


def test_a_row_tells_best_median_and_verdict() -> None:
    timers = {"ours": timeit.Timer("pass"), "plain": timeit.Timer("pass")}
    case = codec.Case("nothing", timers, "ns", 1e9)
    codec.in_turn([case], count=2)
    codec.in_turn([case], count=1)
    row = case.row()
    assert [len(seconds) for seconds in case.seconds.values()] == [3, 3]
    assert row["met"] is True
    assert 0 < row["best"] <= row["median"]
    assert row["plain"]["unit"] == "ns"
    assert (codec.verdict(met=True), codec.verdict(met=False), codec.verdict(met=None)) == ("met", "not met", "")


def test_codec_smoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(codec, "ROUND_S", 1e-4)
    monkeypatch.setattr(codec, "ROUNDS_QUICK", 1)
    assert codec.main(["--quick", "--json", str(tmp_path / "codec.json")]) == 0
    result = json.loads((tmp_path / "codec.json").read_text())
    shown = capsys.readouterr().out
    assert all(row["name"] in shown for row in result["rows"])
    assert len(result["records"]) == len(Suite) * len(codec.BODY_SIZES_QUICK)


# bench.churn


def allocate() -> bytearray:
    len(bytes(600))
    len(bytes(100))
    return bytearray(5_000)


@pytest.mark.usefixtures("tracing")
def test_what_is_freed_at_once_is_found_with_its_line() -> None:
    for _ in range(2):
        with AllocationTracer() as tracer:
            allocate()
    first = allocate.__code__.co_firstlineno
    large = {site.line - first: site for site in tracer.sites() if site.large_count and site.file.startswith("tests/")}
    assert sorted(large) == [1, 3]
    assert 600 <= large[1].largest_bytes < 700
    assert 5_000 <= large[3].largest_bytes < 5_200
    assert not large[1].is_ours


def test_nothing_is_traced_without_tracemalloc() -> None:
    if not tracemalloc.is_tracing():
        with pytest.raises(RuntimeError), AllocationTracer():
            pass


def test_totals_are_sums() -> None:
    site = Site("reflex/pool.py", 1, count=3, bytes=900, largest_bytes=700, large_count=1, large_bytes=700)
    assert site.is_ours
    assert totals([site, site]) == {"count": 6, "bytes": 1_800, "large_count": 2, "large_bytes": 1_400}


def test_paths_are_told_without_the_machine() -> None:
    assert short_path(__file__) == "tests/test_bench_codec.py"
    assert short_path(asyncio.events.__file__) == "lib/asyncio/events.py"
    assert short_path("/somewhere/else.py") == "else.py"
    assert short_path("<string>") == "<string>"


# bench.allocations


def test_buffers_are_counted_in_bytes() -> None:
    pools = Pools()
    for size in (2_048, 8_192):
        pools.buffers.release(pools.buffers.acquire(size))
    pools.frames.release(pools.frames.acquire())
    pools.client_hellos.release(pools.client_hellos.acquire())
    assert allocations.buffer_bytes({"a": pools}) == 2_048 + 8_192 + 76
    assert set(allocations.pool_figures({"a": pools})["a"]) == {"2048", "8192", "frames", "client_hello"}


@pytest.mark.usefixtures("tracing")
def test_the_codec_loop_makes_no_buffers_with_pools_and_many_without() -> None:
    pooled, unpooled = (allocations.measure_codec(pooled=pooled, connections=2) for pooled in (True, False))
    assert pooled["buffer_bytes"] == 0
    assert unpooled["buffer_bytes"] > codec.FRAMES * codec.FRAME_SIZE
    assert unpooled["large_bytes"] > pooled["large_bytes"]


def test_polls_of_the_daemons_loop_are_told_apart() -> None:
    source = Path(reflex.loop.__file__).read_text().splitlines()
    polls = [number for number, line in enumerate(source, start=1) if "poll(wait_s, MAX_EVENTS)" in line]
    lines = {"poll": polls[0], "other": source.index("class DirectLoop(asyncio.SelectorEventLoop):") + 1}
    sites = [Site("reflex/loop.py", line, 1, 600, 600, 1, 600) for line in lines.values()]
    assert [allocations.is_poll(site) for site in sites] == [True, False]
    told = allocations.churn(sites, per=1)
    assert [site["line"] for site in told["polls"]] == [lines["poll"]]
    assert [site["line"] for site in told["large_ours"]] == [lines["other"]]
    assert told["large_allocations"] == 1


def test_claims_are_judged() -> None:
    calm = {"large_ours": [], "buffer_bytes": 0, "large_allocations": 0.1, "connections": 1}
    busy: dict[str, Any] = {**calm, "large_ours": [1], "large_allocations": 1.0}
    good = allocations.claims({"codec": calm, "relay": {**calm, "long_lived": calm, "full_sockets": calm}})
    bad = allocations.claims({"codec": busy, "relay": {**busy, "long_lived": busy, "full_sockets": busy}})
    assert all(claim["holds"] for claim in good)
    assert sum(not claim["holds"] for claim in bad) == 4


@pytest.mark.timeout(60)
def test_the_pair_in_process_relays_and_leaves_nothing() -> None:
    async def run() -> dict[str, Pools]:
        async with PairInProcess(pooled=True) as pair:
            await pair.requests(4, at_once=2)
            with await pair.connect() as sock:
                await pair.exchange(sock, bytes(PIECE_SIZE), times=2)
            await pair.settle()
            return pair.pools

    pools = asyncio.run(run())
    assert [bundle.in_use for bundle in pools.values()] == [0, 0]


# bench.load


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 5), (0.9, 9), (0.91, 10), (1.0, 10)])
def test_percentiles(share: float, expected: float) -> None:
    assert load.percentile([*range(1, 11)], share) == expected
    assert load.percentile([], share) == 0.0


def test_tunnels_are_the_outbound_halfs() -> None:
    def figures(tunnels: int, streams: int) -> dict[str, Any]:
        return {"counters": {"tunnels_opened": tunnels, "streams_opened": streams}, "gauges": {"idle_tunnels": 0}}

    inbound: dict[str, Any] = {"counters": {}, "gauges": {}}
    told = load.tunnels([inbound, figures(1, 10)], [inbound, figures(3, 50)])
    assert told == {"opened": 2, "streams": 40, "reused": 38, "reuse_rate": 0.95}
    assert load.tunnels([None], [None]) is None


def test_only_a_process_with_a_handler_is_signalled() -> None:
    bit = 1 << (signal.SIGUSR1 - 1)
    assert load.handles_usr1(f"Name:\tx\nSigCgt:\t{bit:016x}\n")
    assert not load.handles_usr1(f"Name:\tx\nSigCgt:\t{~bit & (2**64 - 1):016x}\n")
    assert not load.handles_usr1("Name:\tx\n")


@pytest.mark.timeout(90)
def test_load_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "load.json"
    assert load.main(["--clients", "2", "--requests", "5", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["requests"] == 10
    assert result["errors"] == {}
    assert result["tunnels"]["streams"] == 10
    assert [row["name"] for row in result["descriptors"]] == ["reflex-inbound", "reflex-outbound"]
    assert "requests per second" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--clients", "0"], ["--socks", "127.0.0.1:1"], ["--pid", "1"], ["--socks", "x"]]
)
def test_load_refuses_what_does_not_fit(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        load.main(arguments)
