"""Every system that is compared, each as a port forward through its two halves.

    client -> LISTEN: client half -> MID: server half -> TARGET

A :class:`System` says what it needs and how its halves are started; :meth:`System.start` writes keys and
settings into a temporary directory, starts both halves, and waits until every port of theirs listens.
Only loopback is used, and ports from a range that outgoing connections do not take.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.halves import Program, Running, free_port, wait_listening
from bench.local import to_toml

LOOPBACK: Final = "127.0.0.1"
SEARCH_PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
SSHD_DIRECTORY: Final = Path("/run/sshd")  # sshd insists on it when it runs as root
MUX_CONCURRENCY: Final = 8  # v2ray's own default
HAPROXY_MAX_CONNECTIONS: Final = 5_000  # above what is measured; it wants 2.5 descriptors for each at its start

Command = list[str]


@dataclass(frozen=True)
class Site:
    """Where a system is put up: one entry a target in each of the port lists.

    ``mids`` is where the server half listens; ``vias`` is where the client half connects to, which is
    the same, or a relay in front of it.
    """

    directory: Path
    targets: Sequence[int]
    mids: Sequence[int]
    vias: Sequence[int]
    listens: Sequence[int]

    def write(self, name: str, text: str) -> str:
        """Write a file that only its owner reads and return its path."""
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_text(text)
        return str(path)


@dataclass(frozen=True)
class Plan:
    """The commands of both halves, and the ports of the server half that are used (the first ``mids``)."""

    server: list[Command]
    client: list[Command]
    mid_count: int


@dataclass(frozen=True)
class System:
    """A way from LISTEN to TARGET.

    ``programs`` must be there for it to be measured. ``package`` is Debian's name, shown where it is not.
    """

    name: str
    label: str
    is_encrypted: bool
    programs: tuple[str, ...]
    package: str
    version_command: tuple[str, ...]
    plan: Callable[[Site], Plan]

    @property
    def is_installed(self) -> bool:
        return all(shutil.which(program, path=SEARCH_PATH) for program in self.programs)

    def version(self) -> str:
        """What the program says of itself, or an empty text."""
        return program_version(self.version_command)

    @contextmanager
    def start(self, targets: Sequence[int], *, via: Callable[[int], int] | None = None) -> Iterator[Running]:
        """Start both halves with a forward for each port of ``targets``; end them on leaving.

        ``via`` is given each port of the server half and returns the one that the client half is to
        connect to. Raises StartFailed with what a half wrote when it does not come up.
        """
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"bench-{self.name}-")))
            mids = [free_port() for _ in targets]
            vias = [via(mid) for mid in mids] if via else mids
            if self.name == "direct":
                listens = [via(target) for target in targets] if via else list(targets)
                yield Running((), listens)
                return
            site = Site(directory, targets, mids, vias, [free_port() for _ in targets])
            plan = self.plan(site)
            programs: list[Program] = []
            for commands, ports in ((plan.server, mids[: plan.mid_count]), (plan.client, site.listens)):
                for number, command in enumerate(commands):
                    log = directory / f"{len(programs)}.log"
                    program = Program(f"{self.name} {number}", [which(command[0]), *command[1:]], log)
                    programs.append(stack.enter_context(program))
                wait_listening(ports, programs)
            yield Running(programs, site.listens)


def which(program: str) -> str:
    """The program's path; sbin is searched too, which is not on everybody's PATH."""
    return shutil.which(program, path=SEARCH_PATH) or program


def program_version(command: Sequence[str]) -> str:
    """The first thing like a version in what ``command`` prints, or an empty text."""
    if not command:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [which(command[0]), *command[1:]], capture_output=True, text=True, check=False, timeout=10
        )
        if match := re.search(r"\d+\.\d+[\w.]*", done.stdout + done.stderr):
            return match[0]
    return ""


def _at(port: int) -> str:
    return f"{LOOPBACK}:{port}"


def _forwards(site: Site) -> Iterator[tuple[int, int]]:
    """(LISTEN, TARGET) of each forward."""
    return zip(site.listens, site.targets, strict=True)


# Ours


def reflex_settings(directory: Path) -> tuple[Path, Path]:
    """Settings of both halves with fresh keys, as ``reflex init`` writes them."""
    conf = directory / "conf"
    code = "from reflex.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "init", "--server", _at(1), "--dir", str(conf)]
    subprocess.run(command, check=True, capture_output=True)
    return conf / "inbound.toml", conf / "outbound.toml"


def _reflex(site: Site) -> Plan:
    inbound, outbound = reflex_settings(site.directory)
    settings = tomllib.loads(inbound.read_text())
    settings["listen"] = [_at(site.mids[0])]
    settings["targets"] = {"allow": [_at(target) for target in site.targets]}
    inbound.write_text(to_toml(settings))
    settings = tomllib.loads(outbound.read_text())
    settings["listen"] = [
        {"protocol": "forward", "address": _at(listen), "target": _at(target)} for listen, target in _forwards(site)
    ]
    settings["servers"][0] |= {"address": _at(site.vias[0]), "cipher": "aes-256-gcm"}
    outbound.write_text(to_toml(settings))

    def daemon(main: str, path: Path) -> Command:
        code = f"from reflex.cli import {main}; raise SystemExit({main}())"
        return [sys.executable, "-c", code, "-c", str(path)]

    return Plan([daemon("inbound_main", inbound)], [daemon("outbound_main", outbound)], 1)


# Peers


def _shadowsocks(site: Site) -> Plan:
    common = ["-s", LOOPBACK, "-k", secrets.token_hex(), "-m", "aes-256-gcm", "--no-delay"]
    server = ["ss-server", *common, "-p", str(site.mids[0])]
    client = ["ss-tunnel", *common, "-p", str(site.vias[0]), "-b", LOOPBACK]
    return Plan([server], [[*client, "-l", str(listen), "-L", _at(target)] for listen, target in _forwards(site)], 1)


def _v2ray(site: Site, *, mux_concurrency: int) -> Plan:
    user = str(uuid.uuid4())
    quiet = {"log": {"loglevel": "error"}}
    server = quiet | {
        "inbounds": [
            {
                "listen": LOOPBACK,
                "port": site.mids[0],
                "protocol": "vmess",
                "settings": {"clients": [{"id": user, "alterId": 0}]},
            }
        ],
        "outbounds": [{"protocol": "freedom"}],
    }
    next_hop = {
        "address": LOOPBACK,
        "port": site.vias[0],
        "users": [{"id": user, "alterId": 0, "security": "aes-128-gcm"}],
    }
    client = quiet | {
        "inbounds": [
            {
                "listen": LOOPBACK,
                "port": listen,
                "protocol": "dokodemo-door",
                "settings": {"address": LOOPBACK, "port": target, "network": "tcp"},
            }
            for listen, target in _forwards(site)
        ],
        "outbounds": [
            {
                "protocol": "vmess",
                "settings": {"vnext": [next_hop]},
                "mux": {"enabled": mux_concurrency > 0, "concurrency": max(mux_concurrency, 1)},
            }
        ],
    }
    files = [site.write(f"{name}.json", json.dumps(half)) for name, half in (("server", server), ("client", client))]
    return Plan([["v2ray", "-config", files[0]]], [["v2ray", "-config", files[1]]], 1)


def _certificate(site: Site) -> tuple[str, str]:
    """A certificate for localhost that signs itself, on P-256, the fastest that TLS has everywhere; and its key."""
    certificate, key = str(site.directory / "cert.pem"), str(site.directory / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


def _trojan(site: Site) -> Plan:
    certificate, key = _certificate(site)
    tcp = {"no_delay": True, "keep_alive": True, "reuse_port": False, "fast_open": False}
    common = {"password": [secrets.token_hex()], "log_level": 3, "tcp": tcp}
    server = common | {
        "run_type": "server",
        "local_addr": LOOPBACK,
        "local_port": site.mids[0],
        "remote_addr": LOOPBACK,
        "remote_port": site.targets[0],  # for what is not trojan; never comes
        "ssl": {"cert": certificate, "key": key, "reuse_session": True, "session_ticket": True},
    }
    clients = [
        common
        | {
            "run_type": "forward",
            "local_addr": LOOPBACK,
            "local_port": listen,
            "remote_addr": LOOPBACK,
            "remote_port": site.vias[0],
            "target_addr": LOOPBACK,
            "target_port": target,
            "ssl": {
                "verify": True,
                "verify_hostname": True,
                "cert": certificate,
                "sni": "localhost",
                "reuse_session": True,
                "session_ticket": True,
            },
        }
        for listen, target in _forwards(site)
    ]
    files = [site.write(f"client{number}.json", json.dumps(client)) for number, client in enumerate(clients)]
    return Plan(
        [["trojan", "-c", site.write("server.json", json.dumps(server))]], [["trojan", "-c", file] for file in files], 1
    )


def _stunnel(site: Site) -> Plan:
    certificate, key = _certificate(site)
    common = "foreground = yes\npid =\ndebug = 3\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n"

    def services(accept: Sequence[int], connect: Sequence[int]) -> str:
        pairs = enumerate(zip(accept, connect, strict=True))
        return "".join(f"[s{number}]\naccept = {_at(a)}\nconnect = {_at(c)}\n" for number, (a, c) in pairs)

    server = f"{common}cert = {certificate}\nkey = {key}\n" + services(site.mids, site.targets)
    client = f"{common}client = yes\nCAfile = {certificate}\nverifyChain = yes\n" + services(site.listens, site.vias)
    return Plan(
        [["stunnel4", site.write("server.conf", server)]],
        [["stunnel4", site.write("client.conf", client)]],
        len(site.mids),
    )


def _spiped(site: Site) -> Plan:
    key = site.write("key", secrets.token_hex(32))

    def halves(switch: str, sources: Sequence[int], targets: Sequence[int]) -> list[Command]:
        # -n 0: any number of connections, not 100; -o: seconds a handshake may take when many come at once.
        common = ["spiped", switch, "-F", "-n", "0", "-o", "60", "-k", key]
        return [[*common, "-s", _at(s), "-t", _at(t)] for s, t in zip(sources, targets, strict=True)]

    return Plan(halves("-d", site.mids, site.targets), halves("-e", site.listens, site.vias), len(site.mids))


def _openssh(site: Site) -> Plan:
    for name in ("host", "user"):
        command = [which("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(site.directory / name)]
        subprocess.run(command, check=True, capture_output=True)
    if os.geteuid() == 0:
        SSHD_DIRECTORY.mkdir(mode=0o755, exist_ok=True)
    sshd = {
        "ListenAddress": LOOPBACK,
        "Port": site.mids[0],
        "HostKey": site.directory / "host",
        "AuthorizedKeysFile": site.directory / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "LogLevel": "ERROR",
    }
    configuration = site.write("sshd.conf", "".join(f"{key} {value}\n" for key, value in sshd.items()))
    public_key = (site.directory / "host.pub").read_text()
    hosts = site.write("hosts", f"[{LOOPBACK}]:{site.vias[0]} {public_key}")
    client = ["ssh", "-N", "-F", "none", "-p", str(site.vias[0]), "-i", str(site.directory / "user")]
    for option in (f"UserKnownHostsFile={hosts}", "ExitOnForwardFailure=yes", "BatchMode=yes", "LogLevel=ERROR"):
        client += ["-o", option]
    client += ["-c", "aes128-gcm@openssh.com"]
    for listen, target in _forwards(site):
        client += ["-L", f"{_at(listen)}:{_at(target)}"]
    return Plan([["sshd", "-D", "-f", configuration]], [[*client, f"{getpass.getuser()}@{LOOPBACK}"]], 1)


def _haproxy(site: Site) -> Plan:
    def half(binds: Sequence[int], servers: Sequence[int]) -> str:
        text = f"global\n  maxconn {HAPROXY_MAX_CONNECTIONS}\n  nbthread 1\n"
        text += f"defaults\n  mode tcp\n  option splice-auto\n  maxconn {HAPROXY_MAX_CONNECTIONS}\n"
        text += "  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n"
        for number, (bind, server) in enumerate(zip(binds, servers, strict=True)):
            text += f"listen l{number}\n  bind {_at(bind)}\n  server s {_at(server)}\n"
        return text

    files = [
        site.write("server.cfg", half(site.mids, site.targets)),
        site.write("client.cfg", half(site.listens, site.vias)),
    ]
    return Plan([["haproxy", "-db", "-f", files[0]]], [["haproxy", "-db", "-f", files[1]]], len(site.mids))


def _nothing(_site: Site) -> Plan:
    return Plan([], [], 0)


OURS: Final = "reflex"
FLOOR: Final = "haproxy"
DIRECT: Final = "direct"
_PYTHON: Final = (sys.executable, "-c", "import reflex; print(reflex.__version__)")
_v2ray_plain = functools.partial(_v2ray, mux_concurrency=0)
_v2ray_mux = functools.partial(_v2ray, mux_concurrency=MUX_CONCURRENCY)
_SS: Final = ("ss-server", "ss-tunnel")
_SSH: Final = ("ssh", "sshd", "ssh-keygen")

SYSTEMS: Final = {
    system.name: system
    for system in (
        System(OURS, "Reflex", True, (), "", _PYTHON, _reflex),
        System("shadowsocks", "shadowsocks-libev", True, _SS, "shadowsocks-libev", ("ss-server", "-h"), _shadowsocks),
        System("v2ray", "v2ray", True, ("v2ray",), "v2ray", ("v2ray", "version"), _v2ray_plain),
        System("v2ray-mux", "v2ray, mux", True, ("v2ray",), "v2ray", ("v2ray", "version"), _v2ray_mux),
        System("trojan", "trojan", True, ("trojan", "openssl"), "trojan", ("trojan", "-v"), _trojan),
        System("stunnel", "stunnel", True, ("stunnel4", "openssl"), "stunnel4", ("stunnel4", "-version"), _stunnel),
        System("spiped", "spiped", True, ("spiped",), "spiped", ("spiped", "-v"), _spiped),
        System("openssh", "OpenSSH", True, _SSH, "openssh-server", ("ssh", "-V"), _openssh),
        System(FLOOR, "haproxy, plain", False, ("haproxy",), "haproxy", ("haproxy", "-v"), _haproxy),
        System(DIRECT, "no proxy", False, (), "", (), _nothing),
    )
}
