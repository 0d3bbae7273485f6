"""Volumes that are disks: grown and cloned, at rest or while the machine that has one runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.engine.finish import refresh_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load
from hutch.engine.records import InstanceRecord
from hutch.errors import AlreadyExists, Busy, InvalidArgument, NotFound
from hutch.lifecycle import State
from hutch.storage.disks import check_size
from hutch.storage.faults import disk_errors
from hutch.storage.sparse import copy_sparse
from hutch.units import parse_bytes

if TYPE_CHECKING:
    from hutch.storage.volumes import Volume

__all__ = ["clone_volume", "resize_volume"]

_LIVE = (State.STARTING, State.RUNNING, State.PAUSED, State.SUSPENDED)


def resize_volume(context: Context, name: str, size: str | int) -> None:
    """Let a volume that is a disk, and its file system, grow to `size` bytes.

    Raises `InvalidArgument` for a size below the present one, `Busy` where it is in use by
    others than one running machine.
    """
    wanted = check_size(parse_bytes(size, field="size"), field="size")
    _require_disk(context, name)
    path = context.volumes.disk_file(name)
    with _held(context, name) as machine, disk_errors(f"volume {name}"):
        present = os.stat(path).st_size
        if wanted < present:
            raise InvalidArgument(
                f"a volume cannot shrink: {name} has {present} bytes, got {wanted}", field="size"
            )
        if machine is None:
            context.disks.grow(context.volumes.as_disk(name), wanted)
        elif wanted > present:
            from hutch.drivers.vm.volumes import grow_volume

            grow_volume(str(context.directory(machine.id)), _number(machine, name), wanted)
        context.volumes.note_size(name, wanted)


def clone_volume(context: Context, name: str, new: str) -> Volume:
    """Make a volume with what another has now, a disk as well; nothing is left of a failure.

    A machine that has it writes it out, and stands still while it is copied: for
    milliseconds where the host's file system shares blocks.
    """
    source = _require_disk(context, name)
    if any(volume.name == new for volume in context.volumes.list()):
        raise AlreadyExists(f"volume {new}: is there already", hint="choose another name")
    with _held(context, name) as machine, disk_errors(f"volume {new}"):
        made = context.volumes.create(new, labels=source.labels, options=source.options)
        with ExitStack() as undo:
            undo.callback(context.volumes.remove, new, missing_ok=True)
            target = context.volumes.disk_file(new)
            os.unlink(target)
            if machine is None:
                copy_sparse(context.volumes.as_disk(name), target)
            else:
                from hutch.drivers.vm.volumes import copy_volume

                number, directory = _number(machine, name), context.directory(machine.id)
                copy_volume(str(directory), number, context.volumes.disk_file(name), target)
            with open(target, "rb", buffering=0) as file:
                os.fsync(file.fileno())
            undo.pop_all()
    return made


def _require_disk(context: Context, name: str) -> Volume:
    volume = context.volumes.get(name)
    if not context.volumes.is_disk(name):
        raise InvalidArgument(
            f"volume {name} is no disk", field="volume", hint="make one with --opt type=disk"
        )
    return volume


def _number(machine: InstanceRecord, name: str) -> int:
    """Return which of the machine's volumes it is, as `hutch.drivers.vm.volumes` counts."""
    return [mount.name for mount in machine.mounts if mount.disk].index(name)


@contextmanager
def _held(context: Context, name: str) -> Iterator[InstanceRecord | None]:
    """Hold a volume's users where they are; yield the machine that runs with it, or None
    where it is at rest."""
    with ExitStack() as held:
        running = None
        for identifier in sorted(context.volumes.users(name)):
            try:
                held.enter_context(instance_lock(context, identifier))
                record = refresh_locked(context, load(context, identifier))
            except NotFound:
                continue
            if record.state not in _LIVE:
                continue
            mine = any(mount.name == name and mount.disk for mount in record.mounts)
            if record.state != State.RUNNING or not mine:
                raise Busy(
                    f"volume {name}: instance {record.name} has it ({record.state})",
                    hint=f"stop it first: hutch stop {record.name}",
                )
            running = record
        yield running
