"""No key gets out by what objects show, nor by an error.

:func:`leaks` looks for any part of a key in every form that a program writes bytes in. Here it reads settings and
whatever holds keys, in every way in which Python writes an object down, and what is said of settings files with a key
in every wrong place. What daemons log and show while they run: ``tests/test_secrets_e2e.py``.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import functools
import json
import os
import pickle
import pprint
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from reflex.config import Secret, load_inbound, load_outbound, load_settings
from reflex.errors import ConfigError, HandshakeError
from reflex.inbound import Inbound
from reflex.net.server import Server
from reflex.outbound import Outbound
from reflex.protocol.handshake import derive_psk
from reflex.protocol.keys import CipherState, next_root, traffic_key
from reflex.protocol.pools import Pools
from reflex.protocol.session import Session
from reflex.protocol.wire import Suite
from tests.handshakes import (
    SERVER_PRIVATE,
    USER_ID,
    USER_KEY,
    accept,
    answer_of,
    client,
    client_credentials,
    roots,
    server_credentials,
    stranger,
)
from tests.loops import in_loop
from tests.processes import (
    Keys,
    inbound_settings,
    outbound_settings,
    to_toml,
)

# So much of a key's text, or of its bytes, is a leak: 9 bytes in base64, 6 in hexadecimal.
WINDOW_CHARACTERS: Final = 12
WINDOW_BYTES: Final = 6
# Some forms spend so many characters on a byte that 12 of them are three: a public key shares those by chance now
# and then with a secret one.
LONG_FORMS: Final = frozenset(("repr", "numbers"))


def texts_of(key: bytes) -> dict[str, str]:
    """The key in every form in which a program may write it."""
    standard, url = base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode()
    return {
        "base64": standard,
        "url-safe base64": url,
        "base64 of the bytes behind the first": base64.b64encode(key[1:]).decode(),
        "base64 of the bytes behind the second": base64.b64encode(key[2:]).decode(),
        "hexadecimal": key.hex(),
        "capital hexadecimal": key.hex().upper(),
        "hexadecimal with colons": key.hex(":"),
        "repr": repr(key)[2:-1],
        "repr of the base64": repr(standard.encode())[2:-1],
        "numbers": ", ".join(map(str, key)),
        "a number": str(int.from_bytes(key)),
        "a small-endian number": str(int.from_bytes(key, "little")),
    }


Windows = TypeVar("Windows", str, bytes)


def windows_of(whole: Windows, size: int) -> set[Windows]:
    return {whole[at : at + size] for at in range(len(whole) - size + 1)}


def window_of(form: str, written: str) -> int:
    """So many characters of this form are a leak; of a short password fewer."""
    is_long = form in LONG_FORMS and len(written) >= 2 * WINDOW_CHARACTERS
    return 2 * WINDOW_CHARACTERS if is_long else WINDOW_CHARACTERS


@functools.cache
def parts_of(key: bytes) -> tuple[set[bytes], dict[str, set[str]]]:
    """What is looked for: parts of the bytes, and of each form."""
    forms = {form: windows_of(written, window_of(form, written)) for form, written in texts_of(key).items()}
    assert all(forms.values())
    return windows_of(key, WINDOW_BYTES), forms


def leaks(shown: str | bytes, *keys: bytes) -> list[str]:
    """The forms in which a part of a key stands in what is shown."""
    raw = shown.encode(errors="surrogateescape") if isinstance(shown, str) else shown
    shown_bytes, text = windows_of(raw, WINDOW_BYTES), raw.decode("latin-1")
    shown_texts = {size: windows_of(text, size) for size in (WINDOW_CHARACTERS, 2 * WINDOW_CHARACTERS)}
    found = set()
    for key in keys:
        key_bytes, forms = parts_of(key)
        if not shown_bytes.isdisjoint(key_bytes):
            found.add("bytes")
        found |= {form for form, texts in forms.items() if not shown_texts[len(next(iter(texts)))].isdisjoint(texts)}
    return sorted(found)


def test_the_search_finds_what_it_is_to_find() -> None:
    key = os.urandom(32)
    assert leaks(b"before" + key[10:20] + b"behind", key) == ["bytes"]
    for form, written in texts_of(key).items():
        assert form in leaks(f"before {written[8:40]} behind", key), form
    assert leaks(base64.b64encode(b"b" + key), key) != []
    assert leaks(f"nothing of it, but {os.urandom(32).hex()}", key) == []


# What objects show.


def written_down(thing: object) -> Iterator[str | bytes]:
    """The thing as Python writes it, in every way that does not refuse."""
    yield from (repr(thing), str(thing), f"{thing}", f"{thing!a}", pprint.pformat(thing))
    yield repr([thing]) + repr({"a": thing})
    yield json.dumps(thing, default=str)
    yield from (repr(getattr(thing, "__dict__", "")), "".join(traceback.format_exception(ValueError(thing))))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):
            yield pickle.dumps(thing, protocol)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        for convert in (dataclasses.asdict, dataclasses.astuple):
            with contextlib.suppress(TypeError):
                yield repr(convert(thing))
        for copied in (copy.copy, copy.deepcopy):
            with contextlib.suppress(TypeError):
                yield repr(copied(thing))


def settings_of(folder: Path, keys: Keys) -> list[Any]:
    """Both halves' settings, and every table in them."""
    inbound, outbound = folder / "inbound.toml", folder / "outbound.toml"
    inbound.write_text(to_toml(inbound_settings(keys)))
    listen = [{"address": "127.0.0.1:0", "username": "ursula", "password": PASSWORD}]
    outbound.write_text(to_toml({**outbound_settings(keys, 1), "listen": listen}))
    server, user = load_inbound(inbound), load_outbound(outbound)
    tables = [getattr(whole, field.name) for whole in (server, user) for field in dataclasses.fields(whole)]
    return [server, user, *tables, *server.users, *user.servers, *user.listen]


PASSWORD: Final = os.urandom(16).hex()  # of a SOCKS5 door


def keys_of(keys: Keys) -> list[bytes]:
    private, user = base64.b64decode(keys.private_key), base64.b64decode(keys.user_key)
    return [private, user, derive_psk(user, _id_bytes(keys)), PASSWORD.encode()]


def _id_bytes(keys: Keys) -> bytes:
    return bytes.fromhex(keys.user_id.replace("-", ""))


def test_settings_show_no_key_in_any_way_of_writing_them_down(tmp_path: Path) -> None:
    keys = Keys.generate()
    secrets = keys_of(keys)
    things = settings_of(tmp_path, keys)
    assert sum("Secret(…)" in repr(thing) for thing in things) >= 6
    assert [
        (type(thing).__name__, found)
        for thing in things
        for shown in written_down(thing)
        if (found := leaks(shown, *secrets))
    ] == []


def holders() -> tuple[list[object], list[bytes]]:
    """One of everything that holds keys, and the keys."""
    made, hello = client()
    accepted = accept(hello)
    transcript = accepted._transcript
    before = [transcript._chaining_key, transcript._key]
    secrets, answer = answer_of(accepted)
    made.read_answer(answer)
    suite = Suite.AES_256_GCM
    pools = Pools()
    session = Session.client(secrets, pools, time_ms=0)
    session.close_buffers()
    things = [
        Secret(USER_KEY),
        client_credentials(),
        server_credentials(),
        made,
        accepted,
        transcript,
        secrets,
        CipherState(suite, secrets.root_client_to_server),
        CipherState(Suite.CHACHA20_POLY1305, secrets.root_server_to_client),
        session,
        session._encoder,
        session._decoder,
    ]
    keys = [USER_KEY, SERVER_PRIVATE, derive_psk(USER_KEY, USER_ID), *before, *roots(secrets).values()]
    for root in (secrets.root_client_to_server, secrets.root_server_to_client):
        keys += [*traffic_key(root, suite), next_root(root)]
    return things, [*keys, transcript._chaining_key, transcript._key]


def test_what_holds_keys_shows_none_in_any_way_of_writing_it_down() -> None:
    things, keys = holders()
    assert [
        (type(thing).__name__, found)
        for thing in things
        for shown in written_down(thing)
        if (found := leaks(shown, *keys))
    ] == []


def test_what_holds_keys_is_not_pickled() -> None:
    for thing in holders()[0]:
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError):
                pickle.dumps(thing, protocol)


@in_loop
async def test_the_daemons_objects_show_no_key(tmp_path: Path) -> None:
    keys = Keys.generate()
    server, user = settings_of(tmp_path, keys)[:2]
    outbound = Outbound(user)
    things: list[object] = [Inbound(server), outbound, *outbound._connector._servers]
    assert any(isinstance(thing, Server) for thing in things)
    secrets = keys_of(keys)
    assert [
        (type(thing).__name__, found)
        for thing in things
        for shown in written_down(thing)
        if (found := leaks(shown, *secrets))
    ] == []


def test_an_error_of_the_handshake_shows_no_key_with_all_that_hangs_on_it() -> None:
    _, hello = client()
    made, _ = client()
    _, answer = answer_of(accept(hello))
    wrong: list[Callable[[], object]] = [
        lambda: accept(client(stranger(user_key=b"w" * 32))[1]),
        lambda: accept(client(time_s=5)[1]),
        lambda: accept(bytes(32) + hello[32:]),
        lambda: made.read_answer(answer),
    ]
    for call in wrong:
        with pytest.raises(HandshakeError) as caught:
            call()
        shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.args) + repr(vars(caught.value))
        assert leaks(shown, USER_KEY, SERVER_PRIVATE, derive_psk(USER_KEY, USER_ID)) == []


# Settings files with a key in a wrong place.

Tree = dict[str, Any]


def texts_in(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of tables and lists."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from texts_in(value, (*path, key))


def placed(tree: Tree, path: tuple[Any, ...], value: object) -> Tree:
    changed = copy.deepcopy(tree)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def whole_settings(kind: str, keys: Keys) -> Tree:
    """Settings in which every key of a file stands."""
    if kind == "inbound":
        return {
            **inbound_settings(keys),
            "fallback": "127.0.0.1:80",
            "workers": 1,
            "targets": {"allow": ["127.0.0.1:*"], "deny": ["*:25"]},
            "limits": {"max_connections": 10, "drain_s": 1},
            "tcp": {"nodelay": True, "keepalive_s": 1},
        }
    settings = outbound_settings(keys, 1)
    settings["listen"] = [
        {"protocol": "socks5", "address": "127.0.0.1:1080", "username": "ursula", "password": PASSWORD},
        {"protocol": "forward", "address": "127.0.0.1:1081", "target": "127.0.0.1:80"},
    ]
    settings["servers"][0]["cipher"] = "auto"  # type: ignore[index]
    return {**settings, "workers": 1, "pool": {"max_idle": 1}, "limits": {"drain_s": 1}, "tcp": {"nodelay": True}}


def misplacements(kind: str, keys: Keys, written: str) -> Iterator[tuple[str, str]]:
    """A file's text with the key's text in each place in turn: as a value, in a list, in a table, as a name."""
    settings = whole_settings(kind, keys)
    for path in texts_in(settings):
        place = ".".join(map(str, path))
        yield place, to_toml(placed(settings, path, written))
        yield f"{place}, in a list", to_toml(placed(settings, path, [written]))
        yield f"{place}, in a table", to_toml(placed(settings, path, {"key": written}))
        yield f"{place}, with a port", to_toml(placed(settings, path, f"{written}:443"))
    whole = to_toml(settings)
    quoted = json.dumps(written)
    yield "a table's name", f"{whole}\n[{quoted}]\na = 1\n"
    yield "a key's name", f"{quoted} = 1\n{whole}"
    yield "a key's name in a table", f"{whole}\n{quoted} = 1\n"
    yield "a key's name twice", f"a = {{ {quoted} = 1, {quoted} = 2 }}\n{whole}"
    yield "bare", f"{written}\n{whole}"
    yield "without quotes", f"fallback = {written}\n{whole}"
    yield "without an end", f'{whole}\nkey = "{written}'
    yield (
        "the path of a key's file",
        whole.replace("private_key =", "private_key_file =").replace("user_key", "user_key_file"),
    )


@pytest.mark.parametrize("form", ["base64", "url-safe base64", "capital hexadecimal", "base64, cut"])
@pytest.mark.parametrize("kind", ["inbound", "outbound"])
def test_a_key_in_any_wrong_place_of_a_settings_file_is_not_told(kind: str, form: str, tmp_path: Path) -> None:
    keys = Keys.generate()
    stray = os.urandom(32)
    written = texts_of(stray)["base64"].rstrip("=")[:-1] if form == "base64, cut" else texts_of(stray)[form]
    path = tmp_path / "reflex.toml"
    refused = 0
    for place, text in misplacements(kind, keys, written):
        path.write_text(text)
        for load in (load_settings, load_inbound if kind == "inbound" else load_outbound):
            try:
                loaded = load(path)
            except ConfigError as error:
                refused += 1
                shown = "".join(traceback.format_exception(error)) + repr(error) + repr(error.problems)
            else:
                # It may be a password, or a file's name that comes to nothing; it is not told all the same.
                shown = "\n".join(loaded.warnings)
            assert leaks(shown, stray, *keys_of(keys)) == [], place
    assert refused > 50


def test_a_key_in_a_wrong_place_is_not_told_by_the_commands(tmp_path: Path) -> None:
    keys = Keys.generate()
    stray = os.urandom(32)
    path = tmp_path / "inbound.toml"
    path.write_text(to_toml(merged_key(inbound_settings(keys), texts_of(stray)["base64"])))
    for command in (["reflex", "check"], ["reflex-inbound"], ["reflex-outbound"]):
        main = {"reflex": "main", "reflex-inbound": "inbound_main", "reflex-outbound": "outbound_main"}[command[0]]
        code = f"from reflex.cli import {main}; raise SystemExit({main}())"
        run = subprocess.run(
            [sys.executable, "-c", code, *command[1:], "-c", str(path)], capture_output=True, timeout=20, check=False
        )
        assert run.returncode in (1, 2)
        assert run.stderr
        assert b"Traceback" not in run.stderr
        assert leaks(run.stdout + run.stderr, stray, *keys_of(keys)) == []


def merged_key(settings: Mapping[str, object], written: str) -> dict[str, object]:
    return {**settings, "fallback": written, "listen": [written], written: 1}
