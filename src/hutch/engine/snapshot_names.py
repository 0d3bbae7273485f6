"""What snapshots are called, and seeing one onto the disk."""

from __future__ import annotations

import os
import re

from hutch.errors import AlreadyExists, InvalidArgument
from hutch.spec.build import check_name as check_instance_name

__all__ = ["check_name", "check_tag", "sync_all", "taken"]

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def check_tag(tag: str) -> str:
    """Return a snapshot's tag, or raise `InvalidArgument`."""
    if not _TAG.fullmatch(tag):
        raise InvalidArgument(
            f"expected letters, digits, '_', '.' and '-', got {tag!r}", field="tag"
        )
    return tag


def check_name(name: str) -> tuple[str, str]:
    """Return instance and tag of `INSTANCE/TAG`, or raise `InvalidArgument`."""
    instance, slash, tag = name.partition("/")
    if not slash:
        raise InvalidArgument(f"expected INSTANCE/TAG, got {name!r}", field="name")
    return check_instance_name(instance), check_tag(tag)


def taken(key: str) -> AlreadyExists:
    """Return the error for a name that another snapshot has."""
    return AlreadyExists(
        f"snapshot {key}: is there already",
        hint=f"choose another tag, or `hutch snapshot rm {key}`",
    )


def sync_all(directory: str) -> None:
    """See a snapshot onto the disk: it is to survive a power cut once it has a record."""
    for path, _, names in os.walk(directory):
        for name in (*names, "."):
            _sync(f"{path}/{name}")


def _sync(path: str) -> None:
    """See one file or directory onto the disk; links and device nodes hold nothing."""
    if not (os.path.isfile(path) or os.path.isdir(path)) or os.path.islink(path):
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
