"""What a figure was measured on, in a few words each."""

from __future__ import annotations

import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path

_PACKAGES = ("cryptography", "uvloop")
CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")  # of the network that this process is in


def describe(*, system_congestion_control: str | None = None) -> dict[str, str]:
    """The processor, the kernel, Python and what matters of its packages, the date.

    ``system_congestion_control`` is the system's own default, where the run has a network of its own.
    """
    control = congestion_control()
    return {
        "processor": processor_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_gib():.0f} GiB",
        "kernel": f"{platform.system()} {kernel_version()} {platform.machine()}",
        "congestion control": control,
        "the system's congestion control": system_congestion_control or control,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: version for name in _PACKAGES if (version := _package_version(name))},
        "date": time.strftime("%Y-%m-%d"),
    }


def kernel_version() -> str:
    """The first two numbers of the kernel's release; the rest of it is this machine's alone."""
    return ".".join(platform.release().split(".")[:2])


def processor_name() -> str:
    """As /proc/cpuinfo has it, or the architecture."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def congestion_control() -> str:
    """TCP's default in this process's network; one that paces (bbr) makes every peer slower on loopback."""
    return CONGESTION_CONTROL.read_text().strip() if CONGESTION_CONTROL.exists() else "unknown"


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
