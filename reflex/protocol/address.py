"""Target addresses: what an OPEN, a DATAGRAM and a SOCKS5 request name.

Source: ``docs/protocol.md``, section 5, *Address*; the form is that of RFC 1928, section 5, from ATYP on::

    01 ‖ IPv4 (4)                    ‖ port (2)
    03 ‖ length (1) ‖ name (1–255)   ‖ port (2)
    04 ‖ IPv6 (16)                   ‖ port (2)

A host is brought into one form wherever it enters, as text or as bytes, so that everybody who judges
it later (the target policy above all) sees what will be dialled:

1. Names are lower-cased; they hold ASCII letters, digits, ``-``, ``_`` and ``.`` and nothing else.
2. A name that is the text of an IPv4 or IPv6 address becomes that address.
3. A name whose last label is a number, but which is not four plain decimals (``127.1``, ``0x7f.1``,
   ``2130706433``, ``0177.0.0.1``), is an error: resolvers take such for IPv4 addresses (inet_aton),
   and no top-level domain is a number (RFC 3696, section 2; the rule is that of the WHATWG URL
   standard, "ends in a number").
4. Port 0 is nothing that can be dialled, and an error.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from functools import lru_cache
from typing import Final, NamedTuple

from reflex.errors import AddressError
from reflex.protocol.wire import AddressType

MAX_NAME_SIZE: Final = 255  # what one length byte can say
MAX_PORT: Final = 65_535

_IPV4: Final = struct.Struct(">B4BH")  # type, address, port
_IPV6: Final = struct.Struct(">B16sH")  # type, address, port
_NAME_HEAD_SIZE: Final = 1 + 1  # type, length
_PORT: Final = struct.Struct(">H")

_NAME_BYTES: Final = b"abcdefghijklmnopqrstuvwxyz0123456789-_."
_NUMBER_LABEL: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DECIMAL_BYTE: Final = re.compile(r"0|[1-9][0-9]{0,2}")
_IPV6_CACHE_SIZE: Final = 1024  # texts of addresses seen last; ipaddress takes some microseconds for each


class Address(NamedTuple):
    """A target in its one form; see the top of this file.

    Made by :meth:`parse`, :meth:`of` or :func:`decode_address`, which check it.

    Attributes:
        kind: what ``host`` is.
        host: four decimals with dots, an IPv6 address as ``ipaddress`` prints it (no brackets, no
            scope), or a name in lower case.
        port: 1 to 65,535.
    """

    kind: AddressType
    host: str
    port: int

    @classmethod
    def of(cls, host: str, port: int) -> Address:
        """Make an address of a host's text, an IPv6 address without brackets, and a port.

        Raises:
            AddressError: the host is neither an address nor a name, or the port is out of range.
        """
        if not 1 <= port <= MAX_PORT:
            raise AddressError(f"port {port} is outside 1–{MAX_PORT}")
        try:
            raw = host.encode("ascii")
        except UnicodeEncodeError:
            raise AddressError("a name must be ASCII (an international one as its A-label)") from None
        return _from_host(raw, port)

    @classmethod
    def parse(cls, text: str) -> Address:
        """Make an address of ``host:port``; an IPv6 address stands in brackets, ``[::1]:80``.

        Raises:
            AddressError: the text is no such thing.
        """
        host, colon, port = text.rpartition(":")
        if not colon:
            raise AddressError("no port: expected host:port or [IPv6]:port")
        if not (port.isascii() and port.isdigit() and len(port) <= len(str(MAX_PORT))):
            raise AddressError("the port is not a number: expected host:port or [IPv6]:port")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed:
            host = host[1:-1]
        if bracketed != (":" in host):
            raise AddressError("an IPv6 address, and nothing else, stands in brackets: expected [IPv6]:port")
        return cls.of(host, int(port))

    def encode(self) -> bytes:
        """Give the wire form; the twin of :func:`decode_address`.

        Raises:
            AddressError: the fields, made by hand, are no address.
        """
        kind, host, port = self
        if not (host and 1 <= port <= MAX_PORT):
            raise AddressError("not an address: no host, or no port")
        try:
            if kind == AddressType.IPV4:
                first, second, third, fourth = host.split(".")
                return _IPV4.pack(kind, int(first), int(second), int(third), int(fourth), port)
            if kind == AddressType.IPV6:
                return _IPV6.pack(kind, _ipv6_bytes(host), port)
            name = host.encode("ascii")
            return bytes((AddressType.NAME, len(name))) + name + _PORT.pack(port)
        except (ValueError, struct.error) as error:
            raise AddressError(f"not an address: {error}") from None

    def __str__(self) -> str:
        """Give the text that :meth:`parse` takes."""
        if self.kind == AddressType.IPV6:
            return f"[{self.host}]:{self.port}"
        return f"{self.host}:{self.port}"


def encoded_size(kind: int, second: int) -> int:
    """Give the size in bytes of an address in its wire form, known from its first two bytes.

    Args:
        kind: the first byte, the type.
        second: the second byte: a name's length, or the first byte of an IP address.

    Raises:
        AddressError: no such type.
    """
    if kind == AddressType.IPV4:
        return _IPV4.size
    if kind == AddressType.NAME:
        return _NAME_HEAD_SIZE + second + _PORT.size
    if kind == AddressType.IPV6:
        return _IPV6.size
    raise AddressError(f"unknown address type {kind:#04x}")


def decode_address(data: memoryview | bytes, offset: int = 0) -> tuple[Address, int]:
    """Read the address that begins at ``data[offset]``; the twin of :meth:`Address.encode`.

    A name that is the text of an IP address comes back as that address. Nothing of ``data`` is kept.

    Returns:
        The address, and the offset of the first byte behind it.

    Raises:
        AddressError: unknown type, cut short, port 0, or a name that is none.
    """
    if len(data) < offset + _NAME_HEAD_SIZE:
        raise AddressError("address is cut short")
    kind = data[offset]
    end = offset + encoded_size(kind, data[offset + 1])
    if len(data) < end:
        raise AddressError("address is cut short")
    (port,) = _PORT.unpack_from(data, end - _PORT.size)
    if port == 0:
        raise AddressError(f"port 0 is outside 1–{MAX_PORT}")
    if kind == AddressType.IPV4:
        _, first, second, third, fourth, _ = _IPV4.unpack_from(data, offset)
        return Address(AddressType.IPV4, f"{first}.{second}.{third}.{fourth}", port), end
    if kind == AddressType.IPV6:
        _, raw, _ = _IPV6.unpack_from(data, offset)
        return Address(AddressType.IPV6, _ipv6_text(raw), port), end
    return _from_host(bytes(data[offset + _NAME_HEAD_SIZE : end - _PORT.size]), port), end


def _from_host(raw: bytes, port: int) -> Address:
    """Bring a host's text into its one form; ``port`` was checked. Raises AddressError."""
    if not 1 <= len(raw) <= MAX_NAME_SIZE:
        raise AddressError(f"a name has 1 to {MAX_NAME_SIZE} bytes, this one {len(raw)}")
    lower = raw.lower()
    if b":" in lower:  # in no name: it can only be an IPv6 address
        try:
            return Address(AddressType.IPV6, _ipv6_text(_ipv6_bytes(lower.decode("ascii"))), port)
        except ValueError:
            raise AddressError("neither a name nor an IPv6 address") from None
    if lower.translate(None, _NAME_BYTES):
        raise AddressError("a name holds other characters than letters, digits, '-', '_' and '.'")
    name = lower.decode("ascii")
    labels = name.removesuffix(".").split(".")
    if not _NUMBER_LABEL.fullmatch(labels[-1]):
        return Address(AddressType.NAME, name, port)
    if name.endswith(".") or len(labels) != 4 or not all(map(_is_decimal_byte, labels)):
        raise AddressError("a name that ends in a number, but is not four decimals with dots")
    return Address(AddressType.IPV4, name, port)


def _is_decimal_byte(label: str) -> bool:
    return _DECIMAL_BYTE.fullmatch(label) is not None and int(label) <= 0xFF


@lru_cache(_IPV6_CACHE_SIZE)
def _ipv6_text(raw: bytes) -> str:
    return str(ipaddress.IPv6Address(raw))


@lru_cache(_IPV6_CACHE_SIZE)
def _ipv6_bytes(text: str) -> bytes:
    """Give the 16 bytes of an IPv6 address. Raises ValueError, also for one with a scope (``%eth0``)."""
    if "%" in text:  # ipaddress takes it, and means nothing that another machine could dial
        raise ValueError("an IPv6 address with a scope")
    return ipaddress.IPv6Address(text).packed
