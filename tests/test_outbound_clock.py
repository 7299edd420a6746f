"""reflex.outbound: a clock that is off is made up for where that can be, and named where not."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from reflex.config import OutboundLimits
from reflex.net import server as server_module
from reflex.protocol.wire import Status
from tests.ends import Origin, connect, socks_request
from tests.keys import Keys
from tests.loops import in_loop
from tests.pair import Pair, inbound_settings, outbound_settings, running_inbound, running_outbound, server_settings

pytestmark = pytest.mark.usefixtures("each_loop")


def shifted_time(monkeypatch: pytest.MonkeyPatch, shift_s: int) -> None:
    """Put the client's clock off by so much; the server's stays."""

    class Shifted:
        gmtime = staticmethod(time.gmtime)
        strftime = staticmethod(time.strftime)

        @staticmethod
        def time() -> float:
            return time.time() + shift_s

    monkeypatch.setattr(server_module, "time", Shifted)


async def answer_dates(web: Origin) -> None:
    """A web server that knows what time it is, and nothing else."""
    while True:
        end = await web.accept()
        asked = await end.receive_some()
        if asked.startswith(b"HEAD"):
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()).encode()
            await end.send(b"HTTP/1.1 200 OK\r\nDate: " + date + b"\r\nConnection: close\r\n\r\n")
        else:
            await end.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        end.finish()


@pytest.mark.parametrize("shift_s", [3600, -3600, 23 * 3600])
def test_a_clock_that_is_off_is_made_up_for_by_the_fallbacks_date(
    shift_s: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shifted_time(monkeypatch, shift_s)

    @in_loop
    async def is_made_up_for() -> None:
        with Origin() as web, Origin() as origin:
            task = asyncio.create_task(answer_dates(web))
            async with Pair(fallback=web.port) as pair:
                await pair.stream(origin)
                (tunnel,) = pair.outbound._tunnels
                tunnel.cut("the test says so")
                await pair.stream(origin)  # from now on without asking
                assert pair.inbound._counters.handshakes_failed == 1
            task.cancel()

    is_made_up_for()
    side = "ahead of" if shift_s > 0 else "behind"
    told = re.search(rf"this machine's clock is (\d+) s {side} the server's \(by its web server's Date\)", caplog.text)
    assert told is not None
    assert int(told[1]) == pytest.approx(abs(shift_s), abs=2)


def test_a_clock_that_is_off_by_days_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    shifted_time(monkeypatch, 3 * 24 * 3600)

    @in_loop
    async def is_told() -> None:
        with Origin() as web:
            task = asyncio.create_task(answer_dates(web))
            async with Pair(fallback=web.port) as pair:
                assert await pair.status(80) == Status.GENERAL_FAILURE
            task.cancel()

    is_told()
    assert "this machine's clock is off by +259" in caplog.text
    assert "too much to make up for: set it right" in caplog.text


def test_without_a_fallback_a_clock_that_is_off_is_named_as_one_of_the_reasons(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shifted_time(monkeypatch, 3600)

    @in_loop
    async def is_named() -> None:
        async with Pair(outbound_limits=OutboundLimits(handshake_timeout_s=0.1, connect_timeout_s=0.1)) as pair:
            assert await pair.status(80) == Status.GENERAL_FAILURE

    is_named()
    assert "or this machine's clock is off by more than 120 s (it says " in caplog.text
    assert "the client's clock is off by +3600 s; at most 120 s are allowed" in caplog.text  # the server's line


def test_right_clocks_leave_the_keys_as_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    @in_loop
    async def leaves_the_keys() -> None:
        keys, others = Keys.generate(), Keys.generate()
        wrong = Keys(keys.private_key, keys.public_key, keys.user_id, others.user_key)
        with Origin() as web:
            task = asyncio.create_task(answer_dates(web))
            async with (
                running_inbound(inbound_settings(keys, fallback=web.port)) as (_, port),
                running_outbound(outbound_settings([server_settings(wrong, port)])) as (_, door),
            ):
                with await connect(door) as end:
                    assert await socks_request(end, 80) == Status.GENERAL_FAILURE
            task.cancel()

    leaves_the_keys()
    assert "the clocks agree within 120 s, so the server's public key, the user id or the user key is wrong" in (
        caplog.text
    )
