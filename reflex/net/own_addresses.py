"""Whether an address is one of this machine's own, whatever network it is of.

The kernel is asked each time, by binding a UDP socket to the address: it lets nobody bind what is not its
own. No packet is sent, nothing is remembered (addresses come and go), and it takes 8 µs. Connecting to the
address and looking at the socket's own end would miss secondary addresses, whose traffic has the primary one
as its source.

A machine may be set to let everybody bind everything (``ip_nonlocal_bind``, used by load balancers). There
the source address that the kernel would choose has to do.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

# Of the networks for documentation (RFC 5737, RFC 3849): no machine's own, so that nobody binds them.
_NOBODYS: Final = {socket.AF_INET: "203.0.113.1", socket.AF_INET6: "2001:db8::1"}
_ANY_PORT: Final = 0
_DISCARD_PORT: Final = 9  # where nothing is sent to; connecting wants some port (RFC 863)
# The machine has no such address, or does not know its family at all.
_NOT_OWN: Final = frozenset((errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT))


def is_own(ip_text: str) -> bool:
    """Say whether an IPv4 or IPv6 address, without a scope, is this machine's own.

    Raises:
        OSError: it cannot be known now; descriptors have run out, say.
    """
    family = socket.AF_INET6 if ":" in ip_text else socket.AF_INET
    if not _is_bindable(family, ip_text):
        return False
    return not _is_bindable(family, _NOBODYS[family]) or _is_own_source(family, ip_text)


def _is_bindable(family: socket.AddressFamily, ip_text: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((ip_text, _ANY_PORT))
    except OSError as error:
        if error.errno in _NOT_OWN:
            return False
        raise
    return True


def _is_own_source(family: socket.AddressFamily, ip_text: str) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ip_text, _DISCARD_PORT))
        except OSError:
            return False  # there is no way to it: it is not here
        return bool(probe.getsockname()[0] == ip_text)
