"""Garbage collection by policy: what nothing names, and then images by age and by how full the
root's disk is."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import msgspec

from hutch.engine.context import Context
from hutch.engine.results import GcReport
from hutch.errors import HutchError, InvalidArgument
from hutch.records import Transaction

__all__ = ["collect", "note_use"]

_USES = "image_uses"
_GAP = 5.0  # between the high mark and the low one, where only the high one is told


class _Use(msgspec.Struct, frozen=True, kw_only=True):
    """When an image's last instance went away (key: the image's id)."""

    used_at: float


def note_use(tx: Transaction, image_id: str) -> None:
    """Note that an instance of an image goes away now."""
    if image_id:
        tx.put(_USES, image_id, _Use(used_at=time.time()))


def collect(
    context: Context,
    *,
    watermark: float | None = None,
    low: float | None = None,
    older_than_s: float | None = None,
    dry_run: bool = False,
) -> GcReport:
    """Free what nothing names; see `Engine.gc` for the rest."""
    from hutch.engine.system import collect_garbage

    high, target = _marks(watermark, low)
    before = used_share(context)
    freed = 0
    if not dry_run:
        freed = collect_garbage(context)
        context.trash.drain()
        if high is None or used_share(context) > high:
            freed += _trim(context)
    removed: list[str] = []
    now = used_share(context)
    if older_than_s is not None or high is not None:
        for name, image_id, used_at, size in _candidates(context):
            if older_than_s is not None and time.time() - used_at < older_than_s:
                break  # those that follow were used later
            if high is not None and now <= (target if removed else high):
                break
            if dry_run:
                now = max(0.0, now - _share(context, size))
            elif context.images.delete(image_id) is None:
                continue  # somebody has begun to use it
            else:
                freed += context.collector.collect().bytes
                context.trash.drain()
                now = used_share(context)
            removed.append(name)
    return GcReport(
        before=before,
        after=now if dry_run else used_share(context),
        images=tuple(removed),
        freed=freed,
        reached=high is None or now <= (target if removed else high),
    )


def _marks(watermark: float | None, low: float | None) -> tuple[float | None, float]:
    if watermark is None:
        if low is not None:
            raise InvalidArgument("goes with a watermark", field="low")
        return None, 0.0
    target = max(0.0, watermark - _GAP) if low is None else low
    if not 0 <= target <= watermark <= 100:
        raise InvalidArgument(
            f"expected percentages with low <= high, got {target:g} and {watermark:g}",
            field="watermark",
        )
    return watermark, target


def used_share(context: Context) -> float:
    """Return how full the root's disk is, in percent, as `df` counts it."""
    status = os.statvfs(context.root)
    used = status.f_blocks - status.f_bfree
    return 100.0 * used / ((used + status.f_bavail) or 1)


def _share(context: Context, size: int) -> float:
    status = os.statvfs(context.root)
    return 100.0 * size / ((status.f_blocks * status.f_frsize) or 1)


def _candidates(context: Context) -> list[tuple[str, str, float, int]]:
    """Return the images that no instance uses (name, id, when last used, bytes), those that
    were used longest ago first."""
    with context.store.read() as tx:
        uses = dict(tx.items(_USES, _Use))
    found = []
    for image in context.images.all():
        if context.images.used(image.id):
            continue
        use = uses.get(image.id)
        used_at = max(image.added_at, image.tagged_at, use.used_at if use else 0.0)
        size = image.compressed_size + sum(layer.unpacked_size for layer in image.layers)
        name = image.names[0] if image.names else image.id
        found.append((name, image.id, used_at, size))
    return sorted(found, key=lambda item: item[2])


def _trim(context: Context) -> int:
    """Let pools give back what they do not use."""
    freed = 0
    for pool in context.volumes.pools.list():
        with suppress(HutchError, OSError):
            freed += context.volumes.pools.trim(pool.name)
    return freed
