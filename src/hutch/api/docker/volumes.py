"""Volumes: listed, inspected, made, removed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.api.docker.errors import ApiError
from hutch.api.docker.pruning import Spared, note_prune
from hutch.api.docker.replies import Answer, empty, json_reply
from hutch.api.docker.routing import Route
from hutch.api.docker.times import timestamp
from hutch.api.docker.wire import Wire
from hutch.errors import AlreadyExists, Busy, InvalidArgument, NotFound, Unsupported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.api.docker.front import Front
    from hutch.api.docker.requests import Request
    from hutch.storage.volumes import Volume

__all__ = ["ROUTES", "volume_json"]

_NO_CLUSTER = "This node is not a swarm manager: there are no cluster volumes"


class VolumeBody(Wire, frozen=True, kw_only=True):
    """A volume to be made."""

    name: str = ""
    driver: str = ""
    driver_opts: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    cluster_volume_spec: dict[str, Any] | None = msgspec.field(
        default=None, name="ClusterVolumeSpec"
    )


def volume_json(volume: Volume) -> dict[str, Any]:
    """Return all that Docker tells of a volume."""
    created = timestamp(int(volume.created_at) * 10**9)
    return {
        "CreatedAt": created,
        "Driver": volume.driver,
        "Labels": volume.labels or None,
        "Mountpoint": volume.path,
        "Name": volume.name,
        "Options": volume.options or None,
        "Scope": "local",
    }


async def _list(request: Request) -> Answer:
    filters = request.query.filters()
    for key in filters:
        if key not in ("dangling", "driver", "label", "name"):
            raise ApiError(400, f"invalid filter '{key}'")
    wanted = {key: values for key, values in filters.items() if values}
    found = await request.front.call(request.front.engine.volumes.list, wanted)
    return json_reply({"Volumes": [volume_json(volume) for volume in found], "Warnings": None})


def _find(front: Front, name: str) -> Volume:
    try:
        return front.engine.volumes.get(name)
    except NotFound:
        raise ApiError(404, f"get {name}: no such volume") from None


async def _inspect(request: Request) -> Answer:
    volume = await request.front.call(_find, request.front, request.params["name"])
    return json_reply(volume_json(volume))


async def _create(request: Request) -> Answer:
    body = await request.optional_json(VolumeBody) or VolumeBody()
    front = request.front
    if body.cluster_volume_spec is not None:
        raise ApiError(503, _NO_CLUSTER)
    call = functools.partial(
        front.engine.volumes.create,
        body.name or None,
        driver=body.driver or "local",
        options=body.driver_opts or {},
        labels=body.labels or {},
    )
    try:
        volume = await front.call_slow(call)
    except Unsupported:
        raise ApiError(
            404,
            f"create {body.name}: error looking up volume plugin {body.driver}: "
            f'plugin "{body.driver}" not found',
        ) from None
    except AlreadyExists as exc:
        raise ApiError(409, f"create {body.name}: {exc.message}") from None
    except InvalidArgument as exc:
        raise ApiError(400, f"create {body.name}: {exc}") from None
    front.journal.poke()
    return json_reply(volume_json(volume), 201)


async def _update(request: Request) -> Answer:
    await request.read()
    await request.front.call(_find, request.front, request.params["name"])
    raise ApiError(503, _NO_CLUSTER)


async def _remove(request: Request) -> Answer:
    name, force = request.params["name"], request.query.flag("force")
    await request.front.call_slow(_removed, request.front, name, force)
    request.front.journal.poke()
    return empty(204)


def _removed(front: Front, name: str, force: bool) -> None:
    try:
        front.engine.volumes.remove(name, force=force)
    except NotFound:
        raise ApiError(404, f"get {name}: no such volume") from None
    except Busy as exc:
        users = front.engine.volumes.users(name)
        if not users:
            raise
        raise ApiError(409, f"remove {name}: volume is in use - [{', '.join(users)}]") from exc


async def _prune(request: Request) -> Answer:
    filters = request.query.filters()
    everything = any(value.lower() in ("1", "true") for value in filters.get("all", ()))
    call = functools.partial(
        _pruned, request.front, filters, everything or request.version < (1, 42)
    )
    names, freed = await request.front.call_slow(call)
    request.front.journal.poke()
    return json_reply({"VolumesDeleted": names or None, "SpaceReclaimed": freed})


def _pruned(
    front: Front, filters: dict[str, list[str]], everything: bool
) -> tuple[Sequence[str], int]:
    spared = Spared(filters, "all")
    wanted = {"label": filters["label"]} if filters.get("label") else None
    names, freed = front.engine.volumes.prune(
        all_volumes=everything,
        filters=wanted,
        spare=lambda volume: spared(volume.labels, volume.created_at),
    )
    note_prune(front, "volume", freed)
    return names, freed


ROUTES = (
    Route(
        method="GET",
        path="/volumes",
        handler=_list,
        summary="List volumes",
        options={"filters": "works: dangling, driver, label, name"},
    ),
    Route(method="GET", path="/volumes/{name}", handler=_inspect, summary="Describe a volume"),
    Route(
        method="POST",
        path="/volumes/create",
        handler=_create,
        summary="Make a volume, or tell of the one of that name",
        options={
            "Name": "works",
            "Driver": "works for local; refused: others",
            "DriverOpts": "works: type, device, o; differs: `size` limits a volume as well, and "
            "`type=disk` makes one that is a disk",
            "Labels": "works",
            "ClusterVolumeSpec": "refused, as by a Docker node that is no swarm manager",
        },
    ),
    Route(
        method="PUT",
        path="/volumes/{name}",
        handler=_update,
        summary="Change a cluster volume",
        verdict="refused, as by a Docker node that is no swarm manager",
        since=(1, 42),
    ),
    Route(
        method="DELETE",
        path="/volumes/{name}",
        handler=_remove,
        summary="Remove a volume that no container uses",
        options={"force": "works"},
    ),
    Route(
        method="POST",
        path="/volumes/prune",
        handler=_prune,
        summary="Remove unused volumes: anonymous ones, or all",
        options={"filters": "works: all, label, label!, until"},
        since=(1, 25),
    ),
)
