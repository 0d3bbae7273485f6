"""`/build` and the build cache: the classic builder's stream over `Engine.build`."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable
from typing import IO, TYPE_CHECKING, Any, TypeVar

import msgspec

from hutch.api.docker.errors import ApiError, message_of
from hutch.api.docker.pruning import note_prune
from hutch.api.docker.replies import Answer, Stream, encode, json_reply
from hutch.api.docker.routing import Route
from hutch.decoding import decode_json
from hutch.engine.builder.remotes import is_remote
from hutch.errors import HutchError, InvalidArgument, NotFound

if TYPE_CHECKING:
    from hutch.api.docker.requests import Query, Request
    from hutch.engine.builder.events import BuildEvent
    from hutch.image.registry_config import Credentials

__all__ = ["ROUTES", "Narrator"]

T = TypeVar("T")

_MAX_CONTEXT = 64 << 30
_AHEAD = 64  # events that wait for a client
_LOOK_S = 0.5
_TAR_TYPES = ("application/x-tar", "application/tar", "application/octet-stream", "")
_LIMITS = {
    "memory": "memory",
    "memswap": "memory_swap",
    "cpushares": "cpu_shares",
    "cpuperiod": "cpu_period",
    "cpuquota": "cpu_quota",
    "shmsize": "shm_size",
}
_TEXTS = {"cpusetcpus": "cpuset_cpus", "cpusetmems": "cpuset_mems", "target": "target"}


class Narrator:
    """Turn events into the lines of Docker's classic builder, one step after another: what
    runs beside the step that is told waits until its turn."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._count = 0
        self._total = 0
        self._order: list[int] = []
        self._waiting: dict[int, list[BuildEvent]] = {}
        self._texts: dict[int, str] = {}

    def lines(self, event: BuildEvent) -> list[dict[str, Any]]:
        """Return what is to be sent now."""
        if event.kind == "image":
            return [] if self._quiet else [{"aux": {"ID": event.digest}}]
        if event.kind == "warning":
            return self._said(f"[Warning] {event.text}\n")
        if event.kind == "done" and event.total:
            self._total = event.total
        if event.kind == "start":
            if not event.text:
                return []
            self._order.append(event.step)
            self._texts[event.step] = event.text
            self._waiting[event.step] = []
        elif event.step not in self._texts:
            return []
        self._waiting[event.step].append(event)
        return self._told()

    def _told(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while self._order:
            step = self._order[0]
            events, self._waiting[step] = self._waiting[step], []
            ended = False
            for event in events:
                found += self._one(event)
                ended = event.kind in ("done", "cached", "error")
            if not ended:
                break
            self._order.pop(0)
        return found

    def _one(self, event: BuildEvent) -> list[dict[str, Any]]:
        match event.kind:
            case "start":
                self._count += 1
                total = max(self._total, self._count)
                return self._said(f"Step {self._count}/{total} : {event.text}\n")
            case "output":
                return self._said(event.data.decode("utf-8", "replace"))
            case "cached":
                return self._said(" ---> Using cache\n", f" ---> {_short(event.digest)}\n")
            case "done":
                return self._said(f" ---> {_short(event.digest)}\n") if event.digest else []
            case "progress":
                detail = {"current": event.done}
                if event.total_bytes:
                    detail["total"] = event.total_bytes
                item, _, status = event.text.partition(": ")
                return [{"status": status, "progressDetail": detail, "id": _short(item)}]
        return []

    def _said(self, *texts: str) -> list[dict[str, Any]]:
        return [] if self._quiet else [{"stream": text} for text in texts]


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


async def _build(request: Request) -> Answer:
    query = request.query
    if query.text("version", "1") == "2":
        raise ApiError(400, "BuildKit's interface is not served: set DOCKER_BUILDKIT=0")
    options = _options(query)
    options["credentials"] = _credentials(request)
    remote = query.text("remote")
    source: Any = remote
    spool: IO[bytes] | None = None
    if remote and remote != "client-session" and not is_remote(remote):
        # What it names would be read on the server's own disk.
        raise ApiError(400, f"remote={remote[:80]}: expected an http or https URL, or a repository")
    if not remote or remote == "client-session":
        content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if content_type not in _TAR_TYPES:
            raise ApiError(400, f"Content-Type {content_type[:80]}: expected application/x-tar")
        spool = source = await _spool(request)
    lines = _narrated(request, source, spool, options, query.flag("q"))
    # What fails before there is anything to tell is answered with a status.
    try:
        first = await anext(lines)
    except NotFound as exc:
        raise ApiError(400, message_of(exc)) from exc
    return Stream(_Resumed(first, lines), content_type="application/json", tells_errors=True)


class _Resumed:
    """A stream of which the first line was taken."""

    def __init__(self, first: bytes, lines: AsyncGenerator[bytes, None]) -> None:
        self._first = first
        self._lines = lines

    def __aiter__(self) -> _Resumed:
        return self

    async def __anext__(self) -> bytes:
        first, self._first = self._first, b""
        return first or await anext(self._lines)

    async def aclose(self) -> None:
        """End the build, even where nobody reads of it any more."""
        await self._lines.aclose()


async def _spool(request: Request) -> IO[bytes]:
    """Take the context in before the answer begins, as clients expect."""
    directory = request.front.engine.root / "tmp"
    directory.mkdir(mode=0o700, exist_ok=True)
    spool = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
    size = 0
    try:
        async for chunk in request.chunks():
            size += len(chunk)
            if size > _MAX_CONTEXT:
                raise ApiError(413, f"the context is larger than {_MAX_CONTEXT} bytes")
            await request.front.call_slow(_write, spool, chunk)
        if not size:
            raise ApiError(400, "the context is empty: send a tar archive, or use remote=")
        spool.seek(0)
    except BaseException:
        spool.close()
        raise
    return spool


def _write(file: IO[bytes], chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) or 0 :]


async def _narrated(
    request: Request, source: Any, spool: IO[bytes] | None, options: dict[str, Any], quiet: bool
) -> AsyncGenerator[bytes, None]:
    """Build in a thread and yield its lines; a client that leaves ends the build, and one that
    does not read makes it wait."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[BuildEvent | None] = asyncio.Queue()
    stop = threading.Event()
    engine = request.front.engine

    room = threading.Semaphore(_AHEAD)

    def tell(event: BuildEvent) -> None:
        while not stop.is_set():
            if room.acquire(timeout=_LOOK_S):
                loop.call_soon_threadsafe(events.put_nowait, event)
                return

    def work() -> str:
        try:
            return engine.build(source, progress=tell, stop=stop, **options).id
        finally:
            loop.call_soon_threadsafe(events.put_nowait, None)

    task = asyncio.ensure_future(request.front.call_slow(work))
    narrator = Narrator(quiet=quiet)
    told = False
    try:
        while (event := await events.get()) is not None:
            room.release()
            for line in narrator.lines(event):
                told = True
                yield encode(line) + b"\r\n"
        try:
            image = await asyncio.shield(task)
        except HutchError as error:
            if not told:
                raise
            yield encode(_failure(error)) + b"\r\n"
            return
        for line in _ending(image, options.get("tags", ()), quiet):
            yield encode(line) + b"\r\n"
    finally:
        stop.set()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        if spool is not None:
            spool.close()


def _failure(error: HutchError) -> dict[str, Any]:
    """Return an error as the stream tells it, a command's in Docker's words."""
    code = getattr(error, "exit_code", None)
    command = getattr(error, "command", "")
    if code is None or not command:
        message = message_of(error)
        return {"errorDetail": {"message": message}, "error": message}
    message = f"The command '{command}' returned a non-zero code: {code}"
    return {"errorDetail": {"code": code, "message": message}, "error": message}


def _ending(image: str, tags: list[str], quiet: bool) -> list[dict[str, Any]]:
    if quiet:
        return [{"stream": f"{image}\n"}]
    lines = [{"stream": f"Successfully built {_short(image)}\n"}]
    for tag in tags:
        name = tag if ":" in tag.rpartition("/")[2] else f"{tag}:latest"
        lines.append({"stream": f"Successfully tagged {name}\n"})
    return lines


# ---- options ------------------------------------------------------------------------------


class _Ulimit(msgspec.Struct, kw_only=True, rename="pascal"):
    name: str = ""
    soft: int = 0
    hard: int = 0


def _options(query: Query) -> dict[str, Any]:
    """Return the arguments of `Engine.build` that a query stands for."""
    options: dict[str, Any] = {
        "dockerfile": query.text("dockerfile") or None,
        "tags": [tag for tag in query.texts("t") if tag],
        "no_cache": query.flag("nocache"),
        "pull": query.flag("pull"),
        "squash": query.flag("squash"),
    }
    _check_outputs(query)
    arguments = _json(query, "buildargs", dict[str, str | None])
    options["build_args"] = {n: v for n, v in (arguments or {}).items() if v is not None}
    options["labels"] = _json(query, "labels", dict[str, str]) or {}
    options["cache_from"] = _json(query, "cachefrom", list[str]) or []
    ulimits = _json(query, "ulimits", list[_Ulimit]) or []
    if ulimits:
        options["ulimits"] = [f"{one.name}={one.soft}:{one.hard}" for one in ulimits]
    for name, ours in _LIMITS.items():
        if number := query.optional_integer(name):
            options[ours] = number
    for name, ours in _TEXTS.items():
        if text := query.text(name):
            options[ours] = text
    hosts = [host for text in query.texts("extrahosts") for host in text.split(",") if host]
    if hosts:
        options["add_host"] = hosts
    network = query.text("networkmode")
    if network not in ("", "default", "bridge"):
        options["network"] = network
    if platform := query.text("platform"):
        options["platform"] = platform
    if query.text("isolation") in ("vm", "container"):
        options["isolation"] = query.text("isolation")
    return options


class _Output(msgspec.Struct, kw_only=True, rename="pascal"):
    type: str = ""
    attrs: dict[str, str] | None = None


def _check_outputs(query: Query) -> None:
    """Refuse what is to go elsewhere than to the images: only a session could carry it."""
    outputs = _json(query, "outputs", list[_Output]) or []
    if len(outputs) > 1:
        raise ApiError(400, "multiple outputs are not supported")
    for output in outputs:
        if output.type not in ("", "image", "docker", "moby") or output.attrs:
            shown = ",".join(
                f"{k}={v}" for k, v in {"type": output.type, **(output.attrs or {})}.items()
            )
            raise ApiError(400, f"outputs: {shown[:80]}: the image is made here; export or push it")


def _credentials(request: Request) -> dict[str, Credentials]:
    """Return what X-Registry-Config has, by registry."""
    from hutch.api.docker.transfers import registry_credentials
    from hutch.image.credentials import registry_of

    given = request.auth_config("x-registry-config")
    found = {
        registry_of(key): registry_credentials(value)
        for key, value in given.items()
        if isinstance(value, dict)
    }
    return {registry: one for registry, one in found.items() if one is not None}


def _json(query: Query, name: str, kind: type[T]) -> T | None:
    given = query.text(name)
    if not given or given == "null":
        return None
    try:
        return decode_json(given, kind)
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"invalid JSON: {error}", field=name) from error


# ---- the cache ----------------------------------------------------------------------------


async def _prune(request: Request) -> Answer:
    query = request.query
    filters = query.filters()
    older = 0.0
    for name in ("until", "unused-for"):
        for text in filters.pop(name, []):
            older = max(older, _seconds(text))
    keep = (
        query.optional_integer("keep-storage")
        or query.optional_integer("max-used-space")
        or query.optional_integer("reserved-space")
        or 0
    )
    engine = request.front.engine
    call: Callable[[], Any] = lambda: engine.prune_build_cache(  # noqa: E731
        all_entries=query.flag("all"), older_than_s=older, keep_bytes=keep, filters=filters
    )
    report = await request.front.call_slow(call)
    gone = [name[:25] for name in (*report.records, *report.mounts)]
    await request.front.call(note_prune, request.front, "builder", report.reclaimed)
    request.front.journal.poke()
    return json_reply({"CachesDeleted": gone or None, "SpaceReclaimed": report.reclaimed})


def _seconds(text: str) -> float:
    from hutch.units import parse_duration

    return parse_duration(text, field="filters")


async def _cancel(request: Request) -> Answer:
    raise ApiError(501, "a build is ended by closing its connection")


async def _session(request: Request) -> Answer:
    raise ApiError(501, "BuildKit's sessions are not served: set DOCKER_BUILDKIT=0")


_BUILD_OPTIONS = {
    "dockerfile": "works",
    "t": "works",
    "extrahosts": "works",
    "remote": "works: a URL or a repository",
    "q": "works",
    "nocache": "works",
    "cachefrom": "differs: caches that hutch wrote",
    "pull": "works",
    "rm": "ignored: nothing is left in any case",
    "forcerm": "ignored: nothing is left in any case",
    "memory": "works",
    "memswap": "works",
    "cpushares": "works",
    "cpusetcpus": "works",
    "cpusetmems": "works",
    "cpuperiod": "works",
    "cpuquota": "works",
    "buildargs": "works",
    "shmsize": "works",
    "squash": "works",
    "labels": "works",
    "networkmode": "works",
    "platform": "works: the host's, others are refused",
    "target": "works",
    "ulimits": "works",
    "outputs": "refused but for an image without attributes: the image is made",
    "isolation": "works: container or vm",
    "version": "refused: 2, BuildKit's own interface",
    "Content-Type": "works",
    "X-Registry-Config": "works; for other registries the daemon's own credentials are used",
}

ROUTES = (
    Route(
        method="POST",
        path="/build",
        handler=_build,
        summary="Build an image",
        options=_BUILD_OPTIONS,
    ),
    Route(
        method="POST",
        path="/build/prune",
        handler=_prune,
        summary="Remove build cache",
        since=(1, 31),
        options={
            "all": "works",
            "filters": "works: until, unused-for, id, type, description, inuse, shared",
            "keep-storage": "works",
            "max-used-space": "works",
            "reserved-space": "works",
        },
    ),
    Route(
        method="POST",
        path="/build/cancel",
        handler=_cancel,
        summary="Cancel a build of BuildKit",
        since=(1, 39),
        verdict="refused: closing the connection ends a build",
    ),
    Route(
        method="POST",
        path="/session",
        handler=_session,
        summary="Begin a session of BuildKit",
        since=(1, 39),
        verdict="refused: BuildKit's own interface",
    ),
)
