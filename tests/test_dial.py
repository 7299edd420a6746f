"""reflex.net.dial: names to addresses to sockets, over loopback and with resolvers of our own."""

from __future__ import annotations

import asyncio
import errno
import select
import socket
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, TypeVar

import pytest
import uvloop

from reflex.errors import DialError
from reflex.net import dial as dial_module
from reflex.net.dial import (
    begin_connect,
    dial,
    finish_connect,
    is_connected,
    is_own_fault,
    resolve,
    status_of,
)
from reflex.net.resolver import AddrInfo
from reflex.net.targets import TargetPolicy
from reflex.protocol.address import Address
from reflex.protocol.wire import AddressType, Status
from tests.conftest import require_ipv6

T = TypeVar("T")
V4, NAME, V6 = AddressType.IPV4, AddressType.NAME, AddressType.IPV6
LIMIT_S = 5.0  # for what must not take any time


@dataclass(frozen=True)
class R:
    host_pattern: str
    network: IPv4Network | IPv6Network | None = None
    port: int | None = None


ONLY_127_0_0_2 = TargetPolicy([R("127.0.0.2", ip_network("127.0.0.2"))])


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Listens on every IPv4 loopback address."""
    with socket.create_server(("0.0.0.0", 0)) as sock:
        yield sock


@pytest.fixture
def port(listener: socket.socket) -> int:
    number: int = listener.getsockname()[1]
    return number


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is bound, so that nobody else takes it, but does not listen: it refuses."""
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        yield sock.getsockname()[1]


def info(host: str, port: int, scope: int = 0) -> AddrInfo:
    if ":" in host:
        return (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port, 0, scope))
    return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))


class Resolver:
    """Stands for the loop's getaddrinfo: the n-th look-up gets the n-th answer."""

    def __init__(self, *answers: list[AddrInfo] | BaseException) -> None:
        self.answers = answers
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int, **_: Any) -> list[AddrInfo]:
        answer = self.answers[len(self.asked)]
        self.asked.append((host, port))
        if isinstance(answer, BaseException):
            raise answer
        return answer


def run(main: Callable[[], Coroutine[Any, Any, T]], resolver: Resolver | None = None) -> T:
    async def with_resolver() -> T:
        if resolver is not None:
            asyncio.get_running_loop().getaddrinfo = resolver  # type: ignore[method-assign, assignment]
        return await main()

    return asyncio.run(with_resolver())


def failure(
    address: Address,
    resolver: Resolver | None = None,
    policy: TargetPolicy | None = None,
    timeout_s: float = LIMIT_S,
) -> Status:
    """Dial what must fail, and give the status."""
    with pytest.raises(DialError) as caught:
        run(lambda: dial(address, timeout_s=timeout_s, policy=policy), resolver)
    return Status(caught.value.status)


def wait_writable(sock: socket.socket) -> None:
    assert select.select([], [sock], [], LIMIT_S)[1] == [sock]


# Resolving


def test_resolve_gives_addresses_for_tcp() -> None:
    infos = run(lambda: resolve("127.0.0.1", 80))
    assert [(i[0], i[1], i[4]) for i in infos] == [(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 80))]
    infos = run(lambda: resolve("::1", 80, family=socket.AF_INET6))
    assert [i[4][:2] for i in infos] == [("::1", 80)]


@pytest.mark.parametrize(
    "answer",
    [
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        UnicodeError("label empty or too long"),
        [],
        [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", ("", 0))],
    ],
)
def test_names_that_do_not_resolve(answer: Any) -> None:
    assert failure(Address(NAME, "nowhere.example", 80), Resolver(answer)) is Status.HOST_UNREACHABLE


def test_a_name_that_cannot_be_looked_up_for_want_of_descriptors() -> None:
    resolver = Resolver(OSError(errno.EMFILE, "Too many open files"))
    assert failure(Address(NAME, "nowhere.example", 80), resolver) is Status.GENERAL_FAILURE


def test_an_address_that_cannot_be_judged_for_want_of_descriptors_is_not_dialled() -> None:
    def is_own(_: str) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    policy = TargetPolicy(is_own=is_own)
    assert failure(Address(V4, "8.8.8.8", 80), policy=policy) is Status.GENERAL_FAILURE
    with pytest.raises(DialError) as caught:
        begin_connect(Address(V4, "8.8.8.8", 80), policy=policy)
    assert caught.value.status == Status.GENERAL_FAILURE


@pytest.mark.parametrize("name", ["a..example", "x" * 64 + ".example"])
def test_labels_that_no_resolver_takes(name: str) -> None:
    assert failure(Address(NAME, name, 80)) is Status.HOST_UNREACHABLE


# dial


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_dial_a_literal_and_move_bytes(
    new_loop: Callable[[], asyncio.AbstractEventLoop], listener: socket.socket, port: int
) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        sock = runner.run(dial(Address(V4, "127.0.0.1", port), timeout_s=LIMIT_S, keepalive_s=600))
    with sock:
        assert not sock.getblocking()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), "nobody is probed on loopback"
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(LIMIT_S)
            sock.send(b"ping")
            assert peer.recv(4) == b"ping"


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_dial_a_name(new_loop: Callable[[], asyncio.AbstractEventLoop], port: int) -> None:
    # localhost may have ::1 first, where nobody listens: the other address must be found.
    with asyncio.Runner(loop_factory=new_loop) as runner:
        sock = runner.run(dial(Address(NAME, "localhost", port), timeout_s=LIMIT_S, nodelay=False))
    with sock:
        assert sock.getpeername() == ("127.0.0.1", port)
        assert not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_dial_ipv6() -> None:
    require_ipv6()
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        sock = run(lambda: dial(Address(V6, "::1", port), timeout_s=LIMIT_S))
        with sock:
            assert sock.getpeername()[:2] == ("::1", port)


def test_refused(closed_port: int) -> None:
    assert failure(Address(V4, "127.0.0.1", closed_port)) is Status.REFUSED
    both = Resolver([info("127.0.0.1", closed_port), info("127.0.0.2", closed_port)])
    assert failure(Address(NAME, "two.example", closed_port), both) is Status.REFUSED


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_refused_on_uvloop_too(new_loop: Callable[[], asyncio.AbstractEventLoop], closed_port: int) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner, pytest.raises(DialError) as caught:
        runner.run(dial(Address(NAME, "localhost", closed_port), timeout_s=LIMIT_S))
    assert caught.value.status == Status.REFUSED


def connect_outcomes(outcomes: dict[str, Exception], sockets: list[socket.socket]) -> Any:
    """Stand for the loop's sock_connect: fail as told by host, never end for any other host."""

    async def sock_connect(sock: socket.socket, address: tuple[Any, ...]) -> None:
        sockets.append(sock)
        if address[0] in outcomes:
            raise outcomes[address[0]]
        await asyncio.get_running_loop().create_future()

    return sock_connect


def test_several_failures_give_the_most_telling_status() -> None:
    outcomes: dict[str, Exception] = {
        "::1": OSError(errno.ENETUNREACH, "Network is unreachable"),
        "127.0.0.1": OSError(errno.ECONNREFUSED, "Connection refused"),
        "127.0.0.2": RuntimeError("File descriptor is used by transport"),
    }
    infos = [info("::1", 80), info("127.0.0.1", 80), info("127.0.0.2", 80)]
    sockets: list[socket.socket] = []

    async def main() -> None:
        asyncio.get_running_loop().sock_connect = connect_outcomes(outcomes, sockets)  # type: ignore[method-assign]
        await dial(Address(NAME, "mixed.example", 80), timeout_s=LIMIT_S)

    with pytest.raises(DialError) as caught:
        run(main, Resolver(infos))
    assert caught.value.status == Status.REFUSED
    assert [sock.fileno() for sock in sockets] == [-1, -1, -1]


def test_time_limit_on_resolving() -> None:
    async def never(*_: Any, **__: Any) -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        asyncio.get_running_loop().getaddrinfo = never  # type: ignore[method-assign, assignment]
        await dial(Address(NAME, "slow.example", 80), timeout_s=0.01)

    with pytest.raises(DialError) as caught:
        run(main)
    assert caught.value.status == Status.TIMED_OUT


@pytest.mark.parametrize("hosts", [["127.0.0.1"], ["127.0.0.1", "::1"]])
def test_time_limit_on_connecting_closes_the_sockets(hosts: list[str]) -> None:
    sockets: list[socket.socket] = []

    async def main() -> None:
        asyncio.get_running_loop().sock_connect = connect_outcomes({}, sockets)  # type: ignore[method-assign]
        await dial(Address(NAME, "slow.example", 80), timeout_s=0.5)

    with pytest.raises(DialError) as caught:
        run(main, Resolver([info(host, 80) for host in hosts]))
    assert caught.value.status == Status.TIMED_OUT
    assert [sock.fileno() for sock in sockets] == [-1] * len(hosts)


def test_a_cancelled_dial_closes_its_socket() -> None:
    sockets: list[socket.socket] = []

    async def main() -> None:
        started = asyncio.Event()
        hang = connect_outcomes({}, sockets)

        async def sock_connect(sock: socket.socket, address: tuple[Any, ...]) -> None:
            started.set()
            await hang(sock, address)

        asyncio.get_running_loop().sock_connect = sock_connect  # type: ignore[method-assign, assignment]
        task = asyncio.create_task(dial(Address(V4, "127.0.0.1", 80), timeout_s=LIMIT_S))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert [sock.fileno() for sock in sockets] == [-1]


def test_options_that_fail_close_the_socket(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    seen: list[socket.socket] = []

    def refuse(sock: socket.socket, **_: Any) -> None:
        seen.append(sock)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(dial_module, "set_options", refuse)
    assert failure(Address(V4, "127.0.0.1", port)) is Status.GENERAL_FAILURE
    with pytest.raises(DialError):
        begin_connect(Address(V4, "127.0.0.1", port))
    assert [sock.fileno() for sock in seen] == [-1, -1]


# dial with a policy


def test_forbidden_literals_are_not_dialled(listener: socket.socket, port: int) -> None:
    for address in (Address(V4, "127.0.0.1", port), Address(V6, "::ffff:127.0.0.1", port)):
        assert failure(address, Resolver(), TargetPolicy()) is Status.NOT_ALLOWED
        with pytest.raises(DialError) as caught:
            begin_connect(address, policy=TargetPolicy())
        assert caught.value.status == Status.NOT_ALLOWED
    assert select.select([listener], [], [], 0)[0] == []


def test_allowed_literals_are_dialled(port: int) -> None:
    address = Address(V4, "127.0.0.2", port)
    run(lambda: dial(address, timeout_s=LIMIT_S, policy=ONLY_127_0_0_2)).close()
    begin_connect(address, policy=ONLY_127_0_0_2).close()


def test_a_name_that_resolves_to_forbidden_addresses(listener: socket.socket, port: int) -> None:
    resolver = Resolver([info("127.0.0.1", port), info("::1", port), info("fe80::1", port, scope=2)])
    assert failure(Address(NAME, "rebind.example", port), resolver, TargetPolicy()) is Status.NOT_ALLOWED
    assert select.select([listener], [], [], 0)[0] == []


def test_a_real_name_of_loopback_is_refused(port: int) -> None:
    assert failure(Address(NAME, "localhost", port), None, TargetPolicy()) is Status.NOT_ALLOWED


def test_a_denied_name_is_not_resolved() -> None:
    resolver = Resolver()
    policy = TargetPolicy(deny=[R("*.example")])
    assert failure(Address(NAME, "bad.example", 80), resolver, policy) is Status.NOT_ALLOWED
    assert resolver.asked == []


def test_a_scope_is_refused_even_for_an_allowed_name() -> None:
    policy = TargetPolicy(allow=[R("*")])
    resolver = Resolver([info("fe80::1", 80, scope=2)])
    assert failure(Address(NAME, "link.example", 80), resolver, policy) is Status.NOT_ALLOWED


def test_of_a_mixed_list_only_the_allowed_are_dialled(listener: socket.socket, port: int) -> None:
    resolver = Resolver([info("127.0.0.1", port), info("127.0.0.2", port), info("::1", port)])
    address = Address(NAME, "mixed.example", port)
    with run(lambda: dial(address, timeout_s=LIMIT_S, policy=ONLY_127_0_0_2), resolver) as sock:
        assert sock.getpeername() == ("127.0.0.2", port)
    listener.accept()[0].close()
    assert select.select([listener], [], [], 0)[0] == []


def test_a_name_that_changes_between_look_ups_gains_nothing(port: int) -> None:
    resolver = Resolver([info("127.0.0.2", port)], [info("127.0.0.1", port)])
    address = Address(NAME, "rebind.example", port)
    with run(lambda: dial(address, timeout_s=LIMIT_S, policy=ONLY_127_0_0_2), resolver) as sock:
        assert sock.getpeername() == ("127.0.0.2", port)
    assert resolver.asked == [("rebind.example", port)]


def test_an_allowed_name_may_have_addresses_that_are_not_public(port: int) -> None:
    policy = TargetPolicy(allow=[R("*.internal.example", None, port)])
    resolver = Resolver([info("127.0.0.1", port)])
    run(lambda: dial(Address(NAME, "db.internal.example", port), timeout_s=LIMIT_S, policy=policy), resolver).close()


# begin_connect, finish_connect


def test_begin_and_finish(listener: socket.socket, port: int) -> None:
    with begin_connect(Address(V4, "127.0.0.1", port), keepalive_s=5) as sock:
        assert not sock.getblocking()
        wait_writable(sock)
        finish_connect(sock)
        assert sock.getpeername() == ("127.0.0.1", port)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        listener.accept()[0].close()


@pytest.mark.parametrize(("kind", "host"), [(V4, "127.0.0.1"), (V6, "::1")])
def test_begin_to_a_port_that_refuses(kind: AddressType, host: str, closed_port: int) -> None:
    if kind is V6:
        require_ipv6()
    with pytest.raises(DialError) as caught:  # noqa: PT012, SIM117  the system may refuse at once or later
        with begin_connect(Address(kind, host, closed_port)) as sock:
            wait_writable(sock)
            finish_connect(sock)
    assert caught.value.status == Status.REFUSED


def test_begin_to_a_broadcast_address_fails_at_once() -> None:
    with pytest.raises(DialError) as caught:
        begin_connect(Address(V4, "255.255.255.255", 80))
    assert caught.value.status in (Status.NETWORK_UNREACHABLE, Status.NOT_ALLOWED)


def test_begin_without_a_free_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socket", no_socket)
    with pytest.raises(DialError) as caught:
        begin_connect(Address(V4, "127.0.0.1", 80))
    assert caught.value.status == Status.GENERAL_FAILURE


@pytest.mark.parametrize(
    ("cause", "is_ours"),
    [
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ENFILE, "Too many open files in system"), True),
        (OSError(errno.ECONNREFUSED, "Connection refused"), False),
        (None, False),
    ],
)
def test_whose_fault_a_failure_is(cause: OSError | None, is_ours: bool) -> None:  # noqa: FBT001  pytest passes it by name
    error = DialError(Status.GENERAL_FAILURE, "failed")
    error.__cause__ = cause
    assert is_own_fault(error) is is_ours


def test_begin_takes_no_names() -> None:
    with pytest.raises(ValueError, match="name"):
        begin_connect(Address(NAME, "localhost", 80))


# Options and statuses


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, ""), Status.REFUSED),
        (OSError(errno.ENETUNREACH, ""), Status.NETWORK_UNREACHABLE),
        (OSError(errno.EHOSTUNREACH, ""), Status.HOST_UNREACHABLE),
        (OSError(errno.ETIMEDOUT, ""), Status.TIMED_OUT),
        (TimeoutError(), Status.TIMED_OUT),
        (PermissionError(errno.EPERM, ""), Status.NOT_ALLOWED),
        (OSError(errno.EAFNOSUPPORT, ""), Status.ADDRESS_TYPE_NOT_SUPPORTED),
        (OSError(errno.EMFILE, ""), Status.GENERAL_FAILURE),
        (OSError(errno.ENFILE, ""), Status.GENERAL_FAILURE),
        (OSError("Multiple exceptions: ..."), Status.GENERAL_FAILURE),
        (socket.gaierror(socket.EAI_AGAIN, ""), Status.HOST_UNREACHABLE),
        (DialError(Status.REFUSED, ""), Status.REFUSED),
        (ValueError(), Status.GENERAL_FAILURE),
    ],
)
def test_status_of(error: BaseException, status: Status) -> None:
    assert status_of(error) is status


def test_a_connection_on_the_same_machine_is_there_right_after_it_was_begun() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address.of("127.0.0.1", server.getsockname()[1])
        with begin_connect(address) as sock:
            assert is_connected(sock, address)
            assert is_connected(sock, address)  # asking again changes nothing


def test_a_refusal_on_the_same_machine_is_known_right_after_the_connection_was_begun() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = Address.of("127.0.0.1", closed.getsockname()[1])
        with begin_connect(address) as sock:
            with pytest.raises(DialError) as caught:
                is_connected(sock, address)
            assert caught.value.status == Status.REFUSED


def test_a_connection_that_is_under_way_is_not_there_yet() -> None:
    class UnderWay(socket.socket):
        def connect_ex(self, address: object) -> int:
            return errno.EALREADY

    with UnderWay() as sock:
        assert not is_connected(sock, Address.of("127.0.0.1", 9))
