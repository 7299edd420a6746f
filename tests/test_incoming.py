"""Each frame type as it arrives: what is answered, what is ignored, what is fatal."""

from __future__ import annotations

import pytest

from reflex.errors import FrameError, RecordError
from reflex.protocol.address import Address
from reflex.protocol.events import EventKind
from reflex.protocol.incoming import HANDLERS
from reflex.protocol.pools import Pools
from reflex.protocol.wire import MAX_BODY_SIZE, MAX_STREAM_ID, SETTING, Code, FrameType, Network, Setting, Status
from tests.sessions import TARGET, TO_TARGET, TO_UDP, Peer, Seen, code, frame, goaway, increment, peer_of

ADDRESS = TARGET.encode()
IPV4 = Address.parse("192.0.2.1:80")
IPV6 = Address.parse("[2001:db8::1]:80")

# A payload that the contract allows, for every type.
GOOD = {
    FrameType.PAD: b"anything",
    FrameType.DATA: b"x",
    FrameType.DATA_FIN: b"x",
    FrameType.RESET: code(Code.NONE),
    FrameType.WINDOW: increment(1),
    FrameType.OPEN: TO_TARGET,
    FrameType.OPENED: bytes([Status.SUCCEEDED]),
    FrameType.DATAGRAM: ADDRESS + b"x",
    FrameType.PING: bytes(8),
    FrameType.PONG: bytes(8),
    FrameType.SETTINGS: SETTING.pack(Setting.TIME_MS, 1),
    FrameType.GOAWAY: goaway(0, Code.NONE),
    FrameType.CLOSE: code(Code.NONE),
}
OF_A_STREAM = [
    FrameType.DATA,
    FrameType.DATA_FIN,
    FrameType.RESET,
    FrameType.WINDOW,
    FrameType.OPENED,
    FrameType.DATAGRAM,
]
OF_THE_SESSION = [
    FrameType.PAD,
    FrameType.PING,
    FrameType.PONG,
    FrameType.SETTINGS,
    FrameType.GOAWAY,
    FrameType.CLOSE,
]
OF_FIXED_SIZE = [
    FrameType.RESET,
    FrameType.WINDOW,
    FrameType.OPENED,
    FrameType.PING,
    FrameType.PONG,
    FrameType.GOAWAY,
    FrameType.CLOSE,
]


def refuses(peer: Peer, frame_type: int, stream_id: int, payload: bytes) -> None:
    """The frame is fatal, tells the application nothing, and is not answered."""
    peer.side.take_seen()
    with pytest.raises(FrameError):
        peer.write(frame_type, stream_id, payload)
    assert peer.side.seen == []


def test_every_type_but_data_has_a_handler() -> None:
    assert set(HANDLERS) == set(FrameType) - {FrameType.DATA}


class TestStreamNumbers:
    @pytest.mark.parametrize("frame_type", OF_THE_SESSION)
    def test_a_frame_of_the_session_on_a_stream_is_fatal(self, peer: Peer, frame_type: FrameType) -> None:
        peer.open(1)
        refuses(peer, frame_type, 1, GOOD[frame_type])

    @pytest.mark.parametrize("frame_type", [each for each in OF_A_STREAM if each != FrameType.WINDOW])
    def test_a_frame_of_a_stream_on_the_session_is_fatal(self, peer: Peer, frame_type: FrameType) -> None:
        refuses(peer, frame_type, 0, GOOD[frame_type])

    @pytest.mark.parametrize("frame_type", OF_A_STREAM)
    @pytest.mark.parametrize("stream_id", [2, 5, MAX_STREAM_ID - 1, MAX_STREAM_ID])
    def test_a_frame_for_an_id_that_was_never_opened_is_fatal_at_a_server(
        self, peer: Peer, frame_type: FrameType, stream_id: int
    ) -> None:
        peer.open(3)
        refuses(peer, frame_type, stream_id, GOOD[frame_type])

    @pytest.mark.parametrize("frame_type", OF_A_STREAM)
    @pytest.mark.parametrize("stream_id", [1, 2])
    def test_a_frame_for_an_id_that_was_never_opened_is_fatal_at_a_client(
        self, server: Peer, frame_type: FrameType, stream_id: int
    ) -> None:
        refuses(server, frame_type, stream_id, GOOD[frame_type])

    @pytest.mark.parametrize("frame_type", OF_A_STREAM)
    def test_a_frame_for_an_id_that_was_passed_over_comes_late_as_for_one_that_has_ended(
        self, peer: Peer, frame_type: FrameType
    ) -> None:
        peer.open(5)
        peer.side.take_seen()
        peer.write(frame_type, 3, GOOD[frame_type])
        assert peer.side.seen == []
        assert peer.answers() == []

    @pytest.mark.parametrize("stream_id", [0, 2, MAX_STREAM_ID - 1])
    def test_an_open_of_an_even_id_is_fatal(self, peer: Peer, stream_id: int) -> None:
        refuses(peer, FrameType.OPEN, stream_id, TO_TARGET)

    @pytest.mark.parametrize("stream_id", [1, 3, 5])
    def test_an_open_of_an_id_that_was_used_or_passed_over_is_fatal(self, peer: Peer, stream_id: int) -> None:
        first, second = peer.open(3), peer.open(5)
        peer.session.reset(first, Code.CANCELLED)
        peer.session.reset(second, Code.CANCELLED)
        refuses(peer, FrameType.OPEN, stream_id, TO_TARGET)

    @pytest.mark.parametrize("stream_id", [1, 2, 3])
    def test_a_server_may_open_nothing(self, server: Peer, stream_id: int) -> None:
        server.side.open()
        refuses(server, FrameType.OPEN, stream_id, TO_TARGET)

    def test_the_last_id_may_be_opened(self, peer: Peer) -> None:
        assert peer.open(MAX_STREAM_ID).id == MAX_STREAM_ID


class TestSizes:
    @pytest.mark.parametrize("frame_type", OF_FIXED_SIZE)
    @pytest.mark.parametrize("wrong", ["empty", "short", "long"])
    @pytest.mark.parametrize("live", [True, False])
    def test_a_payload_of_a_wrong_size_is_fatal(
        self,
        pools: Pools,
        frame_type: FrameType,
        wrong: str,
        live: bool,  # noqa: FBT001
    ) -> None:
        good = GOOD[frame_type]
        payload = {"empty": b"", "short": good[:-1], "long": good + b"\0"}[wrong]
        with peer_of(pools, of_server=False) as server:
            stream = server.side.open()
            if not live:
                server.session.reset(stream, Code.CANCELLED)
            refuses(server, frame_type, 0 if frame_type in OF_THE_SESSION else 1, payload)

    def test_an_empty_data_frame_is_fatal(self, peer: Peer) -> None:
        peer.open(1)
        refuses(peer, FrameType.DATA, 1, b"")

    def test_settings_that_are_no_whole_number_of_pairs_are_fatal(self, peer: Peer) -> None:
        refuses(peer, FrameType.SETTINGS, 0, GOOD[FrameType.SETTINGS] + b"\0")

    @pytest.mark.parametrize("payload", [b"", ADDRESS[:-1], b"\x09" + bytes(20), b"\x01" + bytes(6)])
    @pytest.mark.parametrize("live", [True, False])
    def test_a_datagram_without_an_address_is_fatal(self, peer: Peer, payload: bytes, live: bool) -> None:  # noqa: FBT001
        peer.write(FrameType.OPEN, 1, TO_UDP)
        if not live:
            peer.session.reset(peer.side.streams[1], Code.CANCELLED)
        refuses(peer, FrameType.DATAGRAM, 1, payload)

    def test_a_body_that_ends_in_half_a_frame_is_fatal_after_its_whole_ones(self, peer: Peer) -> None:
        with pytest.raises(FrameError):
            peer.write_body(frame(FrameType.PING, 0, bytes(8)) + frame(FrameType.PING, 0, bytes(8))[:-1])

    def test_a_body_above_the_maximum_is_fatal(self, peer: Peer) -> None:
        with pytest.raises(RecordError):
            peer.write_body(bytes(MAX_BODY_SIZE + 1))


class TestTypes:
    @pytest.mark.parametrize("frame_type", [0x0D, 0x0E, 0x40, 0x7E, 0x7F])
    @pytest.mark.parametrize("stream_id", [0, 1])
    def test_unknown_types_below_0x80_are_fatal(self, peer: Peer, frame_type: int, stream_id: int) -> None:
        peer.open(1)
        refuses(peer, frame_type, stream_id, b"what")

    def test_unknown_types_from_0x80_on_are_ignored(self, peer: Peer) -> None:
        for frame_type in range(0x80, 0x100):
            peer.write(frame_type, frame_type % 3, bytes(frame_type))
        assert peer.answers() == []
        assert peer.side.seen == []

    def test_padding_is_ignored_whatever_it_holds(self, peer: Peer) -> None:
        peer.write(FrameType.PAD)
        peer.write(FrameType.PAD, 0, bytes(range(256)) * 100)
        assert peer.answers() == []
        assert peer.side.seen == []

    def test_several_frames_in_one_record_are_taken_in_order(self, peer: Peer) -> None:
        peer.write_body(
            frame(FrameType.OPEN, 1, TO_TARGET)
            + frame(FrameType.PAD, 0, b"pad")
            + frame(FrameType.DATA, 1, b"first")
            + frame(0xFF, 9)
            + frame(FrameType.DATA, 1, b" second")
            + frame(FrameType.DATA_FIN, 1, b" last")
            + frame(FrameType.GOAWAY, 0, goaway(0, Code.NONE))
        )
        assert peer.side.got == {1: b"first second last"}
        assert [each.kind for each in peer.side.seen] == [EventKind.OPEN, EventKind.FIN, EventKind.GOAWAY]


class TestOpen:
    @pytest.mark.parametrize("address", [TARGET, IPV4, IPV6])
    def test_the_address_is_given_out(self, peer: Peer, address: Address) -> None:
        peer.write(FrameType.OPEN, 1, b"\x01" + address.encode())
        assert peer.side.seen == [Seen(EventKind.OPEN, 1, address=address)]

    @pytest.mark.parametrize(
        ("payload", "status"),
        [
            (b"\x00", Status.NOT_SUPPORTED),
            (b"\x03" + ADDRESS, Status.NOT_SUPPORTED),
            (b"\x01\x02" + bytes(9), Status.ADDRESS_TYPE_NOT_SUPPORTED),
            (b"\x01\x00", Status.ADDRESS_TYPE_NOT_SUPPORTED),
            (b"\x01\x03\x00\x00\x50", Status.HOST_UNREACHABLE),  # a name without a letter
            (b"\x01\x03\x01/\x00\x50", Status.HOST_UNREACHABLE),
            (b"\x01\x03\x01a\x00\x00", Status.HOST_UNREACHABLE),  # port 0
        ],
    )
    def test_what_this_side_does_not_have_is_refused(self, peer: Peer, payload: bytes, status: Status) -> None:
        peer.write(FrameType.OPEN, 1, payload)
        assert peer.answers() == [(FrameType.OPENED, 1, bytes([status]))]
        assert peer.side.seen == []
        assert not peer.session.streams

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"\x01",
            b"\x01\x01" + bytes(5),
            b"\x01\x01" + bytes(7),
            b"\x01\x04" + bytes(17),
            b"\x01\x04" + bytes(19),
            b"\x01\x03",
            b"\x01\x03\x05abcd\x00\x50",
            TO_TARGET + b"\0",
            TO_TARGET[:-1],
            b"\x02" + ADDRESS,
        ],
    )
    def test_a_size_that_does_not_fit_what_it_says_is_fatal(self, peer: Peer, payload: bytes) -> None:
        refuses(peer, FrameType.OPEN, 1, payload)

    def test_an_id_may_be_passed_over(self, peer: Peer) -> None:
        assert peer.open(1).id == 1
        assert peer.open(9).id == 9


class TestStates:
    def test_data_before_the_answer_of_a_server_is_fatal(self, server: Peer) -> None:
        server.side.open()
        refuses(server, FrameType.DATA, 1, b"x")

    def test_an_end_before_the_answer_of_a_server_is_fatal(self, server: Peer) -> None:
        server.side.open()
        refuses(server, FrameType.DATA_FIN, 1, b"")

    def test_a_datagram_before_the_answer_of_a_server_is_fatal(self, server: Peer) -> None:
        stream = server.session.open(None, Network.UDP)
        refuses(server, FrameType.DATAGRAM, stream.id, ADDRESS + b"x")

    @pytest.mark.parametrize("frame_type", [FrameType.DATA, FrameType.DATA_FIN])
    def test_data_after_the_end_is_fatal(self, peer: Peer, frame_type: FrameType) -> None:
        peer.open(1)
        peer.write(FrameType.DATA_FIN, 1)
        refuses(peer, frame_type, 1, b"x")

    @pytest.mark.parametrize("frame_type", [FrameType.DATA, FrameType.DATA_FIN])
    def test_data_on_a_udp_stream_is_fatal(self, peer: Peer, frame_type: FrameType) -> None:
        peer.write(FrameType.OPEN, 1, TO_UDP)
        refuses(peer, frame_type, 1, b"x")

    def test_a_datagram_on_a_tcp_stream_is_fatal(self, peer: Peer) -> None:
        peer.open(1)
        refuses(peer, FrameType.DATAGRAM, 1, ADDRESS)

    @pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.REFUSED])
    def test_an_answer_from_the_side_that_opened_is_fatal(self, peer: Peer, status: Status) -> None:
        peer.call(1)
        refuses(peer, FrameType.OPENED, 1, bytes([status]))

    @pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.REFUSED])
    @pytest.mark.parametrize("finished", [True, False])
    def test_a_second_answer_is_fatal(self, server: Peer, status: Status, finished: bool) -> None:  # noqa: FBT001
        stream = server.side.open()
        if finished:
            server.session.finish(stream)
        server.write(FrameType.OPENED, 1, bytes([Status.SUCCEEDED]))
        refuses(server, FrameType.OPENED, 1, bytes([status]))

    def test_a_status_that_nobody_knows_is_a_refusal(self, server: Peer) -> None:
        stream = server.side.open()
        server.write(FrameType.OPENED, 1, b"\xee")
        assert server.side.seen == [Seen(EventKind.REFUSED, 1, number=0xEE)]
        assert stream.is_closed

    def test_a_code_that_nobody_knows_is_given_out(self, peer: Peer) -> None:
        peer.open(1)
        peer.write(FrameType.RESET, 1, code(2**32 - 1))
        assert peer.side.seen == [Seen(EventKind.RESET, 1, number=2**32 - 1)]
