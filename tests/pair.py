"""Both halves in one event loop over loopback: their settings, and the daemons made of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from reflex.config import (
    HostPort,
    InboundLimits,
    InboundSettings,
    ListenSettings,
    OutboundLimits,
    OutboundSettings,
    PoolSettings,
    Secret,
    ServerSettings,
    TargetRule,
    TargetSettings,
    TcpSettings,
    UserSettings,
)
from reflex.inbound import Inbound
from reflex.outbound import Outbound
from reflex.protocol.events import EventKind
from reflex.protocol.share import Share
from reflex.protocol.wire import STREAM_WINDOW, Status
from tests.ends import HOST, End, Origin, connect, socks_request
from tests.keys import Keys
from tests.loops import until
from tests.remote import Remote

LOOPBACK_TARGETS: Final = TargetSettings(allow=(TargetRule.parse("127.0.0.1:*"), TargetRule.parse("localhost:*")))

EPHEMERAL: Final = HostPort(HOST, 0)


def inbound_settings(
    keys: Keys,
    *,
    listen: Sequence[HostPort] = (EPHEMERAL,),
    fallback: int | None = None,
    targets: TargetSettings = LOOPBACK_TARGETS,
    limits: InboundLimits | None = None,
    tcp: TcpSettings | None = None,
) -> InboundSettings:
    """Settings of the server's half. ``fallback`` is a port on loopback."""
    return InboundSettings(
        listen=tuple(listen),
        private_key=Secret(keys.private_key),
        users=(UserSettings(name="alice", id=keys.user_id, key=Secret(keys.user_key)),),
        fallback=None if fallback is None else HostPort(HOST, fallback),
        targets=targets,
        limits=limits or InboundLimits(),
        tcp=tcp or TcpSettings(),
    )


def limited(
    keys: Keys, *, usage_file: Path | None = None, dial_timeout_s: float = 10, **limits: Any
) -> InboundSettings:
    """Settings of a server whose one user has these limits."""
    settings = inbound_settings(keys, limits=InboundLimits(dial_timeout_s=dial_timeout_s, max_streams=10))
    users = (dataclasses.replace(settings.users[0], **limits),)
    return dataclasses.replace(settings, users=users, usage_file=usage_file)


async def drain_slowly(inbound: Inbound, remote: Remote, origin: Origin) -> End:
    """Have a stream end in both directions with bytes left that its target has not read; returns the target.

    The origin's receive buffers must be small.
    """
    before = set(inbound._relays)
    stream, _ = await remote.ask(origin.address)
    (relay,) = inbound._relays - before
    assert relay._sock is not None
    relay._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2_048)
    target = await origin.accept()
    target.finish()
    await remote.see(EventKind.FIN, stream.id)
    assert remote.session.send(stream, bytes(STREAM_WINDOW)) == STREAM_WINDOW
    remote.session.finish(stream)
    await remote.flush()
    await until(lambda: relay in relay.tunnel.draining)
    return target


def server_settings(keys: Keys, port: int, *, cipher: str = "auto") -> ServerSettings:
    return ServerSettings(
        address=HostPort(HOST, port),
        public_key=keys.public_key,
        user_id=keys.user_id,
        user_key=Secret(keys.user_key),
        cipher=cipher,
    )


def outbound_settings(
    servers: Sequence[ServerSettings],
    *,
    listen: Sequence[ListenSettings] = (ListenSettings(address=EPHEMERAL),),
    pool: PoolSettings | None = None,
    limits: OutboundLimits | None = None,
    tcp: TcpSettings | None = None,
) -> OutboundSettings:
    """Settings of the client's half, with a SOCKS5 door."""
    return OutboundSettings(
        listen=tuple(listen),
        servers=tuple(servers),
        pool=pool or PoolSettings(),
        limits=limits or OutboundLimits(),
        tcp=tcp or TcpSettings(),
    )


def forward_to(port: int) -> ListenSettings:
    return ListenSettings(address=EPHEMERAL, protocol="forward", target=HostPort(HOST, port))


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@contextlib.asynccontextmanager
async def running_inbound(settings: InboundSettings) -> AsyncIterator[tuple[Inbound, int]]:
    """A server's half and its port; at the end nothing of it is left."""
    inbound = Inbound(settings)
    addresses = await inbound.start()
    try:
        yield inbound, port_of(addresses[0])
    finally:
        inbound.abort()
    await until(lambda: inbound._pools.in_use == 0)
    assert inbound._budget.buffered == 0
    assert inbound._budget.growth == 0
    assert not inbound._greetings
    assert not inbound._tunnels


@contextlib.asynccontextmanager
async def running_outbound(settings: OutboundSettings) -> AsyncIterator[tuple[Outbound, int]]:
    """A client's half and the port of its first door; at the end nothing of it is left."""
    outbound = Outbound(settings)
    addresses = await outbound.start()
    try:
        yield outbound, port_of(addresses[0])
    finally:
        outbound._connector.close()
        outbound.abort()
    await until(lambda: outbound._pools.in_use == 0)
    assert outbound._budget.buffered == 0
    assert outbound._budget.growth == 0
    assert not outbound._visitors
    assert not len(outbound._tunnels)


class Pair:
    """Both halves in one loop: ``async with Pair() as pair``.

    Attributes:
        inbound, outbound: the daemons.
        server_port: where Inbound listens.
        ports: of Outbound's doors, in order; the first one is SOCKS5 unless ``listen`` says otherwise.
    """

    def __init__(
        self,
        *,
        keys: Keys | None = None,
        fallback: int | None = None,
        targets: TargetSettings = LOOPBACK_TARGETS,
        inbound_limits: InboundLimits | None = None,
        listen: Sequence[ListenSettings] = (ListenSettings(address=EPHEMERAL),),
        pool: PoolSettings | None = None,
        outbound_limits: OutboundLimits | None = None,
        tcp: TcpSettings | None = None,
        cipher: str = "auto",
    ) -> None:
        self.keys = keys or Keys.generate()
        self._inbound_settings = inbound_settings(
            self.keys, fallback=fallback, targets=targets, limits=inbound_limits, tcp=tcp
        )
        self._outbound_options = {"listen": listen, "pool": pool, "limits": outbound_limits, "tcp": tcp}
        self._cipher = cipher
        self._stack = contextlib.AsyncExitStack()
        self.inbound: Inbound
        self.outbound: Outbound
        self.server_port = 0
        self.ports: list[int] = []
        self._ends: list[End] = []

    async def __aenter__(self) -> Self:
        stack = self._stack
        self.inbound, self.server_port = await stack.enter_async_context(running_inbound(self._inbound_settings))
        settings = outbound_settings(
            [server_settings(self.keys, self.server_port, cipher=self._cipher)],
            **self._outbound_options,  # type: ignore[arg-type]  # as __init__ took them
        )
        self.outbound, _ = await stack.enter_async_context(running_outbound(settings))
        self.ports = [port_of(listener.address) for listener in self.outbound._listeners]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)
        for end in self._ends:
            end.close()

    @property
    def tunnels(self) -> int:
        """How many tunnels the server has."""
        return len(self.inbound._tunnels)

    async def connect(self, door: int = 0) -> End:
        """A connection to one of the client's doors."""
        self._ends.append(await connect(self.ports[door]))
        return self._ends[-1]

    async def socks(self, port: int, host: str = HOST) -> End:
        """A connection through SOCKS5 to a target; the target is connected."""
        end = await self.connect()
        assert await socks_request(end, port, host) == Status.SUCCEEDED
        return end

    async def status(self, port: int, host: str = HOST) -> int:
        """How a request through SOCKS5 was answered, where that is not by success; FIN follows."""
        with await self.connect() as end:
            status = await socks_request(end, port, host)
            assert status != Status.SUCCEEDED
            await end.expect_fin()
        return status

    async def stream(self, origin: Origin) -> tuple[End, End]:
        """A stream through everything: the application's end and the target's."""
        near = await self.socks(origin.port)
        return near, await origin.accept()


def statistics(caplog: pytest.LogCaptureFixture, logger: str) -> dict[str, Any]:
    """The last line of statistics that this logger wrote."""
    prefix = "statistics: "
    lines = [
        record.getMessage() for record in caplog.records if record.name == logger and record.levelno == logging.INFO
    ]
    line = [line for line in lines if line.startswith(prefix)][-1]
    found: dict[str, Any] = json.loads(line.removeprefix(prefix))
    return found


class Hog:
    """Keeps a share of a daemon's memory for waiting bytes, as a stream that nobody reads would."""

    def __init__(self, share: Share, percent: int) -> None:
        self.kept_bytes = 0
        self.moved_at = 0
        self.owner = self
        self._share = share
        assert share.reserve(self, -(-share.budget.buffered_limit * percent // 100))

    def shed(self) -> None:
        self._share.give_back(self, self.kept_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shed()
