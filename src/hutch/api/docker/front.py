"""What all handlers share: the engine, threads for its calls, the log, what is watched."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec

from hutch.aio.calls import Pool, settled
from hutch.api.docker.routing import OLDEST
from hutch.errors import HutchError

if TYPE_CHECKING:
    from hutch.api.docker.routing import Route
    from hutch.engine import Engine, Instance

__all__ = ["Front", "FrontOptions", "Served"]

P = ParamSpec("P")
R = TypeVar("R")

_QUICK = 16
_SLOW = 64
_PIECE = 512 << 10


class FrontOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says to the API: defaults of new containers, labels of the host."""

    labels: tuple[str, ...] = ()
    min_api_version: tuple[int, int] = OLDEST
    log_driver: str = "json-file"
    log_opts: dict[str, str] = {}
    default_ulimits: tuple[str, ...] = ()
    default_shm_size: int = 0
    default_runtime: str = "hutch"
    shutdown_timeout_s: float = 15.0
    live_restore: bool = True
    init: bool = False
    dns: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    host_ip: str = ""
    host_gateway: str = ""
    cgroupns: str = ""
    ipc: str = ""
    no_new_privileges: bool = False
    seccomp: str = ""
    network_options: dict[str, str] = {}


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """A request that was answered: how, and in how many seconds."""

    method: str
    route: Route | None
    status: int
    seconds: float
    traceparent: str = ""


def _gather(iterator: Iterator[bytes]) -> bytes:
    pieces = []
    size = 0
    for piece in iterator:
        pieces.append(piece)
        size += len(piece)
        if size >= _PIECE:
            break
    return b"".join(pieces)


class Front:
    """One daemon's API. Made and used in the event loop; `close` it there."""

    def __init__(self, engine: Engine, options: FrontOptions | None = None) -> None:
        from hutch import __version__
        from hutch.api.docker.execs import Execs
        from hutch.api.docker.feeds import SharedFeeds
        from hutch.api.docker.journal import Journal
        from hutch.api.docker.lives import Lives
        from hutch.api.docker.metrics import Metrics
        from hutch.api.docker.routes import ROUTES
        from hutch.api.docker.routing import Router

        self.engine = engine
        self.options = options or FrontOptions()
        self.log = logging.getLogger("hutch.docker")
        self.router = Router(ROUTES)
        self.server_header = f"Docker/{__version__} (linux) hutch"
        self.journal = Journal(engine.context)
        self.lives = Lives(self)
        self.execs = Execs()
        self.feeds = SharedFeeds()
        self.metrics = Metrics()
        self.observers: list[Callable[[Served], None]] = [self.metrics.observe]
        self._quick = Pool(_QUICK)
        self._slow = Pool(_SLOW)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._date = (0, "")

    async def call(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Make a call of the engine that is over in milliseconds, in a thread."""
        return await self._quick.call(functools.partial(call, *args, **kwargs))

    async def call_slow(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Make a call that may take seconds, in one of the threads kept for those."""
        return await self._slow.call(functools.partial(call, *args, **kwargs))

    async def call_undoing(self, call: Callable[[], R], undo: Callable[[R], object]) -> R:
        """Make a slow call whose result is undone if the client has left meanwhile."""
        return await self._slow.call(call, undo=undo)

    @property
    def slow(self) -> Pool:
        """The threads for what may take long, for streams that are stepped there."""
        return self._slow

    async def stream(self, make: Callable[[], Iterator[bytes]]) -> AsyncIterator[bytes]:
        """Yield what a blocking iterator yields, stepped in threads by the half megabyte; it is
        closed however this is left."""
        iterator = await self._slow.call(make)
        try:
            while piece := await self._slow.call(functools.partial(_gather, iterator)):
                yield piece
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                await settled(self._slow.call(close))

    def note(self, instance: Instance, action: str, **attributes: str) -> None:
        """Put into the journal that a client did something; nobody waits for that."""
        self.spawn(self._note(instance, action, attributes), f"event {action}")

    async def _note(self, instance: Instance, action: str, attributes: dict[str, str]) -> None:
        with contextlib.suppress(HutchError):  # it has gone meanwhile, or the disk is full
            await self.call(instance.note, action, **attributes)
            self.journal.poke()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run something beside the requests until it ends or the front is closed."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self.log.error("%s failed", task.get_name(), exc_info=exc)

    def date(self) -> str:
        """Return the time as HTTP writes it."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now)))
        return self._date[1]

    def observe(self, served: Served) -> None:
        """Note that a request was answered."""
        path = served.route.path if served.route else "?"
        self.log.debug("%s %s %d %.1f ms", served.method, path, served.status, served.seconds * 1e3)
        for observer in self.observers:
            observer(served)

    async def start(self) -> None:
        """Take up what went on while no daemon ran."""
        await self.lives.take_up()

    async def finish(self) -> None:
        """Do what is due before the end: without live-restore, stop what runs. Restart policies
        start it again with the daemon."""
        if not self.options.live_restore:
            await self.lives.stop_all(self.options.shutdown_timeout_s)

    async def close(self) -> None:
        """End what runs beside the requests, and let go of the threads. Instances go on."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.lives.close()
        self.journal.close()
        self._quick.close()
        self._slow.close()
