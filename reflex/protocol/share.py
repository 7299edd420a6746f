"""Who has how much of the memory in which received bytes wait, and who gives way when it is used up.

A :class:`Budget` is of the process, a :class:`Share` is one owner's part of it: a user's at the server. A
keeper is whoever borrows memory because bytes must wait: a stream whose socket takes nothing. Memory is
reserved before it is borrowed, and what does not fit is not reserved; so no more than the limit is ever in use.

Two bounds, a soft one and a hard one:

1. A session gets credit on arrival of its bytes only while its owner keeps no more than what the process has
   left. So one owner comes to half of the limit, two to a third each, and something is left for the next.
   What windows have grown counts as used: it may arrive without further credit.
2. What had credit already still arrives. Where it does not fit, the stream that keeps most of the owner who
   keeps most is given up, until it fits. Who takes its bytes keeps nothing, and is never given up.
"""

from __future__ import annotations

from typing import Protocol

from reflex.protocol.window import Budget


class Keeper(Protocol):
    """What a share asks of one that keeps bytes."""

    kept_bytes: int

    def shed(self) -> None:
        """Give up: all that is kept goes back, before this returns."""


class Share:
    """One owner's part of a budget.

    Attributes:
        budget: whose part this is.
        kept: bytes of memory that its keepers have reserved.
    """

    __slots__ = ("_keepers", "budget", "kept")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.kept = 0
        self._keepers: dict[Keeper, None] = {}  # a set in the order of arrival

    def reserve(self, keeper: Keeper, size_bytes: int) -> bool:
        """Reserve memory, to be given back by :meth:`give_back`.

        Where it does not fit, others are shed that keep more. False, and nothing reserved, where nobody
        keeps more than this keeper.
        """
        budget = self.budget
        while budget.kept + size_bytes > budget.buffered_limit:
            share = max(budget.shares, key=_kept, default=self)
            victim = max(share._keepers, key=_kept_bytes, default=keeper)
            if victim is keeper:
                return False
            victim.shed()
        if not self.kept:
            budget.shares[self] = None
        self._keepers[keeper] = None
        keeper.kept_bytes += size_bytes
        self.kept += size_bytes
        budget.kept += size_bytes
        budget.high_water = max(budget.high_water, budget.kept)
        return True

    def give_back(self, keeper: Keeper, size_bytes: int) -> None:
        """Return memory that :meth:`reserve` reserved."""
        keeper.kept_bytes -= size_bytes
        self.kept -= size_bytes
        self.budget.kept -= size_bytes
        if not keeper.kept_bytes:
            del self._keepers[keeper]
        if not self.kept:
            del self.budget.shares[self]


def _kept(share: Share) -> int:
    return share.kept


def _kept_bytes(keeper: Keeper) -> int:
    return keeper.kept_bytes
