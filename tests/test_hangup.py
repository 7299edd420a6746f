"""reflex.net.hangup: connections that are gone are told, and nothing is taken from them."""

from __future__ import annotations

from reflex.net.hangup import hung_up
from tests.ends import End, tcp_pair


def test_only_what_was_reset_or_has_ended_both_ways_is_told() -> None:
    pairs = [tcp_pair() for _ in range(4)]
    ends = [End(near) for near, _ in pairs]
    descriptors = [far.fileno() for _, far in pairs]
    try:
        assert hung_up([]) == []
        assert hung_up(descriptors) == []
        ends[0].sock.send(b"before")
        ends[0].reset()
        ends[1].finish()  # one way only
        ends[2].finish()
        pairs[2][1].shutdown(1)
        assert hung_up(descriptors) == [descriptors[0], descriptors[2]]
        assert pairs[0][1].recv(10) == b"before"
        assert hung_up(descriptors) == [descriptors[0], descriptors[2]]
    finally:
        for end, (_, far) in zip(ends, pairs, strict=True):
            end.close()
            far.close()
