"""A network of a run's own: a namespace with nothing in it but loopback, and the congestion control that is named.

What a system sends by default is a setting of each namespace, so that nothing outside sees any of it, and it is
gone with the last process of the run.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Final

from bench.machine import CONGESTION_CONTROL, congestion_control

CLONE_NEWNET: Final = 0x4000_0000  # linux/sched.h; the call is in Python's os from 3.12 on
KNOWN: Final = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


def enter_own_network(control: str) -> str:
    """Put this process, and what it starts from now on, into a fresh network whose TCP uses ``control``.

    To be called by the first thread; others stay where they are. Returns what the system's own default is.
    Raises SystemExit, with the reason, where that is not to be had.
    """
    default = congestion_control()
    known = KNOWN.read_text().split() if KNOWN.exists() else []
    if control not in known:
        raise SystemExit(f"congestion control {control}: this kernel has {', '.join(known) or 'none to choose from'}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise SystemExit(f"a network namespace of its own needs root: {os.strerror(ctypes.get_errno())}")
    try:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True, capture_output=True, text=True)
        CONGESTION_CONTROL.write_text(control)
    except FileNotFoundError as error:
        raise SystemExit(f"a network namespace of its own needs ip (Debian: iproute2): {error}") from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"congestion control {control}: {error}") from error
    return default
