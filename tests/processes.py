"""The harness for tests that drive real processes: the pair, local targets, clients.

What the demo needs as well lives in ``bench`` and is handed on from here. Everything that is started
is ended by its own process id on leaving its context; everything waits for events, never for time.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from bench.local import (
    PATIENCE_S,
    ExpectationError,
    Process,
    SocksReplyError,
    anonymous_bytes,
    cpu_seconds,
    open_descriptors,
    peak_rss_bytes,
    pss_bytes,
    receive_exactly,
    rss_bytes,
    socks_connect,
    start_daemon,
    to_toml,
)
from bench.origin import HELLO, LoopbackServer, Origin, expected_sha256
from reflex.protocol.handshake import ClientCredentials, ClientHandshake
from reflex.protocol.wire import CLIENT_HELLO_SIZE, Suite

__all__ = [
    "HELLO",
    "EchoServer",
    "ExpectationError",
    "HalfCloseServer",
    "Keys",
    "LoopbackServer",
    "Origin",
    "Pair",
    "Process",
    "SocksReplyError",
    "anonymous_bytes",
    "cpu_seconds",
    "echo",
    "eventually",
    "expected_sha256",
    "hello_bytes",
    "hello_through",
    "inbound_settings",
    "kept_port",
    "make_pair",
    "merged",
    "never_reading",
    "open_descriptors",
    "outbound_settings",
    "peak_rss_bytes",
    "pss_bytes",
    "receive_exactly",
    "refusing_port",
    "rss_bytes",
    "run_curl",
    "socks_connect",
    "start_inbound",
    "start_outbound",
    "to_toml",
]

Settings = Mapping[str, object]

CURL_TIMEOUT_S = 60


def _key_text(key: bytes) -> str:
    return base64.b64encode(key).decode()


@dataclass(frozen=True)
class Keys:
    """What the two halves share, each in the text that a settings file holds."""

    private_key: str
    public_key: str
    user_id: str
    user_key: str

    @classmethod
    def generate(cls) -> Keys:
        private = X25519PrivateKey.generate()
        return cls(
            private_key=_key_text(private.private_bytes_raw()),
            public_key=_key_text(private.public_key().public_bytes_raw()),
            user_id=str(uuid.uuid4()),
            user_key=_key_text(X25519PrivateKey.generate().private_bytes_raw()),  # any 32 random bytes
        )


def merged(settings: Settings, overrides: Settings) -> dict[str, object]:
    """``settings`` with ``overrides`` laid over them.

    Tables are merged key by key, lists of tables entry by entry (further entries are appended);
    everything else is replaced. None removes the key.
    """
    result = dict(settings)
    for key, value in overrides.items():
        old = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(old, Mapping):
            result[key] = merged(old, value)
        elif _is_tables(value) and _is_tables(old):
            # Both are lists of tables by now; mypy cannot know.
            olds, news = list(old), list(value)  # type: ignore[call-overload]
            both = [merged(before, after) for before, after in zip(olds, news, strict=False)]
            result[key] = both + olds[len(news) :] + news[len(olds) :]
        else:
            result[key] = value
    return result


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def inbound_settings(keys: Keys) -> dict[str, object]:
    """Settings of a server on a free port that may dial loopback."""
    return {
        "listen": ["127.0.0.1:0"],
        "private_key": keys.private_key,
        "users": [{"name": "alice", "id": keys.user_id, "key": keys.user_key}],
        "targets": {"allow": ["127.0.0.1:*", "[::1]:*"]},
    }


def outbound_settings(keys: Keys, server_port: int) -> dict[str, object]:
    """Settings of a client with SOCKS5 on a free port and its server at ``server_port``."""
    return {
        "listen": [{"protocol": "socks5", "address": "127.0.0.1:0"}],
        "servers": [
            {
                "address": f"127.0.0.1:{server_port}",
                "public_key": keys.public_key,
                "user_id": keys.user_id,
                "user_key": keys.user_key,
            }
        ],
    }


def hello_bytes(keys: Keys, *, time_s: int | None = None) -> bytes:
    """A client's hello of now, or of another time in seconds since 1970, as it could be recorded."""
    credentials = ClientCredentials(
        base64.b64decode(keys.public_key), uuid.UUID(keys.user_id).bytes, base64.b64decode(keys.user_key)
    )
    hello = bytearray(CLIENT_HELLO_SIZE)
    handshake = ClientHandshake(
        credentials,
        suite=Suite.AES_256_GCM,
        time_s=int(time.time()) if time_s is None else time_s,
        random_bytes=os.urandom,
    )
    handshake.write_hello(memoryview(hello))
    return bytes(hello)


def _start(
    name: str, directory: Path, settings: Settings, *, arguments: Sequence[str] = (), prelude: str = ""
) -> Process:
    path = directory / f"{name}.toml"
    path.touch(mode=0o600)
    path.write_text(to_toml(settings))
    return start_daemon(f"reflex-{name}", path, *arguments, prelude=prelude)


def start_inbound(
    directory: Path,
    keys: Keys,
    overrides: Settings | None = None,
    *,
    arguments: Sequence[str] = (),
    prelude: str = "",
) -> Process:
    """Write ``directory/inbound.toml`` and start the server on it; not yet waited for.

    ``arguments`` are added to the command line (``["--log-level", "debug"]``); ``prelude`` is Python
    that runs in the process first (to put its clock off, say).
    """
    settings = merged(inbound_settings(keys), overrides or {})
    return _start("inbound", directory, settings, arguments=arguments, prelude=prelude)


def start_outbound(
    directory: Path,
    keys: Keys,
    server_port: int,
    overrides: Settings | None = None,
    *,
    arguments: Sequence[str] = (),
    prelude: str = "",
) -> Process:
    """Write ``directory/outbound.toml`` and start the client on it; else like ``start_inbound``."""
    settings = merged(outbound_settings(keys, server_port), overrides or {})
    return _start("outbound", directory, settings, arguments=arguments, prelude=prelude)


@dataclass
class Pair:
    """Both halves, ready. A half that was stopped or killed comes back by ``restart_…`` on its ports.

    They are kept for it (:func:`kept_port`), unless the settings name others.
    """

    directory: Path
    keys: Keys
    inbound_overrides: Settings
    outbound_overrides: Settings
    arguments: Sequence[str] = ()
    inbound: Process = field(init=False)
    outbound: Process = field(init=False)
    inbound_addresses: list[tuple[str, int]] = field(init=False)
    outbound_addresses: list[tuple[str, int]] = field(init=False)
    _everything: contextlib.ExitStack = field(init=False, default_factory=contextlib.ExitStack)

    @property
    def inbound_port(self) -> int:
        """The port of the server's first listener."""
        return self.inbound_addresses[0][1]

    @property
    def socks_port(self) -> int:
        """The port of the client's first listener: SOCKS5, unless overridden."""
        return self.outbound_addresses[0][1]

    def restart_inbound(self) -> None:
        """Start the server again, on the addresses that it had; end it first where it still runs."""
        if self.inbound.is_running:
            self.inbound.end()
        self._start_inbound()

    def restart_outbound(self) -> None:
        """Start the client again, on the addresses that it had; end it first where it still runs."""
        if self.outbound.is_running:
            self.outbound.end()
        self._start_outbound()

    def _start_inbound(self) -> None:
        self.inbound = self._everything.enter_context(
            start_inbound(self.directory, self.keys, self.inbound_overrides, arguments=self.arguments)
        )
        self.inbound_addresses = self.inbound.wait_ready()

    def _start_outbound(self) -> None:
        self.outbound = self._everything.enter_context(
            start_outbound(
                self.directory, self.keys, self.inbound_port, self.outbound_overrides, arguments=self.arguments
            )
        )
        self.outbound_addresses = self.outbound.wait_ready()

    def _on_kept_ports(self, base: Settings, overrides: Settings) -> Settings:
        """The overrides, with a kept port for each listener that may have any."""

        def kept(address: str) -> str:
            host, _, port = address.rpartition(":")
            if port != "0":
                return address
            return f"{host}:{self._everything.enter_context(kept_port(host.strip('[]')))}"

        listeners: Any = merged(base, overrides)["listen"]
        addresses = [
            kept(each) if isinstance(each, str) else {**each, "address": kept(each["address"])} for each in listeners
        ]
        return merged(overrides, {"listen": addresses})

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.push(self._everything)
            self.inbound_overrides = self._on_kept_ports(inbound_settings(self.keys), self.inbound_overrides)
            self.outbound_overrides = self._on_kept_ports(outbound_settings(self.keys, 0), self.outbound_overrides)
            self._start_inbound()
            self._start_outbound()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._everything.__exit__(kind, error, trace)


def make_pair(
    directory: Path,
    *,
    inbound: Settings | None = None,
    outbound: Settings | None = None,
    keys: Keys | None = None,
    arguments: Sequence[str] = (),
) -> Pair:
    """Both halves on loopback, ready within the context, with loopback targets allowed.

    ``inbound`` and ``outbound`` are laid over the settings as ``merged`` says, for instance
    ``make_pair(tmp_path, outbound={"servers": [{"cipher": "aes-256-gcm"}], "limits": {"drain_s": 1}})``.
    """
    return Pair(directory, keys or Keys.generate(), inbound or {}, outbound or {}, arguments)


class EchoServer(LoopbackServer):
    """Sends back what it receives; after the client's end it ends as well."""

    def serve(self, sock: socket.socket) -> None:
        while data := sock.recv(65_536):
            sock.sendall(data)


def echo(sock: socket.socket, data: bytes = b"alive") -> None:
    """Send to an echo, and wait for the answer; AssertionError where it is another."""
    sock.sendall(data)
    assert receive_exactly(sock, len(data)) == data


class HalfCloseServer(LoopbackServer):
    """Reads to the client's end, then answers with the decimal count of the bytes and a newline."""

    def serve(self, sock: socket.socket) -> None:
        count = 0
        while data := sock.recv(65_536):
            count += len(data)
        sock.sendall(b"%d\n" % count)


@contextlib.contextmanager
def never_reading(host: str = "127.0.0.1") -> Iterator[int]:
    """A port that takes connections (the kernel does) and never reads a byte."""
    with _bound_socket(host) as sock:
        sock.listen(128)
        yield sock.getsockname()[1]


@contextlib.contextmanager
def refusing_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A port that refuses connections, and that nobody else can take meanwhile."""
    with _bound_socket(host) as sock:
        yield sock.getsockname()[1]


@contextlib.contextmanager
def kept_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A port for a program of the test, which may end and come back there; who wants any free port does not get it.

    A socket has it that never listens. Linux lets a program listen there all the same where both say SO_REUSEADDR, as
    the daemons and nginx do.
    """
    with _bound_socket(host, reuse=True) as sock:
        yield sock.getsockname()[1]


def _bound_socket(host: str, *, reuse: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    sock.bind((host, 0))
    return sock


def run_curl(*arguments: str, timeout_s: float = CURL_TIMEOUT_S) -> subprocess.CompletedProcess[bytes]:
    """Run curl, silent but for errors, without the user's own settings and proxies.

    Raises FileNotFoundError where there is no curl (see ``conftest.require_program``) and
    subprocess.TimeoutExpired.
    """
    curl = shutil.which("curl")
    if curl is None:
        raise FileNotFoundError("curl")
    command = [curl, "--disable", "--silent", "--show-error", "--noproxy", "", *arguments]
    return subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)


def hello_through(socks_port: int, origin: Origin) -> bytes:
    """Ask ``origin`` for ``/hello`` through SOCKS5, on a connection of its own; give the answer's body."""
    with socks_connect(socks_port, "127.0.0.1", origin.port, timeout_s=20) as sock:
        sock.sendall(b"GET /hello HTTP/1.1\r\nConnection: close\r\n\r\n")
        with sock.makefile("rb") as reader:
            return reader.read().partition(b"\r\n\r\n")[2]


def eventually(is_true: Callable[[], bool], *, within_s: float = PATIENCE_S) -> bool:
    """Wait for what the system gives no event for; tells whether it came about."""
    deadline = time.monotonic() + within_s
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
