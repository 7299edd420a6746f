"""What every test gets: whole pools checked after it, sessions and descriptors to ask for; in CI nothing that could be
installed is missing unseen.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import socket
from collections.abc import Iterator

import pytest
from hypothesis import settings

from reflex.net import upkeep
from reflex.protocol.pools import Pools, all_pools
from tests.loops import LOOPS, LoopFactory, loops_from
from tests.sessions import Pair, Peer, connected, peer_of

IN_CI = os.environ.get("CI", "").lower() == "true"
SYSTEM_PROGRAMS = "/usr/sbin:/sbin"  # where Debian keeps nginx, outside of a user's PATH
DESCRIPTORS = 65_536  # a thousand clients and their targets in one process, and room

# A busy machine makes single examples slow; that is no failure. CI finds the same examples each time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if IN_CI else "local")


def _raise_descriptor_limit() -> None:
    """Many systems grant 1,024 to begin with, and more to who asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


_raise_descriptor_limit()


@pytest.fixture(autouse=True)
def _pools_are_whole() -> Iterator[None]:
    """Fail the test that leaves something borrowed from any pool bundle that still exists."""
    before = {id(pools): pools.in_use for pools in all_pools()}
    yield

    def not_whole() -> list[Pools]:
        return [pools for pools in all_pools() if pools.in_use > before.get(id(pools), 0)]

    if not_whole():
        gc.collect()  # a bundle that died in a reference cycle is nobody's leak
    if left := not_whole():
        counts = {
            name: figures.in_use for pools in left for name, figures in pools.statistics().items() if figures.in_use
        }
        pytest.fail(f"still borrowed from the pools after the test: {counts}")


@pytest.fixture
def pools() -> Pools:
    """A fresh bundle of all pools."""
    return Pools()


@pytest.fixture
def pair(pools: Pools) -> Iterator[Pair]:
    """Two sessions that are connected."""
    with connected(pools) as pair:
        yield pair


@pytest.fixture
def peer(pools: Pools) -> Iterator[Peer]:
    """The peer of a server."""
    with peer_of(pools, of_server=True) as peer:
        yield peer


@pytest.fixture
def server(pools: Pools) -> Iterator[Peer]:
    """The peer of a client."""
    with peer_of(pools, of_server=False) as peer:
        yield peer


@pytest.fixture(params=LOOPS)
def each_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """For a module's ``pytestmark``: its tests run on the daemons' loop and on uvloop's."""
    factory: LoopFactory = request.param
    with loops_from(factory):
        yield


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tunnels look at their clock every millisecond or two."""
    monkeypatch.setattr(upkeep, "TICK_MIN_S", 0.001)
    monkeypatch.setattr(upkeep, "TICK_MAX_S", 0.002)


def require_program(name: str) -> str:
    """The path of a system program that a test drives.

    Without it the test is skipped with the program's name as the reason; with CI=true it fails.
    """
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{SYSTEM_PROGRAMS}")
    if path is None:
        reason = f"needs the program {name}, which is not installed"
        if IN_CI:
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def require_ipv6() -> None:
    """Skip the test where there is no ``::1``, in CI as well: nothing that could be installed brings it."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"needs the address ::1, which this machine does not have: {error.strerror}")
