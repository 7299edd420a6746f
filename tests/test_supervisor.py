"""Several workers as one daemon, as real processes: nobody is lost, at start, at stop, or when one dies."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import http.client
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.local import Process
from reflex import supervisor
from reflex.net.listener import open_listening, open_shared
from reflex.protocol.wire import SERVER_HELLO_SIZE
from reflex.usage import LAST_WRITE_S
from tests.processes import (
    HELLO,
    EchoServer,
    Keys,
    Origin,
    hello_bytes,
    kept_port,
    make_pair,
    receive_exactly,
    socks_connect,
    start_inbound,
    start_outbound,
)

TIMEOUT_S = 20


@pytest.fixture
def keys() -> Keys:
    return Keys.generate()


def test_who_ends_at_once_may_finish_its_last_write() -> None:
    assert supervisor.KILL_AFTER_S > LAST_WRITE_S


def test_a_machine_without_room_for_processes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    before = signal.getsignal(signal.SIGTERM)
    groups = [open_shared("127.0.0.1", 0, count=2)]
    parent = supervisor.Supervisor(groups, lambda _context, _control: 0, logging.getLogger("reflex.fake"))
    assert parent.run() == 2
    assert [record.getMessage() for record in caplog.records] == ["cannot start: Resource temporarily unavailable"]
    assert [sock.fileno() for sock in groups[0]] == [-1, -1]
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


# Real processes.


def children(process: Process) -> list[int]:
    """The process ids of the workers."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def statistics(process: Process, *, workers: int) -> dict[int, dict[str, Any]]:
    """Ask all workers for their statistics; by worker."""
    since = len(process.lines)
    process.send_signal(signal.SIGUSR1)
    found: dict[int, dict[str, Any]] = {}
    for number in range(1, workers + 1):
        match = process.wait_for_line(rf"worker {number}: statistics: (\{{.*\}})", since=since)
        found[number] = json.loads(match.group(1))
        assert found[number]["gauges"]["worker"] == number
    return found


def until(condition: Callable[[], bool]) -> None:
    """Wait for what no line tells."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def echo(port: int, target_port: int, size: int = 1000) -> None:
    data = os.urandom(size)
    with socks_connect(port, "127.0.0.1", target_port) as sock:
        sock.sendall(data)
        assert receive_exactly(sock, size) == data


@pytest.fixture
def echo_port() -> Iterator[int]:
    with EchoServer() as server:
        yield server.port


def test_a_hello_replayed_to_another_worker_is_refused(tmp_path: Path, keys: Keys) -> None:
    attempts = 20  # as many failures as one address may have at once
    # Of refusals that come one after the other only some are told of above debug.
    with start_inbound(tmp_path, keys, {"workers": 2}, arguments=["--log-level", "debug"]) as inbound:
        ((_, port),) = inbound.wait_ready()
        hello = hello_bytes(keys)
        sockets = []
        for _ in range(attempts):
            sock = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
            sock.sendall(hello)
            sockets.append(sock)
        refused = [0, 0]
        until(lambda: sum("hello seen before" in line for line in inbound.lines) == attempts - 1)
        for line in inbound.lines:
            if match := re.search(r"worker (\d): .*hello refused: hello seen before", line):
                refused[int(match.group(1)) - 1] += 1
        assert all(refused), f"the kernel gave all {attempts} connections to one worker"
        figures = statistics(inbound, workers=2)
        assert sum(each["counters"]["handshakes_completed"] for each in figures.values()) == 1
        assert [each["counters"]["handshakes_failed"] for each in figures.values()] == refused
        assert [each["gauges"]["replay_keys"] for each in figures.values()] == [1, 1]
        answered = 0
        for sock in sockets:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                answered += len(sock.recv(SERVER_HELLO_SIZE)) == SERVER_HELLO_SIZE
            sock.close()
        assert answered == 1


def test_one_ready_line_and_a_clean_stop(tmp_path: Path, echo_port: int) -> None:
    with make_pair(tmp_path, inbound={"workers": 2}, outbound={"workers": 3}) as pair:
        for process, workers in ((pair.inbound, 2), (pair.outbound, 3)):
            assert sum("ready: " in line for line in process.lines) == 1
            assert len(children(process)) == workers
        for _ in range(30):
            echo(pair.socks_port, echo_port)
        for process, workers in ((pair.outbound, 3), (pair.inbound, 2)):
            pids = children(process)
            figures = statistics(process, workers=workers)
            if process is pair.outbound:  # 30 connections; the server sees one tunnel of each client worker only
                assert sum(each["counters"]["connections_accepted"] > 0 for each in figures.values()) > 1
            assert process.stop() == 0
            assert not any(is_alive(pid) for pid in pids)
            assert sum(line.endswith(": stopped") for line in process.lines) == workers + 1
            assert not [line for line in process.lines if "WARNING" in line or "ERROR" in line]


def test_a_killed_worker_is_replaced(tmp_path: Path, echo_port: int) -> None:
    with make_pair(tmp_path, outbound={"workers": 2}) as pair:
        outbound = pair.outbound
        victim = children(outbound)[0]
        for when in ("now", r"in 0\.2 s"):
            seen = len(outbound.lines)
            os.kill(victim, signal.SIGKILL)
            died = outbound.wait_for_line(
                rf"worker (\d) \(process {victim}\) was ended by SIGKILL; replaced {when}", since=seen
            )
            again = outbound.wait_for_line(r"worker (\d) is ready again, as process (\d+)", since=seen)
            assert again.group(1) == died.group(1)
            assert victim not in children(outbound)
            assert len(children(outbound)) == 2
            for _ in range(20):
                echo(pair.socks_port, echo_port)
            victim = int(again.group(2))


OFTEN_ASKED = """
import reflex.supervisor
reflex.supervisor.LOOK_INTERVAL_S = 0.5
"""


@contextlib.contextmanager
def often_asked(directory: Path, keys: Keys) -> Iterator[tuple[Process, int]]:
    """A client of two workers that are asked every 0.5 s whether they are alive, and its SOCKS5 port."""
    with start_inbound(directory, keys) as inbound:
        server_port = inbound.wait_ready()[0][1]
        with start_outbound(directory, keys, server_port, {"workers": 2}, prelude=OFTEN_ASKED) as outbound:
            yield outbound, outbound.wait_ready()[0][1]


def test_a_worker_that_does_not_answer_is_replaced_and_who_does_is_left_alone(
    tmp_path: Path, keys: Keys, echo_port: int
) -> None:
    with often_asked(tmp_path, keys) as (outbound, socks_port):
        victim, other = children(outbound)
        os.kill(victim, signal.SIGSTOP)
        outbound.wait_for_line(rf"worker \d \(process {victim}\) does not answer: killed")
        outbound.wait_for_line(rf"worker \d \(process {victim}\) was ended by SIGKILL; replaced now")
        outbound.wait_for_line(r"worker \d is ready again")
        assert other in children(outbound)
        for _ in range(20):
            echo(socks_port, echo_port)


STUCK_ONCE_REPLACED = """
import os, time
import reflex.supervisor
from reflex.inbound import Inbound
reflex.supervisor.LOOK_INTERVAL_S = 0.3
start, parent, forks, fork = Inbound.start, os.getpid(), [], os.fork

def count():
    forks.append(0)
    return fork()

async def stuck(self):
    while len(forks) == 3:
        time.sleep(60)
    return await start(self)

os.fork, Inbound.start = count, stuck
"""


def test_a_replacement_that_does_not_become_ready_is_replaced(tmp_path: Path, keys: Keys) -> None:
    with start_inbound(tmp_path, keys, {"workers": 2}, prelude=STUCK_ONCE_REPLACED) as inbound:
        inbound.wait_ready()
        os.kill(children(inbound)[0], signal.SIGKILL)
        stuck = inbound.wait_for_line(r"worker (\d) \(process \d+\) does not become ready: killed").group(1)
        inbound.wait_for_line(rf"worker {stuck} is ready again")
        assert len(children(inbound)) == 2


def test_when_all_were_stopped_for_a_while_none_is_taken_for_dead(tmp_path: Path, keys: Keys, echo_port: int) -> None:
    with often_asked(tmp_path, keys) as (outbound, socks_port):
        workers = children(outbound)
        for pid in (outbound.pid, *workers):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)  # for longer than four questions
        for pid in (*workers, outbound.pid):
            os.kill(pid, signal.SIGCONT)
        for _ in range(20):
            echo(socks_port, echo_port)
        assert children(outbound) == workers
        assert not [line for line in outbound.lines if "does not answer" in line]


def test_connections_wait_for_the_replacement(tmp_path: Path, echo_port: int) -> None:
    """Those in the queue of a stopped worker are served by the one that comes after it."""
    with make_pair(tmp_path, outbound={"workers": 2}) as pair:
        victims = children(pair.outbound)
        for pid in victims:
            os.kill(pid, signal.SIGSTOP)
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            done = [pool.submit(echo, pair.socks_port, echo_port) for _ in range(20)]
            until(lambda: queued(pair.socks_port) == 20)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            for each in done:
                each.result(TIMEOUT_S)


def queued(port: int) -> int:
    """How many connections wait to be accepted at a port of 127.0.0.1, by /proc/net/tcp's receive queue."""
    queued = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == f"0100007F:{port:04X}" and fields[3] == "0A":
            queued += int(fields[4].partition(":")[2], 16)
    return queued


def test_max_connections_is_of_all_workers(tmp_path: Path, keys: Keys) -> None:
    with start_inbound(tmp_path, keys, {"workers": 2, "limits": {"max_connections": 10}}) as inbound:
        ((_, port),) = inbound.wait_ready()
        sockets = []
        for count in range(1, 21):
            sockets.append(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
            until(partial(has_seen, inbound, count))  # so that no two workers decide at the same moment
        figures = statistics(inbound, workers=2)
        accepted = [each["counters"]["connections_accepted"] for each in figures.values()]
        assert sum(accepted) == 20
        assert all(accepted)
        assert not any(each["counters"]["connections_refused"] for each in figures.values())
        # Strangers give way to each other. A worker that had none may have taken one beyond the limit.
        assert sum(each["gauges"]["greetings"] for each in figures.values()) in (10, 11)
        for sock in sockets:
            sock.close()


def has_seen(inbound: Process, connections: int) -> bool:
    counters = [each["counters"] for each in statistics(inbound, workers=2).values()]
    seen = [each["connections_accepted"] + each["connections_refused"] for each in counters]
    return sum(map(int, seen)) == connections


def hammer(one: Callable[[], None], *, threads: int, enough: Callable[[], None]) -> tuple[int, list[BaseException]]:
    """Call ``one`` in a loop from many threads until it is refused; returns how often it succeeded, and other ends.

    ``enough`` is called once, when every thread has succeeded a few times.
    """
    done = [0] * threads
    errors: list[BaseException] = []

    def loop(number: int) -> None:
        try:
            while True:
                one()
                done[number] += 1
        except ConnectionRefusedError:
            pass
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=loop, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    until(lambda: min(done) > 5 or bool(errors))
    enough()
    for worker in workers:
        worker.join(TIMEOUT_S)
        assert not worker.is_alive()
    return sum(done), errors


@pytest.mark.parametrize("workers", [1, 2])
def test_no_local_connection_is_lost_at_stop(tmp_path: Path, echo_port: int, workers: int) -> None:
    with make_pair(tmp_path, outbound={"workers": workers}) as pair:

        def stop() -> None:
            assert pair.outbound.stop() == 0

        done, errors = hammer(lambda: echo(pair.socks_port, echo_port), threads=6, enough=stop)
        assert not errors, f"after {done}: {errors}"


@pytest.mark.parametrize("workers", [1, 2])
def test_no_connection_to_the_server_is_lost_at_stop(tmp_path: Path, keys: Keys, workers: int) -> None:
    with Origin() as origin:
        overrides = {"workers": workers, "fallback": f"127.0.0.1:{origin.port}"}
        with start_inbound(tmp_path, keys, overrides) as inbound:
            ((_, port),) = inbound.wait_ready()

            def get() -> None:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
                try:
                    connection.request("GET", "/hello")
                    connection.getresponse().read()
                finally:
                    connection.close()

            def stop() -> None:
                assert inbound.stop() == 0

            done, errors = hammer(get, threads=6, enough=stop)
            assert not errors, f"after {done}: {errors}"


@pytest.mark.parametrize("workers", [1, 2])
def test_those_who_wait_when_it_stops_are_served(tmp_path: Path, keys: Keys, echo_port: int, workers: int) -> None:
    """Accepted one by one, most of them wait still when the stop is heard."""
    count = 60
    prelude = "import reflex.net.listener\nreflex.net.listener.ACCEPTS_PER_TURN = 1"
    with start_inbound(tmp_path, keys) as inbound:
        ((_, server_port),) = inbound.wait_ready()
        with start_outbound(tmp_path, keys, server_port, {"workers": workers}, prelude=prelude) as outbound:
            ((_, port),) = outbound.wait_ready()
            pids = children(outbound) if workers > 1 else [outbound.pid]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                done = [pool.submit(echo, port, echo_port) for _ in range(count)]
                until(lambda: queued(port) == count)
                outbound.send_signal(signal.SIGTERM)
                if workers > 1:
                    outbound.wait_for_line("draining 2 workers")
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
                for each in done:
                    each.result(TIMEOUT_S)
            assert outbound.wait() == 0


def test_running_streams_end_before_the_workers(tmp_path: Path, echo_port: int) -> None:
    with make_pair(tmp_path, outbound={"workers": 2}) as pair:
        socks = [socks_connect(pair.socks_port, "127.0.0.1", echo_port) for _ in range(8)]
        pair.outbound.send_signal(signal.SIGTERM)
        pair.outbound.wait_for_line("draining 2 workers")
        for sock in socks:
            with sock:
                sock.sendall(b"still here")
                assert receive_exactly(sock, 10) == b"still here"
        assert pair.outbound.wait() == 0


def test_a_worker_that_dies_while_it_drains_is_no_clean_end(tmp_path: Path, echo_port: int) -> None:
    with make_pair(tmp_path, outbound={"workers": 2}) as pair:
        pids = children(pair.outbound)
        socks = [socks_connect(pair.socks_port, "127.0.0.1", echo_port) for _ in range(20)]
        pair.outbound.send_signal(signal.SIGTERM)
        pair.outbound.wait_for_line("draining 2 workers")
        os.kill(pids[0], signal.SIGKILL)
        pair.outbound.wait_for_line(rf"worker \d \(process {pids[0]}\) was ended by SIGKILL$")
        for sock in socks:
            sock.close()
        assert pair.outbound.wait() == 1


def test_a_second_signal_ends_all_at_once(tmp_path: Path, echo_port: int) -> None:
    with make_pair(tmp_path, outbound={"workers": 2}) as pair:
        pids = children(pair.outbound)
        with socks_connect(pair.socks_port, "127.0.0.1", echo_port):
            pair.outbound.send_signal(signal.SIGTERM)
            pair.outbound.wait_for_line("draining 2 workers")
            os.kill(pids[0], signal.SIGSTOP)  # one that does not heed it
            pair.outbound.send_signal(signal.SIGINT)
            assert pair.outbound.wait() == 128 + signal.SIGINT
        assert not any(is_alive(pid) for pid in pids)


def test_a_worker_that_died_just_before_the_stop_is_replaced_for_those_in_its_queue(
    tmp_path: Path, echo_port: int
) -> None:
    """Its end and the order come in the same wake-up."""
    with make_pair(tmp_path, outbound={"workers": 2}) as pair:
        victims = children(pair.outbound)
        for pid in (*victims, pair.outbound.pid):
            os.kill(pid, signal.SIGSTOP)
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            done = [pool.submit(echo, pair.socks_port, echo_port) for _ in range(20)]
            until(lambda: queued(pair.socks_port) == 20)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            until(lambda: not any(is_alive(pid) for pid in victims))
            pair.outbound.send_signal(signal.SIGTERM)
            pair.outbound.send_signal(signal.SIGCONT)
            for each in done:
                each.result(TIMEOUT_S)
        assert pair.outbound.wait() == 0


def test_signals_to_workers_are_not_orders(tmp_path: Path, echo_port: int) -> None:
    """A terminal and a service manager signal every process of the daemon."""
    with make_pair(tmp_path, outbound={"workers": 2}) as pair:
        pids = children(pair.outbound)
        with socks_connect(pair.socks_port, "127.0.0.1", echo_port) as sock:
            for pid in (*pids, pair.outbound.pid, *pids):
                os.kill(pid, signal.SIGTERM)
            pair.outbound.wait_for_line("draining 2 workers")
            sock.sendall(b"still here")
            assert receive_exactly(sock, 10) == b"still here"
        assert pair.outbound.wait() == 0


def test_workers_end_with_their_parent(tmp_path: Path, echo_port: int) -> None:
    with make_pair(tmp_path, outbound={"workers": 2}) as pair:
        pids = children(pair.outbound)
        echo(pair.socks_port, echo_port)
        os.kill(pair.outbound.pid, signal.SIGKILL)
        until(lambda: not any(is_alive(pid) for pid in pids))
        assert sum("the parent process has ended" in line for line in pair.outbound.lines) == 2


def test_a_parent_that_is_killed_while_its_workers_drain_cuts_no_stream(tmp_path: Path, echo_port: int) -> None:
    with make_pair(tmp_path, outbound={"workers": 2}) as pair:
        pids = children(pair.outbound)
        socks = [socks_connect(pair.socks_port, "127.0.0.1", echo_port) for _ in range(20)]
        pair.outbound.send_signal(signal.SIGTERM)
        for number in (1, 2):
            pair.outbound.wait_for_line(f"worker {number}: SIGTERM: draining")
        os.kill(pair.outbound.pid, signal.SIGKILL)
        until(lambda: sum("the parent process has ended" in line for line in pair.outbound.lines) == 2)
        for sock in socks:
            with sock:
                sock.sendall(b"still here")
                assert receive_exactly(sock, 10) == b"still here"
        until(lambda: not any(is_alive(pid) for pid in pids))
        assert sum(line.endswith(": stopped") for line in pair.outbound.lines) == 2


def test_a_report_that_the_whole_group_is_asked_for_comes_once_from_each_worker_at_every_level(
    tmp_path: Path, keys: Keys
) -> None:
    with start_inbound(tmp_path, keys, {"workers": 2}, arguments=["--log-level", "error"]) as inbound:
        inbound.wait_ready()
        for pid in (*children(inbound), inbound.pid):
            os.kill(pid, signal.SIGUSR1)
        for number in (1, 2):
            inbound.wait_for_line(f"worker {number}: statistics: ")
        statistics(inbound, workers=2)  # asked for once more, so that what came before has come
        assert inbound.stop() == 0
        reports = [line for line in inbound.lines if "statistics: " in line]
        assert len(reports) == 4
        assert all(" INFO reflex.inbound: worker " in line for line in reports)


def test_an_orphan_that_drains_ends_on_a_signal(tmp_path: Path, echo_port: int) -> None:
    with make_pair(tmp_path, outbound={"workers": 2}) as pair:
        pids = children(pair.outbound)
        socks = [socks_connect(pair.socks_port, "127.0.0.1", echo_port) for _ in range(20)]
        os.kill(pair.outbound.pid, signal.SIGKILL)
        for number in (1, 2):
            pair.outbound.wait_for_line(f"worker {number}: SIGTERM: draining")
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        until(lambda: not any(is_alive(pid) for pid in pids))
        for sock in socks:
            sock.close()


def test_busy_port(tmp_path: Path, keys: Keys) -> None:
    with open_listening("127.0.0.1", 0) as busy:
        port = busy.getsockname()[1]
        listen = {"workers": 2, "listen": ["127.0.0.1:0", f"127.0.0.1:{port}"]}
        with start_inbound(tmp_path, keys, listen) as inbound:
            assert inbound.wait() == 2
            (line,) = inbound.lines
            assert line.endswith(f"cannot start: cannot listen on 127.0.0.1:{port}: Address already in use")


# No name server is asked, so that none can be slow.
NO_ADDRESS = """
import socket
_real = socket.getaddrinfo
def _getaddrinfo(host, *rest, **more):
    if host in ("nowhere.invalid", b"nowhere.invalid"):
        raise socket.gaierror(socket.EAI_NONAME, "it has none here")
    return _real(host, *rest, **more)
socket.getaddrinfo = _getaddrinfo
"""


def test_what_no_worker_can_start_with_ends_the_daemon(tmp_path: Path, keys: Keys) -> None:
    fallback = {"workers": 3, "fallback": "nowhere.invalid:80"}
    with start_inbound(tmp_path, keys, fallback, prelude=NO_ADDRESS) as inbound:
        assert inbound.wait() == 2
        (line,) = inbound.lines
        assert line.endswith(
            "ERROR reflex.inbound: cannot start: fallback: cannot resolve nowhere.invalid: it has none here"
        )


def test_a_fallback_that_is_the_server_itself_ends_the_daemon(tmp_path: Path, keys: Keys) -> None:
    with kept_port("0.0.0.0") as port:
        settings = {"workers": 2, "listen": [f"0.0.0.0:{port}"], "fallback": f"127.0.0.1:{port}"}
        with start_inbound(tmp_path, keys, settings) as inbound:
            assert inbound.wait() == 2
            (line,) = inbound.lines
            assert line.endswith(f"cannot start: fallback: 127.0.0.1:{port} is this server itself")


KNOWN_ONCE = """
import socket
real, asked = socket.getaddrinfo, []

def getaddrinfo(host, *more, **others):
    if host != "web.example":
        return real(host, *more, **others)
    asked.append(host)
    if len(asked) > 1:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return real("127.0.0.1", *more, **others)

socket.getaddrinfo = getaddrinfo
"""


def test_a_fallbacks_name_is_looked_up_once_for_all_workers_and_replacements(tmp_path: Path, keys: Keys) -> None:
    with Origin() as origin:
        overrides = {"workers": 2, "fallback": f"web.example:{origin.port}"}
        with start_inbound(tmp_path, keys, overrides, prelude=KNOWN_ONCE) as inbound:
            ((_, port),) = inbound.wait_ready()
            for victim in children(inbound):
                seen = len(inbound.lines)
                os.kill(victim, signal.SIGKILL)
                inbound.wait_for_line(r"worker \d is ready again", since=seen)
            for _ in range(20):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
                connection.request("GET", "/hello")
                assert connection.getresponse().read() == HELLO
                connection.close()


def test_an_unexpected_end_while_starting_ends_the_daemon(tmp_path: Path, keys: Keys) -> None:
    prelude = "import reflex.outbound\nreflex.outbound.Outbound.start = None"
    with start_outbound(tmp_path, keys, 1, {"workers": 2}, prelude=prelude) as outbound:
        assert outbound.wait() == 2
        assert "Traceback (most recent call last):" in outbound.lines
        outbound.wait_for_line(r"cannot start: worker \d ended with code 1$")
