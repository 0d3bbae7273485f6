"""Images: listed, inspected, named, removed, pruned, searched."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.api.docker.errors import ApiError
from hutch.api.docker.pruning import note_prune
from hutch.api.docker.replies import Answer, empty, json_reply
from hutch.api.docker.routing import Route
from hutch.decoding import decode_json
from hutch.errors import Busy, HutchError, InvalidArgument, NotFound
from hutch.image.selection import created_at
from hutch.oci.reference import parse

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.api.docker.requests import Request
    from hutch.api.docker.routing import Version
    from hutch.image.records import ImageRecord

__all__ = ["ROUTES", "find_image", "image_summary", "no_such_image", "shared_sizes"]

_NO_NAME = "<none>:<none>"
_NO_DIGEST = "<none>@<none>"


def no_such_image(name: str) -> ApiError:
    """Return Docker's error for an image that is not there."""
    bare = name.removeprefix("sha256:")
    is_id = len(bare) == 64 and "/" not in bare
    named = name if is_id or ":" in name.rpartition("/")[2] or "@" in name else f"{name}:latest"
    return ApiError(404, f"No such image: {named}")


def find_image(front: Front, name: str) -> ImageRecord:
    """Return the image that a request names."""
    try:
        return front.engine.images.get(name)
    except NotFound:
        raise no_such_image(name) from None
    except InvalidArgument as exc:
        raise ApiError(400, f"invalid reference format: {exc}") from None


def _tags(record: ImageRecord) -> list[str]:
    return [parse(name).familiar() for name in record.names]


def _digests(record: ImageRecord) -> list[str]:
    return [parse(name).familiar() for name in record.repo_digests]


# ---- list ---------------------------------------------------------------------------------


async def _list(request: Request) -> Answer:
    query = request.query
    filters = query.filters()
    if (name := query.text("filter")) and request.version < (1, 41):
        filters.setdefault("reference", []).append(name)
    call = functools.partial(
        _summaries, request.front, filters, query.flag("shared-size"), request.version
    )
    return json_reply(await request.front.call(call))


def _summaries(
    front: Front, filters: dict[str, list[str]], shared: bool, version: Version
) -> list[dict[str, Any]]:
    for name in (*filters.get("before", ()), *filters.get("since", ())):
        find_image(front, name)
    records = front.engine.images.list(filters)
    sizes = shared_sizes(front.engine.images.list()) if shared else {}
    return [
        image_summary(record, version=version, shared=sizes.get(record.id, -1))
        for record in records
    ]


def image_summary(
    record: ImageRecord, *, version: Version, shared: int = -1, containers: int = -1
) -> dict[str, Any]:
    """Return an entry of the list of images."""
    tags, digests = _tags(record), _digests(record)
    if version < (1, 43) and not tags:
        tags, digests = [_NO_NAME], digests or [_NO_DIGEST]
    found: dict[str, Any] = {
        "Id": record.id,
        "ParentId": "",
        "RepoTags": tags,
        "RepoDigests": digests,
        "Created": int(created_at(record)),
        "Size": record.size,
        "SharedSize": shared,
        "Labels": record.config.labels or None,
        "Containers": containers,
    }
    if version < (1, 44):
        found["VirtualSize"] = record.size
    return found


def shared_sizes(records: list[ImageRecord]) -> dict[str, int]:
    """Return, by image, the bytes of its layers that other images have too."""
    owners: dict[str, int] = {}
    for record in records:
        for chain_id in record.chain_ids:
            owners[chain_id] = owners.get(chain_id, 0) + 1
    return {
        record.id: sum(layer.unpacked_size for layer in record.layers if owners[layer.chain_id] > 1)
        for record in records
    }


# ---- inspect ------------------------------------------------------------------------------


async def _inspect(request: Request) -> Answer:
    if request.query.flag("manifests") and request.query.text("platform"):
        raise ApiError(
            400, "conflicting options: manifests and platform options cannot both be set"
        )
    return json_reply(
        await request.front.call(_describe, request.front, request.params["name"], request.version)
    )


def _describe(front: Front, name: str, version: Version) -> dict[str, Any]:
    record = find_image(front, name)
    made = decode_json(front.engine.images.config(record.id), dict[str, Any])
    found: dict[str, Any] = {
        "Id": record.id,
        "RepoTags": _tags(record),
        "RepoDigests": _digests(record),
        "Parent": "",
        "Comment": record.comment or (record.history[-1].comment if record.history else ""),
        "Created": record.created or "0001-01-01T00:00:00Z",
        "DockerVersion": str(made.get("docker_version", "")),
        "Author": record.author,
        "Config": _config(made.get("config"), version),
        "Architecture": record.architecture,
        "Os": record.os,
        "Size": record.size,
        "GraphDriver": {"Name": "overlay2", "Data": _places(front, record)},
        "RootFS": {"Type": "layers", "Layers": [layer.diff_id for layer in record.layers]},
        "Metadata": {"LastTagTime": _moment(record.tagged_at)},
    }
    if record.variant:
        found["Variant"] = record.variant
    if version < (1, 44):
        found["VirtualSize"] = record.size
    return found


def _moment(seconds: float) -> str:
    from hutch.api.docker.times import timestamp

    return timestamp(int(seconds * 1e9))


def _config(given: Any, version: Version) -> dict[str, Any]:
    """Return the configuration; before 1.50 with all the fields that mean nothing in it."""
    config = dict(given) if isinstance(given, dict) else {}
    always: dict[str, Any] = {
        "User": "",
        "Env": None,
        "Cmd": None,
        "Volumes": None,
        "WorkingDir": "",
        "Entrypoint": None,
        "OnBuild": None,
        "Labels": None,
    }
    if version < (1, 50):
        always |= {
            "Hostname": "",
            "Domainname": "",
            "AttachStdin": False,
            "AttachStdout": False,
            "AttachStderr": False,
            "Tty": False,
            "OpenStdin": False,
            "StdinOnce": False,
            "Image": "",
        }
    return always | config


def _places(front: Front, record: ImageRecord) -> dict[str, str] | None:
    layers = front.engine.context.layers
    try:
        paths = [str(layers.path(chain_id)) for chain_id in reversed(record.chain_ids)]
    except HutchError:
        return None
    if not paths:
        return None
    return {"UpperDir": paths[0], "LowerDir": ":".join(paths[1:])}


async def _history(request: Request) -> Answer:
    record = await request.front.call(find_image, request.front, request.params["name"])
    steps = []
    for step in reversed(record.history):
        size = record.layers[step.layer].unpacked_size if step.layer >= 0 else 0
        steps.append(
            {
                "Id": "<missing>",
                "Created": int(created_at(msgspec.structs.replace(record, created=step.created))),
                "CreatedBy": step.created_by,
                "Tags": None,
                "Size": size,
                "Comment": step.comment,
            }
        )
    if steps:
        steps[0] |= {"Id": record.id, "Tags": _tags(record) or None}
    return json_reply(steps)


# ---- names and removal --------------------------------------------------------------------


async def _tag(request: Request) -> Answer:
    repository, tag = request.query.text("repo"), request.query.text("tag")
    if not repository:
        raise ApiError(400, "invalid reference format: repo is empty")
    front = request.front
    source = (await front.call(find_image, front, request.params["name"])).id
    try:
        target = parse(repository)
        if target.digest is not None:
            raise ApiError(400, "refusing to create a tag with a digest reference")
        if tag:
            target = target.with_tag(tag)
    except InvalidArgument as exc:
        raise ApiError(400, f"invalid reference format: {exc}") from None
    await front.call(front.engine.images.tag, source, target.canonical())
    return empty(201)


async def _remove(request: Request) -> Answer:
    call = functools.partial(
        _delete, request.front, request.params["name"], request.query.flag("force")
    )
    return json_reply(await request.front.call_slow(call))


def _delete(front: Front, name: str, force: bool) -> list[dict[str, str]]:
    record = find_image(front, name)
    try:
        removed = front.engine.images.remove(name, force=force)
    except NotFound:
        raise no_such_image(name) from None
    except Busy as exc:
        raise ApiError(409, _conflict(front, record, name, exc, force=force)) from None
    told = [{"Untagged": text} for text in removed.untagged]
    told += [{"Deleted": text} for text in removed.deleted]
    if removed.deleted:
        kept = {chain for other in front.engine.images.list() for chain in other.chain_ids}
        told += [{"Deleted": chain} for chain in reversed(record.chain_ids) if chain not in kept]
    return told


def _conflict(front: Front, record: ImageRecord, name: str, exc: Busy, *, force: bool) -> str:
    """Tell in Docker's words who stands in the way."""
    users = front.engine.images.users(record.id)
    short = record.id.removeprefix("sha256:")[:12]
    by_id = record.id.removeprefix("sha256:").startswith(name.removeprefix("sha256:"))
    if by_id and len({parse(n).name for n in record.names}) > 1:
        return (
            f"conflict: unable to delete {short} (must be forced) - image is referenced in "
            "multiple repositories"
        )
    if not users:
        return f"conflict: {exc.message}"
    running = next((user for user in users if user.running), None)
    who = (running or users[0]).name
    if not by_id and not force:
        return (
            f'conflict: unable to remove repository reference "{name}" (must force) - container '
            f"{users[0].name} is using its referenced image {short}"
        )
    if running is not None:
        return (
            f"conflict: unable to delete {name} (cannot be forced) - image is being used by "
            f"running container {who}"
        )
    return (
        f"conflict: unable to delete {short} (must be forced) - image is being used by "
        f"stopped container {who}"
    )


async def _prune(request: Request) -> Answer:
    filters = request.query.filters()
    return json_reply(await request.front.call_slow(_pruned, request.front, filters))


def _pruned(front: Front, filters: dict[str, list[str]]) -> dict[str, Any]:
    dangling = filters.pop("dangling", ["true"])
    for key in filters:
        if key not in ("until", "label", "label!"):
            raise ApiError(400, f"invalid filter '{key}'")
    every = any(value.lower() in ("0", "false") for value in dangling)
    pruned = front.engine.images.prune(all_images=every, filters=filters)
    told = [{"Untagged": text} for text in pruned.untagged]
    told += [{"Deleted": text} for text in pruned.deleted]
    note_prune(front, "image", pruned.reclaimed)
    return {"ImagesDeleted": told or None, "SpaceReclaimed": pruned.reclaimed}


# ---- search -------------------------------------------------------------------------------


async def _search(request: Request) -> Answer:
    term = request.query.text("term")
    if not term:
        raise ApiError(400, "search term is empty")
    limit = request.query.integer("limit", 25) or 25
    if not 1 <= limit <= 100:
        raise ApiError(400, f"Limit {limit} is outside the range of [1, 100]")
    filters = request.query.filters()
    for key in filters:
        if key not in ("is-automated", "is-official", "stars"):
            raise ApiError(400, f"invalid filter '{key}'")
    call = functools.partial(request.front.engine.images.search, term, limit=limit)
    found = await request.front.call_slow(call)
    stars = max((int(v) for v in filters.get("stars", ()) if v.isdigit()), default=0)
    official = filters.get("is-official", [])
    automated = filters.get("is-automated", [])
    return json_reply(
        [
            one
            for one in found
            if one.star_count >= stars
            and all((value in ("1", "true")) == one.is_official for value in official)
            and all((value in ("1", "true")) == one.is_automated for value in automated)
        ]
    )


_FILTERS = "works: dangling, label, label!, before, since, until, reference"
ROUTES = (
    Route(
        method="GET",
        path="/images/json",
        handler=_list,
        summary="List images",
        options={
            "all": "ignored: there are no images in between",
            "filters": _FILTERS,
            "shared-size": "works",
            "digests": "ignored: digests are always told",
            "manifests": "ignored, as by Docker without the containerd image store",
        },
    ),
    Route(
        method="GET",
        path="/images/search",
        handler=_search,
        summary="Search Docker Hub, or a registry that the term begins with",
        verdict="differs: of a registry without search the names that it lists are looked through",
        options={"term": "works", "limit": "works", "filters": "works"},
    ),
    Route(
        method="POST",
        path="/images/prune",
        handler=_prune,
        summary="Remove images that no container uses",
        verdict="differs: blobs and layers that nothing needs are freed and counted too",
        options={"filters": "works: dangling, label, label!, until"},
        since=(1, 25),
    ),
    Route(
        method="GET",
        path="/images/{name...}/json",
        handler=_inspect,
        summary="Describe an image",
        options={
            "platform": "ignored: an image here is for one platform",
            "manifests": "ignored, as by Docker without the containerd image store",
        },
    ),
    Route(
        method="GET",
        path="/images/{name...}/history",
        handler=_history,
        summary="Tell the steps an image came from",
        options={"platform": "ignored: an image here is for one platform"},
    ),
    Route(
        method="POST",
        path="/images/{name...}/tag",
        handler=_tag,
        summary="Give an image another name",
        options={"repo": "works", "tag": "works"},
    ),
    Route(
        method="DELETE",
        path="/images/{name...}",
        handler=_remove,
        summary="Take a name away, and the image with its last one",
        options={
            "force": "works",
            "noprune": "ignored: there are no images in between",
            "platforms": "ignored: an image here is for one platform",
        },
    ),
)
