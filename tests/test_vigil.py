"""reflex.net.vigil: a tunnel that does not answer gets no new streams, and gives back what it can."""

from __future__ import annotations

import pytest

from reflex.net import vigil
from reflex.net.vigil import Vigil
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.streams import Stream
from reflex.protocol.wire import Code
from tests.loops import in_loop, until
from tests.rig import Rig
from tests.test_doors import TARGET, Entrance

pytestmark = pytest.mark.usefixtures("each_loop")

FIGURES = ("QUIET_S", "ANSWER_MIN_S", "ANSWER_UNKNOWN_S", "RECHECK_S")


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FIGURES:
        monkeypatch.setattr(vigil, name, 0.02)


class Watched:
    """A client's tunnel under watch; the remote answers when the test lets it."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.trusted = 0
        self.vigil = rig.tunnel.vigil = Vigil(rig.loop, rig.tunnel, on_trust=self._on_trust)

    def _on_trust(self) -> None:
        self.trusted += 1

    @property
    def is_suspect(self) -> bool:
        return self.rig.tunnel.is_suspect

    async def call(self) -> tuple[Entrance, Stream]:
        """A request on the tunnel, unanswered."""
        door = Entrance(self.rig)
        await door.ask()
        return door, await door.give()

    async def speak(self) -> None:
        """Something comes from the remote."""
        self.rig.remote.session.ping()
        await self.rig.remote.flush()


@in_loop
async def test_a_request_on_a_tunnel_that_does_not_answer_is_given_back_and_reset_there(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        watched = Watched(rig)
        door, theirs = await watched.call()
        await until(lambda: door.connector.waiting)  # nobody reads the remote's end: no PONG
        assert watched.is_suspect
        assert not rig.session.streams
        assert (await rig.remote.see(EventKind.RESET, theirs.id)).number == Code.CANCELLED
        watched.vigil.stop()
        door.visitor.end()


@in_loop
async def test_what_comes_from_a_suspect_ends_the_suspicion(pools: Pools, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with Rig(pools, is_client=True) as rig:
        watched = Watched(rig)
        door, _ = await watched.call()
        await until(lambda: door.connector.waiting)
        assert watched.is_suspect
        await watched.speak()
        await until(lambda: watched.trusted)
        assert not watched.is_suspect
        assert "does not answer: new streams go elsewhere" in caplog.text
        assert "> answers" in caplog.text
        assert watched.vigil._timer is None  # nobody calls: nothing is looked at
        door.visitor.end()


@in_loop
async def test_who_waits_on_a_suspect_that_answers_in_time_stays(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vigil, "RECHECK_S", 3600.0)  # between suspicion and the next look
    async with Rig(pools, is_client=True) as rig:
        watched = Watched(rig)
        door, _ = await watched.call()
        await until(lambda: watched.is_suspect)
        await watched.speak()
        await until(lambda: watched.vigil._has_answered)
        watched.vigil._recheck()
        assert watched.trusted
        assert not watched.is_suspect
        assert not door.connector.waiting
        watched.vigil.stop()
        door.visitor.end()


@in_loop
async def test_a_peer_that_answers_pings_is_never_suspect_however_long_its_target_takes(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ANSWER_MIN_S", "ANSWER_UNKNOWN_S"):
        monkeypatch.setattr(vigil, name, 3600.0)  # it is judged when the answer is there, however slow the machine is
    async with Rig(pools, is_client=True) as rig:
        watched = Watched(rig)
        door, theirs = await watched.call()
        session = rig.session

        async def answer() -> None:
            await until(lambda: session.awaits_pong)
            while not rig.remote.session.unsent_bytes:
                await rig.remote.read()
            await rig.remote.flush()
            await until(lambda: not session.awaits_pong)
            watched.vigil.stop()
            watched.vigil._judge()
            assert not watched.is_suspect

        for _ in range(3):
            await answer()
            assert watched.vigil._timer is not None  # it will be asked again
        rig.remote.session.accept(theirs)
        await rig.remote.flush()
        await until(lambda: not watched.vigil._callers())
        watched.vigil.stop()
        watched.vigil._look()
        assert watched.vigil._timer is None
        assert not watched.is_suspect
        assert door.connector.asked == 1
        door.visitor.end()


@in_loop
async def test_a_tunnel_that_was_heard_just_now_is_not_asked_but_looked_at_later(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vigil, "QUIET_S", 1.0)  # "just now" is as long as two requests may take
    async with Rig(pools, is_client=True) as rig:
        watched = Watched(rig)
        rig.session._liveness.is_measured = True
        rig.session._liveness.received_s = rig.loop.time()
        pings = rig.session._liveness._pings
        door, _ = await watched.call()
        other, _ = await watched.call()  # the timer runs: no second one
        assert rig.session._liveness._pings == pings
        await until(lambda: door.connector.waiting and other.connector.waiting)
        assert rig.session._liveness._pings == pings + 1
        watched.vigil.stop()
        for each in (door, other):
            each.visitor.end()


@in_loop
async def test_who_was_connected_or_has_sent_something_or_has_no_try_left_stays(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        connected, theirs = Entrance(rig), None
        await connected.ask()
        theirs = await connected.give()
        rig.remote.session.accept(theirs)
        await rig.remote.flush()
        assert await connected.reply() == 0
        watched = Watched(rig)
        sender, tired = Entrance(rig, target=TARGET), Entrance(rig)
        await sender.end.send(b"x")
        await rig.remote.receive(await sender.give(), 1)
        await tired.ask()
        tired.visitor._attempts = 3
        await tired.give()
        door, _ = await watched.call()
        await until(lambda: door.connector.waiting)
        assert watched.is_suspect
        assert len(rig.session.streams) == 3
        for each in (connected, sender, tired):
            assert not each.connector.waiting
        await watched.speak()
        await until(lambda: not watched.is_suspect)
        watched.vigil.stop()
        for each in (connected, sender, tired, door):
            each.visitor.end()


@in_loop
async def test_distrust_is_at_once_and_asks_at_once(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        watched = Watched(rig)
        door, _ = await watched.call()
        watched.vigil.distrust()
        watched.vigil.distrust()
        assert watched.is_suspect
        assert not door.connector.waiting  # it has the time that an answer takes
        await until(lambda: door.connector.waiting)
        await watched.speak()
        await until(lambda: watched.trusted == 1)
        door.visitor.end()


@in_loop
async def test_a_tunnel_that_ends_or_has_ended_is_left_alone(pools: Pools) -> None:
    async with Rig(pools, is_client=True) as rig:
        watched = Watched(rig)
        rig.tunnel.close(Code.NONE)
        watched.vigil.distrust()
        assert not watched.is_suspect
        watched.vigil.stop()
        assert watched.vigil._timer is None
