"""Machines that start from a disk of their own, on their way to another hutch.

They have neither image nor guest kernel: what moves is the disk that they stand on and the one
that they write to, firmware's variables, cloud-init's data and the TPM's state. Disks and CDs
that were attached are files of the hosts, and must be at the target under the same paths.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from hutch.drivers.vm.disk_state import TPM_FILE
from hutch.drivers.vm.fromdisk import SEED_FILE, USER_DATA_FILE, VARIABLES_FILE
from hutch.engine.records import InstanceRecord
from hutch.errors import IntegrityError
from hutch.spec.model import FromDisk
from hutch.storage.diskimages import disk_info, rebase_disk, stamp_of
from hutch.storage.snapshots import QCOW2_FILE

__all__ = ["BASE_FILE", "OWN_FILES", "disks_of", "from_disk", "local_spec", "obstacles_here"]
__all__ += ["obstacles_there"]

BASE_FILE = "base.disk"
"""What a machine that has come stands on, in its own directory."""
OWN_FILES = (VARIABLES_FILE, USER_DATA_FILE, SEED_FILE, TPM_FILE)
"""The small files of such a machine, beneath its directory, where it has them."""


def from_disk(record: InstanceRecord) -> FromDisk | None:
    """Return what a machine starts from, None for one of an image or a container."""
    return record.spec.machine.from_disk


def disks_of(record: InstanceRecord, directory: str) -> dict[str, str]:
    """Return where the disks are that move, by their names at the target."""
    wish = from_disk(record)
    if wish is None:
        return {}
    base = {BASE_FILE: wish.path} if wish.path else {}
    return {**base, QCOW2_FILE: f"{directory}/{QCOW2_FILE}"}


def obstacles_here(record: InstanceRecord) -> Iterator[str]:
    """Yield why its disks cannot be sent."""
    wish = from_disk(record)
    if wish is None:
        return
    if wish.path and stamp_of(wish.path) != wish.stamp:
        yield f"disk {wish.path} is gone, or was changed since {record.name} was made of it"


def obstacles_there(record: InstanceRecord) -> Iterator[str]:
    """Yield what of its attached files the target lacks."""
    wish = from_disk(record)
    if wish is None:
        return
    for path in (*(disk.path for disk in wish.disks), *wish.cdroms):
        if not os.path.exists(path):
            yield f"{path}, which is attached to it, is not at the target"


def local_spec(record: InstanceRecord, directory: str) -> FromDisk | None:
    """Return what a machine that has come starts from, in its directory, having checked that
    its disks name no other file; None for any other instance.

    It keeps the identity that it had: its UUID and addresses are made of that.
    """
    wish = from_disk(record)
    if wish is None:
        return None
    own, base = f"{directory}/{QCOW2_FILE}", f"{directory}/{BASE_FILE}"
    if wish.path:
        if set(disk_info(base, format=wish.format).references):
            raise IntegrityError("the disk that it stands on needs further files")
        rebase_disk(own, base, format=wish.format)
    if set(disk_info(own, format="qcow2").references) - {base}:
        raise IntegrityError("its disk needs further files")
    return msgspec.structs.replace(
        wish,
        path=base if wish.path else "",
        stamp=stamp_of(base) if wish.path else "",
        identity=wish.identity or record.id,
    )
