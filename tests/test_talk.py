"""reflex.net.talk: in how large pieces bulk data is read, alone and while somebody talks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from reflex.net.relay import FIRST_READ_BYTES, MAX_READ_BYTES
from reflex.net.talk import SHARED_READ_BYTES, SHARED_READS, Talk
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.streams import Stream
from tests.loops import in_loop
from tests.rig import Relayed, Rig, relayed

pytestmark = pytest.mark.usefixtures("each_loop")


@contextmanager
def reads_of(*relays: Relayed) -> Iterator[list[int]]:
    """Note how much room those relays ask for from now on."""
    asked: list[int] = []
    streams = [each.relay.stream for each in relays]
    reserve = Session.reserve

    def watched(session: Session, stream: Stream, wanted_bytes: int) -> memoryview | None:
        if stream in streams:
            asked.append(wanted_bytes)
        return reserve(session, stream, wanted_bytes)

    with patch.object(Session, "reserve", watched):
        yield asked


async def read_bulk(rig: Rig, joined: Relayed) -> None:
    """Let the relay read once as if much had come each time before."""
    joined.relay._read_size = MAX_READ_BYTES
    await joined.local.send(b"data")
    await rig.remote.receive(joined.theirs, 4)


@in_loop
async def test_bulk_data_of_several_streams_is_read_in_large_pieces(pools: Pools) -> None:
    async with Rig(pools) as rig:
        one, other = await relayed(rig), await relayed(rig)
        with reads_of(one, other) as asked:
            for _ in range(3):
                await read_bulk(rig, one)
                await read_bulk(rig, other)
        assert rig.tunnel.shared_turns
        assert asked == [MAX_READ_BYTES] * 6
        one.local.close()
        other.local.close()


@in_loop
async def test_for_a_while_after_a_small_piece_it_is_read_in_small_ones(pools: Pools) -> None:
    async with Rig(pools) as rig:
        one, other, talker = [await relayed(rig) for _ in range(3)]
        await talker.local.send(b"x")
        await rig.remote.receive(talker.theirs, 1)
        assert rig.tunnel.talk.shared_reads == SHARED_READS
        rig.tunnel.talk.shared_reads = 3
        with reads_of(one, other) as asked:
            for _ in range(2):
                await read_bulk(rig, one)
                await read_bulk(rig, other)
        assert asked == [SHARED_READ_BYTES] * 3 + [MAX_READ_BYTES]
        for each in (one, other, talker):
            each.local.close()


@in_loop
async def test_who_talks_on_another_tunnel_counts_too(pools: Pools) -> None:
    async with Rig(pools) as rig, Rig(pools) as elsewhere:
        rig.tunnel.talk = elsewhere.tunnel.talk = Talk()
        one, other, talker = await relayed(rig), await relayed(rig), await relayed(elsewhere)
        await talker.local.send(bytes(FIRST_READ_BYTES - 1))
        await elsewhere.remote.receive(talker.theirs, FIRST_READ_BYTES - 1)
        with reads_of(one, other) as asked:
            await read_bulk(rig, one)
            await read_bulk(rig, other)
        assert asked == [SHARED_READ_BYTES] * 2
        for each in (one, other, talker):
            each.local.close()


@in_loop
async def test_one_stream_that_has_its_tunnel_to_itself_is_read_in_large_pieces(pools: Pools) -> None:
    async with Rig(pools) as rig:
        one = await relayed(rig)
        rig.tunnel.talk.shared_reads = SHARED_READS
        rig.tunnel.last_talker = one.relay
        rig.tunnel.shared_turns = 0
        with reads_of(one) as asked:
            await read_bulk(rig, one)
        assert asked == [MAX_READ_BYTES]
        one.local.close()
