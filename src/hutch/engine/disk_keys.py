"""Keys of instances' encrypted disks: from a file that is remembered, or held by this process.

A record has at most the path of a key's file. Any other key is in the memory of the process
that was given it, and gone with that: the next start elsewhere needs it again.
"""

from __future__ import annotations

import os
from typing import Any

from hutch.engine.context import Context
from hutch.engine.records import InstanceRecord
from hutch.errors import WrongState
from hutch.spec.model import DiskKeySource
from hutch.storage.diskkeys import DiskKey, read_key

__all__ = ["attached_keys", "disk_key", "take_key", "unlock"]

OPTION = "disk_key"


def take_key(options: dict[str, Any]) -> DiskKey | None:
    """Return the key that is among the options of a new machine, and leave there what the
    specification may say of it. Text and paths name a file, bytes are the key."""
    given = options.get(OPTION)
    if given is None or isinstance(given, DiskKeySource):
        return read_key(given.file) if given is not None and given.file else None
    if isinstance(given, DiskKey | bytes | bytearray):
        options[OPTION] = DiskKeySource()
        return given if isinstance(given, DiskKey) else DiskKey(bytes(given))
    path = os.path.abspath(os.fspath(given))
    options[OPTION] = DiskKeySource(file=path)
    return read_key(path)


def unlock(context: Context, identifier: str, key: DiskKey | bytes | str | None) -> None:
    """Hold a key for an instance's starts by this process; text is the path of its file."""
    if isinstance(key, str):
        key = read_key(os.path.abspath(key))
    elif isinstance(key, bytes):
        key = DiskKey(key)
    if key is not None:
        context.disk_keys[identifier] = key


def disk_key(context: Context, record: InstanceRecord) -> DiskKey | None:
    """Return the key of an instance's own disk, None where that is not encrypted; raise
    `WrongState` where it is not at hand."""
    source = record.spec.machine.disk_key
    if source is None:
        return None
    held: DiskKey | None = context.disk_keys.get(record.id)
    if held is not None:
        return held
    if source.file:
        return read_key(source.file)
    raise WrongState(
        f"instance {record.name}: its disk is encrypted, and its key is not at hand",
        hint=f"hutch start --disk-key prompt {record.name}",
    )


def attached_keys(record: InstanceRecord) -> tuple[DiskKey | None, ...]:
    """Return the keys of the disks that are attached, None for those that need none."""
    wish = record.spec.machine.from_disk
    return tuple(
        read_key(disk.key_file, field=f"disks[{index}]") if disk.key_file else None
        for index, disk in enumerate(wish.disks if wish is not None else ())
    )
