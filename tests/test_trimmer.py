"""reflex.net.trimmer: buffers that a burst has left go back to the allocator."""

from __future__ import annotations

import asyncio

import pytest

from reflex.net import trimmer as trimmer_module
from reflex.net.trimmer import Trimmer
from reflex.pool import TIER_SPARE, TieredPool
from tests.loops import in_loop, until


@in_loop
async def test_it_trims_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimmer_module, "TRIM_INTERVAL_S", 0.001)
    pool = TieredPool()

    def burst() -> None:
        buffers = [pool.acquire(131_072) for _ in range(2 * TIER_SPARE[131_072])]
        for buffer in buffers:
            pool.release(buffer, 0)

    def free() -> int:
        return pool.tier(131_072).statistics().free

    trimmer = Trimmer(asyncio.get_running_loop(), pool)
    for _ in range(2):
        burst()
        await until(lambda: free() == TIER_SPARE[131_072])
    trimmer.stop()
    burst()
    await asyncio.sleep(0.01)  # a trimmer that went on would have trimmed it twice
    assert free() == 2 * TIER_SPARE[131_072]
