"""Somebody in the middle, who sees and sends what they like: no session with them, and nothing wrong is delivered.

client <- the middle -> server

The first part asks what each set of stolen keys is good for, the second what can be done to hellos, the third what can
be done to the records of two real sessions. Between two daemons: ``tests/test_middle_e2e.py``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from reflex.errors import AuthenticationFailed, ProtocolError, Replayed
from reflex.protocol.handshake import (
    ClientCredentials,
    ServerCredentials,
    SessionSecrets,
    _mask_id,
    derive_psk,
)
from reflex.protocol.noise import Transcript
from reflex.protocol.pools import Pools
from reflex.protocol.replay import ReplaySet
from reflex.protocol.session import Session
from reflex.protocol.streams import Stream
from reflex.protocol.wire import CLIENT_HELLO_SIZE, KEY_SIZE, SERVER_HELLO_SIZE, Code
from tests.handshakes import (
    NOW,
    SERVER_PRIVATE,
    USER_ID,
    USER_KEY,
    accept,
    answer_of,
    client,
    client_credentials,
    public_of,
    roots,
    stranger,
)
from tests.sessions import Pair

SERVER_PUBLIC: Final = public_of(SERVER_PRIVATE)
PSK: Final = derive_psk(USER_KEY, USER_ID)
OTHER_PRIVATE: Final = bytes(range(50, 82))  # another server's


def exchange(private: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def forged_answer(hello: bytes, *, es: bytes, psk: bytes) -> bytes:
    """An answer by who knows neither more nor less than this, and has read the hello."""
    public, masked_id, sealed = hello[:32], hello[32:48], hello[48:]
    transcript = Transcript(masked_id, SERVER_PUBLIC)
    transcript.mix_hello_keys(public, es, psk)
    transcript._mix_hash(sealed)
    private = os.urandom(KEY_SIZE)
    tag = transcript.confirm(public_of(private), exchange(private, public))
    return (public_of(private) + tag)[:SERVER_HELLO_SIZE]


# What stolen keys are good for.


def test_who_knows_es_and_psk_is_the_server_so_that_the_forgery_is_a_real_one() -> None:
    """The forger of these tests is no straw man: with both secrets its answer is taken."""
    made, hello = client()
    answer = forged_answer(hello, es=exchange(SERVER_PRIVATE, hello[:32]), psk=PSK)
    assert made.read_answer(answer)


def test_without_keys_nobody_is_played_and_nothing_is_read() -> None:
    made, hello = client()
    guess = os.urandom(KEY_SIZE)
    for es in (bytes(KEY_SIZE), guess, exchange(guess, hello[:32]), exchange(guess, SERVER_PUBLIC)):
        made_again, hello_again = client()
        answer = forged_answer(hello_again, es=es, psk=guess)
        with pytest.raises(AuthenticationFailed):
            made_again.read_answer(answer)
    with pytest.raises(AuthenticationFailed):  # a server of its own, for which the hello was not made
        accept(hello, ServerCredentials(guess, {USER_ID: guess}))
    with pytest.raises(AuthenticationFailed):  # a client that knows even the user's id
        accept(client(stranger(user_key=guess))[1])
    assert made.read_answer(answer_of(accept(hello))[1])  # the true one still works


def test_with_a_users_key_alone_the_server_cannot_be_played() -> None:
    guess = os.urandom(KEY_SIZE)
    for ephemeral_or_server in (slice(0, 32), None):
        made, hello = client()
        public = SERVER_PUBLIC if ephemeral_or_server is None else hello[ephemeral_or_server]
        with pytest.raises(AuthenticationFailed):
            made.read_answer(forged_answer(hello, es=exchange(guess, public), psk=PSK))
    with pytest.raises(AuthenticationFailed):
        accept(client()[1], ServerCredentials(guess, {USER_ID: USER_KEY}))


def test_with_the_servers_key_alone_no_user_and_no_server_can_be_played_but_the_id_is_read() -> None:
    made, hello = client()
    es = exchange(SERVER_PRIVATE, hello[:32])
    guess = os.urandom(KEY_SIZE)
    assert _mask_id(hello[32:48], hello[:32], es, SERVER_PUBLIC) == USER_ID  # docs/protocol.md, section 7, says so
    with pytest.raises(AuthenticationFailed):
        accept(hello, ServerCredentials(SERVER_PRIVATE, {USER_ID: guess}))
    with pytest.raises(AuthenticationFailed):
        made.read_answer(forged_answer(hello, es=es, psk=guess))
    with pytest.raises(AuthenticationFailed):
        accept(client(stranger(user_key=guess))[1])


def test_with_another_servers_key_nothing_can_be_played() -> None:
    """Even where the same user has the same key at both servers."""
    made, hello = client()
    other = ServerCredentials(OTHER_PRIVATE, {USER_ID: USER_KEY})
    with pytest.raises(AuthenticationFailed):
        accept(hello, other)
    with pytest.raises(AuthenticationFailed):
        made.read_answer(forged_answer(hello, es=exchange(OTHER_PRIVATE, hello[:32]), psk=PSK))
    _, to_other = client(ClientCredentials(other.server_public, USER_ID, USER_KEY))
    with pytest.raises(AuthenticationFailed):
        accept(to_other)
    assert accept(to_other, other).user_id == USER_ID


def test_a_user_cannot_play_another_user_nor_the_server_for_another_user() -> None:
    mallory_id, mallory_key = b"another user's..", b"k" * KEY_SIZE  # a user of the same server, by the book
    assert accept(client(stranger(user_id=mallory_id, user_key=mallory_key))[1]).user_id == mallory_id
    with pytest.raises(AuthenticationFailed):
        accept(client(stranger(user_id=USER_ID, user_key=mallory_key))[1])
    made, hello = client()
    with pytest.raises(AuthenticationFailed):
        made.read_answer(forged_answer(hello, es=os.urandom(KEY_SIZE), psk=derive_psk(mallory_key, mallory_id)))


def test_who_gets_every_long_lived_key_later_cannot_open_a_recorded_session() -> None:
    """The roots need ee, whose private halves are gone. Time and options of the hello can be read, as documented."""
    made, hello = client()
    secrets, answer = answer_of(accept(hello))
    assert roots(made.read_answer(answer)) == roots(secrets)
    known = (
        exchange(SERVER_PRIVATE, hello[:32]),
        exchange(SERVER_PRIVATE, answer[:32]),
        bytes(KEY_SIZE),
        USER_KEY,
        PSK,
        SERVER_PRIVATE,
    )
    for ee in known:
        transcript = Transcript(hello[32:48], SERVER_PUBLIC)
        transcript.mix_hello_keys(hello[:32], known[0], PSK)
        options = transcript.decrypt_and_hash(hello[48:])
        assert options is not None
        assert int.from_bytes(options[:8]) == NOW
        tag = transcript.confirm(answer[:32], ee)
        assert tag[: SERVER_HELLO_SIZE - KEY_SIZE] != answer[KEY_SIZE:]
        opened = roots(SessionSecrets(secrets.suite, *transcript.split()))
        assert not set(opened.values()) & set(roots(secrets).values())


# Hellos that are passed on, but not to whom they belong.


def test_swapped_answers_are_refused_by_both_clients() -> None:
    first, hello_of_first = client()
    second, hello_of_second = client()
    _, answer_to_first = answer_of(accept(hello_of_first))
    _, answer_to_second = answer_of(accept(hello_of_second))
    for made, answer in ((first, answer_to_second), (second, answer_to_first)):
        with pytest.raises(AuthenticationFailed):
            made.read_answer(answer)


def test_parts_of_two_hellos_are_no_hello() -> None:
    _, one = client()
    _, other = client()
    cuts = (0, 32, 48, CLIENT_HELLO_SIZE)
    for kept in itertools.product((one, other), repeat=3):
        if len(set(kept)) == 2:
            mixed = b"".join(each[start:end] for each, start, end in zip(kept, cuts, cuts[1:], strict=False))
            with pytest.raises(AuthenticationFailed):
                accept(mixed)


def test_a_reflected_hello_is_no_answer_and_a_reflected_answer_no_hello() -> None:
    made, hello = client()
    _, answer = answer_of(accept(hello))
    for reflected in (hello[:SERVER_HELLO_SIZE], hello[-SERVER_HELLO_SIZE:], hello[:32] + answer[32:]):
        again, _ = client()
        with pytest.raises(AuthenticationFailed):
            again.read_answer(reflected)
    with pytest.raises(AuthenticationFailed):
        made.read_answer(hello[:32] + answer[32:])
    with pytest.raises(AuthenticationFailed):
        accept(answer + hello[SERVER_HELLO_SIZE:])
    with pytest.raises(AuthenticationFailed):
        accept((answer + answer)[:CLIENT_HELLO_SIZE])


def test_an_answer_that_is_played_again_is_refused() -> None:
    made, hello = client()
    _, answer = answer_of(accept(hello))
    made.read_answer(answer)
    with pytest.raises(AuthenticationFailed):
        client()[0].read_answer(answer)


def test_a_hello_that_is_played_again_is_refused_and_worth_nothing_where_nobody_remembers_it(pools: Pools) -> None:
    """A second server with the same key and no common memory takes it; what was recorded does not open there."""
    replay = ReplaySet(0)
    made, hello = client()
    secrets, answer = answer_of(accept(hello, replay=replay))
    with pytest.raises(Replayed):
        accept(hello, replay=replay)
    recorded = Pair(pools, secrets=made.read_answer(answer))
    again, _ = answer_of(accept(hello, replay=ReplaySet(0)))
    assert not set(roots(again).values()) & set(roots(secrets).values())
    elsewhere = Pair(pools, secrets=again)
    with pytest.raises(ProtocolError):
        elsewhere.server.feed(recorded.client.take_output())
    assert elsewhere.server.seen == []
    recorded.end()
    elsewhere.end()


# Records of real sessions, behind a real handshake.

TEXTS: Final = [b"the first text", b"the second, which is longer", b"3"]


def shake_hands() -> SessionSecrets:
    made, hello = client(client_credentials())
    secrets, answer = answer_of(accept(hello))
    assert roots(made.read_answer(answer)) == roots(secrets)
    return secrets


class Wire:
    """A pair with one stream, and what is under way, held by the middle.

    Attributes:
        records: of the side that sends, in order: one for each of TEXTS, then CLOSE.
        opposite: of the other side, which has not closed.
    """

    def __init__(self, pools: Pools, *, to_server: bool = True) -> None:
        self.pair = pair = Pair(pools, secrets=shake_hands())
        near, far = pair.open()
        (self.sender, sending), (self.receiver, receiving) = (pair.client, near), (pair.server, far)
        if not to_server:
            (self.sender, sending), (self.receiver, receiving) = (self.receiver, receiving), (self.sender, sending)
        self.opposite = list(_sealed(self.receiver.session, receiving))
        self.records = list(_sealed(self.sender.session, sending))
        self.sender.session.close(Code.NONE)
        self.records.append(self.sender.session.data_to_send())

    @property
    def got(self) -> bytes:
        return bytes(self.receiver.got.get(1, b""))

    def play(self, *parts: bytes) -> bool:
        """Feed it to the receiver; tells whether the session is still one."""
        try:
            for part in parts:
                self.receiver.feed(part)
        except ProtocolError:
            with pytest.raises(ProtocolError):  # and it stays so, whatever follows
                self.receiver.feed(self.records[0])
            return False
        return True


def _sealed(session: Session, stream: Stream) -> Iterator[bytes]:
    for text in TEXTS:
        assert session.send(stream, text) == len(text)
        yield session.data_to_send()


def whole(count: int) -> bytes:
    """What so many records have brought; CLOSE brings nothing."""
    return b"".join(TEXTS[:count])


each_direction = pytest.mark.parametrize("to_server", [True, False], ids=["to the server", "to the client"])


@each_direction
def test_the_records_as_they_were_sent_are_delivered_with_their_end(*, to_server: bool, pools: Pools) -> None:
    wire = Wire(pools, to_server=to_server)
    assert wire.play(*wire.records)
    assert wire.got == whole(3)
    assert wire.receiver.session.close_received
    wire.pair.end()


@each_direction
def test_records_in_any_other_order_are_delivered_up_to_the_first_wrong_place(*, to_server: bool, pools: Pools) -> None:
    right = range(len(TEXTS) + 1)
    for order in itertools.permutations(right):
        if order == tuple(right):
            continue
        wire = Wire(pools, to_server=to_server)
        assert not wire.play(*(wire.records[number] for number in order))
        assert wire.got == whole(next(number for number in right if order[number] != number))
        assert not wire.receiver.session.close_received
        wire.pair.end()


@each_direction
def test_a_record_that_comes_twice_ends_the_session_wherever_it_comes_again(*, to_server: bool, pools: Pools) -> None:
    for number, place in itertools.combinations_with_replacement(range(len(TEXTS)), 2):
        wire = Wire(pools, to_server=to_server)
        records = [*wire.records[: place + 1], wire.records[number], *wire.records[place + 1 :]]
        assert not wire.play(*records)
        assert wire.got == whole(place + 1)
        wire.pair.end()


@each_direction
def test_a_record_that_is_left_out_ends_the_session_and_a_missing_end_is_no_end(
    *, to_server: bool, pools: Pools
) -> None:
    for number in range(len(TEXTS) + 1):
        wire = Wire(pools, to_server=to_server)
        records = [*wire.records[:number], *wire.records[number + 1 :]]
        is_close = number == len(TEXTS)
        assert wire.play(*records) == is_close
        assert wire.got == whole(number)
        assert not wire.receiver.session.close_received
        wire.pair.end()


@each_direction
def test_a_connection_cut_at_any_byte_has_delivered_whole_records_and_no_end(*, to_server: bool, pools: Pools) -> None:
    sizes = [len(record) for record in Wire(pools, to_server=to_server).records]
    ends = list(itertools.accumulate(sizes))
    for size in range(ends[-1]):
        wire = Wire(pools, to_server=to_server)
        assert wire.play(b"".join(wire.records)[:size])
        assert wire.got == whole(sum(end <= size for end in ends))
        assert not wire.receiver.session.close_received
        wire.pair.end()


@each_direction
def test_a_sides_own_records_are_refused_when_they_come_back(*, to_server: bool, pools: Pools) -> None:
    for number in range(len(TEXTS)):
        wire = Wire(pools, to_server=to_server)
        assert wire.play(*wire.records[:number])
        assert not wire.play(wire.opposite[number])
        assert wire.got == whole(number)
        wire.pair.end()


@each_direction
def test_records_of_another_session_of_the_same_user_are_refused(*, to_server: bool, pools: Pools) -> None:
    for number in range(len(TEXTS)):
        wire, other = Wire(pools, to_server=to_server), Wire(pools, to_server=to_server)
        assert wire.play(*wire.records[:number])
        assert not wire.play(other.records[number])
        assert wire.got == whole(number)
        wire.pair.end()
        other.pair.end()


def test_two_sessions_of_different_handshakes_understand_nothing_of_each_other(pools: Pools) -> None:
    first, second = Wire(pools), Wire(pools)
    assert not first.play(*second.records)
    assert not second.play(*first.records)
    assert first.got == second.got == b""
    first.pair.end()
    second.pair.end()


parts = st.tuples(st.sampled_from(["records", "opposite", "another's"]), st.integers(0, 2), st.integers(0, 80))


@given(to_server=st.booleans(), whole_records=st.integers(0, 3), mixture=st.lists(parts, max_size=6))
@settings(max_examples=60)
def test_whatever_is_put_together_of_records_nothing_wrong_is_delivered(
    *, to_server: bool, whole_records: int, mixture: list[tuple[str, int, int]]
) -> None:
    """First some records as they were sent, then any pieces of any records: of this session or of another."""
    pools = Pools()
    wire, other = Wire(pools, to_server=to_server), Wire(pools, to_server=to_server)
    sources = {"records": wire.records, "opposite": wire.opposite, "another's": other.records}
    wire.play(*wire.records[:whole_records], *(sources[source][number][cut:] for source, number, cut in mixture))
    assert whole(3).startswith(wire.got)
    assert len(wire.got) >= len(whole(whole_records))
    assert not wire.receiver.session.close_received
    wire.pair.end()
    other.pair.end()
    assert pools.in_use == 0
