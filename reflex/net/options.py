"""What is set on TCP sockets: what ``[tcp]`` in the settings asks for, what loopback needs not, how one ends.

On loopback nothing is lost and nobody vanishes without the kernel's knowing. There keepalive probes
tell nothing, and a congestion control that paces what it sends (BBR, a common default on servers) only
costs: a third of the processor time of bulk data, measured. The plain one that every Linux has takes its
place, on connections whose two ends are this machine, and on no other.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import struct
from typing import Final

KEEPALIVE_INTERVAL_S: Final = 30  # between unanswered probes, unless the silence before them is shorter
PLAIN_CONTROL: Final = b"reno"  # tcp(7): built into every kernel, and every process may choose it
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s: close() sends RST
_FIN_ON_CLOSE: Final = struct.pack("ii", 0, 0)
_UNPACED: Final = frozenset((b"reno", b"cubic"))
_NAME_BYTES: Final = 16  # TCP_CA_NAME_MAX in linux/tcp.h
NEAR_S: Final = 0.0005  # the same machine, or the same room
_TCP_INFO: Final[int | None] = getattr(socket, "TCP_INFO", None)
_RTT: Final = struct.Struct("I")  # tcpi_rtt of struct tcp_info, µs
_RTT_AT: Final = 68
_CONGESTION: Final[int | None] = getattr(socket, "TCP_CONGESTION", None)  # Linux alone has it


def is_loopback(host: str) -> bool:
    """Whether an IP address, as a socket names it, is this machine's loopback."""
    return host.startswith("127.") or host == "::1"


def set_options(sock: socket.socket, *, nodelay: bool, keepalive_s: int, on_loopback: bool = False) -> None:
    """Set what ``[tcp]`` in the settings asks for.

    On Linux, connections accepted on a listening socket have its options from the start.

    Args:
        sock: a TCP socket, connected, listening or neither.
        nodelay: True to send small segments at once (TCP_NODELAY).
        keepalive_s: silence before the system probes the other end; 0 for no probes.
        on_loopback: whether the other end is this machine; nobody is probed then.

    Raises:
        OSError: the system refuses.
    """
    if nodelay:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if keepalive_s > 0 and not on_loopback:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", keepalive_s),
            ("TCP_KEEPINTVL", min(keepalive_s, KEEPALIVE_INTERVAL_S)),
        ):
            option = getattr(socket, name, None)  # not every platform has them
            if option is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


def set_unpaced(sock: socket.socket) -> None:
    """Send without pacing from now on; for a connection whose other end is this machine.

    Raises:
        OSError: the system refuses.
    """
    if _CONGESTION is not None and _is_paced():
        sock.setsockopt(socket.IPPROTO_TCP, _CONGESTION, PLAIN_CONTROL)


def is_near(sock: socket.socket) -> bool:
    """Whether the other end answers within NEAR_S, by the kernel's own measurements; False where nobody knows."""
    if _TCP_INFO is None:
        return False
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _RTT.size + _RTT_AT)
    except OSError:
        return False
    if len(info) < _RTT_AT + _RTT.size:
        return False
    round_trip_us: int = _RTT.unpack_from(info, _RTT_AT)[0]
    return 0 < round_trip_us <= NEAR_S * 1e6


def set_reset_on_close(sock: socket.socket) -> None:
    """Let ``close()`` send RST in place of FIN: an end that no peer takes for a clean one."""
    with contextlib.suppress(OSError):  # already gone: the peer has seen an end of its own
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def set_fin_on_close(sock: socket.socket) -> None:
    """Let ``close()`` send FIN again, behind what was sent."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FIN_ON_CLOSE)


@functools.cache
def _is_paced() -> bool:
    """Whether this system's default congestion control is another than the plain ones. Asked once."""
    assert _CONGESTION is not None  # noqa: S101  # the caller has looked
    with socket.socket() as sock:
        return sock.getsockopt(socket.IPPROTO_TCP, _CONGESTION, _NAME_BYTES).rstrip(b"\0") not in _UNPACED
