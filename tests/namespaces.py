"""Networks of a test's own: namespaces with nothing in them but loopback, and cables between them.

A thread is in one namespace at a time. What it makes inside stays there: sockets wherever they are used, and
programs with all that they do. Nothing outside sees any of it, and it is gone when the test is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import IN_CI, require_program

CLONE_NEWNET = 0x4000_0000  # linux/sched.h; the calls are in Python's os from 3.12 on
_HERE = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace, there for as long as it is open or somebody is in it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def path(self) -> str:
        """Where other programs find it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is in it; so is what it starts meanwhile."""
        with _kept_namespace():
            _check(_libc.setns(self._fd, CLONE_NEWNET))
            yield

    def ip(self, command: str) -> None:
        """Run ``ip`` in it, with these arguments."""
        with self.inside():
            subprocess.run([require_program("ip"), *command.split()], check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """A namespace, with loopback up. Where none can be made the test is skipped; with CI=true it fails.

    It is skipped there too where the kernel forbids it: nothing that could be installed permits it.
    """
    require_program("ip")
    with contextlib.ExitStack() as stack:
        with _kept_namespace():
            try:
                _check(_libc.unshare(CLONE_NEWNET))
            except OSError as error:
                reason = f"needs a network namespace of its own: {error.strerror}"
                if IN_CI and error.errno != errno.EPERM:
                    pytest.fail(reason)
                pytest.skip(reason)
            fd = os.open(_HERE, os.O_RDONLY)
            stack.callback(os.close, fd)
        made = Namespace(fd)
        made.ip("link set lo up")
        yield made


def forward_packets(there: Namespace) -> None:
    """Make it a router. The test is skipped, in CI as well, where ``/proc/sys`` may not be written."""
    with there.inside():
        try:
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            pytest.skip(f"needs to write /proc/sys: {error.strerror}")


def connect(here: Namespace, there: Namespace, *, network: str = "10.77.0") -> None:
    """A cable between two namespaces: ``way`` at either end, ``network``.1 here and ``network``.2 there."""
    here.ip(f"link add way type veth peer name way netns {there.path}")
    for number, end in enumerate((here, there), start=1):
        end.ip(f"address add {network}.{number}/24 dev way")
        end.ip("link set way up")


@contextlib.contextmanager
def _kept_namespace() -> Iterator[None]:
    """Whatever namespace this thread goes to, it comes back to the one it was in."""
    fd = os.open(_HERE, os.O_RDONLY)
    try:
        yield
    finally:
        if not os.path.samestat(os.stat(_HERE), os.fstat(fd)):  # who may not leave may not come back either
            _check(_libc.setns(fd, CLONE_NEWNET))
        os.close(fd)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
