"""Known answers for ``docs/protocol.md``, made by an implementation that shares no code with this one."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("protocol-v1.json")


@dataclass(frozen=True)
class SealedRecord:
    """A record's body and its bytes on the wire."""

    body: bytes
    record: bytes


@dataclass(frozen=True)
class Vector:
    """One session: its keys, both hellos, what follows from them, and records of both directions.

    The records of each list are in order from n = 0. Field names are those of the file.
    """

    suite: int
    server_private: bytes
    server_public: bytes
    client_ephemeral_private: bytes
    server_ephemeral_private: bytes
    user_id: bytes
    user_key: bytes
    psk: bytes
    time: int
    options: bytes
    client_hello: bytes
    server_hello: bytes
    handshake_hash: bytes
    root_client_to_server: bytes
    root_server_to_client: bytes
    exporter: bytes
    client_to_server_records: tuple[SealedRecord, ...]
    server_to_client_records_with_rekey_after_3: tuple[SealedRecord, ...]


def _value(name: str, value: Any) -> Any:
    if isinstance(value, int):
        return value
    if isinstance(value, list):
        return tuple(SealedRecord(bytes.fromhex(r["body"]), bytes.fromhex(r["record"])) for r in value)
    return uuid.UUID(value).bytes if name == "user_id" else bytes.fromhex(value)


def load_vectors() -> list[Vector]:
    """Every vector of the file; a field too many or too few is an error."""
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    return [Vector(**{name: _value(name, value) for name, value in v.items()}) for v in content["vectors"]]


VECTORS = load_vectors()
