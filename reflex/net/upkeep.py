"""A tunnel's clock: it looks for a dead peer, for idle streams, and for connections that are gone unseen.

Functions of :class:`reflex.net.tunnel.Tunnel`, which use its internals.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from reflex.net.dispatch import StreamOwner
from reflex.net.hangup import hung_up
from reflex.net.options import is_near

if TYPE_CHECKING:
    from reflex.net.tunnel import Tunnel

TICK_MAX_S: Final = 1.0  # how often liveness, idle streams and lost connections are looked at
TICK_MIN_S: Final = 0.25
TICKS_PER_TIMEOUT: Final = 4


def ticks_for(idle_timeout_s: float) -> tuple[float, int]:
    """How long a tick is, in seconds, and after how many of them a stream is idle."""
    tick_s = max(TICK_MIN_S, min(TICK_MAX_S, idle_timeout_s / TICKS_PER_TIMEOUT))
    return tick_s, max(1, round(idle_timeout_s / tick_s))


def on_tick(tunnel: Tunnel) -> None:
    """Look for a dead peer, for idle streams; send a PING where one is due."""
    if tunnel.ended:
        return
    session = tunnel.session
    tunnel.tick += 1
    session.now_s = tunnel._loop.time()
    if session.is_dead():
        tunnel.cut("no sign of life from the peer")
        return
    oldest = tunnel.tick - tunnel._idle_ticks
    for owner in idle_owners((stream.owner for stream in session.streams.values()), oldest):
        owner.on_idle()
    for owner in idle_owners(tunnel.draining, oldest):
        owner.on_idle()
    _look_for_hang_ups(tunnel)
    if tunnel.ended:
        return
    tunnel.is_near = is_near(tunnel._sock)
    if session.unsent_bytes:
        tunnel.flush_soon()
    # A dead peer is found when its time is over, not a tick later.
    next_s = min(tunnel._tick_s, max(session.silence_left_s, TICK_MIN_S))
    tunnel._tick_timer = tunnel._loop.call_later(next_s, on_tick, tunnel)


def _look_for_hang_ups(tunnel: Tunnel) -> None:
    owners = {
        owner.fd: owner
        for owner in (*(stream.owner for stream in tunnel.session.streams.values()), *tunnel.draining)
        if owner is not None and owner.fd >= 0
    }
    for fd in hung_up((tunnel._fd, *owners)):
        if fd == tunnel._fd:
            _read_rest(tunnel)
        else:
            owners[fd].on_hang_up()
        if tunnel.ended:
            return


def _read_rest(tunnel: Tunnel) -> None:
    """The connection is gone: what came before its end is still to be read, and no event tells of it."""
    if not tunnel.ended:
        tunnel._on_readable()
        tunnel._loop.call_soon(_read_rest, tunnel)


def watch(tunnel: Tunnel, relay: StreamOwner, waiting_bytes: int = -1) -> None:
    """A relay goes on without its tunnel, as long as its socket takes something in every idle time-out."""
    if relay.ended:
        return
    if relay.waiting_bytes == waiting_bytes:
        relay.on_idle()
        return
    tunnel._loop.call_later(tunnel._tick_s * tunnel._idle_ticks, watch, tunnel, relay, relay.waiting_bytes)


def idle_owners(owners: Iterable[StreamOwner | None], oldest_tick: int) -> list[StreamOwner]:
    """Those that moved no byte since before ``oldest_tick``."""
    return [owner for owner in owners if owner is not None and owner.last_tick < oldest_tick]
