"""Where a migration goes: `ssh://`, `unix://` and `exec:` destinations, and their links."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import unquote, urlsplit

import msgspec

from hutch.errors import InvalidArgument, Unavailable
from hutch.migration.wire import Wire
from hutch.process.run import spawn

__all__ = ["Destination", "open_wire", "parse_destination"]

_CURE = "ssh://[USER@]HOST[:PORT][/ROOT], unix://PATH or exec:COMMAND"
# ssh itself notices a link that is silent for so long.
_SSH = ("ssh", "-oBatchMode=yes", "-oServerAliveInterval=15", "-oServerAliveCountMax=3", "-T")


class Destination(msgspec.Struct, frozen=True, kw_only=True):
    """A destination: the command to run, or the path of the socket to connect to."""

    text: str
    argv: tuple[str, ...] = ()
    path: str = ""


def parse_destination(text: str) -> Destination:
    """Return what a destination means; raise `InvalidArgument` with the forms there are."""
    if text.startswith("exec:"):
        return Destination(text=text, argv=_command(text.removeprefix("exec:")))
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as exc:
        raise InvalidArgument(f"{exc}, got {text!r}", field="destination", hint=_CURE) from None
    if parts.scheme == "unix" and not parts.netloc and parts.path:
        return Destination(text=text, path=unquote(parts.path))
    if parts.scheme == "ssh" and parts.hostname and not parts.password:
        return Destination(text=text, argv=_ssh(parts.username, parts.hostname, port, parts.path))
    raise InvalidArgument(f"expected another hutch, got {text!r}", field="destination", hint=_CURE)


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
def open_wire(destination: Destination, *, timeout_s: float, bandwidth: int = 0) -> Iterator[Wire]:
    """Open a link and greet; it is closed at the end, and its command ended."""
    with ExitStack() as stack:
        if destination.path:
            reading = writing = stack.enter_context(_connect(destination.path, timeout_s)).fileno()
        else:
            # stderr is the caller's: there ssh says what is wrong.
            process = stack.enter_context(spawn(destination.argv, stdin=-1, stdout=-1, stderr=2))
            assert process.stdin is not None
            assert process.stdout is not None
            reading, writing = process.stdout.fileno(), process.stdin.fileno()
        wire = Wire(
            reading, writing, peer=_name(destination), timeout_s=timeout_s, bandwidth=bandwidth
        )
        # In this order: what is no hutch has said so before it is spoken to.
        wire.meet()
        wire.greet()
        yield wire


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
