"""Examine what a root holds against what it is known to be: blobs, root disks, kernels, disks.

Everything is read, which takes as long as the disk does; nothing is changed without `repair`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from hutch.engine.context import Context
from hutch.engine.lookup import all_records
from hutch.engine.results import CheckReport, Damage
from hutch.errors import Busy, HutchError
from hutch.lifecycle import State
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.sealing import Seal, is_as_sealed
from hutch.storage.snapshots import QCOW2_FILE

__all__ = ["check"]

_AT_REST = (State.CREATED, State.EXITED, State.SUSPENDED)


class _Item(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be read: its name and file, its SHA-256 in hexadecimal, or its seal."""

    kind: str
    name: str
    path: Path
    sha256: str = ""
    seal: Seal | None = None


def check(context: Context, *, repair: bool = False, progress: Progress = silent) -> CheckReport:
    """Read all that has a digest, and have the disks of machines at rest examined.

    With `repair` a damaged root disk is thrown away: the next machine of that image makes it
    anew from the layers. Machines that run on it keep what they have.
    """
    checked, damaged, repaired = 0, [], []
    for item in _items(context):
        progress(ProgressEvent(item=item.name, phase="checking"))
        reason = _differs(item)
        if reason is None:
            continue
        checked += 1
        if not reason:
            continue
        damaged.append(Damage(kind=item.kind, name=item.name, reason=reason))
        if repair and item.kind == "root disk" and context.rootdisks.remove(item.name):
            repaired.append(item.name)
    disks, broken = _machine_disks(context, progress)
    return CheckReport(
        checked=checked + disks,
        damaged=(*damaged, *broken),
        repaired=tuple(repaired),
    )


def _items(context: Context) -> Iterator[_Item]:
    for blob in context.content.list():
        path = Path(context.content.path(blob.digest))
        digest = blob.digest.removeprefix("sha256:")
        yield _Item(kind="blob", name=blob.digest, path=path, sha256=digest)
    for disk in context.rootdisks.list():
        path = Path(context.rootdisks.path((disk.chain_id,)))
        yield _Item(kind="root disk", name=disk.chain_id, path=path, seal=disk.seal)
    for kernel in context.kernels.list():
        path = context.kernels.vmlinux(kernel)
        yield _Item(kind="kernel", name=kernel.id, path=path, sha256=kernel.vmlinux_sha256)


def _differs(item: _Item) -> str | None:
    """Return what is wrong with a file, "" for nothing, None where it has gone meanwhile."""
    try:
        if item.seal is not None:
            return "" if is_as_sealed(str(item.path), item.seal) else "its content has changed"
        with open(item.path, "rb", buffering=0) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as exc:
        return (exc.strerror or str(exc)).lower()
    return "" if found == item.sha256 else f"its digest is sha256:{found}"


def _machine_disks(context: Context, progress: Progress) -> tuple[int, list[Damage]]:
    """Have QEMU's own disks of machines at rest examined by qemu-img."""
    from hutch.storage.diskimages import check_disk

    count, damaged = 0, []
    for record in all_records(context):
        machine = record.spec.machine
        if machine.from_disk is None or machine.disk_key or record.state not in _AT_REST:
            continue
        progress(ProgressEvent(item=record.name, phase="checking"))
        try:
            reason = check_disk(str(context.directory(record.id) / QCOW2_FILE), format="qcow2")
        except Busy:
            continue
        except HutchError as exc:
            reason = exc.message
        count += 1
        if reason:
            damaged.append(Damage(kind="disk", name=record.name, reason=reason))
    return count, damaged
