"""The sockets that a daemon listens on: unix with a group, TCP with TLS, or handed down."""

from __future__ import annotations

import grp
import os
import socket
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from hutch.errors import Busy, Denied, InvalidArgument, NotFound, Unavailable

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["Listener", "Tls", "metrics_listener", "open_listeners"]

_FIRST_FD = 3  # SD_LISTEN_FDS_START, see sd_listen_fds(3)
_GROUPS = ("docker", "hutch")
_BACKLOG = 512


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Where certificates are. `verify` asks clients for one that the CA has signed."""

    ca: str = ""
    certificate: str = ""
    key: str = ""
    verify: bool = False


class Listener(msgspec.Struct, kw_only=True):
    """A socket that listens, and how to leave it."""

    address: str
    socket: socket.socket
    tls: SSLContext | None = None
    metrics_only: bool = False
    close: Callable[[], None]


def open_listeners(host: str, *, group: str, tls: Tls | None, insecure: bool) -> list[Listener]:
    """Listen at `unix://PATH`, `tcp://HOST:PORT` or `fd://`; raise where that is not safe."""
    scheme, separator, rest = host.partition("://")
    if not separator:
        raise InvalidArgument(
            f"expected unix://PATH, tcp://HOST:PORT or fd://, got {host!r}", field="hosts"
        )
    if scheme == "unix":
        return [_unix(rest or "/var/run/docker.sock", group)]
    if scheme == "tcp":
        return [_tcp(rest, tls, insecure)]
    if scheme == "fd":
        return _handed_down(tls, insecure)
    raise InvalidArgument(f"unknown scheme {scheme[:20]!r}", field="hosts")


# ---- unix ---------------------------------------------------------------------------------


def _unix(path: str, group: str) -> Listener:
    """Listen on a path, with mode 0660 from the first moment on."""
    path = os.path.abspath(path)
    gid = _group_id(group)
    _refuse_live(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    beside = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        before = os.umask(0o177)
        try:
            sock.bind(beside)
        finally:
            os.umask(before)
        if gid is not None:
            os.chown(beside, -1, gid)
        os.chmod(beside, 0o660)
        sock.listen(_BACKLOG)
        # Nobody finds it before it answers, and the one of a daemon that was killed is replaced.
        os.rename(beside, path)
    except OSError as exc:
        sock.close()
        _unlink(beside)
        raise _told(path, exc) from exc
    made = os.stat(path)

    def close() -> None:
        sock.close()
        try:
            if os.path.samestat(os.stat(path), made):
                os.unlink(path)
        except FileNotFoundError:
            pass

    return Listener(address=f"unix://{path}", socket=sock, close=close)


def _told(path: str, exc: OSError) -> Exception:
    if isinstance(exc, PermissionError):
        return Denied(f"{path}: {exc.strerror}", hint="name a path of yours: --docker unix://PATH")
    return Unavailable(f"{path}: {(exc.strerror or str(exc)).lower()}")


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _refuse_live(path: str) -> None:
    """Raise where somebody answers on a path, or something else than a socket is there."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InvalidArgument(f"{path} is there and no socket", field="hosts")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise Busy(f"{path}: somebody listens there already", hint="name another path")


def _group_id(group: str) -> int | None:
    """Return the group that may use the socket: the one named, or `docker`, or `hutch`."""
    if group:
        try:
            return grp.getgrnam(group).gr_gid
        except KeyError:
            if group.isdigit():
                return int(group)
            raise NotFound(f"group {group!r} does not exist", hint=f"groupadd {group}") from None
    for name in _GROUPS:
        try:
            found = grp.getgrnam(name).gr_gid
        except KeyError:
            continue
        if os.geteuid() == 0 or found in os.getgroups():
            return found
    return None


# ---- tcp ----------------------------------------------------------------------------------


def metrics_listener(address: str) -> Listener:
    """Listen at `HOST:PORT` for who reads metrics, and can do nothing else."""
    listener = _tcp(address, None, insecure=True)
    listener.metrics_only = True
    return listener


def _tcp(rest: str, tls: Tls | None, insecure: bool) -> Listener:
    host, colon, port_text = rest.rpartition(":")
    if not colon:
        host, port_text = rest, ""
    host = host.strip("[]")
    if port_text and not port_text.isdigit():
        raise InvalidArgument(f"expected tcp://HOST:PORT, got {rest!r}", field="hosts")
    context = _context(rest, tls, insecure)
    port = int(port_text) if port_text else (2376 if context else 2375)
    if port > 65_535:
        raise InvalidArgument(f"port out of range: {port}", field="hosts")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise Unavailable(f"tcp://{rest}: {(exc.strerror or str(exc)).lower()}") from exc
    name = f"[{host}]" if ":" in host else host
    address = f"tcp://{name or '0.0.0.0'}:{sock.getsockname()[1]}"
    return Listener(address=address, socket=sock, tls=context, close=sock.close)


def _context(where: str, tls: Tls | None, insecure: bool) -> SSLContext | None:
    """Return the TLS context; without client certificates TCP has to be forced."""
    if (tls is None or not tls.verify) and not insecure:
        raise InvalidArgument(
            f"tcp://{where}: whoever reaches it would be this host's administrator",
            field="hosts",
            hint="give --tlsverify with certificates, or force it with --insecure-tcp",
        )
    if tls is None:
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        if tls.verify:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(tls.ca)
    except (OSError, ssl.SSLError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        raise InvalidArgument(
            f"tcp://{where}: certificates cannot be loaded: {reason}",
            hint="--tlscacert, --tlscert and --tlskey name PEM files",
        ) from exc
    return context


# ---- handed down --------------------------------------------------------------------------


def _handed_down(tls: Tls | None, insecure: bool) -> list[Listener]:
    """Return the sockets that a service manager listens on for us; see sd_listen_fds(3)."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdigit():
        raise NotFound(
            "fd://: no sockets were handed down", hint="start it by a socket unit of systemd"
        )
    found = []
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        context = None
        if sock.family != socket.AF_UNIX:
            context = _context(f"fd {fd}", tls, insecure)
        found.append(Listener(address=f"fd://{fd}", socket=sock, tls=context, close=sock.close))
    return found
