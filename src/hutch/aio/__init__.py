"""The engine for asyncio: the same methods, awaited.

    async with hutch.aio.Engine() as engine:
        done = await engine.run("busybox", ["uname", "-a"])
        async with await engine.start("busybox", ["sleep", "60"]) as box:
            async for piece in box.logs(follow=True):
                ...

Streams of programs (run, exec, attach) are read by the event loop itself; logs and events
are fetched piece by piece; everything else runs in a bounded pool of threads. Cancelling
leaves nothing behind: a cancelled `run` kills and removes its instance, a cancelled
`create` or `start` removes what it had made, a cancelled `exec` ends its program.
"""

from __future__ import annotations

from hutch.aio.engine import Engine, Images, Networks, Volumes
from hutch.aio.instance import Files, Instance
from hutch.aio.session import Session

__all__ = ["Engine", "Instance", "Session", "Files", "Images", "Networks", "Volumes"]
