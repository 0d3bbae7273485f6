"""Connection pools whose sockets are known, so that a transfer can be broken off at once.

A thread that waits in recv(2) sees no event and no signal; shutting its socket down from
another thread wakes it, whether it waits for an answer or for the rest of a body.
"""

from __future__ import annotations

import socket
import threading
import weakref
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

__all__ = ["Sockets", "open_pool"]


class Sockets:
    """The sockets that are open; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def add(self, sock: socket.socket | None) -> None:
        """Remember a socket for as long as somebody uses it."""
        if sock is not None:
            with self._lock:
                self._open.add(sock)

    def shutdown(self) -> None:
        """Break every connection."""
        with self._lock:
            sockets = list(self._open)
        for sock in sockets:
            try:
                # Not the method of SSLSocket, which takes the TLS object from its reader.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass


def open_pool(sockets: Sockets, *, proxy: str | None = None, **options: Any) -> urllib3.PoolManager:
    """Return a pool manager that tells `sockets` of each connection it makes."""

    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            sockets.add(self.sock)

    class Secure(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            sockets.add(self.sock)

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    pool = (
        urllib3.PoolManager(**options) if proxy is None else urllib3.ProxyManager(proxy, **options)
    )
    pool.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
    return pool
