"""Links by TLS, each side proving by a certificate who it is.

A directory holds what one side has: `ca.pem`, the authorities whose certificates it believes;
`cert.pem` and `key.pem`, its own. Whoever has a certificate of an authority of the target's
can do there what an administrator of its root can: the authority is to be one for this alone.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.errors import Denied, InvalidArgument, NotFound, Unavailable

__all__ = ["accept_tls", "connect_tls", "load_certificates", "relay"]

_PIECE = 256 << 10
_GREETING = 8  # what the target says first


def load_certificates(directory: str, *, server: bool) -> ssl.SSLContext:
    """Return what a side of a link has; raise where a file of it is missing or not usable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    for name in ("ca.pem", "cert.pem", "key.pem"):
        if not os.path.exists(f"{directory}/{name}"):
            raise NotFound(
                f"{directory}/{name}: no such file",
                hint="TLS takes ca.pem, cert.pem and key.pem: see docs/how-to/migrate.md",
            )
    if os.stat(f"{directory}/key.pem").st_mode & 0o077:
        raise Denied(
            f"{directory}/key.pem: others may read it", hint=f"chmod 600 {directory}/key.pem"
        )
    try:
        context.load_verify_locations(f"{directory}/ca.pem")
    except (ssl.SSLError, OSError) as exc:
        raise _unusable(f"{directory}/ca.pem", exc) from exc
    try:
        context.load_cert_chain(f"{directory}/cert.pem", f"{directory}/key.pem")
    except ssl.SSLError as exc:
        what = "cert.pem and key.pem"
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise InvalidArgument(f"{directory}: {what} do not belong together") from exc
        raise _unusable(f"{directory}: {what}", exc) from exc
    except OSError as exc:
        raise _unusable(directory, exc) from exc
    return context


def _unusable(what: str, exc: OSError) -> InvalidArgument:
    reason = exc.reason if isinstance(exc, ssl.SSLError) and exc.reason else exc.strerror
    return InvalidArgument(f"{what}: not usable: {str(reason).lower().replace('_', ' ')}")


@contextmanager
def connect_tls(
    host: str, port: int, context: ssl.SSLContext, *, timeout_s: float
) -> Iterator[socket.socket]:
    """Connect to a target; yield a local socket that is the link. Closed at the end."""
    name = f"tls://{host}:{port}"
    try:
        plain = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as exc:
        raise Unavailable(f"{name}: {(exc.strerror or str(exc)).lower()}") from exc
    with plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            tls = context.wrap_socket(plain, server_hostname=host)
            # A target that does not believe us says so after the handshake, in TLS 1.3.
            greeting = _exactly(tls, _GREETING)
        except ssl.SSLCertVerificationError as exc:
            raise Denied(
                f"{name}: its certificate is not believed: {exc.verify_message.lower()}",
                hint="ca.pem here must have signed it, and it must name the host",
            ) from exc
        except ssl.SSLError as exc:
            raise _refused(name, exc) from exc
        except OSError as exc:
            raise Unavailable(f"{name}: {(exc.strerror or str(exc)).lower()}") from exc
        with tls, _local(tls, greeting) as link:
            yield link


def _exactly(tls: ssl.SSLSocket, count: int) -> bytes:
    found = b""
    while len(found) < count and (piece := tls.recv(count - len(found))):
        found += piece
    return found


def _refused(name: str, exc: ssl.SSLError) -> Unavailable | Denied:
    reason = (exc.reason or str(exc)).lower().replace("_", " ")
    if "alert" in reason:
        return Denied(
            f"{name}: refused this side's certificate ({reason})",
            hint="the target's ca.pem must have signed cert.pem here, and it must not be expired",
        )
    return Unavailable(f"{name}: no TLS: {reason}")


@contextmanager
def _local(tls: ssl.SSLSocket, first: bytes) -> Iterator[socket.socket]:
    """Yield a socket whose other end is carried over TLS by a thread."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(first)
        thread = threading.Thread(target=relay, args=(tls, theirs), name="hutch-tls", daemon=True)
        thread.start()
        try:
            yield ours
        finally:
            try:
                ours.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other side was quicker
            thread.join()


def accept_tls(plain: socket.socket, context: ssl.SSLContext, *, timeout_s: float) -> ssl.SSLSocket:
    """Do a source's handshake; raise `Denied` with why it is not believed."""
    plain.settimeout(timeout_s)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        return context.wrap_socket(plain, server_side=True)
    except ssl.SSLError as exc:
        reason = getattr(exc, "verify_message", "") or (exc.reason or str(exc))
        raise Denied(f"refused: {reason.lower().replace('_', ' ')}") from exc
    except OSError as exc:
        raise Unavailable((exc.strerror or str(exc)).lower()) from exc


# ---- carrying -------------------------------------------------------------------------------


class _Side:
    """A socket with what is still to be sent to it; either kind, not blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.due = b""
        self.wants = 0
        sock.setblocking(False)

    def read(self) -> bytes | None:
        """Return what there is, empty at the end, None when it must be waited for."""
        try:
            return self.sock.recv(_PIECE)
        except (ssl.SSLWantReadError, BlockingIOError):
            self.wants |= select.POLLIN
        except ssl.SSLWantWriteError:
            self.wants |= select.POLLOUT
        except OSError:
            return b""
        return None

    def write(self) -> bool:
        """Send what is due, as far as it goes; False when nobody takes it any more."""
        while self.due:
            try:
                self.due = self.due[self.sock.send(self.due) :]
            except (ssl.SSLWantWriteError, BlockingIOError):
                self.wants |= select.POLLOUT
                return True
            except ssl.SSLWantReadError:
                self.wants |= select.POLLIN
                return True
            except OSError:
                return False
        return True


def relay(tls: ssl.SSLSocket, local: socket.socket) -> None:
    """Carry bytes between both, in one thread and bounded memory, until one of them ends; what
    has come by then still goes out."""
    sides = (_Side(tls), _Side(local))
    ended = False
    while not ended or any(side.due for side in sides):
        for side in sides:
            side.wants = 0
        moved = False
        for side, other in (sides, sides[::-1]):
            if not other.due and not ended and (data := side.read()) is not None:
                moved = True
                ended = not data
                other.due = data
            was_due = bool(other.due)
            if not other.write():
                return
            # With room again, what is to be read must be looked for before the next wait.
            moved = moved or (was_due and not other.due)
        if not moved:
            _wait(sides)
    for side in sides:
        try:
            side.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was quicker


def _wait(sides: tuple[_Side, _Side]) -> None:
    poll = select.poll()
    for side in sides:
        if side.wants:
            poll.register(side.sock.fileno(), side.wants)
    poll.poll()
