"""reflex.protocol.share: memory reserved, given back, and taken from those who have most."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reflex.protocol.share import Share
from reflex.protocol.window import Budget


class Stream:
    """Keeps what it can get, until it is shed."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.kept_bytes = 0
        self.moved_at = 0
        self.is_shed = False
        self.owner: object = self

    def keep(self, size_bytes: int) -> bool:
        return self.share.reserve(self, size_bytes)

    def give_back(self, size_bytes: int) -> None:
        self.share.give_back(self, size_bytes)

    def shed(self) -> None:
        self.is_shed = True
        self.give_back(self.kept_bytes)


def test_what_is_reserved_is_counted_and_what_is_given_back_is_not() -> None:
    budget = Budget(buffered_limit=100)
    alice, bob = Share(budget), Share(budget)
    one, two, three = Stream(alice), Stream(alice), Stream(bob)
    assert one.keep(10)
    assert two.keep(20)
    assert three.keep(70)
    assert (alice.kept, bob.kept, budget.kept) == (30, 70, 100)
    one.give_back(4)
    two.give_back(20)
    assert (one.kept_bytes, alice.kept, budget.kept) == (6, 6, 76)
    assert budget.high_water == 100
    one.give_back(6)
    three.give_back(70)
    assert budget.kept == 0
    assert not budget.shares


def test_an_owner_that_is_the_only_one_has_no_soft_limit() -> None:
    budget = Budget(buffered_limit=100)
    assert Share(budget).soft_limit == 100
    whole = Share(budget, is_whole=True)
    assert whole.soft_limit > 2**60
    stream = Stream(whole)
    assert stream.keep(100)
    assert not stream.keep(1)  # but the hard one
    stream.give_back(100)


def test_the_fullest_stream_of_the_fullest_share_gives_way() -> None:
    budget = Budget(buffered_limit=100)
    alice, bob = Share(budget), Share(budget)
    small, large, single = Stream(alice), Stream(alice), Stream(bob)
    assert small.keep(5)
    assert large.keep(50)
    assert single.keep(45)  # more than any other stream, of one who has less
    newcomer = Stream(bob)
    assert newcomer.keep(10)
    assert [each.is_shed for each in (small, large, single, newcomer)] == [False, True, False, False]
    assert budget.kept == 60


def test_one_whose_reader_took_something_just_now_is_spared_though_it_keeps_more() -> None:
    budget = Budget(buffered_limit=100)
    share = Share(budget)
    stalled, older, fast = Stream(share), Stream(share), Stream(share)
    assert older.keep(5)
    assert stalled.keep(20)
    for _ in range(10):
        assert fast.keep(70)
        fast.give_back(70)
    assert fast.keep(75)
    assert fast.keep(10)
    assert [each.is_shed for each in (stalled, older, fast)] == [True, False, False]
    assert fast.keep(10)
    assert budget.kept == 100


def test_who_has_most_gets_nothing_more_and_takes_from_nobody() -> None:
    budget = Budget(buffered_limit=100)
    greedy, modest = Stream(Share(budget)), Stream(Share(budget))
    assert modest.keep(40)
    assert greedy.keep(60)
    assert not greedy.keep(1)
    assert (greedy.kept_bytes, modest.kept_bytes, budget.kept) == (60, 40, 100)
    assert not modest.is_shed


def test_an_owner_with_two_keepers_takes_from_neither_of_them_for_the_other() -> None:
    budget = Budget(buffered_limit=100)
    share = Share(budget)
    first, second, other = Stream(share), Stream(share), Stream(share)
    second.owner = first.owner
    assert other.keep(20)
    assert first.keep(80)
    assert not second.keep(10)
    assert (first.kept_bytes, second.kept_bytes, budget.kept) == (80, 0, 100)
    assert not first.is_shed
    first.give_back(70)
    assert other.keep(60)
    assert second.keep(20)  # of others it may
    assert [each.is_shed for each in (first, second, other)] == [False, False, True]


def test_more_than_there_is_is_never_reserved() -> None:
    budget = Budget(buffered_limit=100)
    share = Share(budget)
    assert not Stream(share).keep(101)
    other = Stream(Share(budget))
    assert other.keep(50)
    assert not Stream(share).keep(101)
    assert budget.kept == 0
    assert other.is_shed


def test_windows_of_the_only_owner_grow_up_to_the_limit_and_no_further() -> None:
    budget = Budget(growth_limit=100)
    share = Share(budget, is_whole=True)
    assert share.take_growth(60) == 60
    assert share.take_growth(41) == 40
    assert share.take_growth(1) == 0
    assert (share.growth, budget.growth) == (100, 100)
    share.give_growth(60)
    assert (share.growth, budget.growth) == (40, 40)
    assert share.take_growth(60) == 60


def test_windows_of_one_owner_leave_growth_to_the_next() -> None:
    budget = Budget(growth_limit=100)
    alice, bob, carol = Share(budget), Share(budget), Share(budget)
    assert [alice.take_growth(10) for _ in range(8)] == [10] * 5 + [0] * 3
    assert [bob.take_growth(10) for _ in range(5)] == [10, 10, 10, 0, 0]
    assert carol.take_growth(10) == 10
    assert (alice.growth, bob.growth, carol.growth, budget.growth) == (50, 30, 10, 90)
    alice.give_growth(50)
    assert bob.take_growth(40) == 30  # what was left, but for as much as it has


@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 500))))
def test_growth_never_passes_its_limit_and_all_of_it_comes_back(limit: int, wishes: list[tuple[int, int]]) -> None:
    budget = Budget(growth_limit=limit)
    shares = [Share(budget), Share(budget), Share(budget, is_whole=True)]
    taken = []
    for number, size in wishes:
        left, before = budget.growth_left, shares[number].growth
        got = shares[number].take_growth(size)
        assert 0 <= got <= size
        assert got == 0 or number == 2 or before + got <= left
        taken.append((number, got))
        assert budget.growth == sum(share.growth for share in shares) <= limit
    for number, size in taken:
        shares[number].give_growth(size)
    assert budget.growth == 0
    assert all(share.growth == 0 for share in shares)


STEPS = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 60), st.booleans()), max_size=80)


@given(st.integers(0, 300), STEPS)
def test_the_limit_holds_at_every_step_and_the_sums_agree(limit: int, steps: list[tuple[int, int, bool]]) -> None:
    budget = Budget(buffered_limit=limit)
    shares = [Share(budget) for _ in range(3)]
    streams = [Stream(shares[number % 3]) for number in range(8)]
    for number, size, is_more in steps:
        stream = streams[number]
        if is_more:
            before = stream.kept_bytes
            fits = stream.keep(size)
            assert stream.kept_bytes == before + size * fits
        elif stream.kept_bytes:
            stream.give_back(min(size, stream.kept_bytes))
        assert budget.kept <= limit
        assert budget.kept == sum(share.kept for share in shares) == sum(each.kept_bytes for each in streams)
        for share in shares:
            assert share.kept == sum(each.kept_bytes for each in streams if each.share is share)
            assert (share in budget.shares) == bool(share.kept)
    for stream in streams:
        if stream.kept_bytes:
            stream.give_back(stream.kept_bytes)
    assert not budget.shares
    assert not any(share._keepers for share in shares)
