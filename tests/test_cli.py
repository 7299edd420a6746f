"""The commands, called in this process; that they start at all is seen in real ones."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tomllib
import types
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

import reflex
from reflex import cli
from reflex.config import HostPort, InboundSettings, OutboundSettings, load_inbound, load_outbound
from reflex.config.secret import parse_key

TIMEOUT_S = 30
MAINS: list[Callable[[Sequence[str]], int]] = [cli.main, cli.inbound_main, cli.outbound_main]
COMMANDS = list(zip(MAINS, ["reflex", "reflex-inbound", "reflex-outbound"], strict=True))

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _narrow_umask() -> Iterator[None]:
    """Modes must not depend on the user's umask."""
    before = os.umask(0)
    yield
    os.umask(before)


def init(folder: Path, *more: str) -> int:
    return cli.main(["init", "--server", "vpn.example.org:8443", "--dir", str(folder), *more])


def usage_error(arguments: list[str], main: Callable[[Sequence[str]], int] = cli.main) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


# All of them


@pytest.mark.parametrize(("main", "name"), COMMANDS)
def test_version(capsys: Capture, main: Callable[[Sequence[str]], int], name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{name} {reflex.__version__}\n"


@pytest.mark.parametrize(("main", "name"), COMMANDS)
def test_help_has_examples(capsys: Capture, main: Callable[[Sequence[str]], int], name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: {name} " in out
    assert f"examples:\n  {name} " in out


@pytest.mark.parametrize("command", ["init", "keygen", "check"])
def test_help_of_commands_has_examples(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f"examples:\n  reflex {command} " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["keygen"], ["check"], ["init"], ["nonsense"]])
def test_wrong_usage(capsys: Capture, arguments: list[str]) -> None:
    usage_error(arguments)
    assert "usage: reflex" in capsys.readouterr().err


def test_light_commands_load_no_daemon() -> None:
    code = "import sys, reflex.cli; print([m for m in ('asyncio', 'uvloop', 'cryptography') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert done.stdout == "[]\n"


# reflex init


def test_init_writes_a_pair_that_fits(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "a" / "b"
    assert init(folder, "--user", 'Ann "b"') == 0
    inbound, outbound = load_inbound(folder / "inbound.toml"), load_outbound(folder / "outbound.toml")
    assert inbound.warnings == outbound.warnings == ()
    assert inbound.replay_file == folder / "replay.sqlite"
    assert inbound.listen == (HostPort("0.0.0.0", 8443),)
    assert inbound.users[0].name == 'Ann "b"'
    (server,) = outbound.servers
    assert server.address == HostPort("vpn.example.org", 8443)
    assert (server.user_id, server.user_key) == (inbound.users[0].id, inbound.users[0].key)
    private_key = X25519PrivateKey.from_private_bytes(inbound.private_key.reveal())
    assert private_key.public_key().public_bytes_raw() == server.public_key
    assert outbound.listen[0].address == HostPort("127.0.0.1", 1080)
    for path, mode in ((folder, 0o700), (folder.parent, 0o700), (folder / "inbound.toml", 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert stat.S_IMODE((folder / "outbound.toml").stat().st_mode) == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["inbound.toml", "outbound.toml"]
    out = capsys.readouterr().out
    assert f"reflex-inbound -c {folder}/inbound.toml" in out
    assert f"reflex-outbound -c {folder}/outbound.toml" in out


@pytest.mark.parametrize("existing", ["inbound.toml", "outbound.toml"])
def test_init_overwrites_only_by_force(tmp_path: Path, capsys: Capture, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    assert init(tmp_path) == 2
    assert capsys.readouterr().err == (
        f"reflex init: already there: {tmp_path / existing}; nothing written, --force overwrites\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "mine"
    assert init(tmp_path, "--force") == 0
    assert load_inbound(tmp_path / "inbound.toml").users
    assert stat.S_IMODE((tmp_path / existing).stat().st_mode) == 0o600


def test_init_sees_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "inbound.toml").symlink_to(tmp_path / "elsewhere")
    assert init(tmp_path) == 2
    assert not (tmp_path / "elsewhere").exists()


def test_init_where_nothing_can_be_written(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    assert init(tmp_path / "file" / "conf") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"reflex init: {tmp_path / 'file'}")
    assert err.count("\n") == 1


def test_init_on_a_full_disk_leaves_nothing(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert init(tmp_path) == 2
    assert capsys.readouterr().err == f"reflex init: {tmp_path}: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("server", ["vpn.example.org", "vpn.example.org:0", "::1:5", "a b:1"])
def test_init_with_a_bad_server(tmp_path: Path, capsys: Capture, server: str) -> None:
    usage_error(["init", "--server", server, "--dir", str(tmp_path)])
    assert f"{server!r}; expected HOST:PORT" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_init_with_a_bad_user_name(tmp_path: Path, capsys: Capture) -> None:
    usage_error(["init", "--server", "a:1", "--dir", str(tmp_path), "--user", "a\nb"])
    assert "expected 1 to 64 printable characters" in capsys.readouterr().err


# reflex keygen


def test_keygen_server(capsys: Capture) -> None:
    assert cli.main(["keygen", "server"]) == 0
    keys = tomllib.loads(capsys.readouterr().out)
    private_key = X25519PrivateKey.from_private_bytes(parse_key(keys["private_key"]))
    assert private_key.public_key().public_bytes_raw() == parse_key(keys["public_key"])


def test_keygen_user(capsys: Capture) -> None:
    assert cli.main(["keygen", "user", "--name", "böb\\"]) == 0
    first = tomllib.loads(capsys.readouterr().out)
    assert first["name"] == "böb\\"
    assert uuid.UUID(first["id"]).version == 4
    assert len(parse_key(first["key"])) == 32
    assert cli.main(["keygen", "user"]) == 0
    second = tomllib.loads(capsys.readouterr().out)
    assert second["name"] == "user"
    assert (first["id"], first["key"]) != (second["id"], second["key"])


# reflex check


def test_check_of_good_files(tmp_path: Path, capsys: Capture) -> None:
    init(tmp_path)
    inbound, outbound = tmp_path / "inbound.toml", tmp_path / "outbound.toml"
    capsys.readouterr()
    assert cli.main(["check", "-c", str(inbound)]) == 0
    assert capsys.readouterr().out == (
        f"{inbound}: good: reflex-inbound would listen on 0.0.0.0:8443 for 1 user; no fallback\n"
    )
    assert cli.main(["check", "-c", str(outbound)]) == 0
    assert capsys.readouterr().out == (
        f"{outbound}: good: reflex-outbound would listen on 127.0.0.1:1080 (socks5); tunnels to vpn.example.org:8443\n"
    )


def test_check_names_workers(tmp_path: Path, capsys: Capture) -> None:
    init(tmp_path)
    for name in ("inbound.toml", "outbound.toml"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("# workers = 1", "workers = 4"))
        capsys.readouterr()
        assert cli.main(["check", "-c", str(path)]) == 0
        assert " with 4 workers; " in capsys.readouterr().out


def test_check_names_forwards_and_fallback_and_warns(tmp_path: Path, capsys: Capture) -> None:
    init(tmp_path)
    outbound = tmp_path / "outbound.toml"
    forward = '[[listen]]\nprotocol = "forward"\naddress = "127.0.0.1:5"\ntarget = "db:5432"\n'
    outbound.write_text(outbound.read_text().replace("[[servers]]", f"{forward}[[servers]]"))
    outbound.chmod(0o644)
    inbound = tmp_path / "inbound.toml"
    inbound.write_text(inbound.read_text().replace("# fallback", "fallback"))
    capsys.readouterr()
    assert cli.main(["check", "--config", str(outbound)]) == 0
    captured = capsys.readouterr()
    assert "127.0.0.1:5 (forward to db:5432)" in captured.out
    assert captured.err.startswith(f"warning: {outbound}: holds secrets, and others can read it")
    assert cli.main(["check", "-c", str(inbound)]) == 0
    assert "what is not Reflex goes to 127.0.0.1:8080" in capsys.readouterr().out


def test_check_of_a_bad_file(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "inbound.toml"
    path.write_text('users = []\nlisten = ["x"]\nprivate_key = "short"\n')
    assert cli.main(["check", "-c", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(": ")[:2] for line in captured.err.splitlines()] == [
        [str(path), "listen[0]"],
        [str(path), "private_key"],
        [str(path), "users"],
    ]


# The daemons


@pytest.mark.parametrize("main", MAINS[1:])
def test_daemons_refuse_bad_files(tmp_path: Path, capsys: Capture, main: Callable[[Sequence[str]], int]) -> None:
    missing = tmp_path / "no.toml"
    assert main(["-c", str(missing)]) == 2
    assert capsys.readouterr().err == (
        f"{missing}: cannot be read: No such file or directory; expected a readable TOML file\n"
    )
    usage_error([], main)
    usage_error(["-c", str(missing), "--log-level", "loud"], main)


@pytest.mark.parametrize(
    ("main", "name", "kind"),
    [(cli.inbound_main, "inbound", InboundSettings), (cli.outbound_main, "outbound", OutboundSettings)],
)
def test_daemons_are_made_of_their_settings(
    main: Callable[[Sequence[str]], int], name: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        def __init__(self, settings: object) -> None:
            self.settings = settings

    def run(make: Callable[[], Fake], *, name: str, log_level: str) -> int:
        runs.append((make(), name, log_level))
        return 7

    runs: list[tuple[Fake, str, str]] = []
    module = types.ModuleType(f"reflex.{name}")
    setattr(module, name.capitalize(), Fake)
    monkeypatch.setitem(sys.modules, f"reflex.{name}", module)
    monkeypatch.setattr("reflex.daemon.run_daemon", run)
    init(tmp_path)
    assert main(["-c", str(tmp_path / f"{name}.toml"), "--log-level", "debug"]) == 7
    ((fake, logger, log_level),) = runs
    assert isinstance(fake.settings, kind)
    assert (logger, log_level) == (f"reflex.{name}", "debug")


@pytest.mark.parametrize(
    ("main", "name", "listen"),
    [(cli.inbound_main, "inbound", ("0.0.0.0", 8443)), (cli.outbound_main, "outbound", ("127.0.0.1", 1080))],
)
def test_daemons_with_workers(
    main: Callable[[Sequence[str]], int],
    name: str,
    listen: tuple[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fake:
        def __init__(self, settings: object, *, shared: object) -> None:
            self.settings = settings
            self.shared = shared

    def run(prepare: Callable[[object], Callable[[object], Fake]], **more: object) -> int:
        made = prepare([])("shared")
        assert made.shared == "shared"
        if isinstance(made.settings, InboundSettings):  # what the workers get has no name to look up
            assert made.settings.fallback in (HostPort("127.0.0.1", 8080), HostPort("::1", 8080))
        expected = {"listen": [listen], "workers": 2, "name": f"reflex.{name}", "log_level": "info"}
        is_inbound = name == "inbound"
        replay_file = tmp_path / "replay.sqlite" if is_inbound else None
        assert more == {**expected, "limited_users": int(is_inbound), "replay_file": replay_file}
        return 7

    module = types.ModuleType(f"reflex.{name}")
    setattr(module, name.capitalize(), Fake)
    monkeypatch.setitem(sys.modules, f"reflex.{name}", module)
    monkeypatch.setattr("reflex.supervisor.run_workers", run)
    init(tmp_path)
    path = tmp_path / f"{name}.toml"
    text = path.read_text().replace("# workers = 1", "workers = 2")
    text = text.replace('# fallback = "127.0.0.1:8080"', 'fallback = "localhost:8080"')
    path.write_text(text.replace("# Limits of its own", "max_tunnels = 5\n#"))
    assert main(["-c", str(path)]) == 7


def test_daemons_show_warnings_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("reflex.daemon.run_daemon", lambda _make, **_more: 0)
    init(tmp_path)
    path = tmp_path / "inbound.toml"
    path.chmod(0o640)
    assert cli.inbound_main(["-c", str(path)]) == 0
    assert capsys.readouterr().err.startswith(f"warning: {path}: holds secrets")
