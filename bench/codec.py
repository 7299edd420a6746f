"""The protocol alone, in one process: handshake, records by size, frames, pools.

Every figure of Reflex's own code stands beside a plain version of the same work, written below: bytes
in, new bytes out, ``struct.pack`` and slices, no pools. No sockets, no loop: what remains is the
price of the protocol itself. Times are of the best round and of the median one; the best is the one
that noise of the machine disturbed least, and it is the one that is held against a target.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from reflex.pool import BufferPool, ObjectPool, TieredPool
from reflex.protocol.frames import Frame, FrameDecoder, FrameEncoder
from reflex.protocol.handshake import ClientCredentials, ClientHandshake, ServerCredentials, accept_hello
from reflex.protocol.keys import CipherState, traffic_key
from reflex.protocol.pools import Pools
from reflex.protocol.replay import ReplaySet
from reflex.protocol.wire import (
    CLIENT_HELLO_SIZE,
    FRAME_HEADER_SIZE,
    KEY_SIZE,
    LENGTH_CHUNK_SIZE,
    MAX_BODY_SIZE,
    NONCE_SIZE,
    RECORD_OVERHEAD,
    SERVER_HELLO_SIZE,
    USER_ID_SIZE,
    FrameType,
    Suite,
)

FRAMES: Final = 100
FRAME_SIZE: Final = 4_096
# The body of the largest record stands for 128 KiB: 131,072 bytes less what a record adds.
BODY_SIZES: Final = (64, 256, 1_024, 4_096, 16_384, 65_536, MAX_BODY_SIZE)
BODY_SIZES_QUICK: Final = (64, 4_096, MAX_BODY_SIZE)
POOL_BUFFER_SIZE: Final = 2_048  # the smallest tier, and so the one that is borrowed most
WIPED_SIZE: Final = 128  # a small request: what a buffer of the smallest tier typically holds
STREAM_ID: Final = 1
DATA: Final = int(FrameType.DATA)

HANDSHAKE_TARGET_US: Final = 250.0
FRAMES_TARGET_MS: Final = 0.8
PAIR_TARGET_NS: Final = 400.0

ROUNDS: Final = 15
ROUNDS_QUICK: Final = 5
ROUND_S: Final = 0.02  # long enough that the clock and the loop around a call are nothing

EXAMPLES: Final = """examples:
  python -m bench.codec                     the whole table, about half a minute
  python -m bench.codec --quick             fewer sizes and rounds, a few seconds
  python -m bench.codec --json codec.json   the figures as well, for another program
"""


@dataclass
class Case:
    """One row of figures: that of the timer ``ours`` is held against the target, the others stand beside it."""

    name: str
    timers: Mapping[str, timeit.Timer]
    unit: str
    target: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of one execution, for each timer and round

    def row(self) -> dict[str, Any]:
        """The figures of ``ours`` at the top, the others' under their names."""
        figures = {key: figure(seconds, unit=self.unit) for key, seconds in self.seconds.items()}
        ours = figures.pop("ours")
        met = None if self.target is None else ours["best"] <= self.target
        return {"name": self.name, **ours, "target": self.target, "met": met, **figures}


def in_turn(cases: Sequence[Case], *, count: int) -> None:
    """Time each timer of the cases, in turn, ``count`` times over.

    Taking turns gives what else the machine does the same chance to disturb each of them, and none of them all of
    its rounds in a bad moment.
    """
    numbers = {}
    for case in cases:
        for name, timer in case.timers.items():
            once_s = min(timer.repeat(repeat=5, number=5)) / 5
            numbers[case.name, name] = max(1, round(ROUND_S / max(once_s, 1e-7)))
    for _ in range(count):
        for case in cases:
            for name, timer in case.timers.items():
                number = numbers[case.name, name]
                case.seconds.setdefault(name, []).append(timer.timeit(number) / number)


def figure(seconds: Sequence[float], *, unit: str) -> dict[str, Any]:
    """What one measurement says: ``best`` and ``median`` in ``unit``."""
    factor = {"ns": 1e9, "µs": 1e6, "ms": 1e3}[unit]
    return {"best": min(seconds) * factor, "median": statistics.median(seconds) * factor, "unit": unit}


# The same without pools, and without anything else of Reflex's but its key schedule.


class PlainCipher:
    """One direction's AEAD and nonces, bytes in and new bytes out. Wire format of section 4."""

    def __init__(self, suite: Suite, root: bytes) -> None:
        key, iv = traffic_key(root, suite)
        self._aead = AESGCM(key) if suite == Suite.AES_256_GCM else ChaCha20Poly1305(key)
        self._iv = int.from_bytes(iv)
        self._n = 0

    def _nonce(self) -> bytes:
        nonce = (self._iv ^ self._n).to_bytes(NONCE_SIZE)
        self._n += 1
        return nonce

    def seal(self, body: bytes) -> bytes:
        """The record of a body."""
        length = self._aead.encrypt(self._nonce(), struct.pack(">I", len(body)), None)
        return length + self._aead.encrypt(self._nonce(), body, None)

    def open(self, record: bytes) -> bytes:
        """The body of a record."""
        (size,) = struct.unpack(">I", self._aead.decrypt(self._nonce(), record[:LENGTH_CHUNK_SIZE], None))
        body = self._aead.decrypt(self._nonce(), record[LENGTH_CHUNK_SIZE:], None)
        if len(body) != size:
            raise ValueError(f"a body of {len(body)} bytes; {size} were announced")
        return body


def plain_frame(stream_id: int, payload: bytes) -> bytes:
    """A DATA frame as new bytes."""
    return struct.pack(">II", DATA << 24 | len(payload), stream_id) + payload


def plain_frames(body: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, stream id and payload of every frame of a body."""
    while body:
        type_and_size, stream_id = struct.unpack(">II", body[:FRAME_HEADER_SIZE])
        end = FRAME_HEADER_SIZE + (type_and_size & 0xFF_FFFF)
        yield type_and_size >> 24, stream_id, body[FRAME_HEADER_SIZE:end]
        body = body[end:]


# What is timed.


def handshake(*, pooled: bool) -> Callable[[], None]:
    """One full handshake, both halves; its two buffers from pools, or new ones."""
    user_id, user_key = os.urandom(USER_ID_SIZE), os.urandom(KEY_SIZE)
    server = ServerCredentials(os.urandom(KEY_SIZE), {user_id: user_key})
    client = ClientCredentials(server.server_public, user_id, user_key)
    now_s = int(time.time())
    replay = ReplaySet(now_s)
    pools = Pools()
    hellos, answers = pools.client_hellos, pools.server_hellos

    def exchange(hello: memoryview, answer: memoryview) -> None:
        ours = ClientHandshake(client, suite=Suite.AES_256_GCM, time_s=now_s, random_bytes=os.urandom)
        ours.write_hello(hello)
        accepted = accept_hello(hello, server, now_s=now_s, replay=replay, random_bytes=os.urandom)
        accepted.write_answer(answer, random_bytes=os.urandom)
        ours.read_answer(answer)

    def with_pools() -> None:
        hello, answer = hellos.acquire(), answers.acquire()
        try:
            exchange(hello, answer)
        finally:
            hellos.release(hello)
            answers.release(answer)

    def plain() -> None:
        exchange(memoryview(bytearray(CLIENT_HELLO_SIZE)), memoryview(bytearray(SERVER_HELLO_SIZE)))

    return with_pools if pooled else plain


def record(suite: Suite, size_bytes: int, buffers: TieredPool) -> Callable[[], None]:
    """One body of ``size_bytes`` sealed and opened, its three buffers borrowed, wiped and returned."""
    root = os.urandom(KEY_SIZE)
    sealer, opener = CipherState(suite, root), CipherState(suite, root)

    def once() -> None:
        body = buffers.acquire(size_bytes)
        sealed = buffers.acquire(size_bytes + RECORD_OVERHEAD)
        end = sealer.seal(body[:size_bytes], sealed)
        buffers.release(body, size_bytes)
        size = opener.open_length(sealed[:LENGTH_CHUNK_SIZE])
        opened = buffers.acquire(size)
        opener.open_body(sealed[LENGTH_CHUNK_SIZE:end], opened[:size])
        buffers.release(sealed, 0)
        buffers.release(opened, size)

    return once


def plain_record(suite: Suite, size_bytes: int) -> Callable[[], None]:
    """The same with new bytes."""
    root, body = os.urandom(KEY_SIZE), bytes(size_bytes)
    sealer, opener = PlainCipher(suite, root), PlainCipher(suite, root)

    def once() -> None:
        opener.open(sealer.seal(body))

    return once


def frames(pools: Pools, *, packed: bool) -> Callable[[], int]:
    """FRAMES frames through an encoder and a decoder with the keys of a fresh session; counts the payload.

    ``packed``: as many frames in a record as the encoder puts there; else each is a record of its own.
    """
    payload = os.urandom(FRAME_SIZE)

    def once() -> int:
        root = os.urandom(KEY_SIZE)
        encoder = FrameEncoder(CipherState(Suite.AES_256_GCM, root), pools.buffers)
        decoder = FrameDecoder(CipherState(Suite.AES_256_GCM, root), pools.buffers, pools.frames)
        received = 0
        for _ in range(FRAMES):
            encoder.write(DATA, STREAM_ID, payload)
            if not packed:
                encoder.seal()
            elif not encoder.has_output:
                continue
            received += _carry(encoder, decoder)
        encoder.seal()
        received += _carry(encoder, decoder)
        encoder.close()
        decoder.close()
        return received

    return once


def _carry(encoder: FrameEncoder, decoder: FrameDecoder) -> int:
    """Every sealed byte from one to the other; returns the payload that came out."""
    received = 0
    while (view := encoder.output()) is not None:
        encoder.sent(decoder.feed(view))
        for frame in decoder:
            received += len(frame.payload)
    return received


def plain_frames_loop(*, packed: bool) -> Callable[[], int]:
    """The same with new bytes; packed into records as :func:`frames` does."""
    payload = os.urandom(FRAME_SIZE)
    in_one_record = (32_768 - RECORD_OVERHEAD) // (FRAME_SIZE + FRAME_HEADER_SIZE) if packed else 1

    def once() -> int:
        root = os.urandom(KEY_SIZE)
        sealer, opener = PlainCipher(Suite.AES_256_GCM, root), PlainCipher(Suite.AES_256_GCM, root)
        received = 0
        for first in range(0, FRAMES, in_one_record):
            count = min(in_one_record, FRAMES - first)
            body = b"".join([plain_frame(STREAM_ID, payload) for _ in range(count)])
            for _, _, data in plain_frames(opener.open(sealer.seal(body))):
                received += len(data)
        return received

    return once


def pairs() -> list[Case]:
    """A buffer, a frame object and a tiered buffer acquired and released, in ns a pair.

    What is timed is a statement, not a function: a call around it would cost a good part of the pair.
    """
    buffers, objects, tiered = BufferPool(POOL_BUFFER_SIZE, 64), ObjectPool(Frame, Frame.clear, 64), TieredPool()
    cases: list[tuple[str, Any, str, str]] = [("frame object", objects, "x = acquire(); release(x)", "x = Frame()")]
    for wiped, size in (("nothing", 0), (f"{WIPED_SIZE} bytes", WIPED_SIZE)):
        for name, pool, argument in ((f"{POOL_BUFFER_SIZE}", buffers, ""), ("tiered", tiered, f"{POOL_BUFFER_SIZE}")):
            statement = f"x = acquire({argument}); release(x, {size})"
            cases.append(
                (f"buffer ({name}), {wiped} wiped", pool, statement, f"x = memoryview(bytearray({POOL_BUFFER_SIZE}))")
            )
    found = []
    for name, pool, ours, plain in cases:
        scope = {"acquire": pool.acquire, "release": pool.release, "Frame": Frame}
        timers = {"ours": timeit.Timer(ours, globals=scope), "plain": timeit.Timer(plain, globals=scope)}
        found.append(Case(f"{name}, a pair", timers, "ns", PAIR_TARGET_NS))
    return found


def measure(*, quick: bool) -> dict[str, Any]:
    """Every figure of this file.

    Returns:
        ``rows``: figures with a target, each ``name``, ``best``, ``median``, ``unit``, ``target``, ``met``,
        ``plain`` (the plain version's ``best``, ``median``, ``unit``) and, where pools can be switched off,
        ``unpooled`` (likewise). ``records``: for each suite and size ``suite``, ``body_bytes`` and, for each
        of ``pooled``, ``unpooled`` and ``plain``, a figure in µs a record with ``mb_per_s`` added (10⁶ bytes
        of payload, each sealed once and opened once). ``frames_pools``: the pools' figures of the frames' loop.
    """
    count = ROUNDS_QUICK if quick else ROUNDS
    shake = {"ours": timeit.Timer(handshake(pooled=True)), "plain": timeit.Timer(handshake(pooled=False))}
    cases = [Case("handshake, both halves", shake, "µs", HANDSHAKE_TARGET_US)]
    pools, unpooled = Pools(), Pools(pooled=False)
    for packed in (False, True):
        loops = {
            "ours": timeit.Timer(frames(pools, packed=packed)),
            "unpooled": timeit.Timer(frames(unpooled, packed=packed)),
            "plain": timeit.Timer(plain_frames_loop(packed=packed)),
        }
        name = f"{FRAMES} frames of {FRAME_SIZE:,} bytes, " + ("packed" if packed else "a record each")
        cases.append(Case(name, loops, "ms", FRAMES_TARGET_MS))
    cases += pairs()
    sizes = BODY_SIZES_QUICK if quick else BODY_SIZES
    # Half a minute apart: what else a machine does comes and goes in seconds.
    in_turn(cases, count=count - count // 2)
    records = [_record_row(suite, size, count=count) for suite in Suite for size in sizes]
    in_turn(cases, count=count // 2)
    return {
        "rows": [case.row() for case in cases],
        "records": records,
        "frames_pools": {
            name: {"created": each.created, "hit_rate": each.hit_rate}
            for name, each in pools.statistics().items()
            if each.acquired
        },
    }


def _record_row(suite: Suite, size_bytes: int, *, count: int) -> dict[str, Any]:
    timers = {
        "pooled": timeit.Timer(record(suite, size_bytes, TieredPool())),
        "unpooled": timeit.Timer(record(suite, size_bytes, TieredPool(0))),
        "plain": timeit.Timer(plain_record(suite, size_bytes)),
    }
    result: dict[str, Any] = {"suite": suite.name, "body_bytes": size_bytes}
    case = Case(f"{suite.name}, {size_bytes}", timers, "µs")
    in_turn([case], count=count)
    for name, seconds in case.seconds.items():
        result[name] = {**figure(seconds, unit="µs"), "mb_per_s": size_bytes / min(seconds) / 1e6}
    return result


def verdict(*, met: bool | None) -> str:
    """The word of a table's last column."""
    return {True: "met", False: "not met", None: ""}[met]


def table(result: dict[str, Any]) -> str:
    """The result for a person; the best round of each figure."""
    lines = [f"{'best of the rounds':<44}{'ours':>10}{'no pools':>10}{'plain':>10}       {'target':>9}"]
    for each in result["rows"]:
        others = "".join(
            f"{each[name]['best']:>10,.2f}" if name in each else f"{'':>10}" for name in ("unpooled", "plain")
        )
        lines.append(
            f"{each['name']:<44}{each['best']:>10,.2f}{others} {each['unit']:<4}"
            f"  ≤ {each['target']:>7,g}  {verdict(met=each['met'])}"
        )
    lines += ["", f"{'a record sealed and opened':<32}{'pools':>22}{'no pools':>22}{'plain':>22}"]
    lines += [f"{'suite':<22}{'body':>10}" + f"{'µs':>10}{'MB/s':>12}" * 3]
    for each in result["records"]:
        cells = "".join(
            f"{each[n]['best']:>10.2f}{each[n]['mb_per_s']:>12,.0f}" for n in ("pooled", "unpooled", "plain")
        )
        lines.append(f"{each['suite']:<22}{each['body_bytes']:>10,}{cells}")
    rates = ", ".join(
        f"{name} {pool['hit_rate']:.4%} ({pool['created']} made)" for name, pool in result["frames_pools"].items()
    )
    lines += ["", f"hit rates of the frames' loop: {rates}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON where asked. 0; a target that is missed is no failure of the program."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.codec",
        description="Handshake, records, frames and pools in one process, each beside a plain version.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(arguments)
    result = measure(quick=options.quick)
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
