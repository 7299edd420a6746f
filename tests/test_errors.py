"""reflex.errors: the tree is the one drawn at its top, and errors carry facts."""

from __future__ import annotations

import inspect
import re

import pytest

from reflex import errors
from reflex.protocol.wire import Code

CLASSES = {
    name: member
    for name, member in vars(errors).items()
    if inspect.isclass(member) and issubclass(member, Exception) and member.__module__ == errors.__name__
}


def drawn_parents() -> dict[str, str]:
    """Each class of the drawing in the docstring, and the one that it hangs from."""
    parents: dict[str, str] = {}
    above: dict[int, str] = {}
    for indent, name in re.findall(r"^    ([│├└─ ]*)(\w+)", errors.__doc__ or "", re.MULTILINE):
        depth = len(indent) // 4
        above[depth] = name
        parents[name] = above[depth - 1] if depth else "Exception"
    return parents


def test_the_tree_is_the_one_that_is_drawn() -> None:
    assert {name: member.__bases__[0].__name__ for name, member in CLASSES.items()} == drawn_parents()


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_has_one_parent_a_docstring_and_the_root(name: str) -> None:
    assert len(CLASSES[name].__bases__) == 1
    assert CLASSES[name].__doc__
    assert issubclass(CLASSES[name], errors.ReflexError)


@pytest.mark.parametrize(
    ("error", "facts", "in_text"),
    [
        (errors.ForeignBuffer("hellos"), {"pool": "hellos"}, ["hellos"]),
        (
            errors.WrongSize("hellos", 5, 76),
            {"pool": "hellos", "size_bytes": 5, "expected_bytes": 76},
            ["hellos", "5", "76"],
        ),
        (
            errors.StreamStateError(7, "closed", "send DATA"),
            {"stream_id": 7, "state": "closed", "call": "send DATA"},
            ["stream 7 is closed", "send DATA"],
        ),
        (errors.WindowExceeded(9, 4), {"size_bytes": 9, "window_bytes": 4}, ["9", "4"]),
        (errors.UnsupportedHello(2, 5), {"version": 2, "suite": 5}, ["version 2", "suite 5"]),
        (errors.ClockSkew(-3600, 120), {"skew_s": -3600, "limit_s": 120}, ["-3600 s", "120 s"]),
        (errors.ClockSkew(200, 120), {"skew_s": 200, "limit_s": 120}, ["+200 s"]),
        (errors.SocksError("no SOCKS5"), {"reply": b""}, ["no SOCKS5"]),
        (errors.SocksError("no method", b"\x05\xff"), {"reply": b"\x05\xff"}, ["no method"]),
        (errors.DialError(5, "refused"), {"status": 5}, ["refused"]),
        (errors.ConfigError(["a", "b"]), {"problems": ("a", "b")}, ["a\nb"]),
        (errors.RecordError("bad"), {"code": Code.PROTOCOL}, ["bad"]),
        (errors.FrameError("bad"), {"code": Code.PROTOCOL}, ["bad"]),
        (errors.FlowControlError("bad"), {"code": Code.FLOW_CONTROL}, ["bad"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_carry_facts_and_say_them(error: Exception, facts: dict[str, object], in_text: list[str]) -> None:
    assert {name: getattr(error, name) for name in facts} == facts
    for text in in_text:
        assert text in str(error)
