"""Peers that shake hands and then misbehave, against real daemons: each is limited or cut, memory stays within what
the limits promise, and another user's requests are answered meanwhile.

Figures are told with ``pytest -rP``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from reflex.net.resolver import THREADS
from reflex.pool import TIER_MAX_FREE
from reflex.protocol.allowance import ABANDONED_COST, BURST_UNITS, SESSION_COST, UNITS_PER_S
from reflex.protocol.session import MAX_UNSENT_BYTES
from reflex.protocol.wire import (
    INCREMENT,
    MAX_BODY_SIZE,
    MAX_PAYLOAD_SIZE,
    MAX_RECORD_SIZE,
    MAX_WINDOW,
    PING_SIZE,
    SESSION_WINDOW,
    SETTING,
    STREAM_WINDOW,
    Code,
    FrameType,
    Network,
    Status,
)
from tests.hostile import (
    TIMEOUT_S,
    HostilePeer,
    HostileServer,
    Observer,
    another_user,
    hostile_client,
    open_frame,
    reset_frame,
)
from tests.processes import (
    Keys,
    LoopbackServer,
    Origin,
    Pair,
    Process,
    anonymous_bytes,
    eventually,
    make_pair,
    never_reading,
    open_descriptors,
    refusing_port,
    socks_connect,
    start_inbound,
    start_outbound,
)
from tests.sessions import frame, goaway, increment

MIB: Final = 1024 * 1024
STREAMS: Final = 200  # that a client of this server may have open
# How long any request of the other user may take while somebody floods the server. It takes 1 ms in peace, 0.2 s
# in the worst of the floods on a free machine, 0.7 s on a busy one with coverage; the rest is for slower ones.
WORST_WAIT_S: Final = 5.0
# What one hostile tunnel may cost at the most: pooled buffers that are kept for the next burst, the answers that it
# does not read, in plaintext and sealed, what the first windows let in, a record on its way in and opened; and as much
# as all its streams may take of the interpreter's own memory, some 5 KiB for each with its socket and its relay.
KEPT_BY_POOLS: Final = sum(size * count for size, count in TIER_MAX_FREE.items())
ALLOWED_BYTES: Final = KEPT_BY_POOLS + 2 * MAX_UNSENT_BYTES + SESSION_WINDOW + 2 * MAX_RECORD_SIZE + STREAMS * 5 * 1024
LOG_LINES: Final = 10  # that an attack may cost
MALLORIES: Final = 8
BULK_BYTES: Final = 100_000
UNITS_PER_CALL: Final = 4_000  # of a flood; see reflex.protocol.allowance
FILLING_S: Final = 5.0  # longer than it takes to fill the sockets between the two
SLACK: Final = 1.2  # that a session lives on at this multiple of what it is allowed is an error on any machine

# What misbehaves; False where the machine was too slow for it to be misbehaviour.
Attack = Callable[[HostilePeer], bool | None]

# Names below this take a minute: the daemon's own resolver is put out of the way before it starts.
SLOW_NAMES: Final = """
import socket, time
system = socket.getaddrinfo
def getaddrinfo(host, *rest, **named):
    if str(host).endswith(".slow.test"):
        time.sleep(60)
    return system(host, *rest, **named)
socket.getaddrinfo = getaddrinfo
"""


class Sink(LoopbackServer):
    """Reads everything and answers nothing."""

    def serve(self, sock: socket.socket) -> None:
        while sock.recv(65_536):
            pass


class Spring(LoopbackServer):
    """Sends without end."""

    def serve(self, sock: socket.socket) -> None:
        while True:
            sock.sendall(bytes(65_536))


@dataclass
class Scene:
    """A pair with an honest user, others for the tests, and targets.

    They take turns: of one user's protocol errors the server logs only so many in a row.
    """

    pair: Pair
    mallories: Iterator[Keys]
    origin: Origin
    sink: Sink
    spring: Spring

    @property
    def server(self) -> Process:
        return self.pair.inbound

    def attacker(self, *, receive_buffer_bytes: int = 0) -> HostilePeer:
        return hostile_client(next(self.mallories), self.pair.inbound_port, receive_buffer_bytes=receive_buffer_bytes)

    @contextlib.contextmanager
    def watched(self, *, allowed_bytes: int = ALLOWED_BYTES, log_lines: int = LOG_LINES) -> Iterator[Observer]:
        """Another user asks all the time; at the end it was answered, and the server is as large as it may be."""
        pid, before, lines = self.server.pid, anonymous_bytes(self.server.pid), len(self.server.lines)
        over, peak = threading.Event(), [before]

        def sample() -> None:
            while not over.wait(0.02):
                peak.append(anonymous_bytes(pid))

        sampler = threading.Thread(target=sample, daemon=True)
        with Observer(self.pair.socks_port, self.origin) as observer:
            observer.wait_for_requests(3)
            calm = len(observer.waits_s)
            sampler.start()
            try:
                yield observer
                observer.wait_for_requests(5)
            finally:
                over.set()
                sampler.join(TIMEOUT_S)
        waits_s = sorted(observer.waits_s[calm:])
        grown = max(peak) - before
        print(
            f"{len(waits_s)} requests, the slowest {waits_s[-1] * 1000:.0f} ms, half of them below"
            f" {waits_s[len(waits_s) // 2] * 1000:.1f} ms; the server grew by {grown / MIB:.1f} MiB"
        )
        assert waits_s[-1] < WORST_WAIT_S
        assert grown < allowed_bytes
        assert len(self.server.lines) - lines <= log_lines

    def expect_cut(self, attack: Attack, reason: str) -> None:
        """The server ends the attacker's session with this reason, unless the attack says that it did not come off."""
        since = len(self.server.lines)
        with self.attacker() as peer:
            if attack(peer) is False:
                return
            self.server.wait_for_line(rf"mallory-\d at .*protocol error, .*{reason}", timeout_s=TIMEOUT_S, since=since)

    def statistics(self) -> dict[str, Any]:
        since = len(self.server.lines)
        self.server.send_signal(signal.SIGUSR1)
        line = self.server.wait_for_line(r"statistics: (.*)", timeout_s=TIMEOUT_S, since=since)
        return dict(json.loads(line.group(1)))

    def streams(self) -> int:
        return int(self.statistics()["gauges"]["streams"])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with Origin() as origin, Sink() as sink, Spring() as spring:
        keys = Keys.generate()
        mallories = [another_user(keys) for _ in range(MALLORIES)]
        users = [
            {},
            *({"name": f"mallory-{n}", "id": each.user_id, "key": each.user_key} for n, each in enumerate(mallories)),
        ]
        settings = {
            "users": users,
            "limits": {"max_streams": STREAMS},
            "targets": {"allow": ["127.0.0.1:*", "*.localhost:*"]},
        }
        directory = tmp_path_factory.mktemp("hostile")
        with make_pair(directory, keys=keys, inbound=settings) as pair:
            yield Scene(pair, itertools.cycle(mallories), origin, sink, spring)


def drain(peer: HostilePeer) -> None:
    """Read whatever comes, in a thread that ends with the connection."""

    def run() -> None:
        with contextlib.suppress(OSError, ValueError):
            while peer.sock.recv(MIB):
                pass

    threading.Thread(target=run, name="drain", daemon=True).start()


def once(*frames: bytes) -> Attack:
    """Send the frames, and read all answers."""

    def run(peer: HostilePeer) -> None:
        drain(peer)
        peer.send(*frames)

    return run


def flood(*frames: bytes, per_call: int = UNITS_PER_CALL, in_own_records: bool = False) -> Attack:
    """Send the frames until the other side ends it, in as few records as hold them or each in its own."""

    def run(peer: HostilePeer) -> bool:
        drain(peer)
        send = peer.send_each if in_own_records else peer.send
        return until_cut(lambda: send(*frames * per_call), units=UNITS_PER_CALL)

    return run


def until_cut(send: Callable[[], bool], *, units: int | None = None) -> bool:
    """Send again and again, until the other side ends it.

    ``units`` is what a call costs at least, of what is allowed. How soon that is used up depends on how fast this
    machine is; one that has much else to do may take no more than is allowed at any time. Then, and only then, it is
    right that nothing is cut, and this returns False.
    """
    began_s = time.monotonic()
    calls = calls_before = 0
    while send():
        calls += 1
        took_s = time.monotonic() - began_s
        if took_s < FILLING_S:  # what the sockets on the way hold is sent, and not yet taken
            calls_before = calls
        elif took_s > TIMEOUT_S:
            assert units is not None, f"nothing was cut in {TIMEOUT_S} s"
            taken = (calls - calls_before) * units / (took_s - FILLING_S)
            assert taken < SLACK * UNITS_PER_S, f"nothing was cut in {TIMEOUT_S} s, at {taken:,.0f} units a second"
            print(f"no flood: this machine takes {taken:,.0f} units a second now")
            return False
    return True


def late(*frames: bytes) -> Attack:
    """A flood for a stream 1 that was opened and has ended."""

    def run(peer: HostilePeer) -> bool | None:
        peer.send(open_frame(1, "127.0.0.1", 9), reset_frame(1))
        return flood(*frames)(peer)

    return run


FLOODS: Final = {
    "pings": flood(frame(FrameType.PING, 0, bytes(PING_SIZE))),
    "pongs": flood(frame(FrameType.PONG, 0, bytes(PING_SIZE))),
    "empty pads": flood(frame(FrameType.PAD)),
    "frames of unknown types": flood(frame(0x90, 77)),
    "the smallest records": flood(frame(0x90), in_own_records=True),
    "settings": flood(
        frame(FrameType.SETTINGS, 0, SETTING.pack(77, 1) * 1_000), per_call=UNITS_PER_CALL // SESSION_COST
    ),
    "goaways": flood(frame(FrameType.GOAWAY, 0, goaway(0, Code.NONE)), per_call=UNITS_PER_CALL // SESSION_COST),
    "windows by one byte": flood(frame(FrameType.WINDOW, 0, increment(1))),
    "late data": late(frame(FrameType.DATA, 1, b"x")),
    "late windows": late(frame(FrameType.WINDOW, 1, increment(65_536))),
    "late resets": late(reset_frame(1)),
    "late datagrams": late(frame(FrameType.DATAGRAM, 1, b"\x01\x7f\x00\x00\x01\x00\x35query")),
}


@pytest.mark.parametrize("name", FLOODS)
def test_frames_of_no_use_without_end_are_cut(name: str, scene: Scene) -> None:
    with scene.watched():
        scene.expect_cut(FLOODS[name], "without use")


@pytest.mark.parametrize(
    ("target", "overrun"),
    [
        ("a stream's window", [frame(FrameType.DATA, 1, bytes(STREAM_WINDOW // 4))] * 5),
        (
            "the session's window",
            [frame(FrameType.DATA, each, bytes(STREAM_WINDOW // 4)) for each in (1, 3, 5, 7, 9) for _ in range(4)],
        ),
    ],
)
def test_who_overruns_a_window_is_cut(target: str, overrun: list[bytes], scene: Scene) -> None:
    """The target does not read: what the kernel takes of its bytes is credit again, so it is filled up first."""
    del target

    def attack(peer: HostilePeer) -> None:
        with never_reading() as port:
            peer.send(*(open_frame(each, "127.0.0.1", port) for each in (1, 3, 5, 7, 9)))
            drain(peer)
            until_cut(lambda: peer.send(*overrun))

    with scene.watched():
        scene.expect_cut(attack, "bytes arrived for a window")


def opens_and_resets(count: int, host: str, port: int) -> Attack:
    """Open so many streams, or as many as can be before the other side ends it, and reset each at once."""

    def run(peer: HostilePeer) -> None:
        drain(peer)
        for first in range(0, count, 1_000):
            frames = []
            for each in range(first, first + 1_000):
                frames += [open_frame(2 * each + 1, host, port), reset_frame(2 * each + 1)]
            if not peer.send(*frames):
                return

    return run


def test_who_opens_and_resets_20_000_streams_is_cut_and_few_of_them_were_dialled(scene: Scene) -> None:
    descriptors = open_descriptors(scene.server.pid)
    visits = scene.sink.connections
    with scene.watched():
        scene.expect_cut(opens_and_resets(20_000, "127.0.0.1", scene.sink.port), "without use")
    dialled = scene.sink.connections - visits
    print(f"{dialled} were dialled")
    assert dialled < BURST_UNITS / ABANDONED_COST
    # The connection of the attacker may be there for a while yet.
    assert eventually(lambda: open_descriptors(scene.server.pid) <= descriptors + 2)


def test_who_opens_and_resets_streams_to_names_takes_no_threads_and_no_look_ups_from_others(
    tmp_path: Path, scene: Scene
) -> None:
    """Its names take a minute each; another user's, meanwhile, does not."""
    keys = Keys.generate()
    mallory = another_user(keys)
    users = [{}, {"name": "mallory", "id": mallory.user_id, "key": mallory.user_key}]
    overrides = {"users": users, "targets": {"allow": ["127.0.0.1:*", "localhost:*", "*.slow.test:*"]}}
    with contextlib.ExitStack() as stack:
        inbound = stack.enter_context(start_inbound(tmp_path, keys, overrides, prelude=SLOW_NAMES))
        port = inbound.wait_ready()[0][1]
        outbound = stack.enter_context(start_outbound(tmp_path, keys, port))
        socks_port = outbound.wait_ready()[0][1]
        threads = thread_count(inbound.pid)
        peer = stack.enter_context(hostile_client(mallory, port))
        opens_and_resets(1_000, "a.slow.test", 80)(peer)  # as many as are not cut
        # These stay: they wait for the places that those which were reset still keep.
        peer.send(*(open_frame(each, "b.slow.test", 80) for each in range(100_001, 100_101, 2)))
        started_s = time.monotonic()
        socks_connect(socks_port, "localhost", scene.origin.port, timeout_s=TIMEOUT_S).close()
        print(f"the other's name took {(time.monotonic() - started_s) * 1000:.0f} ms")
        grown = thread_count(inbound.pid) - threads
        assert THREADS // 2 <= grown <= THREADS // 2 + 2, "one user has half of the threads at the most"


def thread_count(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_streams_beyond_the_limit_are_refused_and_who_goes_on_is_cut(scene: Scene) -> None:
    with scene.watched(), never_reading() as port:
        visits = open_descriptors(scene.server.pid)

        def attack(peer: HostilePeer) -> bool:
            peer.send(*(open_frame(2 * each + 1, "127.0.0.1", port) for each in range(STREAMS + 50)))
            refused = peer.receive_until(FrameType.RESET, 2 * STREAMS + 1)
            assert refused[2] == Code.LIMIT.to_bytes(4)
            assert open_descriptors(scene.server.pid) <= visits + STREAMS + 2
            drain(peer)
            ids = itertools.count(2_001, 2)
            return until_cut(
                lambda: peer.send(*(open_frame(next(ids), "127.0.0.1", port) for _ in range(1_000))), units=1_000
            )

        scene.expect_cut(attack, "without use")
    assert eventually(lambda: open_descriptors(scene.server.pid) <= visits + 2)


def test_20_000_targets_that_refuse_hold_nobody_up_and_cost_no_more(scene: Scene) -> None:
    """Such a stream ends at once, so that the limit of streams does not bound them."""
    with scene.watched(), refusing_port() as port, scene.attacker() as peer:
        drain(peer)
        for first in range(0, 20_000, 1_000):
            if not peer.send(*(open_frame(2 * each + 1, "127.0.0.1", port) for each in range(first, first + 1_000))):
                break


def test_the_largest_pads_are_read_and_forgotten(scene: Scene) -> None:
    pad = frame(FrameType.PAD, 0, bytes(MAX_PAYLOAD_SIZE))
    assert len(pad) == MAX_BODY_SIZE
    with scene.watched(), scene.attacker() as peer:
        for _ in range(2_000):
            assert peer.send(pad)
        peer.send(frame(FrameType.PING, 0, bytes(PING_SIZE)))
        assert peer.receive_until(FrameType.PONG)


def test_data_a_byte_a_frame_slows_nobody_down_for_long(scene: Scene) -> None:
    with scene.watched() as observer, scene.attacker() as peer:
        for stream_id in range(1, 17, 2):
            peer.open(scene.sink.port, stream_id)
        drain(peer)
        asked = len(observer.waits_s)
        for turn in range(30):
            assert peer.send(*[frame(FrameType.DATA, 2 * (turn % 8) + 1, b"x")] * 10_000)
        print(f"{len(observer.waits_s) - asked} requests meanwhile")
    assert eventually(lambda: scene.streams() == 0)


def test_who_never_reads_holds_its_targets_up_and_costs_no_more(scene: Scene) -> None:
    streams = [*range(1, 101, 2)]
    with scene.watched(), scene.attacker(receive_buffer_bytes=4_096) as peer:
        peer.send(frame(FrameType.WINDOW, 0, increment(MAX_WINDOW - SESSION_WINDOW)))
        peer.send(*(open_frame(each, "127.0.0.1", scene.spring.port) for each in streams))
        peer.send(*(frame(FrameType.WINDOW, each, increment(MAX_WINDOW - STREAM_WINDOW)) for each in streams))
        assert eventually(lambda: scene.streams() > len(streams))
        for _ in range(50):  # answers, each in a turn of its own
            peer.send(*[frame(FrameType.PING, 0, bytes(PING_SIZE))] * 100)
            time.sleep(0.005)
        figures = scene.statistics()
        held = sum(int(size) * pool["in_use"] for size, pool in figures["pools"].items() if size.isdecimal())
        print(f"{held / MIB:.2f} MiB of buffers are lent")
        assert held <= 2 * MAX_UNSENT_BYTES


def test_who_reads_very_slowly_costs_no_more(scene: Scene) -> None:
    with scene.watched(), scene.attacker(receive_buffer_bytes=4_096) as peer:
        peer.send(
            frame(FrameType.WINDOW, 0, increment(MAX_WINDOW - SESSION_WINDOW)),
            open_frame(1, "127.0.0.1", scene.spring.port),
            frame(FrameType.WINDOW, 1, increment(MAX_WINDOW - STREAM_WINDOW)),
        )
        for _ in range(50):
            assert peer.sock.recv(100)
            time.sleep(0.005)
        assert scene.streams() == 2


def test_half_a_record_is_kept_and_no_more(scene: Scene) -> None:
    count = 40
    with scene.watched(log_lines=count + LOG_LINES), contextlib.ExitStack() as stack:
        for _ in range(count):
            peer = stack.enter_context(scene.attacker())
            record = peer.seal(frame(FrameType.PAD, 0, bytes(MAX_PAYLOAD_SIZE)))
            assert peer.send_raw(record[: len(record) // 2])

        def held() -> int:
            return int(scene.statistics()["pools"]["131072"]["in_use"])

        assert eventually(lambda: held() == count)
    assert eventually(lambda: held() == 0)


def test_what_a_target_does_not_take_is_kept_within_the_windows(scene: Scene) -> None:
    count = 100
    windows = count * STREAM_WINDOW
    with scene.watched(allowed_bytes=ALLOWED_BYTES + windows), never_reading() as port, scene.attacker() as peer:
        ids = range(1, 2 * count + 1, 2)
        peer.send(*(open_frame(each, "127.0.0.1", port) for each in ids))
        piece = bytes(STREAM_WINDOW // 4)
        credit = SESSION_WINDOW
        for _ in range(4):
            for each in ids:
                while credit < len(piece):
                    credit += sum(
                        INCREMENT.unpack(payload)[0]
                        for frame_type, stream_id, payload in peer.receive()
                        if frame_type == FrameType.WINDOW and stream_id == 0
                    )
                assert peer.send(frame(FrameType.DATA, each, piece))
                credit -= len(piece)
    assert eventually(lambda: scene.statistics()["gauges"]["buffered_bytes"] == 0)


def test_udp_streams_are_refused_and_their_datagrams_are_late(scene: Scene) -> None:
    query = frame(FrameType.DATAGRAM, 1, b"\x01\x7f\x00\x00\x01\x00\x35query")

    def attack(peer: HostilePeer) -> bool | None:
        peer.send(frame(FrameType.OPEN, 1, bytes([Network.UDP])))
        assert peer.receive_until(FrameType.OPENED, 1)[2] == bytes([Status.NOT_SUPPORTED])
        return flood(query)(peer)

    with scene.watched():
        scene.expect_cut(attack, "without use")


def test_an_honest_users_bulk_and_churn_are_never_charged_enough_to_be_cut(scene: Scene) -> None:
    """Through the pair of the module, which has served everything else by now."""
    errors = scene.statistics()["counters"]["protocol_errors"]
    with ThreadPoolExecutor(4) as threads:
        sizes = list(threads.map(lambda _: asked_size(scene, BULK_BYTES), range(400)))
    assert sizes == [BULK_BYTES] * 400
    assert scene.statistics()["counters"]["protocol_errors"] == errors
    assert "protocol error" not in "".join(scene.pair.outbound.lines)


def asked_size(scene: Scene, size: int) -> int:
    """How much of so many bytes comes, on a connection of its own."""
    with (
        socks_connect(scene.pair.socks_port, "127.0.0.1", scene.origin.port, timeout_s=TIMEOUT_S) as sock,
        sock.makefile("rb") as reader,
    ):
        sock.sendall(b"GET /bytes/%d HTTP/1.1\r\nConnection: close\r\n\r\n" % size)
        return len(reader.read().partition(b"\r\n\r\n")[2])


# A server that misbehaves towards its client.

SERVER_FLOODS: Final = {
    "pings": (FLOODS["pings"], "without use"),
    # For streams behind the last one: to a client without streams a GOAWAY is a reason to close.
    "goaways": (
        flood(frame(FrameType.GOAWAY, 0, goaway(99, Code.NONE)), per_call=UNITS_PER_CALL // SESSION_COST),
        "without use",
    ),
    "settings": (FLOODS["settings"], "without use"),
    "windows by one byte": (FLOODS["windows by one byte"], "without use"),
    "the smallest records": (FLOODS["the smallest records"], "without use"),
    "an answer that nobody asked for": (once(frame(FrameType.OPENED, 99, b"\0")), "was never opened"),
    "a stream of its own": (once(open_frame(2, "127.0.0.1", 1)), "OPEN of stream 2"),
    "data before its answer": (once(frame(FrameType.DATA, 1, b"x")), "DATA on"),
    "datagrams on a stream of bytes": (
        once(frame(FrameType.DATAGRAM, 1, b"\x01\x7f\x00\x00\x01\x00\x35query")),
        "DATAGRAM on",
    ),
}


@pytest.fixture(scope="module")
def hostile_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HostileServer, Process, int]]:
    keys = Keys.generate()
    with (
        HostileServer(keys) as server,
        start_outbound(tmp_path_factory.mktemp("client"), keys, server.port) as client,
    ):
        yield server, client, client.wait_ready()[0][1]


@pytest.mark.parametrize("name", SERVER_FLOODS)
def test_a_client_cuts_a_hostile_server_and_tries_again(
    name: str, hostile_server: tuple[HostileServer, Process, int]
) -> None:
    server, client, socks_port = hostile_server
    attack, reason = SERVER_FLOODS[name]
    before, since = anonymous_bytes(client.pid), len(client.lines)
    outcome: list[object] = []

    def ask() -> None:
        try:
            socks_connect(socks_port, "127.0.0.1", 80, timeout_s=TIMEOUT_S).close()
            outcome.append("connected")
        except OSError as error:
            outcome.append(error)

    app = threading.Thread(target=ask)
    app.start()
    peer = server.next_tunnel()
    peer.receive_until(FrameType.OPEN, 1)
    if attack(peer) is False:
        peer.close()  # the request is tried on another tunnel all the same
    else:
        client.wait_for_line(rf"protocol error, .*{reason}", timeout_s=TIMEOUT_S, since=since)
    again = server.next_tunnel()
    again.receive_until(FrameType.OPEN, 1)
    again.send(frame(FrameType.OPENED, 1, bytes([Status.SUCCEEDED])))
    app.join(TIMEOUT_S)
    assert outcome == ["connected"]
    assert anonymous_bytes(client.pid) - before < ALLOWED_BYTES
    assert len(client.lines) - since <= LOG_LINES
    # It is not asked for the next one.
    again.send(frame(FrameType.CLOSE, 0, bytes(4)))
    again.wait_for_end()


def test_a_server_that_overruns_the_window_of_an_application_that_does_not_read_is_cut(
    hostile_server: tuple[HostileServer, Process, int],
) -> None:
    server, client, socks_port = hostile_server
    since = len(client.lines)
    with socket.create_connection(("127.0.0.1", socks_port), TIMEOUT_S) as app:
        app.sendall(b"\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50")
        peer = server.next_tunnel()
        peer.receive_until(FrameType.OPEN, 1)
        peer.send(frame(FrameType.OPENED, 1, bytes([Status.SUCCEEDED])))
        drain(peer)
        until_cut(lambda: peer.send(frame(FrameType.DATA, 1, bytes(STREAM_WINDOW // 4))))
        client.wait_for_line("protocol error, .*bytes arrived for a window", timeout_s=TIMEOUT_S, since=since)
