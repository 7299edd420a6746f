"""A real nginx as the fallback, and conversations with whatever listens on a port."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.conftest import require_program
from tests.processes import Process, kept_port

BOUND_S: Final = 20.0

NGINX_CONFIG: Final = """\
daemon off;
master_process off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr notice;
worker_rlimit_nofile {files};
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_header_timeout {patience_s}s;
    keepalive_timeout {patience_s}s;
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        root {directory}/site;
    }}
}}
"""


@contextlib.contextmanager
def running_nginx(directory: Path, *, patience_s: int, connections: int = 512) -> Iterator[tuple[Process, int]]:
    """nginx on a free port of loopback, and the port. It serves what is in ``directory / "site"``.

    ``patience_s`` is how long it waits for somebody who says nothing.
    """
    program = require_program("nginx")
    (directory / "site").mkdir(exist_ok=True)
    config = directory / "nginx.conf"
    with kept_port() as port:
        config.write_text(
            NGINX_CONFIG.format(
                directory=directory, port=port, patience_s=patience_s, connections=connections, files=2 * connections
            )
        )
        with Process("nginx", [program, "-p", str(directory), "-c", str(config)]) as process:
            # It listens before it says so.
            process.wait_for_line("start worker|using the .* event method")
            yield process, port


@dataclass(frozen=True)
class Answer:
    """What came back, and how the connection ended: "FIN" or "RST"."""

    received: bytes
    ending: str


def converse(port: int, pieces: Sequence[bytes], *, then_fin: bool = False, source: str = "127.0.0.1") -> Answer:
    """Send the pieces, perhaps a FIN, and take what comes until the other side ends the connection.

    ``source`` is the address to come from; all of 127.0.0.0/8 is this machine.
    """
    received = bytearray()
    with socket.create_connection(("127.0.0.1", port), BOUND_S, source_address=(source, 0)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in pieces:
                sock.sendall(piece)
            if then_fin:
                sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(65_536):
                received += data
        except (ConnectionResetError, BrokenPipeError):
            return Answer(bytes(received), "RST")
    return Answer(bytes(received), "FIN")


def without_dates(answer: Answer) -> Answer:
    return Answer(re.sub(rb"(?m)^Date: .*\r$", b"Date: (a date)\r", answer.received), answer.ending)


def tls_hello() -> bytes:
    """What a TLS client sends first."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="vpn.example.org")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def loopback_source(number: int) -> str:
    """An address of this machine, another for each number below 2**22: 127.64.0.0 and up."""
    return f"127.{64 + (number >> 16 & 0x3F)}.{number >> 8 & 0xFF}.{number & 0xFF}"
