"""reflex.protocol.pools: every pool of a process's sessions as one bundle."""

from __future__ import annotations

import gc

import pytest

from reflex.pool import TIER_SIZES
from reflex.protocol.frames import Frame
from reflex.protocol.pools import FRAMES_KEPT, HELLOS_KEPT, Pools, all_pools
from reflex.protocol.wire import CLIENT_HELLO_SIZE, SERVER_HELLO_SIZE


def test_hello_buffers_have_the_hellos_sizes(pools: Pools) -> None:
    client, server = pools.client_hellos.acquire(), pools.server_hellos.acquire()
    assert (len(client), len(server)) == (CLIENT_HELLO_SIZE, SERVER_HELLO_SIZE) == (76, 40)
    pools.client_hellos.release(client)
    pools.server_hellos.release(server)


def test_a_frame_is_as_good_as_new_after_its_return(pools: Pools) -> None:
    frame = pools.frames.acquire()
    frame.type, frame.stream_id, frame.payload = 1, 2, memoryview(b"a secret")
    pools.frames.release(frame)
    again = pools.frames.acquire()
    assert again is frame
    assert again.copy() == Frame().copy() == (0, 0, b"")
    pools.frames.release(again)


def test_what_is_lent_is_the_sum_of_all_kinds(pools: Pools) -> None:
    assert pools.in_use == 0
    buffer, unpooled = pools.buffers.acquire(1), pools.buffers.acquire(TIER_SIZES[-1] + 1)
    frame = pools.frames.acquire()
    client, server = pools.client_hellos.acquire(), pools.server_hellos.acquire()
    assert pools.in_use == 5
    pools.buffers.release(buffer)
    pools.buffers.release(unpooled)
    pools.frames.release(frame)
    pools.client_hellos.release(client)
    pools.server_hellos.release(server)
    assert pools.in_use == 0


def test_statistics_name_every_pool(pools: Pools) -> None:
    assert list(pools.statistics()) == [*map(str, TIER_SIZES), "frames", "client_hello", "server_hello"]
    frame = pools.frames.acquire()
    assert [name for name, figures in pools.statistics().items() if figures.in_use] == ["frames"]
    pools.frames.release(frame)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_bundle_without_pooling_keeps_nothing(pooled: bool) -> None:  # noqa: FBT001
    pools = Pools(pooled=pooled)
    pools.buffers.release(pools.buffers.acquire(1))
    pools.frames.release(pools.frames.acquire())
    pools.client_hellos.release(pools.client_hellos.acquire())
    pools.server_hellos.release(pools.server_hellos.acquire())
    kept = {name: figures.free for name, figures in pools.statistics().items() if figures.acquired}
    assert kept == dict.fromkeys(["2048", "frames", "client_hello", "server_hello"], int(pooled))
    limits = (pools.frames.max_free, pools.client_hellos.max_free, pools.server_hellos.max_free)
    assert limits == ((FRAMES_KEPT, HELLOS_KEPT, HELLOS_KEPT) if pooled else (0, 0, 0))


def test_every_living_bundle_is_known_and_no_dead_one() -> None:
    kept, dropped = Pools(), Pools()
    known = list(all_pools())
    assert kept in known
    assert dropped in known
    count = len(known)
    del dropped, known
    gc.collect()
    assert kept in all_pools()
    assert len(list(all_pools())) < count
