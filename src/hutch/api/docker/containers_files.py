"""Containers' files: copied in and out as tar archives, differences, export, commit."""

from __future__ import annotations

import base64
import functools
import os
import stat as modes
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.api.docker.errors import ApiError
from hutch.api.docker.naming import find_container
from hutch.api.docker.replies import Answer, Reply, Stream, encode, json_reply
from hutch.api.docker.routing import Route
from hutch.api.docker.times import timestamp
from hutch.api.docker.wire import ContainerBody
from hutch.drivers.users import resolve_user
from hutch.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hutch.api.docker.requests import Request
    from hutch.engine import Instance
    from hutch.storage.tree import Stat

__all__ = ["ROUTES", "go_mode"]

# Go's os.FileMode has the kind of a file in its own bits.
_GO_KINDS = (
    (modes.S_ISDIR, 1 << 31),
    (modes.S_ISLNK, 1 << 27),
    (modes.S_ISBLK, 1 << 26),
    (modes.S_ISCHR, 1 << 26 | 1 << 21),
    (modes.S_ISFIFO, 1 << 25),
    (modes.S_ISSOCK, 1 << 24),
)
_GO_BITS = ((modes.S_ISUID, 1 << 23), (modes.S_ISGID, 1 << 22), (modes.S_ISVTX, 1 << 20))
_KINDS = {"C": 0, "A": 1, "D": 2}
_MAX_USERS = 1 << 20


def go_mode(mode: int) -> int:
    """Return st_mode as Go's os.FileMode."""
    found = mode & 0o777
    for is_kind, bit in _GO_KINDS:
        if is_kind(mode):
            found |= bit
    for bit, go_bit in _GO_BITS:
        if mode & bit:
            found |= go_bit
    return found


# ---- archive ------------------------------------------------------------------------------


def _path_of(request: Request) -> str:
    path = request.query.text("path")
    if not path:
        raise ApiError(400, "path cannot be empty")
    if "\0" in path:
        raise ApiError(400, "path has a zero byte")
    return "/" + path.lstrip("/")


def _base(path: str) -> str:
    """Return what the top entry of an archive of a path is called: as clients expect it,
    `.` for the contents of a directory."""
    return path.rstrip("/").rpartition("/")[2] or "."


def _stat_header(found: Stat, path: str) -> dict[str, str]:
    name = _base(path)
    told = {
        "name": "/" if path.strip("/") == "" else name,
        "size": found.size,
        "mode": go_mode(found.mode),
        "mtime": timestamp(found.mtime_ns),
        "linkTarget": _target(found, path),
    }
    return {"X-Docker-Container-Path-Stat": base64.b64encode(encode(told)).decode()}


def _target(found: Stat, path: str) -> str:
    """Return where a link leads, as a path inside; clients follow it by asking again."""
    if not found.link_target:
        return ""
    beside = os.path.dirname(path.rstrip("/"))
    return os.path.normpath(os.path.join(beside, found.link_target))


def _follows(path: str) -> bool:
    return path.endswith(("/", "/."))


def _find(instance: Instance, path: str) -> Stat:
    try:
        return instance.files.stat(path, follow=_follows(path))
    except NotFound:
        raise _not_there(instance, path) from None


def _not_there(instance: Instance, path: str) -> ApiError:
    return ApiError(404, f"Could not find the file {path} in container {instance.name}")


async def _stat_path(request: Request) -> Answer:
    instance = await find_container(request)
    path = _path_of(request)
    found = await request.front.call_slow(_find, instance, path)
    return Reply(200, headers=_stat_header(found, path))


async def _copy_out(request: Request) -> Answer:
    instance = await find_container(request)
    path = _path_of(request)
    found = await request.front.call_slow(_find, instance, path)

    request.front.note(instance, "archive-path")

    def pack() -> Iterator[bytes]:
        return instance.files.packed(path, follow=_follows(path), name=_base(path))

    return Stream(
        request.front.stream(pack), "application/x-tar", headers=_stat_header(found, path)
    )


async def _copy_in(request: Request) -> Answer:
    instance = await find_container(request)
    path = _path_of(request)
    owned = request.query.flag("copyUIDGID")
    await request.front.call_slow(_unpack, instance, path, request.body_file(), owned)
    request.front.note(instance, "extract-to-dir")
    return Reply(200)


def _unpack(instance: Instance, path: str, body: object, owned: bool) -> None:
    try:
        found = instance.files.stat(path if path.endswith("/") else path + "/", follow=True)
    except NotFound:
        raise _not_there(instance, path) from None
    except InvalidArgument:
        raise ApiError(400, "extraction point is not a directory") from None
    if not found.is_dir:
        raise ApiError(400, "extraction point is not a directory")
    instance.files.copy_in_tar(path, body, owner=_owner(instance) if owned else None)


def _owner(instance: Instance) -> tuple[int, int] | None:
    """Return who the container's program runs as, None for the superuser."""
    user = instance.info().spec.process.user
    if not user:
        return None

    def read(path: str) -> bytes | None:
        try:
            return instance.files.read(path, limit=_MAX_USERS)
        except NotFound:
            return None

    found = resolve_user(user, (), read, field="copyUIDGID")
    return found.uid, found.gid


# ---- the whole ------------------------------------------------------------------------------


async def _changes(request: Request) -> Answer:
    instance = await find_container(request)
    found = await request.front.call_slow(instance.diff)
    return json_reply([{"Path": c.path, "Kind": _KINDS.get(c.kind, 0)} for c in found] or None)


async def _export(request: Request) -> Answer:
    instance = await find_container(request)
    request.front.note(instance, "export")
    return Stream(request.front.stream(instance.export), "application/x-tar")


async def _commit(request: Request) -> Answer:
    query = request.query
    if not query.text("container"):
        raise ApiError(400, "container is missing")
    instance = await find_container(request, query.text("container"))
    body = await request.optional_json(ContainerBody)
    repository, tag = query.text("repo"), query.text("tag")
    reference = f"{repository}:{tag}" if repository and tag else repository
    changes = [line for text in query.texts("changes") for line in text.splitlines()]
    made = await request.front.call_slow(
        functools.partial(
            instance.commit,
            reference or None,
            author=query.text("author"),
            message=query.text("comment"),
            changes=[*_instructions(body), *changes],
            pause=query.flag("pause", True),
        )
    )
    request.front.note(instance, "commit", comment=query.text("comment"), imageID=made.id)
    return json_reply({"Id": made.id}, 201)


def _instructions(body: ContainerBody | None) -> list[str]:
    """Return the configuration that a client sends along as instructions."""
    if body is None:
        return []
    found: list[str] = []
    for name, words in (("ENTRYPOINT", body.entrypoint), ("CMD", body.cmd)):
        if words:
            found.append(f"{name} {_json([words] if isinstance(words, str) else words)}")
    for name, text in (
        ("USER", body.user),
        ("WORKDIR", body.working_dir),
        ("STOPSIGNAL", body.stop_signal),
    ):
        if text:
            found.append(f"{name} {text}")
    for entry in body.env or ():
        key, _, value = entry.partition("=")
        found.append(f"ENV {key}={_json(value)}")
    found += [f"LABEL {_json(k)}={_json(v)}" for k, v in (body.labels or {}).items()]
    found += [f"EXPOSE {port}" for port in body.exposed_ports or ()]
    if body.volumes:
        found.append(f"VOLUME {_json(list(body.volumes))}")
    return found


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


ROUTES = (
    Route(
        method="HEAD",
        path="/containers/{id}/archive",
        handler=_stat_path,
        summary="Tell what a path in a container is",
        options={"path": "works"},
    ),
    Route(
        method="GET",
        path="/containers/{id}/archive",
        handler=_copy_out,
        summary="Read files of a container as a tar archive",
        options={"path": "works"},
    ),
    Route(
        method="PUT",
        path="/containers/{id}/archive",
        handler=_copy_in,
        summary="Unpack a tar archive, compressed or not, in a container",
        options={
            "path": "works",
            "noOverwriteDirNonDir": "differs: it is always so, as clients ask for it",
            "copyUIDGID": "works",
        },
    ),
    Route(
        method="GET",
        path="/containers/{id}/changes",
        handler=_changes,
        summary="List what differs from the image",
    ),
    Route(
        method="GET",
        path="/containers/{id}/export",
        handler=_export,
        summary="Read a container's whole file system as a tar archive",
    ),
    Route(
        method="POST",
        path="/commit",
        handler=_commit,
        summary="Make an image of a container",
        options={
            "container, repo, tag, comment, author, pause, changes": "works",
            "the configuration in the body": "works for entry point, command, environment, user, "
            "directory, labels, ports, volumes, stop signal; the rest is ignored",
        },
    ),
)
