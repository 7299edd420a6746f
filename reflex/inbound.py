"""The server daemon: the story of a connection that arrives.

    app -> SOCKS5 -> relay -> session -> encoder (record sealed) -> TUNNEL -> decoder -> session -> relay -> target

1. A listener accepts; a :class:`Greeting` reads the first bytes and decides whether they are Reflex.
   What is not goes to the fallback web server, or into silence.
2. A hello that passed every check is answered in one write with the session's SETTINGS, and the
   connection becomes a :class:`Tunnel`.
3. Each OPEN on it becomes a :class:`TargetRelay`, which dials the target, answers, and relays.
4. Draining: nothing new is accepted, tunnels say GOAWAY and close with their last stream; what is left
   after ``drain_s`` is reset.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Sequence
from functools import partial

from reflex.config import HostPort, InboundSettings
from reflex.errors import DialError, StartError
from reflex.metrics import Counters, statistics_json
from reflex.net import dial
from reflex.net.greeting import Door, Greeting
from reflex.net.listener import SETTLE_S, Listener, finish_listening
from reflex.net.relay import Relay
from reflex.net.target import Dialling, TargetRelay
from reflex.net.targets import TargetPolicy
from reflex.net.tunnel import CLOSE_WAIT_S, Tunnel
from reflex.protocol.address import Address
from reflex.protocol.events import Event
from reflex.protocol.handshake import AcceptedHello, ServerCredentials
from reflex.protocol.pools import Pools
from reflex.protocol.replay import ReplaySet
from reflex.protocol.session import Session
from reflex.protocol.window import Budget
from reflex.protocol.wire import Code, Status
from reflex.worker import WorkerContext

log = logging.getLogger(__name__)


class Inbound:
    """The server daemon. ``start``, then ``drain`` or ``abort``; see :class:`reflex.daemon.Daemon`.

    Args:
        settings: what inbound.toml says.
        shared: what it shares with the other workers, where it is one of several.
    """

    def __init__(self, settings: InboundSettings, *, shared: WorkerContext | None = None) -> None:
        self._settings = settings
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._pools = Pools()
        self._counters = Counters()
        self._budget = Budget()
        self._names = {user.id.bytes: user.name for user in settings.users}
        self._credentials = ServerCredentials(
            settings.private_key.reveal(), {user.id.bytes: user.key.reveal() for user in settings.users}
        )
        self._replay = ReplaySet(int(time.time())) if shared is None else shared.replay
        self._dialling = Dialling(
            policy=TargetPolicy(settings.targets.allow, settings.targets.deny),
            timeout_s=settings.limits.dial_timeout_s,
            nodelay=settings.tcp.nodelay,
            keepalive_s=settings.tcp.keepalive_s,
        )
        self._door: Door | None = None
        self._listeners: list[Listener] = []
        self._greetings: set[Greeting] = set()
        self._tunnels: set[Tunnel] = set()
        self._relays: set[Relay] = set()
        self._is_draining = False
        self._all_ended = asyncio.Event()

    async def start(self) -> Sequence[str]:
        """Listen. Returns every address; raises StartError, with nothing left listening."""
        settings = self._settings
        self._door = Door(
            loop=self._loop,
            credentials=self._credentials,
            replay=self._replay,
            pools=self._pools,
            counters=self._counters,
            handshake_timeout_s=settings.limits.handshake_timeout_s,
            fallback=None if settings.fallback is None else await _fallback_address(settings.fallback),
            on_hello=self._on_hello,
            on_end=self._on_greeting_end,
        )
        try:
            if self._shared is not None:
                listen = partial(Listener.of_socket, self._loop, on_accept=self._on_accept)
                self._listeners += map(listen, self._shared.sockets)
            else:
                for address in settings.listen:
                    self._listeners.append(Listener(self._loop, address.host, address.port, self._on_accept))
        except StartError:
            self._stop_listening()
            raise
        return [listener.address for listener in self._listeners]

    # 1. A connection arrives.

    def _on_accept(self, sock: socket.socket) -> None:
        if self._connections() >= self._settings.limits.max_connections:
            self._counters.connections_refused += 1
            sock.close()
            return
        self._counters.connections_accepted += 1
        try:
            dial.set_options(sock, nodelay=self._settings.tcp.nodelay, keepalive_s=self._settings.tcp.keepalive_s)
            peer = "%s:%d" % sock.getpeername()[:2]  # noqa: UP031  # two values of a longer tuple
        except OSError:
            sock.close()  # it left before it was looked at
            return
        assert self._door is not None  # noqa: S101  # start() made it before it listened
        self._greetings.add(Greeting(self._door, sock, peer))
        self._publish_connections()

    def _connections(self) -> int:
        """How many there are, in all workers."""
        elsewhere = 0 if self._shared is None else self._shared.connections.elsewhere()
        return len(self._greetings) + len(self._tunnels) + elsewhere

    def _publish_connections(self) -> None:
        if self._shared is not None:
            self._shared.connections.publish(len(self._greetings) + len(self._tunnels))

    def _on_greeting_end(self, greeting: Greeting) -> None:
        self._greetings.discard(greeting)
        self._publish_connections()
        self._check_all_ended()

    # 2. It is Reflex.

    def _on_hello(self, greeting: Greeting, sock: socket.socket, hello: AcceptedHello, rest: memoryview) -> None:
        self._greetings.discard(greeting)
        answer = self._pools.server_hellos.acquire()
        try:
            session = Session.server(
                hello.write_answer(answer, random_bytes=secrets.token_bytes),
                self._pools,
                time_ms=int(time.time() * 1000),
                now_s=self._loop.time(),
                max_streams=self._settings.limits.max_streams,
                budget=self._budget,
            )
            session.seal()
            settings_record = session.output() or memoryview(b"")
            try:
                size = sock.sendmsg([answer, settings_record])
            except OSError:
                size = 0
            if size < len(answer):
                # A fresh connection that does not take 40 bytes is gone.
                session.close_buffers()
                sock.close()
                self._on_greeting_end(greeting)
                return
            session.sent(size - len(answer))
        finally:
            self._pools.server_hellos.release(answer)
        self._counters.handshakes_completed += 1
        label = f"{self._names[hello.user_id]} at {greeting.peer}"
        log.debug("%s: tunnel opened", label)
        tunnel = Tunnel(
            self._loop,
            sock,
            session,
            counters=self._counters,
            idle_timeout_s=self._settings.limits.idle_timeout_s,
            label=label,
            on_end=self._on_tunnel_end,
            on_open=self._on_open,
            on_stream_end=self._on_stream_end,
        )
        self._tunnels.add(tunnel)
        if rest:
            tunnel.feed(rest)

    def _on_tunnel_end(self, tunnel: Tunnel) -> None:
        self._tunnels.discard(tunnel)
        self._publish_connections()
        self._check_all_ended()

    # 3. A stream is opened.

    def _on_open(self, tunnel: Tunnel, event: Event) -> None:
        stream, address = event.stream, event.address
        if stream is None:
            return
        if address is None:
            self._counters.streams_refused += 1
            tunnel.session.refuse(stream, Status.NOT_SUPPORTED)
            tunnel.stream_ended()
            return
        relay = TargetRelay(
            self._loop,
            tunnel,
            stream,
            address,
            self._dialling,
            buffers=self._pools.buffers,
            counters=self._counters,
            on_end=self._on_relay_end,
        )
        if not relay.ended:
            self._relays.add(relay)

    def _on_relay_end(self, relay: Relay) -> None:
        self._relays.discard(relay)
        self._check_all_ended()

    def _on_stream_end(self, tunnel: Tunnel) -> None:
        if self._is_draining and not tunnel.stream_count:
            tunnel.close(Code.SHUTTING_DOWN)

    # 4. The end.

    async def drain(self) -> None:
        """No new work; running streams get ``drain_s``, then they are reset."""
        deadline_s = self._loop.time() + self._settings.limits.drain_s
        await finish_listening(
            self._listeners,
            lambda: not any(greeting.is_undecided for greeting in self._greetings),
            at_most_s=min(SETTLE_S, self._settings.limits.drain_s),
        )
        self._is_draining = True
        self._stop_listening()
        for tunnel in list(self._tunnels):
            tunnel.go_away(Code.SHUTTING_DOWN)
            self._on_stream_end(tunnel)
        for greeting in list(self._greetings):
            if not greeting.is_fallback:
                greeting.end(reset=False)
        self._check_all_ended()
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._all_ended.wait()
        except TimeoutError:
            log.info(
                "%d tunnels still had streams after %g s: reset", len(self._tunnels), self._settings.limits.drain_s
            )
            for greeting in list(self._greetings):
                greeting.end(reset=True)
            for tunnel in list(self._tunnels):
                tunnel.close(Code.SHUTTING_DOWN)
            await self._cut_what_lingers()
        self.report()

    async def _cut_what_lingers(self) -> None:
        """Every tunnel was closed: their peers get a moment to see it, what is left then is cut."""
        for relay in list(self._relays):
            relay.end(reset=True)
        try:
            async with asyncio.timeout(2 * CLOSE_WAIT_S):
                await self._all_ended.wait()
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        """End everything at once."""
        self._stop_listening()
        for greeting in list(self._greetings):
            greeting.end(reset=True)
        for tunnel in list(self._tunnels):
            tunnel.cut("stopped")
        for relay in list(self._relays):
            relay.end(reset=True)

    def report(self) -> None:
        """Log the counters and the pools' figures, as one line of JSON."""
        gauges = {
            "tunnels": len(self._tunnels),
            "streams": sum(tunnel.stream_count for tunnel in self._tunnels),
            "greetings": len(self._greetings),
            "replay_keys": len(self._replay),
            "buffered_bytes": self._budget.buffered,
            "tasks": len(asyncio.all_tasks(self._loop)),
        }
        if self._shared is not None:
            gauges["worker"] = self._shared.number
        log.info("statistics: %s", statistics_json(self._counters, self._pools.statistics(), gauges))

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _check_all_ended(self) -> None:
        if self._is_draining and not (self._tunnels or self._greetings or self._relays):
            self._all_ended.set()


async def _fallback_address(fallback: HostPort) -> Address:
    """The fallback's IP address: a name is resolved once, at the start."""
    try:
        info = (await dial.resolve(fallback.host, fallback.port))[0]
    except DialError as error:
        raise StartError(f"fallback: {error}") from error
    return Address.of(str(info[4][0]), fallback.port)
