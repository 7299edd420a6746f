"""reflex.net.target: the server's relay dials first, keeps what comes meanwhile, and answers how it went."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, NamedTuple

import pytest

from reflex.net import dial as dial_module
from reflex.net import options as options_module
from reflex.net import target as target_module
from reflex.net.options import PLAIN_CONTROL
from reflex.net.relay import BULK_BYTES, Relay
from reflex.net.target import DIALS_PER_TURN, Dialling, DialQueue, TargetRelay
from reflex.net.targets import TargetPolicy
from reflex.protocol.address import Address
from reflex.protocol.credit import hold
from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.streams import Stream
from reflex.protocol.wire import STREAM_WINDOW, Code, FrameType, Status
from tests.ends import HOST, NO_SUCH_NAME, Origin, refusing_port, silent_port
from tests.loops import DEADLINE_S, in_loop, turns, until
from tests.rig import Rig

pytestmark = pytest.mark.usefixtures("each_loop")


@pytest.fixture(params=["at once", "later"])
def _connecting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback connects at once, other targets later: both are gone through."""
    if request.param == "later":
        monkeypatch.setattr(target_module, "is_connected", lambda *_: False)


class AllowRule(NamedTuple):
    host_pattern: str
    network: IPv4Network | IPv6Network | None = None
    port: int | None = None


LOOPBACK = TargetPolicy(
    [AllowRule("127.0.0.0/8", ip_network("127.0.0.0/8")), AllowRule("localhost"), AllowRule("*.invalid")]
)


class Dialled:
    """A stream that the remote has opened, and the relay that dials its target."""

    def __init__(
        self, rig: Rig, ours: Stream, theirs: Stream, address: Address, timeout_s: float, *, delay_s: float = 0.0
    ) -> None:
        self.theirs = theirs
        self.ends: list[Relay] = []
        self.relay = TargetRelay(
            rig.loop,
            rig.tunnel,
            ours,
            address,
            Dialling(policy=LOOPBACK, timeout_s=timeout_s, nodelay=True, keepalive_s=60),
            buffers=rig.pools.buffers,
            counters=rig.counters,
            on_end=self.ends.append,
            delay_s=delay_s,
        )
        self.relay.dial()


async def dialled(rig: Rig, address: Address, *, timeout_s: float = DEADLINE_S, ahead: bytes = b"") -> Dialled:
    """Open a stream, with bytes sent ahead that the relay gets before anything else happens."""
    ours, theirs = await rig.accept()
    made = Dialled(rig, ours, theirs, address, timeout_s)
    if ahead:
        made.relay.on_data(held(rig, ours, ahead))
    return made


def held(rig: Rig, stream: Stream, data: bytes) -> memoryview:
    """As if these bytes had arrived for the stream."""
    hold(rig.session, stream, len(data))
    return memoryview(data)


@pytest.mark.usefixtures("_connecting")
@in_loop
async def test_an_address_is_connected_and_relayed(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await dialled(rig, origin.address)
            await rig.remote.see(EventKind.OPENED, made.theirs.id)
            target = await origin.accept()
            await target.send(b"hello")
            assert await rig.remote.receive(made.theirs, 5) == b"hello"
            sock = made.relay._sock
            assert sock is not None
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@in_loop
async def test_a_name_is_resolved_connected_and_relayed(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await dialled(rig, Address.of("localhost", origin.port), ahead=b"early")
            await rig.remote.see(EventKind.OPENED, made.theirs.id)
            target = await origin.accept()
            assert await target.receive(5) == b"early"


@pytest.mark.usefixtures("_connecting")
@in_loop
async def test_what_comes_while_it_dials_is_kept_and_delivered_with_its_fin(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "is_connected", lambda *_: False)
    async with Rig(pools) as rig:
        with Origin() as origin:
            data = bytes(range(256)) * (STREAM_WINDOW // 256)
            made = await dialled(rig, origin.address, ahead=data)
            assert rig.budget.buffered == len(data)
            rig.remote.session.finish(made.theirs)
            await rig.remote.flush()
            target = await origin.accept()
            assert await target.receive_all() == data
            await target.send(b"answer")
            target.finish()
            await rig.remote.see(EventKind.FIN, made.theirs.id)
            assert rig.remote.side.got[made.theirs.id] == b"answer"
            await until(lambda: made.ends)


@in_loop
async def test_a_fin_alone_that_comes_while_it_dials_is_passed_on(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "is_connected", lambda *_: False)
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await dialled(rig, origin.address)
            made.relay.on_fin()
            target = await origin.accept()
            await target.expect_fin()


@pytest.mark.usefixtures("_connecting")
@in_loop
async def test_a_target_that_refuses_cannot_be_resolved_or_is_not_allowed_is_answered_by_status(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with refusing_port() as port:
            cases = [
                (Address.of(HOST, port), Status.REFUSED),
                (Address.of("localhost", port), Status.REFUSED),
                (Address.of(NO_SUCH_NAME, 1), Status.HOST_UNREACHABLE),
                (Address.of("10.0.0.1", 1), Status.NOT_ALLOWED),
                (Address.of("::1", 1), Status.NOT_ALLOWED),
            ]
            for count, (address, status) in enumerate(cases, 1):
                looks = rig.looks
                made = await dialled(rig, address, ahead=b"x" * 1000)
                assert (await rig.remote.see(EventKind.REFUSED, made.theirs.id)).number == status
                assert made.ends == [made.relay]
                assert rig.looks == looks + 1
                assert rig.counters.streams_refused == count
                assert rig.budget.buffered == 0


@in_loop
async def test_a_target_that_does_not_answer_in_time_is_answered_so(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with silent_port() as port:
            made = await dialled(rig, Address.of(HOST, port), timeout_s=0.02, ahead=b"x")
            assert (await rig.remote.see(EventKind.REFUSED, made.theirs.id)).number == Status.TIMED_OUT
            assert made.ends == [made.relay]
            assert rig.budget.buffered == 0


@pytest.mark.parametrize("host", [HOST, "localhost"])
def test_a_stream_that_is_reset_while_its_target_is_dialled_gives_up(pools: Pools, host: str) -> None:
    @in_loop
    async def gives_up() -> None:
        async with Rig(pools) as rig:
            with silent_port() as port:
                made = await dialled(rig, Address.of(host, port), ahead=b"x" * 5000)
                await turns()
                rig.remote.session.reset(made.theirs, Code.CANCELLED)
                await rig.remote.flush()
                await until(lambda: made.ends)
                assert made.relay._task is None
                assert made.relay._attempt is None
                assert made.relay._timer is None
                assert rig.counters.streams_refused == 0
                assert rig.budget.buffered == 0

    gives_up()


@in_loop
async def test_a_tunnel_that_is_cut_while_a_target_is_dialled_gives_up(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with silent_port() as port:
            made = [await dialled(rig, Address.of(host, port), ahead=b"x") for host in (HOST, "localhost")]
            rig.tunnel.cut("the test says so")
            assert all(each.ends for each in made)
            await turns()


@in_loop
async def test_a_stream_whose_target_is_dialled_for_too_long_is_idle_as_any_other(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with silent_port() as port:
            made = await dialled(rig, Address.of(HOST, port))
            made.relay.on_idle()
            rig.tunnel.flush_soon()
            assert (await rig.remote.see(EventKind.RESET, made.theirs.id)).number == Code.IDLE
            assert made.ends == [made.relay]


@in_loop
async def test_a_name_that_is_connected_just_as_its_stream_ends_leaves_no_socket(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[socket.socket] = []

    async def dial(address: Address, **_: Any) -> socket.socket:
        connected.append(socket.create_connection((HOST, address.port)))
        made.relay._task = None  # as if it could not be cancelled any more
        made.relay.end(reset=True)
        return connected[0]

    monkeypatch.setattr(target_module, "dial", dial)
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await dialled(rig, Address.of("localhost", origin.port))
            await until(lambda: connected and connected[0].fileno() < 0)
            rig.session.reset(made.relay.stream, Code.CANCELLED)
            made.relay._on_timeout()  # comes too late to say anything
            assert rig.counters.streams_refused == 0


@in_loop
async def test_a_target_that_resets_while_early_bytes_are_delivered_resets_the_stream(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "is_connected", lambda *_: False)
    async with Rig(pools) as rig:
        with Origin() as origin:

            def finish_connect(sock: socket.socket) -> None:
                origin._sock.setblocking(True)
                peer = origin._sock.accept()[0]
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                peer.close()

            monkeypatch.setattr(target_module, "finish_connect", finish_connect)
            made = await dialled(rig, origin.address, ahead=b"early")
            assert (await rig.remote.see(EventKind.RESET, made.theirs.id)).number == Code.TARGET_RESET
            assert made.ends == [made.relay]


@in_loop
async def test_early_bytes_that_the_target_does_not_take_at_once_wait_on(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "is_connected", lambda *_: False)
    async with Rig(pools) as rig:
        with Origin(receive_buffer_bytes=4096) as origin:
            real = dial_module.begin_connect

            def begin_connect(*args: Any, **kwargs: Any) -> socket.socket:
                sock = real(*args, **kwargs)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                return sock

            monkeypatch.setattr(target_module, "begin_connect", begin_connect)
            data = bytes(range(256)) * (STREAM_WINDOW // 256)
            made = await dialled(rig, origin.address, ahead=data)
            target = await origin.accept()
            await until(lambda: made.relay._is_writing)
            assert await target.receive(len(data)) == data
            await rig.remote.write(FrameType.DATA, made.theirs.id, b"more")
            assert await target.receive(4) == b"more"


# A user's limits


@in_loop
async def test_a_target_that_has_to_wait_is_dialled_in_its_time_and_what_came_meanwhile_is_delivered(
    pools: Pools,
) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            for address in (origin.address, Address.of("localhost", origin.port)):
                ours, theirs = await rig.accept()
                began_s = rig.loop.time()
                made = Dialled(rig, ours, theirs, address, DEADLINE_S, delay_s=0.05)
                made.relay.on_data(held(rig, ours, b"early"))
                assert origin.is_unvisited
                await rig.remote.see(EventKind.OPENED, theirs.id)
                assert rig.loop.time() - began_s >= 0.045  # the loop's clock counts milliseconds
                target = await origin.accept()
                assert await target.receive(5) == b"early"


@in_loop
async def test_a_target_that_waits_is_given_up_with_its_stream(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            ours, theirs = await rig.accept()
            made = Dialled(rig, ours, theirs, origin.address, DEADLINE_S, delay_s=0.01)
            rig.remote.session.reset(theirs, Code.CANCELLED)
            await rig.remote.flush()
            await until(lambda: not rig.session.streams)
            made.relay.on_reset(Code.CANCELLED)
            await asyncio.sleep(0.05)
            assert origin.is_unvisited
            assert made.ends == [made.relay]


@in_loop
async def test_a_limit_resets_the_stream_and_its_target(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await dialled(rig, origin.address)
            target = await origin.accept()
            made.relay.limit_reached()
            assert (await rig.remote.see(EventKind.RESET, made.theirs.id)).number == Code.LIMIT
            await target.expect_reset()
            made.relay.limit_reached()
            assert made.ends == [made.relay]


class Dialer:
    """What a queue knows of a relay."""

    def __init__(self) -> None:
        self.ended = False
        self.dials = 0

    def dial(self) -> None:
        self.dials += 1


def queue_of(dialers: list[Dialer]) -> DialQueue:
    queue = DialQueue(asyncio.get_running_loop())
    for each in dialers:
        queue.add(each)  # type: ignore[arg-type]  # as far as the queue looks
    return queue


@in_loop
async def test_so_many_targets_are_dialled_at_once_and_the_rest_in_the_turns_that_follow() -> None:
    dialers = [Dialer() for _ in range(2 * DIALS_PER_TURN + 5)]
    queue = queue_of(dialers)
    assert [each.dials for each in dialers] == [1] * DIALS_PER_TURN + [0] * (DIALS_PER_TURN + 5)
    counts = []
    while sum(each.dials for each in dialers) < len(dialers):
        await turns(1)
        counts.append(sum(each.dials for each in dialers))
    assert set(counts) <= {DIALS_PER_TURN, 2 * DIALS_PER_TURN, len(dialers)}
    assert 2 * DIALS_PER_TURN in counts
    await turns()
    last = Dialer()
    queue.add(last)  # type: ignore[arg-type]
    assert last.dials == 1
    assert {each.dials for each in dialers} == {1}


@in_loop
async def test_a_target_whose_stream_was_reset_while_it_waited_is_never_dialled() -> None:
    dialers = [Dialer() for _ in range(3 * DIALS_PER_TURN)]
    queue_of(dialers)
    for each in dialers[DIALS_PER_TURN:-1]:
        each.ended = True
    await until(lambda: dialers[-1].dials)
    assert sum(each.dials for each in dialers) == DIALS_PER_TURN + 1


@in_loop
async def test_a_relay_that_has_ended_does_not_dial(pools: Pools) -> None:
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await dialled(rig, origin.address)
            made.relay.end(reset=True)
            made.relay.dial()
            assert made.relay._attempt is None


@in_loop
async def test_bulk_data_for_a_target_of_this_machine_is_not_paced(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options_module, "_is_paced", lambda: True)
    async with Rig(pools) as rig:
        with Origin() as origin:
            made = await dialled(rig, origin.address)
            target = await origin.accept()
            sock = made.relay._sock
            assert sock is not None

            def control() -> bytes:
                return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")

            before = control()
            for size, expected in ((BULK_BYTES - 1, before), (BULK_BYTES, PLAIN_CONTROL)):
                rig.remote.session.send(made.theirs, bytes(size))
                await rig.remote.flush()
                await target.receive(size)
                assert control() == expected
