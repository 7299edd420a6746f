"""The base of what holds keys: it does not show them, and there is no second copy of it.

A repr, a pickle, ``dataclasses.asdict`` and ``copy`` are the ways in which an object gets into a log, a file or
another process without anybody having asked for the key in it.
"""

from __future__ import annotations

from typing import NoReturn, SupportsIndex


class Confidential:
    """Shows its type alone, and refuses to be pickled or copied."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse: ``pickle`` and ``copy`` ask here. Raises TypeError."""
        raise TypeError(f"{type(self).__name__} holds keys: it is neither pickled nor copied")


class FrozenConfidential(Confidential):
    """The same, and set once: its ``__init__`` uses :meth:`_set`."""

    __slots__ = ()

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted")
