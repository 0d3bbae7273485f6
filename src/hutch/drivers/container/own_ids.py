"""Reach an ordinary user's instances as the root of a user namespace with their map of ids."""

from __future__ import annotations

import os
import socket
import sys

import msgspec

from hutch.drivers.container.rootless import write_maps
from hutch.errors import Unsupported
from hutch.storage.inside import Merged, Removal
from hutch.storage.snapshots import OverlayAssets

__all__ = ["open_merged", "remove_trees"]

_CODE = "import sys; sys.path[:0] = {path!r}; from hutch.storage.inside import main; main({what!r})"
_TIMEOUT_S = 600.0


def open_merged(assets: OverlayAssets, *, read_only: bool = True) -> int:
    """Mount a stopped instance's overlay and return its descriptor, the caller's.

    Through it the caller has the rights of the user, as with a running instance: what the
    container gave to another id may be closed.
    """
    (fd,) = _ask(Merged(assets=assets, read_only=read_only))
    return fd


def remove_trees(directory: str, names: tuple[str, ...]) -> None:
    """Remove trees in which files belong to the user's subordinate ids."""
    _ask(Removal(directory=directory, names=names))


def _ask(work: Merged | Removal) -> list[int]:
    from hutch.process.run import spawn

    if not sys.executable:
        raise Unsupported("user namespace: no interpreter to enter one with")
    code = _CODE.format(path=sys.path, what=msgspec.json.encode(work))
    ours, theirs = socket.socketpair()
    with ours, spawn([sys.executable, "-S", "-c", code], stdin=theirs.fileno()) as process:
        theirs.close()
        ours.settimeout(_TIMEOUT_S)
        said = ours.recv(16)
        if said != b"r":
            raise _failure(said)
        write_maps(process.pid)
        ours.send(b"g")
        said, fds, _, _ = socket.recv_fds(ours, 16, 1, socket.MSG_CMSG_CLOEXEC)
        if said != b"0":
            raise _failure(said)
        return fds


def _failure(said: bytes) -> Exception:
    if not said.isdigit():
        return Unsupported(
            "user namespace: the process in it ended",
            hint="see user.max_user_namespaces, and `hutch doctor`",
        )
    number = int(said)
    return OSError(number, os.strerror(number))
