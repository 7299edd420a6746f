"""Who has how much of the memory in which received bytes wait, and who gives way when it is used up.

A :class:`Budget` is of the process, a :class:`Share` is one owner's part of it: a user's at the server. A
keeper is whoever borrows memory because bytes must wait: a stream whose socket takes nothing. Memory is
reserved before it is borrowed, and what does not fit is not reserved; so no more than the limit is ever in use.

Two bounds, a soft one and a hard one:

1. A session gets credit on arrival of its bytes only while its owner keeps no more than what the process has
   left. So one owner comes to half of the limit, two to a third each, and something is left for the next.
   What windows have grown counts as used: it may arrive without further credit. The price is paid by the owner
   alone: what its fast readers want may wait behind its slow ones. A process that has one owner only, a client,
   has nobody to leave anything to, and does without.
   Windows grow by the same rule, within what is set aside for that: one owner's come to about a half of it.
2. What had credit already still arrives. Where it does not fit, a stream of the owner who keeps most is given
   up, until it fits: the one with the largest product of what it keeps and of how long its socket has taken
   nothing. Time is counted in reservations. So a fast reader for whom much has come just now is not taken for
   one of those that never read.
"""

from __future__ import annotations

from typing import Final, Protocol

from reflex.protocol.window import Budget

_NO_SOFT_LIMIT: Final = 2**63


class Keeper(Protocol):
    """What a share asks of one that keeps bytes."""

    kept_bytes: int
    moved_at: int  # the share's: when it began to keep, or gave something back last

    @property
    def owner(self) -> object:
        """Who gives up where this one is shed. A stream may have two keepers, and both end with it."""

    def shed(self) -> None:
        """Give up: all that is kept goes back, before this returns."""


class Share:
    """One owner's part of a budget.

    Args:
        budget: of the process.
        is_whole: there is no other owner.

    Attributes:
        budget: whose part this is.
        kept: bytes of memory that its keepers have reserved.
        growth: bytes by which its windows have grown.
        soft_limit: what it keeps, what all keep, and what windows have grown, should not be more together.
    """

    __slots__ = ("_is_whole", "_keepers", "budget", "growth", "kept", "soft_limit")

    def __init__(self, budget: Budget, *, is_whole: bool = False) -> None:
        self.budget = budget
        self.kept = 0
        self.growth = 0
        self._is_whole = is_whole
        self.soft_limit = _NO_SOFT_LIMIT if is_whole else budget.buffered_limit
        self._keepers: dict[Keeper, None] = {}  # a set in the order of arrival

    def reserve(self, keeper: Keeper, size_bytes: int) -> bool:
        """Reserve memory, to be given back by :meth:`give_back`.

        Where it does not fit, others are shed. False, and nothing reserved, where this keeper would be next,
        or another one of its owner: what its owner would then keep, nobody would ever take.
        """
        budget = self.budget
        budget.reservations += 1
        while budget.kept + size_bytes > budget.buffered_limit:
            share = max(budget.shares, key=_kept, default=self)
            victim = max(share._keepers, key=share._weight, default=keeper)
            if victim.owner is keeper.owner:
                return False
            victim.shed()
        if not self.kept:
            budget.shares[self] = None
        if not keeper.kept_bytes:
            self._keepers[keeper] = None
            keeper.moved_at = budget.reservations
        keeper.kept_bytes += size_bytes
        self.kept += size_bytes
        budget.kept += size_bytes
        budget.high_water = max(budget.high_water, budget.kept)
        return True

    def give_back(self, keeper: Keeper, size_bytes: int) -> None:
        """Return memory that :meth:`reserve` reserved."""
        keeper.kept_bytes -= size_bytes
        keeper.moved_at = self.budget.reservations
        self.kept -= size_bytes
        self.budget.kept -= size_bytes
        if not keeper.kept_bytes:
            del self._keepers[keeper]
        if not self.kept:
            del self.budget.shares[self]

    def take_growth(self, wanted_bytes: int) -> int:
        """Reserve window growth, to be returned by :meth:`give_growth`; return how much of it there is, 0 or more.

        What its owner's windows have grown is no more, together with it, than what was left for all.
        """
        budget = self.budget
        left = budget.growth_left
        size_bytes = max(0, min(wanted_bytes, left if self._is_whole else left - self.growth))
        self.growth += size_bytes
        budget.growth += size_bytes
        return size_bytes

    def give_growth(self, size_bytes: int) -> None:
        """Return growth that :meth:`take_growth` reserved."""
        self.growth -= size_bytes
        self.budget.growth -= size_bytes

    def _weight(self, keeper: Keeper) -> int:
        return keeper.kept_bytes * (self.budget.reservations - keeper.moved_at)


def _kept(share: Share) -> int:
    return share.kept
