"""Random and changed input for whatever reads what others wrote, and machines that take many steps.

A short form runs with the other tests; the long one is ``make fuzz``, which adds the coverage-guided fuzzer where
that is installed (tests/fuzz.py). ``REFLEX_FUZZ_EXAMPLES`` is how many inputs each target gets there.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
import time
from typing import Final

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from reflex.errors import ProtocolError
from reflex.protocol.pools import Pools
from reflex.protocol.session import MAX_UNSENT_BYTES
from reflex.protocol.streams import CALLED, CALLED_REMOTE_DONE
from reflex.protocol.window import Budget
from reflex.protocol.wire import Code, Network, Status
from tests.fuzz import EXIT_USAGE
from tests.fuzz_targets import SEEDS, TARGETS
from tests.sessions import Peer
from tests.test_session_hostile import bodies
from tests.test_session_machine import TwoSessions, reached, worth_reaching

SHORT_EXAMPLES: Final = 100
LONG_EXAMPLES: Final = int(os.environ.get("REFLEX_FUZZ_EXAMPLES", "5000"))
STEPS_WANTED: Final = 100_000  # of all machines together
LONG_TIMEOUT_S: Final = 900
FREE_BYTES: Final = 100_000  # answers beyond the bound that one record may still cause

SHORT_MACHINE: Final = (30, 40)  # examples, steps of each at the most
LONG_MACHINES: Final = {"TwoSessions": (400, 200), "OneHostilePeer": (400, 200)}
EXAMPLES_PER_RUN: Final = 50  # hypothesis remembers all choices of a run

# Anything, changed seeds, and enough of each to get past the first check.
inputs = st.binary(max_size=400) | st.binary(min_size=100, max_size=4_000)


def seeded(name: str) -> st.SearchStrategy[bytes]:
    return inputs | st.builds(bytes.__add__, st.sampled_from(SEEDS[name]), st.binary(max_size=60))


def run_target(name: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(seeded(name))
    def run(data: bytes) -> None:
        TARGETS[name](data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_taken_or_refused_as_documented(name: str) -> None:
    for data in SEEDS[name]:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_random_and_changed_input_is_taken_or_refused_as_documented(name: str) -> None:
    run_target(name, SHORT_EXAMPLES)


@pytest.mark.fuzz
@pytest.mark.timeout(LONG_TIMEOUT_S)
@pytest.mark.parametrize("name", TARGETS)
def test_the_guided_fuzzer_finds_nothing(name: str) -> None:
    """Its process ends with an error where it has found something; so it has one of its own.

    It comes before the machines: a process is taken to have had the memory of the one that started it.
    """
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs atheris: pip install '.[fuzz]'")
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name], capture_output=True, text=True, timeout=LONG_TIMEOUT_S, check=False
    )
    print(run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0, run.stderr[-4_000:]


@pytest.mark.fuzz
@pytest.mark.timeout(LONG_TIMEOUT_S)
@pytest.mark.parametrize("name", TARGETS)
def test_much_random_and_changed_input_is_taken_or_refused_as_documented(name: str) -> None:
    run_target(name, LONG_EXAMPLES)


def test_a_target_does_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the ones above would prove nothing."""

    def careless(*_: object) -> None:
        raise IndexError

    monkeypatch.setattr("tests.fuzz_targets.decode_address", careless)
    with pytest.raises(IndexError):
        run_target("address", SHORT_EXAMPLES)


class OneHostilePeer(RuleBasedStateMachine):
    """A session whose application does what it should, and a peer that seals whatever it likes."""

    @initialize(of_server=st.booleans(), max_streams=st.integers(0, 6), buffered_limit=st.sampled_from([0, 1 << 28]))
    def connect(self, of_server: bool, max_streams: int, buffered_limit: int) -> None:  # noqa: FBT001 - drawn by name
        self.pools = Pools()
        self.of_server = of_server
        self.limit = max_streams if of_server else 100
        budget = Budget(buffered_limit=buffered_limit)
        self.peer = Peer(self.pools, of_server=of_server, max_streams=max_streams, budget=budget)
        self.peer.side.reads = False
        self.is_over = False

    @rule(body=bodies)
    def write(self, body: bytes) -> None:
        if not self.is_over:
            try:
                self.peer.write_body(body)
            except ProtocolError:
                self.is_over = True
                self.peer.session.close_buffers()

    @rule(body=bodies, times=st.sampled_from([20, 300]))
    def repeat(self, body: bytes, times: int) -> None:
        self.write(b"".join([body] * times)[:100_000])

    @rule()
    def read_answers(self) -> None:
        if not self.is_over:
            self.peer.answers()

    @rule(step_s=st.sampled_from([0.001, 0.5, 10.0]))
    def wait(self, step_s: float) -> None:
        self.peer.session.now_s += step_s

    @rule(status=st.sampled_from([Status.SUCCEEDED, Status.REFUSED]))
    def answer(self, status: Status) -> None:
        session = self.peer.session
        for stream in list(session.streams.values()):
            if stream.state in (CALLED, CALLED_REMOTE_DONE):
                if status is Status.SUCCEEDED:
                    session.accept(stream)
                else:
                    session.refuse(stream, status)

    @rule()
    def open(self) -> None:
        if not self.of_server and self.peer.session.has_room:
            self.peer.side.open()

    @rule(size=st.integers(1, 5_000))
    def send(self, size: int) -> None:
        for stream in list(self.peer.session.streams.values()):
            if stream.may_send and stream.network is Network.TCP and self.peer.session.unsent_bytes < FREE_BYTES:
                self.peer.session.send(stream, bytes(size))

    @rule()
    def consume(self) -> None:
        self.peer.side.consume()

    @rule()
    def reset_one(self) -> None:
        for stream in list(self.peer.session.streams.values())[:1]:
            self.peer.session.reset(stream, Code.CANCELLED)

    @invariant()
    def what_is_kept_is_bounded(self) -> None:
        session = self.peer.session
        assert len(session.streams) <= self.limit
        assert session.unsent_bytes <= MAX_UNSENT_BYTES + 2 * FREE_BYTES
        assert self.peer.budget.buffered == sum(stream.held_bytes for stream in self.peer.side.streams.values())
        assert 0 <= session._allowance._left <= session._allowance.burst_units

    def teardown(self) -> None:
        if hasattr(self, "peer"):
            self.peer.end()
            assert self.pools.in_use == 0


def run_machine(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> int:
    """Run so many examples of a machine; give back how many steps they took together."""
    done = 0

    class Counted(machine):  # type: ignore[misc, valid-type]  # a class that is a value
        def check_invariants(self, *args: object, **kwargs: object) -> None:
            nonlocal done
            super().check_invariants(*args, **kwargs)
            done += 1

        def teardown(self) -> None:
            nonlocal done
            done -= 1  # what was checked after connecting is no step
            super().teardown()

    Counted.__name__ = machine.__name__
    # In CI each run finds the same examples every time, but not the same as the run before it.
    first_seed = 0 if settings().derandomize else secrets.randbits(32)
    for number, start in enumerate(range(0, examples, EXAMPLES_PER_RUN)):
        run_state_machine_as_test(
            seed(first_seed + number)(Counted),
            settings=settings(
                max_examples=min(EXAMPLES_PER_RUN, examples - start),
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    return done


def test_a_session_survives_a_hostile_peer_whatever_both_do() -> None:
    assert run_machine(OneHostilePeer, *SHORT_MACHINE) > SHORT_MACHINE[0]


@pytest.mark.fuzz
@pytest.mark.timeout(LONG_TIMEOUT_S)
def test_the_machines_take_many_steps() -> None:
    reached.clear()
    total = 0
    for machine in (TwoSessions, OneHostilePeer):
        started_s = time.monotonic()
        steps = run_machine(machine, *LONG_MACHINES[machine.__name__])
        print(f"{machine.__name__}: {steps:,} steps in {time.monotonic() - started_s:.0f} s")
        total += steps
    print(f"{total:,} steps in all; {STEPS_WANTED:,} are wanted")
    assert total >= STEPS_WANTED
    assert worth_reaching <= reached


def test_the_guided_fuzzer_says_what_it_needs() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "nothing"], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == EXIT_USAGE
    assert all(name in run.stderr for name in TARGETS)
