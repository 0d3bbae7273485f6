"""What only the root of a user namespace may do to an ordinary user's instance, in a process
of its own: a process with threads cannot enter one, and Python does not fork.

`python -c "from hutch.storage.inside import main; main(kind, argument)"` with a socket as
stdin makes the namespace, says `r`, waits for `g` (the ids are mapped by then), does the
work and says `0`, or the errno of what failed. `merged` mounts a stopped instance's overlay
and passes its descriptor; `remove` removes trees, whoever of the namespace owns what in them.
"""

from __future__ import annotations

import errno
import os
import socket

import msgspec

from hutch.linux.namespaces import CLONE_NEWNS, CLONE_NEWUSER, unshare
from hutch.storage.snapshots import OverlayAssets

__all__ = ["Merged", "Removal", "main"]


class Merged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Mount an overlay and pass its descriptor."""

    assets: OverlayAssets
    read_only: bool


class Removal(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Remove what is in a directory under these names."""

    directory: str
    names: tuple[str, ...]


def main(request: bytes) -> None:
    """Serve one request (JSON of a `Merged` or a `Removal`) over the socket at stdin."""
    work = msgspec.json.decode(request, type=Merged | Removal)
    with socket.socket(fileno=os.dup(0)) as link:
        try:
            unshare(CLONE_NEWUSER)
            link.send(b"r")
            if link.recv(1) != b"g":
                return
            fds = _do(work)
        except OSError as exc:
            link.send(str(exc.errno or errno.EIO).encode())
            return
        socket.send_fds(link, [b"0"], fds)


def _do(work: Merged | Removal) -> list[int]:
    if isinstance(work, Merged):
        from hutch.storage.merged import open_merged

        unshare(CLONE_NEWNS)
        return [open_merged(work.assets, read_only=work.read_only)]
    from hutch.storage.removal import remove_tree

    fd = os.open(work.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in work.names:
        remove_tree(name, dir_fd=fd)
    return []
