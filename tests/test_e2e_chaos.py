"""Transfers through bad luck: whole or cut and told so, never wrong, never falsely ended, never stuck."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import ChaosRelay, Plan, chaotic
from tests.processes import (
    HELLO,
    Keys,
    Origin,
    Process,
    eventually,
    hello_through,
    open_descriptors,
    receive_exactly,
    socks_connect,
    start_inbound,
    start_outbound,
)
from tests.transfers import HEAD, TransferTarget, run_transfers

SEED = 20
AT_ONCE = 24
ENDINGS = ("fin", "rst", "half")
QUICK = {"limits": {"handshake_timeout_s": 3}, "pool": {"max_streams": 4, "max_tunnels": 16, "idle_timeout_s": 0.5}}


def statistics(process: Process) -> dict[str, Any]:
    """What a daemon tells of itself on SIGUSR1."""
    since = len(process.lines)
    process.send_signal(signal.SIGUSR1)
    found: dict[str, Any] = json.loads(process.wait_for_line(r"statistics: (\{.*\})", since=since).group(1))
    return found


def borrowed(process: Process) -> int:
    """Buffers that are out of its pools."""
    return sum(int(pool["in_use"]) for pool in statistics(process)["pools"].values())


def assert_is_whole(process: Process, descriptors: int) -> None:
    """Everything that was opened or borrowed is back."""
    assert eventually(lambda: borrowed(process) == 0, within_s=45), statistics(process)
    assert eventually(lambda: open_descriptors(process.pid) <= descriptors, within_s=10), statistics(process)


def go_through(tmp_path: Path, count: int, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    keys = Keys.generate()
    with (
        TransferTarget() as target,
        Origin() as origin,
        start_inbound(tmp_path, keys) as inbound,
        ChaosRelay(inbound.wait_ready()[0][1], seed=seed, plan=chaotic) as relay,
        start_outbound(tmp_path, keys, relay.port, QUICK) as outbound,
    ):
        socks_port = outbound.wait_ready()[0][1]
        descriptors = {half: open_descriptors(half.pid) for half in (inbound, outbound)}
        tally = run_transfers(socks_port, target, count, at_once=AT_ONCE, seed=seed)
        with capsys.disabled():
            print(f"\nchaos, seed {seed}: {tally}; on the way: {dict(relay.happened)}")
        assert not tally.faults, tally.notes
        assert tally.outcomes["whole"] > count / 3
        assert tally.outcomes["cut"] >= count / 100  # it was bad luck indeed
        assert sum(relay.happened[ending] for ending in ENDINGS) >= count / 100
        relay.calm_down()
        assert eventually(lambda: works(socks_port, origin), within_s=15)
        for half, count_before in descriptors.items():
            assert_is_whole(half, count_before)


def works(socks_port: int, origin: Origin) -> bool:
    try:
        return hello_through(socks_port, origin) == HELLO
    except OSError:
        return False


def test_a_hundred_transfers_through_chaos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go_through(tmp_path, 100, SEED, capsys)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_transfers_through_chaos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go_through(tmp_path, 10_000, SEED + 1, capsys)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_download_that_is_cut_on_the_way_ends_by_rst(tmp_path: Path, ending: str) -> None:
    keys = Keys.generate()
    size = 4_000_000
    with (
        TransferTarget() as target,
        start_inbound(tmp_path, keys) as inbound,
        ChaosRelay(inbound.wait_ready()[0][1], plan=lambda _: Plan(ending=ending, end_at=size // 2)) as relay,
        start_outbound(tmp_path, keys, relay.port) as outbound,
        socks_connect(outbound.wait_ready()[0][1], "127.0.0.1", target.port) as sock,
    ):
        sock.sendall(HEAD.pack(b"d", 0, size))
        receive_exactly(sock, size // 4)
        with pytest.raises(ConnectionResetError):
            receive_exactly(sock, size)
        assert relay.happened[ending] == 1


def test_one_byte_at_a_time_is_a_way_too(tmp_path: Path) -> None:
    keys = Keys.generate()
    with (
        Origin() as origin,
        start_inbound(tmp_path, keys) as inbound,
        ChaosRelay(inbound.wait_ready()[0][1], plan=lambda _: Plan(dribble_bytes=1 << 30)) as relay,
        start_outbound(tmp_path, keys, relay.port) as outbound,
    ):
        assert hello_through(outbound.wait_ready()[0][1], origin) == HELLO


def test_the_same_seed_makes_the_same_plans() -> None:
    def plans(seed: int) -> list[Plan]:
        return [chaotic(random.Random(f"{seed}/{number}")) for number in range(50)]

    assert plans(1) == plans(1)
    assert plans(1) != plans(2)
