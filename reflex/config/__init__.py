"""Settings of both daemons: inbound.toml and outbound.toml as frozen, typed values.

The dataclasses of :mod:`reflex.config.inbound` and :mod:`reflex.config.outbound` are the settings' contract: a
field is named as its key in the file, its default is what an absent key means. All times are in seconds.
:func:`load_inbound` and :func:`load_outbound` make them of a file, or raise ConfigError with every problem that it
holds; :mod:`reflex.config.reader` reads the values. No repr of any settings shows a secret.
"""

from __future__ import annotations

import os

from reflex.config.inbound import InboundLimits, InboundSettings, TargetSettings, UserSettings, read_inbound
from reflex.config.outbound import (
    ListenSettings,
    OutboundLimits,
    OutboundSettings,
    PoolSettings,
    ServerSettings,
    read_outbound,
)
from reflex.config.reader import Document
from reflex.config.secret import Secret
from reflex.config.shared import TcpSettings
from reflex.config.values import HostPort, TargetRule
from reflex.errors import ConfigError

__all__ = [
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
]


def load_inbound(path: str | os.PathLike[str]) -> InboundSettings:
    """The settings in an inbound.toml. Raises ConfigError with every problem found in the file."""
    return read_inbound(Document(path))


def load_outbound(path: str | os.PathLike[str]) -> OutboundSettings:
    """The settings in an outbound.toml. Raises ConfigError with every problem found in the file."""
    return read_outbound(Document(path))


def load_settings(path: str | os.PathLike[str]) -> InboundSettings | OutboundSettings:
    """The settings in a file of either kind, told apart by their content. Raises ConfigError."""
    document = Document(path)
    root = document.root
    if "servers" in root or "pool" in root:
        return read_outbound(document)
    if any(key in root for key in ("private_key", "private_key_file", "users", "targets", "fallback")):
        return read_inbound(document)
    raise ConfigError(
        [f"{document.name}: neither [[users]] nor [[servers]]; expected those of inbound.toml or of outbound.toml"]
    )
