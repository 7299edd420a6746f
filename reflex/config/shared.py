"""What inbound.toml and outbound.toml have alike: keys of the same name, with the same bounds."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Final

from reflex.config.reader import Document, Table
from reflex.config.values import HostPort

MAX_CONNECTIONS: Final = 1_000_000  # more sockets than one process is ever granted
MAX_STREAMS: Final = 65_536  # per tunnel; far above it, another tunnel serves better
MIN_BUFFERED_BYTES: Final = 1 << 20  # a session's first window
MAX_BUFFERED_BYTES: Final = 1 << 40  # more memory than a machine has
MAX_WORKERS: Final = 64  # more than one for each processor gains nothing
MIN_TIMEOUT_S: Final = 0.001  # a time-out of nothing would refuse everything
MAX_TIMEOUT_S: Final = 3_600.0
MAX_IDLE_TIMEOUT_S: Final = 7 * 86_400.0
MAX_KEEPALIVE_S: Final = 32_767  # Linux takes no more for TCP_KEEPIDLE

EXPECTED_ID: Final = "a UUID such as b831381d-6324-4d53-ad4f-8cda48b30811"

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpSettings:
    """``[tcp]``, of either file. ``keepalive_s`` is the idle time before the first probe; 0 turns probes off."""

    nodelay: bool = True
    keepalive_s: int = 600


DEFAULT_TCP: Final = TcpSettings()


def read_workers(root: Table) -> int:
    """``workers``: how many processes there are."""
    return root.integer("workers", 1, minimum=1, maximum=MAX_WORKERS)


def read_buffered_bytes(table: Table, default: int) -> int:
    """``buffered_bytes`` of ``[limits]``."""
    return table.integer("buffered_bytes", default, minimum=MIN_BUFFERED_BYTES, maximum=MAX_BUFFERED_BYTES)


def read_tcp(table: Table) -> TcpSettings:
    """``[tcp]``, with the defaults for what is absent or wrong."""
    return TcpSettings(
        nodelay=table.flag("nodelay", default=DEFAULT_TCP.nodelay),
        keepalive_s=table.integer("keepalive_s", DEFAULT_TCP.keepalive_s, minimum=0, maximum=MAX_KEEPALIVE_S),
    )


def read_timeout_s(table: Table, key: str, default: float, *, maximum: float = MAX_TIMEOUT_S) -> float:
    """The time-out in seconds at ``key``, which is not 0."""
    return table.seconds(key, default, minimum=MIN_TIMEOUT_S, maximum=maximum)


def read_choice(table: Table, key: str, choices: tuple[str, ...]) -> str:
    """One of the texts; the first where the key is absent or wrong."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(key)
        return text

    return table.text(key, parse, expected=" or ".join(choices)) or choices[0]


def refuse_repeated_listen(document: Document, listen: list[tuple[str, HostPort]]) -> None:
    """Notes each address that stands twice; ``listen`` has them with their key paths. Port 0 may stand often."""
    first: dict[HostPort, str] = {}
    for place, address in listen:
        if address.port and first.setdefault(address, place) != place:
            document.problem(place, f"the same as {first[address]}", "an address that is listened on only once")


def parse_id(text: str) -> uuid.UUID:
    """A user's id, with its four hyphens and nothing around it. Raises ValueError for any other text."""
    if not _UUID.fullmatch(text):
        raise ValueError("bad UUID")
    return uuid.UUID(text)
