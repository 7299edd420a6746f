"""docs/security.md and SECURITY.md: what they name exists, and no limit is missing."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import require_program
from tests.test_docs import (
    INBOUND_KEYS,
    OUTBOUND_KEYS,
    PROTOCOL,
    README,
    ROOT,
    number,
    rows,
    section,
    shown_default,
    text_of,
)

SECURITY: Final = ROOT / "docs" / "security.md"
POLICY: Final = ROOT / "SECURITY.md"
TOP_LEVEL: Final = {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "SECURITY.md", "pyproject.toml"}


def names_of_tests(path: Path) -> set[str]:
    """The names of a file's tests: ``test_name`` or ``TestClass::test_name``."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return {name for name in names if name.rpartition("::")[2].startswith("test_")}


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", text_of(SECURITY))
    assert named
    assert [each for each in named if each[1] not in names_of_tests(ROOT / each[0])] == []
    assert text_of(SECURITY).count("`tests/") == len(named), "a test is named as `tests/file.py::test_name`"


def test_every_promise_names_a_mechanism_and_a_test() -> None:
    promises = rows(section(text_of(SECURITY), "## Promised"))
    assert promises
    for promise, mechanism, shown_by in promises:
        assert promise
        assert mechanism
        assert "::test_" in shown_by, promise


@pytest.mark.parametrize(
    ("heading", "settings"),
    [("### Set in inbound.toml", INBOUND_KEYS), ("### Set in outbound.toml", OUTBOUND_KEYS)],
    ids=["inbound", "outbound"],
)
def test_every_limit_that_can_be_set_has_a_row_with_its_default_and_a_reason(
    heading: str, settings: dict[str, object]
) -> None:
    table = rows(section(text_of(SECURITY), heading))
    limits = {
        key: shown_default(default)
        for key, default in settings.items()
        if key.startswith(("limits.", "pool.")) or (isinstance(default, int | float) and not isinstance(default, bool))
    }
    shown = {row[0].strip("`"): row[1] for row in table}
    assert len(shown) == len(table)
    assert all(row[2] for row in table)
    assert shown == limits


def constants(heading: str, place: str) -> dict[str, str]:
    table = rows(section(text_of(SECURITY), heading))
    assert all(name.startswith(f"`{place}") and reason for name, _, reason in table)
    found = {name.strip("`"): value for name, value, _ in table}
    assert len(found) == len(table)
    return found


@pytest.mark.parametrize(
    ("heading", "place"), [("### Of the protocol", "reflex.protocol.wire."), ("### Of this implementation", "reflex.")]
)
def test_the_constants_are_what_the_table_says(heading: str, place: str) -> None:
    for name, value in constants(heading, place).items():
        module, _, constant = name.rpartition(".")
        assert number(value) == float(getattr(importlib.import_module(module), constant)), name


def test_every_constant_of_this_implementation_that_the_protocol_document_lists_has_its_reason() -> None:
    listed = {row[2].strip("`") for row in rows(section(text_of(PROTOCOL), "### Of this implementation"))}
    assert listed - set(constants("### Of this implementation", "reflex.")) == set()


def test_the_readme_leads_to_both() -> None:
    assert "](docs/security.md)" in text_of(README)
    assert "](SECURITY.md)" in text_of(README)


def test_the_policy_says_how_to_report_what_is_supported_and_what_to_expect() -> None:
    headings = re.findall(r"^## (.*)$", text_of(POLICY), re.MULTILINE)
    assert headings[:3] == ["Reporting", "What to expect", "Supported versions"]
    assert "Report a vulnerability" in text_of(POLICY)


def test_the_top_level_holds_these_files_and_no_other() -> None:
    git = require_program("git")
    run = subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    files = {name for name in run.stdout.splitlines() if "/" not in name and not name.startswith(".")}
    assert files == TOP_LEVEL
