"""Saved states of containers: their files beside their memory, and whose memory it is."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from hutch.drivers.container.checkpoint import load_checkpoint
from hutch.drivers.container.saving import UPPER
from hutch.engine.context import Context
from hutch.engine.records import InstanceRecord
from hutch.errors import NotFound, Unsupported
from hutch.linux.files import RENAME_EXCHANGE, renameat2
from hutch.storage.copying import copy_tree

__all__ = [
    "check_copyable",
    "copy_files",
    "exchange_files",
    "holds_memory_of",
    "place_files",
    "put_back",
]


def check_copyable(record: InstanceRecord, what: str) -> None:
    """Raise `Unsupported` for a container of which there cannot be another one."""
    for mount in record.mounts:
        if mount.anonymous:
            raise Unsupported(
                f"{what} of {record.name}: volume {mount.target} has no name, and the other one "
                "would have an empty one in its place",
                hint="give the volume a name (-v NAME:PATH), or take a --tmpfs",
            )


def copy_files(context: Context, record: InstanceRecord, target: str) -> None:
    """Copy the files of a container at rest into a saved state."""
    copy_tree(context.snapshots.upper(record.id), f"{target}/{UPPER}")


def place_files(context: Context, identifier: str, source: str) -> None:
    """Give a new container the files of a saved state."""
    copy_tree(f"{source}/{UPPER}", context.snapshots.upper(identifier))


def put_back(context: Context, identifier: str, source: str) -> str:
    """Copy the files of a saved state beside those of a container; return where they are, for
    `exchange_files`."""
    if not os.path.isdir(f"{source}/{UPPER}"):
        raise NotFound(f"snapshot {source}: its files are gone")
    partial = f"{context.snapshots.upper(identifier)}.restored"
    _discard(context, partial)
    copy_tree(f"{source}/{UPPER}", partial)
    return partial


def exchange_files(context: Context, identifier: str, partial: str) -> None:
    """Let the files that were put beside a container's take their place at once."""
    upper = context.snapshots.upper(identifier)
    directory = os.open(os.path.dirname(upper), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        renameat2(
            directory,
            os.path.basename(partial),
            directory,
            os.path.basename(upper),
            RENAME_EXCHANGE,
        )
    finally:
        os.close(directory)
    _discard(context, partial)


def _discard(context: Context, path: str) -> None:
    try:
        context.trash.discard(path)
    except OSError as exc:
        if exc.errno != errno.EXDEV:  # in a file system of its own (storage option size)
            raise
        shutil.rmtree(path)


def holds_memory_of(directory: Path, record: InstanceRecord) -> bool:
    """Tell whether a saved state is of a container's last run, and not of one before."""
    try:
        checkpoint = load_checkpoint(str(directory))
    except Unsupported:
        return False
    return (checkpoint.pid, checkpoint.start_time) == (record.pid, record.start_time)
