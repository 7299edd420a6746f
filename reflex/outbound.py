"""The client daemon: the story of a connection that leaves.

    app -> SOCKS5 -> relay -> session -> encoder (record sealed) -> TUNNEL -> decoder -> session -> relay -> target

1. A listener accepts an application; a :class:`Visitor` learns where it wants to go.
2. The :class:`Connector` gives it a tunnel: one that is kept and has room, or a new one, which is
   dialled and shakes hands.
3. The visitor opens a stream and becomes its :class:`DoorRelay`.
4. A tunnel whose last stream has ended is kept for the next, for a while.
5. Draining: nothing new is accepted; tunnels close with their last stream; what is left after
   ``drain_s`` is reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from reflex.complaints import Complaints
from reflex.config import ListenSettings, OutboundSettings, ServerSettings
from reflex.errors import ConfigError, StartError
from reflex.metrics import Counters, statistics_json
from reflex.net.clock import WakeWatch
from reflex.net.connector import Connector
from reflex.net.doors import Door, Visitor
from reflex.net.listener import SETTLE_S, Listener, finish_listening, open_listening
from reflex.net.pressure import Pressure
from reflex.net.resolver import Resolver
from reflex.net.server import Server
from reflex.net.talk import Talk
from reflex.net.trimmer import Trimmer
from reflex.net.tunnel import CLOSE_WAIT_S, Tunnel
from reflex.net.tunnels import TunnelPool
from reflex.net.vigil import Vigil
from reflex.protocol.address import Address
from reflex.protocol.handshake import ClientCredentials, SessionSecrets
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.share import Share
from reflex.protocol.window import Budget
from reflex.protocol.wire import Code, Suite
from reflex.worker import WorkerContext

log = logging.getLogger(__name__)

EXPIRY_INTERVAL_S: Final = 1.0  # how often idle tunnels are looked at
_AES_FLAGS: Final = ("aes", "pmull")  # x86's AES-NI; ARMv8's, where GCM needs both AES and PMULL


class Outbound:
    """The client daemon. ``start``, then ``drain`` or ``abort``; see :class:`reflex.daemon.Daemon`.

    Args:
        settings: what outbound.toml says.
        shared: what it shares with the other workers, where it is one of several.
    """

    def __init__(self, settings: OutboundSettings, *, shared: WorkerContext | None = None) -> None:
        self._settings = settings
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._pools = Pools()
        self._counters = Counters()
        self._budget = Budget(buffered_limit=settings.limits.buffered_bytes)
        self._share = Share(self._budget, is_whole=True)
        self._pressure = Pressure(self._budget, "local connections are refused")
        self._resolver = Resolver()
        self._talk = Talk()
        self._tunnels: TunnelPool[Tunnel] = TunnelPool(
            min_idle=settings.pool.min_idle,
            max_idle=settings.pool.max_idle,
            idle_timeout_s=settings.pool.idle_timeout_s,
            max_streams=settings.pool.max_streams,
        )
        self._connector = Connector(
            self._loop,
            [self._server(each, position) for position, each in enumerate(settings.servers)],
            self._tunnels,
            self._make_tunnel,
            max_tunnels=settings.pool.max_tunnels,
            max_streams=settings.pool.max_streams,
            patience_s=settings.limits.connect_timeout_s + settings.limits.handshake_timeout_s,  # of one dial
            wait_settled=self._wait_settled,
        )
        self._listeners: list[Listener] = []
        self._visitors: set[Visitor] = set()
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._wake_watch = WakeWatch()
        self._complaints = Complaints(self._loop.time)  # about local connections that are closed
        self._is_draining = False
        self._all_ended = asyncio.Event()
        self._trimmer = Trimmer(self._loop, self._pools.buffers)

    def _server(self, server: ServerSettings, position: int) -> Server:
        try:
            credentials = ClientCredentials(server.public_key, server.user_id.bytes, server.user_key.reveal())
        except ConfigError as error:
            raise StartError(f"servers[{position}]: {error}") from None
        return Server(
            Address.of(server.address.host, server.address.port),
            credentials,
            cipher_suite(server.cipher),
            pools=self._pools,
            connect_timeout_s=self._settings.limits.connect_timeout_s,
            handshake_timeout_s=self._settings.limits.handshake_timeout_s,
            nodelay=self._settings.tcp.nodelay,
            keepalive_s=self._settings.tcp.keepalive_s,
            resolver=self._resolver,
        )

    async def start(self) -> Sequence[str]:
        """Listen. Returns every address; raises StartError, with nothing left listening."""
        try:
            for position, listen in enumerate(self._settings.listen):
                if self._shared is None:
                    sock = open_listening(listen.address.host, listen.address.port)
                else:
                    sock = self._shared.sockets[position]
                listener = Listener(self._loop, sock, self._accepter(listen), self._on_accept_pause)
                self._listeners.append(listener)
                listener.set_options(
                    nodelay=self._settings.tcp.nodelay,
                    keepalive_s=self._settings.tcp.keepalive_s,
                    reset_on_close=listen.target is not None,  # a forward is a stream from the start
                )
        except StartError:
            self._stop_listening()
            raise
        self._expiry_timer = self._loop.call_later(EXPIRY_INTERVAL_S, self._expire)
        self._connector.keep_warm()
        return [listener.address for listener in self._listeners]

    # 1. An application arrives.

    def _accepter(self, listen: ListenSettings) -> Callable[[socket.socket], None]:
        credentials = None
        if listen.username is not None and listen.password is not None:
            credentials = (listen.username.encode(), listen.password.reveal())
        target = None if listen.target is None else Address.of(listen.target.host, listen.target.port)
        door = Door(
            loop=self._loop,
            connector=self._connector,
            buffers=self._pools.buffers,
            counters=self._counters,
            greeting_timeout_s=self._settings.limits.handshake_timeout_s,
            target=target,
            credentials=credentials,
            pressure=self._pressure,
            on_end=self._on_visitor_end,
        )
        return partial(self._on_accept, door)

    def _on_accept(self, door: Door, sock: socket.socket) -> None:
        if self._connections() >= self._settings.limits.max_connections:
            self._counters.connections_refused += 1
            sock.close()
            if self._complaints.is_due():
                limit = self._settings.limits.max_connections
                log.warning("local connections are closed: there are %d already (limits.max_connections)", limit)
            return
        self._counters.connections_accepted += 1
        visitor = Visitor(door, sock)
        if not visitor.ended:
            self._visitors.add(visitor)
            self._publish_connections()

    def _on_accept_pause(self) -> None:
        self._counters.accept_pauses += 1

    def _connections(self) -> int:
        """How many there are, in all workers."""
        elsewhere = 0 if self._shared is None else self._shared.connections.elsewhere()
        return len(self._visitors) + elsewhere

    def _publish_connections(self) -> None:
        if self._shared is not None:
            self._shared.connections.publish(len(self._visitors))

    def _on_visitor_end(self, visitor: Visitor) -> None:
        self._visitors.discard(visitor)
        self._publish_connections()
        self._check_all_ended()

    # 2. It needs a tunnel.

    def _make_tunnel(self, server: Server, sock: socket.socket, secrets: SessionSecrets) -> Tunnel:
        began_s = self._loop.time()
        session = Session.client(
            secrets,
            self._pools,
            time_ms=int(time.time() * 1000),
            now_s=began_s,
            share=self._share,
        )
        tunnel = Tunnel(
            self._loop,
            sock,
            session,
            counters=self._counters,
            idle_timeout_s=self._settings.limits.idle_timeout_s,
            label=str(server.address),
            talk=self._talk,
            on_end=partial(self._on_tunnel_end, server, began_s),
            on_settings=server.learn_time,
            on_stream_end=self._on_stream_end,
            on_broken=lambda: server.broke(self._loop.time(), began_s),
        )
        tunnel.vigil = Vigil(self._loop, tunnel, on_trust=self._connector.room_was_made)
        self._counters.handshakes_completed += 1
        self._tunnels.add(server, tunnel)
        log.debug("%s: tunnel opened", server.address)
        return tunnel

    async def _wait_settled(self, tunnel: Tunnel) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.limits.handshake_timeout_s):
                await tunnel.settled.wait()

    def _on_tunnel_end(self, server: Server, began_s: float, tunnel: Tunnel) -> None:
        if tunnel.vigil is not None:
            tunnel.vigil.stop()
        if tunnel.is_closed_cleanly:
            server.ended_well(began_s)
        self._tunnels.remove(server, tunnel)
        self._check_all_ended()

    # 4. A stream has ended; its tunnel is kept.

    def _on_stream_end(self, tunnel: Tunnel) -> None:
        self._tunnels.release(tunnel, self._loop.time())
        if not tunnel.stream_count and (self._is_draining or not tunnel.has_room):
            tunnel.close(Code.NONE)
        else:
            self._connector.room_was_made()

    def _expire(self) -> None:
        slept_s = self._wake_watch.slept_s(EXPIRY_INTERVAL_S)
        if slept_s:
            log.info("%.0f s are missing, by the clock: every tunnel is asked whether it still answers", slept_s)
            for tunnel in self._tunnels:
                if tunnel.vigil is not None:
                    tunnel.vigil.distrust()
        for _, tunnel in self._connector.expire():
            tunnel.close(Code.IDLE)
        self._connector.keep_warm()  # what was lost is dialled again here, so that no server is stormed
        self._expiry_timer = self._loop.call_later(EXPIRY_INTERVAL_S, self._expire)

    # 5. The end.

    async def drain(self) -> None:
        """No new work; running connections get ``drain_s``, then they are reset."""
        deadline_s = self._loop.time() + self._settings.limits.drain_s
        await finish_listening(
            self._listeners,
            lambda: all(visitor.has_stream for visitor in self._visitors),
            at_most_s=min(SETTLE_S, self._settings.limits.drain_s),
        )
        self._is_draining = True
        self._stop_listening()
        self._connector.close()  # who waits for a tunnel is told that there will be none
        for visitor in list(self._visitors):
            if not visitor.has_stream:
                visitor.end()
        for tunnel in self._tunnels:
            self._on_stream_end(tunnel)
        self._check_all_ended()
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._all_ended.wait()
        except TimeoutError:
            log.info(
                "%d connections were still open after %g s: reset", len(self._visitors), self._settings.limits.drain_s
            )
            for visitor in list(self._visitors):
                visitor.end()
            for tunnel in self._tunnels:
                tunnel.close(Code.SHUTTING_DOWN)
            try:
                async with asyncio.timeout(2 * CLOSE_WAIT_S):
                    await self._all_ended.wait()
            except TimeoutError:
                self.abort()  # a peer that does not take the close
        self.report()

    def abort(self) -> None:
        """End everything at once."""
        self._stop_listening()
        for visitor in list(self._visitors):
            visitor.end()
        for tunnel in self._tunnels:
            tunnel.cut("stopped")

    def report(self) -> None:
        """Log the counters and the pools' figures, as one line of JSON."""
        gauges = {
            "connections": len(self._visitors),
            "tunnels": len(self._tunnels),
            "idle_tunnels": self._tunnels.idle_count(),
            "streams": sum(tunnel.stream_count for tunnel in self._tunnels),
            "buffered_bytes": self._budget.kept,
            "buffered_bytes_high_water": self._budget.high_water,
            "tasks": len(asyncio.all_tasks(self._loop)),
        }
        if self._shared is not None:
            gauges["worker"] = self._shared.number
        log.info("statistics: %s", statistics_json(self._counters, self._pools.statistics(), gauges))

    def _stop_listening(self) -> None:
        self._trimmer.stop()
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _check_all_ended(self) -> None:
        if self._is_draining and not self._visitors and not len(self._tunnels):
            self._all_ended.set()


def cipher_suite(cipher: str) -> Suite:
    """The suite that a ``cipher`` setting names; "auto" is AES where the processor has instructions for it."""
    if cipher == "auto":
        return Suite.AES_256_GCM if _has_aes() else Suite.CHACHA20_POLY1305
    return {"aes-256-gcm": Suite.AES_256_GCM, "chacha20-poly1305": Suite.CHACHA20_POLY1305}[cipher]


def _has_aes() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").lower().split()
    except OSError:
        return True  # not Linux: what runs there today has it
    is_arm = "features" in flags
    return all(flag in flags for flag in (_AES_FLAGS if is_arm else _AES_FLAGS[:1]))
