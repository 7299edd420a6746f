"""When a tunnel is not to be trusted: it does not answer while a request waits.

A path that dies without a word (a wall that drops packets, a machine that was asleep) is found by the
keepalive, in 40 s. A request does not wait so long. While an OPEN is unanswered and nothing at all comes
from the tunnel, a PING asks whether it is there. Where the answer fails to come in the time of a few
round trips, the tunnel is *suspect*: it gets no new streams, and the requests on it of which no byte can
have been delivered ask for another tunnel. Whatever comes from it ends the suspicion; the keepalive ends
the tunnel.

Nothing of this is on the data path: the vigil looks, now and then, at when something was last heard.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from reflex.net.tunnel import Tunnel
from reflex.protocol.streams import CALLING
from reflex.protocol.wire import Network

log = logging.getLogger(__name__)

QUIET_S: Final = 1.0  # nothing heard for so long, with a request waiting: time to ask
ANSWER_MIN_S: Final = 1.0  # for the answer, however near the peer is: it may be busy
ANSWER_UNKNOWN_S: Final = 3.0  # where no round trip was measured yet
ANSWER_ROUND_TRIPS: Final = 4  # as a retransmission by TCP takes, and some more
RECHECK_S: Final = 0.1  # how often a suspect is looked at


class Vigil:
    """Watches one tunnel of a client.

    Args:
        on_trust: called when a suspect answers: it takes streams again.
    """

    __slots__ = ("_answer_due_s", "_heard_s", "_loop", "_on_trust", "_timer", "_tunnel")

    def __init__(self, loop: asyncio.AbstractEventLoop, tunnel: Tunnel, *, on_trust: Callable[[], None]) -> None:
        self._loop = loop
        self._tunnel = tunnel
        self._on_trust = on_trust
        self._timer: asyncio.TimerHandle | None = None  # runs while calls are unanswered, or the tunnel is suspect
        self._heard_s = 0.0  # when something was last heard, as of the PING
        self._answer_due_s = 0.0

    def called(self) -> None:
        """An OPEN was packed."""
        if self._timer is None:
            session = self._tunnel.session
            if not session.round_trip_is_measured or self._loop.time() - session.heard_s >= QUIET_S:
                self._ask()
            else:
                self._timer = self._loop.call_later(QUIET_S, self._look)

    def distrust(self) -> None:
        """Something happened that may have cost the path: suspect until it answers."""
        tunnel = self._tunnel
        if not tunnel.ended and not tunnel.is_suspect and not tunnel.session.close_sent:
            self.stop()
            self._ask()
            tunnel.is_suspect = True
            self._recheck_later()

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Nobody waits: nothing to do. Else ask, if the tunnel is quiet."""
        self._timer = None
        if self._callers():
            self.called()

    def _callers(self) -> bool:
        return any(stream.state == CALLING for stream in self._tunnel.session.streams.values())

    def _ask(self) -> None:
        session = self._tunnel.session
        session.now_s = self._loop.time()
        self._heard_s = session.heard_s
        session.ping()
        self._tunnel.flush_soon()
        wait_s = ANSWER_UNKNOWN_S
        if session.round_trip_is_measured:
            wait_s = max(ANSWER_MIN_S, ANSWER_ROUND_TRIPS * session.round_trip_s)
        self._answer_due_s = session.now_s + wait_s
        self._timer = self._loop.call_later(wait_s, self._judge)

    @property
    def _has_answered(self) -> bool:
        session = self._tunnel.session
        return session.heard_s != self._heard_s or not session.awaits_pong

    def _judge(self) -> None:
        """The time for an answer is over. Nobody is let go before what has arrived was read: this side may be late."""
        if self._has_answered:
            self._look()
            return
        tunnel = self._tunnel
        log.info("%r does not answer: new streams go elsewhere", tunnel)
        tunnel.is_suspect = True
        self._recheck_later()

    def _recheck(self) -> None:
        """Trust it again where it answered; else let go who still can."""
        tunnel = self._tunnel
        if self._has_answered:
            log.info("%r answers", tunnel)
            tunnel.is_suspect = False
            self._look()
            self._on_trust()
            return
        if self._loop.time() >= self._answer_due_s:
            self._let_callers_go()
        self._recheck_later()

    def _let_callers_go(self) -> None:
        for stream in list(self._tunnel.session.streams.values()):
            if stream.state == CALLING and stream.network == Network.TCP:
                stream.owner.try_elsewhere()

    def _recheck_later(self) -> None:
        self.stop()
        self._timer = self._loop.call_later(RECHECK_S, self._recheck)
