"""Networks that are not there, and that go and come back, as real processes in network namespaces of their own.

Figures are told with ``pytest -rP``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.namespaces import Namespace, connect, forward_packets, namespace
from tests.processes import (
    HELLO,
    EchoServer,
    Keys,
    Origin,
    Process,
    Settings,
    SocksReplyError,
    echo,
    hello_through,
    merged,
    refusing_port,
    socks_connect,
    start_inbound,
    start_outbound,
)

BOUND_S = 20
AT_ONCE_S = 2.0  # for what waits for nothing, on a busy machine
AGAIN_S = 5.0  # a new request works so soon
GENERAL_FAILURE, NOT_ALLOWED, NETWORK_UNREACHABLE, HOST_UNREACHABLE, REFUSED, TIMED_OUT = range(
    1, 7
)  # SOCKS5's replies
HERE, THERE, NOBODY, BEHIND = "10.77.0.1", "10.77.0.2", "10.77.0.99", "10.99.0.1"
CONNECT_TIMEOUT_S = 1
LOWERED_VIGIL = (
    "import reflex.net.vigil as vigil; vigil.QUIET_S = vigil.ANSWER_MIN_S = 0.3; vigil.ANSWER_UNKNOWN_S = 0.5"
)


@dataclass
class Ground:
    """The client in one namespace, the server in another, and a cable between them; targets on the server's machine."""

    near: Namespace
    far: Namespace
    inbound: Process
    outbound: Process
    origin: Origin

    @property
    def socks_port(self) -> int:
        return self.outbound.wait_ready()[0][1]

    def status_of(self, host: str, port: int = 80) -> tuple[int, float]:
        """The reply to a request that fails, and how long it took."""
        started_s = time.monotonic()
        with self.near.inside(), pytest.raises(SocksReplyError) as caught:
            socks_connect(self.socks_port, host, port, timeout_s=BOUND_S).close()
        took_s = time.monotonic() - started_s
        print(f"{host}: reply {caught.value.status} after {took_s:.2f} s")
        return caught.value.status, took_s

    def works_within(self, seconds: float, *, refusals: int = 0) -> None:
        """A new request is served, and so soon; before it so many may be told that there is no tunnel yet."""
        started_s = time.monotonic()
        refused = 0
        with self.near.inside():
            while True:
                try:
                    assert hello_through(self.socks_port, self.origin) == HELLO
                    break
                except SocksReplyError as error:
                    refused += 1
                    if refused > refusals or error.status != GENERAL_FAILURE:
                        raise
        took_s = time.monotonic() - started_s
        print(f"served after {took_s:.2f} s, {refused} refused before it")
        assert took_s < seconds


@contextlib.contextmanager
def ground(
    directory: Path,
    *,
    inbound: Settings | None = None,
    prelude: str = "",
) -> Iterator[Ground]:
    """``prelude`` runs in the server's process. The server is at BEHIND, reached by a route over THERE.

    The client is quicker than usual to give a tunnel up.
    """
    keys = Keys.generate()
    with namespace() as near, namespace() as far, contextlib.ExitStack() as stack:
        connect(near, far)
        far.ip(f"address add {BEHIND}/32 dev lo")
        near.ip(f"route add {BEHIND} via {THERE}")
        allow: Settings = {"listen": [f"{BEHIND}:0"], "targets": {"allow": ["0.0.0.0/0:*", "[::/0]:*"]}}
        with far.inside():
            origin = stack.enter_context(Origin())
            server = stack.enter_context(start_inbound(directory, keys, merged(allow, inbound or {}), prelude=prelude))
        port = server.wait_ready()[0][1]
        there: Settings = {
            "servers": [{"address": f"{BEHIND}:{port}"}],
            "limits": {"connect_timeout_s": CONNECT_TIMEOUT_S, "handshake_timeout_s": CONNECT_TIMEOUT_S},
        }
        with near.inside():
            client = stack.enter_context(start_outbound(directory, keys, port, there, prelude=LOWERED_VIGIL))
        it = Ground(near, far, server, client, origin)
        it.works_within(AGAIN_S)
        yield it


# Targets.

# What the server's machine, or a router behind it, says of a target; the request fails with that, and at once.
ROUTES = {
    "no route": ("", "192.0.2.1", NETWORK_UNREACHABLE),
    "unreachable": ("unreachable 10.1.0.0/16", "10.1.2.3", HOST_UNREACHABLE),
    "prohibited": ("prohibit 10.2.0.0/16", "10.2.2.3", NOT_ALLOWED),
    "swallowed": ("blackhole 10.3.0.0/16", "10.3.2.3", GENERAL_FAILURE),  # EINVAL, which says nothing of the target
    "no route, IPv6": ("", "2001:db8::1", NETWORK_UNREACHABLE),
    "unreachable, IPv6": ("unreachable 2001:db8:1::/48", "2001:db8:1::1", HOST_UNREACHABLE),
    "prohibited, IPv6": ("prohibit 2001:db8:2::/48", "2001:db8:2::1", NOT_ALLOWED),
}
# The router is the other namespace. No more than two: the kernel bounds how often it says so.
ROUTER_SAYS = {
    "a router without a route": ("", "10.10.2.3", NETWORK_UNREACHABLE),
    "a router that says unreachable": ("unreachable 10.11.0.0/16", "10.11.2.3", HOST_UNREACHABLE),
}


def test_targets_that_cannot_be_reached_are_told_at_once_and_as_promised(tmp_path: Path) -> None:
    with ground(tmp_path) as it:
        for route, _, _ in ROUTES.values():
            if route:
                it.far.ip(f"{'-6' if ':' in route else '-4'} route add {route}")
        for name, (_, host, expected) in ROUTES.items():
            status, took_s = it.status_of(host)
            assert status == expected, name
            assert took_s < AT_ONCE_S, name
        # Nobody has the address: the kernel asks three times, a tenth of a second apart here, a second elsewhere.
        it.far.ip("ntable change name arp_cache dev way retrans 100")
        status, took_s = it.status_of(NOBODY)
        assert status == HOST_UNREACHABLE
        assert took_s < AT_ONCE_S
        it.works_within(AT_ONCE_S)
        assert not [line for line in it.inbound.lines if "WARNING" in line or "ERROR" in line]


def test_what_a_router_says_of_targets_is_told_at_once(tmp_path: Path) -> None:
    with ground(tmp_path) as it:
        forward_packets(it.near)
        it.far.ip(f"route add 10.8.0.0/13 via {HERE}")
        for name, (route, host, expected) in ROUTER_SAYS.items():
            if route:
                it.near.ip(f"route add {route}")
            status, took_s = it.status_of(host)
            assert status == expected, name
            assert took_s < AT_ONCE_S, name
        it.works_within(AT_ONCE_S)
        assert not [line for line in it.inbound.lines if "WARNING" in line or "ERROR" in line]


# Names that have several addresses, by their first label: the addresses.
NAMES = {
    "none-first": ["192.0.2.1", "127.0.0.1"],  # no network
    "none6-first": ["2001:db8::1", "127.0.0.1"],
    "silent-first": ["10.77.0.98", "127.0.0.1"],  # nothing comes back
    "none": ["192.0.2.1", "2001:db8::1"],
    "none-and-refused": ["192.0.2.1", "127.0.0.1"],
    "none-and-nobody": ["192.0.2.1", "10.77.0.99"],
}
RESOLVER = f"""
import socket
_real, _names = socket.getaddrinfo, {NAMES!r}
def _getaddrinfo(host, port, *rest, **more):
    text = host.decode() if isinstance(host, bytes) else str(host)
    if not text.endswith(".example"):
        return _real(host, port, *rest, **more)
    found = []
    for ip in _names[text.partition(".")[0]]:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        found.append((family, socket.SOCK_STREAM, 6, "", (ip, port, 0, 0) if ":" in ip else (ip, port)))
    return found
socket.getaddrinfo = _getaddrinfo
"""


def test_a_name_is_reached_at_whichever_of_its_addresses_can_be(tmp_path: Path) -> None:
    allow: Settings = {"targets": {"allow": ["0.0.0.0/0:*", "[::/0]:*"]}, "limits": {"dial_timeout_s": 5}}
    with ground(tmp_path, inbound=allow, prelude=RESOLVER) as it:
        # Somebody has the address at layer 2, and says nothing: the neighbour throws away what is not for it.
        it.near.ip("address add 10.77.0.98/32 dev lo")
        it.near.ip("route add blackhole 10.77.0.2 table 5")
        it.near.ip("rule add from 10.77.0.98 lookup 5")
        with it.far.inside():
            target, closed = EchoServer(), refusing_port()
        with target, closed as closed_port:
            for name in ("none-first", "none6-first", "silent-first"):
                started_s = time.monotonic()
                with it.near.inside(), socks_connect(it.socks_port, f"{name}.example", target.port) as sock:
                    echo(sock)
                took_s = time.monotonic() - started_s
                print(f"{name}: connected after {took_s:.2f} s")
                assert took_s < AT_ONCE_S
            assert it.status_of("none.example")[0] == NETWORK_UNREACHABLE
            # What says most of the target speaks for all of its addresses.
            it.far.ip("ntable change name arp_cache dev way retrans 100")
            for name, port, expected in (
                ("none-and-refused", closed_port, REFUSED),
                ("none-and-nobody", 80, HOST_UNREACHABLE),
            ):
                status, took_s = it.status_of(f"{name}.example", port)
                assert status == expected
                assert took_s < AT_ONCE_S


# The path between the halves.


@dataclass(frozen=True)
class Break:
    """How the path goes, and how it comes back: what ``ip`` is told, at the client's end or at the server's."""

    near: str = ""
    far: str = ""
    mend_near: tuple[str, ...] = ()
    mend_far: str = ""

    def happen(self, it: Ground) -> None:
        for end, command in ((it.near, self.near), (it.far, self.far)):
            if command:
                end.ip(command)

    def end(self, it: Ground) -> None:
        for command in self.mend_near:
            it.near.ip(command)
        if self.mend_far:
            it.far.ip(self.mend_far)


ROUTE = f"{BEHIND} via {THERE}"
BREAKS = {
    "the client's link is down": Break(near="link set way down", mend_near=("link set way up", f"route add {ROUTE}")),
    "the server's link is down": Break(far="link set way down", mend_far="link set way up"),
    "the client has no route": Break(near=f"route del {ROUTE}", mend_near=(f"route add {ROUTE}",)),
    "the client's route says unreachable": Break(
        near=f"route replace unreachable {BEHIND}", mend_near=(f"route replace {ROUTE}",)
    ),
    "the client's route is prohibited": Break(
        near=f"route replace prohibit {BEHIND}", mend_near=(f"route replace {ROUTE}",)
    ),
    "the server has no way back": Break(
        far="route del 10.77.0.0/24", mend_far=f"route add 10.77.0.0/24 dev way src {THERE}"
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_when_the_path_to_the_server_is_back_new_requests_work_and_what_ran_goes_on(tmp_path: Path, name: str) -> None:
    # Finding the tunnel dead, at most two delays and dials that fail, and a busy machine.
    bound_s = 10.0
    with ground(tmp_path) as it:
        with it.far.inside():
            target = EchoServer()
        with target:
            with it.near.inside():
                running = socks_connect(it.socks_port, "127.0.0.1", target.port)
            with running:
                echo(running)
                BREAKS[name].happen(it)
                for _ in range(3):
                    status, took_s = it.status_of("127.0.0.1", target.port)
                    assert status == GENERAL_FAILURE
                    assert took_s < bound_s
                BREAKS[name].end(it)
                # The kernel may hold for a moment yet that nobody has the server's address: a dial may hear that.
                it.works_within(AGAIN_S, refusals=2)
                it.works_within(AT_ONCE_S)
                running.settimeout(BOUND_S)
                echo(running)
        assert not [line for line in (*it.outbound.lines, *it.inbound.lines) if "Traceback" in line or "ERROR" in line]
