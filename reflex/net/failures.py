"""Failed hellos, counted by address: beyond a rate, no cryptography is spent on one.

To judge a hello costs an X25519 and a dozen hashes, junk included. Who sends junk from one address gets
that for the first few each second; what else comes from there is treated as failed without a look. An
address is all of an IPv4 address, or the first 64 bits of an IPv6 one, which one machine commonly has
to itself.

The memory is one number for each address that failed within the last second: the time at which all its
failures are made up for (the generic cell rate algorithm, ITU-T I.371, appendix A: a token bucket that
needs no refilling). Numbers in the past say nothing and are dropped; with so many addresses at once that
they do not fit, the one that failed least recently is forgotten. No clock: the time is passed in.
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from typing import Final

FAILURES_PER_S: Final = 20  # a person with wrong keys makes one or two; a scanner makes what it is given
MAX_ADDRESSES: Final = 4_096  # about 800 KB when full
IPV6_PREFIX_SIZE: Final = 8  # bytes: a /64
FORGOTTEN_PER_CALL: Final = 2  # more than come, so that they grow fewer, and no call takes long
_INTERVAL_S: Final = 1 / FAILURES_PER_S
# A second's worth at once is too many; half an interval of margin, so that rounding does not decide.
_OVER_S: Final = FAILURES_PER_S * _INTERVAL_S - _INTERVAL_S / 2


class Failures:
    """How much junk came lately, from where. Each call is O(1), amortised.

    Args:
        max_addresses: the most addresses that are remembered.
    """

    __slots__ = ("_made_up_s", "max_addresses")

    def __init__(self, max_addresses: int = MAX_ADDRESSES) -> None:
        self.max_addresses = max_addresses
        self._made_up_s: OrderedDict[bytes, float] = OrderedDict()  # by the last failure, the oldest first

    def __len__(self) -> int:
        return len(self._made_up_s)

    def is_over(self, source: bytes, now_s: float) -> bool:
        """Whether this source has failed so often that it gets no look: 20 times at once, or 20 times a second.

        Args:
            source: of :func:`source_of`.
            now_s: a clock that never steps back, such as the loop's.
        """
        return self._made_up_s.get(source, now_s) - now_s > _OVER_S

    def count(self, source: bytes, now_s: float) -> None:
        """It was looked at, and has failed; arguments as of :meth:`is_over`."""
        made_up_s = self._made_up_s
        made_up_s[source] = max(made_up_s.get(source, now_s), now_s) + _INTERVAL_S
        made_up_s.move_to_end(source)
        if len(made_up_s) > self.max_addresses:
            made_up_s.popitem(last=False)
        for _ in range(FORGOTTEN_PER_CALL):
            oldest = next(iter(made_up_s))
            if made_up_s[oldest] > now_s:
                break
            del made_up_s[oldest]


def source_of(host: str) -> bytes:
    """What an IP address is counted as: IPv4 whole (4 bytes), IPv6 by its /64 (8 bytes).

    An IPv4 address that is written as an IPv6 one (``::ffff:192.0.2.1``) counts as the IPv4 address.

    Raises:
        OSError: it is no IP address.
    """
    if ":" not in host:
        return socket.inet_pton(socket.AF_INET, host)
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    if packed.startswith(_MAPPED):
        return packed[len(_MAPPED) :]
    return packed[:IPV6_PREFIX_SIZE]


_MAPPED: Final = bytes(10) + b"\xff\xff"
