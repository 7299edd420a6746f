"""outbound.toml: where applications connect, which servers there are, and how many tunnels to them are kept."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final

from reflex.config.reader import Document, Table
from reflex.config.secret import Secret
from reflex.config.shared import (
    DEFAULT_TCP,
    EXPECTED_ID,
    MAX_CONNECTIONS,
    MAX_IDLE_TIMEOUT_S,
    MAX_STREAMS,
    MAX_TIMEOUT_S,
    TcpSettings,
    parse_id,
    read_buffered_bytes,
    read_choice,
    read_tcp,
    read_timeout_s,
    read_workers,
    refuse_repeated_listen,
)
from reflex.config.values import EXPECTED_ADDRESS, EXPECTED_LISTEN, HostPort, is_loopback
from reflex.errors import ConfigError

CIPHERS: Final = ("auto", "aes-256-gcm", "chacha20-poly1305")
PROTOCOLS: Final = ("socks5", "forward")

MAX_SOCKS_BYTES: Final = 255  # of a user name or a password: RFC 1929 counts them in one byte
MAX_TUNNELS: Final = 1_000  # per server

EXPECTED_SOCKS: Final = f"1 to {MAX_SOCKS_BYTES} bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenSettings:
    """One of outbound.toml's ``[[listen]]``.

    ``protocol`` is "socks5" or "forward". ``target`` is set for forward alone; ``username`` and ``password``
    (its bytes as SOCKS5 carries them, UTF-8) are both set or both None, and never set for forward.
    """

    address: HostPort
    protocol: str = "socks5"
    target: HostPort | None = None
    username: str | None = None
    password: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """One of outbound.toml's ``[[servers]]``. ``public_key`` has 32 bytes; ``cipher`` is one of CIPHERS."""

    address: HostPort
    public_key: bytes
    user_id: uuid.UUID
    user_key: Secret
    cipher: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """``[pool]``: the tunnels that each worker keeps for each server.

    ``min_idle`` tunnels are dialled before anybody asks, and kept although nobody uses them; at most ``max_idle``
    and ``max_tunnels``.
    """

    min_idle: int = 0
    max_idle: int = 8
    idle_timeout_s: float = 60.0
    max_streams: int = 256
    max_tunnels: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboundLimits:
    """outbound.toml's ``[limits]``. ``buffered_bytes`` is for each process."""

    max_connections: int = 5_000
    buffered_bytes: int = 268_435_456
    connect_timeout_s: float = 10.0
    handshake_timeout_s: float = 10.0
    idle_timeout_s: float = 300.0
    drain_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboundSettings:
    """outbound.toml. ``workers`` processes share the ports. ``warnings`` are for the log: what works, but should not
    stay so."""

    listen: tuple[ListenSettings, ...]
    servers: tuple[ServerSettings, ...]
    workers: int = 1
    pool: PoolSettings = PoolSettings()
    limits: OutboundLimits = OutboundLimits()
    tcp: TcpSettings = DEFAULT_TCP
    warnings: tuple[str, ...] = ()


def read_outbound(document: Document) -> OutboundSettings:
    """The settings in the file. Raises ConfigError with every problem found in it."""
    root = document.root
    workers = read_workers(root)
    listen = []
    places = []
    for table in root.tables("listen"):
        item = _listen(table)
        if item is not None:
            listen.append(item)
            places.append((table.path("address"), item.address))
    refuse_repeated_listen(document, places)
    servers = [server for server in map(_server, root.tables("servers")) if server is not None]
    pool = _pool(root.table("pool"))
    limits = _outbound_limits(root.table("limits"))
    tcp = read_tcp(root.table("tcp"))
    document.finish()
    if document.problems:
        raise ConfigError(document.problems)
    return OutboundSettings(
        listen=tuple(listen),
        servers=tuple(servers),
        workers=workers,
        pool=pool,
        limits=limits,
        tcp=tcp,
        warnings=tuple(document.warnings),
    )


def _listen(table: Table) -> ListenSettings | None:
    address = table.text("address", HostPort.parse_listen, expected=EXPECTED_LISTEN, required=True)
    protocol = read_choice(table, "protocol", PROTOCOLS)
    target = table.text("target", HostPort.parse, expected=EXPECTED_ADDRESS)
    username = table.text("username", _parse_socks_name, expected=EXPECTED_SOCKS)
    password = table.secret_text("password", parse=_parse_socks_text, expected=EXPECTED_SOCKS)
    if protocol == "forward":
        if "target" not in table:
            table.problem("target", "nothing", f"{EXPECTED_ADDRESS}, because protocol is forward")
        for key in ("username", "password"):
            if key in table:
                table.problem(key, f"a {key} for protocol forward", f"a {key} for protocol socks5 only")
    else:
        if "target" in table:
            table.problem("target", "a target for protocol socks5", "a target for protocol forward only")
        for key, other in (("username", "password"), ("password", "username")):
            if key not in table and other in table:
                table.problem(key, "nothing", f"{EXPECTED_SOCKS}, to go with {other}")
        if address is not None and "password" not in table and not is_loopback(address.host):
            table.warn(
                "address", f"everybody who reaches {address} may use this proxy; expected a username and password"
            )
    if address is None:
        return None
    return ListenSettings(address=address, protocol=protocol, target=target, username=username, password=password)


def _server(table: Table) -> ServerSettings | None:
    address = table.text("address", HostPort.parse, expected=EXPECTED_ADDRESS, required=True)
    public_key = table.key_bytes("public_key")
    user_id = table.text("user_id", parse_id, expected=EXPECTED_ID, required=True, hidden=True)
    user_key = table.secret_key("user_key", file_key="user_key_file")
    cipher = read_choice(table, "cipher", CIPHERS)
    if address is None or public_key is None or user_id is None or user_key is None:
        return None
    return ServerSettings(address=address, public_key=public_key, user_id=user_id, user_key=user_key, cipher=cipher)


def _outbound_limits(table: Table) -> OutboundLimits:
    base = OutboundLimits()
    return OutboundLimits(
        max_connections=table.integer("max_connections", base.max_connections, minimum=1, maximum=MAX_CONNECTIONS),
        buffered_bytes=read_buffered_bytes(table, base.buffered_bytes),
        connect_timeout_s=read_timeout_s(table, "connect_timeout_s", base.connect_timeout_s),
        handshake_timeout_s=read_timeout_s(table, "handshake_timeout_s", base.handshake_timeout_s),
        idle_timeout_s=read_timeout_s(table, "idle_timeout_s", base.idle_timeout_s, maximum=MAX_IDLE_TIMEOUT_S),
        drain_s=table.seconds("drain_s", base.drain_s, minimum=0, maximum=MAX_TIMEOUT_S),
    )


def _pool(table: Table) -> PoolSettings:
    base = PoolSettings()
    max_idle = table.integer("max_idle", base.max_idle, minimum=0, maximum=MAX_TUNNELS)
    max_tunnels = table.integer("max_tunnels", base.max_tunnels, minimum=1, maximum=MAX_TUNNELS)
    min_idle = table.integer("min_idle", base.min_idle, minimum=0, maximum=MAX_TUNNELS)
    for key, most in (("max_idle", max_idle), ("max_tunnels", max_tunnels)):
        if min_idle > most:
            table.problem("min_idle", f"the number {min_idle}", f"a whole number from 0 to {key}, which is {most}")
            break
    return PoolSettings(
        min_idle=min_idle,
        max_idle=max_idle,
        idle_timeout_s=read_timeout_s(table, "idle_timeout_s", base.idle_timeout_s, maximum=MAX_IDLE_TIMEOUT_S),
        max_streams=table.integer("max_streams", base.max_streams, minimum=1, maximum=MAX_STREAMS),
        max_tunnels=max_tunnels,
    )


def _parse_socks_text(text: str) -> bytes:
    value = text.encode("utf-8")
    if not 1 <= len(value) <= MAX_SOCKS_BYTES:
        raise ValueError("bad length")
    return value


def _parse_socks_name(text: str) -> str:
    _parse_socks_text(text)
    return text
