"""What a virtual machine needs before it is made: a guest kernel, and its image as a disk."""

from __future__ import annotations

from pathlib import Path

import msgspec

from hutch.engine.context import Context
from hutch.errors import NotFound
from hutch.image.records import ImageRecord
from hutch.records import Progress, ProgressEvent
from hutch.spec.disk_room import disk_room
from hutch.spec.model import InstanceSpec
from hutch.storage.diskchain import place_disk
from hutch.storage.diskkeys import DiskKey
from hutch.storage.snapshots import DISK_FILE

__all__ = ["make_disk", "prepare_machine"]


def prepare_machine(
    context: Context, spec: InstanceSpec, image: ImageRecord, progress: Progress
) -> InstanceSpec:
    """Return the specification with its kernel by identifier; see that its disk is made.

    Without a kernel in this root, Debian's is fetched. The caller holds a lease on the
    image's layers, and notes the use of the kernel with the instance.
    """
    wanted = spec.machine.kernel or None
    try:
        kernel = context.kernels.get(wanted)
    except NotFound:
        if wanted is not None:
            raise
        kernel = context.kernels.add_package(progress=progress)
    if not context.rootdisks.has(image.chain_ids):
        progress(ProgressEvent(item=spec.image, phase="making its disk"))
        context.rootdisks.ensure(image.chain_ids, progress=progress)
    machine = msgspec.structs.replace(spec.machine, kernel=kernel.id)
    return msgspec.structs.replace(spec, machine=machine)


def make_disk(
    context: Context,
    spec: InstanceSpec,
    directory: Path,
    source: str = "",
    key: DiskKey | None = None,
) -> None:
    """Make a machine's writable disk: an empty one, encrypted with `key`, or that of a
    directory which nobody writes to any more, sharing what can be shared."""
    if not source and key is not None:
        context.disks.create_encrypted(str(directory / DISK_FILE), disk_room(spec), key)
        return
    if not source:
        context.disks.create(str(directory / DISK_FILE), disk_room(spec))
        return
    place_disk(source, directory, context.disks)
