"""The engine for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hutch import engine
from hutch.aio.calls import Pool, Proxy, settled, threaded
from hutch.aio.instance import Instance
from hutch.engine.builder.events import BuildProgress, no_progress
from hutch.engine.images import Images as SyncImages
from hutch.engine.kernels import Kernels as SyncKernels
from hutch.engine.networks import Networks as SyncNetworks
from hutch.engine.resources import Resources as SyncResources
from hutch.engine.results import CommandError, Completed, Event
from hutch.engine.session import check_feed, join_command
from hutch.engine.snapshots import Snapshots as SyncSnapshots
from hutch.engine.volumes import Volumes as SyncVolumes
from hutch.errors import HutchError, NotFound
from hutch.records import Progress, silent

if TYPE_CHECKING:
    from typing import BinaryIO, Self, Unpack

    from hutch.engine.builder.arguments import BuildArguments
    from hutch.engine.builder.facade import BuildResult
    from hutch.engine.builder.sources import Context as BuildContext
    from hutch.image.registry_config import RegistryConfig
    from hutch.spec.options import RunOptions
    from hutch.units import Moment

__all__ = ["Engine", "Images", "Networks", "Volumes"]

_THREADS = 16
_POLL_S = 0.1


class Images(Proxy):
    """The images of one root."""

    get = threaded(SyncImages.get)
    list = threaded(SyncImages.list)
    pull = threaded(SyncImages.pull)
    push = threaded(SyncImages.push)
    tag = threaded(SyncImages.tag)
    remove = threaded(SyncImages.remove)
    history = threaded(SyncImages.history)
    config = threaded(SyncImages.config)
    manifest = threaded(SyncImages.manifest)
    users = threaded(SyncImages.users)
    load = threaded(SyncImages.load)
    save = threaded(SyncImages.save)
    import_ = threaded(SyncImages.import_)
    bootstrap = threaded(SyncImages.bootstrap)
    prune = threaded(SyncImages.prune)


class Networks(Proxy):
    """The networks of one root. Instances are named, or given as `instance.sync`."""

    create = threaded(SyncNetworks.create)
    get = threaded(SyncNetworks.get)
    list = threaded(SyncNetworks.list)
    members = threaded(SyncNetworks.members)
    remove = threaded(SyncNetworks.remove)
    prune = threaded(SyncNetworks.prune)
    connect = threaded(SyncNetworks.connect)
    disconnect = threaded(SyncNetworks.disconnect)


class Volumes(Proxy):
    """The volumes of one root."""

    create = threaded(SyncVolumes.create)
    get = threaded(SyncVolumes.get)
    list = threaded(SyncVolumes.list)
    users = threaded(SyncVolumes.users)
    remove = threaded(SyncVolumes.remove)
    prune = threaded(SyncVolumes.prune)


class Kernels(Proxy):
    """The guest kernels of one root."""

    add = threaded(SyncKernels.add)
    get = threaded(SyncKernels.get)
    list = threaded(SyncKernels.list)
    users = threaded(SyncKernels.users)
    remove = threaded(SyncKernels.remove)
    prune = threaded(SyncKernels.prune)


class Resources(Proxy):
    """What the host has, who holds it, and memory taken back; see `hutch.engine.resources`."""

    configure = threaded(SyncResources.configure)
    decide = threaded(SyncResources.decide)
    demand = threaded(SyncResources.demand)
    inventory = threaded(SyncResources.inventory)
    memory = threaded(SyncResources.memory)
    reclaim = threaded(SyncResources.reclaim)
    release = threaded(SyncResources.release)
    use = threaded(SyncResources.use)


class Snapshots(Proxy):
    """The snapshots of virtual machines in one root."""

    create = threaded(SyncSnapshots.create)
    get = threaded(SyncSnapshots.get)
    list = threaded(SyncSnapshots.list)
    remove = threaded(SyncSnapshots.remove)

    async def restore(self, snapshot: str, *, name: str | None = None) -> Instance:
        """Go back to a snapshot, or start another instance from it."""
        call = functools.partial(self._sync.restore, snapshot, name=name)
        made = await self._pool.call(call, undo=_discard if name is not None else None)
        return Instance(self._pool, made)


class Engine(Proxy):
    """Containers, images, networks and volumes under one root; see `hutch.Engine`.

    `threads` bounds how many blocking calls are under way at once.
    """

    _sync: engine.Engine

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        registry: RegistryConfig | None = None,
        threads: int = _THREADS,
    ) -> None:
        super().__init__(Pool(threads), engine.Engine(root, registry=registry))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Release what this process holds; instances go on."""
        await settled(self._pool.call(self._sync.close))
        self._pool.close()

    @property
    def root(self) -> Path:
        """The directory that holds all state."""
        return self._sync.root

    @property
    def sync(self) -> engine.Engine:
        """The same engine for synchronous code."""
        return self._sync

    # ---- instances ------------------------------------------------------------------------

    async def run(
        self,
        image: str,
        command: Sequence[str] | str | None = None,
        *,
        input: bytes | str | None = None,
        timeout: float | None = None,
        check: bool = False,
        limit: int = 1 << 30,
        progress: Progress = silent,
        **options: Unpack[RunOptions],
    ) -> Completed:
        """Run a program in a new instance to its end; see `hutch.Engine.run`.

        Cancelled, it kills the program and removes the instance (with `remove=False` it
        only kills it).
        """
        data = check_feed(input, timeout)
        given: dict[str, Any] = dict(options)
        keep = given.get("remove") is False
        given["remove"] = not keep
        if input is not None:
            given |= {"interactive": True, "stdin_once": True}
        instance = await self.create(image, command, progress=progress, **given)
        try:
            async with await instance.start_attached() as session:
                code, out, err = await session.collect(input=data, timeout=timeout, limit=limit)
        except BaseException:
            await settled(self._pool.call(functools.partial(_give_up, instance.sync, keep)))
            raise
        completed = Completed(
            exit_code=code,
            stdout=out,
            stderr=err,
            id=str(instance.id),
            oom_killed=session.oom_killed,
        )
        if check and code != 0:
            raise CommandError(completed, join_command(command or image))
        return completed

    async def create(
        self,
        image: str,
        command: Sequence[str] | str | None = None,
        *,
        progress: Progress = silent,
        **options: Unpack[RunOptions],
    ) -> Instance:
        """Create an instance without starting it."""
        call = functools.partial(self._sync.create, image, command, progress=progress, **options)
        return Instance(self._pool, await self._pool.call(call, undo=_discard))

    async def start(
        self,
        image: str,
        command: Sequence[str] | str | None = None,
        *,
        progress: Progress = silent,
        **options: Unpack[RunOptions],
    ) -> Instance:
        """Create an instance and start it; with `async with await …` it is removed."""
        call = functools.partial(self._sync.start, image, command, progress=progress, **options)
        return Instance(self._pool, await self._pool.call(call, undo=_discard))

    async def build(
        self,
        context: BuildContext = ".",
        *,
        dockerfile: str | None = None,
        dockerfile_data: bytes | None = None,
        outputs: Sequence[str] = (),
        stream: BinaryIO | None = None,
        progress: BuildProgress = no_progress,
        **options: Unpack[BuildArguments],
    ) -> BuildResult:
        """Build an image; see `hutch.Engine.build`. Cancelled, it ends its commands.

        `progress` is called in other threads.
        """
        stop = threading.Event()
        call = functools.partial(
            self._sync.build,
            context,
            dockerfile=dockerfile,
            dockerfile_data=dockerfile_data,
            outputs=outputs,
            stream=stream,
            progress=progress,
            stop=stop,
            **options,
        )
        task = asyncio.ensure_future(self._pool.call(call))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            stop.set()
            with contextlib.suppress(HutchError):
                await settled(task)
            raise

    async def get(self, name_or_id: str) -> Instance:
        """Return the handle of an instance by name, identifier or unique prefix of it."""
        found = await self._pool.call(functools.partial(self._sync.get, name_or_id))
        return Instance(self._pool, found)

    list = threaded(engine.Engine.list)
    plan = threaded(engine.Engine.plan)
    df = threaded(engine.Engine.df)
    prune = threaded(engine.Engine.prune)
    info = threaded(engine.Engine.info)
    reconcile = threaded(engine.Engine.reconcile)
    migrate = threaded(engine.Engine.migrate)
    build_cache = threaded(engine.Engine.build_cache)
    prune_build_cache = threaded(engine.Engine.prune_build_cache)

    # ---- the rest ---------------------------------------------------------------------------

    @cached_property
    def images(self) -> Images:
        """The images of this root."""
        return Images(self._pool, self._sync.images)

    @cached_property
    def networks(self) -> Networks:
        """The networks of this root."""
        return Networks(self._pool, self._sync.networks)

    @cached_property
    def kernels(self) -> Kernels:
        """The guest kernels of this root."""
        return Kernels(self._pool, self._sync.kernels)

    @cached_property
    def resources(self) -> Resources:
        """What the host has, who holds it, and what there is room for."""
        return Resources(self._pool, self._sync.resources)

    @cached_property
    def snapshots(self) -> Snapshots:
        """The snapshots of virtual machines."""
        return Snapshots(self._pool, self._sync.snapshots)

    @cached_property
    def volumes(self) -> Volumes:
        """The volumes of this root."""
        return Volumes(self._pool, self._sync.volumes)

    async def events(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        filters: Mapping[str, Sequence[str]] | None = None,
        follow: bool = True,
    ) -> AsyncIterator[Event]:
        """Yield events of this root, those of other processes included, within 100 ms."""
        import time

        begin = time.time() if since is None else since
        last = 0
        while True:
            fetch = functools.partial(
                self._sync.events, since=begin, until=until, filters=filters, follow=False
            )
            for event in await self._pool.abandon(lambda fetch=fetch: [*fetch()]):  # type: ignore[misc]
                if event.seq > last:
                    last = event.seq
                    begin = max(begin, event.time_ns / 1e9 - 1.0)
                    yield event
            if not follow or (until is not None and time.time() > until):
                return
            await asyncio.sleep(_POLL_S)


def _discard(instance: engine.Instance) -> None:
    """Remove an instance that nobody will get to see."""
    try:
        instance.remove(force=True, volumes=True)
    except NotFound:
        return


def _give_up(instance: engine.Instance, keep: bool) -> None:
    from hutch.errors import WrongState

    try:
        if keep:
            instance.kill()
        else:
            instance.remove(force=True, volumes=True)
    except (NotFound, WrongState):
        return
