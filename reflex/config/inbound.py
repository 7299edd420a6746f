"""inbound.toml: who may use the server, what they may dial, and within which limits."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path
from typing import Final

from reflex.config.reader import Document, Table
from reflex.config.secret import Secret, may_hold_key
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
    read_tcp,
    read_timeout_s,
    read_workers,
    refuse_repeated_listen,
)
from reflex.config.values import EXPECTED_ADDRESS, EXPECTED_LISTEN, EXPECTED_RULE, HostPort, TargetRule
from reflex.errors import ConfigError

MAX_USER_NAME_CHARACTERS: Final = 64  # stands in log lines
MAX_USER_COUNT: Final = 1_000_000  # of a user's tunnels or streams
MIN_DIALS_PER_S: Final = 0.01
MAX_DIALS_PER_S: Final = 1_000_000.0
MIN_BYTES_PER_S: Final = 1_024  # slower, a request alone takes longer than anybody waits for it
MAX_BYTES_PER_S: Final = 10**12
MAX_MONTHLY_BYTES: Final = 10**18  # what SQLite's integers hold, with room to spare

EXPECTED_USER_NAME: Final = f"1 to {MAX_USER_NAME_CHARACTERS} printable characters, and no key"


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
    tcp: TcpSettings = DEFAULT_TCP
    warnings: tuple[str, ...] = ()

    @property
    def limited_users(self) -> tuple[UserSettings, ...]:
        """Those with limits of their own, in their order."""
        return tuple(user for user in self.users if user.has_limits)


def parse_user_name(text: str) -> str:
    """A user's name as it may stand in inbound.toml, and in the log. Raises ValueError for any other."""
    if not 1 <= len(text) <= MAX_USER_NAME_CHARACTERS or not text.isprintable() or may_hold_key(text):
        raise ValueError("bad user name")
    return text


def read_inbound(document: Document) -> InboundSettings:
    """The settings in the file. Raises ConfigError with every problem found in it."""
    root = document.root
    listen = root.texts("listen", HostPort.parse_listen, expected=EXPECTED_LISTEN, required=True)
    refuse_repeated_listen(document, listen)
    private_key = root.secret_key("private_key", file_key="private_key_file")
    fallback = root.text("fallback", HostPort.parse, expected=EXPECTED_ADDRESS)
    for place, address in listen:
        if address == fallback:
            root.problem("fallback", f"the same as {place}", "the address of a web server")
            break
    workers = read_workers(root)
    usage_file = root.file_path("usage_file")
    replay_file = root.file_path("replay_file")
    if usage_file is not None and replay_file is not None and normpath(usage_file) == normpath(replay_file):
        root.problem("replay_file", "the same as usage_file", "a file of its own")
    users = _users(root)
    if "usage_file" not in root and (counted := [user for user in users if user.monthly_bytes is not None]):
        root.problem("usage_file", "nothing", f"the path of a file, because {counted[0].name} has monthly_bytes")
    targets = root.table("targets")
    allow = targets.texts("allow", TargetRule.parse, expected=EXPECTED_RULE)
    deny = targets.texts("deny", TargetRule.parse, expected=EXPECTED_RULE)
    limits = _inbound_limits(root.table("limits"))
    tcp = read_tcp(root.table("tcp"))
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


def _users(root: Table) -> tuple[UserSettings, ...]:
    users = []
    names: dict[str, str] = {}
    ids: dict[uuid.UUID, str] = {}
    for table in root.tables("users"):
        name = table.text("name", parse_user_name, expected=EXPECTED_USER_NAME, required=True)
        user_id = table.text("id", parse_id, expected=EXPECTED_ID, required=True, hidden=True)
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


def _inbound_limits(table: Table) -> InboundLimits:
    base = InboundLimits()
    return InboundLimits(
        max_connections=table.integer("max_connections", base.max_connections, minimum=1, maximum=MAX_CONNECTIONS),
        max_streams=table.integer("max_streams", base.max_streams, minimum=1, maximum=MAX_STREAMS),
        buffered_bytes=read_buffered_bytes(table, base.buffered_bytes),
        handshake_timeout_s=read_timeout_s(table, "handshake_timeout_s", base.handshake_timeout_s),
        dial_timeout_s=read_timeout_s(table, "dial_timeout_s", base.dial_timeout_s),
        idle_timeout_s=read_timeout_s(table, "idle_timeout_s", base.idle_timeout_s, maximum=MAX_IDLE_TIMEOUT_S),
        drain_s=table.seconds("drain_s", base.drain_s, minimum=0, maximum=MAX_TIMEOUT_S),
    )
