"""reflex.net.doors: from an application's first byte to its stream, or to a truthful refusal."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from reflex.errors import TunnelError
from reflex.net.doors import ATTEMPTS, Door, Visitor
from reflex.net.options import set_reset_on_close
from reflex.protocol.address import Address
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.socks5 import Socks5Parser, reply
from reflex.protocol.streams import Stream
from reflex.protocol.wire import INCREMENT, SESSION_WINDOW, STREAM_WINDOW, Code, FrameType, Status
from tests.ends import REPLY_SIZE, End, socks_head, tcp_pair
from tests.loops import POLL_S, in_loop, turns, until
from tests.rig import Rig

pytestmark = pytest.mark.usefixtures("each_loop")

TARGET = Address.parse("example.org:443")


class FakeConnector:
    """Gives the rig's tunnel when the test says so.

    Attributes:
        asked: how often a tunnel was asked for.
        waiting: who waits.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.waiting: list[Visitor] = []
        self.cancelled: list[Visitor] = []

    def request(self, waiter: Visitor) -> None:
        self.asked += 1
        self.waiting.append(waiter)

    def cancel(self, waiter: Visitor) -> None:
        self.cancelled.append(waiter)
        if waiter in self.waiting:
            self.waiting.remove(waiter)


class Entrance:
    """A door whose tunnels are all the rig's one, and a visitor."""

    def __init__(self, rig: Rig, *, target: Address | None = None, greeting_timeout_s: float = 3600.0) -> None:
        self.rig = rig
        self.connector = FakeConnector()
        self.ends: list[Visitor] = []
        connector: Any = self.connector
        near, far = tcp_pair()
        if target is not None:
            set_reset_on_close(far)  # as its listener does
        self.end = End(near)
        self.visitor = Visitor(
            Door(
                loop=rig.loop,
                connector=connector,
                buffers=rig.pools.buffers,
                counters=rig.counters,
                greeting_timeout_s=greeting_timeout_s,
                target=target,
                credentials=None,
                on_end=self.ends.append,
            ),
            far,
        )

    async def ask(self) -> None:
        """Say to SOCKS5 where to go, up to the wait for a tunnel."""
        await self.end.send(socks_head(80))
        assert await self.end.receive(2) == b"\x05\x00"
        await until(lambda: self.connector.waiting)

    async def give(self) -> Stream:
        """Give it a tunnel; the remote's view of the stream that it opens."""
        known = set(self.rig.remote.side.streams)
        visitor = self.connector.waiting.pop()
        visitor.on_tunnel(self.rig.tunnel)
        streams = self.rig.remote.side.streams
        await self.rig.remote.read_until(lambda: set(streams) - known)
        return streams[max(streams)]

    async def reply(self) -> int:
        return (await self.end.receive(REPLY_SIZE))[1]


@in_loop
async def test_an_application_is_told_of_success_then_relayed(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig)
        await door.ask()
        assert not door.visitor.has_stream
        theirs = await door.give()
        assert door.visitor.has_stream
        await door.end.send(b"too early, but not lost")
        await turns()
        assert door.end.is_silent
        rig.remote.session.accept(theirs)
        await rig.remote.flush()
        assert await door.reply() == Status.SUCCEEDED
        assert await rig.remote.receive(theirs, 23) == b"too early, but not lost"
        rig.remote.session.reset(theirs, Code.CANCELLED)
        await rig.remote.flush()
        await door.end.expect_reset()
        await until(lambda: door.ends == [door.visitor])
        door.visitor.end()
        assert door.ends == [door.visitor]


@in_loop
async def test_what_came_with_the_request_waits_for_the_sessions_window(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig)
        await door.end.send(socks_head(80) + b"behind the request")
        await until(lambda: door.connector.waiting)
        theirs = await door.give()
        others = [rig.session.open(TARGET) for _ in range(SESSION_WINDOW // STREAM_WINDOW)]
        for stream in others:
            rig.session.send(stream, bytes(STREAM_WINDOW - 1))  # a few bytes are left of the session's window
        rig.remote.session.accept(theirs)
        await rig.remote.flush()
        assert await door.end.receive(2 + REPLY_SIZE) == b"\x05\x00" + reply(Status.SUCCEEDED)
        await door.end.send(b", and after it")
        await turns()  # the remote has read nothing of all this, and gives credit only now
        sent = b"behind the request, and after it"
        assert await rig.remote.receive(theirs, len(sent)) == sent


@in_loop
async def test_a_refusal_is_told_then_fin(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig)
        await door.ask()
        rig.remote.session.refuse(await door.give(), Status.NETWORK_UNREACHABLE)
        await rig.remote.flush()
        assert await door.reply() == Status.NETWORK_UNREACHABLE
        await door.end.expect_fin()
        assert door.ends == [door.visitor]
        assert not rig.session.streams


@in_loop
async def test_a_forward_is_relayed_at_once_and_reset_where_it_is_refused(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig, target=TARGET)
        await door.end.send(b"at once")
        theirs = await door.give()
        assert await rig.remote.receive(theirs, 7) == b"at once"
        rig.remote.session.accept(theirs)
        rig.remote.session.send(theirs, b"answer")
        await rig.remote.flush()
        assert await door.end.receive(6) == b"answer"
        door.end.reset()
        assert (await rig.remote.see(EventKind.RESET, theirs.id)).number == Code.TARGET_RESET
        refused = Entrance(rig, target=TARGET)
        rig.remote.session.refuse(await refused.give(), Status.REFUSED)
        await rig.remote.flush()
        await refused.end.expect_reset()
        assert refused.ends == [refused.visitor]


@in_loop
async def test_without_a_tunnel_it_is_a_general_failure_or_a_reset(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig)
        await door.ask()
        door.connector.waiting.pop().on_no_tunnel(TunnelError("none"))
        assert await door.reply() == Status.GENERAL_FAILURE
        await door.end.expect_fin()
        forward = Entrance(rig, target=TARGET)
        forward.connector.waiting.pop().on_no_tunnel(TunnelError("none"))
        await forward.end.expect_reset()
        assert (len(door.ends), len(forward.ends)) == (1, 1)


@pytest.mark.parametrize("code", [Code.CANCELLED, Code.SHUTTING_DOWN, Code.LIMIT])
def test_an_untouched_request_is_tried_on_other_tunnels_a_few_times(pools: Pools, code: Code) -> None:
    @in_loop
    async def is_tried() -> None:
        async with Rig(pools, is_client=True) as rig:
            door = Entrance(rig)
            await door.ask()
            if code is Code.LIMIT:
                rig.tunnel.settled.clear()  # more were opened than its server allows, as nobody could know
            for attempt in range(1, ATTEMPTS + 1):
                assert door.connector.asked == attempt
                rig.remote.session.reset(await door.give(), code)
                await rig.remote.flush()
                if attempt < ATTEMPTS:
                    await until(lambda: door.connector.waiting)
            assert await door.reply() == Status.GENERAL_FAILURE
            await door.end.expect_fin()
            assert door.connector.asked == ATTEMPTS

    is_tried()


@in_loop
async def test_a_forward_that_waits_for_its_next_tunnel_ends_with_a_reset_where_the_daemon_does(pools: Pools) -> None:
    """FIN would be an answer: that there is none."""
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig, target=TARGET)
        rig.remote.session.reset(await door.give(), Code.CANCELLED)
        await rig.remote.flush()
        await until(lambda: door.connector.waiting)
        door.visitor.end()
        await door.end.expect_reset()


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.LIMIT])
def test_a_reset_for_another_reason_is_final(pools: Pools, code: Code) -> None:
    """A limit of a settled tunnel is the user's or the server's: it would be met again."""

    @in_loop
    async def is_final() -> None:
        async with Rig(pools, is_client=True) as rig:
            door = Entrance(rig)
            await door.ask()
            rig.remote.session.reset(await door.give(), code)
            await rig.remote.flush()
            assert await door.reply() == Status.GENERAL_FAILURE
            assert door.connector.asked == 1

    is_final()


@in_loop
async def test_a_forward_that_has_credit_back_for_all_it_sent_is_not_tried_again(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig, target=TARGET)
        theirs = await door.give()
        await door.end.send(bytes(5_000))
        await rig.remote.receive(theirs, 5_000)
        rig.remote.session._encoder.write(FrameType.WINDOW, theirs.id, INCREMENT.pack(5_000))
        rig.remote.session.reset(theirs, Code.CANCELLED)
        await rig.remote.flush()
        await door.end.expect_reset()
        assert door.connector.asked == 1


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_who_asked_is_told_where_no_answer_to_the_open_comes(pools: Pools) -> None:
    async with Rig(pools, is_client=True, idle_timeout_s=0.02) as rig:
        door = Entrance(rig)
        await door.ask()
        theirs = await door.give()
        assert (await rig.remote.see(EventKind.RESET, theirs.id)).number == Code.IDLE
        assert await door.reply() == Status.TIMED_OUT
        await door.end.expect_fin()
        await until(lambda: door.ends == [door.visitor])


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_once_it_is_answered_an_idle_stream_is_reset(pools: Pools) -> None:
    async with Rig(pools, is_client=True, idle_timeout_s=0.02) as rig:
        door = Entrance(rig)
        await door.ask()
        rig.remote.session.accept(await door.give())
        await rig.remote.flush()
        assert await door.reply() == Status.SUCCEEDED
        await door.end.expect_reset()


@pytest.mark.parametrize("sent", [b"x", b""], ids=["a byte", "fin"])
def test_a_forward_that_has_sent_a_byte_or_fin_is_not_tried_again(pools: Pools, sent: bytes) -> None:
    @in_loop
    async def is_not_tried() -> None:
        async with Rig(pools, is_client=True) as rig:
            door = Entrance(rig, target=TARGET)
            theirs = await door.give()
            if sent:
                await door.end.send(sent)
                await rig.remote.receive(theirs, 1)
            else:
                door.end.finish()
                await rig.remote.see(EventKind.FIN, theirs.id)
            rig.remote.session.reset(theirs, Code.CANCELLED)
            await rig.remote.flush()
            await door.end.expect_reset()
            assert door.connector.asked == 1

    is_not_tried()


@in_loop
async def test_who_leaves_while_it_waits_for_a_tunnel_is_noticed_when_there_is_one(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig)
        await door.ask()
        door.end.reset()
        theirs = await door.give()
        rig.remote.session.accept(theirs)
        await rig.remote.flush()
        assert (await rig.remote.see(EventKind.RESET, theirs.id)).number == Code.TARGET_RESET
        await until(lambda: door.ends == [door.visitor])


@in_loop
async def test_who_left_before_it_could_be_refused_is_let_go(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig)
        await door.ask()
        door.end.reset()
        door.connector.waiting.pop().on_no_tunnel(TunnelError("none"))
        assert door.ends == [door.visitor]


@in_loop
async def test_ending_a_visitor_ends_it_wherever_it_stands(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        greeted, waiting, relayed = Entrance(rig), Entrance(rig), Entrance(rig)
        await waiting.ask()
        await relayed.ask()
        await relayed.give()
        for door in (greeted, waiting, relayed):
            door.visitor.end()
            door.visitor.end()
            assert door.ends == [door.visitor]
        assert waiting.connector.waiting == []
        await greeted.end.expect_fin()
        await waiting.end.expect_fin()
        await relayed.end.expect_reset()


@in_loop
async def test_who_says_nothing_in_time_is_closed(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig, greeting_timeout_s=0.01)
        await door.end.expect_fin()
        assert door.ends == [door.visitor]


@in_loop
async def test_who_sends_byte_after_byte_gains_no_time_by_it(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = bytearray()
    feed = Socks5Parser.feed

    def noting(parser: Socks5Parser, data: memoryview) -> bytes:
        fed.extend(data)
        return feed(parser, data)

    monkeypatch.setattr(Socks5Parser, "feed", noting)
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig)
        timer = door.visitor._timer
        assert timer is not None
        due_s = timer.when()
        conversation = socks_head(80)
        for size in range(1, len(conversation)):
            await door.end.send(conversation[size - 1 : size])
            await until(lambda size=size: len(fed) == size)  # type: ignore[misc]
            assert door.visitor._timer is timer
            assert not timer.cancelled()
            assert timer.when() == due_s
        await door.end.send(conversation[-1:])
        await until(lambda: door.connector.waiting)
        assert timer.cancelled()
        door.visitor.end()


@in_loop
async def test_who_never_comes_to_its_request_is_closed_in_time(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig, greeting_timeout_s=0.02)
        methods = iter(b"\x05\xff" + bytes([2]) * 254)  # one is missing
        while not door.ends:
            with contextlib.suppress(ConnectionError):
                await door.end.send(bytes([next(methods)]))
            await asyncio.sleep(POLL_S)
        assert door.ends == [door.visitor]


@in_loop
async def test_a_tunnel_that_ends_before_the_answer_gives_the_request_back(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door, talker = Entrance(rig), Entrance(rig, target=TARGET)
        await talker.give()
        await door.ask()
        await door.give()
        rig.tunnel.last_talker = door.visitor._relay
        rig.tunnel.cut("the test says so")
        assert rig.tunnel.last_talker is None
        assert door.connector.waiting == [door.visitor]
        door.visitor.end()
        talker.visitor.end()


@in_loop
async def test_a_readiness_that_was_none_changes_nothing(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        door = Entrance(rig)
        door.visitor._on_readable()
        assert pools.in_use == 0
        await door.ask()
        door.visitor.end()
