"""How a tunnel ends: cleanly, by a cut, by a fatal error, and what is said and done of it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from functools import partial

import pytest

from reflex.net import tunnel as tunnel_module
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.streams import Stream
from reflex.protocol.wire import (
    CODE,
    INCREMENT,
    STREAM_WINDOW,
    Code,
    FrameType,
)
from tests.loops import in_loop, turns, until
from tests.rig import SMALL_BUFFERS, Rig, accepted

pytestmark = pytest.mark.usefixtures("each_loop")


@in_loop
async def test_it_says_goaway_unless_it_has_ended(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.tunnel.go_away(Code.SHUTTING_DOWN)
        assert (await rig.remote.see(EventKind.GOAWAY)).number == Code.SHUTTING_DOWN
        rig.tunnel.cut("over")
        rig.tunnel.go_away(Code.SHUTTING_DOWN)
        assert rig.session.unsent_bytes == 0


@in_loop
async def test_a_peers_close_is_a_clean_end(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, _ = await accepted(rig)
        rig.remote.session.close(Code.IDLE)
        await rig.remote.flush()
        await until(lambda: rig.tunnel.ended)
        assert owner.told == [("reset", Code.CANCELLED)]  # a stream that was open is lost all the same
        assert rig.counters.tunnels_lost == 0
        await rig.remote.end.expect_fin()


@in_loop
async def test_closing_resets_streams_says_close_then_fin_and_waits_for_the_peers(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        await rig.accept()
        rig.tunnel.close(Code.SHUTTING_DOWN)
        rig.tunnel.close(Code.NONE)
        assert owner.told == [("reset", Code.SHUTTING_DOWN)]
        await rig.remote.read_until(lambda: rig.remote.session.close_received)
        seen = rig.remote.side.take_seen()
        assert [each.kind for each in seen] == [EventKind.RESET, EventKind.RESET, EventKind.CLOSED]
        assert seen[0].stream_id == theirs.id
        assert {each.number for each in seen} == {Code.SHUTTING_DOWN}
        await rig.remote.end.expect_fin()
        assert not rig.tunnel.ended
        assert not rig.tunnel.has_room
        rig.remote.end.finish()
        await until(lambda: rig.tunnel.ended)
        assert rig.counters.tunnels_lost == 0
        rig.tunnel.close(Code.NONE)


@in_loop
async def test_a_peer_that_closes_as_well_or_resets_behind_a_close_ends_it_cleanly(pools: Pools) -> None:
    for answer in ("close", "reset"):
        async with Rig(pools) as rig:
            rig.tunnel.close(Code.NONE)
            await rig.remote.read_until(partial(getattr, rig.remote.session, "close_received"))
            if answer == "close":
                await rig.remote.write(FrameType.CLOSE, 0, CODE.pack(0))
            else:
                rig.remote.end.reset()
            await until(partial(getattr, rig.tunnel, "ended"))
            assert rig.counters.tunnels_lost == 0


def test_a_peer_that_does_not_answer_a_close_is_left_after_a_while(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "CLOSE_WAIT_S", 0.01)

    @in_loop
    async def is_left() -> None:
        async with Rig(pools) as rig:
            rig.tunnel.close(Code.NONE)
            await until(lambda: rig.tunnel.ended)
            await rig.remote.read_to_end()
            assert rig.remote.session.close_received

    is_left()


async def closed_behind_a_window(rig: Rig) -> Stream:
    """A stream that has ended with as much sent as it may, and at once the tunnel's close."""
    owner, theirs = await accepted(rig)
    rig.session.send(owner.stream, bytes(STREAM_WINDOW))
    rig.session.finish(owner.stream)
    await rig.remote.write(FrameType.DATA_FIN, theirs.id)
    await until(lambda: not rig.session.streams)
    rig.tunnel.close(Code.NONE)
    return theirs


def test_what_was_sent_before_a_close_arrives_however_slowly_the_peer_reads(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "CLOSE_WAIT_S", 0.0)  # it is for the time behind CLOSE, not before it

    @in_loop
    async def arrives() -> None:
        async with Rig(pools, buffer_bytes=SMALL_BUFFERS) as rig:
            theirs = await closed_behind_a_window(rig)
            await turns(10)
            await rig.remote.read_to_end()
            assert len(rig.remote.side.got.get(theirs.id, b"")) == STREAM_WINDOW
            assert rig.remote.session.close_received

    arrives()


def test_what_the_kernel_has_not_delivered_is_not_lost_where_the_peer_goes_on_to_give_credit(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes for a socket that is closed is answered by RST, and takes with it what was sent before."""
    monkeypatch.setattr(tunnel_module, "CLOSE_WAIT_S", 0.01)

    @in_loop
    async def arrives() -> None:
        async with Rig(pools) as rig:
            theirs = await closed_behind_a_window(rig)
            await until(lambda: rig.session.close_sent and not rig.session.unsent_bytes)
            await asyncio.sleep(0.1)
            await rig.remote.write(FrameType.WINDOW, theirs.id, INCREMENT.pack(STREAM_WINDOW))
            await rig.remote.read_to_end()
            assert len(rig.remote.side.got.get(theirs.id, b"")) == STREAM_WINDOW
            assert rig.remote.session.close_received
            await until(lambda: rig.tunnel.ended)

    arrives()


@in_loop
async def test_an_end_without_close_is_a_cut_that_resets_every_stream(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools) as rig:
        owners = [(await accepted(rig))[0] for _ in range(3)]
        rig.remote.end.finish()
        await until(lambda: rig.tunnel.ended)
        assert [owner.told for owner in owners] == [[("reset", Code.CANCELLED)]] * 3
        assert rig.counters.tunnels_lost == 1
        rig.tunnel.cut("again")
        rig.tunnel.flush_soon()
        await turns()
        assert rig.ends == 1
    assert "peer: connection ended without CLOSE; 3 streams are reset" in caplog.text


@in_loop
async def test_a_reset_connection_is_a_cut(pools: Pools, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools) as rig:
        owner, _ = await accepted(rig)
        rig.remote.end.reset()
        await until(lambda: rig.tunnel.ended)
        assert owner.told == [("reset", Code.CANCELLED)]
    assert "connection lost: Connection reset by peer" in caplog.text


@in_loop
async def test_a_reset_that_is_noticed_by_sending_is_a_cut(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.remote.end.reset()
        rig.session.ping()
        rig.tunnel._flush()
        assert rig.tunnel.ended
        assert rig.counters.tunnels_lost == 1


@in_loop
async def test_where_not_even_fin_can_be_sent_it_has_ended(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.remote.end.reset()
        rig.session.close(Code.NONE)
        rig.tunnel._shut_down()
        assert rig.tunnel.ended


@in_loop
async def test_an_event_that_cuts_the_tunnel_is_the_last_one(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        other, others = await accepted(rig)

        def cut(_: memoryview) -> None:
            rig.session.consumed(owner.stream, 5)
            rig.tunnel.cut("enough")

        owner.on_data = cut  # type: ignore[assignment,method-assign]
        rig.remote.session.send(theirs, b"hello")
        rig.remote.session.send(others, b"never seen")
        await rig.remote.flush()
        await until(lambda: rig.tunnel.ended)
        assert other.got == b""


# A peer that does what it must not


def never_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a failed tunnel discard for an hour and a gibibyte."""
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_MIN_S", 3600)
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_MAX_S", 3600)
    monkeypatch.setattr(secrets, "randbelow", lambda limit: limit - 1)
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_BYTES", 1 << 30)


def test_a_protocol_error_resets_the_streams_and_is_met_by_silence(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never_enough(monkeypatch)

    @in_loop
    async def is_silent() -> None:
        async with Rig(pools) as rig:
            owner, _ = await accepted(rig)
            rig.session.ping()  # packed, and never sent
            await rig.remote.write(0x0D)
            await until(lambda: rig.tunnel.ended)
            assert owner.told == [("reset", Code.CANCELLED)]
            assert rig.counters.protocol_errors == 1
            assert rig.counters.tunnels_lost == 0
            assert pools.in_use == 0
            for _ in range(3):
                await rig.remote.end.send(bytes(100_000))
                await turns()
            assert rig.tunnel.silence is not None
            rig.tunnel.silence._on_readable()
            assert rig.remote.end.is_silent
            rig.remote.end.finish()
            await rig.remote.end.expect_fin()

    is_silent()
    assert "protocol error, 1 streams are reset: a frame of unknown type 0x0d" in caplog.text


def test_altered_bytes_are_met_by_the_same_silence(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    never_enough(monkeypatch)

    @in_loop
    async def is_silent() -> None:
        async with Rig(pools) as rig:
            await rig.remote.end.send(bytes(100))
            await until(lambda: rig.tunnel.ended)
            assert rig.remote.end.is_silent
            rig.remote.end.reset()
            await until(lambda: rig.tunnel._sock.fileno() < 0)

    is_silent()


def test_the_silence_ends_after_its_time(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_MIN_S", 0)
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_MAX_S", 0)

    @in_loop
    async def ends() -> None:
        async with Rig(pools) as rig:
            await rig.remote.end.send(bytes(100))
            await rig.remote.end.expect_fin()

    ends()


def test_a_protocol_error_behind_a_close_ends_it_as_well(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    never_enough(monkeypatch)

    @in_loop
    async def ends() -> None:
        async with Rig(pools) as rig:
            rig.tunnel.close(Code.NONE)
            await rig.remote.end.send(bytes(100))
            await until(lambda: rig.tunnel.ended)

    ends()


def test_the_silence_ends_after_its_bytes(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    never_enough(monkeypatch)
    monkeypatch.setattr(tunnel_module, "FATAL_DISCARD_BYTES", 1000)

    @in_loop
    async def ends() -> None:
        async with Rig(pools) as rig:
            await rig.remote.end.send(bytes(100))
            await until(lambda: rig.tunnel.ended)
            await rig.remote.end.send(bytes(1000))
            await turns()
            assert rig.remote.end.is_silent
            await rig.remote.end.send(b"x")
            await rig.remote.end.expect_fin()

    ends()
