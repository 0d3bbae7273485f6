"""Find or make the sources of an instance's mounts: host paths, named and anonymous volumes."""

from __future__ import annotations

import os
from contextlib import ExitStack

import msgspec

from hutch.engine.context import Context
from hutch.engine.lookup import find_id, load
from hutch.engine.records import InstanceRecord, ResolvedMount
from hutch.errors import InvalidArgument, NotFound
from hutch.ids import new_id
from hutch.image.records import ImageRecord
from hutch.spec.model import BindMount, InstanceSpec, VolumeMount

__all__ = ["release_mounts", "resolve_mounts"]


def resolve_mounts(
    context: Context, identifier: str, spec: InstanceSpec, image: ImageRecord, undo: ExitStack
) -> tuple[ResolvedMount, ...]:
    """Return the mounts with their sources; volumes are made and marked as used.

    What the specification names replaces what `volumes_from` gives at the same target.
    """
    found: dict[str, ResolvedMount] = {}
    for source in spec.volumes_from:
        for mount in _inherited(context, source):
            found[mount.target] = mount
    for index, wanted in enumerate(spec.mounts):
        if isinstance(wanted, BindMount):
            found[wanted.target] = _bind(wanted, index)
        elif isinstance(wanted, VolumeMount):
            found[wanted.target] = _volume(context, wanted, image, undo)
    for mount in found.values():
        if mount.type == "volume":
            context.volumes.acquire(mount.name, identifier)
            undo.callback(context.volumes.release, mount.name, identifier)
    return tuple(found.values())


def _inherited(context: Context, source: str) -> list[ResolvedMount]:
    name, _, mode = source.partition(":")
    record: InstanceRecord = load(context, find_id(context, name))
    if mode != "ro":
        return list(record.mounts)
    return [msgspec.structs.replace(mount, read_only=True) for mount in record.mounts]


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
    context: Context, mount: VolumeMount, image: ImageRecord, undo: ExitStack
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
    if mount.copy_up and not mount.subpath:
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
    )


def release_mounts(context: Context, record: InstanceRecord, *, remove_anonymous: bool) -> None:
    """Say that the instance no longer uses its volumes; remove anonymous ones if told."""
    for mount in record.mounts:
        if mount.type != "volume":
            continue
        context.volumes.release(mount.name, record.id)
        if remove_anonymous and mount.anonymous and not context.volumes.users(mount.name):
            context.volumes.remove(mount.name, missing_ok=True)
