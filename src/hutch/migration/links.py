"""Where a migration goes: `ssh://`, `tls://`, `unix://` and `exec:`, and the links there."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from hutch.errors import InvalidArgument, Unavailable
from hutch.migration.wire import Wire
from hutch.process.run import spawn

__all__ = [
    "TLS_PORT",
    "Destination",
    "certificates_of",
    "meet",
    "open_link",
    "open_wire",
    "parse_destination",
]

_CURE = "ssh://[USER@]HOST[:PORT][/ROOT], tls://HOST[:PORT], unix://PATH or exec:COMMAND"
TLS_PORT = 7443
# What is no hutch may wait for us to speak first. A hutch says so when Python has started.
_GREETING_S = 120.0
# ssh itself notices a link that is silent for so long.
_SSH = ("ssh", "-oBatchMode=yes", "-oServerAliveInterval=15", "-oServerAliveCountMax=3", "-T")


class Destination(msgspec.Struct, frozen=True, kw_only=True):
    """A destination: the command to run, the path of the socket to connect to, or the host
    and port, with the directory of this side's certificates."""

    text: str
    argv: tuple[str, ...] = ()
    path: str = ""
    host: str = ""
    port: int = 0
    certificates: str = ""


def certificates_of(root: Path) -> str:
    """Return where a root keeps the certificates of its links."""
    return str(root / "tls")


def parse_destination(text: str, root: Path = Path()) -> Destination:
    """Return what a destination means to a root; raise `InvalidArgument` with the forms there
    are. `tls://HOST?certificates=DIRECTORY` names another directory than the root's."""
    if text.startswith("exec:"):
        return Destination(text=text, argv=_command(text.removeprefix("exec:")))
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as exc:
        raise InvalidArgument(f"{exc}, got {text!r}", field="destination", hint=_CURE) from None
    if parts.scheme == "unix" and not parts.netloc and parts.path:
        return Destination(text=text, path=unquote(parts.path))
    if parts.scheme == "tls" and parts.hostname and parts.path in ("", "/"):
        return _tls(text, parts.hostname, port, parts.query, root)
    if parts.scheme == "ssh" and parts.hostname and not parts.password:
        return Destination(text=text, argv=_ssh(parts.username, parts.hostname, port, parts.path))
    raise InvalidArgument(f"expected another hutch, got {text!r}", field="destination", hint=_CURE)


def _tls(text: str, host: str, port: int | None, query: str, root: Path) -> Destination:
    options = dict(parse_qsl(query))
    certificates = options.pop("certificates", "") or certificates_of(root)
    if options:
        raise InvalidArgument(
            f"unknown option {sorted(options)[0]!r} in {text!r}", field="destination", hint=_CURE
        )
    return Destination(text=text, host=host, port=port or TLS_PORT, certificates=certificates)


def _command(text: str) -> tuple[str, ...]:
    try:
        argv = tuple(shlex.split(text))
    except ValueError as exc:
        raise InvalidArgument(f"{exc}: {text!r}", field="destination", hint=_CURE) from None
    if not argv:
        raise InvalidArgument("exec: has no command", field="destination", hint=_CURE)
    return argv


def _ssh(user: str | None, host: str, port: int | None, path: str) -> tuple[str, ...]:
    """Return the command. The other side's shell sees the last words: they are quoted."""
    target = f"{unquote(user)}@{host}" if user else host
    root = ["--root", unquote(path)] if path not in ("", "/") else []
    remote = shlex.join(["hutch", *root, "_migrate_target"])
    options = [f"-p{port}"] if port else []
    return (*_SSH, *options, "--", target, remote)


@contextmanager
def open_link(destination: Destination, *, timeout_s: float) -> Iterator[socket.socket]:
    """Open a connection to another hutch; it is closed at the end, and its command ended."""
    with ExitStack() as stack:
        if destination.host:
            # Others come without `ssl` and the time that it takes to load.
            from hutch.migration.tls import connect_tls, load_certificates

            own = load_certificates(destination.certificates, server=False)
            there = connect_tls(destination.host, destination.port, own, timeout_s=timeout_s)
            yield stack.enter_context(there)
            return
        if destination.path:
            yield stack.enter_context(_connect(destination.path, timeout_s))
            return
        ours, theirs = socket.socketpair()
        with theirs:
            # stderr is the caller's: there ssh says what is wrong.
            stack.enter_context(
                spawn(destination.argv, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=2)
            )
        # Closed first: then the command sees its end, and need not be told.
        yield stack.enter_context(ours)


@contextmanager
def open_wire(destination: Destination, *, timeout_s: float, bandwidth: int = 0) -> Iterator[Wire]:
    """Open a link and greet; it is closed at the end, and its command ended."""
    with open_link(destination, timeout_s=timeout_s) as link:
        yield meet(destination, link, timeout_s=timeout_s, bandwidth=bandwidth)


def meet(
    destination: Destination, link: socket.socket, *, timeout_s: float, bandwidth: int = 0
) -> Wire:
    """Greet over a connection that was just opened."""
    wire = Wire(
        link.fileno(),
        link.fileno(),
        peer=_name(destination),
        timeout_s=min(timeout_s, _GREETING_S),
        bandwidth=bandwidth,
    )
    # In this order: what is no hutch has said so before it is spoken to.
    wire.meet()
    wire.greet()
    wire.timeout_s = timeout_s
    return wire


def _connect(path: str, timeout_s: float) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        link.settimeout(timeout_s)
        link.connect(path)
    except OSError as exc:
        link.close()
        raise Unavailable(
            f"unix://{path}: {(exc.strerror or str(exc)).lower()}",
            hint="let `hutch _migrate_target` be served there, one process per connection",
        ) from exc
    return link


def _name(destination: Destination) -> str:
    """Return what messages call the other side."""
    return destination.text if len(destination.text) < 80 else f"{destination.text[:77]}..."
