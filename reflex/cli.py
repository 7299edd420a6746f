"""The three commands: ``reflex`` (files and keys), ``reflex-inbound`` and ``reflex-outbound`` (the daemons).

Exit codes: 0 done, 1 ``reflex check`` found errors, 2 wrong usage or a command that could not do its work.
What a command needs for its work alone is imported by it, so that the others start fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from reflex import __version__
from reflex.config import HostPort, InboundSettings, OutboundSettings, load_inbound, load_outbound, load_settings
from reflex.config.fresh import (
    SOCKS_ADDRESS,
    create_folder,
    server_keys,
    settings_files,
    toml_text,
    user_keys,
    write_files,
)
from reflex.config.inbound import EXPECTED_USER_NAME, parse_user_name
from reflex.config.secret import describe
from reflex.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from reflex.daemon import Daemon
    from reflex.worker import WorkerContext

Settings = TypeVar("Settings", InboundSettings, OutboundSettings)

EXIT_OK: Final = 0
EXIT_BAD_FILE: Final = 1
EXIT_USAGE: Final = 2
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
DEFAULT_USER_NAME: Final = "user"

REFLEX_EXAMPLES: Final = """\
examples:
  reflex init --server vpn.example.org:8443 --dir conf     both settings files, with fresh keys
  reflex keygen user --name bob                            another user
  reflex check -c conf/inbound.toml                        every error that a file holds
"""
INIT_EXAMPLES: Final = """\
examples:
  reflex init --server vpn.example.org:8443 --dir conf
  reflex init --server [2001:db8::1]:8443 --dir conf --user alice --force
"""
KEYGEN_EXAMPLES: Final = """\
examples:
  reflex keygen server               private_key for inbound.toml, public_key for outbound.toml
  reflex keygen user --name bob      name, id and key for inbound.toml's [[users]];
                                     outbound.toml has id and key as user_id and user_key
"""
CHECK_EXAMPLES: Final = """\
examples:
  reflex check -c conf/inbound.toml
  reflex check -c conf/outbound.toml
"""
INBOUND_EXAMPLES: Final = """\
examples:
  reflex-inbound -c conf/inbound.toml
  reflex-inbound -c /etc/reflex/inbound.toml --log-level warning

SIGINT or SIGTERM ends it once running streams have ended (limits.drain_s), a second one at once;
SIGUSR1 logs statistics.
"""
OUTBOUND_EXAMPLES: Final = """\
examples:
  reflex-outbound -c conf/outbound.toml
  curl -x socks5h://127.0.0.1:1080 https://example.org/

SIGINT or SIGTERM ends it once running streams have ended (limits.drain_s), a second one at once;
SIGUSR1 logs statistics.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The ``reflex`` command; returns the exit code. argparse itself exits with 2 on wrong usage."""
    parser = _parser("reflex", "Makes and checks settings and keys for reflex-inbound and reflex-outbound.")
    parser.epilog = REFLEX_EXAMPLES
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    init = _command(commands, "init", "write inbound.toml and outbound.toml with fresh keys", INIT_EXAMPLES)
    init.add_argument(
        "--server", metavar="HOST:PORT", type=_server_argument, required=True, help="where clients connect"
    )
    init.add_argument("--dir", metavar="DIR", type=Path, required=True, help="where the files go; created if needed")
    init.add_argument("--user", metavar="NAME", type=_name_argument, default=DEFAULT_USER_NAME, help="the first user")
    init.add_argument("--force", action="store_true", help="overwrite existing files")
    init.set_defaults(run=_init)

    keygen = _command(commands, "keygen", "print fresh keys", KEYGEN_EXAMPLES)
    kinds = keygen.add_subparsers(title="kinds", metavar="KIND", required=True)
    server = _command(kinds, "server", "a server's key pair", KEYGEN_EXAMPLES)
    server.set_defaults(run=_keygen_server)
    user = _command(kinds, "user", "a user's id and key", KEYGEN_EXAMPLES)
    user.add_argument("--name", metavar="NAME", type=_name_argument, default=DEFAULT_USER_NAME, help="the user's name")
    user.set_defaults(run=_keygen_user)

    check = _command(commands, "check", "read a settings file and print every error in it", CHECK_EXAMPLES)
    check.add_argument("-c", "--config", metavar="FILE", required=True, help="inbound.toml or outbound.toml")
    check.set_defaults(run=_check)

    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def inbound_main(argv: Sequence[str] | None = None) -> int:
    """The ``reflex-inbound`` command; returns the exit code."""

    def load_class() -> Callable[..., Daemon]:
        from reflex.inbound import Inbound  # noqa: PLC0415 - keeps --help and `reflex` fast

        return Inbound

    parser = _parser("reflex-inbound", "The server's half: takes tunnels and dials their targets.")
    parser.epilog = INBOUND_EXAMPLES
    return _run(parser, argv, load_inbound, load_class, name="reflex.inbound")


def outbound_main(argv: Sequence[str] | None = None) -> int:
    """The ``reflex-outbound`` command; returns the exit code."""

    def load_class() -> Callable[..., Daemon]:
        from reflex.outbound import Outbound  # noqa: PLC0415 - keeps --help and `reflex` fast

        return Outbound

    parser = _parser("reflex-outbound", "The client's half: takes SOCKS5 and forwards, and sends them through tunnels.")
    parser.epilog = OUTBOUND_EXAMPLES
    return _run(parser, argv, load_outbound, load_class, name="reflex.outbound")


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{prog} {__version__}")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    load: Callable[[str], Settings],
    load_class: Callable[[], Callable[..., Daemon]],
    *,
    name: str,
) -> int:
    """Reads the settings and runs the daemon made of them: an object of the class that ``load_class`` imports."""
    parser.add_argument("-c", "--config", metavar="FILE", required=True, help="the settings, a TOML file")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="default: info")
    arguments = parser.parse_args(argv)
    try:
        settings = load(arguments.config)
    except ConfigError as error:
        _print_problems(error)
        return EXIT_USAGE
    _print_warnings(settings.warnings)

    from reflex.daemon import run_daemon  # noqa: PLC0415 - asyncio takes its time, and an error needs none of it

    if settings.workers == 1:
        return run_daemon(lambda: load_class()(settings), name=name, log_level=arguments.log_level)

    from reflex.supervisor import run_workers  # noqa: PLC0415 - most daemons have no workers

    daemon_class = load_class()  # before the workers are forked off, which then share the code's memory

    def prepare(listening: Sequence[socket.socket]) -> Callable[[WorkerContext], Daemon]:
        resolved = _with_web_server(settings, listening)
        return lambda shared: daemon_class(resolved, shared=shared)

    return run_workers(
        prepare,
        listen=[(address.host, address.port) for address in _listen_addresses(settings)],
        workers=settings.workers,
        name=name,
        log_level=arguments.log_level,
        limited_users=len(settings.limited_users) if isinstance(settings, InboundSettings) else 0,
        replay_file=settings.replay_file if isinstance(settings, InboundSettings) else None,
    )


def _with_web_server(
    settings: InboundSettings | OutboundSettings, listening: Sequence[socket.socket]
) -> InboundSettings | OutboundSettings:
    """The fallback's name looked up, once for all workers and for those that come after them. Raises StartError."""
    if not isinstance(settings, InboundSettings) or settings.fallback is None:
        return settings
    from reflex.net.web_server import find_web_server  # noqa: PLC0415 - keeps --help and `reflex` fast

    address = find_web_server(settings.fallback.host, settings.fallback.port, listening)
    return dataclasses.replace(settings, fallback=HostPort(address.host, address.port))


def _listen_addresses(settings: InboundSettings | OutboundSettings) -> list[HostPort]:
    if isinstance(settings, InboundSettings):
        return list(settings.listen)
    return [item.address for item in settings.listen]


def _init(arguments: argparse.Namespace) -> int:
    server: HostPort = arguments.server
    folder: Path = arguments.dir
    files = settings_files(server, arguments.user)
    try:
        existing = [path for path in (folder / name for name in files) if os.path.lexists(path)]
        if existing and not arguments.force:
            names = " and ".join(str(path) for path in existing)
            return _fail(f"reflex init: already there: {names}; nothing written, --force overwrites")
        create_folder(folder)
        write_files(folder, files)
    except OSError as error:
        return _fail(f"reflex init: {error.filename or folder}: {error.strerror}")
    inbound, outbound = (folder / name for name in files)
    print(f"""\
Wrote {inbound} and {outbound}. Both hold secrets.

On the server ({server}), copy {inbound} there and start:
    reflex-inbound -c {inbound}
On the client, copy {outbound} there and start:
    reflex-outbound -c {outbound}
Then, on the client:
    curl -x socks5h://{SOCKS_ADDRESS} https://example.org/""")
    return EXIT_OK


def _keygen_server(_arguments: argparse.Namespace) -> int:
    private_key, public_key = server_keys()
    print(f'private_key = "{private_key}"')
    print(f'public_key = "{public_key}"')
    return EXIT_OK


def _keygen_user(arguments: argparse.Namespace) -> int:
    user_id, user_key = user_keys()
    print(f"name = {toml_text(arguments.name)}")
    print(f'id = "{user_id}"')
    print(f'key = "{user_key}"')
    return EXIT_OK


def _check(arguments: argparse.Namespace) -> int:
    try:
        settings = load_settings(arguments.config)
    except ConfigError as error:
        _print_problems(error)
        return EXIT_BAD_FILE
    _print_warnings(settings.warnings)
    print(f"{arguments.config}: good: {_summary(settings)}")
    return EXIT_OK


def _summary(settings: InboundSettings | OutboundSettings) -> str:
    """What a daemon would do with the settings, on one line."""
    workers = f" with {settings.workers} workers" if settings.workers > 1 else ""
    if isinstance(settings, InboundSettings):
        listen = ", ".join(str(address) for address in settings.listen)
        users = f"{len(settings.users)} user" + ("s" if len(settings.users) > 1 else "")
        fallback = f"what is not Reflex goes to {settings.fallback}" if settings.fallback else "no fallback"
        return f"reflex-inbound would listen on {listen} for {users}{workers}; {fallback}"
    listens = ", ".join(
        f"{item.address} ({item.protocol}{f' to {item.target}' if item.target else ''})" for item in settings.listen
    )
    servers = ", ".join(str(server.address) for server in settings.servers)
    return f"reflex-outbound would listen on {listens}{workers}; tunnels to {servers}"


def _server_argument(text: str) -> HostPort:
    try:
        return HostPort.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{describe(text)}; expected HOST:PORT, such as vpn.example.org:8443"
        ) from None


def _name_argument(text: str) -> str:
    try:
        return parse_user_name(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{describe(text)}; expected {EXPECTED_USER_NAME}") from None


def _print_problems(error: ConfigError) -> None:
    for problem in error.problems:
        print(problem, file=sys.stderr)


def _print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _fail(text: str) -> int:
    print(text, file=sys.stderr)
    return EXIT_USAGE
