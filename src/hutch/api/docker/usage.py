"""What images, containers, volumes and the build cache take on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hutch.api.docker.containers import network_ids, size_of
from hutch.api.docker.errors import ApiError
from hutch.api.docker.images import image_summary, shared_sizes
from hutch.api.docker.replies import Answer, json_reply
from hutch.api.docker.routing import Route
from hutch.api.docker.shapes import container_summary
from hutch.api.docker.times import timestamp
from hutch.api.docker.volumes import volume_json
from hutch.errors import HutchError

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.api.docker.requests import Request
    from hutch.api.docker.routing import Version
    from hutch.engine.builder.facade import BuildCacheItem
    from hutch.engine.results import InstanceInfo

__all__ = ["ROUTES", "cache_json"]

_TYPES = ("container", "image", "volume", "build-cache")


async def _df(request: Request) -> Answer:
    types = request.query.texts("type") if request.version >= (1, 42) else []
    for kind in types:
        if kind not in _TYPES:
            raise ApiError(400, f"unknown object type: {kind}")
    wanted = frozenset(types or _TYPES)
    return json_reply(await request.front.call_slow(_usage, request.front, wanted, request.version))


def _usage(front: Front, wanted: frozenset[str], version: Version) -> dict[str, Any]:
    instances = front.engine.list(all=True)
    found: dict[str, Any] = {}
    if "image" in wanted:
        found |= _images(front, instances, version)
    if "container" in wanted:
        ids = network_ids(front)
        found["Containers"] = [
            container_summary(info, size_of(front, info), ids) for info in instances
        ]
    if "volume" in wanted:
        found["Volumes"] = _volumes(front)
    if "build-cache" in wanted:
        items = front.engine.build_cache()
        found["BuildCache"] = [cache_json(item) for item in items]
        if version < (1, 42):
            found["BuilderSize"] = sum(item.size for item in items)
    return found


def _images(front: Front, instances: list[InstanceInfo], version: Version) -> dict[str, Any]:
    records = front.engine.images.list()
    shared = shared_sizes(records)
    users: dict[str, int] = {}
    for info in instances:
        users[info.image_id] = users.get(info.image_id, 0) + 1
    layers = {layer.chain_id: layer.unpacked_size for r in records for layer in r.layers}
    return {
        "LayersSize": sum(layers.values()),
        "Images": [
            image_summary(
                record,
                version=version,
                shared=shared[record.id],
                containers=users.get(record.id, 0),
            )
            for record in records
        ],
    }


def _volumes(front: Front) -> list[dict[str, Any]]:
    found = []
    for volume in front.engine.volumes.list():
        try:
            size = front.engine.context.volumes.usage(volume.name).bytes
            users = len(front.engine.volumes.users(volume.name))
        except (HutchError, OSError):
            size, users = -1, -1  # it went meanwhile, or cannot be read
        usage = {"Size": size, "RefCount": users}
        found.append(volume_json(volume) | {"UsageData": usage})
    return found


def cache_json(item: BuildCacheItem) -> dict[str, Any]:
    """Return an entry of the build cache."""
    return {
        "ID": item.id,
        "Parents": [],
        "Type": "exec.cachemount" if item.kind == "cache mount" else "regular",
        "Description": item.description,
        "InUse": item.in_use,
        "Shared": item.shared,
        "Size": item.size,
        "CreatedAt": timestamp(int(item.created_at * 1e9)),
        "LastUsedAt": timestamp(int(item.used_at * 1e9)),
        "UsageCount": item.uses,
    }


ROUTES = (
    Route(
        method="GET",
        path="/system/df",
        handler=_df,
        summary="Tell what everything takes on disk",
        verdict="differs: `LayersSize` counts a layer that several images have once",
        options={"type": "works", "verbose": "ignored"},
        since=(1, 25),
    ),
)
