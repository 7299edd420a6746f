"""reflex.net.limits: a user's own limits, driven through the server's half in process."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any, Final

import pytest

from reflex.config import PoolSettings
from reflex.inbound import Inbound
from reflex.net.limits import UserLimits
from reflex.net.listener import open_listening
from reflex.net.paced import PacedRelay
from reflex.net.target import TargetRelay
from reflex.protocol.events import EventKind
from reflex.protocol.wire import STREAM_WINDOW, Code, Status
from reflex.saved_replay import SavedReplaySet
from reflex.usage import MonthlyUsage
from reflex.worker import SharedCount, SharedCounts, UserField, UserTable, WorkerContext
from tests.ends import HOST, Origin, socks_request
from tests.ends import connect as connect_to
from tests.keys import Keys
from tests.loops import in_loop, until
from tests.pair import (
    drain_slowly,
    inbound_settings,
    limited,
    outbound_settings,
    port_of,
    running_inbound,
    running_outbound,
    server_settings,
    statistics,
)
from tests.remote import raw_client
from tests.test_usage import rows

INBOUND_LOG: Final = "reflex.net.limits"


pytestmark = pytest.mark.usefixtures("each_loop")


def limits_of(inbound: Inbound) -> UserLimits:
    (user,) = inbound._users.limits.values()
    return user


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == INBOUND_LOG]


@in_loop
async def test_a_user_without_limits_has_nothing_of_this() -> None:
    keys = Keys.generate()
    async with running_inbound(inbound_settings(keys)) as (inbound, port):
        remote = await raw_client(port, keys)
        with Origin() as origin:
            assert (await remote.ask(origin.address))[1].kind is EventKind.OPENED
            assert inbound._users.limits == {}
            assert {type(relay) for relay in inbound._relays} == {TargetRelay}
        remote.leave()


# Tunnels


@in_loop
async def test_a_tunnel_too_many_is_closed_with_a_reason_until_one_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    async with running_inbound(limited(keys, max_tunnels=2)) as (inbound, port):
        first, second = await raw_client(port, keys), await raw_client(port, keys)
        for _ in range(2):
            third = await raw_client(port, keys)
            assert third.session.close_received  # it came with the SETTINGS
            assert not third.session.has_room
            await third.end.expect_fin()
            third.leave()
        await until(lambda: len(inbound._tunnels) == 2)
        assert limits_of(inbound).counters.tunnels_limited == 2
        assert notes(caplog) == ["alice is over its max_tunnels (2): a tunnel was closed at once"]
        first.leave()
        await until(lambda: len(inbound._tunnels) == 1)
        again = await raw_client(port, keys)
        assert again.session.has_room
        inbound.report()
        assert statistics(caplog, "reflex.inbound")["counters"]["tunnels_limited"] == 2
        second.leave()
        again.leave()


@in_loop
async def test_the_client_says_why_and_does_not_dial_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    pool = PoolSettings(max_streams=1)
    async with (
        running_inbound(limited(keys, max_tunnels=1)) as (inbound, port),
        running_outbound(outbound_settings([server_settings(keys, port)], pool=pool)) as (_, door),
    ):
        with Origin() as origin, await connect_to(door) as near:
            assert await socks_request(near, origin.port) == Status.SUCCEEDED
            for _ in range(2):
                with await connect_to(door) as other:
                    assert await socks_request(other, origin.port) == Status.GENERAL_FAILURE
            assert inbound._counters.connections_accepted == 3
            reason = "the server closed the new tunnel: this user has as many as it may have there"
            assert f"{HOST}:{port}: {reason}" in caplog.text


@in_loop
async def test_who_left_before_the_answer_takes_no_tunnel() -> None:
    keys = Keys.generate()
    async with running_inbound(limited(keys, max_tunnels=1)) as (inbound, port):
        gone = await connect_to(port)
        await gone.send(keys.hello(int(time.time())))
        gone.reset()
        await until(lambda: inbound._counters.connections_accepted == 1 and not inbound._greetings)
        await until(lambda: not inbound._tunnels)
        remote = await raw_client(port, keys)
        assert remote.session.has_room
        remote.leave()


# Streams


@in_loop
async def test_streams_of_all_tunnels_count(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    async with running_inbound(limited(keys, max_streams=3)) as (inbound, port):
        one, two = await raw_client(port, keys), await raw_client(port, keys)
        assert one.session._peer_max_streams == 3
        with Origin() as origin:
            streams = [(await remote.ask(origin.address))[0] for remote in (one, two, one)]
            for _ in range(2):
                _, seen = await two.ask(origin.address)
                assert (seen.kind, seen.number) == (EventKind.RESET, Code.LIMIT)
            assert limits_of(inbound).counters.streams_limited == 2
            assert notes(caplog) == ["alice is over its max_streams (3): a stream was refused"]
            one.session.reset(streams[0], Code.CANCELLED)
            await one.flush()
            await until(lambda: len(limits_of(inbound).relays) == 2)
            assert (await two.ask(origin.address))[1].kind is EventKind.OPENED
            one.leave()
            await until(lambda: len(inbound._tunnels) == 1)
            assert (await two.ask(origin.address))[1].kind is EventKind.OPENED
        two.leave()


@in_loop
async def test_what_is_still_delivered_after_its_stream_has_ended_counts() -> None:
    keys = Keys.generate()
    async with running_inbound(limited(keys, max_streams=3)) as (inbound, port):
        remote = await raw_client(port, keys)
        with Origin(receive_buffer_bytes=2_048) as origin:
            targets = [await drain_slowly(inbound, remote, origin) for _ in range(3)]
            assert [tunnel.stream_count for tunnel in inbound._tunnels] == [0]
            assert len(limits_of(inbound).relays) == 3
            assert (await remote.ask(origin.address))[1].number == Code.LIMIT
            assert len(await targets[0].receive_all()) == STREAM_WINDOW
            await until(lambda: len(limits_of(inbound).relays) == 2)
            assert (await remote.ask(origin.address))[1].kind is EventKind.OPENED
        remote.leave()


@in_loop
async def test_the_servers_own_limit_holds_as_well() -> None:
    keys = Keys.generate()
    async with running_inbound(limited(keys, max_streams=3000)) as (_, port):
        remote = await raw_client(port, keys)
        assert remote.session._peer_max_streams == 10
        remote.leave()


# Dials


@in_loop
async def test_dials_wait_for_their_turn_and_what_would_wait_too_long_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    async with running_inbound(limited(keys, dials_per_s=1, dial_timeout_s=1.5)) as (inbound, port):
        loop = inbound._loop
        remote = await raw_client(port, keys)
        with Origin() as origin:
            began_s = loop.time()
            streams = [remote.session.open(origin.address) for _ in range(3)]
            await remote.flush()
            seen = await remote.see(EventKind.RESET, streams[-1].id)
            assert seen.number == Code.LIMIT
            for _ in range(2):
                await origin.accept()
            assert loop.time() - began_s > 0.95
            counters = limits_of(inbound).counters
            assert (counters.dials_delayed, counters.streams_limited) == (1, 1)
            assert notes(caplog) == [
                "alice is over its dials_per_s (1): dials wait",
                "alice is over its dials_per_s (1): a stream was refused, for it would have waited too long",
            ]
        remote.leave()


# Bytes


@in_loop
async def test_only_a_user_with_a_pace_has_relays_that_keep_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys.generate()
    async with running_inbound(limited(keys, bytes_per_s=100_000)) as (inbound, port):
        remote = await raw_client(port, keys)
        with Origin() as origin:
            stream, _ = await remote.ask(origin.address)
            assert {type(relay) for relay in inbound._relays} == {PacedRelay}
            target = await origin.accept()
            await target.send(bytes(20_000))
            await remote.receive(stream, 20_000)
            assert limits_of(inbound).counters.reads_delayed
            assert limits_of(inbound).counters.bytes_into_tunnels == 20_000
            assert inbound._counters.bytes_into_tunnels == 0
            assert notes(caplog) == ["alice is over its bytes_per_s (100000): its streams are slowed down"]
            inbound.report()
            assert statistics(caplog, "reflex.inbound")["counters"]["bytes_into_tunnels"] == 20_000
        remote.leave()


# The month


def test_a_month_that_is_used_up_ends_what_runs_and_the_next_one_opens_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "usage.sqlite"
    keys = Keys.generate()
    now_s = 1_793_491_200.0  # November 2026

    @in_loop
    async def run() -> None:
        async with running_inbound(limited(keys, monthly_bytes=1000, usage_file=path)) as (inbound, port):
            assert inbound._users._usage is not None
            inbound._users._usage._clock = lambda: now_s
            remote = await raw_client(port, keys)
            with Origin() as origin:
                await remote.ask(origin.address)
                idle_target = await origin.accept()
                stream, _ = await remote.ask(origin.address)
                target = await origin.accept()
                remote.session.send(stream, bytes(400))
                await remote.flush()
                await target.send(bytes(600))
                assert await target.receive(400)
                await target.expect_reset()
                await idle_target.expect_reset()
                assert not limits_of(inbound).relays
                for _ in range(2):
                    _, seen = await remote.ask(origin.address)
                    assert (seen.kind, seen.number) == (EventKind.REFUSED, Status.NOT_ALLOWED)
                inbound._users._usage._clock = lambda: now_s + 31 * 86_400
                assert (await remote.ask(origin.address))[1].kind is EventKind.OPENED
            assert limits_of(inbound).counters.streams_limited == 2
            remote.leave()

    run()
    assert [row[1:] for row in rows(path)] == [("2026-11", "alice", 1000)]
    assert notes(caplog) == [
        "alice has used up monthly_bytes (1000): its streams are reset, and new ones refused until 2026-12-01 00:00 UTC"
    ]


def test_a_clean_stop_writes_everything(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    keys = Keys.generate()

    @in_loop
    async def run() -> None:
        inbound = Inbound(limited(keys, monthly_bytes=10**9, usage_file=path))
        (address,) = await inbound.start()
        remote = await raw_client(port_of(address), keys)
        with Origin() as origin:
            stream, _ = await remote.ask(origin.address)
            target = await origin.accept()
            remote.session.send(stream, bytes(123))
            await remote.flush()
            await target.receive(123)
        remote.leave()
        await until(lambda: not inbound._tunnels)
        await inbound.drain()
        inbound.abort()

    run()
    assert [row[-1] for row in rows(path)] == [123]


# Several workers


@in_loop
async def test_what_other_workers_have_counts() -> None:
    keys = Keys.generate()
    table = UserTable(2, 1)
    other = table.row(2, 0)
    replay: Any = SavedReplaySet(None, clock=float)
    shared = WorkerContext(
        1, [open_listening(HOST, 0)], replay, SharedCount(SharedCounts(2), 1), SharedCount(SharedCounts(2), 1), table
    )
    inbound = Inbound(limited(keys, max_tunnels=2, max_streams=2), shared=shared)
    (address,) = await inbound.start()
    port = port_of(address)
    other.publish(UserField.TUNNELS, 2)
    refused = await raw_client(port, keys)
    assert refused.session.close_received
    assert other.elsewhere(UserField.TUNNELS) == [0]
    other.publish(UserField.TUNNELS, 1)
    remote = await raw_client(port, keys)
    assert other.elsewhere(UserField.TUNNELS) == [1]
    other.publish(UserField.STREAMS, 1)
    with Origin() as origin:
        stream, seen = await remote.ask(origin.address)
        assert seen.kind is EventKind.OPENED
        assert (await remote.ask(origin.address))[1].number == Code.LIMIT
        assert other.elsewhere(UserField.STREAMS) == [1]
        remote.session.reset(stream, Code.CANCELLED)
        await remote.flush()
        await until(lambda: other.elsewhere(UserField.STREAMS) == [0])
    remote.leave()
    refused.leave()
    await until(lambda: other.elsewhere(UserField.TUNNELS) == [0])
    inbound.abort()


def test_a_month_that_is_used_up_is_told_by_one_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @in_loop
    async def run() -> None:
        usage = MonthlyUsage(tmp_path / "usage.sqlite", {"id": "alice"})
        table = UserTable(2, 1)
        users = [
            UserLimits(asyncio.get_running_loop(), "alice", "id", table.row(number, 0), monthly_bytes=5, usage=usage)
            for number in (1, 2)
        ]
        assert not users[0]._is_month_used()
        usage.count("id", 5)
        for _ in range(2):
            assert all(user._is_month_used() for user in users)
        await usage.close()

    run()
    assert len(notes(caplog)) == 1
