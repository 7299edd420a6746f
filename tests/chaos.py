"""Bad luck on the way between the halves: a relay that delays, stalls, dribbles and cuts, after a seed's plan.

Each connection gets a plan of its own, drawn from the seed and its number, so that a failure can be
repeated with the same seed, as far as the order of connections repeats. A test can also take the way
away altogether: ``freeze`` lets nothing through, in either direction, and says nothing to anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

HOST: Final = "127.0.0.1"
READ_BYTES: Final = 65_536
BACKLOG: Final = 512
HANDSHAKE_BYTES: Final = 200  # about: a cut before these is one amid the handshake
RST: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Plan:
    """What happens to one connection. Bytes are counted in both directions together.

    ``ending``: "" (none), "fin", "rst", or "half" (one direction ends, the other goes on).
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    dribble_bytes: int = 0  # so many, at the start of each direction, go one by one
    piece_bytes: int = READ_BYTES
    stall_at: int = -1
    stall_s: float = 0.0
    ending: str = ""
    end_at: int = -1


CALM: Final = Plan()


def chaotic(luck: random.Random) -> Plan:
    """A plan as the tests of many transfers use it: every connection is cut, sooner or later."""

    def some_bytes(least: int, most: int) -> int:
        return int(least * (most / least) ** luck.random())

    ending = luck.choice(["fin", "rst", "half"])
    early = luck.random() < 0.1
    return Plan(
        delay_s=luck.choice([0.0, 0.001, 0.004, 0.01]),
        jitter_s=luck.choice([0.0, 0.002, 0.008]),
        dribble_bytes=luck.choice([0, 0, 120, 400]),
        piece_bytes=luck.choice([READ_BYTES, READ_BYTES, 1 + luck.randrange(1_500), 8_192]),
        stall_at=some_bytes(1, 2_000_000) if luck.random() < 0.3 else -1,
        stall_s=luck.choice([0.2, 1.0, 4.0]),
        ending=ending,
        end_at=some_bytes(1, HANDSHAKE_BYTES) if early else some_bytes(HANDSHAKE_BYTES, 10_000_000),
    )


class ChaosRelay:
    """Relays connections to ``to_port``, each after a plan of its own, in a thread with a loop of its own.

    Args:
        plan: makes a connection's plan from its own random numbers; calm by default.

    Attributes:
        port: where it listens.
        happened: how many connections there were, and how many endings of each kind came about.
    """

    def __init__(self, to_port: int, *, seed: int = 0, plan: Callable[[random.Random], Plan] = lambda _: CALM) -> None:
        self._to_port = to_port
        self._seed = seed
        self._plan = plan
        self.happened: Counter[str] = Counter()
        self._listener = socket.create_server((HOST, 0), backlog=BACKLOG)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._may_pass = asyncio.Event()
        self._may_pass.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        accepting = self._loop.create_task(self._accept())
        self._loop.run_forever()
        for task in (accepting, *self._tasks):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(accepting, *self._tasks, return_exceptions=True))
        self._loop.close()

    def calm_down(self) -> None:
        """Connections from now on go through undisturbed."""
        self._plan = lambda _: CALM

    def freeze(self) -> None:
        """From now on nothing passes, and nobody is told; connections are made, as by a wall that swallows."""
        self._loop.call_soon_threadsafe(self._may_pass.clear)

    def thaw(self) -> None:
        """Everything passes again, what was held back first."""
        self._loop.call_soon_threadsafe(self._may_pass.set)

    def bury(self) -> None:
        """What was connected until now stays frozen for ever, as after a change of address; new ones pass."""

        def bury() -> None:
            for task in self._tasks:
                task.cancel()  # the sockets stay open, and nobody reads them
            self._may_pass.set()

        self._loop.call_soon_threadsafe(bury)

    async def _accept(self) -> None:
        number = 0
        while True:
            near, _ = await self._loop.sock_accept(self._listener)
            plan = self._plan(random.Random(f"{self._seed}/{number}"))
            number += 1
            self.happened["connections"] += 1
            task = self._loop.create_task(self._relay(near, plan))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _relay(self, near: socket.socket, plan: Plan) -> None:
        far = socket.socket()
        self._sockets |= {near, far}
        try:
            for sock in (near, far):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._may_pass.wait()
            await self._loop.sock_connect(far, (HOST, self._to_port))
            connection = _Connection(self._loop, near, far, plan=plan, may_pass=self._may_pass, happened=self.happened)
            await connection.run()
        except asyncio.CancelledError:
            return  # buried, or the end of all: the sockets stay open until stop()
        except OSError:
            _reset(near, far)
        for sock in (near, far):
            sock.close()
        self._sockets -= {near, far}

    def stop(self) -> None:
        """Cut everything and end the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._listener.close()
        for sock in self._sockets:
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Connection:
    """One connection and its plan."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        near: socket.socket,
        far: socket.socket,
        *,
        plan: Plan,
        may_pass: asyncio.Event,
        happened: Counter[str],
    ) -> None:
        self._loop = loop
        self._near, self._far = near, far
        self._plan = plan
        self._may_pass = may_pass
        self._happened = happened
        self._luck = random.Random(repr(plan))
        self._passed = 0
        self._is_over = False

    async def run(self) -> None:
        """Relay until both directions have ended, or the plan's end."""
        async with asyncio.TaskGroup() as ways:
            to_far = ways.create_task(self._way(self._near, self._far))
            to_near = ways.create_task(self._way(self._far, self._near))
            self._ways = (to_far, to_near)

    async def _way(self, source: socket.socket, sink: socket.socket) -> None:
        plan, loop = self._plan, self._loop
        count = 0
        try:
            while data := await loop.sock_recv(source, READ_BYTES):
                if plan.delay_s or plan.jitter_s:
                    await asyncio.sleep(plan.delay_s + plan.jitter_s * self._luck.random())
                rest = memoryview(data)
                while rest:
                    await self._may_pass.wait()
                    size = 1 if count < plan.dribble_bytes else plan.piece_bytes
                    before = self._passed
                    if plan.stall_at >= before:
                        size = min(size, max(1, plan.stall_at - before))
                    if plan.ending and plan.end_at >= before:
                        size = min(size, max(1, plan.end_at - before))
                    piece, rest = rest[:size], rest[size:]
                    await loop.sock_sendall(sink, piece)
                    count += len(piece)
                    self._passed = after = before + len(piece)
                    if before < plan.stall_at <= after:
                        self._happened["stall"] += 1
                        await asyncio.sleep(plan.stall_s)
                    if plan.ending and before < plan.end_at <= after and self._end(sink):
                        return
                    if len(piece) < READ_BYTES and rest:
                        await asyncio.sleep(0)
            await self._may_pass.wait()
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._finish(self._near, self._far)

    def _end(self, sink: socket.socket) -> bool:
        """The plan's end; tells whether this direction is over."""
        ending = self._plan.ending
        self._happened[ending] += 1
        if ending == "half":
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
            return True
        self._finish(*(() if ending == "fin" else (self._near, self._far)))
        return True

    def _finish(self, *to_reset: socket.socket) -> None:
        """Both directions are over; these sockets end by RST."""
        if not self._is_over:
            self._is_over = True
            _reset(*to_reset)
            current = asyncio.current_task()
            for way in self._ways:
                if way is not current:
                    way.cancel()


def _reset(*sockets: socket.socket) -> None:
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
