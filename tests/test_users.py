"""reflex.users: what there is of each user, and that what is used of a month gets into its file."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import sys
import uuid
from pathlib import Path
from typing import Final

import pytest

from reflex import users as users_module
from reflex.config import HostPort, InboundSettings, UserSettings
from reflex.errors import StartError
from reflex.inbound import Inbound
from reflex.net.listener import open_listening
from reflex.protocol.window import Budget
from reflex.usage import UsageFile
from reflex.users import Users
from reflex.worker import SharedMemory, UserField, WorkerContext
from tests.ends import HOST
from tests.keys import Keys
from tests.loops import in_loop, until
from tests.pair import limited
from tests.test_usage import rows

pytestmark = pytest.mark.usefixtures("each_loop")

OTHER: Final = bytes(16)  # the id of a user without limits


def users_of(
    settings: InboundSettings, *, shared: WorkerContext | None = None, has_tunnels: bool = True
) -> tuple[Users, bytes]:
    """The users, started: the settings' own, and another without limits; and the id of the first."""
    first = settings.users[0]
    other = UserSettings(name="bob", id=uuid.UUID(bytes=OTHER), key=first.key)
    settings = dataclasses.replace(settings, users=(first, other))
    users = Users(asyncio.get_running_loop(), settings, Budget(), shared=shared, has_tunnels=lambda: has_tunnels)
    users.start()
    return users, first.id.bytes


def used_bytes(path: Path) -> list[int]:
    return [row[-1] for row in rows(path)]


@in_loop
async def test_every_user_has_a_name_and_a_share_and_who_has_limits_has_them_counted() -> None:
    users, limited_id = users_of(limited(Keys.generate(), max_tunnels=1))
    assert users.names == {limited_id: "alice", OTHER: "bob"}
    assert set(users.shares) == {limited_id, OTHER}
    assert set(users.limits) == {limited_id}
    assert users.limits[limited_id].take_tunnel()
    assert not users.limits[limited_id].take_tunnel()
    assert users._meter_timer is None  # nobody has a month
    await users.close()
    users.close_now()


@in_loop
async def test_the_limits_of_a_worker_are_counted_in_the_row_of_its_number() -> None:
    memory = SharedMemory(2, 1)
    other = memory.users.row(1, 0)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        users, limited_id = users_of(limited(Keys.generate(), max_tunnels=2), shared=memory.context(2, [], here))
        assert users.limits[limited_id].take_tunnel()
        assert other.elsewhere(UserField.TUNNELS) == [1]
        await users.close()


@pytest.mark.parametrize("at_once", [False, True])
@in_loop
async def test_what_was_used_is_written_while_it_runs_and_at_its_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_once: bool,  # noqa: FBT001 - pytest's
) -> None:
    monkeypatch.setattr(users_module, "METER_INTERVAL_S", 0.001)
    path = tmp_path / "usage.sqlite"
    users, limited_id = users_of(limited(Keys.generate(), monthly_bytes=10**9, usage_file=path))
    counters = users.limits[limited_id].counters
    counters.bytes_into_tunnels += 3
    await until(lambda: used_bytes(path) == [3])
    counters.bytes_out_of_tunnels += 4
    if at_once:
        users.close_now()
    else:
        await users.close()
    assert used_bytes(path) == [7]
    assert users._meter_timer is None


@in_loop
async def test_a_worker_that_counts_nothing_reads_what_the_others_wrote_while_it_has_tunnels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users_module, "METER_INTERVAL_S", 0.001)
    path = tmp_path / "usage.sqlite"
    settings = limited(Keys.generate(), monthly_bytes=10**9, usage_file=path)
    user_id = str(settings.users[0].id)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        shared = SharedMemory(2, 1).context(1, [], here)
        idle, _ = users_of(settings, shared=shared, has_tunnels=False)
        busy, _ = users_of(settings, shared=shared)
        assert idle._usage is not None
        assert busy._usage is not None
        month = busy._usage.month
        file = UsageFile(path, {user_id: "alice"})
        file.add({(user_id, month): 5}, month)
        file.close()
        await until(lambda: busy._usage is not None and busy._usage.used(user_id) == 5)
        assert idle._usage.used(user_id) == 0
        await idle.close()
        await busy.close()


@in_loop
async def test_a_server_that_cannot_keep_what_was_used_does_not_start(tmp_path: Path) -> None:
    keys = Keys.generate()
    with pytest.raises(StartError, match="usage_file: cannot open"):
        await Inbound(limited(keys, monthly_bytes=1, usage_file=tmp_path)).start()
    busy = open_listening(HOST, 0)
    settings = limited(keys, monthly_bytes=1, usage_file=tmp_path / "usage.sqlite")
    settings = dataclasses.replace(settings, listen=(HostPort(HOST, busy.getsockname()[1]),))
    inbound = Inbound(settings)
    with pytest.raises(StartError, match="cannot listen"):
        await inbound.start()
    assert inbound._users._usage is not None
    assert inbound._users._usage._is_closed
    assert inbound._users._meter_timer is None
    busy.close()


@in_loop
async def test_a_python_without_sqlite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reflex.usage", None)
    with pytest.raises(StartError, match="usage_file: this Python has no SQLite"):
        await Inbound(limited(Keys.generate(), monthly_bytes=1, usage_file=tmp_path / "usage.sqlite")).start()
