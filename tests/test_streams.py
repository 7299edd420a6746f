"""reflex.protocol.streams: every event in every state."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflex.errors import StreamStateError
from reflex.protocol import streams
from reflex.protocol.streams import EVENT_NAMES, STATE_NAMES, TRANSITIONS, Stream
from reflex.protocol.wire import STREAM_WINDOW, Network

STATES = range(len(STATE_NAMES))
EVENTS = range(len(EVENT_NAMES))
# A state as what it says: who waits for an answer ("caller", "called" or nobody), has sent its last, has received it.
FACTS = {
    streams.CALLING: ("caller", False, False),
    streams.CALLING_LOCAL_DONE: ("caller", True, False),
    streams.CALLED: ("called", False, False),
    streams.CALLED_REMOTE_DONE: ("called", False, True),
    streams.OPEN: ("", False, False),
    streams.LOCAL_DONE: ("", True, False),
    streams.REMOTE_DONE: ("", False, True),
    streams.CLOSED: ("", True, True),
}
STATE_OF = {facts: state for state, facts in FACTS.items()}


def expected_state(state: int, event: int) -> int | None:
    """Where the contract's words lead; None where they do not allow the event."""
    waiting, sent_last, received_last = FACTS[state]
    if state == streams.CLOSED:
        return None
    if event in (streams.SEND_RESET, streams.RECEIVE_RESET):
        return streams.CLOSED
    if event in (streams.SEND_OPENED, streams.SEND_REFUSAL, streams.RECEIVE_OPENED, streams.RECEIVE_REFUSAL):
        answerer = "called" if event in (streams.SEND_OPENED, streams.SEND_REFUSAL) else "caller"
        if waiting != answerer:
            return None
        if event in (streams.SEND_REFUSAL, streams.RECEIVE_REFUSAL):
            return streams.CLOSED
        return STATE_OF["", sent_last, received_last]
    if event in (streams.SEND_DATA, streams.SEND_FIN):
        if sent_last or waiting == "called":
            return None
        return state if event == streams.SEND_DATA else STATE_OF[waiting, True, received_last]
    if received_last or waiting == "caller":
        return None
    return state if event == streams.RECEIVE_DATA else STATE_OF[waiting, sent_last, True]


@pytest.mark.parametrize(
    ("state", "event"),
    list(itertools.product(STATES, EVENTS)),
    ids=[f"{state}-{event}" for state, event in itertools.product(STATE_NAMES, EVENT_NAMES)],
)
def test_every_event_in_every_state_moves_or_raises_as_the_contract_says(state: int, event: int) -> None:
    stream = Stream(7, state, Network.TCP)
    expected = expected_state(state, event)
    assert stream.can(event) == (expected is not None)
    assert TRANSITIONS.get((state, event)) == expected
    if expected is not None:
        stream.move(event)
        assert stream.state == expected
        return
    with pytest.raises(StreamStateError) as caught:
        stream.move(event)
    assert stream.state == state
    facts = (caught.value.stream_id, caught.value.state, caught.value.call)
    assert facts == (7, STATE_NAMES[state], EVENT_NAMES[event])


def test_every_state_and_event_has_a_name_of_its_own() -> None:
    assert len(set(STATE_NAMES)) == len(FACTS) == 8
    assert len(set(EVENT_NAMES)) == 10
    assert STATE_NAMES[streams.CLOSED] == "closed"
    assert EVENT_NAMES[streams.RECEIVE_RESET] == "receive RESET"


@pytest.mark.parametrize("state", STATES, ids=STATE_NAMES)
def test_the_hot_questions_answer_as_the_table_does(state: int) -> None:
    stream = Stream(1, state, Network.TCP)
    assert stream.may_send == streams.MAY_SEND[state] == stream.can(streams.SEND_DATA)
    assert streams.MAY_RECEIVE[state] == stream.can(streams.RECEIVE_DATA)
    assert stream.is_closed == (state == streams.CLOSED)


@given(st.sampled_from([streams.CALLING, streams.CALLED]), st.lists(st.sampled_from(EVENTS), max_size=20))
def test_nothing_follows_a_direction_s_last_and_nothing_leads_out_of_closed(state: int, events: list[int]) -> None:
    stream = Stream(1, state, Network.TCP)
    sent_last = received_last = closed = False
    for event in filter(stream.can, events):
        assert not closed
        assert not (sent_last and event in (streams.SEND_DATA, streams.SEND_FIN))
        assert not (received_last and event in (streams.RECEIVE_DATA, streams.RECEIVE_FIN))
        stream.move(event)
        sent_last |= event == streams.SEND_FIN
        received_last |= event == streams.RECEIVE_FIN
        closed = stream.is_closed
        assert closed or not (sent_last and received_last)


def test_a_new_stream_starts_with_the_contracts_windows_and_nothing_held() -> None:
    stream = Stream(3, streams.CALLING, Network.UDP)
    assert (stream.id, stream.state, stream.network) == (3, streams.CALLING, Network.UDP)
    assert stream.send_window.available == stream.receive_window.available == STREAM_WINDOW == 262_144
    assert (stream.held_bytes, stream.grown_bytes, stream.owner) == (0, 0, None)


def test_a_stream_shows_its_id_and_state() -> None:
    assert repr(Stream(9, streams.LOCAL_DONE, Network.TCP)) == "<Stream 9, open, sending ended>"
