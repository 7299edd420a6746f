"""reflex.inbound: draining lets streams end, and then everything ends; aborting ends it at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial

import pytest

from reflex.config import InboundLimits
from reflex.inbound import Inbound
from reflex.net import fallback as fallback_module
from reflex.protocol.events import EventKind
from reflex.protocol.wire import STREAM_WINDOW, Code
from tests.ends import Origin, connect
from tests.keys import Keys
from tests.loops import DEADLINE_S, in_loop, turns, until
from tests.pair import inbound_settings, running_inbound, statistics
from tests.remote import raw_client

pytestmark = pytest.mark.usefixtures("each_loop")

NO_DRAIN = InboundLimits(drain_s=0.05)


def arrived(inbound: Inbound, size: int) -> bool:
    """Whether so many bytes have come out of tunnels."""
    return inbound._counters.bytes_out_of_tunnels == size


@in_loop
async def test_draining_lets_streams_end_takes_no_new_ones_and_reports(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys)) as (inbound, port):
        with Origin() as origin:
            idle = await raw_client(port, keys)
            remote = await raw_client(port, keys)
            stream, seen = await remote.ask(origin.address)
            assert seen.kind is EventKind.OPENED
            target = await origin.accept()
            task = asyncio.create_task(inbound.drain())
            assert (await remote.see(EventKind.GOAWAY)).number == Code.SHUTTING_DOWN
            await idle.read_until(lambda: idle.session.close_received)
            await idle.end.expect_fin()
            idle.end.close()
            idle.session.close_buffers()
            with pytest.raises(ConnectionRefusedError):
                await connect(port)
            remote.session._goaway_received = False  # it does not keep to what it was told
            _, refusal = await remote.ask(origin.address)
            assert (refusal.kind, refusal.number) == (EventKind.RESET, Code.SHUTTING_DOWN)
            await target.send(b"the last")
            target.finish()
            assert await remote.receive(stream, 8) == b"the last"
            assert not task.done()
            remote.session.finish(stream)
            await remote.flush()
            await target.expect_fin()
            await remote.read_until(lambda: remote.session.close_received)
            remote.end.finish()
            async with asyncio.timeout(DEADLINE_S):
                await task
            remote.leave()
    found = statistics(caplog, "reflex.inbound")
    assert found["gauges"]["tunnels"] == found["gauges"]["streams"] == found["gauges"]["buffered_bytes"] == 0
    assert found["counters"]["handshakes_completed"] == 2
    assert found["pools"]["client_hello"]["in_use"] == 0


@in_loop
async def test_what_is_left_after_the_drain_time_is_reset(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    with Origin() as web, Origin() as origin:
        async with running_inbound(inbound_settings(keys, fallback=web.port, limits=NO_DRAIN)) as (inbound, port):
            remote = await raw_client(port, keys)
            await remote.ask(origin.address)
            target = await origin.accept()
            browser = await connect(port)
            await browser.send(b"GET /")
            server = await web.accept()
            await server.receive(5)
            task = asyncio.create_task(inbound.drain())
            await target.expect_reset()
            await browser.expect_reset()
            await server.expect_reset()
            assert (await remote.see(EventKind.RESET, 1)).number == Code.SHUTTING_DOWN
            remote.end.close()
            async with asyncio.timeout(DEADLINE_S):
                await task
            remote.session.close_buffers()
    line = "1 tunnels, 1 connections to targets and 1 to the web server had not ended after 0.05 s: reset"
    assert line in caplog.text


@in_loop
async def test_draining_does_not_wait_for_idle_browsers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fallback_module, "IDLE_S", 0.02)
    with Origin() as web:
        settings = inbound_settings(Keys.generate(), fallback=web.port)
        async with running_inbound(settings) as (inbound, port):
            with await connect(port) as browser:
                await browser.send(b"GET /")
                server = await web.accept()
                assert await server.receive(5) == b"GET /"
                await server.send(b"answer")
                assert await browser.receive(6) == b"answer"
                async with asyncio.timeout(DEADLINE_S):
                    await inbound.drain()
                await browser.expect_fin()
                await server.expect_fin()
    assert "had not ended" not in caplog.text


@in_loop
async def test_draining_waits_for_what_a_slow_target_has_not_taken_yet() -> None:
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys)) as (inbound, port):
        with Origin(receive_buffer_bytes=4096) as origin:
            remote = await raw_client(port, keys)
            stream, _ = await remote.ask(origin.address)
            target = await origin.accept()
            sent = 0
            # More than the kernel keeps for a socket: the rest waits in the server.
            while not (inbound._budget.buffered and stream.send_window.available == 0):
                sent += remote.session.send(stream, bytes(STREAM_WINDOW))
                await remote.flush()
                await until(partial(arrived, inbound, sent))
                await turns()
                while not remote.end.is_silent:
                    await remote.read()
            remote.session.finish(stream)
            await remote.flush()
            target.finish()
            await remote.see(EventKind.FIN, stream.id)
            task = asyncio.create_task(inbound.drain())
            await remote.read_until(lambda: remote.session.close_received)
            remote.end.close()
            await until(lambda: not inbound._tunnels)
            await turns()
            assert not task.done(), f"the end came with {inbound._budget.buffered} bytes undelivered"
            assert await target.receive_all() == bytes(sent)
            async with asyncio.timeout(DEADLINE_S):
                await task
            remote.session.close_buffers()


@in_loop
async def test_draining_does_not_wait_for_those_who_have_said_nothing() -> None:
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys, limits=NO_DRAIN)) as (inbound, port):
        with await connect(port) as silent, await connect(port) as bad:
            await bad.send(bytes(76))
            await until(lambda: len(inbound._greetings) == 2)
            async with asyncio.timeout(DEADLINE_S):
                await inbound.drain()
            await silent.expect_fin()
            await bad.expect_fin()


@in_loop
async def test_aborting_resets_everything_at_once() -> None:
    keys = Keys.generate()
    with Origin() as web, Origin() as origin:
        async with running_inbound(inbound_settings(keys, fallback=web.port)) as (inbound, port):
            remote = await raw_client(port, keys)
            await remote.ask(origin.address)
            target = await origin.accept()
            browser = await connect(port)
            await browser.send(b"GET /")
            await web.accept()
            await until(lambda: inbound._counters.fallbacks)
            inbound.abort()
            inbound.abort()
            await target.expect_reset()
            await browser.expect_reset()
            with contextlib.suppress(ConnectionResetError):
                assert await remote.end.receive_all() is not None
            remote.leave()
