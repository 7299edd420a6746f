"""reflex.net.dispatch: each event of a session finds the owner of its stream, or the tunnel."""

from __future__ import annotations

import logging

import pytest

from reflex.net import dispatch as dispatch_module
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.wire import (
    CODE,
    GOAWAY,
    SETTING,
    STREAM_WINDOW,
    Code,
    FrameType,
    Network,
    Setting,
    Status,
)
from tests.loops import in_loop, until
from tests.rig import Owner, Rig, accepted
from tests.sessions import TARGET

pytestmark = pytest.mark.usefixtures("each_loop")


@in_loop
async def test_a_servers_tunnel_tells_of_opens_data_and_fins(pools: Pools) -> None:
    async with Rig(pools) as rig:
        assert rig.times_ms == [2]
        owner, theirs = await accepted(rig)
        assert rig.addresses == [TARGET]
        assert rig.counters.streams_opened == 1
        assert repr(rig.tunnel) == "<Tunnel peer, 1 streams>"
        assert rig.tunnel.stream_count == 1
        rig.remote.session.send(theirs, b"hello")
        rig.remote.session.finish(theirs)
        await rig.remote.flush()
        await until(lambda: owner.told)
        assert owner.got == b"hello"
        assert owner.told == ["fin"]
        looks = rig.looks
        assert rig.session.send(owner.stream, b"bye") == 3
        rig.session.finish(owner.stream)
        rig.tunnel.flush_soon()
        rig.tunnel.stream_ended()
        assert rig.looks == looks + 1
        await rig.remote.see(EventKind.FIN, theirs.id)
        assert rig.remote.side.got[theirs.id] == b"bye"
        assert rig.tunnel.stream_count == 0


@in_loop
async def test_a_clients_tunnel_tells_how_its_opens_went(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        owners = []
        for _ in range(3):
            owners.append(Owner(rig, rig.session.open(TARGET)))
        rig.tunnel.flush_soon()
        remote = rig.remote
        await remote.read_until(lambda: len(remote.side.streams) == 3)
        yes, no, gone = remote.side.streams.values()
        remote.session.accept(yes)
        remote.session.refuse(no, Status.REFUSED)
        remote.session.reset(gone, Code.LIMIT)
        await remote.flush()
        await until(lambda: all(owner.told for owner in owners))
        assert [owner.told for owner in owners] == [["opened"], [("refused", Status.REFUSED)], [("reset", Code.LIMIT)]]
        assert rig.counters.streams_refused == 1
        assert rig.counters.streams_reset == 1
        assert rig.looks == 2


@in_loop
@pytest.mark.parametrize("near", [True, False])
async def test_whether_the_peer_is_near_is_known_from_its_settings_on(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, *, near: bool
) -> None:
    monkeypatch.setattr(dispatch_module, "is_near", lambda _: near)
    async with Rig(pools) as rig:
        await accepted(rig)
        assert rig.tunnel.is_near is near


@in_loop
async def test_data_together_with_fin_is_told_as_data_and_fin(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, theirs = await accepted(rig)
        await rig.remote.write(FrameType.DATA_FIN, theirs.id, b"last")
        await until(lambda: owner.told)
        assert owner.got == b"last"
        assert owner.told == ["fin"]


@in_loop
async def test_a_window_that_opens_again_wakes_its_stream_or_all_of_them(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.remote.side.reads = False
        first, theirs = await accepted(rig)
        second, _ = await accepted(rig)
        assert rig.session.send(first.stream, bytes(STREAM_WINDOW + 1)) == STREAM_WINDOW
        rig.session.seal()
        rig.tunnel.flush_soon()
        remote = rig.remote
        await remote.read_until(lambda: len(remote.side.got.get(theirs.id, b"")) == STREAM_WINDOW)
        remote.side.consume()
        await remote.flush()
        await until(lambda: first.told)
        assert (first.told, second.told) == (["writable"], [])
        rig.session._send_window.available = 0  # as if others had used it up
        _, unowned = await rig.accept()
        assert unowned.owner is None
        await remote.write(FrameType.WINDOW, 0, (1000).to_bytes(4))
        await until(lambda: second.told)
        assert (first.told, second.told) == (["writable"] * 2, ["writable"])


@in_loop
async def test_datagrams_are_dropped_and_a_stream_without_owner_may_be_reset(pools: Pools) -> None:
    async with Rig(pools) as rig:
        remote = rig.remote
        stream = remote.session.open(None, Network.UDP)
        await remote.flush()
        await until(lambda: rig.opened)
        rig.session.accept(rig.opened[0])
        rig.tunnel.flush_soon()
        await remote.see(EventKind.OPENED, stream.id)
        remote.session.send_datagram(stream, TARGET, b"dropped")
        remote.session.reset(stream, Code.NONE)
        await remote.flush()
        await until(lambda: not rig.session.streams)
        assert rig.budget.buffered == 0


@in_loop
async def test_a_goaway_is_logged_and_the_streams_behind_it_are_reset(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools, is_client=True) as rig:
        owner = Owner(rig, rig.session.open(TARGET))
        assert rig.tunnel.has_room
        await rig.remote.write(FrameType.GOAWAY, 0, GOAWAY.pack(0, Code.SHUTTING_DOWN))
        await until(lambda: owner.told)
        assert owner.told == [("reset", Code.SHUTTING_DOWN)]
        assert not rig.tunnel.has_room
    assert "the peer takes no new streams (shutting down)" in caplog.text


@in_loop
async def test_further_goaways_are_not_logged(pools: Pools, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools, is_client=True) as rig:
        for _ in range(3):
            await rig.remote.write(FrameType.GOAWAY, 0, GOAWAY.pack(0, 77))
        await rig.remote.write(FrameType.CLOSE, 0, CODE.pack(Code.NONE))
        await until(lambda: rig.tunnel.ended)
    assert caplog.text.count("the peer takes no new streams") == caplog.text.count("(code 77)") == 1


@in_loop
async def test_only_the_first_settings_tell_the_time(pools: Pools) -> None:
    """Each telling may be a line in the log."""
    async with Rig(pools) as rig:
        told = SETTING.pack(Setting.TIME_MS, 77)
        for _ in range(3):
            await rig.remote.write(FrameType.SETTINGS, 0, told)
        await until(lambda: rig.session.peer_time_ms == 77)
        assert rig.times_ms == [2]
