"""A server as its client sees it: how to make a tunnel to it, and what to say where that fails."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import socket
import time
from functools import partial
from typing import Final

from reflex.errors import AuthenticationFailed, DialError, TunnelError
from reflex.net.clock import ask_date, boot_time_s
from reflex.net.dial import dial, is_own_fault
from reflex.net.resolver import Resolver
from reflex.protocol.address import Address
from reflex.protocol.handshake import ClientCredentials, ClientHandshake, SessionSecrets
from reflex.protocol.pools import Pools
from reflex.protocol.wire import HELLO_TIME_LIMIT_S, Suite

log = logging.getLogger(__name__)

MAX_CLOCK_SHIFT_S: Final = 24 * 3600  # docs/protocol.md, section 6: what a Date may shift a hello by
CLOCK_NOTE_S: Final = 60  # a clock that is off by more is worth a warning
FIRST_DELAY_S: Final = 0.2  # between attempts; doubles with every failure
MAX_DELAY_S: Final = 4.0
MAX_DOUBLINGS: Final = 16  # far above what leads to MAX_DELAY_S
STEADY_S: Final = 10.0  # a session that lasted so long did not break because of how it began


class Server:
    """One server: where it is, who we are there, how often it failed.

    Args:
        address: where it listens.
        credentials: of this client with it.
        suite: the cipher to ask for.
        pools: where the hellos' buffers are borrowed.
        connect_timeout_s: for the TCP connection.
        handshake_timeout_s: for the server's answer.
        resolver: for its name; every server has its share of the threads.
    """

    def __init__(
        self,
        address: Address,
        credentials: ClientCredentials,
        suite: Suite,
        *,
        pools: Pools,
        connect_timeout_s: float,
        handshake_timeout_s: float,
        nodelay: bool,
        keepalive_s: int,
        resolver: Resolver | None = None,
    ) -> None:
        self.address = address
        self._credentials = credentials
        self._suite = suite
        self._pools = pools
        self._connect_timeout_s = connect_timeout_s
        self._handshake_timeout_s = handshake_timeout_s
        self._nodelay = nodelay
        self._keepalive_s = keepalive_s
        self._resolver = resolver or Resolver()
        self._failures = 0
        self._is_own_fault = False  # that the last attempt failed
        self.not_before_s = 0.0  # loop time of the next attempt
        self._breaks = 0  # sessions in a row that a protocol error ended, soon after they began
        self._broke_s = -math.inf  # when the last one did
        # The server's time as the boot clock tells it: what was learnt holds when this machine's clock is set.
        self._boot_to_server_s: float | None = None
        self._goes_by_own_clock = False  # what was learnt did not help: try without, and with it, in turn

    # How often to try.

    def succeeded(self) -> None:
        """It answered: the next attempt need not wait."""
        self._failures = 0
        self.not_before_s = 0.0

    def failed(self, now_s: float) -> None:
        """It did not: the next attempt waits, longer each time, and not in step with other clients'.

        Where this machine had no descriptor left, the server is not to blame, and waiting longer helps nobody.
        """
        doublings = 0
        if not self._is_own_fault:
            doublings = self._failures
            self._failures = min(self._failures + 1, MAX_DOUBLINGS)
        self._leave_alone(now_s, doublings)

    def broke(self, now_s: float, began_s: float) -> None:
        """A session with it ended by a protocol error.

        Once may be bad luck. When the next one breaks as well, soon after it began, the server is left alone as if
        it had not answered. Sessions that were there already when another one broke tell nothing new.

        Args:
            began_s: when that session began, by the clock of ``now_s``.
        """
        if began_s <= self._broke_s:
            return
        self._broke_s = now_s
        self._breaks = min(self._breaks + 1, MAX_DOUBLINGS) if now_s - began_s < STEADY_S else 1
        if self._breaks > 1:
            self._leave_alone(now_s, self._breaks - 2)

    def ended_well(self, began_s: float) -> None:
        """A session with it came to a clean end; ``began_s`` as of :meth:`broke`."""
        if began_s > self._broke_s:
            self._breaks = 0

    def _leave_alone(self, now_s: float, doublings: int) -> None:
        delay_s = min(FIRST_DELAY_S * 2**doublings, MAX_DELAY_S)
        # A tunnel that breaks at once is a failure of the dial as well: the longer time holds.
        self.not_before_s = max(self.not_before_s, now_s + delay_s * (0.5 + secrets.randbelow(501) / 1000))

    # Making a tunnel.

    async def connect(self) -> tuple[socket.socket, SessionSecrets]:
        """Connect and shake hands.

        Returns:
            The socket, non-blocking, with nothing read behind the server's hello; and the secrets.

        Raises:
            TunnelError: its text says what is wrong, for the log.
        """
        used_s = self._hello_shift_s
        try:
            return await self._attempt(used_s)
        except _NotAnswered as error:
            shift_s = await self._shift_by_date()
            if shift_s is None:
                if abs(self._learnt_shift_s) > CLOCK_NOTE_S:
                    self._goes_by_own_clock = not self._goes_by_own_clock
                raise TunnelError(f"{error}; {self._advice()}") from None
            is_near = abs(shift_s) <= HELLO_TIME_LIMIT_S
            keys_are_wrong = "so the server's public key, the user id or the user key is wrong"
            agree = f"; the clocks agree within {HELLO_TIME_LIMIT_S} s, "
            why = (agree if is_near else ", nor with the time corrected, ") + keys_are_wrong
            # A hello that is a little late matters to a server that started just now: it refuses those
            # from before its start. One that is a little ahead never does. What was learnt may be wrong by now.
            if 0 <= used_s - shift_s <= HELLO_TIME_LIMIT_S:
                raise TunnelError(f"{error}{why}") from None
            if not is_near:
                log.warning(
                    "%s: this machine's clock is %d s %s the server's (by its web server's Date)",
                    self.address,
                    abs(shift_s),
                    "behind" if shift_s > 0 else "ahead of",
                )
            if abs(shift_s) > MAX_CLOCK_SHIFT_S:
                raise TunnelError(
                    f"{error}; this machine's clock is off by {-shift_s:+d} s, too much to make up for: set it right"
                ) from None
            # A Date is cut to whole seconds: rather a second ahead than from before a server's start.
            new_s = shift_s if is_near else shift_s + 1
            try:
                made = await self._attempt(new_s)
            except _NotAnswered as again:
                raise TunnelError(f"{again}{why}") from None
            self._learn_shift(new_s)  # only now: anybody on the way can tell a Date
            return made

    def _advice(self) -> str:
        return (
            "the server's public key, the user id or the user key is wrong, or this machine's clock is off by"
            f" more than {HELLO_TIME_LIMIT_S} s (it says {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC)"
        )

    async def _attempt(self, shift_s: int) -> tuple[socket.socket, SessionSecrets]:
        """Connect, and shake hands with a hello of a time so far ahead of this machine's."""
        try:
            sock = await dial(
                self.address,
                timeout_s=self._connect_timeout_s,
                nodelay=self._nodelay,
                keepalive_s=self._keepalive_s,
                look_up=partial(self._resolver.resolve, self),
            )
        except DialError as error:
            self._is_own_fault = is_own_fault(error)
            raise TunnelError(f"cannot connect to the server: {error}") from None
        self._is_own_fault = False
        try:
            async with asyncio.timeout(self._handshake_timeout_s):
                return sock, await self._shake_hands(sock, shift_s)
        except TimeoutError:
            sock.close()
            raise _NotAnswered(f"the server did not answer the hello within {self._handshake_timeout_s:g} s") from None
        except BaseException:
            sock.close()
            raise

    async def _shake_hands(self, sock: socket.socket, shift_s: int) -> SessionSecrets:
        loop = asyncio.get_running_loop()
        handshake = ClientHandshake(
            self._credentials,
            suite=self._suite,
            time_s=int(time.time()) + shift_s,
            random_bytes=secrets.token_bytes,
        )
        hello = self._pools.client_hellos.acquire()
        answer = self._pools.server_hellos.acquire()
        try:
            handshake.write_hello(hello)
            try:
                await loop.sock_sendall(sock, hello)
                received = 0
                while received < len(answer):
                    size = await loop.sock_recv_into(sock, answer[received:])
                    if not size:
                        raise _NotAnswered("the server closed the connection instead of answering the hello")
                    received += size
            except OSError as error:
                raise _NotAnswered(f"the connection was lost during the handshake: {error.strerror or error}") from None
            try:
                return handshake.read_answer(answer)
            except AuthenticationFailed:
                raise _NotAnswered("what answers at the server's address is not that server's Reflex") from None
        finally:
            self._pools.client_hellos.release(hello)
            self._pools.server_hellos.release(answer)

    async def _shift_by_date(self) -> int | None:
        """How far the server's clock is ahead of ours, by its web server's Date; None where it tells none."""
        date_s = await ask_date(
            self.address,
            timeout_s=min(3.0, self._connect_timeout_s),
            look_up=partial(self._resolver.resolve, self),
        )
        return None if date_s is None else date_s - int(time.time())

    def learn_time(self, peer_time_ms: int) -> None:
        """The server's authenticated time arrived (SETTINGS): later hellos use it."""
        shift_s = round(peer_time_ms / 1000 - time.time())
        if abs(shift_s) > CLOCK_NOTE_S:
            log.warning(
                "%s: this machine's clock is %d s %s the server's",
                self.address,
                abs(shift_s),
                "behind" if shift_s > 0 else "ahead of",
            )
        if abs(shift_s) <= MAX_CLOCK_SHIFT_S:
            self._learn_shift(shift_s)

    def _learn_shift(self, shift_s: int) -> None:
        self._boot_to_server_s = time.time() + shift_s - boot_time_s()
        self._goes_by_own_clock = False

    @property
    def _learnt_shift_s(self) -> int:
        """How far the server's clock is ahead of ours now, by what was learnt of it; 0 where nothing was."""
        if self._boot_to_server_s is None:
            return 0
        return round(boot_time_s() + self._boot_to_server_s - time.time())

    @property
    def _hello_shift_s(self) -> int:
        """How far the next hello's time is ahead of this machine's."""
        return 0 if self._goes_by_own_clock else self._learnt_shift_s


class _NotAnswered(Exception):  # never leaves this module
    """The hello was not answered as it should be: keys or clock are wrong, or it is another server."""
