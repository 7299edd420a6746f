"""The whole exception tree. Below the root, the first split is whose fault it was.

::

    ReflexError
    ├── LocalError                   this side was used wrongly, or its machine would not
    │   ├── PoolError
    │   │   ├── ForeignBuffer        not lent by this pool, or already returned
    │   │   └── WrongSize            of another size than the pool's
    │   ├── StreamStateError         the call does not fit the stream's state
    │   ├── SessionClosed            the session takes no more calls of this kind
    │   ├── StreamsExhausted         no stream id, or no room for a stream, is left
    │   ├── WindowExceeded           more bytes committed than the windows allow
    │   └── StartError               a daemon could not start (busy port, unreadable file)
    ├── RemoteError                  the peer, or something that speaks in its place
    │   ├── HandshakeError
    │   │   ├── AuthenticationFailed unknown user, wrong key or altered bytes; never told apart
    │   │   ├── UnsupportedHello     a version or suite that this side does not know
    │   │   ├── ClockSkew            the hello's time is too far from ours
    │   │   └── Replayed             the hello was seen before, or cannot be known not to be
    │   ├── ProtocolError            fatal to the session; carries a code of protocol section 5
    │   │   ├── RecordError          a record that does not verify, or has a length out of range
    │   │   ├── FrameError           a frame that the protocol does not allow
    │   │   └── FlowControlError     a window overrun or overflown
    │   ├── AddressError             bytes or text that are no target address
    │   ├── SocksError               the application does not speak SOCKS5, or not as agreed
    │   ├── DialError                the target could not be reached; carries a status
    │   └── TunnelError              no tunnel to the server could be had
    └── ConfigError                  a settings file; carries every problem found in it

Errors carry facts as attributes; nobody needs to read their text. No error ever carries a secret.
"""

from __future__ import annotations

from collections.abc import Sequence


class ReflexError(Exception):
    """Root of everything this package raises on purpose."""


class LocalError(ReflexError):
    """This side was used wrongly, or its machine would not do what was asked."""


class PoolError(LocalError):
    """A pool was given something that it did not lend. The pool is unharmed."""


class ForeignBuffer(PoolError):
    """Released to a pool that has not lent it, or released twice."""

    def __init__(self, pool: str) -> None:
        super().__init__(f"{pool}: released an object that this pool has not lent, or that was already returned")
        self.pool = pool


class WrongSize(PoolError):
    """Released to a pool of another size."""

    def __init__(self, pool: str, size_bytes: int, expected_bytes: int) -> None:
        super().__init__(f"{pool}: released a buffer of {size_bytes} bytes, this pool's have {expected_bytes}")
        self.pool = pool
        self.size_bytes = size_bytes
        self.expected_bytes = expected_bytes


class StreamStateError(LocalError):
    """The call does not fit the state of the stream."""

    def __init__(self, stream_id: int, state: str, call: str) -> None:
        super().__init__(f"stream {stream_id} is {state}: cannot {call}")
        self.stream_id = stream_id
        self.state = state
        self.call = call


class SessionClosed(LocalError):
    """The session has ended, or takes no new streams."""


class StreamsExhausted(LocalError):
    """No stream may be opened: the peer's limit is reached or the ids have run out."""


class WindowExceeded(LocalError):
    """More payload was committed than the send windows allow."""

    def __init__(self, size_bytes: int, window_bytes: int) -> None:
        super().__init__(f"{size_bytes} bytes committed, the window allows {window_bytes}")
        self.size_bytes = size_bytes
        self.window_bytes = window_bytes


class StartError(LocalError):
    """A daemon could not start; the text is one clear line for its user."""


class RemoteError(ReflexError):
    """The peer did, or something in its place did, what it must not."""


class HandshakeError(RemoteError):
    """A hello that leads to no session. ``user_id`` is whose it is where it is authentic, 16 bytes; else None."""

    user_id: bytes | None = None


class AuthenticationFailed(HandshakeError):
    """Unknown user, wrong key or altered bytes: never told apart."""


class UnsupportedHello(HandshakeError):
    """An authentic hello of a version or suite that this side does not know."""

    def __init__(self, version: int, suite: int) -> None:
        super().__init__(f"hello asks for version {version}, suite {suite}; supported: version 1, suites 0 and 1")
        self.version = version
        self.suite = suite


class ClockSkew(HandshakeError):
    """An authentic hello whose time is too far from the server's."""

    def __init__(self, skew_s: int, limit_s: int) -> None:
        super().__init__(f"the client's clock is off by {skew_s:+d} s; at most {limit_s} s are allowed")
        self.skew_s = skew_s
        self.limit_s = limit_s


class Replayed(HandshakeError):
    """The hello was seen before, or this server cannot know that it was not."""


class ProtocolError(RemoteError):
    """Fatal to the session. ``code`` is one of protocol section 5."""

    code = 1  # protocol error; wire.Code.PROTOCOL, which this module may not import


class RecordError(ProtocolError):
    """A record that does not verify, or whose length is out of range."""


class FrameError(ProtocolError):
    """A frame that the protocol does not allow here."""


class FlowControlError(ProtocolError):
    """A window was overrun, or raised above its maximum."""

    code = 3  # flow control; wire.Code.FLOW_CONTROL


class AddressError(RemoteError):
    """Bytes or text that are no target address."""


class SocksError(RemoteError):
    """The application does not speak SOCKS5, or not as agreed.

    ``reply`` is what is to be sent before closing; empty where silence is right.
    """

    def __init__(self, text: str, reply: bytes = b"") -> None:
        super().__init__(text)
        self.reply = reply


class DialError(RemoteError):
    """The target could not be reached. ``status`` is one of protocol section 5."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class TunnelError(RemoteError):
    """No tunnel to the server could be had; the text says why, for the log."""


class ConfigError(ReflexError):
    """Everything that is wrong with a settings file, one line each: ``file: key: what stands there; expected what``."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)
