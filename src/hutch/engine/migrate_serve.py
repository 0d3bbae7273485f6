"""Take migrations in by TLS: a process of its own for every source that proves who it is."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from collections.abc import Callable

from hutch.engine.context import Context
from hutch.errors import HutchError, InvalidArgument, Unavailable
from hutch.migration.links import TLS_PORT, certificates_of
from hutch.migration.tls import accept_tls, load_certificates, relay
from hutch.process.run import spawn

__all__ = ["serve_tls"]

_HANDSHAKE_S = 20.0
_END_S = 60.0
_MOST = 128
_BACKLOG = 64


def serve_tls(
    context: Context,
    listen: str,
    certificates: str = "",
    *,
    tell: Callable[[str], None],
) -> None:
    """Listen at `HOST:PORT` until interrupted. `tell` hears where, and of whom it refused.

    More than a bounded number of sources at once wait. Those under way when it ends have
    lost their links, and settle it.
    """
    directory = certificates or certificates_of(context.root)
    load_certificates(directory, server=True)
    places = threading.BoundedSemaphore(_MOST)
    with _listener(listen) as listener:
        host, port = listener.getsockname()[:2]
        tell(f"listening at {f'[{host}]' if ':' in host else host}:{port}")
        while True:
            connection, address = listener.accept()
            places.acquire()

            def serve(connection: socket.socket = connection, who: str = address[0]) -> None:
                try:
                    # Read anew for each: certificates are renewed while it listens.
                    _serve_one(context, connection, load_certificates(directory, server=True))
                except (HutchError, OSError) as exc:
                    tell(f"{who}: {exc}")
                finally:
                    connection.close()
                    places.release()

            threading.Thread(target=serve, name="hutch-migration", daemon=True).start()


def _listener(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    if not host and not listen.startswith(":"):
        host, port = listen, str(TLS_PORT)
    host = host.strip("[]")
    try:
        number = int(port)
        family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
        return socket.create_server(
            (host, number), family=family, backlog=_BACKLOG, dualstack_ipv6=not host
        )
    except (ValueError, OverflowError):
        raise InvalidArgument(f"expected HOST:PORT, got {listen!r}", field="listen") from None
    except OSError as exc:
        raise Unavailable(f"{listen}: {(exc.strerror or str(exc)).lower()}") from exc


def _serve_one(context: Context, connection: socket.socket, tls: ssl.SSLContext) -> None:
    """Let a process of its own answer a source: what befalls one is not the others'."""
    python = sys.executable or "/usr/bin/python3"
    command = [python, "-m", "hutch", "--root", str(context.root), "_migrate_target"]
    with accept_tls(connection, tls, timeout_s=_HANDSHAKE_S) as carried:
        ours, theirs = socket.socketpair()
        with (
            theirs,
            spawn(
                command,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=2,
                stop_timeout_s=_END_S,
            ),
            # Closed first: its end is how the process hears of the link's.
            ours,
        ):
            theirs.close()
            relay(carried, ours)
