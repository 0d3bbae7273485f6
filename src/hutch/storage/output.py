"""Write archives to the path a user names: what appears there is whole or not there at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from hutch.errors import Exhausted, HutchError, InvalidArgument
from hutch.storage.removal import remove_tree

__all__ = ["new_directory", "open_output"]

_HERE = -100  # AT_FDCWD; the paths given with it are absolute
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def open_output(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a stream whose content is at `path` once the block ends without an error.

    Until then a file of that name stays as it was; symbolic links lead on to what they
    name. A device or a pipe cannot be replaced and is written to as it is. An `OSError` of
    the block is taken for one of writing.
    """
    name = os.fspath(path)
    try:
        if _is_special(name):
            with open(name, "wb") as stream:
                yield stream
            return
        # The file that a link names is replaced, never the link.
        target = os.path.realpath(name)
        partial = f"{target}.part{os.getpid()}-{os.urandom(4).hex()}"
        try:
            with open(partial, "xb") as stream:
                yield stream
            os.replace(partial, target)
        except BaseException:
            _unlink(partial)
            raise
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _explain(error, name) from error


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a directory that is at `path` once the block ends without an error.

    Nothing may be there yet but an empty directory.
    """
    name = os.fspath(path)
    try:
        if os.path.lexists(name) and (not os.path.isdir(name) or os.listdir(name)):
            raise InvalidArgument(f"{name}: not an empty directory", field="output")
        target = os.path.realpath(name)
        partial = f"{target}.part{os.getpid()}-{os.urandom(4).hex()}"
        os.mkdir(partial)
        try:
            yield partial
            # rename(2) takes the place of an empty directory, and of nothing else.
            os.rename(partial, target)
        except BaseException:
            remove_tree(partial, dir_fd=_HERE)
            raise
    except OSError as error:
        raise _explain(error, name) from error


def _is_special(path: str) -> bool:
    """Tell whether something else than a regular file stands at `path`."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _explain(error: OSError, path: str) -> HutchError:
    reason = (error.strerror or str(error)).lower()
    if error.errno in _FULL:
        return Exhausted(f"{path}: {reason}", hint="free space there, or write it elsewhere")
    return InvalidArgument(f"{path}: {reason}", field="output")
