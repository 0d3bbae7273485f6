"""Images that come and go: pull, import, push, save, load; what a registry says of one; login."""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import msgspec

from hutch.api.docker.errors import ApiError, message_of
from hutch.api.docker.images import find_image
from hutch.api.docker.pipes import written
from hutch.api.docker.replies import Answer, Stream, encode, json_reply
from hutch.api.docker.routing import Route
from hutch.api.docker.telling import Teller, tell_work
from hutch.api.docker.wire import Wire
from hutch.errors import Denied, IntegrityError, InvalidArgument, NotFound, Unavailable
from hutch.image.registry_config import Credentials
from hutch.image.transport import Cancelled
from hutch.oci.reference import DEFAULT_DOMAIN, Reference, parse
from hutch.storage.scratch import scratch_directory

if TYPE_CHECKING:
    from typing import BinaryIO

    from hutch.api.docker.front import Front
    from hutch.api.docker.requests import Request
    from hutch.image.records import ImageRecord
    from hutch.records import ProgressEvent

__all__ = ["ROUTES", "registry_credentials"]

_HUB = ("index.docker.io", "registry-1.docker.io", "docker.io")


# ---- credentials --------------------------------------------------------------------------


def registry_credentials(given: dict[str, object]) -> Credentials | None:
    """Return the credentials of Docker's AuthConfig; None where it holds none."""
    values = {key.lower(): value for key, value in given.items() if isinstance(value, str)}
    username, password = values.get("username", ""), values.get("password", "")
    if not username and values.get("auth"):
        with suppress(binascii.Error, ValueError):
            text = base64.b64decode(values["auth"], validate=True).decode()
            username, _, password = text.partition(":")
    found = Credentials(
        username=username,
        password=password,
        identity_token=values.get("identitytoken", ""),
        registry_token=values.get("registrytoken", ""),
    )
    return found if found != Credentials() else None


def _given(request: Request) -> Credentials | None:
    return registry_credentials(request.auth_config())


def _reference(text: str, tag: str = "") -> Reference:
    """Return the reference of a name and, apart from it, a tag or a digest."""
    try:
        found = parse(text)
        if tag.startswith(("sha256:", "sha512:")):
            return found.with_digest(tag)
        return found.with_tag(tag) if tag else found
    except InvalidArgument as exc:
        raise ApiError(400, f"invalid reference format: {exc}") from None


class AuthBody(Wire, frozen=True, kw_only=True, rename="lower"):
    """What `docker login` sends."""

    username: str = ""
    password: str = ""
    serveraddress: str = ""
    identitytoken: str = ""
    registrytoken: str = ""
    auth: str = ""

    def __repr__(self) -> str:
        return f"AuthBody(username={self.username!r}, …)"


async def _auth(request: Request) -> Answer:
    body = await request.json(AuthBody)
    host = body.serveraddress.partition("://")[2] or body.serveraddress
    host = host.partition("/")[0] or DEFAULT_DOMAIN
    registry = DEFAULT_DOMAIN if host in _HUB else host
    credentials = registry_credentials(msgspec.structs.asdict(body))
    if credentials is None:
        raise ApiError(400, "no username given")
    call = functools.partial(request.front.engine.images.check_login, registry, credentials)
    try:
        await request.front.call_slow(call)
    except Denied as exc:
        raise ApiError(401, f"Get https://{registry}/v2/: unauthorized: {exc.message}") from None
    return json_reply({"Status": "Login Succeeded", "IdentityToken": ""})


# ---- pull and import ----------------------------------------------------------------------


async def _create(request: Request) -> Answer:
    query = request.query
    if query.text("fromSrc"):
        return await _import(request)
    if not query.text("fromImage"):
        raise ApiError(400, "neither fromImage nor fromSrc is given")
    await request.read()
    name, tag = query.text("fromImage"), query.text("tag")
    wanted = _reference(name, tag)
    every = not tag and wanted.digest is None and ":" not in name.rpartition("/")[2]
    platform = query.text("platform") or None
    front, credentials = request.front, _given(request)

    def work(teller: Teller) -> None:
        references = [wanted]
        if every:
            call = front.engine.images.remote_tags
            tags = call(wanted.canonical(), credentials=credentials)
            references = [wanted.with_tag(tag) for tag in tags]
        for reference in references:
            _pull(front, reference, platform, credentials, teller)

    try:
        return await tell_work(front, work)
    except Denied as exc:
        raise ApiError(404, _denied(wanted, exc)) from None
    except NotFound as exc:
        raise ApiError(404, _unknown(wanted, exc)) from None


def _denied(wanted: Reference, exc: Denied) -> str:
    return (
        f"pull access denied for {wanted.familiar_name()}, repository does not exist or may "
        f"require 'docker login': denied: {exc.message}"
    )


def _unknown(wanted: Reference, exc: NotFound) -> str:
    if exc.message.startswith("manifest "):
        return f"manifest for {wanted.familiar()} not found: manifest unknown: {exc.message}"
    return str(exc)


_PULLING = {
    "waiting": "Waiting",
    "retrying": "Retrying",
    "extracting": "Extracting",
    "downloading": "Downloading",
    "exists": "Already exists",
    "done": "Pull complete",
}


def _pull(
    front: Front,
    reference: Reference,
    platform: str | None,
    credentials: Credentials | None,
    teller: Teller,
) -> None:
    begun = False

    def begin() -> None:
        nonlocal begun
        if not begun:
            begun = True
            teller.tell(
                {
                    "status": f"Pulling from {reference.path}",
                    "id": reference.digest or reference.tag or "latest",
                }
            )

    def progress(event: ProgressEvent) -> None:
        status = _PULLING.get(event.phase)
        if status is None or ":" not in event.item or "/" in event.item:
            return
        begin()
        _tell_blob(teller, event, status)

    done = front.engine.images.pull(
        reference.canonical(),
        platform=platform,
        credentials=credentials,
        stop=teller.stop,
        progress=progress,
    )
    begin()
    teller.tell({"status": f"Digest: {done.digest}"})
    said = "Downloaded newer image for" if done.changed else "Image is up to date for"
    teller.tell({"status": f"Status: {said} {reference.familiar()}"})


def _tell_blob(teller: Teller, event: ProgressEvent, status: str) -> None:
    moving = event.phase in ("downloading", "uploading", "extracting")
    detail = {"current": event.done, "total": event.total} if moving and event.total else {}
    teller.tell(
        {
            "status": status,
            "progressDetail": detail,
            "id": event.item.partition(":")[2][:12],
        },
        counts=moving,
    )


async def _import(request: Request) -> Answer:
    query, front = request.query, request.front
    source = query.text("fromSrc")
    reference = None
    if query.text("repo"):
        reference = _reference(query.text("repo"), query.text("tag")).canonical()
    make = functools.partial(
        front.engine.images.import_,
        reference=reference,
        changes=query.texts("changes"),
        message=query.text("message"),
        platform=query.text("platform") or None,
    )
    if source == "-":
        record = await front.call_slow(make, _body(request))
        return _lines([{"status": record.id}])
    url = _address(source)
    await request.read()
    return await tell_work(front, lambda teller: _import_from(front, url, make, teller))


def _address(source: str) -> str:
    """Return what an image is to be made from as a URL; without a scheme it is HTTP, as in
    Docker."""
    url = source if "://" in source else f"http://{source}"
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https") or not rest.strip("/"):
        raise ApiError(
            400, f"fromSrc: {source[:80]!r}: expected `-`, or an address by http or https"
        )
    return url


def _import_from(
    front: Front, url: str, make: Callable[[str], ImageRecord], teller: Teller
) -> None:
    """Download an archive, and make an image of it; nothing of it stays."""
    from hutch.engine.builder.fetching import download, shown_url

    def check() -> None:
        if teller.stop.is_set():
            raise Cancelled("the client has left")

    teller.tell({"status": f"Downloading from {shown_url(url)}"})
    context = front.engine.context
    with scratch_directory(context.root, context.trash, purpose="import") as directory:
        name = download(check, url, str(directory))
        record = make(f"{directory}/{name}")
    teller.tell({"status": record.id})


def _body(request: Request) -> BinaryIO:
    return cast("BinaryIO", request.body_file())  # `read` is all that is used of it


# ---- push ---------------------------------------------------------------------------------


_PUSHING = {
    "preparing": "Preparing",
    "uploading": "Pushing",
    "pushed": "Pushed",
    "exists": "Layer already exists",
    "mounted": "Mounted",
}


async def _push(request: Request) -> Answer:
    await request.read()
    front, credentials = request.front, _given(request)
    wanted = _reference(request.params["name"], request.query.text("tag"))
    if wanted.digest is not None:
        raise ApiError(400, "cannot push a digest reference")
    tagged = request.query.text("tag") or ":" in request.params["name"].rpartition("/")[2]
    references = [wanted] if tagged else await front.call(_tags_of, front, wanted)
    if tagged:
        try:
            await front.call(front.engine.images.get, wanted.canonical())
        except NotFound:
            references = []
    if not references:
        raise ApiError(
            404,
            f"An image does not exist locally with the tag: {wanted.familiar_name()}",
        )

    def work(teller: Teller) -> None:
        teller.tell({"status": f"The push refers to repository [{wanted.name}]"})
        for reference in references:
            _push_one(front, reference, credentials, teller)

    return await tell_work(front, work)


def _tags_of(front: Front, wanted: Reference) -> list[Reference]:
    names = [name for record in front.engine.images.list() for name in record.names]
    found = [parse(name) for name in names]
    return sorted((one for one in found if one.name == wanted.name), key=lambda r: r.tag or "")


def _push_one(
    front: Front, reference: Reference, credentials: Credentials | None, teller: Teller
) -> None:
    layers = {layer.digest for layer in front.engine.images.get(reference.canonical()).layers}

    def progress(event: ProgressEvent) -> None:
        status = _PUSHING.get(event.phase)
        if status is not None and event.item in layers:
            _tell_blob(teller, event, status)

    done = front.engine.images.push(
        reference.canonical(), credentials=credentials, stop=teller.stop, progress=progress
    )
    teller.tell({"status": f"{reference.tag}: digest: {done.digest} size: {done.size}"})
    aux = {"Tag": reference.tag, "Digest": done.digest, "Size": done.size}
    teller.tell({"progressDetail": {}, "aux": aux})


# ---- save and load ------------------------------------------------------------------------


async def _save(request: Request) -> Answer:
    if "name" in request.params:
        names = [request.params["name"]]
    else:
        names = [name for text in request.query.texts("names") for name in text.split(",")]
    if not names:
        raise ApiError(400, "no image names given")
    front = request.front
    wanted = await front.call(_names_to_save, front, names)

    def write(target: BinaryIO) -> None:
        front.engine.images.save(wanted, target)

    def make() -> Iterator[bytes]:
        return written(write)

    return Stream(front.stream(make), content_type="application/x-tar")


def _names_to_save(front: Front, names: list[str]) -> list[str]:
    """Return what to save: a repository without a tag stands for all its tags, as in Docker."""
    found: list[str] = []
    for name in names:
        reference = None
        with suppress(InvalidArgument):
            reference = parse(name)
        tagged = ":" in name.rpartition("/")[2] or "@" in name
        if reference is not None and not tagged:
            several = [one.canonical() for one in _tags_of(front, reference)]
            if several:
                found += several
                continue
        find_image(front, name)
        found.append(name)
    return list(dict.fromkeys(found))


async def _load(request: Request) -> Answer:
    front = request.front
    told: list[dict[str, Any]] = []
    quiet = request.query.flag("quiet")

    def progress(event: ProgressEvent) -> None:
        if event.phase == "loaded":
            kind = "image ID" if event.item.startswith("sha256:") else "image"
            told.append({"stream": f"Loaded {kind}: {_familiar(event.item)}\n"})

    call = functools.partial(front.engine.images.load, _body(request), progress=progress)
    try:
        records = await front.call_slow(call)
    except IntegrityError as exc:
        raise ApiError(400, message_of(exc)) from None
    if not told:
        told = [{"stream": f"Loaded image ID: {record.id}\n"} for record in records]
    if not quiet:
        told = [*_loaded_layers(records), *told]
    return _lines(told)


def _lines(told: list[dict[str, Any]]) -> Stream:
    """Answer in chunks, by which clients know that it is several lines of JSON."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"".join(encode(line) + b"\r\n" for line in told)

    return Stream(chunks(), content_type="application/json")


def _loaded_layers(records: list[ImageRecord]) -> list[dict[str, Any]]:
    layers = {layer.diff_id: layer for record in records for layer in record.layers}
    return [
        {
            "status": "Loading layer",
            "progressDetail": {"current": layer.size, "total": layer.size},
            "id": diff_id.partition(":")[2][:12],
        }
        for diff_id, layer in layers.items()
    ]


def _familiar(name: str) -> str:
    return name if name.startswith("sha256:") else parse(name).familiar()


# ---- what a registry says -----------------------------------------------------------------


async def _distribution(request: Request) -> Answer:
    wanted = _reference(request.params["name"])
    front = request.front
    call = functools.partial(
        front.engine.images.remote, wanted.canonical(), credentials=_given(request)
    )
    try:
        found = await front.call_slow(call)
    except Denied as exc:
        raise ApiError(401, f"unauthorized: {exc.message}") from None
    except NotFound as exc:
        raise ApiError(404, f"manifest unknown: {exc.message}") from None
    except Unavailable as exc:
        raise ApiError(500, exc.message) from None
    return json_reply(
        {
            "Descriptor": {
                "mediaType": found.media_type,
                "digest": found.digest,
                "size": found.size,
            },
            "Platforms": [_platform(p.os, p.architecture, p.variant) for p in found.platforms],
        }
    )


def _platform(system: str, architecture: str, variant: str) -> dict[str, str]:
    found = {"architecture": architecture, "os": system}
    return found | {"variant": variant} if variant else found


_CREDENTIALS = "works; without it the daemon's own configured credentials are used"
_SAVED = "differs: the archive is an OCI layout too"
ROUTES = (
    Route(
        method="POST",
        path="/images/create",
        handler=_create,
        summary="Pull an image, or import one from a tar archive",
        options={
            "fromImage": "works",
            "tag": "works; without any, all tags are pulled",
            "platform": "works",
            "fromSrc": "works: `-`, the body, or an address by http or https",
            "repo": "works",
            "message": "works",
            "changes": "works",
            "X-Registry-Auth": _CREDENTIALS,
        },
    ),
    Route(
        method="POST",
        path="/images/load",
        handler=_load,
        summary="Load images from an archive",
        verdict="differs: what is told comes at the end; OCI layouts are loaded too",
        options={"quiet": "works", "platform": "ignored: that of this host is taken"},
    ),
    Route(
        method="GET",
        path="/images/get",
        handler=_save,
        summary="Save several images as one archive",
        verdict=_SAVED,
        options={"names": "works", "platform": "ignored: an image here is for one platform"},
    ),
    Route(
        method="GET",
        path="/images/{name...}/get",
        handler=_save,
        summary="Save an image as an archive",
        verdict=_SAVED,
        options={"platform": "ignored: an image here is for one platform"},
    ),
    Route(
        method="POST",
        path="/images/{name...}/push",
        handler=_push,
        summary="Push an image to its registry",
        verdict="differs: layers go as they came or were made, not compressed anew",
        options={
            "tag": "works; without it all tags are pushed",
            "platform": "ignored: an image here is for one platform",
            "X-Registry-Auth": _CREDENTIALS,
        },
    ),
    Route(
        method="GET",
        path="/distribution/{name...}/json",
        handler=_distribution,
        summary="Tell what a registry has under a name, without pulling it",
        since=(1, 30),
        options={"X-Registry-Auth": _CREDENTIALS},
    ),
    Route(
        method="POST",
        path="/auth",
        handler=_auth,
        summary="See whether a registry takes credentials",
        verdict="differs: no identity token is asked for; nothing is kept or logged",
    ),
)
