"""reflex.net.greeting: Reflex or not, decided without telling anything to whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from reflex.complaints import Complaints
from reflex.errors import AuthenticationFailed, ClockSkew, HandshakeError, Replayed
from reflex.metrics import Counters
from reflex.net import failures as failures_module
from reflex.net import greeting as greeting_module
from reflex.net.failures import FAILURES_PER_S, Failures
from reflex.net.greeting import Door, Greeting
from reflex.net.hangup import Lookout
from reflex.protocol.address import Address
from reflex.protocol.handshake import AcceptedHello, accept_hello
from reflex.protocol.pools import Pools
from reflex.protocol.replay import ReplaySet
from tests.ends import End, Origin, tcp_pair
from tests.keys import Keys
from tests.loops import DEADLINE_S, POLL_S, in_loop, turns, until

pytestmark = pytest.mark.usefixtures("each_loop")

TICK_S = 0.001  # of uvloop's clock, and of what is rounded when its times are added up
SOURCE = b"\x7f\x00\x00\x01"
TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)
HTTP_REQUEST = b"GET / HTTP/1.1\r\nHost: example.org\r\nUser-Agent: x\r\nAccept: */*\r\nConnection: close\r\n\r\n"


@dataclass
class Gate:
    """A door, and what came of those who stood before it."""

    pools: Pools
    fallback: Address | None = None
    handshake_timeout_s: float = 3600.0
    keys: Keys = field(default_factory=Keys.generate)
    counters: Counters = field(default_factory=Counters)
    accepted: list[tuple[End, AcceptedHello, bytes]] = field(default_factory=list)
    ended: list[Greeting] = field(default_factory=list)
    greetings: list[Greeting] = field(default_factory=list)
    guests: list[End] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.door = Door(
            loop=asyncio.get_running_loop(),
            credentials=self.keys.server,
            replay=ReplaySet(int(time.time()) - 60),
            pools=self.pools,
            counters=self.counters,
            failures=Failures(),
            complaints=Complaints(),
            lookout=Lookout(asyncio.get_running_loop()),
            handshake_timeout_s=self.handshake_timeout_s,
            fallback=self.fallback,
            on_hello=self._on_hello,
            on_end=self.ended.append,
            names={self.keys.user_id.bytes: "alice"},
        )

    def _on_hello(self, greeting: Greeting, sock: socket.socket, hello: AcceptedHello, rest: memoryview) -> None:
        assert greeting.peer == "guest"
        self.accepted.append((End(sock), hello, bytes(rest)))

    def arrive(self) -> tuple[End, Greeting]:
        """Somebody connects: their end, and what the server makes of it."""
        near, far = tcp_pair()
        self.guests.append(End(near))
        self.greetings.append(Greeting(self.door, far, "guest", SOURCE))
        return self.guests[-1], self.greetings[-1]

    def hello(self) -> bytes:
        return self.keys.hello(int(time.time()))


@contextlib.contextmanager
def gate(pools: Pools, *, fallback: Address | None = None, handshake_timeout_s: float = 3600.0) -> Iterator[Gate]:
    """A gate; at the end everybody is sent away, once, and nothing is left."""
    made = Gate(pools, fallback, handshake_timeout_s)
    try:
        yield made
    finally:
        for greeting in made.greetings:
            greeting.end(reset=True)
            greeting.end(reset=True)
        for end in [*made.guests, *(end for end, _, _ in made.accepted)]:
            end.close()
    assert pools.in_use == 0
    assert len(made.ended) + len(made.accepted) == len(made.greetings)


def has_received(greeting: Greeting, size: int) -> bool:
    return greeting._received == size


# A hello that passes


@in_loop
async def test_a_hello_is_handed_on_with_what_came_behind_it(pools: Pools) -> None:
    with gate(pools) as g:
        end, greeting = g.arrive()
        assert greeting.is_undecided
        await end.send(g.hello() + b"first record")
        await until(lambda: g.accepted)
        _, hello, rest = g.accepted[0]
        assert hello.user_id == g.keys.user_id.bytes
        assert rest == b"first record"
        assert greeting.ended
        assert not greeting.is_undecided
        assert not greeting.is_fallback
        assert g.counters.handshakes_failed == 0


@in_loop
async def test_with_a_fallback_a_hello_in_one_read_passes_as_well(pools: Pools) -> None:
    with Origin() as web, gate(pools, fallback=web.address) as g:
        end, _ = g.arrive()
        await end.send(g.hello())
        await until(lambda: g.accepted)
        assert g.accepted[0][2] == b""
        assert web.is_unvisited


@in_loop
async def test_without_a_fallback_a_hello_may_come_in_pieces(pools: Pools) -> None:
    with gate(pools) as g:
        end, greeting = g.arrive()
        hello = g.hello()
        for start in range(0, 76, 19):
            assert greeting.is_undecided
            await end.send(hello[start : start + 19])
            await until(partial(has_received, greeting, start + 19))
        await until(lambda: g.accepted)


# What is not Reflex, with a fallback: byte for byte the web server's


def not_reflex() -> list[bytes]:
    return [
        secrets.token_bytes(1),
        secrets.token_bytes(10),
        b"\x00" + secrets.token_bytes(74),
        b"\x00" + secrets.token_bytes(75),
        b"\x00" + secrets.token_bytes(199),
        b"\x00" + secrets.token_bytes(8267),
        HTTP_REQUEST,
        b"GET / HTTP/1.0\r\n\r\n",
        TLS_HELLO,
        TLS_HELLO[:30],
    ]


@pytest.mark.parametrize("position", range(len(not_reflex())))
def test_what_is_not_reflex_reaches_the_web_server_whole(pools: Pools, position: int) -> None:
    @in_loop
    async def reaches() -> None:
        sent = not_reflex()[position]
        with Origin() as web, gate(pools, fallback=web.address) as g:
            end, greeting = g.arrive()
            await end.send(sent)
            server = await web.accept()
            assert await server.receive(len(sent)) == sent
            assert greeting.is_fallback
            assert not greeting.is_undecided
            await end.send(b"more")
            assert await server.receive(4) == b"more"
            await server.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            server.finish()
            assert await end.receive_all() == b"HTTP/1.1 400 Bad Request\r\n\r\n"
            end.finish()
            await server.expect_fin()
            await until(lambda: g.ended)
            assert g.counters.fallbacks == 1

    reaches()


@in_loop
async def test_with_a_fallback_the_first_read_decides_so_a_split_hello_is_the_web_servers(pools: Pools) -> None:
    with Origin() as web, gate(pools, fallback=web.address) as g:
        end, _ = g.arrive()
        hello = g.hello()
        await end.send(hello[:75])
        server = await web.accept()
        await end.send(hello[75:])
        assert await server.receive(76) == hello


@in_loop
async def test_http_and_tls_are_not_even_tried_as_a_hello(pools: Pools) -> None:
    with Origin() as web, gate(pools, fallback=web.address) as g:
        for sent in (HTTP_REQUEST, TLS_HELLO):
            end, _ = g.arrive()
            await end.send(sent)
            server = await web.accept()
            assert await server.receive(len(sent)) == sent
        assert g.counters.handshakes_failed == 0
        assert g.counters.fallbacks == 2


@in_loop
async def test_a_fin_without_a_byte_is_the_web_servers(pools: Pools) -> None:
    with Origin() as web, gate(pools, fallback=web.address) as g:
        end, _ = g.arrive()
        end.finish()
        server = await web.accept()
        await server.expect_fin()
        server.finish()
        await end.expect_fin()
        await until(lambda: g.ended)


@in_loop
async def test_who_says_nothing_is_the_web_servers_after_the_handshake_time_out(pools: Pools) -> None:
    with Origin() as web, gate(pools, fallback=web.address, handshake_timeout_s=0.01) as g:
        end, _ = g.arrive()
        server = await web.accept()
        await end.send(HTTP_REQUEST)
        assert await server.receive(len(HTTP_REQUEST)) == HTTP_REQUEST


@in_loop
async def test_a_hello_that_was_seen_before_is_the_web_servers_and_worth_a_line(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    with Origin() as web, gate(pools, fallback=web.address) as g:
        hello = g.hello()
        first, _ = g.arrive()
        await first.send(hello)
        await until(lambda: g.accepted)
        again, _ = g.arrive()
        await again.send(hello + b"rest")
        server = await web.accept()
        assert await server.receive(80) == hello + b"rest"
        assert g.counters.handshakes_failed == 1
    lines = [record for record in caplog.records if "hello refused" in record.getMessage()]
    assert [(line.levelno, line.getMessage()) for line in lines] == [
        (logging.WARNING, "alice at guest: hello refused: hello seen before")
    ]


@in_loop
async def test_hellos_that_are_played_again_and_again_are_no_flood_of_warnings(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with gate(pools) as g:
        hello, old = g.hello(), g.keys.hello(int(time.time()) - 1_000)
        for bytes_sent in [hello, old, *[hello, old] * 5]:
            end, greeting = g.arrive()
            await end.send(bytes_sent)
            await until(lambda greeting=greeting: greeting.ended or greeting._silence)  # type: ignore[misc]
        assert len(g.accepted) == 1
        assert g.counters.handshakes_failed == 11
    lines = [record for record in caplog.records if "hello refused" in record.getMessage()]
    warnings = [record.getMessage() for record in lines if record.levelno == logging.WARNING]
    assert len(lines) == 11
    assert len(warnings) == 2, "one of each kind"


def refusal_of(refusal: HandshakeError, user_id: bytes | None) -> HandshakeError:
    refusal.user_id = user_id
    return refusal


@in_loop
async def test_who_plays_one_hello_hides_neither_another_trouble_nor_another_user(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with gate(pools) as g:
        alice, bob = g.keys.user_id.bytes, bytes(16)
        refusals = [
            refusal_of(Replayed("hello seen before"), alice),
            refusal_of(Replayed("replay set full"), alice),
            refusal_of(Replayed("hello seen before"), bob),
            refusal_of(ClockSkew(200, 120), alice),
        ]
        of_nobody = refusal_of(AuthenticationFailed("not of a known user"), None)
        for refusal in [*refusals, *refusals, refusal_of(ClockSkew(201, 120), alice), of_nobody]:
            g.door.log_refusal("guest", refusal, is_hello=True)
        assert len(g.door.refusals) == len(refusals)
    assert caplog.messages == [
        "alice at guest: hello refused: hello seen before",
        "alice at guest: hello refused: replay set full",
        "a user at guest: hello refused: hello seen before",
        "alice at guest: hello refused: the client's clock is off by +200 s; at most 120 s are allowed",
    ]


@in_loop
async def test_a_fallback_that_is_down_resets_whoever_comes_and_is_complained_of_once(
    pools: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    with Origin() as web:
        address = web.address
    with gate(pools, fallback=address) as g:
        for _ in range(20):
            end, _ = g.arrive()
            await end.send(b"x")
            await end.expect_reset()
            await until(lambda: g.greetings[-1].ended)
    (line,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert f"fallback {address}: " in line


# Without a fallback: silence


@pytest.mark.parametrize("size", [76, 77, 200, 8268])
def test_a_bad_hello_is_read_and_discarded_until_its_sender_leaves(pools: Pools, size: int) -> None:
    @in_loop
    async def is_discarded() -> None:
        with gate(pools) as g:
            end, greeting = g.arrive()
            await end.send(secrets.token_bytes(size))
            await until(lambda: greeting._silence)
            assert pools.in_use == 0  # it costs no buffer for as long as it stays
            for _ in range(3):
                await end.send(bytes(10_000))
                await turns()
            assert end.is_silent
            assert not greeting.ended
            end.finish()
            await end.expect_fin()
            await until(lambda: g.ended)
            assert g.counters.handshakes_failed == 1

    is_discarded()


@pytest.mark.parametrize("sent", [HTTP_REQUEST, TLS_HELLO], ids=["http", "tls"])
def test_http_and_tls_are_met_by_the_same_silence(pools: Pools, sent: bytes) -> None:
    @in_loop
    async def is_silent() -> None:
        with gate(pools) as g:
            end, greeting = g.arrive()
            await end.send(sent)
            await until(lambda: greeting._silence)
            assert end.is_silent

    is_silent()


@pytest.mark.parametrize("size", [0, 10, 75])
def test_less_than_a_hello_is_awaited_until_the_time_out_then_discarded(pools: Pools, size: int) -> None:
    @in_loop
    async def is_discarded() -> None:
        with gate(pools, handshake_timeout_s=0.01) as g:
            end, greeting = g.arrive()
            await end.send(secrets.token_bytes(size))
            await until(lambda: greeting._silence)
            assert end.is_silent
            assert pools.in_use == 0

    is_discarded()


@pytest.mark.parametrize("size", [0, 10, 75])
def test_who_leaves_before_a_whole_hello_is_let_go(pools: Pools, size: int) -> None:
    @in_loop
    async def is_let_go() -> None:
        with gate(pools) as g:
            end, greeting = g.arrive()
            await end.send(secrets.token_bytes(size))
            await until(lambda: greeting._received == size)
            end.finish()
            await end.expect_fin()
            await until(lambda: g.ended)

    is_let_go()


@pytest.mark.parametrize("size", [0, 10, 76])
def test_who_resets_is_let_go(pools: Pools, size: int) -> None:
    @in_loop
    async def is_let_go() -> None:
        with gate(pools) as g:
            end, greeting = g.arrive()
            await end.send(secrets.token_bytes(size))
            await until(lambda: greeting._received == size)
            end.reset()
            await until(lambda: g.ended)

    is_let_go()


def test_the_time_of_the_close_does_not_depend_on_what_was_sent(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that failed, whenever it failed, ends at the time-out and a random time of the same range."""
    asked: list[int] = []

    def randbelow(limit: int) -> int:
        asked.append(limit)
        return limit - 1

    monkeypatch.setattr(secrets, "randbelow", randbelow)

    @in_loop
    async def stays() -> None:
        with gate(pools, handshake_timeout_s=0.2) as g:
            loop = g.door.loop
            begun_s = loop.time()
            for size in (0, 10, 76, 200):
                end, _ = g.arrive()
                await end.send(secrets.token_bytes(size))
            await until(lambda: all(greeting._silence for greeting in g.greetings))
            longest_s = greeting_module.SILENCE_MAX_MS / 1000
            for greeting in g.greetings:
                assert greeting._silence is not None
                at_s = greeting._silence._timer.when()
                assert begun_s - TICK_S <= at_s - 0.2 - longest_s <= loop.time() + TICK_S

    stays()
    assert asked == [greeting_module.SILENCE_MAX_MS + 1] * 4


def test_after_the_silence_the_connection_is_closed(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting_module, "SILENCE_MAX_MS", 20)

    @in_loop
    async def is_closed() -> None:
        with gate(pools, handshake_timeout_s=0.01) as g:
            for size in (10, 76):
                end, _ = g.arrive()
                await end.send(secrets.token_bytes(size))
                await end.expect_fin()
            await until(lambda: len(g.ended) == 2)

    is_closed()


@in_loop
async def test_who_sends_byte_after_byte_gains_no_time_by_it(pools: Pools) -> None:
    with gate(pools) as g:
        end, greeting = g.arrive()
        timer, due_s = greeting._timer, greeting._timer.when()
        for received in range(1, 76):
            await end.send(b"x")
            await until(partial(has_received, greeting, received))
            assert greeting.is_undecided
            assert greeting._timer is timer
            assert not timer.cancelled()
            assert timer.when() == due_s
        await end.send(b"x")
        await until(lambda: greeting._silence)
        silence = greeting._silence
        assert silence is not None
        timer, due_s = silence._timer, silence._timer.when()
        for _ in range(20):
            left = silence._left_bytes
            await end.send(b"x")
            await until(lambda left=left: silence._left_bytes == left - 1)  # type: ignore[misc]
            assert silence._timer is timer
            assert timer.when() == due_s


def test_who_never_ceases_to_send_is_closed_in_the_end(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting_module, "SILENCE_MAX_MS", 20)

    @in_loop
    async def is_closed() -> None:
        with gate(pools, handshake_timeout_s=0.05) as g:
            end, greeting = g.arrive()
            sent = 0

            async def has_ended() -> None:
                nonlocal sent
                while not greeting.ended:
                    if sent < 75 or not greeting.is_undecided:  # it makes no whole hello
                        await end.send(b"x")
                        sent += 1
                    await asyncio.sleep(POLL_S)

            with contextlib.suppress(ConnectionError):  # closed amid what it sends
                await asyncio.wait_for(has_ended(), DEADLINE_S)
            await until(lambda: g.ended)

    is_closed()


@in_loop
async def test_a_readiness_that_was_none_changes_nothing(pools: Pools) -> None:
    with gate(pools) as g:
        end, greeting = g.arrive()
        greeting._on_readable()
        assert pools.in_use == 0
        assert greeting.is_undecided
        await end.send(bytes(76))
        await until(lambda: greeting._silence)
        assert greeting._silence is not None
        greeting._silence._on_readable()
        assert not greeting.ended


# Too much junk from one address


@pytest.mark.parametrize("behind", ["nothing", "a web server"])
def test_beyond_a_rate_junk_from_one_address_costs_no_cryptography(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    has_fallback = behind == "a web server"
    # A failure is made up for in an hour, so that the time of this test does not count.
    monkeypatch.setattr(failures_module, "_INTERVAL_S", 3_600)
    monkeypatch.setattr(failures_module, "_OVER_S", (FAILURES_PER_S - 0.5) * 3_600)
    tried: list[int] = []
    judge = accept_hello

    def counting(hello: memoryview, *args: Any, **kwargs: Any) -> AcceptedHello:
        tried.append(len(hello))
        return judge(hello, *args, **kwargs)

    monkeypatch.setattr(greeting_module, "accept_hello", counting)

    @in_loop
    async def costs_none() -> None:
        with Origin() as web, gate(pools, fallback=web.address if has_fallback else None) as g:
            for _ in range(FAILURES_PER_S + 5):
                end, greeting = g.arrive()
                sent = b"\x00" + secrets.token_bytes(75)
                await end.send(sent)
                await until(lambda greeting=greeting: not greeting.is_undecided)  # type: ignore[misc]
                if has_fallback:
                    assert await (await web.accept()).receive(76) == sent
            assert len(tried) == FAILURES_PER_S
            assert (g.counters.handshakes_failed, g.counters.hellos_not_tried) == (FAILURES_PER_S, 5)

    costs_none()


@in_loop
async def test_a_hello_from_an_address_with_few_failures_is_tried_and_successes_cost_nothing(pools: Pools) -> None:
    with gate(pools) as g:
        for _ in range(3 * FAILURES_PER_S):
            end, _ = g.arrive()
            await end.send(g.hello())
        await until(lambda: len(g.accepted) == 3 * FAILURES_PER_S)
        assert len(g.door.failures) == 0


@pytest.mark.parametrize("first", [b"x", HTTP_REQUEST, TLS_HELLO, b"\x00" * 75], ids=["1", "http", "tls", "75"])
def test_what_cannot_be_a_hello_costs_the_same_before_the_web_server_gets_it(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    judged: list[bytes] = []
    judge = accept_hello

    def noting(hello: bytes, *args: Any, **kwargs: Any) -> AcceptedHello:
        judged.append(bytes(hello))
        return judge(hello, *args, **kwargs)

    monkeypatch.setattr(greeting_module, "accept_hello", noting)

    @in_loop
    async def costs_the_same() -> None:
        with Origin() as web, gate(pools, fallback=web.address) as g:
            end, _ = g.arrive()
            await end.send(first)
            assert await (await web.accept()).receive(len(first)) == first
            assert [len(each) for each in judged] == [76]
            assert judged[0][: len(first)] != first[:76]
            assert g.counters.handshakes_failed == 0
            assert len(g.door.failures) == 1

    costs_the_same()


@in_loop
async def test_a_refusal_is_logged_when_the_web_server_has_the_connection_already(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Origin() as web, gate(pools, fallback=web.address) as g:
        logged: list[bool] = []
        monkeypatch.setattr(greeting_module.log, "log", lambda *_: logged.append(g.greetings[0].is_fallback))
        end, _ = g.arrive()
        await end.send(g.keys.hello(0))
        await until(lambda: logged)
        assert logged == [True]
