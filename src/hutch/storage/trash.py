"""Trees on their way out: renamed away at once, deleted in the background."""

from __future__ import annotations

import errno
import os
import threading

from hutch.storage.removal import remove_path, remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    # Given a directory and names in it.
    RemoveTrees = Callable[[str, tuple[str, ...]], None]

__all__ = ["Trash"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Trash:
    """The directory `<root>/trash`; what is in it belongs to nobody any more.

    Deleting is slow (on some disks every freed block is a command), so a thread does it.
    What a dying process leaves is deleted by the next `empty`.
    """

    def __init__(self, root: str | Path, *, remove_foreign: RemoveTrees | None = None) -> None:
        """Take `remove_foreign` for trees in which something is not ours to remove."""
        self._path = os.path.join(os.fspath(root), "trash")
        self._remove_foreign = remove_foreign
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._more = False

    def discard(self, path: str) -> bool:
        """Move `path` away and delete it later; return whether it was there. Where the disk is
        so full that nothing can be moved (btrfs), it is deleted at once, in its place."""
        target = f"{self._path}/{os.path.basename(path)}.{os.urandom(6).hex()}"
        try:
            self._move(path, target)
        except OSError as exc:
            if not os.path.lexists(path):
                return False
            if exc.errno not in _FULL:
                raise
            remove_path(path)
        self._start()
        return True

    def _move(self, path: str, target: str) -> None:
        try:
            os.rename(path, target)
        except FileNotFoundError:
            if not os.path.lexists(path):
                raise
            os.makedirs(self._path, 0o700, exist_ok=True)
            os.rename(path, target)

    def _start(self) -> None:
        with self._lock:
            self._more = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hutch-trash", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._more:
                    self._thread = None
                    return
                self._more = False
            self.empty()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until the background deletion is through; return whether it is."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
            return not thread.is_alive()
        return True

    def empty(self) -> int:
        """Delete what is in the trash now; return how many trees went.

        What cannot be deleted (a mount still in it) stays for the next time.
        """
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            names = os.listdir(fd)
            foreign = [name for name in names if not self._remove(name, fd)]
            if foreign and self._remove_foreign is not None:
                self._try_foreign(self._remove_foreign, tuple(foreign))
            return len(names) - len(set(names) & set(os.listdir(fd)))
        finally:
            os.close(fd)

    @staticmethod
    def _remove(name: str, dir_fd: int) -> bool:
        """Remove a tree; return False for one in which something belongs to others."""
        try:
            remove_tree(name, dir_fd=dir_fd)
        except PermissionError:
            return False
        except OSError:
            pass
        return True

    def _try_foreign(self, remove: RemoveTrees, names: tuple[str, ...]) -> None:
        from hutch.errors import HutchError

        try:
            remove(self._path, names)
        except (OSError, HutchError):
            pass
