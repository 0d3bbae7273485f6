"""The root as a whole: disk use, pruning, garbage collection, a short description."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from hutch.drivers.base import Templated
from hutch.engine.context import Context
from hutch.engine.finish import refresh
from hutch.engine.lookup import all_records
from hutch.engine.quiet import awaken_abandoned
from hutch.engine.results import DiskUsage, PruneReport, SystemInfo, UsageRow
from hutch.engine.saved import reconcile_saved
from hutch.engine.stop import remove
from hutch.errors import Busy, HutchError, NotFound, Unavailable, WrongState
from hutch.lifecycle import State
from hutch.resources.settings import load_settings
from hutch.storage.scratch import clean_scratch

__all__ = ["collect_garbage", "df", "info", "prune", "prune_instances"]

_LIVE = (State.STARTING, State.RUNNING, State.PAUSED, State.RESTARTING)
# What pruning does not take: a suspended instance has not ended.
_KEPT = (*_LIVE, State.SUSPENDED, State.MIGRATING)


def df(context: Context) -> DiskUsage:
    """Measure images, instances and volumes."""
    records = all_records(context)
    running = [record.id for record in records if record.state in _LIVE]
    usage = context.collector.usage(context.snapshots, context.volumes, running=running)
    used = {record.image_id for record in records}
    images = context.images.all()
    active = [image for image in images if image.id in used]
    in_use = {name for image in active for name in (*image.chain_ids, *image.digests)}
    idle = sum(layer.size for layer in context.layers.list() if layer.chain_id not in in_use)
    idle += sum(disk.size for disk in context.rootdisks.list() if disk.chain_id not in in_use)
    idle += sum(blob.size for blob in context.content.list() if blob.digest not in in_use)
    rows = [
        UsageRow(
            kind="images",
            total=len(images),
            active=len(active),
            size=usage.layers.size + usage.blobs.size + usage.disks.size,
            reclaimable=idle,
        ),
        UsageRow(
            kind="instances",
            total=len(records),
            active=len(running),
            size=usage.instances.size,
            reclaimable=usage.instances.reclaimable,
        ),
        UsageRow(
            kind="volumes",
            total=usage.volumes.total,
            active=usage.volumes.active,
            size=usage.volumes.size,
            reclaimable=usage.volumes.reclaimable,
        ),
        _kernels(context),
        _templates(context),
        _machine_snapshots(context),
        _build_cache(context),
        _caches(context),
    ]
    return DiskUsage(rows=tuple(rows))


def _templated(context: Context) -> Templated | None:
    """Return the driver that has templates, None where there are none to ask about."""
    if not (context.root / "templates").is_dir():
        return None
    driver = context.driver("vm")
    return driver if isinstance(driver, Templated) else None


def _templates(context: Context) -> UsageRow:
    """Templates take the host's memory, and a little of the disk: both are counted."""
    driver = _templated(context)
    found = driver.templates() if driver is not None else []
    size = sum(template.state + template.memory for template in found)
    return UsageRow(
        kind="templates",
        total=len(found),
        active=sum(template.held for template in found),
        size=size,
        reclaimable=size,
    )


def _kernels(context: Context) -> UsageRow:
    from hutch.storage.snapshots import measure

    kernels = context.kernels
    found = [
        (bool(kernels.users(k.id)), measure(str(kernels.directory(k.id))).bytes)
        for k in kernels.list()
    ]
    return UsageRow(
        kind="kernels",
        total=len(found),
        active=sum(used for used, _ in found),
        size=sum(size for _, size in found),
        # The one added last stays: it is what the next virtual machine starts with.
        reclaimable=sum(size for used, size in found[1:] if not used),
    )


def _machine_snapshots(context: Context) -> UsageRow:
    """Measure the saved states of machines, which stay until somebody removes them."""
    from hutch.engine.records import MACHINE_SNAPSHOTS, SnapshotRecord
    from hutch.storage.snapshots import measure

    with context.store.read() as tx:
        total = sum(1 for _ in tx.items(MACHINE_SNAPSHOTS, SnapshotRecord))
    size = measure(str(context.root / "snapshots")).bytes
    return UsageRow(kind="snapshots", total=total, active=total, size=size, reclaimable=0)


def _build_cache(context: Context) -> UsageRow:
    """Measure the build cache; layers that images have too count as active."""
    from hutch.engine.builder.facade import cache_items

    items = cache_items(context)
    return UsageRow(
        kind="build cache",
        total=len(items),
        active=sum(item.shared or item.in_use for item in items),
        size=sum(item.size for item in items),
        reclaimable=sum(item.size for item in items if not (item.shared or item.in_use)),
    )


def _caches(context: Context) -> UsageRow:
    """Measure what is made anew where it is missing: empty disks, facts, filters."""
    from hutch.storage.snapshots import measure

    found = measure(str(context.root / "cache"))
    return UsageRow(kind="caches", total=found.inodes, active=0, size=found.bytes, reclaimable=0)


def collect_garbage(context: Context) -> int:
    """Free blobs, layers and root disks that nothing names and what dead processes left;
    bytes freed."""
    known = [record.id for record in all_records(context)]
    clean_scratch(context.root, context.trash)
    context.collector.reconcile(context.snapshots, known)
    awaken_abandoned(context)
    live = _live(context)
    context.volumes.reconcile(known, running=live)
    settings = load_settings(context.root)
    context.memory_pool.reconcile(settings.memory_pool, live)
    context.kernels.reconcile()
    reconcile_saved(context)
    context.disks.forget()
    try:
        return context.collector.collect().bytes
    except Unavailable:
        return 0


def _live(context: Context) -> set[str]:
    """Return the identifiers of instances that run in this boot of the host."""
    return {
        record.id
        for record in all_records(context)
        if record.state in _LIVE and record.boot_id == context.boot_id
    }


def prune_instances(
    context: Context, filters: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Remove the instances that do not run; return their identifiers."""
    from hutch.engine.listing import list_instances

    removed = []
    for info in list_instances(context, all_states=True, filters=filters):
        if info.state in _KEPT:
            continue
        try:
            remove(context, info.id)
        except (Busy, NotFound, WrongState):
            continue
        removed.append(info.id)
    return removed


def prune(
    context: Context,
    *,
    all_images: bool,
    volumes: bool,
    filters: Mapping[str, Sequence[str]] | None = None,
) -> PruneReport:
    """Remove what is not in use; see `Engine.prune`."""
    from hutch.engine.builder.facade import prune_cache
    from hutch.engine.builder.leftovers import sweep
    from hutch.engine.images import Images
    from hutch.engine.kernels import Kernels
    from hutch.engine.networks import Networks
    from hutch.engine.volumes import Volumes

    before = _free(context)
    instances = prune_instances(context, filters)
    networks = Networks(context).prune()
    removed_volumes = Volumes(context).prune()[0] if volumes else []
    images = Images(context).prune(all_images=all_images)
    kernels = Kernels(context).prune() if all_images else []
    sweep(context)
    cached = prune_cache(context, all_entries=all_images)
    driver = _templated(context)
    templates = _templates(context)
    if driver is not None:
        driver.prune_templates()
    context.disks.forget(all_sizes=True)
    context.trash.empty()
    return PruneReport(
        instances=tuple(instances),
        images=tuple(images.deleted),
        volumes=tuple(removed_volumes),
        networks=tuple(networks),
        kernels=tuple(kernel.id for kernel in kernels),
        templates=templates.total,
        build_cache=len(cached.records) + len(cached.mounts),
        reclaimed=templates.size + max(images.reclaimed, _free(context) - before, 0),
    )


def _free(context: Context) -> int:
    status = os.statvfs(context.root)
    return status.f_bavail * status.f_frsize


def info(context: Context) -> SystemInfo:
    """Describe the engine and its host in short."""
    from hutch import __version__
    from hutch.linux.cgroup import detect

    records = []
    for record in all_records(context):
        try:
            records.append(refresh(context, record))
        except HutchError:
            records.append(record)
    states = [record.state for record in records]
    host = os.uname()
    return SystemInfo(
        version=__version__,
        root=str(context.root),
        rootless=context.rootless,
        kernel=host.release,
        architecture=host.machine,
        cpus=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cgroup=detect().version,
        instances=len(records),
        running=sum(state == State.RUNNING for state in states),
        paused=sum(state == State.PAUSED for state in states),
        stopped=sum(
            state in (State.CREATED, State.SUSPENDED, State.EXITED, State.DEAD) for state in states
        ),
        images=len(context.images.all()),
    )
