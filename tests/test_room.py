"""reflex.net.room: the limit of connections holds for all workers together, and the oldest stranger gives way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from reflex.metrics import Counters
from reflex.net.room import DISPLACED_PER_ACCEPT, Room
from reflex.worker import SharedCount, SharedCounts, WorkerContext


class Stranger:
    """Leaves where it is when it is ended."""

    def __init__(self, where: OrderedDict[Any, None]) -> None:
        self.leave: Callable[[], object] = lambda: where.pop(self)
        where[self] = None

    def end(self, *, reset: bool) -> None:
        assert not reset
        self.leave()


def room(limit: int, *, elsewhere: tuple[int, int] | None = None) -> tuple[Room, OrderedDict[Any, None], list[Any]]:
    """A room, and its strangers and tunnels, who are to come; ``elsewhere``: connections, and tunnels among them."""
    strangers: OrderedDict[Any, None] = OrderedDict()
    tunnels: list[Any] = []
    shared = None
    if elsewhere is not None:
        connections, others = SharedCounts(2), SharedCounts(2)
        connections[2], others[2] = elsewhere
        shared = WorkerContext(1, [], None, SharedCount(connections, 1), SharedCount(others, 1))  # type: ignore[arg-type]
    return Room(limit, strangers, tunnels, counters=Counters(), shared=shared), strangers, tunnels


def test_the_oldest_stranger_gives_way_and_users_do_not() -> None:
    here, strangers, tunnels = room(3)
    first, second = Stranger(strangers), Stranger(strangers)
    tunnels.append("alice's")
    assert here.own == 3
    assert here.has_room()
    assert list(strangers) == [second]
    assert first not in strangers
    tunnels += ["bob's", "carol's"]
    assert here.has_room() is False  # the last stranger left, and three users are there
    assert not strangers


class TurnedAway:
    """A tunnel that was closed at once; leaves where it is when it is cut."""

    def __init__(self, here: Room, tunnels: list[Any]) -> None:
        self.here, self.tunnels = here, tunnels
        tunnels.append(self)
        here.turned_away[self] = None  # type: ignore[index]  # as far as the room looks

    def cut(self, reason: str) -> None:
        del self.here.turned_away[self]  # type: ignore[arg-type]
        self.tunnels.remove(self)


def test_a_tunnel_that_was_turned_away_gives_way_before_any_stranger() -> None:
    here, strangers, tunnels = room(4)
    tunnels.append("alice's")
    stranger = Stranger(strangers)
    _, second = (TurnedAway(here, tunnels) for _ in range(2))
    assert here.has_room()
    assert tunnels == ["alice's", second]
    assert list(strangers) == [stranger]
    tunnels += ["bob's", "carol's"]
    assert here.has_room()
    assert tunnels == ["alice's", "bob's", "carol's"]
    assert not strangers
    assert not here.turned_away


def test_tunnels_that_were_turned_away_are_no_users_for_the_other_workers() -> None:
    here, _, tunnels = room(5, elsewhere=(5, 4))
    TurnedAway(here, tunnels)
    here.publish()
    assert here._shared is not None
    assert (here._shared.connections._counts[1], here._shared.tunnels._counts[1]) == (1, 0)
    assert here.has_room()
    assert not tunnels


class Failed:
    """A tunnel whose socket discards what comes."""

    def __init__(self, here: Room) -> None:
        self.here = here
        self.silence = self
        here.discard(self, 1)  # type: ignore[arg-type]  # as far as the room looks

    def end(self) -> None:
        self.here.discard(self, -1)  # type: ignore[arg-type]


def test_what_is_left_of_a_tunnel_that_failed_counts_and_gives_way_before_any_stranger() -> None:
    here, strangers, tunnels = room(3)
    tunnels.append("alice's")
    stranger = Stranger(strangers)
    Failed(here)
    assert here.own == 3
    assert here.has_room()
    assert not here._discarding
    assert list(strangers) == [stranger]
    assert here.own == 2


def test_what_is_left_of_tunnels_that_failed_is_no_user_for_the_other_workers() -> None:
    here, _, _ = room(5, elsewhere=(5, 4))
    Failed(here)
    assert here._shared is not None
    assert (here._shared.connections._counts[1], here._shared.tunnels._counts[1]) == (1, 0)


def test_an_excess_grows_smaller_with_each_that_comes() -> None:
    here, strangers, _ = room(5)
    for _ in range(8):
        Stranger(strangers)
    assert not here.has_room()
    assert len(strangers) == 8 - DISPLACED_PER_ACCEPT


def test_strangers_at_other_workers_do_not_keep_the_first_of_this_one_out_but_users_do() -> None:
    assert room(5, elsewhere=(5, 4))[0].has_room()
    assert not room(5, elsewhere=(5, 5))[0].has_room()
    here, strangers, _ = room(5, elsewhere=(5, 4))
    Stranger(strangers)
    here.publish()
    assert here.has_room()
    assert not strangers
