"""reflex.confidential: what holds keys shows its type, and is neither pickled nor copied."""

from __future__ import annotations

import copy
import pickle

import pytest

from reflex.confidential import Confidential, FrozenConfidential


class Holder(Confidential):
    def __init__(self) -> None:
        self.key = b"a key"


class Frozen(FrozenConfidential):
    __slots__ = ("key",)

    key: bytes

    def __init__(self, key: bytes) -> None:
        self._set(key=key)


@pytest.mark.parametrize("holder", [Holder(), Frozen(b"a key")], ids=lambda holder: type(holder).__name__)
def test_it_shows_its_type_alone(holder: Confidential) -> None:
    name = type(holder).__name__
    assert repr(holder) == str(holder) == f"{holder}" == f"{name}(…)"


@pytest.mark.parametrize("holder", [Holder(), Frozen(b"a key")], ids=lambda holder: type(holder).__name__)
def test_it_is_neither_pickled_nor_copied(holder: Confidential) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="neither pickled nor copied"):
            pickle.dumps(holder, protocol)
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither pickled nor copied"):
            copied(holder)


def test_what_is_frozen_is_set_once() -> None:
    frozen = Frozen(b"a key")
    with pytest.raises(AttributeError, match=r"Frozen\.key cannot be changed"):
        frozen.key = b"another"
    with pytest.raises(AttributeError, match=r"Frozen\.key cannot be deleted"):
        del frozen.key
    assert frozen.key == b"a key"
