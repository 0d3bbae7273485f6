"""Find or make the sources of an instance's mounts: host paths, named and anonymous volumes."""

from __future__ import annotations

import os
from contextlib import ExitStack

import msgspec

from hutch.engine.context import Context
from hutch.engine.lookup import find_id, load
from hutch.engine.records import InstanceRecord, ResolvedMount
from hutch.errors import Busy, InvalidArgument, NotFound
from hutch.ids import new_id
from hutch.image.records import ImageRecord
from hutch.lifecycle import State
from hutch.records import Transaction
from hutch.spec.model import BindMount, InstanceSpec, Mount, VolumeMount

__all__ = ["claim_disk", "close_volumes", "name_disks", "open_volumes", "release_mounts"]
__all__ += ["note_volumes", "resolve_mounts"]

_HOLDING = (State.STARTING, State.RUNNING, State.PAUSED, State.SUSPENDED)


def resolve_mounts(
    context: Context, identifier: str, spec: InstanceSpec, image: ImageRecord, undo: ExitStack
) -> tuple[ResolvedMount, ...]:
    """Return the mounts with their sources; volumes are made and marked as used.

    What the specification names replaces what `volumes_from` gives at the same target.
    """
    found: dict[str, ResolvedMount] = {}
    for source in spec.volumes_from:
        for mount in _inherited(context, source, is_vm=spec.isolation == "vm"):
            found[mount.target] = mount
    for index, wanted in enumerate(spec.mounts):
        if isinstance(wanted, BindMount):
            found[wanted.target] = _bind(wanted, index)
        elif isinstance(wanted, VolumeMount):
            found[wanted.target] = _volume(context, wanted, spec, image, undo)
    for mount in found.values():
        if mount.type == "volume":
            context.volumes.acquire(mount.name, identifier)
            undo.callback(context.volumes.release, mount.name, identifier)
    return tuple(found.values())


def note_volumes(tx: Transaction, record: InstanceRecord, action: str) -> None:
    """Put into the journal that an instance's volumes are mounted, or are not any more."""
    for mount in record.mounts:
        if mount.type == "volume":
            attributes = {"container": record.id, "destination": mount.target}
            attributes["read/write"] = "false" if mount.read_only else "true"
            attributes["propagation"] = ""
            tx.event("volume", action, mount.name, **attributes)


def name_disks(context: Context, spec: InstanceSpec) -> InstanceSpec:
    """Return a machine's specification with those of its volumes marked that are disks."""

    def named(mount: Mount) -> Mount:
        if not isinstance(mount, VolumeMount):
            return mount
        asked = mount.driver_options.get("type") == "disk"
        disk = asked or bool(mount.name and context.volumes.is_disk(mount.name))
        return msgspec.structs.replace(mount, disk=disk)

    return msgspec.structs.replace(spec, mounts=tuple(map(named, spec.mounts)))


def claim_disk(context: Context, name: str, user: InstanceRecord, *, alone: bool) -> None:
    """Raise `Busy` where a volume that is a disk is used so that `user` cannot have it: by a
    machine, or, where `user` is one (`alone`), by anybody. What is suspended has it too.

    A start is in the store as one before it asks: of two at once no more than one gets it.
    """
    from hutch.engine.finish import refresh

    for identifier in context.volumes.users(name):
        if identifier == user.id:
            continue
        try:
            other = refresh(context, load(context, identifier))
        except NotFound:
            continue
        held = any(mount.name == name and mount.disk for mount in other.mounts)
        if other.state in _HOLDING and (alone or held):
            raise Busy(
                f"volume {name}: is a disk, and instance {other.name} has it ({other.state})",
                hint=f"stop it first: hutch stop {other.name}",
            )


def _inherited(context: Context, source: str, *, is_vm: bool) -> list[ResolvedMount]:
    name, _, mode = source.partition(":")
    record: InstanceRecord = load(context, find_id(context, name))
    found = [
        msgspec.structs.replace(mount, disk=is_vm and context.volumes.is_disk(mount.name))
        for mount in record.mounts
    ]
    if mode != "ro":
        return found
    return [msgspec.structs.replace(mount, read_only=True) for mount in found]


def _bind(mount: BindMount, index: int) -> ResolvedMount:
    if not os.path.exists(mount.source):
        if not mount.create_source:
            raise InvalidArgument(
                f"{mount.source}: no such file or directory",
                field=f"mounts[{index}].source",
                hint="make it first; -v makes missing directories, --mount does not",
            )
        try:
            os.makedirs(mount.source, exist_ok=True)
        except OSError as exc:
            raise InvalidArgument(
                f"{mount.source}: {exc.strerror}", field=f"mounts[{index}].source"
            ) from exc
    return ResolvedMount(
        type="bind",
        source=mount.source,
        target=mount.target,
        read_only=mount.read_only,
        propagation=mount.propagation,
        recursive=mount.recursive,
    )


def _volume(
    context: Context, mount: VolumeMount, spec: InstanceSpec, image: ImageRecord, undo: ExitStack
) -> ResolvedMount:
    volumes = context.volumes
    name = mount.name or new_id()
    try:
        volume = volumes.get(name)
    except NotFound:
        volume = volumes.create(
            name,
            labels=mount.labels,
            driver=mount.driver,
            options=mount.driver_options,
            anonymous=not mount.name,
        )
        undo.callback(volumes.remove, name, force=True)
    is_disk = spec.isolation == "vm" and volumes.is_disk(name)
    if is_disk and mount.subpath:
        raise InvalidArgument(
            f"volume {name} is a disk: a part of it cannot be mounted", field="volume-subpath"
        )
    # Without root it cannot be mounted here, and stays empty.
    if mount.copy_up and not mount.subpath and not (is_disk and context.rootless):
        lowers = [str(context.layers.path(chain)) for chain in reversed(image.chain_ids)]
        volumes.populate(name, lowers, mount.target)
    return ResolvedMount(
        type="volume",
        source=str(volume.path),
        target=mount.target,
        name=name,
        read_only=mount.read_only,
        subpath=mount.subpath,
        anonymous=not mount.name,
        disk=is_disk,
    )


def open_volumes(context: Context, record: InstanceRecord, undo: ExitStack) -> None:
    """Claim the instance's volumes and mount what they need; images are closed again by `undo`.

    One that is a machine's disk is its guest's to mount.
    """
    for mount in record.mounts:
        if mount.type != "volume":
            continue
        volumes = context.volumes
        if volumes.is_disk(mount.name):
            claim_disk(context, mount.name, record, alone=mount.disk)
        if not mount.disk:
            undo.callback(volumes.close, mount.name, record.id)
            volumes.open(mount.name, record.id)


def close_volumes(context: Context, record: InstanceRecord) -> None:
    """Say that a run which has ended needs its volumes' images no more."""
    for mount in record.mounts:
        if mount.type == "volume":
            context.volumes.close(mount.name, record.id)


def release_mounts(context: Context, record: InstanceRecord, *, remove_anonymous: bool) -> None:
    """Say that the instance no longer uses its volumes; remove anonymous ones if told."""
    for mount in record.mounts:
        if mount.type != "volume":
            continue
        context.volumes.release(mount.name, record.id)
        if remove_anonymous and mount.anonymous and not context.volumes.users(mount.name):
            context.volumes.remove(mount.name, missing_ok=True)
