"""Settings to begin with: both files' text with fresh keys, and how they get into their folder.

All of it is for ``reflex init`` and ``reflex keygen``; the daemons need nothing of it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import uuid
from pathlib import Path
from typing import Final

from reflex.config.secret import KEY_BYTES
from reflex.config.values import HostPort

SECRET_FILE_MODE: Final = 0o600
SECRET_FOLDER_MODE: Final = 0o700
SOCKS_ADDRESS: Final = "127.0.0.1:1080"  # where a client's SOCKS5 proxy is looked for by habit

INBOUND_TEMPLATE: Final = """\
# Reflex, the server's half:  reflex-inbound -c inbound.toml
# Holds secrets: keep it readable by its owner alone.

listen = ["{listen}"]
private_key = "{private_key}"

# A web server for what is not Reflex:
# fallback = "127.0.0.1:8080"

# Processes that share the port; one for each processor at most:
# workers = 1

# Remembers over restarts which clients' hellos were taken, so that a recorded one is refused. Its folder must
# be writable for the server; a relative path starts at this file's folder.
replay_file = "replay.sqlite"

# One [[users]] for each user; `reflex keygen user` makes them.
[[users]]
name = {user_name}
id = "{user_id}"
key = "{user_key}"
# Limits of its own may follow here; README.md, "Limits for each user".

# Public addresses may be dialled, others only if they are allowed here.
[targets]
# allow = ["127.0.0.1:8080", "10.1.0.0/16:443", "*.internal.example:*"]
# deny = ["*:25"]

# What follows are the defaults.
[limits]
# max_connections = 5000       # of all workers together
# max_streams = 1000           # per tunnel
# buffered_bytes = 268435456   # memory for bytes that wait for slow readers, per worker
# handshake_timeout_s = 10
# dial_timeout_s = 10
# idle_timeout_s = 300         # a stream without bytes in either direction
# drain_s = 30

[tcp]
# nodelay = true
# keepalive_s = 600            # 0: off
"""
OUTBOUND_TEMPLATE: Final = """\
# Reflex, the client's half:  reflex-outbound -c outbound.toml
# Holds secrets: keep it readable by its owner alone.

# Processes that share the ports; one for each processor at most:
# workers = 1

[[listen]]
protocol = "socks5"            # or "forward", with target = "host:port"
address = "{socks_address}"
# username = "u"               # both or none
# password = "p"

[[servers]]
address = "{server}"
public_key = "{public_key}"
user_id = "{user_id}"
user_key = "{user_key}"
cipher = "auto"                # or "aes-256-gcm", "chacha20-poly1305"

# What follows are the defaults.
[pool]
# min_idle = 0                 # tunnels dialled before the first request, and kept
# max_idle = 8                 # idle tunnels kept per server
# idle_timeout_s = 60
# max_streams = 256            # streams on one tunnel before another is dialled
# max_tunnels = 8

[limits]
# max_connections = 5000       # of all workers together
# buffered_bytes = 268435456   # memory for bytes that wait for slow readers, per worker
# connect_timeout_s = 10
# handshake_timeout_s = 10
# idle_timeout_s = 300
# drain_s = 30

[tcp]
# nodelay = true
# keepalive_s = 600            # 0: off
"""


def settings_files(server: HostPort, user_name: str) -> dict[str, str]:
    """The text of both settings files by file name, the server's first, with keys that stand nowhere else."""
    private_key, public_key = server_keys()
    user_id, user_key = user_keys()
    any_address = "::" if ":" in server.host else "0.0.0.0"  # noqa: S104 - a server is there for everybody
    inbound = INBOUND_TEMPLATE.format(
        listen=HostPort(any_address, server.port),
        private_key=private_key,
        user_name=toml_text(user_name),
        user_id=user_id,
        user_key=user_key,
    )
    outbound = OUTBOUND_TEMPLATE.format(
        socks_address=SOCKS_ADDRESS, server=server, public_key=public_key, user_id=user_id, user_key=user_key
    )
    return {"inbound.toml": inbound, "outbound.toml": outbound}


def create_folder(folder: Path) -> None:
    """Creates the folder and those above it that are missing, for their owner alone."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        if folder == folder.parent:
            break
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(mode=SECRET_FOLDER_MODE)


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Writes all files next to their places, then moves each there: a full disk leaves the old ones as they were."""
    written: list[Path] = []
    try:
        for name, text in files.items():
            temporary = folder / f".{name}.{secrets.token_hex(8)}"
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET_FILE_MODE)
            written.append(temporary)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in zip(files, written, strict=True):
            temporary.replace(folder / name)
    finally:
        for temporary in written:
            with contextlib.suppress(FileNotFoundError):  # moved, as it should be
                temporary.unlink()


def server_keys() -> tuple[str, str]:
    """A fresh X25519 key pair, private and public, each in base64."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # noqa: PLC0415 - slow to import

    private_key = X25519PrivateKey.generate()
    return _base64(private_key.private_bytes_raw()), _base64(private_key.public_key().public_bytes_raw())


def user_keys() -> tuple[uuid.UUID, str]:
    """A fresh user's id, and key in base64."""
    return uuid.uuid4(), _base64(secrets.token_bytes(KEY_BYTES))


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def toml_text(text: str) -> str:
    """A printable text as TOML writes it; for such a text JSON's rules are the same."""
    return json.dumps(text, ensure_ascii=False)
