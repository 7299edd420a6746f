"""What is allocated for a connection and for 100 frames, in both halves, with pools and without.

Two loops. *codec*: 100 frames of 4,096 bytes through an encoder and a decoder with the keys of a fresh
session, a connection each. *relay*: both daemons in this process, on the loop they always run on, with
real sockets on loopback and one tunnel (``max_tunnels`` is 1): connections of one request each through
SOCKS5; one long-lived connection that moves 100 pieces of 4,096 bytes both ways; and the same connection
with a reader so late that every socket on the way is full and the daemons must keep bytes.

Three instruments. ``tracemalloc``: what is still there, and the peak. :mod:`bench.churn`: what was
allocated and freed in between, by source line. The pools' own figures: how many buffers were ever made.

The exit code is 1 where a claim does not hold: after warm-up no line of the tunnel's own code allocates
512 bytes or more while bytes are relayed, nor does so for each new connection (a table of what is live
is rebuilt now and then: such lines are listed), and no connection leaves a buffer behind. The loop's polls
are told apart: each makes an array for the kernel's answer, freed at once, and a list of what was in it,
which the tracer can only see as one sum.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import linecache
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import reflex.loop
from bench.churn import LARGE_BYTES, AllocationTracer, Site, short_path, totals
from bench.codec import FRAME_SIZE, FRAMES, frames
from bench.inprocess import PairInProcess
from reflex.loop import MAX_EVENTS, DirectLoop
from reflex.protocol.pools import Pools
from reflex.protocol.wire import CLIENT_HELLO_SIZE, SERVER_HELLO_SIZE

CONNECTIONS: Final = 10_000
CONNECTIONS_QUICK: Final = 500  # also without pools: nothing is claimed of those
AT_ONCE: Final = 32
WARM_UP_CONNECTIONS: Final = 320  # ten for each client: the busiest moment of a burst has come by then
WARM_UP_QUIET: Final = 10  # a transfer is warm when so many in a row have made no buffer
WARM_UP_MOST: Final = 40
TRACED_CONNECTIONS: Final = 48
TRACED_CONNECTIONS_QUICK: Final = 16
TRACED_AT_ONCE: Final = 8
CODEC_CONNECTIONS: Final = 200
CODEC_TRACED: Final = 2
TRACES: Final = 2  # the first to warm up, the last one counts: see AllocationTracer
OFTEN: Final = 0.5  # so many large allocations a connection: not a table that is rebuilt now and then
TOP_LINES: Final = 8

POLL_ARRAY_BYTES: Final = 12 * MAX_EVENTS  # struct epoll_event, packed
POLL_LIST_BYTES: Final = 8 * MAX_EVENTS

# The Go program that this protocol descends from: its own benchmark of the same loop (`go test -bench -benchmem`).
ORIGIN: Final = {"bytes": 833_000, "objects": 808}

EXAMPLES: Final = """examples:
  python -m bench.allocations                      pools on and off side by side, two to four minutes
  python -m bench.allocations --connections 1000   fewer connections
  python -m bench.allocations --no-pool            with pools switched off alone; nothing is claimed then
  python -m bench.allocations --json alloc.json    the figures as well, for another program
"""


def live() -> tuple[int, int]:
    """Blocks and bytes that the tunnel's own lines, and CPython's on their behalf, hold now."""
    gc.collect()
    statistics = tracemalloc.take_snapshot().statistics("filename")
    ours = [each for each in statistics if short_path(each.traceback[0].filename).startswith("reflex/")]
    return sum(each.count for each in ours), sum(each.size for each in ours)


def buffer_bytes(pools: Mapping[str, Pools]) -> int:
    """How many bytes of buffers these pools ever made."""
    sizes = {"client_hello": CLIENT_HELLO_SIZE, "server_hello": SERVER_HELLO_SIZE, "frames": 0}
    total = 0
    for bundle in pools.values():
        for name, figures in bundle.statistics().items():
            total += figures.created * (sizes[name] if name in sizes else int(name))
    return total


def pool_figures(pools: Mapping[str, Pools]) -> dict[str, Any]:
    """What was made and how often a borrow found one, for each half and each pool that was used."""
    return {
        half: {
            name: {"created": each.created, "acquired": each.acquired, "hit_rate": each.hit_rate}
            for name, each in bundle.statistics().items()
            if each.acquired
        }
        for half, bundle in pools.items()
    }


def is_poll(site: Site) -> bool:
    """Whether the line is one where the daemons' loop asks the kernel what is ready."""
    return site.file == "reflex/loop.py" and "poll(" in linecache.getline(reflex.loop.__file__, site.line)


def churn(sites: Sequence[Site], *, per: int) -> dict[str, Any]:
    """The tunnel's own lines for one connection of ``per``, the top ones, and every line with a large one."""
    polls = [site for site in sites if is_poll(site)]
    ours = [site for site in sites if site.is_ours and not is_poll(site)]
    sums = totals(ours)
    return {
        "allocations": sums["count"] / per,
        "bytes": sums["bytes"] / per,
        "large_allocations": sums["large_count"] / per,
        "large_bytes": sums["large_bytes"] / per,
        "top": [asdict(site) for site in ours[:TOP_LINES]],
        "large_ours": [asdict(site) for site in ours if site.large_count],
        "polls": [asdict(site) for site in polls if site.large_count],
        "large_library": [asdict(site) for site in sites if site.large_count and site.file.startswith("lib/")],
    }


def measure_codec(*, pooled: bool, connections: int = CODEC_CONNECTIONS) -> dict[str, Any]:
    """The codec loop; ``tracemalloc`` must be tracing. See :func:`measure` for the keys."""
    pools = {"both": Pools(pooled=pooled)}
    once = frames(pools["both"], packed=False)
    result = _one_use(once)
    for _ in range(CODEC_TRACED):
        once()
    made = buffer_bytes(pools)
    blocks, size = live()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(connections):
        once()
    result["peak_bytes"] = tracemalloc.get_traced_memory()[1] - before
    blocks_after, size_after = live()
    result["growth_blocks"] = (blocks_after - blocks) / connections
    result["growth_bytes"] = (size_after - size) / connections
    result["buffer_bytes"] = (buffer_bytes(pools) - made) / connections
    for _ in range(TRACES):
        with AllocationTracer() as tracer:
            for _ in range(CODEC_TRACED):
                once()
    return {
        **result,
        "connections": connections,
        **churn(tracer.sites(), per=CODEC_TRACED),
        "pools": pool_figures(pools),
    }


def _one_use(once: Callable[[], object]) -> dict[str, Any]:
    blocks, size = live()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    once()
    peak = tracemalloc.get_traced_memory()[1] - before
    blocks_after, size_after = live()
    return {"first_blocks": blocks_after - blocks, "first_bytes": size_after - size, "first_peak_bytes": peak}


async def measure_relay(*, pooled: bool, connections: int, quick: bool) -> dict[str, Any]:
    """The relay; ``tracemalloc`` must be tracing. See :func:`measure` for the keys."""
    result: dict[str, Any] = {"connections": connections}
    async with PairInProcess(pooled=pooled) as pair:
        blocks, size = live()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        await pair.requests(1, at_once=1)
        result["first_peak_bytes"] = tracemalloc.get_traced_memory()[1] - before
        blocks_after, size_after = live()
        result["first_blocks"], result["first_bytes"] = blocks_after - blocks, size_after - size

        await pair.requests(WARM_UP_CONNECTIONS, at_once=AT_ONCE)
        made = buffer_bytes(pair.pools)
        blocks, size = live()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        await pair.requests(connections, at_once=AT_ONCE)
        result["peak_bytes"] = tracemalloc.get_traced_memory()[1] - before
        blocks_after, size_after = live()
        result["growth_blocks"] = (blocks_after - blocks) / connections
        result["growth_bytes"] = (size_after - size) / connections
        result["buffer_bytes"] = (buffer_bytes(pair.pools) - made) / connections

        traced = TRACED_CONNECTIONS_QUICK if quick else TRACED_CONNECTIONS

        async def requests() -> None:
            await pair.requests(traced, at_once=TRACED_AT_ONCE)

        result.update(churn(await _traced(requests), per=traced))

        piece = bytes(FRAME_SIZE)
        sock = await pair.connect()
        with sock:

            async def transfer() -> None:
                await pair.exchange(sock, piece, times=FRAMES)

            async def full() -> None:
                await pair.receive(sock, await pair.fill(sock))

            for name, work in (("long_lived", transfer), ("full_sockets", full)):
                warm_up = await _warm_up(work, pair.pools)
                made = buffer_bytes(pair.pools)
                await work()
                made = buffer_bytes(pair.pools) - made
                result[name] = {**churn(await _traced(work), per=1), "buffer_bytes": made, "warm_up": warm_up}
        await pair.settle()
        result["pools"] = pool_figures(pair.pools)
    return result


async def _warm_up(work: Callable[[], Awaitable[None]], pools: Mapping[str, Pools]) -> int:
    """Repeat the work until nothing was made for it for a few times, since windows grow; returns how often it was."""
    quiet = 0
    for count in range(1, WARM_UP_MOST + 1):
        made = buffer_bytes(pools)
        await work()
        quiet = quiet + 1 if buffer_bytes(pools) == made else 0
        if quiet == WARM_UP_QUIET:
            return count
    return WARM_UP_MOST


async def _traced(work: Callable[[], Awaitable[None]]) -> list[Site]:
    for _ in range(TRACES):
        with AllocationTracer() as tracer:
            await work()
    return tracer.sites()


def measure(*, quick: bool, connections: int | None = None, pools: Sequence[bool] = (True, False)) -> dict[str, Any]:
    """Both loops, with pools and without.

    Args:
        quick: fewer connections.
        connections: how many in the relay's loop; by default CONNECTIONS, or CONNECTIONS_QUICK.
        pools: which sides to measure; claims are made of True alone.

    Returns:
        ``pooled`` and ``unpooled``, each ``codec`` and ``relay`` with, for the tunnel's own lines:
        ``first_blocks``, ``first_bytes`` (left by the first connection), ``first_peak_bytes``; then, after
        warm-up and for each connection, ``growth_blocks``, ``growth_bytes``, ``buffer_bytes`` (buffers made);
        ``peak_bytes`` over all of them; ``allocations``, ``bytes``, ``large_allocations``, ``large_bytes``
        (allocated, freed or not); ``top``, ``large_ours``, ``polls``, ``large_library`` (sites, see bench.churn);
        and ``pools``. ``relay`` has ``long_lived`` besides, for FRAMES pieces both ways, and ``full_sockets``, for a
        reader that is late, each with ``warm_up``: after how many of them nothing was made any more.
        ``claims``: each ``text`` and ``holds``. ``origin``: the published figures. ``loop``: what the daemons ran on.
    """
    if connections is None:
        connections = CONNECTIONS_QUICK if quick else CONNECTIONS
    result: dict[str, Any] = {"origin": ORIGIN, "loop": "the loop of `reflex/loop.py`"}
    was_tracing = tracemalloc.is_tracing()
    for pooled in pools:
        count = connections if pooled else min(connections, CONNECTIONS_QUICK)
        tracemalloc.start()
        try:
            # The daemons' own. uvloop's callbacks are compiled: their lines could not be told.
            with asyncio.Runner(loop_factory=DirectLoop) as runner:
                result["pooled" if pooled else "unpooled"] = {
                    "codec": measure_codec(pooled=pooled),
                    "relay": runner.run(measure_relay(pooled=pooled, connections=count, quick=quick)),
                }
        finally:
            if not was_tracing:
                tracemalloc.stop()
    result["claims"] = claims(result["pooled"]) if "pooled" in result else []
    return result


def claims(pooled: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is to hold with pools on, and whether it does."""
    codec, relay = pooled["codec"], pooled["relay"]
    moving = [relay["long_lived"], relay["full_sockets"]]
    large = f"allocation of {LARGE_BYTES} bytes or more by a line of reflex/"
    found = [
        (f"codec, after warm-up: no {large}", not codec["large_ours"]),
        ("codec: 0 bytes of buffers a connection after warm-up", codec["buffer_bytes"] == 0),
        (f"relay, {FRAMES} pieces both ways: no {large}", not moving[0]["large_ours"]),
        (f"relay, full sockets: no {large}", not moving[1]["large_ours"]),
        (f"relay, for each new connection (all on one tunnel): no {large}", relay["large_allocations"] < OFTEN),
        (
            f"relay: 0 bytes of buffers a connection over {relay['connections']:,} connections",
            relay["buffer_bytes"] == 0,
        ),
        ("relay: 0 bytes of buffers while pieces move", moving[0]["buffer_bytes"] == 0),
        (
            f"a poll's array of {MAX_EVENTS} events ({POLL_ARRAY_BYTES} bytes) and its list (at most "
            f"{POLL_LIST_BYTES}) are below {LARGE_BYTES} bytes each",
            max(POLL_ARRAY_BYTES, POLL_LIST_BYTES) < LARGE_BYTES,
        ),
    ]
    return [{"text": text, "holds": holds} for text, holds in found]


_ROWS: Final = (
    ("first use: blocks left", "first_blocks"),
    ("first use: bytes left", "first_bytes"),
    ("first use: peak, bytes", "first_peak_bytes"),
    ("after warm-up: allocations", "allocations"),
    ("  bytes allocated", "bytes"),
    (f"  of {LARGE_BYTES} bytes or more", "large_allocations"),
    ("  bytes in those", "large_bytes"),
    ("  bytes of buffers made", "buffer_bytes"),
    ("  blocks left", "growth_blocks"),
    ("  bytes left", "growth_bytes"),
    ("peak over all, bytes", "peak_bytes"),
)


_MOVING: Final = {
    "long_lived": f"relay: {FRAMES} pieces of {FRAME_SIZE:,} both ways",
    "full_sockets": "relay: full sockets, a late reader",
}


def table(result: Mapping[str, Any]) -> str:
    """The result for a person."""
    sides = [side for side in ("pooled", "unpooled") if side in result]
    origin = result["origin"]
    lines = []
    for part, title in (("codec", f"codec: {FRAMES} frames of {FRAME_SIZE:,} bytes"), ("relay", "relay: one request")):
        lines.append(f"{title:<44}" + "".join(f"{side:>16}" for side in sides))
        for name, key in _ROWS:
            lines.append(f"  {name:<42}" + "".join(f"{result[side][part][key]:>16,.1f}" for side in sides))
        if part == "codec":
            lines.append(
                f"  (the Go program that this protocol descends from: {origin['bytes']:,} bytes, {origin['objects']:,} "
                "objects\n  for the same loop, as its own benchmark publishes them)"
            )
    for part, title in _MOVING.items():
        lines.append(f"{title:<44}" + "".join(f"{side:>16}" for side in sides))
        for name, key in _ROWS[3:8]:
            cells = "".join(f"{result[side]['relay'][part][key]:>16,.1f}" for side in sides)
            lines.append(f"  {name:<42}{cells}")
    for side in sides:
        relay = result[side]["relay"]
        for title, where in (
            ("codec", result[side]["codec"]),
            ("relay, new connections", relay),
            *((title, relay[part]) for part, title in _MOVING.items()),
        ):
            lines += ["", f"{side}, {title}: lines that allocate most"]
            lines += [_site_line(site) for site in where["top"]]
            for heading, key in (
                ("the tunnel's own", "large_ours"),
                ("the loop's polls, array and list together", "polls"),
                ("of the standard library", "large_library"),
            ):
                lines.append(f"  {LARGE_BYTES} bytes or more, {heading}: {'' if where[key] else 'none'}")
                lines += [_site_line(site) for site in where[key]]
        lines += ["", f"{side}: hit rates of the relay's pools"]
        for half, figures in relay["pools"].items():
            rates = ", ".join(
                f"{name} {each['hit_rate']:.3%} ({each['created']} made)" for name, each in figures.items()
            )
            lines.append(f"  {half}: {rates}")
    lines.append("")
    lines += [f"{'holds' if each['holds'] else 'DOES NOT HOLD'}: {each['text']}" for each in result["claims"]]
    return "\n".join(lines)


def _site_line(site: Mapping[str, Any]) -> str:
    place = f"{site['file']}:{site['line']}"
    return (
        f"    {place:<44}{site['count']:>8,} times{site['bytes']:>12,} bytes, at most {site['largest_bytes']:,} at once"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON where asked; 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.allocations",
        description="What a connection and 100 frames allocate, in both halves, with pools and without.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"{CONNECTIONS_QUICK} connections")
    parser.add_argument("--connections", type=int, metavar="N", help=f"how many (default: {CONNECTIONS})")
    parser.add_argument("--no-pool", action="store_true", help="with pools switched off alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    if options.connections is not None and options.connections < 1:
        parser.error("--connections: expected 1 or more")
    sides = (False,) if options.no_pool else (True, False)
    result = measure(quick=options.quick, connections=options.connections, pools=sides)
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(each["holds"] for each in result["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
