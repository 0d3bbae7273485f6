"""Volumes that are disks: grown and cloned, at rest or while the machine that has one runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.engine.finish import refresh_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load
from hutch.engine.records import InstanceRecord
from hutch.errors import Busy, InvalidArgument, NotFound
from hutch.lifecycle import State
from hutch.storage.disks import check_size
from hutch.storage.faults import disk_errors
from hutch.storage.sparse import copy_sparse
from hutch.units import parse_bytes

if TYPE_CHECKING:
    from hutch.storage.volumes import Volume

__all__ = ["disk_copier", "machine_of", "resize_volume", "shared"]

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
        with context.volumes.admitted(name, context.volumes.record(name), size=wanted):
            if machine is None:
                context.disks.grow(context.volumes.as_disk(name), wanted)
            elif wanted > present:
                from hutch.drivers.vm.volumes import grow_volume

                grow_volume(str(context.directory(machine.id)), _number(machine, name), wanted)
            context.volumes.note_size(name, wanted)


@contextmanager
def disk_copier(context: Context, name: str) -> Iterator[Callable[[str], object] | None]:
    """Yield what copies the file of a volume that is a disk as it is now, None for others.

    A machine that has it writes it out, and stands still while it is copied: for
    milliseconds where the host's file system shares blocks.
    """
    if not context.volumes.is_disk(name):
        yield None
        return
    with _held(context, name) as machine:
        if machine is None:
            path = context.volumes.as_disk(name)
            yield lambda target: copy_sparse(path, target)
            return
        from hutch.drivers.vm.volumes import copy_volume

        number, directory = _number(machine, name), str(context.directory(machine.id))
        path = context.volumes.disk_file(name)
        yield lambda target: copy_volume(directory, number, path, target)


@contextmanager
def shared(context: Context, name: str) -> Iterator[None]:
    """Hold a volume so that the host may mount it: raise `Busy` where it is a machine's disk
    now."""
    if not context.volumes.is_disk(name):
        yield
        return
    with _held(context, name) as machine:
        if machine is not None:
            raise Busy(
                f"volume {name}: is a disk, and instance {machine.name} has it",
                hint=f"stop it first: hutch stop {machine.name}",
            )
        yield


def machine_of(context: Context, name: str) -> bool:
    """Tell whether a machine that runs has a volume as its disk."""
    if not context.volumes.is_disk(name):
        return False
    with _held(context, name) as machine:
        return machine is not None


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
