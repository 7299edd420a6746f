"""A peer over a real socket that shakes hands properly and then sends whatever it likes, properly sealed.

:func:`hostile_client` is one of a server daemon's users, :class:`HostileServer` is what a client daemon takes
for its server. Both give out a :class:`HostilePeer`. :class:`Observer` is another user meanwhile, who notices
whether its requests are still answered.
"""

from __future__ import annotations

import base64
import contextlib
import queue
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from reflex.protocol.address import Address
from reflex.protocol.frames import FrameDecoder
from reflex.protocol.handshake import (
    ClientCredentials,
    ClientHandshake,
    ServerCredentials,
    SessionSecrets,
    accept_hello,
)
from reflex.protocol.keys import CipherState
from reflex.protocol.pools import Pools
from reflex.protocol.replay import ReplaySet
from reflex.protocol.wire import (
    CLIENT_HELLO_SIZE,
    CODE,
    MAX_BODY_SIZE,
    RECORD_OVERHEAD,
    SERVER_HELLO_SIZE,
    SETTING,
    Code,
    FrameType,
    Network,
    Setting,
    Status,
    Suite,
)
from tests.processes import HELLO, Keys, LoopbackServer, Origin, receive_exactly, socks_connect
from tests.sessions import RawFrame, frame

TIMEOUT_S: Final = 20.0
POLL_S: Final = 0.02


class HostilePeer:
    """One tunnel, from the side that misbehaves. Nothing is answered by itself, and nothing is read unless asked."""

    def __init__(self, sock: socket.socket, session_secrets: SessionSecrets, *, is_client: bool) -> None:
        self.sock = sock
        sock.settimeout(TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        outgoing, incoming = session_secrets.root_client_to_server, session_secrets.root_server_to_client
        if not is_client:
            outgoing, incoming = incoming, outgoing
        self._pools = Pools()
        self._cipher = CipherState(session_secrets.suite, outgoing)
        self._decoder = FrameDecoder(
            CipherState(session_secrets.suite, incoming), self._pools.buffers, self._pools.frames
        )
        self.sent_bytes = 0

    def seal(self, body: bytes) -> bytes:
        """Any bytes as the body of the next record; it has to be sent, or the ones after it do not verify."""
        record = bytearray(len(body) + RECORD_OVERHEAD)
        self._cipher.seal(memoryview(body), memoryview(record))
        return bytes(record)

    def send(self, *frames: bytes) -> bool:
        """Send frames in as few records as hold them; False where the other side has ended the connection."""
        body: list[bytes] = []
        size = 0
        records = []
        for each in frames:
            if size + len(each) > MAX_BODY_SIZE:
                records.append(self.seal(b"".join(body)))
                body.clear()
                size = 0
            body.append(each)
            size += len(each)
        records.append(self.seal(b"".join(body)))
        return self.send_raw(b"".join(records))

    def send_each(self, *frames: bytes) -> bool:
        """Send frames, each in a record of its own."""
        return self.send_raw(b"".join(self.seal(each) for each in frames))

    def send_raw(self, data: bytes) -> bool:
        try:
            self.sock.sendall(data)
        except (ConnectionError, TimeoutError):
            return False
        self.sent_bytes += len(data)
        return True

    def receive(self) -> list[RawFrame]:
        """Wait for bytes, and give out the frames that they complete. Raises ConnectionError at the end."""
        data = self.sock.recv(262_144)
        if not data:
            raise ConnectionError("the connection has ended")
        frames = []
        rest = memoryview(data)
        while rest:
            rest = rest[self._decoder.feed(rest) :]
            frames += [each.copy() for each in self._decoder]
        return frames

    def receive_until(self, frame_type: int, stream_id: int = 0) -> RawFrame:
        """Read up to the first frame of a kind; what comes with it and before it is dropped."""
        while True:
            for each in self.receive():
                if each[:2] == (frame_type, stream_id):
                    return each

    def open(self, port: int, stream_id: int) -> None:
        """Open a stream to a port on loopback, and wait until it is connected."""
        self.send(open_frame(stream_id, "127.0.0.1", port))
        assert self.receive_until(FrameType.OPENED, stream_id)[2] == bytes([Status.SUCCEEDED])

    def wait_for_end(self, *, timeout_s: float = 40.0) -> None:
        """Read until the other side has closed the connection, however it does it."""
        self.sock.settimeout(timeout_s)
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(65_536):
                pass

    def close(self) -> None:
        self._decoder.close()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes who reads it in another thread
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_frame(stream_id: int, host: str, port: int) -> bytes:
    return frame(FrameType.OPEN, stream_id, bytes([Network.TCP]) + Address.parse(f"{host}:{port}").encode())


def reset_frame(stream_id: int, code: int = Code.CANCELLED) -> bytes:
    return frame(FrameType.RESET, stream_id, CODE.pack(code))


def settings_frame(max_streams: int = 1000) -> bytes:
    return frame(
        FrameType.SETTINGS,
        0,
        SETTING.pack(Setting.MAX_STREAMS, max_streams) + SETTING.pack(Setting.TIME_MS, int(time.time() * 1000)),
    )


def another_user(keys: Keys) -> Keys:
    """The same server, another user of it."""
    return replace(keys, user_id=str(uuid.uuid4()), user_key=base64.b64encode(secrets.token_bytes(32)).decode())


def hostile_client(keys: Keys, port: int, *, receive_buffer_bytes: int = 0) -> HostilePeer:
    """Connect to a server daemon and shake hands as this user."""
    credentials = ClientCredentials(
        base64.b64decode(keys.public_key), uuid.UUID(keys.user_id).bytes, base64.b64decode(keys.user_key)
    )
    sock = socket.socket()
    try:
        if receive_buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        sock.settimeout(TIMEOUT_S)
        sock.connect(("127.0.0.1", port))
        handshake = ClientHandshake(
            credentials, suite=Suite.AES_256_GCM, time_s=int(time.time()), random_bytes=secrets.token_bytes
        )
        hello = bytearray(CLIENT_HELLO_SIZE)
        handshake.write_hello(memoryview(hello))
        sock.sendall(hello)
        answer = receive_exactly(sock, SERVER_HELLO_SIZE)
        return HostilePeer(sock, handshake.read_answer(memoryview(bytearray(answer))), is_client=True)
    except BaseException:
        sock.close()
        raise


class HostileServer(LoopbackServer):
    """Takes clients with these keys; each tunnel is the test's, in the order in which they come."""

    def __init__(self, keys: Keys) -> None:
        self._credentials = ServerCredentials(
            base64.b64decode(keys.private_key), {uuid.UUID(keys.user_id).bytes: base64.b64decode(keys.user_key)}
        )
        self._replay = ReplaySet(int(time.time()) - 1)
        self.tunnels: queue.Queue[HostilePeer] = queue.Queue()
        self._over = threading.Event()
        super().__init__()

    def serve(self, sock: socket.socket) -> None:
        hello = receive_exactly(sock, CLIENT_HELLO_SIZE)
        accepted = accept_hello(
            memoryview(bytearray(hello)),
            self._credentials,
            now_s=int(time.time()),
            replay=self._replay,
            random_bytes=secrets.token_bytes,
        )
        answer = bytearray(SERVER_HELLO_SIZE)
        session_secrets = accepted.write_answer(memoryview(answer), random_bytes=secrets.token_bytes)
        peer = HostilePeer(sock, session_secrets, is_client=False)
        peer.send_raw(bytes(answer))
        peer.send(settings_frame())
        self.tunnels.put(peer)
        self._over.wait()  # the socket is closed by who returns from here
        peer.close()

    def next_tunnel(self) -> HostilePeer:
        return self.tunnels.get(timeout=TIMEOUT_S)

    def stop(self) -> None:
        self._over.set()
        super().stop()


class Observer:
    """Another user who asks for something small again and again, on one stream of an honest client daemon.

    As a context manager it asks in a thread of its own; afterwards ``waits_s`` has how long each answer took,
    and ``error`` what went wrong, if anything did.
    """

    def __init__(self, socks_port: int, origin: Origin) -> None:
        self._sock = socks_connect(socks_port, "127.0.0.1", origin.port, timeout_s=TIMEOUT_S)
        self._reader = self._sock.makefile("rb")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self.waits_s: list[float] = []
        self.error: BaseException | None = None
        self._ask()  # everything is warm before the attack begins

    def _ask(self) -> None:
        self._sock.sendall(b"GET /hello HTTP/1.1\r\n\r\n")
        size = 0
        while (line := self._reader.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                size = int(line.split(b":")[1])
        assert self._reader.read(size) == HELLO

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                started_s = time.monotonic()
                self._ask()
                self.waits_s.append(time.monotonic() - started_s)
                time.sleep(POLL_S)
        except BaseException as error:
            self.error = error

    def wait_for_requests(self, count: int) -> None:
        """Until so many more were answered."""
        wanted = len(self.waits_s) + count
        deadline_s = time.monotonic() + TIMEOUT_S
        while len(self.waits_s) < wanted and self.error is None:
            assert time.monotonic() < deadline_s, f"{len(self.waits_s)} of {wanted} requests were answered"
            time.sleep(POLL_S)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(TIMEOUT_S)
        self._reader.close()
        self._sock.close()
        if error is None and self.error is not None:
            raise self.error


def ids(count: int, first: int = 1) -> Iterator[int]:
    """So many ids of a client's streams."""
    return iter(range(first, first + 2 * count, 2))
