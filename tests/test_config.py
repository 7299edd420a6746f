"""Settings: which of the two a file is, and that no file at all is more than a wrong one, or shows a secret."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reflex.config import InboundSettings, OutboundSettings, load_inbound, load_outbound, load_settings
from reflex.errors import ConfigError
from tests.settings_files import ID, INBOUND, KEY_A, OUTBOUND, PASSWORD, problems, write


def test_settings_of_either_kind(tmp_path: Path) -> None:
    assert isinstance(load_settings(write(tmp_path, INBOUND)), InboundSettings)
    assert isinstance(load_settings(write(tmp_path, OUTBOUND)), OutboundSettings)
    (problem,) = problems(load_settings, tmp_path, "[tcp]\nnodelay = true")
    assert problem == "neither [[users]] nor [[servers]]; expected those of inbound.toml or of outbound.toml"


def test_no_repr_shows_a_secret(tmp_path: Path) -> None:
    for loaded in (load_inbound(write(tmp_path, INBOUND)), load_outbound(write(tmp_path, OUTBOUND))):
        for shown in (repr(loaded), str(loaded), f"{loaded}", repr(copy.deepcopy(loaded))):
            assert "Secret(…)" in shown
            assert PASSWORD not in shown
            assert repr(bytes(range(32)))[2:-1] not in shown
            assert repr(bytes(range(32, 64)))[2:-1] not in shown


KNOWN_KEYS = [
    "listen",
    "private_key",
    "private_key_file",
    "fallback",
    "users",
    "name",
    "id",
    "key",
    "targets",
    "allow",
    "deny",
    "limits",
    "max_connections",
    "max_streams",
    "handshake_timeout_s",
    "drain_s",
    "protocol",
    "address",
    "username",
    "password",
    "target",
    "servers",
    "public_key",
    "user_id",
    "user_key",
    "user_key_file",
    "cipher",
    "pool",
    "min_idle",
    "max_idle",
    "workers",
    "tcp",
    "nodelay",
    "keepalive_s",
    "usage_file",
    "replay_file",
    "max_tunnels",
    "dials_per_s",
    "bytes_per_s",
    "monthly_bytes",
]
keys = st.sampled_from(KNOWN_KEYS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=8
)
texts = st.sampled_from([KEY_A, ID, "127.0.0.1:1", "[::1]:2", "socks5", "forward", "*:*", "u"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=50
)
scalars = texts | st.integers() | st.floats() | st.booleans()
trees = st.recursive(
    scalars,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(keys, children, max_size=6),
    max_leaves=30,
)


def toml(value: object) -> str:
    """A value as TOML's inline text."""
    if isinstance(value, dict):
        return (
            "{ "
            + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {toml(item)}" for key, item in value.items())
            + " }"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def load_anything(path: Path) -> None:
    for load in (load_inbound, load_outbound, load_settings):
        try:
            shown, found = repr(load(path)), None
        except ConfigError as error:
            shown, found = str(error), error.problems
        assert KEY_A not in shown
        assert found is None or (found and all(problem.startswith(f"{path}: ") for problem in found))


ANYTHING = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@ANYTHING
@given(tree=st.dictionaries(keys, trees, max_size=8))
def test_any_tree_loads_or_is_a_config_error(tmp_path: Path, tree: dict[str, object]) -> None:
    text = "\n".join(f"{json.dumps(key, ensure_ascii=False)} = {toml(value)}" for key, value in tree.items())
    load_anything(write(tmp_path, text))


@ANYTHING
@given(text=st.text() | st.binary())
def test_any_text_loads_or_is_a_config_error(tmp_path: Path, text: str | bytes) -> None:
    load_anything(write(tmp_path, text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text))


@ANYTHING
@given(place=st.integers(0, len(INBOUND)), length=st.integers(0, 20), new=st.text(max_size=5))
def test_any_damage_loads_or_is_a_config_error(tmp_path: Path, place: int, length: int, new: str) -> None:
    damaged = INBOUND[:place] + new + INBOUND[place + length :]
    load_anything(write(tmp_path, damaged.encode("utf-8", "surrogatepass")))
