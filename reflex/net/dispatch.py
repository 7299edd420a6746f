"""What each event of a session does to its tunnel, and what a tunnel asks of a stream's owner.

The receiving half of :mod:`reflex.net.tunnel`, which delivers DATA itself. A function of the tunnel, which uses
its internals.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from reflex.net.options import is_near
from reflex.protocol.events import Event, EventKind
from reflex.protocol.wire import Code

if TYPE_CHECKING:
    from reflex.net.tunnel import Tunnel

log = logging.getLogger("reflex.net.tunnel")  # whose words these are


class StreamOwner(Protocol):
    """What a tunnel asks of a stream's owner: a relay."""

    last_tick: int

    @property
    def ended(self) -> bool: ...
    @property
    def fd(self) -> int: ...
    @property
    def waiting_bytes(self) -> int: ...
    def on_opened(self) -> None: ...
    def on_refused(self, status: int) -> None: ...
    def on_data(self, data: memoryview) -> None: ...
    def on_fin(self) -> None: ...
    def on_reset(self, code: int) -> None: ...
    def on_writable(self) -> None: ...
    def on_idle(self) -> None: ...
    def on_hang_up(self) -> None: ...


def dispatch(tunnel: Tunnel, event: Event) -> None:
    """Do what any event asks for."""
    kind, stream = event.kind, event.stream
    if stream is None:
        if kind is EventKind.WRITABLE:
            for each in list(tunnel.session.streams.values()):
                if each.owner is not None:
                    each.owner.on_writable()
        elif kind is EventKind.GOAWAY:
            tunnel.say(logging.INFO, "goaway", f"the peer takes no new streams ({_code_name(event.number)})")
            tunnel.stream_ended()
        elif kind is EventKind.SETTINGS:
            if tunnel._on_settings is not None and tunnel.session.peer_time_ms and not tunnel.settled.is_set():
                tunnel._on_settings(tunnel.session.peer_time_ms)
            tunnel.settled.set()
            tunnel.is_near = is_near(tunnel._sock)
        elif kind is EventKind.CLOSED:
            log.debug("%s: closed by the peer (%s)", tunnel._label, _code_name(event.number))
            tunnel.close_code = event.number
            tunnel._finish_end()
        return
    owner: StreamOwner = stream.owner
    if kind is EventKind.DATA:
        owner.on_data(event.data)
    elif kind is EventKind.OPEN:
        tunnel._counters.streams_opened += 1
        if tunnel._on_open is not None:
            tunnel._on_open(tunnel, event)
    elif kind is EventKind.OPENED:
        owner.on_opened()
    elif kind is EventKind.FIN:
        owner.on_fin()
        tunnel.stream_ended()
    elif kind is EventKind.WRITABLE:
        owner.on_writable()
    elif kind is EventKind.REFUSED:
        tunnel._counters.streams_refused += 1
        owner.on_refused(event.number)
        tunnel.stream_ended()
    elif kind is EventKind.RESET:
        tunnel._counters.streams_reset += 1
        if owner is not None:
            owner.on_reset(event.number)
        tunnel.stream_ended()
    elif kind is EventKind.DATAGRAM:
        tunnel.session.consumed(stream, len(event.data))


def _code_name(code: int) -> str:
    try:
        return Code(code).name.lower().replace("_", " ")
    except ValueError:
        return f"code {code}"
