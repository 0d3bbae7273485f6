"""Where a confined QEMU meets its streams when it opens several: an abstract socket in its own
network namespace, where nobody else is."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.errors import Unavailable, Unsupported
from hutch.linux.namespaces import CLONE_NEWNET, thread_in_namespace
from hutch.process.records import read_pid

__all__ = ["connect_at", "listen_at_name", "new_name", "require_own_network"]

_BACKLOG = 32


def new_name() -> str:
    """Return a name that nobody else has."""
    return f"hutch-{uuid.uuid4().hex}"


def require_own_network(directory: str) -> None:
    """Raise `Unsupported` where the QEMU of an instance's directory is in our own network
    namespace: others could meet it there."""
    with _network(directory) as fd, _open("/proc/self/ns/net") as ours:
        if os.path.samestat(os.fstat(fd), os.fstat(ours)):
            raise Unsupported(
                "parallel streams: its QEMU has no network namespace of its own here",
                hint="leave --parallel and --compress out, or run hutch as root",
            )


def listen_at_name(directory: str, name: str) -> socket.socket:
    """Listen in the network namespace of an instance's QEMU."""
    with _network(directory) as fd, thread_in_namespace(fd, CLONE_NEWNET):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(f"\0{name}")
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener


def connect_at(directory: str, name: str) -> socket.socket:
    """Connect in the network namespace of an instance's QEMU."""
    with _network(directory) as fd, thread_in_namespace(fd, CLONE_NEWNET):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(f"\0{name}")
        except OSError as exc:
            connection.close()
            raise Unavailable("the machine does not wait for a stream") from exc
        return connection


@contextmanager
def _network(directory: str) -> Iterator[int]:
    known = read_pid(f"{directory}/run")
    if known is None:
        raise Unavailable("the machine does not run")
    with _open(f"/proc/{known.pid}/ns/net") as fd:
        yield fd


@contextmanager
def _open(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
