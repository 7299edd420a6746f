"""Two sessions against each other: whatever their applications do, and however the bytes are cut, they agree.

``REFLEX_MACHINE_EXAMPLES=2000`` runs as many examples, each of up to 200 steps.
"""

from __future__ import annotations

import os
from typing import Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from reflex.protocol.events import EventKind
from reflex.protocol.pools import Pools
from reflex.protocol.streams import CALLED, CALLED_REMOTE_DONE, MAY_RECEIVE, SEND_FIN, Stream
from reflex.protocol.window import Budget
from reflex.protocol.wire import MAX_PAYLOAD_SIZE, SESSION_WINDOW, STREAM_WINDOW, Code, Status
from tests.sessions import Pair, Side

EXAMPLES: Final = int(os.environ.get("REFLEX_MACHINE_EXAMPLES", "0"))
NORMAL_EXAMPLES: Final = 100
NORMAL_STEPS: Final = 60
LONG_STEPS: Final = 200

# An application that follows the contract does not read on while this much waits to be sent.
UNSENT_LIMIT: Final = 300_000

PATTERN: Final = bytes(range(251)) * 2_000  # a prime period: what is lost or moved is seen
worth_reaching: Final = {
    "OPEN",
    "OPENED",
    "REFUSED",
    "FIN",
    "RESET",
    "WRITABLE",
    "GOAWAY",
    "a window used up",
    "credit withheld",
    "growth",
    "a clean end",
}
reached: Final[set[str]] = set()  # by all examples together
ENDS: Final = (EventKind.RESET, EventKind.REFUSED)

sides = st.sampled_from(["client", "server"])
which = st.integers(0, 30)
sizes = st.sampled_from([0, 1, 1000, 40_000, STREAM_WINDOW]) | st.integers(0, 2 * STREAM_WINDOW)
codes = st.sampled_from(Code)
# What ends streams happens seldom, or none would get old. (False is what hypothesis likes best.)
seldom = st.integers(0, 5).map(lambda number: number == 5)
rarely = st.integers(0, 11).map(lambda number: number == 7)


class TwoSessions(RuleBasedStateMachine):
    """The rules are what applications and the network do; ``settle`` is what must hold when all was delivered."""

    @initialize(
        max_streams=st.integers(1, 8),
        accepted=st.sampled_from([2, 0, 1, 3]),
        growth_limit=st.sampled_from([0, STREAM_WINDOW, 1 << 28]),
        buffered_limit=st.sampled_from([0, 100_000, 1 << 28]),
    )
    def connect(self, max_streams: int, accepted: int, growth_limit: int, buffered_limit: int) -> None:
        self.pools = Pools()
        self.pair = Pair(
            self.pools,
            max_streams=max_streams,
            client_budget=Budget(growth_limit=growth_limit, buffered_limit=buffered_limit),
            server_budget=Budget(growth_limit=growth_limit, buffered_limit=buffered_limit),
        )
        self.now_s = self.pair.client.session.now_s
        self.sides = {"client": self.pair.client, "server": self.pair.server}
        for side in self.sides.values():
            side.reads = False
        self.wires = {"client": b"", "server": b""}  # what each side has written and nobody has received
        self.sent: dict[tuple[str, int], bytearray] = {}
        self.blocked: dict[tuple[str, int], int] = {}  # how many events were seen when a window was used up
        self.cut_off: set[int] = set()  # streams that were reset or refused: their bytes may be lost
        for _ in range(accepted):
            self.open_and_answer()

    def pick(self, side: str, which: int, *, sending: bool = False) -> Stream | None:
        """One of the live streams; with ``sending``, of those that may send."""
        live = [stream for stream in self.sides[side].session.streams.values() if stream.may_send or not sending]
        return live[which % len(live)] if live else None

    def flush_if_much_waits(self, side: str) -> None:
        if self.sides[side].session.unsent_bytes > UNSENT_LIMIT:
            self.flush(side)

    # What applications do.

    @precondition(lambda self: self.pair.client.session.has_room)
    @rule()
    def open(self) -> None:
        self.pair.client.open()

    @rule(refused=seldom)
    def open_and_answer(self, *, refused: bool = False) -> None:
        """What happens most often, in one step: else few streams would ever be open."""
        self.deliver_all()
        if not self.pair.client.session.has_room:
            return
        stream = self.pair.client.open()
        self.deliver_all()
        far = self.pair.server.session.streams.get(stream.id)
        if far is None:
            return
        if refused:
            self.cut_off.add(far.id)
            self.pair.server.session.refuse(far, Status.REFUSED)
        else:
            self.pair.server.session.accept(far)
        self.deliver_all()

    @rule(which=which, status=st.sampled_from([Status.SUCCEEDED] * 3 + [Status.REFUSED]))
    def answer(self, which: int, status: Status) -> None:
        session = self.pair.server.session
        called = [each for each in session.streams.values() if each.state in (CALLED, CALLED_REMOTE_DONE)]
        if not called:
            return
        stream = called[which % len(called)]
        if status is Status.SUCCEEDED:
            session.accept(stream)
        else:
            self.cut_off.add(stream.id)
            session.refuse(stream, status)

    @rule(side=sides, which=which, size=sizes)
    def send(self, side: str, which: int, size: int) -> None:
        stream = self.pick(side, which, sending=True)
        if stream is None:
            return
        sent = self.sent.setdefault((side, stream.id), bytearray())
        start = len(sent) % 251
        data = memoryview(PATTERN)[start : start + size]
        done = 0
        while done < len(data):
            step = self.sides[side].session.send(stream, data[done : done + UNSENT_LIMIT])
            if not step:
                self.blocked[side, stream.id] = len(self.sides[side].seen)
                break
            done += step
            self.flush_if_much_waits(side)
        sent += data[:done]

    @rule(side=sides, which=which, turns=st.integers(1, 12), round_trip_s=st.sampled_from([0.0, 0.02]))
    def bulk(self, side: str, which: int, turns: int, round_trip_s: float) -> None:
        """A stream that sends all it may to a reader that takes all it gets, for some turns."""
        for _ in range(turns):
            self.send(side, which, 2 * STREAM_WINDOW)
            self.deliver_all(round_trip_s / 2)
            for other in self.sides.values():
                other.consume()
            self.deliver_all(round_trip_s / 2)

    @rule(side=sides, which=which, size=st.integers(1, MAX_PAYLOAD_SIZE))
    def receive_into_place(self, side: str, which: int, size: int) -> None:
        stream = self.pick(side, which, sending=True)
        if stream is None:
            return
        session = self.sides[side].session
        view = session.reserve(stream, size)
        if view is None:
            self.blocked[side, stream.id] = len(self.sides[side].seen)
            return
        sent = self.sent.setdefault((side, stream.id), bytearray())
        start = len(sent) % 251
        used = (len(view) + 1) // 2
        view[:used] = PATTERN[start : start + used]
        session.commit(stream, used)
        sent += PATTERN[start : start + used]
        self.flush_if_much_waits(side)

    @rule(side=sides, which=which, share=st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    def consume(self, side: str, which: int, share: float) -> None:
        held = [stream for stream in self.sides[side].streams.values() if stream.held_bytes]
        if held:
            stream = held[which % len(held)]
            self.sides[side].session.consumed(stream, max(1, int(share * stream.held_bytes)))

    @rule(side=sides, which=which)
    def finish(self, side: str, which: int) -> None:
        stream = self.pick(side, which, sending=True)
        if stream is not None and stream.can(SEND_FIN):
            self.sides[side].session.finish(stream)

    @rule(side=sides, which=which, code=codes, happens=seldom)
    def reset(self, side: str, which: int, code: Code, *, happens: bool) -> None:
        stream = self.pick(side, which)
        if stream is not None and happens:
            self.cut_off.add(stream.id)
            self.sides[side].session.reset(stream, code)

    @rule(side=sides)
    def ping(self, side: str) -> None:
        self.sides[side].session.ping()

    @rule(side=sides, happens=rarely)
    def go_away(self, side: str, *, happens: bool) -> None:
        if happens:
            self.sides[side].session.go_away(Code.SHUTTING_DOWN)

    # What the network and the clock do.

    @rule(side=sides)
    def flush(self, side: str) -> None:
        self.wires[side] += self.sides[side].take_output()

    @rule(side=sides, size=st.sampled_from([1, 20, 100, 5000, 10**9]) | st.integers(1, 600_000))
    def deliver(self, side: str, size: int) -> None:
        if not self.wires[side]:
            self.flush(side)
        data, self.wires[side] = self.wires[side][:size], self.wires[side][size:]
        self.receive("server" if side == "client" else "client", data)

    @rule(way_s=st.sampled_from([0.0, 0.02]))
    def deliver_all(self, way_s: float = 0.0) -> None:
        """All that was written reaches the other side; answers to it wait."""
        for side in self.sides:
            self.flush(side)
        self.wait(way_s)
        for side in self.sides:
            self.deliver(side, len(self.wires[side]))

    def receive(self, side: str, data: bytes) -> None:
        self.sides[side].feed(data)
        reached.update(each.kind.name for each in self.sides[side].seen)
        self.cut_off |= {each.stream_id for each in self.sides[side].seen if each.kind in ENDS}

    @rule(step_s=st.sampled_from([0.001, 0.05, 0.5]))
    def wait(self, step_s: float) -> None:
        self.now_s += step_s
        self.pair.set_time(self.now_s)

    # What holds at any time.

    def ways(self) -> tuple[tuple[Side, Side], tuple[Side, Side]]:
        return (self.pair.client, self.pair.server), (self.pair.server, self.pair.client)

    @invariant()
    def credit_is_never_negative_and_never_more_than_the_receiver_gave(self) -> None:
        for sender, receiver in self.ways():
            given = receiver.session._receive_window.available
            assert 0 <= sender.session._send_window.available <= given
            for stream_id, stream in sender.session.streams.items():
                other = receiver.session.streams.get(stream_id)
                if other is not None:
                    assert 0 <= stream.send_window.available <= other.receive_window.available

    @invariant()
    def every_byte_of_credit_is_somewhere(self) -> None:
        for side in self.sides.values():
            window = side.session._receive_window
            assert window.available + window.owed + side.session._withheld == window.size
            for stream in side.session.streams.values():
                window = stream.receive_window
                if MAY_RECEIVE[stream.state]:
                    assert window.available + window.owed + stream.held_bytes == window.size
            assert side.budget.buffered == sum(stream.held_bytes for stream in side.streams.values())
            assert side.budget.growth == sum(stream.grown_bytes for stream in side.session.streams.values())
            assert side.budget.growth <= side.budget.growth_limit
            assert side.session._receive_window.size == SESSION_WINDOW + side.budget.growth
            if side.session._withheld:
                reached.add("credit withheld")
            if side.budget.growth:
                reached.add("growth")

    # The end of every run.

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        try:
            self.settle()
            self.check_settled()
            self.pair.end()
        finally:
            for side in self.sides.values():
                side.session.close_buffers()
                side.got.clear()  # an example moves hundreds of MiB, and is not freed at once
            self.sent.clear()
            self.wires.clear()
        assert self.pools.in_use == 0

    def settle(self) -> None:
        """Deliver and consume until nothing is left to do."""
        while True:
            for side in self.sides.values():
                side.consume()
            for name in self.sides:
                self.flush(name)
            if not any(self.wires.values()):
                return
            for name in self.sides:
                self.deliver(name, len(self.wires[name]))

    def check_settled(self) -> None:
        client, server = self.pair.client, self.pair.server
        assert client.session.streams.keys() == server.session.streams.keys()
        for stream_id, near in client.streams.items():
            far = server.streams.get(stream_id)
            assert near.is_closed == (far is None or far.is_closed)
            for name, receiver in (("client", server), ("server", client)):
                sent = self.sent.get((name, stream_id), b"")
                got = receiver.got.get(stream_id, b"")
                assert sent[: len(got)] == got
                assert len(got) == len(sent) or stream_id in self.cut_off
            if near.is_closed and stream_id not in self.cut_off:
                reached.add("a clean end")
        for name, side in self.sides.items():
            self.check_order_of_events(side)
            self.check_that_nobody_waits(name, side)
        for sender, receiver in self.ways():
            credit = sender.session._send_window.available
            assert credit == receiver.session._receive_window.available > SESSION_WINDOW // 2
            for stream_id, stream in sender.session.streams.items():
                window = receiver.session.streams[stream_id].receive_window
                assert stream.send_window.available == window.available
                if stream.may_send:
                    assert 2 * window.available > window.size

    def check_order_of_events(self, side: Side) -> None:
        """Each stream tells each of its steps once, and nothing after its end."""
        for stream_id in side.streams:
            kinds = [each.kind for each in side.seen if each.stream_id == stream_id]
            steps = [kind for kind in kinds if kind is not EventKind.WRITABLE]
            assert len(steps) == len(set(steps))
            assert not any(kind in ENDS for kind in kinds[:-1])
            if EventKind.OPENED in steps or EventKind.OPEN in steps:
                assert steps[0] in (EventKind.OPENED, EventKind.OPEN)

    def check_that_nobody_waits(self, name: str, side: Side) -> None:
        """Who found a window used up was told of its opening."""
        for (blocked, stream_id), count in self.blocked.items():
            stream = side.streams[stream_id] if blocked == name else None
            if stream is not None and stream.may_send:
                reached.add("a window used up")
                since = side.seen[count:]
                assert any(each.kind is EventKind.WRITABLE and each.stream_id in (0, stream_id) for each in since)


def test_two_sessions_agree_whatever_happens() -> None:
    reached.clear()
    run_state_machine_as_test(
        TwoSessions,
        settings=settings(
            max_examples=EXAMPLES or NORMAL_EXAMPLES,
            stateful_step_count=LONG_STEPS if EXAMPLES else NORMAL_STEPS,
            deadline=None,
        ),
    )
    assert worth_reaching <= reached  # or the runs have proved less than they seem to
