"""Take in a snapshot that `export` wrote, here or on another host.

An archive is not trusted: it may hold nothing but a snapshot's own files, no qcow2 of it may
name another file, and a specification that reaches for something of the host is refused. Its
memory is loaded by a QEMU that is confined as all are.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.engine.context import Context
from hutch.engine.files import ChunkReader
from hutch.engine.records import MACHINE_SNAPSHOTS, SnapshotRecord
from hutch.engine.saved import new_saved, saved_directory, sync_assets
from hutch.engine.snapshot_names import check_name, sync_all, taken
from hutch.errors import AlreadyExists, IntegrityError, InvalidArgument, NotFound, Unsupported
from hutch.spec.model import InstanceSpec, TmpfsMount
from hutch.storage.diskchain import chain, overlay_number
from hutch.storage.extract import UnpackLimits
from hutch.storage.faults import disk_errors

__all__ = ["import_snapshot"]

_RECORD = "snapshot.json"
_MEMORY = {"state", "saved.json"}
_FILE = re.compile(r"(snapshot|saved)\.json|state|disk\.raw|disk\.[1-9][0-9]{0,5}\.qcow2")
_ADDRESSES = "addresses.json"
_RECORD_MAX = 4 << 20
_LIMITS = UnpackLimits(max_bytes=1 << 44, max_entries=64, max_depth=1, max_path=64)


def import_snapshot(context: Context, pieces: Iterable[bytes], name: str | None) -> SnapshotRecord:
    """Store an archive's snapshot, under the name it had or as `INSTANCE/TAG`.

    Its image and guest kernel must be here. It can be restored as another instance only: the
    one that it was taken of is another host's. Nothing is left of a failure.
    """
    wanted = check_name(name) if name is not None else None
    with new_saved(context, keep=True) as saved:
        directory = saved_directory(context, saved)
        with disk_errors("snapshot import"):
            _unpack(pieces, str(directory))
            found = _read_record(directory)
            _check_files(directory, found)
            _check_spec(found.spec)
            os.unlink(directory / _RECORD)
            sync_all(str(directory))
            size = sum(entry.stat().st_blocks * 512 for entry in directory.iterdir())
        instance, tag = wanted or check_name(f"{found.source_name}/{found.tag}")
        record = msgspec.structs.replace(
            found, id=saved, source="", source_name=instance, tag=tag, size=size
        )
        with context.leases.hold(*record.chain_ids, purpose="snapshot import"):
            _check_assets(context, record)
            sync_assets(context)
            with context.store.write(durable=True) as tx:
                try:
                    tx.insert(MACHINE_SNAPSHOTS, f"{instance}/{tag}", record)
                except AlreadyExists:
                    raise taken(f"{instance}/{tag}") from None
                context.kernels.note(tx, saved, record.spec.machine.kernel)
                tx.event("container", "import", saved, name=instance, tag=tag)
    return record


def _unpack(pieces: Iterable[bytes], directory: str) -> None:
    from hutch.storage.unpack import UnpackOptions, unpack

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Whoever made it, here it is ours.
        options = UnpackOptions(whiteouts=False, ignore_chown_errors=True)
        unpack(ChunkReader(pieces), fd, limits=_LIMITS, options=options, label="snapshot")
    finally:
        os.close(fd)
    for entry in os.scandir(directory):
        if entry.name == _ADDRESSES:
            os.unlink(entry.path)  # those of another host's networks
            continue
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or not _FILE.fullmatch(entry.name):
            raise IntegrityError(f"snapshot: {entry.name[:80]!r} does not belong in one")
        os.chmod(entry.path, 0o600)
        if os.geteuid() == 0:
            os.chown(entry.path, 0, 0)


def _read_record(directory: Path) -> SnapshotRecord:
    try:
        with open(directory / _RECORD, "rb") as file:
            return decode_json(file.read(_RECORD_MAX), SnapshotRecord)
    except FileNotFoundError:
        raise IntegrityError(
            f"snapshot: {_RECORD} is missing", hint="`hutch snapshot export` writes such archives"
        ) from None
    except msgspec.DecodeError as exc:
        raise IntegrityError(f"snapshot: {_RECORD}: {exc}") from exc


def _check_files(directory: Path, record: SnapshotRecord) -> None:
    """Raise unless the disk is there, and with a running machine its memory."""
    from hutch.storage.diskimages import disk_info

    names = set(os.listdir(directory))
    if not chain(directory):
        raise IntegrityError("snapshot: disk.raw is missing")
    if record.memory != (names >= _MEMORY) or (not record.memory and names & _MEMORY):
        raise IntegrityError("snapshot: its memory is not what snapshot.json says")
    for path in chain(directory):
        if overlay_number(path) and disk_info(path, format="qcow2").references:
            raise IntegrityError(f"snapshot: {os.path.basename(path)} names another file")


def _check_spec(spec: InstanceSpec) -> None:
    """Refuse what reaches for something of this host that whoever exported it cannot give."""
    reaches = {
        "mounts": any(not isinstance(mount, TmpfsMount) for mount in spec.mounts),
        "volumes_from": spec.volumes_from,
        "links": spec.links,
        "devices": spec.devices or spec.device_names or spec.device_rules or spec.gpus,
        "network": spec.network_mode.startswith(("host", "container:")),
        "isolation": spec.isolation != "vm",
        "from_disk": spec.machine.from_disk is not None,
    }
    for field, found in reaches.items():
        if found:
            raise Unsupported(
                f"snapshot: {field}: an imported machine cannot have them",
                hint="take the snapshot of a machine without directories and devices of its host",
            )


def _check_assets(context: Context, record: SnapshotRecord) -> None:
    """Raise unless image, layers and kernel are here."""
    try:
        image = context.images.get(record.image_id)
    except NotFound:
        image = None
    missing = [layer for layer in record.chain_ids if not context.layers.has(layer)]
    if image is None or missing or image.chain_ids != record.chain_ids:
        raise NotFound(
            f"image {record.image_name} ({record.image_id[:19]}): the snapshot stands on it, and "
            "it is not here",
            hint="pull or load that very image first: `hutch save` where it was, `hutch load` here",
        )
    try:
        context.kernels.get(record.spec.machine.kernel)
    except NotFound as exc:
        raise NotFound(
            f"kernel {record.spec.machine.kernel[:19]}: the snapshot stands on it, and it is not "
            "here",
            hint="`hutch vm kernel add` the same version",
        ) from exc
    if not record.spec.machine.kernel:
        raise InvalidArgument("no kernel is named", field="snapshot.spec.machine.kernel")
