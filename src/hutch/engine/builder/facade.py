"""`Engine.build` and what keeps its cache in bounds."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from hutch.engine.builder.build import Build, run_build
from hutch.engine.builder.cache import Cache, CachePrune
from hutch.engine.builder.cachedirs import CacheDirectories
from hutch.engine.builder.events import BuildProgress
from hutch.engine.builder.finishing import Output, make_image, parse_output, write_output
from hutch.engine.builder.options import BuildOptions
from hutch.engine.builder.sources import Context as BuildContext
from hutch.engine.builder.stage import StageState
from hutch.errors import Exhausted, HutchError, Unavailable
from hutch.image.records import ImageRecord
from hutch.oci.reference import parse

if TYPE_CHECKING:
    from hutch.engine.context import Context

__all__ = ["BuildCacheItem", "BuildResult", "build_image", "cache_items", "prune_cache"]


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came out: the image (None where only files were written) and what was amiss."""

    image: ImageRecord | None = None
    warnings: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The image's id, "" for none."""
        return self.image.id if self.image is not None else ""


class BuildCacheItem(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the build cache: a step's layer, or the directory of a cache mount. Times in
    seconds since the epoch; `shared` says that an image has the layer too."""

    id: str
    kind: str
    description: str
    size: int
    created_at: float
    used_at: float
    uses: int = 0
    in_use: bool = False
    shared: bool = False


def build_image(
    context: Context,
    source: BuildContext,
    options: BuildOptions,
    progress: BuildProgress,
    *,
    dockerfile_data: bytes | None = None,
    outputs: Sequence[str | Output] = (),
    stream: BinaryIO | None = None,
    stop: threading.Event | None = None,
) -> BuildResult:
    """Build; see `Engine.build`."""
    wanted = [parse_output(text) if isinstance(text, str) else text for text in outputs]
    try:
        with run_build(
            context, source, options, progress, dockerfile_data=dockerfile_data, stop=stop
        ) as (
            build,
            state,
        ):
            record = _finish(build, state, wanted or [Output()], stream)
            warnings = tuple(build.reporter.warnings)
    except Exhausted:
        # What was made for nothing would only stand in the way.
        _free(context)
        raise
    _keep_in_bounds(context)
    return BuildResult(image=record, warnings=warnings)


def _finish(
    build: Build, state: StageState, outputs: Sequence[Output], stream: BinaryIO | None
) -> ImageRecord | None:
    record: ImageRecord | None = None
    step = build.reporter.begin("exporting")
    try:
        for output in outputs:
            if output.kind == "cacheonly":
                continue
            if output.kind in ("local", "tar"):
                write_output(build, state, output, stream)
                continue
            names = [
                *build.options.tags,
                *(parse(name, field="output").canonical() for name in output.names),
            ]
            record = make_image(build, state, names)
            if output.kind in ("oci", "docker") and output.dest:
                _save(build, record, output, names, stream)
            if output.push:
                _push(build, names)
        if build.options.cache_to:
            from hutch.engine.builder.remotecache import export_cache

            for text in build.options.cache_to:
                export_cache(build, text)
    except BaseException as error:
        step.fail(str(error))
        raise
    step.end(record.id if record is not None else "")
    if record is not None:
        build.reporter.image(record.id)
    return record


def _save(
    build: Build,
    record: ImageRecord,
    output: Output,
    names: Sequence[str],
    stream: BinaryIO | None,
) -> None:
    from hutch.engine.builder.finishing import open_stream
    from hutch.image.archive import save_images

    kind = "docker" if output.kind == "docker" else "oci-archive"
    with open_stream(output.dest, stream) as file:
        save_images(
            list(names) or [record.id],
            file,
            images=build.context.images,
            content=build.context.content,
            format=kind,
        )


def _push(build: Build, names: Sequence[str]) -> None:
    from hutch.engine.images import Images
    from hutch.errors import InvalidArgument

    if not names:
        raise InvalidArgument("a push needs a name: --tag, or name=…", field="output")
    for name in names:
        Images(build.context).push(name, credentials=build.credentials(name))


# ---- the cache as a whole -----------------------------------------------------------------


def cache_items(context: Context) -> list[BuildCacheItem]:
    """Return what the build cache has, used last first."""
    shared = {chain_id for image in context.images.all() for chain_id in image.chain_ids}
    items = [
        BuildCacheItem(
            id=key[:25],
            kind=record.kind,
            description=record.description,
            size=record.size,
            created_at=record.created_at,
            used_at=record.used_at,
            uses=record.uses,
            shared=record.layer is not None and record.layer.chain_id in shared,
        )
        for key, record in Cache(context).records()
        if not record.leads_to
    ]
    items += [
        BuildCacheItem(
            id=found.key[:25],
            kind="cache mount",
            description=found.id,
            size=found.size,
            created_at=found.used_at,
            used_at=found.used_at,
            in_use=found.in_use,
        )
        for found in CacheDirectories(context).all()
    ]
    return sorted(items, key=lambda item: item.used_at, reverse=True)


def prune_cache(
    context: Context,
    *,
    all_entries: bool = False,
    older_than_s: float = 0,
    keep_bytes: int = 0,
    filters: Mapping[str, Sequence[str]] | None = None,
) -> CachePrune:
    """Take away entries that no build uses now: those that no image has, or all of them."""
    chosen = _chosen(context, all_entries, filters or {})
    cache = Cache(context)
    records = dict(cache.records())
    gone = cache.prune(
        older_than_s=older_than_s,
        keep_bytes=keep_bytes,
        keys=[key for key in records if key[:25] in chosen or records[key].leads_to],
    )
    now = _now()
    mounts = []
    freed = 0
    kept = 0
    directories = CacheDirectories(context)
    for found in directories.all():
        kept += found.size
        stale = now - found.used_at >= older_than_s
        over = not keep_bytes or kept > keep_bytes
        if found.key[:25] in chosen and stale and over and directories.remove(found.key):
            kept -= found.size
            freed += found.size
            mounts.append(found.key)
    return CachePrune(
        records=tuple(key for key in gone if not records[key].leads_to),
        mounts=tuple(mounts),
        reclaimed=freed + _free(context),
    )


def _chosen(context: Context, all_entries: bool, filters: Mapping[str, Sequence[str]]) -> set[str]:
    from hutch.errors import InvalidArgument

    known = ("id", "type", "description", "inuse", "shared", "until", "unused-for")
    for name in filters:
        if name not in known:
            raise InvalidArgument(
                f"unknown filter {name[:40]!r}", field="filter", hint=f"use {', '.join(known)}"
            )
    chosen = set()
    for item in cache_items(context):
        if item.in_use or (item.shared and not all_entries and item.kind != "cache mount"):
            continue
        values: dict[str, Any] = {
            "id": item.id,
            "type": item.kind,
            "description": item.description,
            "inuse": str(item.in_use).lower(),
            "shared": str(item.shared).lower(),
        }
        if all(
            any(str(values[name]).startswith(value) for value in wanted)
            for name, wanted in filters.items()
            if name in values
        ):
            chosen.add(item.id)
    return chosen


def _free(context: Context) -> int:
    """Collect what nothing names any more; bytes freed."""
    try:
        context.leases.end_over()
        return context.collector.collect().bytes
    except (HutchError, OSError) as error:
        if isinstance(error, Unavailable | Exhausted):
            return 0
        raise


def _keep_in_bounds(context: Context) -> None:
    """Forget what was used longest ago where the cache takes more than a tenth of the disk."""
    import os

    records = Cache(context).records()
    size = sum(record.size for _, record in records)
    if size < 1 << 30:
        return
    status = os.statvfs(context.root)
    limit = max(status.f_blocks * status.f_frsize // 10, 2 << 30)
    if size > limit:
        prune_cache(context, all_entries=True, keep_bytes=limit * 3 // 4)


def _now() -> float:
    import time

    return time.time()
