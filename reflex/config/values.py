"""What settings say of hosts, ports and targets: texts as frozen values."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

MAX_PORT: Final = 65_535
MAX_NAME_CHARACTERS: Final = 253  # of a host name, RFC 1035 without the root's dot

EXPECTED_ADDRESS: Final = "host:port or [IPv6 address]:port, the port from 1 to 65535"
EXPECTED_LISTEN: Final = "address:port or [IPv6 address]:port, the port from 0 (any free one) to 65535"
EXPECTED_RULE: Final = (
    "host:port, where the host is *, *.suffix, a name, an address or a network, the port a number or *"
)

_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)
_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
# What a resolver may take for an IPv4 address although it is none in full: 127.1, 0x7f000001, 256.1.1.1.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class HostPort:
    """A host (a lower-case name, or an address in its shortest form, without brackets) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, lowest_port: int = 1) -> HostPort:
        """``host:port`` or ``[v6]:port``. Raises ValueError; its text does not tell more than that it is wrong."""
        host, bracketed, port = _split_address(text)
        if not _PORT.fullmatch(port) or not lowest_port <= int(port) <= MAX_PORT:
            raise ValueError("bad port")
        if bracketed:
            if "%" in host:
                raise ValueError("an address with a zone")
            return cls(str(ipaddress.IPv6Address(host)), int(port))
        return cls(_ipv4_or_name(host), int(port))

    @classmethod
    def parse_listen(cls, text: str) -> HostPort:
        """The same, for an address to listen on: port 0 is any free port."""
        return cls.parse(text, lowest_port=0)


@dataclass(frozen=True, slots=True)
class TargetRule:
    """One entry of ``[targets]``: which targets it speaks of.

    ``network`` is set where addresses are meant (a single one is a network of one); ``host_pattern`` is then its
    text. Otherwise ``host_pattern`` is a lower-case name, ``*.suffix`` or ``*``. ``port`` is None for every port.
    ``str()`` gives a text that :meth:`parse` takes.
    """

    host_pattern: str
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None
    port: int | None

    def __str__(self) -> str:
        port = "*" if self.port is None else self.port
        return f"[{self.host_pattern}]:{port}" if ":" in self.host_pattern else f"{self.host_pattern}:{port}"

    @classmethod
    def parse(cls, text: str) -> TargetRule:
        """``127.0.0.1:80``, ``10.1.0.0/16:443``, ``[fd00::/8]:443``, ``name:443``, ``*.suffix:*``, ``*:25``.

        Raises ValueError for anything else, and for a network with host bits set (``10.1.2.3/16``).
        """
        host, bracketed, port_text = _split_address(text)
        port: int | None = None
        if port_text != "*":
            if not _PORT.fullmatch(port_text) or not 1 <= int(port_text) <= MAX_PORT:
                raise ValueError("bad port")
            port = int(port_text)
        if bracketed:
            if "%" in host:
                raise ValueError("an address with a zone")
            network6 = ipaddress.IPv6Network(host)
            return cls(str(network6), network6, port)
        if host == "*":
            return cls(host, None, port)
        if host.startswith("*."):
            return cls("*." + _name(host[2:]), None, port)
        try:
            network4 = ipaddress.IPv4Network(host)
        except ValueError:
            return cls(_name(host), None, port)
        return cls(str(network4), network4, port)


def _split_address(text: str) -> tuple[str, bool, str]:
    """``[host]:port`` or ``host:port`` as host, whether it stood in brackets, and the port's text."""
    if text.startswith("["):
        host, separator, port = text[1:].partition("]:")
        if not separator:
            raise ValueError("no ]:port after [")
        return host, True, port
    host, _, port = text.rpartition(":")
    return host, False, port


def _ipv4_or_name(host: str) -> str:
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        return _name(host)


def _name(text: str) -> str:
    """A host name in lower case. Raises ValueError for what no resolver, or every resolver differently, takes."""
    name = text.lower()
    labels = name.split(".")
    if len(name) > MAX_NAME_CHARACTERS or not all(map(_LABEL.fullmatch, labels)) or _NUMBER.fullmatch(labels[-1]):
        raise ValueError("bad host name")
    return name


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
