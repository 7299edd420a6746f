"""The SOCKS5 server's side as a parser: the application's bytes in, the bytes to answer out.

Source: RFC 1928 (SOCKS5), RFC 1929 (user and password)::

    application                                server
    05 ‖ n ‖ n methods                    ->
                                          <-   05 ‖ method (00 none, 02 user/password, FF refused)
    01 ‖ n ‖ user ‖ n ‖ password          ->        with method 02 only
                                          <-   01 ‖ 00, or 01 ‖ 01 and the end
    05 ‖ 01 CONNECT ‖ 00 ‖ address        ->
                                          <-   05 ‖ status ‖ 00 ‖ bound address: reply(), after the dialling

Each message names its own size, so what is buffered before the request is bounded by construction:
2 + 255, then 1 + 1 + 255 + 1 + 255, then 3 + 259 bytes. How the bytes are split, or whether the
application waits for the answers at all, makes no difference to what comes out.
"""

from __future__ import annotations

import hmac
from enum import Enum, auto
from typing import Final

from reflex.errors import AddressError, SocksError
from reflex.protocol.address import Address, decode_address, encoded_size
from reflex.protocol.wire import AddressType, Status

VERSION: Final = 0x05
AUTH_VERSION: Final = 0x01  # RFC 1929, section 2
METHOD_NONE: Final = 0x00
METHOD_PASSWORD: Final = 0x02
METHOD_REFUSED: Final = 0xFF
CONNECT: Final = 0x01

MAX_CREDENTIAL_SIZE: Final = 255  # what one length byte can say
MAX_REST_SIZE: Final = 131_072  # bytes behind the request; one read into the largest buffer stays below it

_NO_METHOD: Final = bytes((VERSION, METHOD_REFUSED))
_AUTH_ACCEPTED: Final = bytes((AUTH_VERSION, 0))
_AUTH_REFUSED: Final = bytes((AUTH_VERSION, 1))
_REQUEST_HEAD_SIZE: Final = 1 + 1 + 1  # version, command, reserved; the address follows
_UNBOUND: Final = bytes((AddressType.IPV4,)) + bytes(4) + bytes(2)  # 0.0.0.0:0
_REPLIES: Final = {status: bytes((VERSION, status, 0)) + _UNBOUND for status in Status}

_SOCKS4_VERSION: Final = 0x04
_SOCKS4_REJECTED: Final = bytes((0, 91)) + bytes(6)  # reply version, "rejected or failed", port, address
_HTTP_TEXT: Final = b"This port speaks SOCKS5, not HTTP. Set it as a SOCKS proxy.\n"
_HTTP_REPLY: Final = (
    b"HTTP/1.1 400 Bad Request\r\n"
    b"Content-Type: text/plain\r\n"
    b"Content-Length: %d\r\n"
    b"Connection: close\r\n"
    b"\r\n"
    b"%s" % (len(_HTTP_TEXT), _HTTP_TEXT)
)


def reply(status: int, bound: Address | None = None) -> bytes:
    """Give the answer to the request (RFC 1928, section 6).

    Args:
        status: a :class:`Status`; a number that is none is answered as a general failure.
        bound: the address that the target sees; None for 0.0.0.0:0, which clients of CONNECT take as well.
    """
    known = Status(status) if status in _REPLIES else Status.GENERAL_FAILURE
    if bound is None:
        return _REPLIES[known]
    return bytes((VERSION, known, 0)) + bound.encode()


class _Step(Enum):
    GREETING = auto()
    AUTH = auto()
    REQUEST = auto()
    DONE = auto()
    DEAD = auto()


class Socks5Parser:
    """One application's SOCKS5 conversation, up to its request.

    Args:
        credentials: user and password, 1 to 255 bytes each, which the application must then give;
            None where nobody is asked.

    Attributes:
        request: what is to be dialled; None until the request is complete.

    Raises:
        ValueError: credentials of a size that RFC 1929 cannot carry.
    """

    __slots__ = ("_buffer", "_credentials", "_step", "request")

    def __init__(self, credentials: tuple[bytes, bytes] | None = None) -> None:
        if credentials is not None and not all(1 <= len(part) <= MAX_CREDENTIAL_SIZE for part in credentials):
            raise ValueError(f"user and password have 1 to {MAX_CREDENTIAL_SIZE} bytes")
        self.request: Address | None = None
        self._credentials = credentials
        self._buffer = bytearray()
        self._step = _Step.GREETING

    @property
    def rest(self) -> bytes:
        """What came behind the request: the first bytes for the target. Empty while there is no request."""
        return bytes(self._buffer) if self._step is _Step.DONE else b""

    def feed(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take what the application sent, in any split.

        ``data`` is copied, not kept. Once ``request`` is set, further bytes join ``rest``.

        Returns:
            What is to be sent back at once; may be empty.

        Raises:
            SocksError: not SOCKS5, or not as agreed. Its ``reply`` is what is to be sent before
                closing, the answers that this call had already made included. The parser is dead:
                further calls raise the same with an empty reply.
        """
        if self._step is _Step.DEAD:
            raise SocksError("the conversation has already failed")
        self._buffer += data
        answers = bytearray()
        try:
            while (answer := self._advance()) is not None:
                answers += answer
        except SocksError as error:
            self._step = _Step.DEAD
            self.request = None
            self._buffer.clear()
            error.reply = bytes(answers) + error.reply
            raise
        return bytes(answers)

    def _advance(self) -> bytes | None:
        """Take one whole message off the buffer; give its answer, or None where none is whole."""
        match self._step:
            case _Step.GREETING:
                return self._greeting()
            case _Step.AUTH:
                return self._auth()
            case _Step.REQUEST:
                return self._request()
            case _:
                if len(self._buffer) > MAX_REST_SIZE:
                    raise SocksError(
                        f"more than {MAX_REST_SIZE} bytes behind the request", reply(Status.GENERAL_FAILURE)
                    )
                return None

    def _greeting(self) -> bytes | None:
        """Version and methods: RFC 1928, section 3."""
        buffer = self._buffer
        if not buffer:
            return None
        if buffer[0] != VERSION:
            raise _stranger(buffer[0])
        if len(buffer) < 2 or len(buffer) < 2 + buffer[1]:
            return None
        size = 2 + buffer[1]
        methods = buffer[2:size]
        method = METHOD_NONE if self._credentials is None else METHOD_PASSWORD
        if method not in methods:
            raise SocksError(f"the client does not offer method {method}", _NO_METHOD)
        del buffer[:size]
        self._step = _Step.REQUEST if self._credentials is None else _Step.AUTH
        return bytes((VERSION, method))

    def _auth(self) -> bytes | None:
        """User and password: RFC 1929, section 2."""
        buffer = self._buffer
        if not buffer:
            return None
        if buffer[0] != AUTH_VERSION:
            raise SocksError(f"unknown version {buffer[0]} of user and password", _AUTH_REFUSED)
        if len(buffer) < 2 or len(buffer) < 2 + buffer[1] + 1:
            return None
        user_end = 2 + buffer[1]
        end = user_end + 1 + buffer[user_end]
        if len(buffer) < end:
            return None
        assert self._credentials is not None  # noqa: S101  the step is entered with credentials only
        user, password = self._credentials
        # Both are compared always, each in constant time: how long it takes tells nothing of which was wrong.
        user_fits = hmac.compare_digest(buffer[2:user_end], user)
        password_fits = hmac.compare_digest(buffer[user_end + 1 : end], password)
        if not (user_fits & password_fits):
            raise SocksError("wrong user or password", _AUTH_REFUSED)
        del buffer[:end]
        self._step = _Step.REQUEST
        return _AUTH_ACCEPTED

    def _request(self) -> bytes | None:
        """Command and address: RFC 1928, section 4. The reserved byte is not looked at."""
        buffer = self._buffer
        if len(buffer) < _REQUEST_HEAD_SIZE + 2:  # an address tells its size in its first two bytes
            return None
        if buffer[0] != VERSION:
            raise SocksError(f"version {buffer[0]} in the request", reply(Status.GENERAL_FAILURE))
        if buffer[1] != CONNECT:
            raise SocksError(f"command {buffer[1]} is not supported", reply(Status.NOT_SUPPORTED))
        try:
            size = _REQUEST_HEAD_SIZE + encoded_size(buffer[3], buffer[4])
        except AddressError as error:
            raise SocksError(str(error), reply(Status.ADDRESS_TYPE_NOT_SUPPORTED)) from None
        if len(buffer) < size:
            return None
        try:
            self.request, _ = decode_address(bytes(buffer[_REQUEST_HEAD_SIZE:size]))
        except AddressError as error:
            raise SocksError(str(error), reply(Status.GENERAL_FAILURE)) from None
        del buffer[:size]
        self._step = _Step.DONE
        return b""


def _stranger(first: int) -> SocksError:
    """What to tell a client that does not speak SOCKS5, by the first byte that it sent."""
    if first == _SOCKS4_VERSION:
        return SocksError("the client speaks SOCKS4", _SOCKS4_REJECTED)
    if ord("A") <= first <= ord("Z"):  # a method: RFC 9110, section 9, has them in capitals
        return SocksError("the client speaks HTTP", _HTTP_REPLY)
    return SocksError("the client does not speak SOCKS5")
