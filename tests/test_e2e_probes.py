"""A prober at the server's port, with the server as a process: it learns nothing, whatever it sends.

With a real nginx as the fallback it gets nginx's bytes and nginx's end, and the time until they come does not tell
what its bytes were taken for. Without a fallback it gets nothing, and the end comes at a time of its own.

Timing is compared between kinds of probes at the same port: what costs a failed hello's cryptography, and what
cannot be a hello. A prober cannot see more, since it has no way round the server. The way through the server is
one hop longer than the way to nginx itself, which two thousand probes would show; that hop's delay is measured and
bounded here, not denied.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from reflex.net.options import set_reset_on_close
from tests.distributions import ks_p_value, quantile
from tests.processes import Keys, LoopbackServer, eventually, hello_bytes, start_inbound
from tests.test_e2e_floods import statistics
from tests.webserver import BOUND_S, Answer, converse, loopback_source, running_nginx, tls_hello, without_dates

WEB_PATIENCE_S: Final = 1
KEYS: Final = Keys.generate()
TLS_HELLO: Final = tls_hello()
# What the way through the server may add at the median. The short form runs among other tests, which take milliseconds
# from it; what waits for anything, be it only for the 40 ms of a delayed ACK, is found by both.
SHORT_MAX_ADDED_S: Final = 0.03
MAX_ADDED_S: Final = 0.002
SAME: Final = 0.01  # a p-value above it: not told apart
# A p-value below 0.01 comes once in a hundred times although nothing is wrong. Three times in a row is once in a
# million, and a difference that is there shows each time. So does a delay that is the server's own; one of a machine
# that had other things to do for seconds does not.
TRIES: Final = 3


def with_wrong_bit(hello: bytes, bit: int) -> bytes:
    changed = bytearray(hello)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def refused_by_nginx(size: int) -> bytes:
    """Random bytes that nginx refuses at the first one, and that nobody takes for TLS."""
    return b"\x00" + os.urandom(size - 1)


def hello_with_wrong_bit() -> bytes:
    while True:
        hello = with_wrong_bit(hello_bytes(KEYS), random.randrange(8 * 76))
        # One that begins like a method would make nginx wait for the rest of a method.
        if not (0x41 <= hello[0] <= 0x5A or hello[0] in b"_-\r\n\x16"):
            return hello


# Each of these is refused by nginx at once and in the same way. The first ones could be hellos.
JUDGED: Final[dict[str, Callable[[], bytes]]] = {
    "76 random bytes": lambda: refused_by_nginx(76),
    "300 random bytes": lambda: refused_by_nginx(300),
    "a hello with a wrong bit": hello_with_wrong_bit,
}
NOT_JUDGED: Final[dict[str, Callable[[], bytes]]] = {
    "1 random byte": lambda: refused_by_nginx(1),
    "75 random bytes": lambda: refused_by_nginx(75),
    "TLS": lambda: TLS_HELLO,
    "SSH": lambda: b"SSH-2.0-OpenSSH_9.6\r\n",
}


@pytest.fixture(scope="module")
def nginx_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with running_nginx(tmp_path_factory.mktemp("nginx"), patience_s=WEB_PATIENCE_S, connections=1024) as (_, port):
        yield port


@pytest.fixture(scope="module")
def server_port(tmp_path_factory: pytest.TempPathFactory, nginx_port: int) -> Iterator[int]:
    overrides = {"fallback": f"127.0.0.1:{nginx_port}", "limits": {"handshake_timeout_s": WEB_PATIENCE_S}}
    with start_inbound(tmp_path_factory.mktemp("inbound"), KEYS, overrides) as process:
        yield process.wait_ready()[0][1]


# The same bytes and the same end as nginx.


def letters(size: int) -> bytes:
    """What nginx takes for a method without end, so that it waits for more."""
    return bytes(65 + byte % 26 for byte in random.Random(size).randbytes(size))


def cases() -> dict[str, tuple[list[bytes], bool]]:
    """What is sent, in pieces, and whether FIN follows."""
    hello = hello_bytes(KEYS)
    found: dict[str, tuple[list[bytes], bool]] = {}
    for size in range(301):
        found[f"{size} letters at once, FIN"] = ([letters(size)] if size else [], True)
        if size:
            found[f"{size} random bytes at once"] = ([refused_by_nginx(size)], False)
            found[f"{size} random bytes at once, FIN"] = ([refused_by_nginx(size)], True)
    for size in (1, 2, 38, 75, 76, 77, 300):
        found[f"{size} letters one at a time, FIN"] = ([bytes([letter]) for letter in letters(size)], True)
        found[f"{size} letters one at a time, silence"] = ([bytes([letter]) for letter in letters(size)], False)
    for position in range(76):
        found[f"a wrong bit in byte {position}"] = ([with_wrong_bit(hello, 8 * position + position % 8)], True)
    for size in (1, 32, 48, 75):
        found[f"the first {size} bytes of a hello, silence"] = ([hello[:size]], False)
        found[f"the first {size} bytes of a hello, FIN"] = ([hello[:size]], True)
    for name, data in (("TLS", TLS_HELLO), ("SSH", b"SSH-2.0-OpenSSH_9.6\r\n"), ("HTTP", b"GET / HTTP/1.1\r\n\r\n")):
        found[name] = ([data], False)
        found[f"{name}, FIN"] = ([data], True)
    return found


def test_every_probe_gets_the_bytes_and_the_end_that_nginx_gives(server_port: int, nginx_port: int) -> None:
    wanted = cases()

    def both(case: tuple[int, tuple[list[bytes], bool]]) -> tuple[Answer, Answer]:
        number, (pieces, then_fin) = case
        source = loopback_source(number)
        direct, through = (
            without_dates(converse(port, pieces, then_fin=then_fin, source=source))
            for port in (nginx_port, server_port)
        )
        return direct, through

    with ThreadPoolExecutor(32) as threads:
        answers = dict(zip(wanted, threads.map(both, enumerate(wanted.values())), strict=True))
    assert {case: through for case, (_, through) in answers.items()} == {
        case: direct for case, (direct, _) in answers.items()
    }
    assert len({direct.received for direct, _ in answers.values()}) > 1  # nginx does tell them apart


class Witness(LoopbackServer):
    """A web server that only notes how connections end, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, str]] = []
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        received = bytearray()
        ending = "FIN"
        try:
            while data := sock.recv(65_536):
                received += data
        except ConnectionResetError:
            ending = "RST"
        self.seen.append((bytes(received), ending))


@pytest.mark.parametrize("ending", ["FIN", "RST"])
def test_half_a_hello_and_an_end_reach_the_web_server_as_they_are(tmp_path: Path, ending: str) -> None:
    hello = hello_bytes(KEYS)
    with (
        Witness() as web,
        start_inbound(tmp_path, KEYS, {"fallback": web.address}) as process,
    ):
        port = process.wait_ready()[0][1]
        for size in (1, 38, 75):
            with socket.create_connection(("127.0.0.1", port), BOUND_S) as sock:
                sock.sendall(hello[:size])
                time.sleep(0.05)  # an RST takes with it what has not been read
                if ending == "RST":
                    set_reset_on_close(sock)
        deadline_s = time.monotonic() + BOUND_S
        while len(web.seen) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)
    assert sorted(web.seen) == sorted((hello[:size], ending) for size in (1, 38, 75))


# The same time, whatever was sent.


def answer_time_s(port: int, data: bytes, source: str) -> float:
    """How long the first byte of the answer takes, from the probe on."""
    with socket.create_connection(("127.0.0.1", port), BOUND_S, source_address=(source, 0)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begun_s = time.perf_counter()
        sock.sendall(data)
        first = sock.recv(65_536)
        taken_s = time.perf_counter() - begun_s
        assert first.startswith(b"HTTP/1.1 400 Bad Request")
        while sock.recv(65_536):
            pass
    return taken_s


def times_by_kind(server_port: int, nginx_port: int, rounds: int) -> dict[str, list[float]]:
    """So many answer times of each kind, taken in turn in an order that changes; "direct" is nginx itself.

    Each probe has an address of its own, as a botnet's have: otherwise the server would soon spend no
    cryptography on any of them.
    """
    kinds = {**JUDGED, **NOT_JUDGED}
    taken: dict[str, list[float]] = {name: [] for name in (*kinds, "direct")}
    number = random.randrange(1 << 20)
    for _ in range(rounds):
        # Made beforehand: the work of making one would be seen in the time of the next.
        probes = [(name, kinds.get(name, JUDGED["76 random bytes"])()) for name in taken]
        for name, data in random.sample(probes, len(probes)):
            number += 1
            port = nginx_port if name == "direct" else server_port
            taken[name].append(answer_time_s(port, data, loopback_source(number)))
    return taken


def together(taken: dict[str, list[float]], kinds: dict[str, Callable[[], bytes]]) -> list[float]:
    return [each for name in kinds for each in taken[name]]


def check_times(server_port: int, nginx_port: int, rounds: int, *, max_added_s: float) -> None:
    found: list[str] = []
    for _ in range(TRIES):
        taken = times_by_kind(server_port, nginx_port, rounds)
        judged, others = together(taken, JUDGED), together(taken, NOT_JUDGED)
        direct_s, through_s = quantile(taken["direct"], 0.5), quantile(judged + others, 0.5)
        p_value = ks_p_value(judged, others)
        found.append(
            f"{len(judged)} probes that could be hellos, median {quantile(judged, 0.5) * 1e6:.0f} us;"
            f" {len(others)} that could not, {quantile(others, 0.5) * 1e6:.0f} us: p = {p_value:.3f};"
            f" nginx itself {direct_s * 1e6:.0f} us, p = {ks_p_value(taken['direct'], judged + others):.3f}"
        )
        print(found[-1], {name: round(quantile(each, 0.5) * 1e6) for name, each in taken.items()})
        if through_s - direct_s < max_added_s and p_value > SAME:
            return
    pytest.fail(f"told apart by their times, or too long on the way: {found}")


def test_the_time_to_the_answer_does_not_tell_what_a_probe_was_taken_for(server_port: int, nginx_port: int) -> None:
    rounds = 2_000 // (len(JUDGED) + len(NOT_JUDGED)) + 1
    check_times(server_port, nginx_port, rounds, max_added_s=SHORT_MAX_ADDED_S)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_nor_do_very_many_times_tell_it(server_port: int, nginx_port: int) -> None:
    check_times(server_port, nginx_port, 20_000 // (len(JUDGED) + len(NOT_JUDGED)), max_added_s=MAX_ADDED_S)


# Without a fallback: nothing.

SILENCE_S: Final = 1.0  # of the random time, instead of 30 s
HANDSHAKE_S: Final = 1.0
QUICK_SILENCE: Final = f"import reflex.net.greeting as g; g.SILENCE_MAX_MS = {SILENCE_S * 1000:.0f}"
SILENT_KINDS: Final[dict[str, Callable[[], list[bytes]]]] = {
    "nothing": list,
    "one byte": lambda: [os.urandom(1)],
    "75 bytes": lambda: [os.urandom(75)],
    "76 bytes": lambda: [os.urandom(76)],
    "300 bytes one at a time": lambda: [bytes([byte]) for byte in os.urandom(300)],
    "a hello with a wrong bit": lambda: [hello_with_wrong_bit()],
    "half a hello": lambda: [hello_bytes(KEYS)[:38]],
    "HTTP": lambda: [b"GET / HTTP/1.1\r\nHost: example.org\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n"],
    "TLS": lambda: [TLS_HELLO],
    "SSH": lambda: [b"SSH-2.0-OpenSSH_9.6\r\n"],
}


def silence_of(port: int, pieces: list[bytes], source: str) -> tuple[Answer, float]:
    """What came back and how it ended; and how long after the connection was made."""
    begun_s = time.monotonic()
    return converse(port, pieces, source=source), time.monotonic() - begun_s


def test_without_a_fallback_no_probe_gets_a_byte_and_the_end_is_a_matter_of_chance(tmp_path: Path) -> None:
    each = 40
    for attempt in range(TRIES):
        with start_inbound(
            tmp_path, KEYS, {"limits": {"handshake_timeout_s": HANDSHAKE_S}}, prelude=QUICK_SILENCE
        ) as process:
            port = process.wait_ready()[0][1]
            names = [name for name in SILENT_KINDS for _ in range(each)]
            random.shuffle(names)
            with ThreadPoolExecutor(len(names)) as threads:
                results = list(
                    threads.map(
                        lambda job: silence_of(port, SILENT_KINDS[job[1]](), loopback_source(job[0])),  # noqa: B023
                        enumerate(names),
                    )
                )
        assert {answer for answer, _ in results} == {Answer(b"", "FIN")}
        times = {
            name: [taken for (_, taken), kind in zip(results, names, strict=True) if kind == name]
            for name in SILENT_KINDS
        }
        # None ends before the handshake time-out, all end within the random time after it.
        assert all(taken_s >= HANDSHAKE_S - 0.05 for taken_list in times.values() for taken_s in taken_list)
        p_values = {
            name: ks_p_value(own, [each for other, theirs in times.items() if other != name for each in theirs])
            for name, own in times.items()
        }
        print({name: f"{value:.3f}" for name, value in p_values.items()})
        # The smallest of ten is below a tenth of the bound as often as one is below the bound.
        if min(p_values.values()) > SAME / len(p_values):
            return
        assert attempt < TRIES - 1, p_values


@pytest.mark.parametrize("ending", ["FIN", "RST"])
def test_without_a_fallback_who_leaves_is_let_go_whatever_it_sent(tmp_path: Path, ending: str) -> None:
    patient = {"limits": {"handshake_timeout_s": 600}}  # nobody is let go by a time-out
    with start_inbound(tmp_path, KEYS, patient) as process:

        def greetings() -> int:
            return int(statistics(process)["gauges"]["greetings"])

        port = process.wait_ready()[0][1]
        with contextlib.ExitStack() as stack:
            for kind in SILENT_KINDS.values():
                pieces = kind()
                if ending == "FIN":
                    assert converse(port, pieces, then_fin=True) == Answer(b"", "FIN")
                else:
                    sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), BOUND_S))
                    for piece in pieces:
                        sock.sendall(piece)
                    set_reset_on_close(sock)
            if ending == "RST":
                assert eventually(lambda: greetings() == len(SILENT_KINDS))
        assert eventually(lambda: greetings() == 0)
