"""reflex.net.hangup: connections that are gone are told, and nothing is taken from them."""

from __future__ import annotations

import asyncio

import pytest

from reflex.net.hangup import STEPS, Lookout, hung_up
from tests.ends import End, tcp_pair
from tests.loops import in_loop, until


def test_only_what_was_reset_or_has_ended_both_ways_is_told() -> None:
    pairs = [tcp_pair() for _ in range(4)]
    ends = [End(near) for near, _ in pairs]
    descriptors = [far.fileno() for _, far in pairs]
    try:
        assert hung_up([]) == []
        assert hung_up(descriptors) == []
        ends[0].sock.send(b"before")
        ends[0].reset()
        ends[1].finish()  # one way only
        ends[2].finish()
        pairs[2][1].shutdown(1)
        assert hung_up(descriptors) == [descriptors[0], descriptors[2]]
        assert pairs[0][1].recv(10) == b"before"
        assert hung_up(descriptors) == [descriptors[0], descriptors[2]]
    finally:
        for end, (_, far) in zip(ends, pairs, strict=True):
            end.close()
            far.close()


class Pair:
    """Two sockets that are watched, and a peer of the first."""

    def __init__(self, lookout: Lookout) -> None:
        self._lookout = lookout
        near, self._far = tcp_pair()
        self.peer = End(near)
        self._other = tcp_pair()
        self.looks = 0
        self.told: list[int] = []
        self.at_hang_up = self.close
        lookout.add(self)

    @property
    def descriptors(self) -> tuple[int, int]:
        self.looks += 1
        return self._far.fileno(), self._other[0].fileno()

    def on_hang_up(self, fd: int) -> None:
        assert fd == self._far.fileno()
        self.told.append(fd)
        self.at_hang_up()

    def close(self) -> None:
        self._lookout.remove(self)
        self.peer.close()
        for sock in (self._far, *self._other):
            sock.close()


@in_loop
async def test_who_is_gone_is_told_at_every_look_until_it_is_removed() -> None:
    lookout = Lookout(asyncio.get_running_loop(), 0.001)
    stays, leaves = Pair(lookout), Pair(lookout)
    leaves.at_hang_up = lambda: None
    leaves.peer.reset()
    await until(lambda: len(leaves.told) > 2)
    assert not stays.told
    leaves.close()
    told, looks = len(leaves.told), stays.looks
    await until(lambda: stays.looks > looks + 2)
    assert len(leaves.told) == told
    stays.close()
    assert lookout._timer is None
    stays.close()  # any number of times


@in_loop
async def test_one_that_ends_another_one_within_a_look() -> None:
    lookout = Lookout(asyncio.get_running_loop(), 0.001)
    pairs = [Pair(lookout) for _ in range(2)]

    def close_both() -> None:
        for pair in pairs:
            pair.close()

    for pair in pairs:
        pair.at_hang_up = close_both
        pair.peer.reset()
    await until(lambda: lookout._timer is None)
    assert sorted(len(pair.told) for pair in pairs) == [0, 1]


@in_loop
async def test_many_are_looked_at_some_at_a_time_and_each_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def recorded(descriptors: dict[int, object]) -> list[int]:
        sizes.append(len(descriptors))
        return hung_up(descriptors)

    monkeypatch.setattr("reflex.net.hangup.hung_up", recorded)
    lookout = Lookout(asyncio.get_running_loop(), 0.01)
    pairs = [Pair(lookout) for _ in range(2 * STEPS + 1)]
    await until(lambda: all(pair.looks >= 3 for pair in pairs))
    assert max(pair.looks for pair in pairs) <= 4
    assert max(sizes) == 2 * 3  # of 41, in 20 steps
    for pair in pairs:
        pair.close()
    assert lookout._timer is None
