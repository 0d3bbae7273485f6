"""Containers: made, listed, inspected, changed, removed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hutch.api.docker.creating import (
    create_warnings,
    options_of,
    resource_options,
    restart_text,
)
from hutch.api.docker.errors import ApiError, message_of
from hutch.api.docker.naming import find_container
from hutch.api.docker.pruning import Spared, note_prune
from hutch.api.docker.replies import Answer, empty, json_reply
from hutch.api.docker.routing import Route
from hutch.api.docker.shapes import container_summary, inspect_container
from hutch.api.docker.wire import ContainerBody, UpdateBody
from hutch.engine import Instance
from hutch.errors import AlreadyExists, Busy, HutchError, InvalidArgument, NotFound, WrongState
from hutch.lifecycle import State
from hutch.spec.links import split_link

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.api.docker.requests import Request
    from hutch.engine.results import DiskSize, InstanceInfo

__all__ = ["ROUTES", "find_info", "network_ids", "size_of"]

_FILTERS = frozenset(
    """ancestor before exited expose health id isolation is-task label name network publish
    since status volume""".split()
)
_STAYS = (
    *(State.STARTING, State.RUNNING, State.PAUSED, State.RESTARTING),
    *(State.SUSPENDED, State.MIGRATING),
)
_VALUES: dict[str, Callable[[str], bool]] = {
    "status": frozenset(
        "created restarting running removing paused exited dead".split()
    ).__contains__,
    "health": frozenset("starting healthy unhealthy none".split()).__contains__,
    "exited": lambda value: value.removeprefix("-").isdecimal(),
}


# ---- create -------------------------------------------------------------------------------


async def _create(request: Request) -> Answer:
    body = await request.json(ContainerBody)
    front = request.front
    if not body.image:
        raise ApiError(400, "config cannot be empty in order to create a container")
    options = options_of(body, front.options)
    name = request.query.text("name").removeprefix("/")
    platform = request.query.text("platform")
    command = [body.cmd] if isinstance(body.cmd, str) else body.cmd
    call = functools.partial(
        front.engine.create,
        body.image,
        command or None,
        name=name or None,
        platform=platform or None,
        pull="never",
        **options,
    )
    try:
        instance = await front.call_undoing(call, _discard)
    except NotFound as exc:
        raise _missing(body.image, exc) from exc
    except AlreadyExists as exc:
        raise await _conflict(request, name, exc) from exc
    front.journal.poke()
    return json_reply({"Id": str(instance.id), "Warnings": create_warnings(body)}, 201)


def _missing(image: str, exc: NotFound) -> HutchError:
    """Tell a missing image in the words by which clients know that they have to pull it."""
    if "image" not in exc.message and image not in exc.message:
        # At a 404 clients pull the image and try again: of anything else it must be another.
        return ApiError(400, message_of(exc))
    named = image if ":" in image.rpartition("/")[2] or "@" in image else f"{image}:latest"
    return ApiError(404, f"No such image: {named}")


async def _conflict(request: Request, name: str, exc: AlreadyExists) -> HutchError:
    """Tell a taken name in the words that clients look for."""
    try:
        holder = await request.front.call(request.front.engine.get, name)
    except NotFound:
        return exc
    return ApiError(
        409,
        f'Conflict. The container name "/{name}" is already in use by container '
        f'"{holder.id}". You have to remove (or rename) that container to be able to reuse '
        "that name.",
    )


def _discard(instance: Instance) -> None:
    try:
        instance.remove(force=True, volumes=True)
    except NotFound:
        return


# ---- list ---------------------------------------------------------------------------------


async def _list(request: Request) -> Answer:
    query = request.query
    filters = query.filters()
    limit = query.integer("limit")
    everything = query.flag("all") or limit > 0
    call = request.front.call_slow if query.flag("size") else request.front.call
    return json_reply(
        await call(_summaries, request.front, filters, everything, limit, query.flag("size"))
    )


def _summaries(
    front: Front, filters: dict[str, list[str]], everything: bool, limit: int, size: bool
) -> list[dict[str, Any]]:
    infos = _matching(front, filters, everything)
    if limit > 0:
        infos = infos[:limit]
    ids = network_ids(front)
    return [container_summary(info, size_of(front, info) if size else None, ids) for info in infos]


def _matching(front: Front, filters: dict[str, list[str]], everything: bool) -> list[InstanceInfo]:
    """Return the instances that Docker's filters let through."""
    for key, values in filters.items():
        if key not in _FILTERS:
            raise ApiError(400, f"invalid filter '{key}'")
        known = _VALUES.get(key)
        for value in values:
            if known is not None and not known(value):
                raise ApiError(400, f"invalid filter '{key}={value[:80]}'")
    wanted = {key: values for key, values in filters.items() if values}
    if any(_is_true(value) for value in wanted.pop("is-task", ())):
        return []
    patterns = [_pattern(value) for value in wanted.pop("name", ())]
    for key in ("publish", "expose"):
        if key in wanted:
            wanted[key] = [v if "/" in v else f"{v}/tcp" for v in wanted[key]]
    try:
        infos = front.engine.list(all=everything, filters=wanted)
    except NotFound as exc:
        raise ApiError(404, str(exc).replace("instance", "container")) from exc
    if not patterns:
        return infos
    return [
        info
        for info in infos
        if any(p.search(info.name) or p.search(f"/{info.name}") for p in patterns)
    ]


def _is_true(value: str) -> bool:
    return value.lower() in ("1", "true")


def _pattern(value: str) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except re.error as exc:
        raise ApiError(400, f"invalid filter 'name={value[:80]}': {exc}") from exc


def size_of(front: Front, info: InstanceInfo) -> DiskSize | None:
    """Return what a container takes on disk, None where that cannot be told any more."""
    try:
        return front.engine.get(info.id).disk_size()
    except HutchError:
        return None


def network_ids(front: Front) -> dict[str, str]:
    """Return the identifier of each network by its name."""
    return {network.name: network.id for network in front.engine.networks.list()}


# ---- inspect ------------------------------------------------------------------------------


async def find_info(request: Request) -> InstanceInfo:
    """Return the description of the container that the path names."""
    instance = await find_container(request)
    return await request.front.call(instance.info)


async def _inspect(request: Request) -> Answer:
    instance = await find_container(request)
    size = request.query.flag("size")
    call = request.front.call_slow if size else request.front.call
    return json_reply(await call(_describe, request.front, instance, size))


def _describe(front: Front, instance: Instance, size: bool) -> dict[str, Any]:
    info = instance.info()
    return inspect_container(
        info,
        size=size_of(front, info) if size else None,
        network_ids=network_ids(front),
        execs=front.execs.of(info.id),
        volumes_of_image=_image_volumes(front, info),
        links=_links(front, info),
    )


def _links(front: Front, info: InstanceInfo) -> list[tuple[str, str]]:
    """Return the names of those that a container links to, with what it calls them."""
    found = []
    for link in map(split_link, info.spec.links):
        try:
            found.append((front.engine.get(link.name).name, link.alias))
        except NotFound:
            continue
    return found


def _image_volumes(front: Front, info: InstanceInfo) -> tuple[str, ...]:
    try:
        return front.engine.context.images.get(info.image_id).config.volumes
    except HutchError:
        return ()


# ---- change -------------------------------------------------------------------------------


async def _update(request: Request) -> Answer:
    instance = await find_container(request)
    body = await request.json(UpdateBody)
    options = {k: v for k, v in resource_options(body).items() if v is not None}
    if body.cgroup_parent or body.devices or body.ulimits:
        raise InvalidArgument(
            "cannot be changed after creation", field="CgroupParent, Devices, Ulimits"
        )
    policy = restart_text(body.restart_policy)
    if policy is not None:
        options["restart"] = policy
    await request.front.call(functools.partial(instance.update, **options))
    return json_reply({"Warnings": None})


async def _rename(request: Request) -> Answer:
    instance = await find_container(request)
    name = request.query.text("name").removeprefix("/")
    if not name:
        raise ApiError(400, "Neither old nor new names may be empty")
    try:
        await request.front.call(instance.rename, name)
    except AlreadyExists as exc:
        raise await _conflict(request, name, exc) from exc
    return empty()


# ---- remove -------------------------------------------------------------------------------


async def _remove(request: Request) -> Answer:
    query = request.query
    if query.flag("link"):
        return await _unlink(request)
    instance = await find_container(request)
    info = await request.front.call(instance.info)
    if info.state in (State.RUNNING, State.PAUSED, State.RESTARTING) and not query.flag("force"):
        cure = (
            " and must be unpaused first"
            if info.state == State.PAUSED
            else ": stop the container before removing or force remove"
        )
        raise ApiError(
            409, f'cannot remove container "/{info.name}": container is {info.state}{cure}'
        )
    try:
        await request.front.call_slow(
            functools.partial(instance.remove, force=query.flag("force"), volumes=query.flag("v"))
        )
    finally:
        request.front.journal.poke()
    return empty()


async def _unlink(request: Request) -> Answer:
    """Take a link away: its name is that of the container, and what that calls the other."""
    parent, _, alias = request.params["id"].strip("/").rpartition("/")
    if not parent:
        await find_container(request)
        raise ApiError(500, "Conflict, cannot remove the default link name of the container")
    try:
        instance = await request.front.call(request.front.engine.get, parent)
        await request.front.call_slow(instance.unlink, alias)
    except NotFound:
        raise ApiError(404, f"No such container: {parent}/{alias}") from None
    return empty()


async def _prune(request: Request) -> Answer:
    filters = request.query.filters()
    report = await request.front.call_slow(_pruned, request.front, filters)
    request.front.journal.poke()
    return json_reply(report)


def _pruned(front: Front, filters: dict[str, list[str]]) -> dict[str, Any]:
    spared = Spared(filters)
    wanted = {"label": filters["label"]} if filters.get("label") else {}
    removed = []
    space = 0
    for info in front.engine.list(all=True, filters=wanted):
        if info.state in _STAYS or spared(info.labels, info.created_ns / 1e9):
            continue
        size = size_of(front, info)
        try:
            front.engine.get(info.id).remove()
        except (Busy, NotFound, WrongState):
            continue
        removed.append(info.id)
        space += size.writable if size is not None else 0
    note_prune(front, "container", space)
    return {"ContainersDeleted": removed or None, "SpaceReclaimed": space}


ROUTES = (
    Route(
        method="GET",
        path="/containers/json",
        handler=_list,
        summary="List containers",
        verdict="differs: a machine that is suspended or migrating is shown as exited",
        options={
            "all": "works",
            "limit": "works",
            "size": "works",
            "filters": "works, `is-task` without ever finding any; `ancestor` looks at the "
            "container's own image only",
        },
    ),
    Route(
        method="POST",
        path="/containers/create",
        handler=_create,
        summary="Make a container",
        options={
            "name": "works",
            "platform": "works",
            "Hostname, Domainname, User, Env, Cmd, Entrypoint, WorkingDir": "works",
            "Tty, OpenStdin, StdinOnce": "works",
            "AttachStdin, AttachStdout, AttachStderr": "ignored: whoever attaches says which",
            "ExposedPorts, Labels, StopSignal, StopTimeout, Volumes": "works",
            "Healthcheck": "works",
            "NetworkDisabled, MacAddress": "works",
            "Shell, OnBuild, ArgsEscaped": "ignored: they are an image's",
            "HostConfig.Binds, Mounts, Tmpfs, VolumesFrom": "works; mounts of type image, npipe "
            "and cluster are refused",
            "HostConfig.NetworkMode, PortBindings, PublishAllPorts": "works",
            "HostConfig.Memory, MemorySwap, MemoryReservation, MemorySwappiness": "works",
            "HostConfig.NanoCpus, CpuShares, CpuPeriod, CpuQuota, CpusetCpus, CpusetMems": "works",
            "HostConfig.BlkioWeight, BlkioDeviceReadBps, …WriteBps, …ReadIOps, …WriteIOps": "works",
            "HostConfig.BlkioWeightDevice, CpuRealtimePeriod, CpuRealtimeRuntime": "refused: no "
            "such limits",
            "HostConfig.PidsLimit, OomKillDisable, OomScoreAdj, Ulimits, Sysctls": "works",
            "HostConfig.CgroupParent": "differs: one beneath /docker is passed over with a "
            "warning, others are refused",
            "HostConfig.Cgroup": "refused: groups are the engine's own",
            "HostConfig.Devices, DeviceCgroupRules": "works",
            "HostConfig.DeviceRequests": "works for `cdi` and the capability `gpu`",
            "HostConfig.CapAdd, CapDrop, Privileged, GroupAdd, ReadonlyRootfs": "works",
            "HostConfig.SecurityOpt": "works for seccomp, apparmor, no-new-privileges, "
            "systempaths, label=disable; other labels are refused",
            "HostConfig.MaskedPaths, ReadonlyPaths": "differs: empty lists lift them, others are "
            "refused",
            "HostConfig.IpcMode, PidMode, UTSMode, UsernsMode, CgroupnsMode": "works",
            "HostConfig.RestartPolicy": "differs: what somebody has stopped stays so when the "
            "daemon starts, with `always` too",
            "HostConfig.AutoRemove, Init": "works",
            "HostConfig.LogConfig": "differs: `json-file` and `local` are the same, hutch's own "
            "format; `none`; others are refused",
            "HostConfig.Dns, DnsOptions, DnsSearch, ExtraHosts": "works",
            "HostConfig.Links": "works, also those of EndpointsConfig: lines of `/etc/hosts`, "
            "which follow a restart of the other, and on the default network its ports and "
            "environment",
            "HostConfig.ShmSize, StorageOpt, Annotations": "works",
            "HostConfig.Runtime": "differs: `hutch` (and `runc`, which is the same), `hutch-vm`",
            "HostConfig.Isolation": "differs: `default`, `container`, `vm`, `auto`",
            "HostConfig.VolumeDriver": "works for `local`; others are refused",
            "HostConfig.ContainerIDFile, ConsoleSize": "ignored: the client writes the file, and "
            "resizes the terminal",
            "HostConfig.CpuCount, CpuPercent, IOMaximumIOps, IOMaximumBandwidth": "refused: they "
            "are for Windows",
            "NetworkingConfig.EndpointsConfig": "works for aliases, addresses, MAC and links; "
            "`DriverOpts` and `GwPriority` are ignored",
        },
    ),
    Route(
        method="GET",
        path="/containers/{id}/json",
        handler=_inspect,
        summary="Tell all about a container",
        verdict="differs: told from the specification, so that containers of other front ends "
        "are shown alike; `GraphDriver` has the writable layer only",
        options={"size": "works"},
    ),
    Route(
        method="POST",
        path="/containers/{id}/update",
        handler=_update,
        summary="Change limits and restart policy",
        options={"CgroupParent, Devices, Ulimits": "refused: fixed at creation"},
    ),
    Route(
        method="POST",
        path="/containers/{id}/rename",
        handler=_rename,
        summary="Give a container another name",
        options={"name": "works"},
    ),
    Route(
        method="DELETE",
        path="/containers/{id...}",
        handler=_remove,
        summary="Remove a container",
        options={"force": "works", "v": "works", "link": "works"},
    ),
    Route(
        method="POST",
        path="/containers/prune",
        handler=_prune,
        summary="Remove the containers that do not run",
        since=(1, 25),
        verdict="differs: machines that are suspended or migrating stay",
        options={"filters": "works"},
    ),
)
