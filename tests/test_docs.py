"""The documents tell the truth: their examples run, their bytes are the vectors', their numbers the code's."""

from __future__ import annotations

import configparser
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from reflex.cli import main
from reflex.config import (
    InboundLimits,
    InboundSettings,
    ListenSettings,
    OutboundLimits,
    OutboundSettings,
    PoolSettings,
    ServerSettings,
    TargetRule,
    TargetSettings,
    TcpSettings,
    UserSettings,
    load_inbound,
)
from reflex.protocol import wire
from reflex.protocol.keys import traffic_key
from tests.vectors import VECTORS

ROOT: Final = Path(__file__).resolve().parent.parent
README: Final = ROOT / "README.md"
PROTOCOL: Final = ROOT / "docs" / "protocol.md"
DOCUMENTS: Final = (
    README,
    PROTOCOL,
    ROOT / "docs" / "dependencies.md",
    ROOT / "docs" / "security.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
)
EXAMPLE_TIMEOUT_S: Final = 60

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of the same rank or a higher one."""
    rank = heading.split(" ", maxsplit=1)[0]
    start = re.search(rf"^{re.escape(heading)}.*$", text, re.MULTILINE)
    assert start is not None, f"no heading {heading!r}"
    rest = text[start.end() :]
    end = re.search(rf"^#{{1,{len(rank)}}} ", rest, re.MULTILINE)
    return rest if end is None else rest[: end.start()]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, headings and rules left out."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    heads = {index - 1 for index, row in enumerate(cells) if set("".join(row)) <= set("-:")}
    return [row for index, row in enumerate(cells) if index not in heads and index - 1 not in heads]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Links and files.


@each_document
def test_every_relative_link_leads_to_a_file_and_heading_that_exist(path: Path) -> None:
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text_of(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(text_of(file)), target


def test_the_code_map_names_every_module_and_nothing_that_does_not_exist() -> None:
    lines = blocks(section(text_of(README), "## Code map"), "text")[0].splitlines()
    named = [line.split()[0] for line in lines]
    assert len(named) == len(set(named))
    assert all(len(line.split()) > 1 for line in lines), "each file has its line of words"
    assert [name for name in named if not (ROOT / name).is_file()] == []
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "reflex").rglob("*.py")}
    assert modules - set(named) == set()


def test_every_file_of_this_repository_that_the_protocol_document_names_exists() -> None:
    names = re.findall(r"`((?:reflex|tests|docs)/[\w/.-]+)`", text_of(PROTOCOL))
    assert names
    assert [name for name in names if not (ROOT / name).is_file()] == []


# Examples.


@pytest.mark.parametrize("path", [README, PROTOCOL], ids=lambda path: path.name)
def test_the_python_blocks_run_one_after_the_other_and_print_what_they_say(path: Path) -> None:
    code = "\n".join(blocks(text_of(path), "python"))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=EXAMPLE_TIMEOUT_S,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == re.findall(r"#> (.*)$", code, re.MULTILINE)


def test_the_protocol_document_shows_the_library_in_use() -> None:
    assert blocks(section(text_of(PROTOCOL), "## 10. As a library"), "python")


def test_the_toml_blocks_are_toml() -> None:
    examples = blocks(text_of(README), "toml")
    assert examples
    for example in examples:
        tomllib.loads(example)


def test_the_rules_of_the_example_and_the_table_are_rules() -> None:
    part = section(text_of(README), "### Target rules")
    table = tomllib.loads(blocks(part, "toml")[0])["targets"]
    texts = [row[0].strip('`"') for row in rows(part)] + table["allow"] + table["deny"]
    for text in texts:
        assert TargetRule.parse(text)


def test_the_services_run_what_is_installed_and_give_it_time_to_drain() -> None:
    units = blocks(text_of(README), "ini")
    drains_s = (InboundLimits().drain_s, OutboundLimits().drain_s)
    for unit, name, drain_s in zip(units, ("inbound", "outbound"), drains_s, strict=True):
        parser = configparser.ConfigParser()
        parser.read_string(unit)
        service = parser["Service"]
        assert service["ExecStart"] == f"/opt/reflex/bin/reflex-{name} -c /etc/reflex/{name}.toml"
        assert float(service["TimeoutStopSec"]) > drain_s


def test_the_service_saves_its_hellos_where_it_may_write(tmp_path: Path) -> None:
    """The line of the README that says so does it, in what reflex init writes."""
    part = section(text_of(README), "### As services")
    unit = configparser.ConfigParser()
    unit.read_string(blocks(part, "ini")[0])
    folder = Path("/var/lib") / unit["Service"]["StateDirectory"]
    (line,) = [line for line in blocks(part, "sh")[0].splitlines() if line.startswith("sed ")]
    assert main(["init", "--server", "vpn.example.org:8443", "--dir", str(tmp_path)]) == 0
    subprocess.run(shlex.split(line.replace("/etc/reflex", str(tmp_path))), check=True, timeout=EXAMPLE_TIMEOUT_S)
    assert load_inbound(tmp_path / "inbound.toml").replay_file == folder / "replay.sqlite"


# Settings.


def keys_of(prefix: str, settings: type, *left_out: str) -> dict[str, object]:
    """Key path to default; MISSING where there is none."""
    return {
        f"{prefix}{field.name}": field.default for field in dataclasses.fields(settings) if field.name not in left_out
    }


INBOUND_KEYS: Final = {
    **keys_of("", InboundSettings, "users", "targets", "limits", "tcp", "warnings"),
    "private_key_file": None,
    **keys_of("users[].", UserSettings),
    **keys_of("targets.", TargetSettings),
    **keys_of("limits.", InboundLimits),
    **keys_of("tcp.", TcpSettings),
}
OUTBOUND_KEYS: Final = {
    **keys_of("", OutboundSettings, "listen", "servers", "pool", "limits", "tcp", "warnings"),
    **keys_of("listen[].", ListenSettings),
    **keys_of("servers[].", ServerSettings),
    "servers[].user_key_file": None,
    **keys_of("pool.", PoolSettings),
    **keys_of("limits.", OutboundLimits),
    **keys_of("tcp.", TcpSettings),
}


def shown_default(value: object) -> str:
    """A default as the README's tables have it."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    return f'"{value}"'


@pytest.mark.parametrize(
    ("heading", "expected"),
    [("### inbound.toml", INBOUND_KEYS), ("### outbound.toml", OUTBOUND_KEYS)],
    ids=["inbound", "outbound"],
)
def test_the_tables_of_settings_have_every_key_with_its_default(heading: str, expected: dict[str, object]) -> None:
    shown = {row[0].strip("`"): row[1] for row in rows(section(text_of(README), heading))}
    assert shown == {key: shown_default(value) for key, value in expected.items()}


def test_every_log_line_of_the_troubleshooting_is_one_that_the_code_writes() -> None:
    source = "".join(text_of(file) for file in sorted((ROOT / "reflex").rglob("*.py")))
    source = re.sub(r"%[sdg]|\{[^{}\n]*\}", "…", source)  # what a line's facts replace
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a text that is written in two pieces
    lines = [row[0].strip("`") for row in rows(section(text_of(README), "## Troubleshooting"))]
    assert lines
    missing = []
    for line in lines:
        # Prefix and reason of a line are joined at run time: each part must stand somewhere.
        parts = [part for piece in line.split("…") for part in piece.split(": ") if part.strip(" :;,")]
        missing += [(line, part) for part in parts if part.strip(" :;,") not in source]
    assert missing == []


# Numbers.


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_table_of_protocol_numbers_is_whole_and_right() -> None:
    shown = {row[2].strip("`"): number(row[1]) for row in rows(section(text_of(PROTOCOL), "### Of the protocol"))}
    constants = {
        name: float(value)
        for name, value in vars(wire).items()
        if name.isupper() and isinstance(value, int) and not isinstance(value, IntEnum)
    }
    assert shown == constants


def test_the_table_of_this_implementations_numbers_is_right() -> None:
    table = rows(section(text_of(PROTOCOL), "### Of this implementation"))
    assert table
    for _, value, name in table:
        module, _, constant = name.strip("`").rpartition(".")
        assert number(value) == float(getattr(importlib.import_module(module), constant)), name


def test_the_numbers_of_frames_statuses_codes_settings_and_suites_are_the_codes() -> None:
    text = text_of(PROTOCOL)
    tables: dict[str, list[list[str]]] = {}
    for part in re.split(r"\n\n", text):
        if part.startswith("|"):
            tables[part.split("|")[1].strip()] = rows(part)
    frames = {int(row[0].strip("`"), 16): row[1] for row in tables["Type"]}
    assert frames == {frame.value: frame.name for frame in wire.FrameType}
    session_only = {int(row[0].strip("`"), 16) for row in tables["Type"] if row[2] == "0"}
    assert {wire.FrameType(kind).name for kind in session_only} == {
        "PAD",
        "PING",
        "PONG",
        "SETTINGS",
        "GOAWAY",
        "CLOSE",
    }
    for heading, numbers in (("Status", wire.Status), ("Code", wire.Code), ("Setting", wire.Setting)):
        assert [int(row[0]) for row in tables[heading]] == [each.value for each in numbers], heading
    suites = {int(row[0]): row[1].split(" (")[0] for row in tables["Suite"]}
    assert suites == {suite.value: suite.name.replace("_", "-") for suite in wire.Suite} | {
        wire.Suite.CHACHA20_POLY1305: "ChaCha20-Poly1305"
    }


def test_the_sections_that_the_code_refers_to_have_their_numbers() -> None:
    headings = re.findall(r"^## (\d+)\. (.*)$", text_of(PROTOCOL), re.MULTILINE)
    assert headings == [
        ("1", "Credentials"),
        ("2", "Handshake"),
        ("3", "Traffic keys"),
        ("4", "Records"),
        ("5", "Frames"),
        ("6", "What is not Reflex"),
        ("7", "Security"),
        ("8", "Numbers"),
        ("9", "A session, byte by byte"),
        ("10", "As a library"),
    ]


def test_the_drawn_hellos_have_the_sizes_of_their_fields() -> None:
    drawing = blocks(section(text_of(PROTOCOL), "## 2. Handshake"), "text")[0]
    for title, size in (("client hello", wire.CLIENT_HELLO_SIZE), ("server hello", wire.SERVER_HELLO_SIZE)):
        part = drawing[drawing.index(f"{title}, {size} bytes") :].split("\n\n")[0]
        offsets = [int(offset) for offset in re.findall(r"^ ?(\d+) \+-", part, re.MULTILINE)]
        fields = [int(field) for field in re.findall(r"\| \w+ +(\d+) ", part)]
        assert offsets == [sum(fields[:index]) for index in range(len(fields) + 1)]
        assert offsets[-1] == size


# The worked example.


def example_lines() -> Iterator[tuple[str, str]]:
    """Name and hex of every line in section 9 that has both."""
    for block in blocks(section(text_of(PROTOCOL), "## 9. A session"), "text"):
        yield from re.findall(r"^([A-Za-z]\w*) {2,}([0-9a-f]{2,})\b", block, re.MULTILINE)


def exchange(private: bytes, public: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def test_the_worked_example_is_the_first_vector() -> None:
    vector = VECTORS[0]
    hello, answer, first = vector.client_hello, vector.server_hello, vector.client_to_server_records[0]
    key, iv = traffic_key(vector.root_client_to_server, wire.Suite(vector.suite))
    body_end = wire.LENGTH_CHUNK_SIZE + len(first.body)
    expected = {
        "s": vector.server_private,
        "S": vector.server_public,
        "id": vector.user_id,
        "key": vector.user_key,
        "psk": vector.psk,
        "e": vector.client_ephemeral_private,
        "es": exchange(vector.server_private, hello[:32]),
        "time": vector.time.to_bytes(8),
        "options": vector.options,
        "E": hello[:32],
        "EncID": hello[32:48],
        "C1": hello[48:],
        "f": vector.server_ephemeral_private,
        "ee": exchange(vector.server_ephemeral_private, hello[:32]),
        "F": answer[:32],
        "T": answer[32:],
        "h": vector.handshake_hash,
        "r_c2s": vector.root_client_to_server,
        "r_s2c": vector.root_server_to_client,
        "exporter": vector.exporter,
        "key_c2s": key,
        "iv_c2s": iv,
        "nonce_0": iv,
        "nonce_1": (int.from_bytes(iv) ^ 1).to_bytes(wire.NONCE_SIZE),
        "length": first.record[: wire.LENGTH.size],
        "tag_0": first.record[wire.LENGTH.size : wire.LENGTH_CHUNK_SIZE],
        "body": first.record[wire.LENGTH_CHUNK_SIZE : body_end],
        "tag_1": first.record[body_end:],
    }
    lines = list(example_lines())
    assert dict(lines) == {name: value.hex() for name, value in expected.items()}
    assert len(lines) == len(expected)


def test_the_sizes_and_the_time_told_beside_the_worked_example_are_its_own() -> None:
    text = section(text_of(PROTOCOL), "## 9. A session")
    vector = VECTORS[0]
    first = vector.client_to_server_records[0]
    assert f"20 + {len(first.body)} + 16 = {len(first.record)} bytes" in text
    assert f"{len(first.body):08x}, sealed: {len(first.body)}" in text
    assert f"{vector.time} s since 1970" in text


def test_the_frames_of_the_worked_example_are_the_body_byte_by_byte() -> None:
    fields = re.findall(
        r"^([0-9a-f]+) +\S", blocks(section(text_of(PROTOCOL), "## 9. A session"), "text")[-1], re.MULTILINE
    )
    body = VECTORS[0].client_to_server_records[0].body
    assert "".join(fields) == body.hex()
    assert bytes.fromhex(fields[6]) == b"example.com"
    assert int(fields[7], 16) == 443
