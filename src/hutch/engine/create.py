"""Create an instance: image found or pulled, options merged, volumes and layers prepared."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.decoding import prepare
from hutch.engine.context import Context
from hutch.engine.finish import dispose
from hutch.engine.isolation import decide_isolation
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import find_id, load
from hutch.engine.mounts import name_disks, resolve_mounts
from hutch.engine.naming import random_name
from hutch.engine.records import INSTANCES, NAMES, InstanceRecord, NameRecord
from hutch.engine.reserve import reserve_at_create
from hutch.errors import AlreadyExists, InvalidArgument, NotFound
from hutch.ids import new_instance_id
from hutch.image.records import IMAGES, ImageRecord
from hutch.records import Progress, silent
from hutch.spec.build import build, check_name
from hutch.spec.defaults import ImageDefaults
from hutch.spec.model import InstanceSpec
from hutch.storage.diskkeys import DiskKey
from hutch.storage.faults import disk_errors

if TYPE_CHECKING:
    from hutch.image.registry_config import Credentials

__all__ = [
    "check_references",
    "create",
    "ensure_image",
    "insert_record",
    "layer_size",
    "new_directory",
]

_PULL_POLICIES = ("missing", "always", "never")
_NAME_ATTEMPTS = 20


def _require_platform(image: ImageRecord, reference: str, platform: str | None) -> None:
    """Raise `NotFound` for an image that is here, but not for the platform asked for."""
    if platform is None or not image.architecture:
        return
    from hutch.oci.platform import parse_platform

    wanted = parse_platform(platform).architecture
    if wanted != image.architecture:
        raise NotFound(
            f"image {reference}: here it is for {image.architecture}, not for {wanted}",
            hint="leave out --platform, or pull the other one",
        )


def ensure_image(
    context: Context,
    reference: str,
    *,
    pull: str = "missing",
    platform: str | None = None,
    credentials: Credentials | None = None,
    progress: Progress = silent,
) -> ImageRecord:
    """Return the image, pulled when the policy says so; `credentials` are for that."""
    if pull not in _PULL_POLICIES:
        raise InvalidArgument(
            f"expected one of {', '.join(_PULL_POLICIES)}, got {pull!r}", field="pull"
        )
    if pull != "always":
        try:
            found = context.images.get(reference)
            _require_platform(found, reference, platform)
            return found
        except NotFound:
            if pull == "never" or reference.startswith("sha256:"):
                raise
    from hutch.engine.images import pull_image

    return pull_image(
        context, reference, platform=platform, credentials=credentials, progress=progress
    )


def image_defaults(image: ImageRecord) -> ImageDefaults:
    """Return what the specification takes from an image."""
    prepare(ImageDefaults)
    return msgspec.convert(image.config, ImageDefaults, from_attributes=True)


def create(
    context: Context,
    reference: str,
    command: Sequence[str] | str | None = None,
    *,
    name: str | None = None,
    pull: str = "missing",
    platform: str | None = None,
    progress: Progress = silent,
    volatile: bool = False,
    options: Mapping[str, Any] | None = None,
) -> InstanceRecord:
    """Create an instance and return its record; on failure nothing of it is left.

    `volatile` allows the writable layer to skip syncing: only for instances that are
    removed at their exit and never started twice.
    """
    if name is not None:
        name = check_name(name)
    given = dict(options or {})
    key = None
    if given.get("disk_key") is not None:
        from hutch.engine.disk_keys import take_key

        key = take_key(given)
    decided, reason = decide_isolation(context, given)
    image = ensure_image(context, reference, pull=pull, platform=platform, progress=progress)
    spec = build(reference, image_defaults(image), command, **decided)
    return create_from_spec(
        context,
        spec,
        image,
        name=name,
        volatile=volatile,
        progress=progress,
        isolation_reason=reason,
        disk_key=key,
    )


def create_from_spec(
    context: Context,
    spec: InstanceSpec,
    image: ImageRecord,
    *,
    name: str | None = None,
    volatile: bool = False,
    progress: Progress = silent,
    disk: str = "",
    isolation_reason: str = "",
    disk_key: DiskKey | None = None,
    identifier: str = "",
) -> InstanceRecord:
    """Create an instance from a finished specification, under a new `identifier` if none is
    given.

    `disk` is the directory of a saved state with what becomes a virtual machine's writable disk
    or a container's files; without it, it has an empty one, which `disk_key` encrypts. The key
    is held for starts by this process.
    """
    identifier = identifier or new_instance_id()
    if not spec.hostname and spec.uts_mode != "host" and spec.network_mode != "host":
        spec = msgspec.structs.replace(spec, hostname=identifier[:12])
    elif not spec.hostname and spec.network_mode == "host":
        spec = msgspec.structs.replace(spec, hostname=os.uname().nodename)
    if spec.isolation == "vm":
        spec = name_disks(context, spec)
    context.driver(spec.isolation).check(spec)
    spec = check_references(context, spec)
    with ExitStack() as leased:
        leased.enter_context(reserve_at_create(context, identifier, spec, name or ""))
        if spec.isolation == "vm":
            from hutch.engine.machines import prepare_machine

            # Its disk is made of layers that no record of the instance holds yet.
            leased.enter_context(context.leases.hold(*image.chain_ids, purpose="machine"))
            spec = prepare_machine(context, spec, image, progress)
        return _make(
            context,
            identifier,
            spec,
            image,
            name=name,
            volatile=volatile,
            disk=disk,
            reason=isolation_reason,
            disk_key=disk_key,
        )


def _make(
    context: Context,
    identifier: str,
    spec: InstanceSpec,
    image: ImageRecord,
    *,
    name: str | None,
    volatile: bool,
    disk: str,
    reason: str,
    disk_key: DiskKey | None,
) -> InstanceRecord:
    """Make the instance's directory and what is in it, then its record."""
    directory = context.directory(identifier)
    with (
        disk_errors(f"instance {identifier[:12]}"),
        new_directory(context, identifier),
        ExitStack() as undo,
    ):
        undo.callback(dispose, context, identifier)
        os.mkdir(directory / "run", 0o700)
        _make_layers(context, identifier, image, spec)
        if spec.isolation == "vm":
            from hutch.engine.machines import make_disk

            make_disk(context, spec, directory, disk, disk_key)
        elif disk:
            from hutch.engine.container_states import place_files

            place_files(context, identifier, disk)
        mounts = resolve_mounts(context, identifier, spec, image, undo)
        record = insert_record(
            context,
            InstanceRecord(
                id=identifier,
                name=name or "",
                spec=spec,
                isolation_reason=reason,
                image_id=image.id,
                image_name=spec.image,
                chain_ids=image.chain_ids,
                created_ns=time.time_ns(),
                mounts=mounts,
                volatile=volatile,
            ),
        )
        undo.pop_all()
    if disk_key is not None:
        context.disk_keys[identifier] = disk_key
    return record


@contextmanager
def new_directory(context: Context, identifier: str) -> Iterator[None]:
    """Make an instance's directory and hold its lock; without its lock file there is none."""
    directory = context.directory(identifier)
    with ExitStack() as held:
        while True:
            os.mkdir(directory, 0o700)
            try:
                held.enter_context(instance_lock(context, identifier))
                break
            except NotFound:
                continue  # not locked yet, it was taken for one whose maker was killed
            except OSError:
                os.rmdir(directory)
                raise
        yield


def _make_layers(context: Context, identifier: str, image: ImageRecord, spec: InstanceSpec) -> None:
    """Make the writable layer; layers that a power cut took are unpacked again first."""
    owner, size = _root_owner(spec), layer_size(spec)
    try:
        context.snapshots.make(identifier, image.chain_ids, owner=owner, size=size)
    except NotFound:
        from hutch.image.unpacking import ensure_unpacked

        with context.leases.hold(*image.digests, *image.chain_ids, purpose="unpack"):
            ensure_unpacked(image, context.content, context.layers)
        context.snapshots.make(identifier, image.chain_ids, owner=owner, size=size)


def layer_size(spec: InstanceSpec) -> int:
    """Return the bytes that a container's writable layer may have, 0 for no limit."""
    if spec.isolation == "vm":
        return 0
    from hutch.spec.disk_room import disk_room

    return disk_room(spec)


def _root_owner(spec: InstanceSpec) -> tuple[int, int] | None:
    """Return who owns the writable layer's root on the host, None for the usual owner."""
    if spec.userns in ("", "host"):
        return None
    from hutch.drivers.container.idmaps import remapped_root

    return remapped_root()


def check_references(context: Context, spec: InstanceSpec) -> InstanceSpec:
    """Refuse a specification that names instances or networks which do not exist; put the
    names of networks that were given by their identifiers."""
    for mode in (spec.network_mode, spec.pid_mode, spec.ipc_mode):
        if mode.startswith("container:"):
            find_id(context, mode.removeprefix("container:"))
    if spec.links:
        from hutch.engine.links import resolve_links

        spec = resolve_links(context, spec)
    return _with_networks(context, spec)


def _with_networks(context: Context, spec: InstanceSpec) -> InstanceSpec:
    wanted = tuple(
        a
        if a.name == "bridge"
        else msgspec.structs.replace(a, name=context.networks.get(a.name).name)
        for a in spec.networks
    )
    if wanted == spec.networks:
        return spec
    return msgspec.structs.replace(spec, networks=wanted, network_mode=wanted[0].name)


def insert_record(context: Context, record: InstanceRecord) -> InstanceRecord:
    """Store the record under its name, or under a fresh one."""
    for attempt in range(_NAME_ATTEMPTS):
        name = record.name or random_name(attempt)
        named = msgspec.structs.replace(record, name=name)
        try:
            with context.store.write(durable=not record.volatile) as tx:
                tx.insert(NAMES, name, NameRecord(id=record.id))
                tx.insert(INSTANCES, record.id, named)
                context.snapshots.note(tx, record.id, record.chain_ids)
                if record.spec.machine.kernel:
                    context.kernels.note(tx, record.id, record.spec.machine.kernel)
                if record.image_id and tx.get(IMAGES, record.image_id, ImageRecord) is None:
                    raise NotFound(f"image {record.image_name}: was removed meanwhile")
                # With the labels: whoever reads of it when it is gone finds them nowhere else.
                attributes = {**record.spec.labels, "name": name, "image": record.image_name}
                tx.event("container", "create", record.id, **attributes)
        except AlreadyExists:
            if record.name:
                holder = load(context, find_id(context, name))
                raise AlreadyExists(
                    f"name: {name!r} is taken by instance {holder.id[:12]}",
                    hint=f"choose another name, or `hutch rm {name}`",
                ) from None
            continue
        return named
    raise AlreadyExists("name: no free random name found", hint="give the instance a name")
