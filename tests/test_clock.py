"""reflex.net.clock: a web server's Date; this machine's clocks."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.net.clock import MAX_ANSWER_BYTES, WakeWatch, ask_date, boot_time_s, parse_date
from reflex.protocol.address import Address
from tests.ends import HOST, End, Origin, refusing_port
from tests.loops import DEADLINE_S, in_loop

DATE = b"Fri, 20 Mar 2026 10:20:30 GMT"
DATE_S = 1_774_002_030
HEAD = b"HTTP/1.1 200 OK\r\nServer: x\r\nDate: " + DATE + b"\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        HEAD,
        b"HTTP/1.0 404 Not Found\r\ndate:" + DATE + b"\r\n\r\n",
        b"HTTP/1.1 301 Moved\r\nA: b\r\nDATE:\t" + DATE + b" \r\nC: d\r\n\r\nbody\r\nDate: no",
        b"HTTP/1.1 200 OK\r\nDate: Friday, 20-Mar-26 10:20:30 GMT\r\n\r\n",  # RFC 850's form
        b"HTTP/1.1 200 OK\r\nDate: Fri Mar 20 10:20:30 2026\r\n\r\n",  # asctime's form
        b"HTTP/1.1 200 OK\r\nDate: " + DATE,  # cut short behind it
    ],
)
def test_a_date_is_found_in_each_of_its_forms(answer: bytes) -> None:
    assert parse_date(answer) == DATE_S


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-x\r\nDate: " + DATE,
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nDate: " + DATE,
        b"HTTP/1.1 200 OK\r\nDate: soon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate:\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: \xff\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: Fri, 99 Mar 2026 10:20:30 GMT\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: Fri, 20 Mar 99999999999 10:20:30 GMT\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: Wed, 31 Dec 1969 23:00:00 GMT\r\n\r\n",
    ],
)
def test_an_answer_without_a_valid_date_has_none(answer: bytes) -> None:
    assert parse_date(answer) is None


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_whatever_stands_for_a_date_raises_nothing(value: bytes) -> None:
    parse_date(b"HTTP/1.1 200 OK\r\nDate: " + value)
    parse_date(value)


async def asked(origin: Origin) -> tuple[asyncio.Task[int | None], End, bytes]:
    """A question that is under way, the end that answers it, and its text."""
    task = asyncio.create_task(ask_date(origin.address, timeout_s=DEADLINE_S))
    end = await origin.accept()
    question = b""
    while b"\r\n\r\n" not in question:
        question += await end.receive_some()
    return task, end, question


@in_loop
async def test_a_web_server_is_asked_in_plain_http() -> None:
    with Origin() as origin:
        task, end, question = await asked(origin)
        assert question.startswith(b"HEAD / HTTP/1.1\r\n")
        assert f"Host: {HOST}:{origin.port}\r\n".encode() in question
        for piece in (HEAD[:20], HEAD[20:-2], HEAD[-2:]):
            await end.send(piece)
        assert await task == DATE_S


@in_loop
async def test_a_date_counts_although_the_answer_ends_or_breaks_behind_it() -> None:
    with Origin() as origin:
        task, end, _ = await asked(origin)
        await end.send(HEAD[:-2])
        end.finish()
        assert await task == DATE_S


@in_loop
async def test_no_more_is_read_than_a_head_may_have() -> None:
    with Origin() as origin:
        task, end, _ = await asked(origin)
        await end.send(HEAD[:-2] + b"x" * MAX_ANSWER_BYTES)
        assert await task == DATE_S


@in_loop
async def test_a_reset_a_refusal_and_silence_tell_no_date() -> None:
    with Origin() as origin:
        task, end, _ = await asked(origin)
        end.reset()
        assert await task is None
        assert await ask_date(origin.address, timeout_s=0.01) is None
    with refusing_port() as port:
        assert await ask_date(Address.of(HOST, port), timeout_s=DEADLINE_S) is None


# This machine's own.


class Clocks:
    """Both clocks, in the hands of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.boot_s, self.wall_s = 100.0, 1_900_000_000.0
        monkeypatch.setattr("time.time", lambda: self.wall_s)
        monkeypatch.setattr("reflex.net.clock.boot_time_s", lambda: self.boot_s)

    def go(self, boot_s: float, wall_s: float) -> None:
        self.boot_s += boot_s
        self.wall_s += wall_s


@pytest.mark.parametrize(
    ("boot_s", "wall_s", "slept_s"),
    [
        (1.0, 1.0, 0.0),
        (5.9, 5.9, 0.0),  # a busy moment
        (601.0, 601.0, 600.0),  # the machine slept, or the process was stopped
        (1.0, 3601.0, 3600.0),  # a virtual machine was stopped, or the clock was set
        (1.0, -3599.0, 0.0),  # a clock that was set back tells nothing
    ],
)
def test_a_sleep_is_told_once_by_the_clocks_that_went_on(
    monkeypatch: pytest.MonkeyPatch, boot_s: float, wall_s: float, slept_s: float
) -> None:
    clocks = Clocks(monkeypatch)
    watch = WakeWatch()
    clocks.go(1.0, 1.0)
    assert watch.slept_s(1.0) == 0.0
    clocks.go(boot_s, wall_s)
    assert watch.slept_s(1.0) == pytest.approx(slept_s)
    clocks.go(1.0, 1.0)
    assert watch.slept_s(1.0) == 0.0


def test_the_boot_clock_goes_on() -> None:
    first_s = boot_time_s()
    assert boot_time_s() >= first_s
