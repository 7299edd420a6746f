"""Reads a TOML file's values as what they should be, and collects every problem on the way.

A :class:`Document` is one file with the problems and warnings found in it; a :class:`Table` is one table
of it, asked key by key. Asking never raises: what is wrong becomes a problem with the key's path, and the
caller gets a stand-in (None or the default) and reads on, so that a user sees all errors at once.
Every key that nobody asked for is a problem too: :meth:`Table.finish` reports them.

A problem says what stands in the file, but never the text of a key, a password or an id (an id is hidden
because a key that was pasted in its place would be shown). A key may stand in any wrong place: what looks like
one is never shown either.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from reflex.config.secret import Secret, describe, is_key, may_hold_key, parse_key, shortened
from reflex.errors import ConfigError

T = TypeVar("T")
IntDefault = TypeVar("IntDefault", int, None)
FloatDefault = TypeVar("FloatDefault", float, None)

MAX_FILE_BYTES: Final = 16 * 2**20  # about 100,000 users; keeps a mistaken /dev/zero from filling memory
MAX_KEY_FILE_BYTES: Final = 4_096  # base64 of a key has 44 characters; the rest is room for line ends
MAX_GUESSED_CHARACTERS: Final = 64  # longer keys are no typing errors, and would take difflib long
OTHERS_MASK: Final = 0o077  # the permission bits of everybody but the owner
EXPECTED_KEY: Final = "base64 of 32 bytes"

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,40}", re.ASCII)


class Document:
    """One settings file: its values, and the problems and warnings found so far.

    ``root`` is its top-level table. ``holds_secret`` is set by who reads a secret that stands in the file
    itself; :meth:`finish` then warns if others can read the file.

    Raises ConfigError with one problem when the file cannot be read or is not TOML.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.holds_secret = False
        try:
            content, self._mode = _read_file(Path(self.name), limit_bytes=MAX_FILE_BYTES)
        except (OSError, ValueError) as error:
            reason = _reason(error)
            raise ConfigError([f"{self.name}: cannot be read: {reason}; expected a readable TOML file"]) from None
        try:
            values = tomllib.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ConfigError([f"{self.name}: line {line}: not UTF-8; expected TOML"]) from None
        except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError; so is an endless number
            is_told = isinstance(error, tomllib.TOMLDecodeError) and not may_hold_key(str(error))
            reason = str(error) if is_told else "a value that cannot be read"
            raise ConfigError([f"{self.name}: not valid TOML: {reason}; expected TOML"]) from None
        self.root = Table(self, "", values)

    def problem(self, place: str, found: str, expected: str) -> None:
        """Notes a problem at the key path ``place``."""
        self.problems.append(f"{self.name}: {place}: {found}; expected {expected}")

    def warn(self, place: str, text: str) -> None:
        """Notes something that works, but that the user should know of."""
        self.warnings.append(f"{self.name}: {place}: {text}" if place else f"{self.name}: {text}")

    def finish(self) -> None:
        """To be called once when all was read: reports unknown keys, warns of secrets in the open."""
        self.root.finish()
        if self.holds_secret and self._mode & OTHERS_MASK:
            self.warn("", f"holds secrets, and others can read it (mode {self._mode:04o}); expected mode 0600")


class Table:
    """One table of a document, asked key by key. ``place`` is its key path, empty for the whole file."""

    def __init__(self, document: Document, place: str, values: dict[str, object]) -> None:
        self.place = place
        self._document = document
        self._values = values
        self._known: set[str] = set()
        self._children: list[Table] = []

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def path(self, key: str) -> str:
        """The key path of one of this table's keys, safe to print."""
        if may_hold_key(key):
            shown = f"(a name of {len(key)} characters)"
        else:
            shown = key if _BARE_KEY.fullmatch(key) else repr(shortened(key))
        return f"{self.place}.{shown}" if self.place else shown

    def problem(self, key: str, found: str, expected: str) -> None:
        """Notes a problem at one of this table's keys."""
        self._document.problem(self.path(key), found, expected)

    def warn(self, key: str, text: str) -> None:
        """Notes a warning at one of this table's keys."""
        self._document.warn(self.path(key), text)

    def text(
        self,
        key: str,
        parse: Callable[[str], T],
        *,
        expected: str,
        required: bool = False,
        hidden: bool = False,
    ) -> T | None:
        """The text at ``key`` as ``parse`` understands it; None if it is absent or wrong.

        ``parse`` raises ValueError for a text that it does not take. ``hidden`` keeps the text out of messages.
        """
        if not self._present(key, expected=expected, required=required):
            return None
        return self._parsed(self.path(key), self._values[key], parse, expected=expected, hidden=hidden)

    def texts(
        self, key: str, parse: Callable[[str], T], *, expected: str, required: bool = False
    ) -> list[tuple[str, T]]:
        """The list of texts at ``key``: the key path and the parsed value of each that is right."""
        parsed = []
        for index, value in enumerate(self._list(key, f"a list of texts, each {expected}", required=required)):
            place = f"{self.path(key)}[{index}]"
            item = self._parsed(place, value, parse, expected=expected, hidden=False)
            if item is not None:
                parsed.append((place, item))
        return parsed

    def integer(self, key: str, default: IntDefault, *, minimum: int, maximum: int) -> int | IntDefault:
        """The whole number at ``key``, within the bounds (included); true and false are no numbers.

        ``default`` is what an absent key means; None where that is no number.
        """
        expected = f"a whole number from {minimum} to {maximum}"
        if not self._present(key, expected=expected):
            return default
        value = self._values[key]
        if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum:
            return value
        self.problem(key, describe(value), expected)
        return default

    def seconds(self, key: str, default: float, *, minimum: float, maximum: float) -> float:
        """The duration at ``key`` in seconds, whole or not, within the bounds (included)."""
        return self._number(key, default, f"a number of seconds from {minimum:g} to {maximum:.0f}", minimum, maximum)

    def rate(self, key: str, default: FloatDefault, *, minimum: float, maximum: float) -> float | FloatDefault:
        """The events in a second at ``key``, whole or not, within the bounds (included)."""
        return self._number(key, default, f"a number from {minimum:g} to {maximum:.0f}", minimum, maximum)

    def _number(
        self, key: str, default: FloatDefault, expected: str, minimum: float, maximum: float
    ) -> float | FloatDefault:
        if not self._present(key, expected=expected):
            return default
        value = self._values[key]
        # A float that is not a number fails both comparisons.
        if isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value <= maximum:
            return float(value)
        self.problem(key, describe(value), expected)
        return default

    def file_path(self, key: str) -> Path | None:
        """The path at ``key``, made absolute: a relative one starts at the settings file's folder.

        None if it is absent or wrong.
        """
        value = self.text(key, _parse_path, expected="the path of a file")
        return None if value is None else (Path(self._document.name).parent / value).absolute()

    def flag(self, key: str, *, default: bool) -> bool:
        """The true or false at ``key``."""
        if not self._present(key, expected="true or false"):
            return default
        value = self._values[key]
        if isinstance(value, bool):
            return value
        self.problem(key, describe(value), "true or false")
        return default

    def key_bytes(self, key: str) -> bytes | None:
        """The 32 bytes of a public key, which stands at ``key`` in base64; None if it is absent or wrong."""
        if not self._present(key, expected=EXPECTED_KEY, required=True):
            return None
        return self._key(self.path(key), self._values[key])

    def secret_key(self, key: str, *, file_key: str | None = None) -> Secret | None:
        """A secret key of 32 bytes, in base64 at ``key`` or in the file named at ``file_key``.

        The file's path is relative to the settings file's folder. None if the key is absent, given twice or wrong.
        """
        if file_key is None or file_key not in self._values:
            if file_key is not None:
                self._known.add(file_key)
            expected = EXPECTED_KEY if file_key is None else f"{EXPECTED_KEY}, or {file_key}"
            if not self._present(key, expected=expected, required=True):
                return None
            self._document.holds_secret = True
            value = self._key(self.path(key), self._values[key])
        elif key in self._values:
            self._known |= {key, file_key}
            self.problem(key, f"given twice, here and as {file_key}", "one of the two")
            return None
        else:
            self._known |= {key, file_key}
            value = self._key_of_file(file_key)
        return None if value is None else Secret(value)

    def secret_text(self, key: str, *, parse: Callable[[str], bytes], expected: str) -> Secret | None:
        """A password: the text at ``key``, as ``parse`` makes bytes of it; None if it is absent or wrong."""
        value = self.text(key, parse, expected=expected, hidden=True)
        if value is None:
            return None
        self._document.holds_secret = True
        return Secret(value)

    def table(self, key: str) -> Table:
        """The table at ``key``; an empty one if it is absent or no table."""
        value: object = {}
        if self._present(key, expected="a table"):
            value = self._values[key]
        return self._child(self.path(key), value, expected=f"a table, [{key}]")

    def tables(self, key: str) -> list[Table]:
        """The list of tables at ``key``, of which there must be one at least. What is no table is left out."""
        expected = f"a list of tables, [[{key}]]"
        values = self._list(key, expected, required=True)
        return [
            self._child(f"{self.path(key)}[{index}]", value, expected="a table") for index, value in enumerate(values)
        ]

    def finish(self) -> None:
        """Reports every key that nobody asked for, in this table and those below it."""
        for key in self._values:
            if key in self._known:
                continue
            guesses = []
            if len(key) <= MAX_GUESSED_CHARACTERS:
                guesses = difflib.get_close_matches(key, sorted(self._known), n=1)
            found = f"an unknown key (did you mean {guesses[0]}?)" if guesses else "an unknown key"
            self.problem(key, found, "one of " + ", ".join(sorted(self._known)))
        for child in self._children:
            child.finish()

    def _present(self, key: str, *, expected: str, required: bool = False) -> bool:
        self._known.add(key)
        if key in self._values:
            return True
        if required:
            self.problem(key, "nothing", expected)
        return False

    def _parsed(self, place: str, value: object, parse: Callable[[str], T], *, expected: str, hidden: bool) -> T | None:
        if isinstance(value, str):
            try:
                return parse(value)
            except ValueError:
                pass
        self._document.problem(place, describe(value, hidden=hidden), expected)
        return None

    def _list(self, key: str, expected: str, *, required: bool) -> list[object]:
        if not self._present(key, expected=expected, required=required):
            return []
        value = self._values[key]
        if not isinstance(value, list):
            self.problem(key, describe(value, hidden=True), expected)
            return []
        if required and not value:
            self.problem(key, "an empty list", expected)
        return value

    def _child(self, place: str, value: object, *, expected: str) -> Table:
        if not isinstance(value, dict):
            self._document.problem(place, describe(value, hidden=True), expected)
            value = {}
        child = Table(self._document, place, value)
        self._children.append(child)
        return child

    def _key(self, place: str, value: object) -> bytes | None:
        key = self._parsed(place, value, parse_key, expected=EXPECTED_KEY, hidden=True)
        if key is not None and not any(key):
            self._document.problem(place, "a key of zeros", f"{EXPECTED_KEY}, from `reflex keygen`")
            return None
        return key

    def _key_of_file(self, file_key: str) -> bytes | None:
        place = self.path(file_key)
        expected = f"the path of a file that holds {EXPECTED_KEY}"
        value = self._values[file_key]
        if not isinstance(value, str) or is_key(value):
            # A key where its file's path should stand is a secret all the same.
            self._document.problem(place, describe(value, hidden=True), expected)
            return None
        try:
            content, mode = _read_file(Path(self._document.name).parent / value, limit_bytes=MAX_KEY_FILE_BYTES)
            text = content.decode("ascii").strip()
        except (OSError, ValueError) as error:
            self._document.problem(place, f"{describe(value)} cannot be read: {_reason(error)}", expected)
            return None
        if mode & OTHERS_MASK:
            self._document.warn(place, f"others can read {describe(value)} (mode {mode:04o}); expected mode 0600")
        return self._key(place, text)


def _parse_path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError
    return text


def _reason(error: OSError | ValueError) -> str:
    """Why a file could not be read, without the file's content, which a ValueError's own text may show."""
    if isinstance(error, OSError):
        return error.strerror or "input/output error"
    return "not a text" if isinstance(error, UnicodeError) else "no path, or too large a file"


def _read_file(path: Path, *, limit_bytes: int) -> tuple[bytes, int]:
    """A file's content and its permission bits.

    Raises OSError, or ValueError when the path cannot be one (a NUL in it) or the file is above the limit.
    """
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ValueError
    return content, mode
