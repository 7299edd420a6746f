"""Which connections are gone, whatever the event loop tells of them.

An event loop tells of a reset only who reads or writes at that moment: not of a socket whose reader
was taken away for back-pressure or after its FIN. And uvloop tells it once, even where the reader has
only taken a part of what had arrived before: libuv gives a descriptor up at its first error. So who
must not wait for ever asks the kernel now and then, with one call for all descriptors.
"""

from __future__ import annotations

import select
from collections.abc import Iterable


def hung_up(descriptors: Iterable[int]) -> list[int]:
    """Those whose connection was reset, or has ended in both directions. Takes nothing from the sockets."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, 0)  # no events: errors and hang-ups are always told
    return [descriptor for descriptor, _ in poll.poll(0)]
