"""The files of virtual machines: asked of the guest, of a stopped one in a machine made for that.

A machine's writable layer is a disk whose file system only guests mount. Where an image's
layer is made of it, or it is compared, the agent sends it as a layer's tar, which is unpacked
here as carefully as one from a registry.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec

from hutch.drivers.base import GuestFiles, Guests, Launch
from hutch.engine.context import Context
from hutch.engine.disk_keys import disk_key
from hutch.engine.finish import refresh_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load
from hutch.engine.records import InstanceRecord
from hutch.errors import WrongState
from hutch.lifecycle import State
from hutch.storage.diskchain import virtual_size
from hutch.storage.disks import disk_size
from hutch.storage.faults import disk_errors
from hutch.storage.snapshots import DISK_FILE, OverlayAssets

__all__ = ["open_guest", "writable_layer"]

_TAR_HEADS = 256 << 20


@contextmanager
def open_guest(context: Context, record: InstanceRecord) -> Iterator[GuestFiles]:
    """Hold the files of a machine, running or not, as its record says."""
    driver = context.driver(record.spec.isolation)
    assert isinstance(driver, Guests)
    with ExitStack() as stack:
        if record.state != State.RUNNING:
            stack.enter_context(instance_lock(context, record.id))
            record = refresh_locked(context, load(context, record.id))
        if record.state == State.PAUSED:
            raise WrongState(
                f"instance {record.name} is paused: its agent cannot answer",
                hint="unpause it first",
            )
        if record.state == State.SUSPENDED:
            # Its memory knows the disk as it was left: nobody else may mount it.
            raise WrongState(
                f"instance {record.name} is suspended: its disk goes with the saved memory",
                hint="start it first",
            )
        if record.state == State.RUNNING:
            stack.close()
            yield driver.tree(record.id)
        else:
            yield stack.enter_context(driver.stored(_stored(context, record)))


def _stored(context: Context, record: InstanceRecord) -> Launch:
    directory = context.directory(record.id)
    with context.leases.hold(*record.chain_ids, purpose="root disk"):
        root_disk = context.rootdisks.ensure(record.chain_ids)
    return Launch(
        id=record.id,
        name=record.name,
        spec=record.spec,
        directory=str(directory),
        root_disk=root_disk,
        disk=str(directory / DISK_FILE),
        disk_key=disk_key(context, record),
    )


@contextmanager
def writable_layer(context: Context, record: InstanceRecord) -> Iterator[OverlayAssets]:
    """Hold the layers of a machine with what was changed as a directory of this host.

    It is a copy: nothing in it is ever seen by the machine.
    """
    from hutch.engine.files import ChunkReader
    from hutch.storage.unpack import UnpackLimits, unpack

    assets = context.snapshots.load(record.id, record.chain_ids)
    what = f"writable layer of {record.name}"
    # A guest's word has no end; what is on its disk has.
    directory = context.directory(record.id)
    if record.spec.machine.disk_key is not None:
        size = disk_size(str(directory / DISK_FILE), encrypted=True)
    else:
        size = virtual_size(directory)
    limits = UnpackLimits(max_bytes=size + _TAR_HEADS)
    with disk_errors(what):
        os.makedirs(context.root / "tmp", 0o700, exist_ok=True)
        copy = tempfile.mkdtemp(prefix="layer-", dir=context.root / "tmp")
        try:
            fd = os.open(copy, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with open_guest(context, record) as tree:
                    unpack(ChunkReader(tree.pack_upper()), fd, limits=limits, label=what)
            finally:
                os.close(fd)
            yield msgspec.structs.replace(assets, upper=copy)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
