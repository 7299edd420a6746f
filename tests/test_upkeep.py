"""reflex.net.upkeep: a tunnel's clock, and who is looked after by it."""

from __future__ import annotations

import logging
import time

import pytest

from reflex.net import upkeep as upkeep_module
from reflex.net.hangup import hung_up
from reflex.net.upkeep import TICK_MAX_S, on_tick
from reflex.protocol.pools import Pools
from reflex.protocol.streams import Stream
from reflex.protocol.wire import (
    KEEPALIVE_GRACE_S,
    Code,
    Network,
)
from tests.ends import End, tcp_pair
from tests.loops import in_loop, turns, until
from tests.rig import Owner, Rig, accepted

pytestmark = pytest.mark.usefixtures("each_loop")


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_who_has_sent_nothing_for_its_interval_sends_a_ping(pools: Pools) -> None:
    async with Rig(pools, keepalive_s=0.02) as rig:
        for _ in range(2):
            assert await rig.remote.end.receive_some()
        assert not rig.tunnel.ended


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_a_ping_is_answered(pools: Pools) -> None:
    async with Rig(pools) as rig:
        rig.remote.session.now_s = time.monotonic()
        rig.remote.session.ping()
        await rig.remote.flush()
        rig.remote.session.now_s += 0.5
        await rig.remote.read_until(lambda: rig.remote.session.round_trip_s)


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_a_peer_that_gives_no_sign_of_life_is_cut_off(pools: Pools, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools) as rig:
        owner, _ = await accepted(rig)
        await turns()
        rig.session._liveness.received_s -= 41  # its interval is 30 s, and 10 s more
        await until(lambda: rig.tunnel.ended)
        assert owner.told == [("reset", Code.CANCELLED)]
        assert rig.counters.tunnels_lost == 1
        await rig.remote.end.receive_all()
    assert "no sign of life from the peer; 1 streams are reset" in caplog.text


@in_loop
async def test_a_dead_peer_is_found_when_its_time_is_over_and_not_a_tick_later(pools: Pools) -> None:
    async with Rig(pools) as rig:
        assert rig.tunnel._tick_s == TICK_MAX_S
        await turns()  # what is under way has come
        rig.session._liveness.received_s = rig.loop.time() - KEEPALIVE_GRACE_S
        rig.session._liveness._peer_interval_s = 0.05
        rig.tunnel._tick_timer.cancel()
        on_tick(rig.tunnel)
        assert rig.tunnel._tick_timer.when() - rig.loop.time() < TICK_MAX_S / 2
        await until(lambda: rig.tunnel.ended)


@in_loop
async def test_a_reset_behind_bytes_is_seen_although_the_loop_tells_of_it_once(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with Rig(pools) as rig:
        await accepted(rig)
        rig.loop.remove_reader(rig.tunnel._fd)  # as uvloop does by itself after an error
        rig.remote.session.ping()
        await rig.remote.flush()
        rig.remote.end.reset()
        await until(lambda: rig.tunnel.ended)
        assert "connection lost: Connection reset by peer; 1 streams are reset" in caplog.text


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_owners_whose_connection_is_gone_are_told(pools: Pools) -> None:
    async with Rig(pools) as rig:
        owner, _ = await accepted(rig)
        other, _ = await accepted(rig)
        near, far = tcp_pair()
        with far, End(near) as end:
            owner.fd = far.fileno()
            tick = rig.tunnel.tick
            await until(lambda: rig.tunnel.tick > tick + 2)
            assert owner.told == []
            end.reset()
            await until(lambda: owner.told)
            assert set(owner.told) == {"hang-up"}
            owner.fd = -1
        assert other.told == []


@in_loop
async def test_a_tick_in_which_the_tunnel_ends_tells_nobody_more_and_is_the_last(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Rig(pools) as rig:
        owners = [(await accepted(rig))[0] for _ in range(2)]
        told: list[Owner] = []

        def cut(owner: Owner) -> None:
            told.append(owner)
            rig.tunnel.cut("enough")

        monkeypatch.setattr(Owner, "on_hang_up", cut)
        near, far = tcp_pair()
        other, another = tcp_pair()
        with far, another, End(near) as end, End(other) as other_end:
            owners[0].fd, owners[1].fd = far.fileno(), another.fileno()
            end.reset()
            other_end.reset()
            await until(lambda: len(hung_up([far.fileno(), another.fileno()])) == 2)
            rig.tunnel._tick_timer.cancel()
            timer = rig.tunnel._tick_timer
            on_tick(rig.tunnel)
        assert rig.tunnel.ended
        assert len(told) == 1
        assert rig.tunnel._tick_timer is timer


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_owners_that_move_nothing_are_told_that_they_are_idle(pools: Pools) -> None:
    async with Rig(pools, idle_timeout_s=0.01) as rig:
        owner, _ = await accepted(rig)
        ours, _ = await rig.accept()  # one without an owner is not
        late = Owner(rig, Stream(99, 0, Network.TCP))
        rig.tunnel.draining.add(late)
        begun = rig.tunnel.tick
        await until(lambda: owner.told and late.told)
        assert rig.tunnel.tick - begun >= 2
        assert owner.told[0] == late.told[0] == "idle"
        assert ours.owner is None
        rig.tunnel.draining.clear()


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_a_tunnel_that_has_ended_ticks_no_more(pools: Pools) -> None:
    async with Rig(pools) as rig:
        await until(lambda: rig.tunnel.tick)
        rig.tunnel.cut("over")
        tick = rig.tunnel.tick
        on_tick(rig.tunnel)
        assert rig.tunnel.tick == tick


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_relays_that_only_deliver_go_on_behind_the_end_for_as_long_as_something_moves(pools: Pools) -> None:
    async with Rig(pools, idle_timeout_s=0.01) as rig:
        stuck, done = (Owner(rig, Stream(number, 0, Network.TCP)) for number in (97, 99))
        for each in (stuck, done):
            each.last_tick = 1 << 60
            each.waiting_bytes = 100
            rig.tunnel.draining.add(each)
        rig.tunnel.cut("over")
        assert stuck.told == []
        stuck.waiting_bytes = 50  # something moved, and then no more
        done.ended = True
        await until(lambda: stuck.told)
        assert stuck.told == ["idle"]
        assert done.told == []


@pytest.mark.usefixtures("quick_ticks")
@in_loop
async def test_every_tick_asks_whether_the_peer_is_near(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    nearness = False

    def answer(_: object) -> bool:
        asked.append(nearness)
        return nearness

    monkeypatch.setattr(upkeep_module, "is_near", answer)
    async with Rig(pools) as rig:
        await until(lambda: asked)
        assert not rig.tunnel.is_near
        nearness = True
        await until(lambda: rig.tunnel.is_near)
        nearness = False
        await until(lambda: not rig.tunnel.is_near)
