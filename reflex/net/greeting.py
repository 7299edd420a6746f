"""The first bytes of a connection at the server: Reflex, or not (docs/protocol.md, sections 2 and 6).

With a fallback, the first read decides: 76 bytes or more that are no HTTP and no TLS and pass every
check are Reflex; anything else, silence until the handshake time-out included, is the web server's.
Without a fallback, 76 bytes are awaited; what fails is read and discarded until the peer leaves, or
the handshake time-out and a random time pass. A failed hello is never answered by a byte, nor by a
close that depends on what was sent.

How long the web server's first answer takes must not tell either what the first bytes were taken for. So
whatever goes there costs the same first: what cannot be a hello is made up for by random bytes that are
judged as one. An address from which too much has failed lately gets neither (:mod:`reflex.net.failures`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from reflex.complaints import Complaints
from reflex.errors import HandshakeError, Replayed
from reflex.loop import drop_reader
from reflex.metrics import Counters
from reflex.net.failures import Failures
from reflex.net.fallback import Fallback
from reflex.net.hangup import Lookout
from reflex.net.silence import Silence
from reflex.protocol.address import Address
from reflex.protocol.handshake import AcceptedHello, ServerCredentials, accept_hello, looks_like_http_or_tls
from reflex.protocol.pools import Pools
from reflex.protocol.replay import ReplayMemory
from reflex.protocol.wire import CLIENT_HELLO_SIZE

log = logging.getLogger(__name__)

FIRST_READ_BYTES: Final = 8_192  # behind the hello: the client's first records, or a browser's request
SILENCE_MAX_MS: Final = 30_000  # of the random time that a failed connection is kept longer
_REFUSED: Final = "%s: hello refused: %s"
_NO_HELLO: Final = "%s: no hello, given to the web server; random bytes in its place: %s"


@dataclass(frozen=True, slots=True)
class Door:
    """What every greeting of one server shares.

    ``on_hello`` is called with a connection whose hello passed every check, the hello, and a view of
    what came behind it (valid during the call); the socket is the callee's. ``on_end`` is called once
    for every connection that did not come to that, when its socket is closed. ``complaints`` are those
    about the fallback, ``lookout`` looks at the connections that it has; ``refusals`` are the complaints
    about authentic hellos, by user and by what is wrong with them. ``names`` are the users', by id, for the log.
    """

    loop: asyncio.AbstractEventLoop
    credentials: ServerCredentials
    replay: ReplayMemory
    pools: Pools
    counters: Counters
    failures: Failures
    complaints: Complaints
    lookout: Lookout
    handshake_timeout_s: float
    fallback: Address | None
    on_hello: Callable[[Greeting, socket.socket, AcceptedHello, memoryview], None]
    on_end: Callable[[Greeting], None]
    names: Mapping[bytes, str] = field(default_factory=dict, repr=False)
    refusals: dict[tuple[bytes, type[HandshakeError], str], Complaints] = field(default_factory=dict, repr=False)

    def log_refusal(self, peer: str, refusal: HandshakeError, *, is_hello: bool) -> None:
        """Log why a hello is refused, or the random bytes in the place of what was none.

        An authentic one is worth a line to the operator. But who has recorded one can send it without end, so
        that of each user and kind one line in a while is a warning, and hides no other.
        """
        user_id = refusal.user_id
        if user_id is None:
            log.debug(_REFUSED if is_hello else _NO_HELLO, peer, refusal)
            return
        # A replay set's words are few; the others' have figures in them that whoever sends a hello can choose.
        kind = str(refusal) if isinstance(refusal, Replayed) else ""
        complaints = self.refusals.setdefault((user_id, type(refusal), kind), Complaints(self.loop.time))
        level = logging.WARNING if complaints.is_due() else logging.DEBUG
        log.log(level, _REFUSED, f"{self.names.get(user_id, 'a user')} at {peer}", refusal)


class Greeting:
    """One accepted connection, until it is known what it is; and for as long as it is not Reflex.

    Args:
        sock: this object's from now on.
        peer: the other end's address, for the log.
        source: what it is counted as where it fails, of :func:`reflex.net.failures.source_of`.
    """

    __slots__ = (
        "_door",
        "_fallback",
        "_hello",
        "_peer",
        "_received",
        "_silence",
        "_sock",
        "_source",
        "_timer",
        "ended",
    )

    def __init__(self, door: Door, sock: socket.socket, peer: str, source: bytes) -> None:
        self._door = door
        self._sock = sock
        self._peer = peer
        self._source = source
        self._hello: memoryview | None = None
        self._received = 0
        self._silence: Silence | None = None
        self._fallback: Fallback | None = None
        self.ended = False
        self._timer = door.loop.call_later(door.handshake_timeout_s, self._on_timeout)
        door.loop.add_reader(sock, self._on_readable)

    @property
    def peer(self) -> str:
        """The other end's address, for the log."""
        return self._peer

    @property
    def is_fallback(self) -> bool:
        """Whether the web server has it."""
        return self._fallback is not None

    @property
    def fallback(self) -> Fallback | None:
        """The connection joined to the web server's, if it is."""
        return self._fallback

    @property
    def is_undecided(self) -> bool:
        """Whether it has not been decided yet what it is, so that its bytes are awaited."""
        return not (self.ended or self._silence is not None or self._fallback is not None)

    def _on_readable(self) -> None:
        pools = self._door.pools
        if self._hello is None:
            self._hello = pools.client_hellos.acquire()
        rest = pools.buffers.acquire(FIRST_READ_BYTES)
        rest_size = 0
        try:
            try:
                size = self._sock.recvmsg_into([self._hello[self._received :], rest])[0]
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.end(reset=False)
                return
            missing = CLIENT_HELLO_SIZE - self._received
            rest_size = max(0, size - missing)
            self._received += size - rest_size
            self._decide(self._hello, rest[:rest_size], read_ended=size == 0)
        finally:
            pools.buffers.release(rest, rest_size)
            if self._received in (0, CLIENT_HELLO_SIZE) or self.ended or self._fallback:
                self._drop_hello()

    def _drop_hello(self) -> None:
        if self._hello is not None:
            self._door.pools.client_hellos.release(self._hello)
            self._hello = None

    def _decide(self, hello: memoryview, rest: memoryview, *, read_ended: bool) -> None:
        door = self._door
        received = self._received
        if door.fallback is None and received < CLIENT_HELLO_SIZE:
            if read_ended:
                self.end(reset=False)
            return  # more is awaited
        is_hello = received == CLIENT_HELLO_SIZE and not (looks_like_http_or_tls(hello) and door.fallback is not None)
        verdict = self._judge(bytes(hello), is_hello=is_hello) if received else None
        if isinstance(verdict, AcceptedHello):
            self._leave()
            door.loop.remove_reader(self._sock)
            door.on_hello(self, self._sock, verdict, rest)
            return
        if door.fallback is not None:
            self._give_to_fallback(door.fallback, hello[:received], rest, read_ended=read_ended)
        else:
            self._discard_for(max(0.0, self._timer.when() - door.loop.time()))
        if verdict is not None:
            # Only now, when the web server has the bytes.
            door.counters.handshakes_failed += is_hello
            door.log_refusal(self._peer, verdict, is_hello=is_hello)

    def _judge(self, hello: bytes, *, is_hello: bool) -> AcceptedHello | HandshakeError | None:
        """Whether it passes, or why not; for what is no hello, why random bytes do not; None where nothing is tried.

        Up to the tag the same is done for each of them, to the last copy: what takes a microsecond longer
        is seen in ten thousand probes.
        """
        door = self._door
        now_s = door.loop.time()
        if door.failures.is_over(self._source, now_s):
            door.counters.hellos_not_tried += 1
            log.debug("%s: not tried as a hello: too many have failed from its address", self._peer)
            return None
        stand_in = secrets.token_bytes(CLIENT_HELLO_SIZE)
        try:
            return accept_hello(
                hello if is_hello else stand_in,
                door.credentials,
                now_s=int(time.time()),
                replay=door.replay,
                random_bytes=secrets.token_bytes,
            )
        except HandshakeError as error:
            door.failures.count(self._source, now_s)
            return error

    def _leave(self) -> None:
        """The connection stops being this object's."""
        self.ended = True
        self._timer.cancel()

    def _give_to_fallback(self, address: Address, hello: memoryview, rest: memoryview, *, read_ended: bool) -> None:
        door = self._door
        door.counters.fallbacks += 1
        self._timer.cancel()
        buffers = door.pools.buffers
        size = len(hello) + len(rest)
        first = buffers.acquire(size)
        try:
            first[: len(hello)] = hello
            first[len(hello) : size] = rest
            self._fallback = Fallback(
                door.loop,
                self._sock,
                address,
                first[:size],
                buffers=buffers,
                complaints=door.complaints,
                lookout=door.lookout,
                on_end=self._on_fallback_end,
                read_ended=read_ended,
            )
        finally:
            buffers.release(first, size)

    def _on_fallback_end(self, fallback: Fallback) -> None:
        del fallback
        self.ended = True
        self._door.on_end(self)

    def _on_timeout(self) -> None:
        if self._door.fallback is not None:
            self._give_to_fallback(self._door.fallback, _NOTHING, _NOTHING, read_ended=False)
        else:
            self._discard_for(0.0)

    def _discard_for(self, at_least_s: float) -> None:
        """It is not Reflex, and nobody takes it: read and discard, for so long and a random time."""
        loop = self._door.loop
        self._drop_hello()
        self._timer.cancel()
        wait_s = at_least_s + secrets.randbelow(SILENCE_MAX_MS + 1) / 1000
        self._silence = Silence(loop, self._sock, wait_s=wait_s, on_end=self._on_silence_end)

    def _on_silence_end(self) -> None:
        self._silence = None
        self.ended = True
        self._door.on_end(self)

    def end(self, *, reset: bool) -> None:
        """Close the connection. Once; then nothing."""
        if self.ended:
            return
        if self._fallback is not None:
            self._fallback.end(reset=reset)
            return
        if self._silence is not None:
            self._silence.end()
            return
        self._leave()
        self._drop_hello()
        drop_reader(self._door.loop, self._sock.fileno())
        self._sock.close()
        self._door.on_end(self)


_NOTHING: Final = memoryview(b"")
