"""reflex.config.outbound: what a right outbound.toml gives, and what a wrong one is told."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from reflex.config import HostPort, ListenSettings, Secret, load_outbound
from tests.settings_files import ID, OUTBOUND, PASSWORD, outbound_problem, problems, write


def test_least_outbound_has_the_defaults(tmp_path: Path) -> None:
    loaded = load_outbound(write(tmp_path, OUTBOUND))
    (listen,) = loaded.listen
    assert listen == ListenSettings(
        address=HostPort("127.0.0.1", 1080), username="u", password=Secret(PASSWORD.encode())
    )
    (server,) = loaded.servers
    assert server.address == HostPort("vpn.example.org", 8443)
    assert server.public_key == bytes(range(64, 96))
    assert (server.user_id, server.user_key, server.cipher) == (uuid.UUID(ID), Secret(bytes(range(32, 64))), "auto")
    pool, limits = loaded.pool, loaded.limits
    assert (pool.max_idle, pool.idle_timeout_s, pool.max_streams, pool.max_tunnels) == (8, 60, 256, 8)
    assert (pool.min_idle, loaded.workers) == (0, 1)
    assert (limits.max_connections, limits.connect_timeout_s, limits.handshake_timeout_s) == (5000, 10, 10)
    assert (limits.idle_timeout_s, limits.drain_s) == (300, 30)
    assert loaded.warnings == ()


def test_forward(tmp_path: Path) -> None:
    text = OUTBOUND + '[[listen]]\nprotocol = "forward"\naddress = "[::1]:0"\ntarget = "[fd00::1]:443"\n'
    listen = load_outbound(write(tmp_path, text)).listen[1]
    assert (listen.protocol, str(listen.address), str(listen.target)) == ("forward", "[::1]:0", "[fd00::1]:443")


@pytest.mark.parametrize("cipher", ["auto", "aes-256-gcm", "chacha20-poly1305"])
def test_ciphers(tmp_path: Path, cipher: str) -> None:
    (server,) = load_outbound(write(tmp_path, f'{OUTBOUND}cipher = "{cipher}"')).servers
    assert server.cipher == cipher


def test_nothing_in_outbound(tmp_path: Path) -> None:
    assert problems(load_outbound, tmp_path, "") == [
        "listen: nothing; expected a list of tables, [[listen]]",
        "servers: nothing; expected a list of tables, [[servers]]",
    ]
    found = problems(load_outbound, tmp_path, "[[listen]]\n[[servers]]")
    assert [problem.partition(";")[0] for problem in found] == [
        "listen[0].address: nothing",
        "servers[0].address: nothing",
        "servers[0].public_key: nothing",
        "servers[0].user_id: nothing",
        "servers[0].user_key: nothing",
    ]


def test_min_idle(tmp_path: Path) -> None:
    for lines, key, most in (
        ("min_idle = 9", "max_idle", 8),
        ("max_idle = 1\nmin_idle = 2", "max_idle", 1),
        ("max_tunnels = 3\nmin_idle = 4", "max_tunnels", 3),
    ):
        problem = outbound_problem(tmp_path, f"{OUTBOUND}[pool]\n{lines}")
        number = lines.rpartition(" ")[2]
        assert (
            problem == f"pool.min_idle: the number {number}; expected a whole number from 0 to {key}, which is {most}"
        )
    problem = outbound_problem(tmp_path, f"{OUTBOUND}[pool]\nmin_idle = -1")
    assert problem == "pool.min_idle: the number -1; expected a whole number from 0 to 1000"
    text = f"{OUTBOUND}[pool]\nmin_idle = 2\nmax_idle = 2\nmax_tunnels = 2"
    assert load_outbound(write(tmp_path, text)).pool.min_idle == 2


def test_bad_tcp_and_pool(tmp_path: Path) -> None:
    found = problems(
        load_outbound, tmp_path, f"{OUTBOUND}[tcp]\nnodelay = 1\nkeepalive_s = 40000\n[pool]\nmax_idle = -1"
    )
    assert found == [
        "pool.max_idle: the number -1; expected a whole number from 0 to 1000",
        "tcp.nodelay: the number 1; expected true or false",
        "tcp.keepalive_s: the number 40000; expected a whole number from 0 to 32767",
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('username = "u"', "", "listen[0].username: nothing; expected 1 to 255 bytes, to go with password"),
        (f'password = "{PASSWORD}"', "", "listen[0].password: nothing; expected 1 to 255 bytes, to go with username"),
        ('"u"', '""', "listen[0].username: the text ''; expected 1 to 255 bytes"),
        ('"u"', f'"{"ü" * 128}"', f"listen[0].username: the text '{'ü' * 40}…'; expected 1 to 255 bytes"),
        (f'"{PASSWORD}"', '""', "listen[0].password: a text of 0 characters; expected 1 to 255 bytes"),
        (f'"{PASSWORD}"', f'"{"p" * 256}"', "listen[0].password: a text of 256 characters; expected 1 to 255 bytes"),
        (f'"{PASSWORD}"', "4711", "listen[0].password: a number; expected 1 to 255 bytes"),
        ('"socks5"', '"socks4"', "listen[0].protocol: the text 'socks4'; expected socks5 or forward"),
        ('"socks5"', '"socks5"\ntarget = "a:1"', "listen[0].target: a target for protocol socks5; expected"),
        ("[[servers]]", '[[servers]]\ncipher = "rot13"', "servers[0].cipher: the text 'rot13'; expected auto or"),
        ("[[servers]]", "[[servers]]\ncipher = 1", "servers[0].cipher: the number 1; expected auto or aes-256-gcm or"),
    ],
)
def test_bad_listen_and_server_texts(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert outbound_problem(tmp_path, OUTBOUND.replace(old, new)).startswith(problem)


def test_bad_forwards(tmp_path: Path) -> None:
    found = problems(load_outbound, tmp_path, OUTBOUND.replace('"socks5"', '"forward"'))
    assert [problem.partition(";")[0] for problem in found] == [
        "listen[0].target: nothing",
        "listen[0].username: a username for protocol forward",
        "listen[0].password: a password for protocol forward",
    ]
    text = f'{OUTBOUND}[[listen]]\naddress = "127.0.0.1:1"\nprotocol = "forward"\ntarget = "a:0"'
    assert outbound_problem(tmp_path, text).startswith("listen[1].target: the text 'a:0'; expected host:port")


@pytest.mark.parametrize(
    ("address", "open_to_all"),
    [("127.0.0.2:1", False), ("[::1]:1", False), ("localhost:1", False), ("0.0.0.0:1", True), ("box.lan:1", True)],
)
def test_open_proxies_are_warned_of(tmp_path: Path, address: str, open_to_all: bool) -> None:  # noqa: FBT001 - pytest's
    path = write(tmp_path, f'{OUTBOUND}[[listen]]\naddress = "{address}"')
    warning = f"{path}: listen[1].address: everybody who reaches {address} may use this proxy; "
    warning += "expected a username and password"
    assert load_outbound(path).warnings == ((warning,) if open_to_all else ())
