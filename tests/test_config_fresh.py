"""reflex.config.fresh: what both files show fits together, and is right as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from reflex.config import HostPort, fresh, load_inbound, load_outbound


def write(folder: Path, server: str = "vpn.example.org:8443") -> None:
    fresh.write_files(folder, fresh.settings_files(HostPort.parse(server), "user"))


def test_what_the_files_show_as_defaults_is_the_default(tmp_path: Path) -> None:
    """With every commented setting that is a number or a flag switched on, the settings are the same."""
    write(tmp_path)
    for name, load in (("inbound.toml", load_inbound), ("outbound.toml", load_outbound)):
        path = tmp_path / name
        before = repr(load(path))
        lines = path.read_text().splitlines()
        switched = [
            line.removeprefix("# ")
            if "_s = " in line or "max_" in line or "delay" in line or "workers" in line or "min_" in line
            else line
            for line in lines
        ]
        assert switched != lines
        path.write_text("\n".join(switched))
        assert repr(load(path)) == before


def test_every_setting_that_the_files_show_is_valid(tmp_path: Path) -> None:
    write(tmp_path)
    for name, load in (("inbound.toml", load_inbound), ("outbound.toml", load_outbound)):
        path = tmp_path / name
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line.removeprefix("# ") if " = " in line else line for line in lines))
        assert load(path).warnings == ()


def test_a_server_with_an_ipv6_address_listens_on_ipv6(tmp_path: Path) -> None:
    write(tmp_path, "[2001:db8::1]:443")
    assert load_inbound(tmp_path / "inbound.toml").listen == (HostPort("::", 443),)
    assert load_outbound(tmp_path / "outbound.toml").servers[0].address == HostPort("2001:db8::1", 443)


def test_folder_that_vanishes_up_to_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk upwards ends at the root, whatever the system says of it."""
    made: list[Path] = []
    monkeypatch.setattr(Path, "is_dir", lambda _path: False)
    monkeypatch.setattr(Path, "mkdir", lambda path, mode: made.append(path))
    fresh.create_folder(Path("/a/b"))
    assert made == [Path("/"), Path("/a"), Path("/a/b")]
