"""Settings files that tests write and read, and the problems found in them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from reflex.config import load_inbound, load_outbound
from reflex.errors import ConfigError

KEY_A = base64.b64encode(bytes(range(32))).decode()
KEY_B = base64.b64encode(bytes(range(32, 64))).decode()
KEY_C = base64.b64encode(bytes(range(64, 96))).decode()
ZERO_KEY = base64.b64encode(bytes(32)).decode()
PASSWORD = "open sesame 4711"
ID = "b831381d-6324-4d53-ad4f-8cda48b30811"
ID_2 = "b831381d-6324-4d53-ad4f-8cda48b30812"
SECRETS = (KEY_A, KEY_B, PASSWORD)

INBOUND = f"""
listen = ["0.0.0.0:8443"]
private_key = "{KEY_A}"
[[users]]
name = "alice"
id = "{ID}"
key = "{KEY_B}"
"""
OUTBOUND = f"""
[[listen]]
protocol = "socks5"
address = "127.0.0.1:1080"
username = "u"
password = "{PASSWORD}"
[[servers]]
address = "vpn.example.org:8443"
public_key = "{KEY_C}"
user_id = "{ID}"
user_key = "{KEY_B}"
"""


def write(folder: Path, text: str | bytes, name: str = "reflex.toml", mode: int = 0o600) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def problems(load: Callable[[Path], object], folder: Path, text: str | bytes) -> list[str]:
    """The problems of a file with this text, without the file's name, which each must begin with."""
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    for secret in SECRETS:
        assert secret not in str(caught.value)
    assert all(problem.startswith(f"{path}: ") and "\n" not in problem for problem in caught.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


def inbound_problem(folder: Path, text: str) -> str:
    (problem,) = problems(load_inbound, folder, text)
    return problem


def outbound_problem(folder: Path, text: str) -> str:
    (problem,) = problems(load_outbound, folder, text)
    return problem
