"""What a failing file system call means to the caller: `OSError` turned into ours once."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.errors import Denied, Exhausted, HutchError, InternalError, NotFound, Unavailable

__all__ = ["disk_errors", "explain"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: OSError, what: str) -> HutchError:
    """Return the error of ours for `error`, met while doing `what` (`layer sha256:…`)."""
    reason = f"{what}: {(error.strerror or str(error)).lower()}"
    if error.errno in _FULL:
        return Exhausted(reason, hint="free space with 'hutch system prune', or use another root")
    if error.errno == errno.EROFS:
        return Denied(reason, hint="the root is on a read-only file system; choose another root")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Denied(reason, hint="run as root, or as the user that owns the root")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Exhausted(reason, hint="raise the limit of open files (ulimit -n)")
    if error.errno == errno.ENOENT:
        return NotFound(reason)
    if error.errno == errno.EIO:
        return Unavailable(reason, hint="the disk reports input/output errors")
    return InternalError(reason)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an `OSError` of the block into one of ours that names `what`."""
    try:
        yield
    except OSError as error:
        raise explain(error, what) from error
