"""reflex.net.paced: the server's relay that asks before it moves bytes."""

from __future__ import annotations

import socket
from typing import Final, NoReturn

import pytest

from reflex.metrics import Counters
from reflex.net.pace import Pace
from reflex.net.paced import PacedRelay
from reflex.net.relay import Relay
from reflex.net.target import Dialling
from reflex.protocol.address import Address
from reflex.protocol.credit import hold
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.streams import Stream
from reflex.protocol.wire import STREAM_WINDOW, Code
from reflex.worker import UserField, UserTable
from tests.ends import End, Origin
from tests.loops import DEADLINE_S, in_loop, until
from tests.rig import Rig
from tests.test_target import LOOPBACK

pytestmark = pytest.mark.usefixtures("each_loop")

RATE: Final = 1_000_000
SLOW: Final = 1_024  # what is beyond the first burst stays for as long as a test takes
PATTERN: Final = bytes(range(251)) * 1000  # 251,000 bytes: a stream's window takes them at once


class Paced:
    """A stream that the remote has opened, and its relay.

    Attributes:
        theirs: the remote's view of the stream.
        target: the test's end of the connection to the target.
        waits: how often the relay had to wait.
    """

    target: End

    def __init__(self, rig: Rig, ours: Stream, theirs: Stream, address: Address, rate: int) -> None:
        self.rig = rig
        self.theirs = theirs
        self.ends: list[Relay] = []
        self.waits = 0
        self.counters = Counters()
        row = UserTable(1, 1).row(1, 0)
        self.relay = PacedRelay(
            rig.loop,
            rig.tunnel,
            ours,
            address,
            Dialling(policy=LOOPBACK, timeout_s=DEADLINE_S, nodelay=True, keepalive_s=60),
            buffers=rig.pools.buffers,
            counters=self.counters,
            on_end=self.ends.append,
            up=Pace(rig.loop, rate, row, UserField.BYTES_UP, self._on_wait),
            down=Pace(rig.loop, rate, row, UserField.BYTES_DOWN, self._on_wait),
        )
        self.relay.dial()

    def _on_wait(self) -> None:
        self.waits += 1

    async def send(self, data: bytes) -> None:
        """Into the tunnel; the stream's window must hold it."""
        assert self.rig.remote.session.send(self.theirs, data) == len(data)
        await self.rig.remote.flush()

    async def finish(self) -> None:
        self.rig.remote.session.finish(self.theirs)
        await self.rig.remote.flush()


async def paced(rig: Rig, origin: Origin, *, rate: int = RATE) -> Paced:
    ours, theirs = await rig.accept()
    made = Paced(rig, ours, theirs, origin.address, rate)
    await rig.remote.see(EventKind.OPENED, theirs.id)
    made.target = await origin.accept()
    return made


@in_loop
async def test_bytes_go_both_ways_whole_and_in_their_time(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin)
            began_s = rig.loop.time()
            await made.send(PATTERN)
            await made.finish()
            assert await made.target.receive_all() == PATTERN
            up_s = rig.loop.time() - began_s
            assert up_s >= (len(PATTERN) / RATE - 0.125) * 0.9
            await made.target.send(PATTERN)
            made.target.finish()
            assert await rig.remote.receive(made.theirs, len(PATTERN)) == PATTERN
            await rig.remote.see(EventKind.FIN, made.theirs.id)
            assert rig.loop.time() - began_s - up_s >= (len(PATTERN) / RATE - 0.125) * 0.9
            await until(lambda: made.ends)
            assert made.waits > 2
            assert made.counters.bytes_into_tunnels == made.counters.bytes_out_of_tunnels == len(PATTERN)


@in_loop
async def test_what_is_kept_counts_as_waiting_and_gets_no_credit(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin, rate=SLOW)
            await made.send(PATTERN)
            await until(lambda: made.relay.waiting_bytes > 200_000)
            assert rig.budget.buffered > 200_000
            first = await made.target.receive(2_000)
            assert first == PATTERN[:2_000]
            assert made.theirs.send_window.available <= STREAM_WINDOW - len(PATTERN)
            assert made.relay.waiting_bytes + made.counters.bytes_out_of_tunnels == len(PATTERN)


@in_loop
async def test_one_stream_that_is_slowed_down_does_not_hold_up_the_tunnel(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin, rate=SLOW)
            await made.send(PATTERN)
            made.target.fill()
            await until(lambda: made.relay.waiting_bytes and not made.relay._is_reading)
            other = await paced(rig, origin)
            await other.send(b"not held up")
            assert await other.target.receive(11) == b"not held up"
            assert made.relay.waiting_bytes > 200_000
            await other.finish()
            await other.target.expect_fin()


@in_loop
async def test_a_reset_drops_what_is_kept_and_what_waits_to_be_read(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin, rate=SLOW)
            await made.send(PATTERN)
            made.target.fill()
            await until(lambda: made.relay.waiting_bytes and not made.relay._is_reading)
            made.relay.on_reset(Code.CANCELLED)
            await made.target.expect_reset()
            assert made.ends == [made.relay]
            assert rig.budget.buffered == 0
            made.relay._read_in_turn()
            made.relay._deliver_in_turn()
            rig.session.reset(made.relay.stream, Code.CANCELLED)


@in_loop
async def test_a_target_that_is_gone_ends_the_stream_in_the_midst_of_what_is_kept(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin, rate=100_000)
            await made.send(PATTERN)
            await until(lambda: made.relay.waiting_bytes)
            made.relay._pause()  # so that it is the next send that finds out
            made.relay._wants_to_read = False
            made.target.reset()
            seen = await rig.remote.see(EventKind.RESET, made.theirs.id)
            assert seen.number == Code.TARGET_RESET
            assert rig.budget.buffered == 0


@in_loop
async def test_a_target_that_is_gone_when_the_first_bytes_come(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin)
            made.relay._pause()
            made.relay._wants_to_read = False
            made.target.reset()
            while not made.ends:
                stream = made.relay.stream
                hold(rig.session, stream, len(PATTERN))
                made.relay.on_data(memoryview(PATTERN))
            assert rig.budget.buffered == 0
            hold(rig.session, made.relay.stream, 5)
            made.relay.on_data(memoryview(b"later"))
            assert rig.budget.buffered == 0


@in_loop
async def test_a_stream_that_has_ended_both_ways_still_delivers_what_is_kept(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin)
            made.target.finish()
            await rig.remote.see(EventKind.FIN, made.theirs.id)
            await made.send(PATTERN)
            await made.finish()
            await until(lambda: not rig.session.streams)
            assert not made.ends
            assert made.relay in rig.tunnel.draining
            assert await made.target.receive_all() == PATTERN
            await until(lambda: made.ends)
            assert not rig.tunnel.draining


@in_loop
async def test_the_end_of_the_tunnel_does_not_stop_what_was_to_be_delivered(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin)
            made.target.finish()
            await rig.remote.see(EventKind.FIN, made.theirs.id)
            await made.send(PATTERN)
            await made.finish()
            await until(lambda: not rig.session.streams)
            rig.tunnel.cut("the test says so")
            assert await made.target.receive_all() == PATTERN
            await until(lambda: made.ends)


@in_loop
async def test_what_is_kept_is_of_the_process_s_memory_and_gives_way_where_that_is_used_up(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin, rate=SLOW)
            budget = rig.session.share.budget
            await made.send(PATTERN[:100_000])
            await until(lambda: made.relay.waiting_bytes)
            kept = budget.kept
            assert kept >= made.relay.waiting_bytes
            budget.buffered_limit = kept
            await made.send(PATTERN[100_000:])
            await until(lambda: made.ends)
            await rig.remote.see(EventKind.RESET, made.theirs.id)
            assert made.counters.streams_shed == 1
            assert (budget.kept, budget.buffered) == (0, 0)
    assert pools.in_use == 0


@in_loop
async def test_a_relay_that_has_ended_is_kept_by_nobody_who_paces(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin, rate=SLOW)
            up, down = made.relay._up, made.relay._down
            await made.send(PATTERN)
            await made.target.send(PATTERN[:100_000])
            await until(lambda: up._waiting and down._waiting)
            made.relay.on_reset(Code.CANCELLED)
            assert not up._waiting
            assert not down._waiting


class Stuck(socket.socket):
    """A socket that takes nothing."""

    def send(self, *_: object) -> NoReturn:
        raise BlockingIOError


def stick(relay: PacedRelay) -> None:
    """From now on the target takes nothing."""
    assert relay._sock is not None
    relay._sock = Stuck(fileno=relay._sock.detach())


def arrive(rig: Rig, relay: PacedRelay, data: bytes) -> None:
    """Bytes come out of the tunnel, now."""
    hold(rig.session, relay.stream, len(data))
    relay.on_data(memoryview(data))


@in_loop
async def test_a_relay_whose_bytes_are_due_does_not_shed_itself_for_the_room_they_need(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin, rate=100_000)
            stick(made.relay)
            for piece in (PATTERN[:10_000], PATTERN[10_000:100_000]):
                arrive(rig, made.relay, piece)
            assert made.relay._kept is not None
            assert made.relay._backlog is not None
            rig.budget.buffered_limit = rig.budget.kept
            await until(lambda: made.ends)
            assert made.counters.streams_shed == 1
            assert (rig.budget.kept, rig.budget.buffered) == (0, 0)
            assert made.relay.stream.held_bytes == 0


@in_loop
async def test_a_relay_whose_target_is_stuck_does_not_shed_itself_for_what_must_wait_its_turn(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await paced(rig, origin, rate=SLOW)
            stick(made.relay)
            arrive(rig, made.relay, PATTERN[:1_000])
            assert made.relay._backlog is not None
            assert made.relay._kept is None
            made.relay._up.take(made.relay._up.allowance(len(PATTERN)))
            rig.budget.buffered_limit = rig.budget.kept
            arrive(rig, made.relay, PATTERN[1_000:])
            assert made.ends == [made.relay]
            assert made.counters.streams_shed == 1
            assert (rig.budget.kept, rig.budget.buffered) == (0, 0)
            assert made.relay.stream.held_bytes == 0
