"""Keys and passwords that stand in settings: values that show themselves to nobody, and messages without them."""

from __future__ import annotations

import base64
import hmac
import re
from typing import Final

from reflex.confidential import Confidential

KEY_BYTES: Final = 32
MAX_SHOWN_CHARACTERS: Final = 40  # of a text in a message
MAX_SHOWN_BITS: Final = 64  # of a number in a message; str() refuses numbers of thousands of digits

# What a key, or most of one, looks like: hexadecimal, or base64 of any kind, which mixes capitals with small
# letters. A path or a name is seldom so long without a dot and with capitals; if it is, its length is shown instead.
MIN_KEY_CHARACTERS: Final = 32
_HEX_RUN: Final = re.compile(rf"[0-9A-Fa-f]{{{MIN_KEY_CHARACTERS},}}", re.ASCII)
_BASE64_RUN: Final = re.compile(rf"[A-Za-z0-9+/_=-]{{{MIN_KEY_CHARACTERS},}}", re.ASCII)


class Secret(Confidential):
    """Bytes that no repr, log line, message or pickle may show. Equality takes constant time.

    It cannot be changed, so a copy is itself.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """The bytes themselves, for who needs to compute with them."""
        return self._value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return hash(self._value)

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self


def parse_key(text: str) -> bytes:
    """The 32 bytes that ``text`` is the base64 of. Raises ValueError if it is anything else.

    Only the one canonical form is taken, with padding and no stray bits: anything else is a copying error.
    """
    key = base64.b64decode(text, validate=True)
    if len(key) != KEY_BYTES or base64.b64encode(key).decode("ascii") != text:
        raise ValueError
    return key


def may_hold_key(text: str) -> bool:
    """Whether a key may stand in the text, so that it must not be shown."""
    if _HEX_RUN.search(text):
        return True
    return any(run.lower() != run != run.upper() for run in _BASE64_RUN.findall(text))


def describe(value: object, *, hidden: bool = False) -> str:
    """What stands in the file, for a message. ``hidden``, or where it may be a key: only its kind and length."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return (
            f"a text of {len(value)} characters" if hidden or may_hold_key(value) else f"the text {shortened(value)!r}"
        )
    if isinstance(value, int | float):
        if hidden:
            return "a number"
        if isinstance(value, int) and value.bit_length() > MAX_SHOWN_BITS:
            return f"a number of {value.bit_length()} bits"
        return f"the number {value}"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "a date or time"


def is_key(text: str) -> bool:
    """Whether :func:`parse_key` takes the text."""
    try:
        parse_key(text)
    except ValueError:
        return False
    return True


def shortened(text: str) -> str:
    """The beginning of a text that is too long for a message."""
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "…"
