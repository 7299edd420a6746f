"""The server daemon: the story of a connection that arrives.

    app -> SOCKS5 -> relay -> session -> encoder (record sealed) -> TUNNEL -> decoder -> session -> relay -> target

1. A listener accepts; a :class:`Greeting` reads the first bytes and decides whether they are Reflex.
   What is not goes to the fallback web server, or into silence. At the limit of connections the oldest
   greeting gives way to the new connection, so that strangers cannot lock users out.
2. A hello that passed every check is answered in one write with the session's SETTINGS, and the
   connection becomes a :class:`Tunnel`.
3. Each OPEN on it becomes a :class:`TargetRelay`, which dials the target, answers, and relays.
   A user that has limits of its own is asked first: :class:`UserLimits`.
4. Draining: nothing new is accepted, tunnels say GOAWAY and close with their last stream, what is idle at the
   fallback is ended; what is left after ``drain_s`` is reset.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Final
from weakref import WeakValueDictionary

from reflex.complaints import Complaints, Throttle
from reflex.config import InboundSettings
from reflex.metrics import Counters, statistics_json
from reflex.net.failures import Failures, source_of
from reflex.net.fallback import Fallback, end_idle
from reflex.net.greeting import Door, Greeting
from reflex.net.hangup import Lookout
from reflex.net.limits import UserLimits
from reflex.net.listener import SETTLE_S, Listener, finish_listening, open_listening
from reflex.net.options import is_loopback, set_unpaced
from reflex.net.pressure import Pressure
from reflex.net.relay import Relay
from reflex.net.room import Room
from reflex.net.talk import Talk
from reflex.net.target import Dialling, DialQueue, TargetRelay
from reflex.net.targets import TargetPolicy
from reflex.net.trimmer import Trimmer
from reflex.net.tunnel import CLOSE_WAIT_S, Tunnel
from reflex.net.web_server import web_server_address
from reflex.protocol.address import Address
from reflex.protocol.events import Event
from reflex.protocol.handshake import AcceptedHello, ServerCredentials
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.window import Budget
from reflex.protocol.wire import Code, Status
from reflex.saved_replay import SavedReplaySet
from reflex.slots import close_all
from reflex.users import Users
from reflex.worker import WorkerContext

log = logging.getLogger(__name__)

# A stranger costs up to a quarter of a millisecond: after so many it is the tunnels' turn again, so that a flood
# which takes all of the processor leaves each of them a read every two milliseconds.
ACCEPTS_PER_TURN: Final = 8


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
        self._budget = Budget(buffered_limit=settings.limits.buffered_bytes)
        self._pressure = Pressure(self._budget, "new streams are refused")
        self._users = Users(self._loop, settings, self._budget, shared=shared, has_tunnels=lambda: bool(self._tunnels))
        self._credentials = ServerCredentials(
            settings.private_key.reveal(), {user.id.bytes: user.key.reveal() for user in settings.users}
        )
        self._replay = SavedReplaySet(settings.replay_file) if shared is None else shared.replay
        self._dialling = Dialling(
            policy=TargetPolicy(settings.targets.allow, settings.targets.deny),
            timeout_s=settings.limits.dial_timeout_s,
            nodelay=settings.tcp.nodelay,
            keepalive_s=settings.tcp.keepalive_s,
        )
        self._door: Door | None = None
        self._listeners: list[Listener] = []
        self._greetings: OrderedDict[Greeting, None] = OrderedDict()  # in the order of their arrival
        self._tunnels: dict[Tunnel, DialQueue] = {}
        self._dial_queues: WeakValueDictionary[bytes, DialQueue] = WeakValueDictionary()  # of users with tunnels
        self._talk = Talk()
        self._room = Room(
            settings.limits.max_connections, self._greetings, self._tunnels, counters=self._counters, shared=shared
        )
        self._relays: set[Relay] = set()
        self._complaints = Complaints(self._loop.time)  # about new connections that are closed
        self._throttles: dict[bytes, Throttle] = {}  # by user id
        self._is_draining = False
        self._all_ended = asyncio.Event()
        self._trimmer = Trimmer(self._loop, self._pools.buffers)

    async def start(self) -> Sequence[str]:
        """Listen. Returns every address; raises StartError, with nothing left listening."""
        settings = self._settings
        fallback = settings.fallback
        web_server: Address | None = None
        sockets: list[socket.socket] = []
        try:
            self._users.start()
            if self._shared is None:
                for address in settings.listen:
                    sockets.append(open_listening(address.host, address.port))
            else:
                sockets += self._shared.sockets
            if fallback is not None:
                web_server = await web_server_address(fallback.host, fallback.port, sockets)
            self._door = Door(
                loop=self._loop,
                credentials=self._credentials,
                replay=self._replay,
                pools=self._pools,
                counters=self._counters,
                failures=Failures(),
                complaints=Complaints(),
                lookout=Lookout(self._loop),
                handshake_timeout_s=settings.limits.handshake_timeout_s,
                fallback=web_server,
                on_hello=self._on_hello,
                on_end=self._on_greeting_end,
                names=self._users.names,
            )
        except BaseException:
            close_all(sockets)
            self._replay.close()
            await self._users.close()
            raise
        for sock in sockets:
            listener = Listener(
                self._loop, sock, self._on_accept, self._on_accept_pause, accepts_per_turn=ACCEPTS_PER_TURN
            )
            self._listeners.append(listener)
            listener.set_options(nodelay=settings.tcp.nodelay, keepalive_s=settings.tcp.keepalive_s)
        return [listener.address for listener in self._listeners]

    # 1. A connection arrives.

    def _on_accept(self, sock: socket.socket) -> None:
        if not self._room.has_room():
            self._counters.connections_refused += 1
            sock.close()
            if self._complaints.is_due():
                limit = self._settings.limits.max_connections
                log.warning("new connections are closed: users have all %d (limits.max_connections)", limit)
            return
        self._counters.connections_accepted += 1
        try:
            host, port = sock.getpeername()[:2]
            if is_loopback(host):
                set_unpaced(sock)
        except OSError:
            sock.close()  # it left before it was looked at
            return
        assert self._door is not None  # noqa: S101  # start() made it before it listened
        self._greetings[Greeting(self._door, sock, f"{host}:{port}", source_of(host))] = None
        self._room.publish()

    def _on_accept_pause(self) -> None:
        self._counters.accept_pauses += 1

    def _on_greeting_end(self, greeting: Greeting) -> None:
        self._greetings.pop(greeting, None)
        self._room.publish()
        self._check_all_ended()

    # 2. It is Reflex.

    def _on_hello(self, greeting: Greeting, sock: socket.socket, hello: AcceptedHello, rest: memoryview) -> None:
        del self._greetings[greeting]
        user = self._users.limits.get(hello.user_id)
        max_streams = self._settings.limits.max_streams
        is_allowed = user is None or user.take_tunnel()
        answer = self._pools.server_hellos.acquire()
        try:
            session = Session.server(
                hello.write_answer(answer, random_bytes=secrets.token_bytes),
                self._pools,
                time_ms=int(time.time() * 1000),
                now_s=self._loop.time(),
                max_streams=max_streams if user is None else user.tunnel_streams(max_streams),
                share=self._users.shares[hello.user_id],
            )
            if not is_allowed:  # in one write with the SETTINGS, so that the client opens no stream first
                session.go_away(Code.LIMIT)
                session.close(Code.LIMIT)
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
                if user is not None and is_allowed:
                    user.give_tunnel()
                self._on_greeting_end(greeting)
                return
            session.sent(size - len(answer))
        finally:
            self._pools.server_hellos.release(answer)
        self._counters.handshakes_completed += 1
        label = f"{self._users.names[hello.user_id]} at {greeting.peer}"
        log.debug("%s: tunnel opened", label)
        tunnel = Tunnel(
            self._loop,
            sock,
            session,
            counters=self._counters,
            idle_timeout_s=self._settings.limits.idle_timeout_s,
            label=label,
            talk=self._talk,
            throttle=self._throttles.setdefault(hello.user_id, Throttle(self._loop.time)),
            on_end=self._on_tunnel_end if user is None else partial(self._on_tunnel_end, user=user),
            on_open=self._on_open if user is None else partial(self._on_open, user=user),
            on_stream_end=self._on_stream_end,
            on_discard=self._room.discard,
        )
        self._tunnels[tunnel] = self._dial_queues.setdefault(hello.user_id, DialQueue(self._loop))
        if not is_allowed:
            self._room.turned_away[tunnel] = None
        elif user is not None:
            user.add(tunnel)
        self._room.publish()
        if rest:
            tunnel.feed(rest)

    def _on_tunnel_end(self, tunnel: Tunnel, *, user: UserLimits | None = None) -> None:
        del self._tunnels[tunnel]
        self._room.turned_away.pop(tunnel, None)
        if user is not None:
            user.remove(tunnel)
        self._room.publish()
        self._check_all_ended()

    # 3. A stream is opened.

    def _on_open(self, tunnel: Tunnel, event: Event, *, user: UserLimits | None = None) -> None:
        stream, address = event.stream, event.address
        if stream is None:
            return
        if address is None:
            self._counters.streams_refused += 1
            tunnel.session.refuse(stream, Status.NOT_SUPPORTED)
            tunnel.stream_ended()
            return
        # Relays that still deliver what had arrived hold a socket each: they count, though their streams have ended.
        is_full = tunnel.stream_count + len(tunnel.draining) > self._settings.limits.max_streams
        if is_full or self._pressure.is_high():
            self._counters.streams_refused += 1
            tunnel.session.reset(stream, Code.LIMIT)
            tunnel.stream_ended()
            return
        delay_s = 0.0
        if user is not None:
            admitted = user.admit(tunnel, stream)
            if admitted is None:
                return
            delay_s = admitted
        make_relay = TargetRelay if user is None else user.make_relay
        relay = make_relay(
            self._loop,
            tunnel,
            stream,
            address,
            self._dialling,
            buffers=self._pools.buffers,
            counters=self._counters if user is None else user.counters,
            on_end=self._on_relay_end if user is None else partial(self._on_limited_relay_end, user),
            delay_s=delay_s,
        )
        self._relays.add(relay)
        if user is not None:
            user.add_relay(relay)
        self._tunnels[tunnel].add(relay)

    def _on_relay_end(self, relay: Relay) -> None:
        self._relays.discard(relay)
        self._check_all_ended()

    def _on_limited_relay_end(self, user: UserLimits, relay: TargetRelay) -> None:
        user.remove_relay(relay)
        self._on_relay_end(relay)

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
        self._replay.close()
        self._check_all_ended()
        try:
            async with asyncio.timeout_at(deadline_s):
                await end_idle(self._fallbacks, self._all_ended)
        except TimeoutError:
            log.info(
                "%d tunnels, %d connections to targets and %d to the web server had not ended after %g s: reset",
                len(self._tunnels),
                len(self._relays),
                len(self._fallbacks()),
                self._settings.limits.drain_s,
            )
            for greeting in list(self._greetings):
                greeting.end(reset=True)
            for tunnel in list(self._tunnels):
                tunnel.close(Code.SHUTTING_DOWN)
            await self._cut_what_lingers()
        self._trimmer.stop()
        await self._users.close()
        self.report()

    def _fallbacks(self) -> list[Fallback]:
        return [greeting.fallback for greeting in self._greetings if greeting.fallback is not None]

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
        self._trimmer.stop()
        for greeting in list(self._greetings):
            greeting.end(reset=True)
        for tunnel in list(self._tunnels):
            tunnel.cut("stopped")
        for relay in list(self._relays):
            relay.end(reset=True)
        self._replay.close()
        self._users.close_now()

    def report(self) -> None:
        """Log the counters and the pools' figures, as one line of JSON."""
        gauges = {
            "tunnels": len(self._tunnels),
            "streams": sum(tunnel.stream_count for tunnel in self._tunnels),
            "relays": len(self._relays),
            "greetings": len(self._greetings),
            "replay_keys": len(self._replay),
            "buffered_bytes": self._budget.kept,
            "buffered_bytes_high_water": self._budget.high_water,
            "look_ups": self._dialling.resolver.running,
            "look_ups_waiting": self._dialling.resolver.waiting,
            "tasks": len(asyncio.all_tasks(self._loop)),
        }
        if self._shared is not None:
            gauges["worker"] = self._shared.number
        counters = self._counters.with_all(user.counters for user in self._users.limits.values())
        log.info("statistics: %s", statistics_json(counters, self._pools.statistics(), gauges))

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _check_all_ended(self) -> None:
        if self._is_draining and not (self._tunnels or self._greetings or self._relays):
            self._all_ended.set()
