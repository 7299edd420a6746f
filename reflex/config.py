"""Settings of both daemons: inbound.toml and outbound.toml as frozen, typed values.

The dataclasses below are the settings' contract: a field is named as its key in the file, its default is
what an absent key means. All times are in seconds. :func:`load_inbound` and :func:`load_outbound` make them
of a file, or raise ConfigError with every problem that it holds; :mod:`reflex.config_reader` reads the values.
No repr of any settings shows a secret.
"""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from reflex.config_reader import Document, Secret, Table, may_hold_key
from reflex.config_values import (
    EXPECTED_ADDRESS,
    EXPECTED_LISTEN,
    EXPECTED_RULE,
    HostPort,
    TargetRule,
    is_loopback,
)
from reflex.errors import ConfigError

__all__ = [
    "CIPHERS",
    "EXPECTED_USER_NAME",
    "HostPort",
    "InboundLimits",
    "InboundSettings",
    "ListenSettings",
    "OutboundLimits",
    "OutboundSettings",
    "PoolSettings",
    "Secret",
    "ServerSettings",
    "TargetRule",
    "TargetSettings",
    "TcpSettings",
    "UserSettings",
    "load_inbound",
    "load_outbound",
    "load_settings",
    "parse_user_name",
]

CIPHERS: Final = ("auto", "aes-256-gcm", "chacha20-poly1305")
PROTOCOLS: Final = ("socks5", "forward")

MAX_USER_NAME_CHARACTERS: Final = 64  # stands in log lines
MAX_SOCKS_BYTES: Final = 255  # of a user name or a password: RFC 1929 counts them in one byte
MAX_CONNECTIONS: Final = 1_000_000  # more sockets than one process is ever granted
MAX_STREAMS: Final = 65_536  # per tunnel; far above it, another tunnel serves better
MIN_BUFFERED_BYTES: Final = 1 << 20  # a session's first window
MAX_BUFFERED_BYTES: Final = 1 << 40  # more memory than a machine has
MAX_TUNNELS: Final = 1_000  # per server
MAX_WORKERS: Final = 64  # more than one for each processor gains nothing
MIN_TIMEOUT_S: Final = 0.001  # a time-out of nothing would refuse everything
MAX_TIMEOUT_S: Final = 3_600.0
MAX_IDLE_TIMEOUT_S: Final = 7 * 86_400.0
MAX_USER_COUNT: Final = 1_000_000  # of a user's tunnels or streams
MIN_DIALS_PER_S: Final = 0.01
MAX_DIALS_PER_S: Final = 1_000_000.0
MIN_BYTES_PER_S: Final = 1_024  # slower, a request alone takes longer than anybody waits for it
MAX_BYTES_PER_S: Final = 10**12
MAX_MONTHLY_BYTES: Final = 10**18  # what SQLite's integers hold, with room to spare
MAX_KEEPALIVE_S: Final = 32_767  # Linux takes no more for TCP_KEEPIDLE

EXPECTED_ID: Final = "a UUID such as b831381d-6324-4d53-ad4f-8cda48b30811"
EXPECTED_USER_NAME: Final = f"1 to {MAX_USER_NAME_CHARACTERS} printable characters, and no key"
EXPECTED_SOCKS: Final = f"1 to {MAX_SOCKS_BYTES} bytes"

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpSettings:
    """``[tcp]``, of either file. ``keepalive_s`` is the idle time before the first probe; 0 turns probes off."""

    nodelay: bool = True
    keepalive_s: int = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class UserSettings:
    """One of inbound.toml's ``[[users]]``. The limits are of all its tunnels, in all workers; None is no limit.

    ``bytes_per_s`` is for each direction, ``monthly_bytes`` for both together.
    """

    name: str
    id: uuid.UUID
    key: Secret
    max_tunnels: int | None = None
    max_streams: int | None = None
    dials_per_s: float | None = None
    bytes_per_s: int | None = None
    monthly_bytes: int | None = None

    @property
    def has_limits(self) -> bool:
        """Whether anything of the user has to be counted."""
        limits = (self.max_tunnels, self.max_streams, self.dials_per_s, self.bytes_per_s, self.monthly_bytes)
        return any(limit is not None for limit in limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings:
    """``[targets]``: exceptions from the rule that only public addresses may be dialled."""

    allow: tuple[TargetRule, ...] = ()
    deny: tuple[TargetRule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundLimits:
    """inbound.toml's ``[limits]``. ``max_streams`` is per tunnel, ``buffered_bytes`` for each process."""

    max_connections: int = 5_000
    max_streams: int = 1_000
    buffered_bytes: int = 268_435_456
    handshake_timeout_s: float = 10.0
    dial_timeout_s: float = 10.0
    idle_timeout_s: float = 300.0
    drain_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundSettings:
    """inbound.toml. ``workers`` processes share the port. ``usage_file`` is absolute, and set where a user has
    ``monthly_bytes``; ``replay_file`` is absolute. ``warnings`` are for the log: what works, but should not stay so."""

    listen: tuple[HostPort, ...]
    private_key: Secret
    users: tuple[UserSettings, ...]
    fallback: HostPort | None = None
    workers: int = 1
    usage_file: Path | None = None
    replay_file: Path | None = None
    targets: TargetSettings = TargetSettings()
    limits: InboundLimits = InboundLimits()
    tcp: TcpSettings = TcpSettings()
    warnings: tuple[str, ...] = ()

    @property
    def limited_users(self) -> tuple[UserSettings, ...]:
        """Those with limits of their own, in their order."""
        return tuple(user for user in self.users if user.has_limits)


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
    tcp: TcpSettings = TcpSettings()
    warnings: tuple[str, ...] = ()


def load_inbound(path: str | os.PathLike[str]) -> InboundSettings:
    """The settings in an inbound.toml. Raises ConfigError with every problem found in the file."""
    return _inbound(Document(path))


def load_outbound(path: str | os.PathLike[str]) -> OutboundSettings:
    """The settings in an outbound.toml. Raises ConfigError with every problem found in the file."""
    return _outbound(Document(path))


def load_settings(path: str | os.PathLike[str]) -> InboundSettings | OutboundSettings:
    """The settings in a file of either kind, told apart by their content. Raises ConfigError."""
    document = Document(path)
    root = document.root
    if "servers" in root or "pool" in root:
        return _outbound(document)
    if any(key in root for key in ("private_key", "private_key_file", "users", "targets", "fallback")):
        return _inbound(document)
    raise ConfigError(
        [f"{document.name}: neither [[users]] nor [[servers]]; expected those of inbound.toml or of outbound.toml"]
    )


def parse_user_name(text: str) -> str:
    """A user's name as it may stand in inbound.toml, and in the log. Raises ValueError for any other."""
    if not 1 <= len(text) <= MAX_USER_NAME_CHARACTERS or not text.isprintable() or may_hold_key(text):
        raise ValueError("bad user name")
    return text


def _inbound(document: Document) -> InboundSettings:
    root = document.root
    listen = root.texts("listen", HostPort.parse_listen, expected=EXPECTED_LISTEN, required=True)
    _refuse_repeated_listen(document, listen)
    private_key = root.secret_key("private_key", file_key="private_key_file")
    fallback = root.text("fallback", HostPort.parse, expected=EXPECTED_ADDRESS)
    workers = _workers(root)
    usage_file = root.file_path("usage_file")
    replay_file = root.file_path("replay_file")
    users = _users(root)
    if "usage_file" not in root and (counted := [user for user in users if user.monthly_bytes is not None]):
        root.problem("usage_file", "nothing", f"the path of a file, because {counted[0].name} has monthly_bytes")
    targets = root.table("targets")
    allow = targets.texts("allow", TargetRule.parse, expected=EXPECTED_RULE)
    deny = targets.texts("deny", TargetRule.parse, expected=EXPECTED_RULE)
    limits = _inbound_limits(root.table("limits"))
    tcp = _tcp(root.table("tcp"))
    document.finish()
    if document.problems or private_key is None:  # None always comes with a problem
        raise ConfigError(document.problems)
    return InboundSettings(
        listen=tuple(address for _, address in listen),
        private_key=private_key,
        users=users,
        fallback=fallback,
        workers=workers,
        usage_file=usage_file,
        replay_file=replay_file,
        targets=TargetSettings(allow=tuple(rule for _, rule in allow), deny=tuple(rule for _, rule in deny)),
        limits=limits,
        tcp=tcp,
        warnings=tuple(document.warnings),
    )


def _outbound(document: Document) -> OutboundSettings:
    root = document.root
    workers = _workers(root)
    listen = []
    places = []
    for table in root.tables("listen"):
        item = _listen(table)
        if item is not None:
            listen.append(item)
            places.append((table.path("address"), item.address))
    _refuse_repeated_listen(document, places)
    servers = [server for server in map(_server, root.tables("servers")) if server is not None]
    pool = _pool(root.table("pool"))
    limits = _outbound_limits(root.table("limits"))
    tcp = _tcp(root.table("tcp"))
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


def _users(root: Table) -> tuple[UserSettings, ...]:
    users = []
    names: dict[str, str] = {}
    ids: dict[uuid.UUID, str] = {}
    for table in root.tables("users"):
        name = table.text("name", parse_user_name, expected=EXPECTED_USER_NAME, required=True)
        user_id = table.text("id", _parse_id, expected=EXPECTED_ID, required=True, hidden=True)
        key = table.secret_key("key")
        max_tunnels = table.integer("max_tunnels", None, minimum=1, maximum=MAX_USER_COUNT)
        max_streams = table.integer("max_streams", None, minimum=1, maximum=MAX_USER_COUNT)
        dials_per_s = table.rate("dials_per_s", None, minimum=MIN_DIALS_PER_S, maximum=MAX_DIALS_PER_S)
        bytes_per_s = table.integer("bytes_per_s", None, minimum=MIN_BYTES_PER_S, maximum=MAX_BYTES_PER_S)
        monthly_bytes = table.integer("monthly_bytes", None, minimum=1, maximum=MAX_MONTHLY_BYTES)
        if name is not None and names.setdefault(name, table.path("name")) != table.path("name"):
            table.problem("name", f"the same as {names[name]}", "a name of its own")
        if user_id is not None and ids.setdefault(user_id, table.path("id")) != table.path("id"):
            table.problem("id", f"the same as {ids[user_id]}", "an id of its own")
        if name is not None and user_id is not None and key is not None:
            users.append(
                UserSettings(
                    name=name,
                    id=user_id,
                    key=key,
                    max_tunnels=max_tunnels,
                    max_streams=max_streams,
                    dials_per_s=dials_per_s,
                    bytes_per_s=bytes_per_s,
                    monthly_bytes=monthly_bytes,
                )
            )
    return tuple(users)


def _listen(table: Table) -> ListenSettings | None:
    address = table.text("address", HostPort.parse_listen, expected=EXPECTED_LISTEN, required=True)
    protocol = _choice(table, "protocol", PROTOCOLS)
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
    user_id = table.text("user_id", _parse_id, expected=EXPECTED_ID, required=True, hidden=True)
    user_key = table.secret_key("user_key", file_key="user_key_file")
    cipher = _choice(table, "cipher", CIPHERS)
    if address is None or public_key is None or user_id is None or user_key is None:
        return None
    return ServerSettings(address=address, public_key=public_key, user_id=user_id, user_key=user_key, cipher=cipher)


def _inbound_limits(table: Table) -> InboundLimits:
    base = InboundLimits()
    return InboundLimits(
        max_connections=table.integer("max_connections", base.max_connections, minimum=1, maximum=MAX_CONNECTIONS),
        max_streams=table.integer("max_streams", base.max_streams, minimum=1, maximum=MAX_STREAMS),
        buffered_bytes=_buffered_bytes(table, base.buffered_bytes),
        handshake_timeout_s=_timeout_s(table, "handshake_timeout_s", base.handshake_timeout_s),
        dial_timeout_s=_timeout_s(table, "dial_timeout_s", base.dial_timeout_s),
        idle_timeout_s=_timeout_s(table, "idle_timeout_s", base.idle_timeout_s, maximum=MAX_IDLE_TIMEOUT_S),
        drain_s=table.seconds("drain_s", base.drain_s, minimum=0, maximum=MAX_TIMEOUT_S),
    )


def _outbound_limits(table: Table) -> OutboundLimits:
    base = OutboundLimits()
    return OutboundLimits(
        max_connections=table.integer("max_connections", base.max_connections, minimum=1, maximum=MAX_CONNECTIONS),
        buffered_bytes=_buffered_bytes(table, base.buffered_bytes),
        connect_timeout_s=_timeout_s(table, "connect_timeout_s", base.connect_timeout_s),
        handshake_timeout_s=_timeout_s(table, "handshake_timeout_s", base.handshake_timeout_s),
        idle_timeout_s=_timeout_s(table, "idle_timeout_s", base.idle_timeout_s, maximum=MAX_IDLE_TIMEOUT_S),
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
        idle_timeout_s=_timeout_s(table, "idle_timeout_s", base.idle_timeout_s, maximum=MAX_IDLE_TIMEOUT_S),
        max_streams=table.integer("max_streams", base.max_streams, minimum=1, maximum=MAX_STREAMS),
        max_tunnels=max_tunnels,
    )


def _workers(root: Table) -> int:
    return root.integer("workers", 1, minimum=1, maximum=MAX_WORKERS)


def _buffered_bytes(table: Table, default: int) -> int:
    return table.integer("buffered_bytes", default, minimum=MIN_BUFFERED_BYTES, maximum=MAX_BUFFERED_BYTES)


def _tcp(table: Table) -> TcpSettings:
    base = TcpSettings()
    return TcpSettings(
        nodelay=table.flag("nodelay", default=base.nodelay),
        keepalive_s=table.integer("keepalive_s", base.keepalive_s, minimum=0, maximum=MAX_KEEPALIVE_S),
    )


def _timeout_s(table: Table, key: str, default: float, *, maximum: float = MAX_TIMEOUT_S) -> float:
    return table.seconds(key, default, minimum=MIN_TIMEOUT_S, maximum=maximum)


def _choice(table: Table, key: str, choices: tuple[str, ...]) -> str:
    """One of the texts; the first where the key is absent or wrong."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(key)
        return text

    return table.text(key, parse, expected=" or ".join(choices)) or choices[0]


def _refuse_repeated_listen(document: Document, listen: list[tuple[str, HostPort]]) -> None:
    first: dict[HostPort, str] = {}
    for place, address in listen:
        if address.port and first.setdefault(address, place) != place:
            document.problem(place, f"the same as {first[address]}", "an address that is listened on only once")


def _parse_id(text: str) -> uuid.UUID:
    if not _UUID.fullmatch(text):
        raise ValueError("bad UUID")
    return uuid.UUID(text)


def _parse_socks_text(text: str) -> bytes:
    value = text.encode("utf-8")
    if not 1 <= len(value) <= MAX_SOCKS_BYTES:
        raise ValueError("bad length")
    return value


def _parse_socks_name(text: str) -> str:
    _parse_socks_text(text)
    return text
