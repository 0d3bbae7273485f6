"""A dispatcher beside the caller: a process of its own, or a thread of this one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.engine.context import Context
from hutch.engine.jobs.dispatcher import Dispatcher
from hutch.process.detached import start_detached

__all__ = ["IDLE_S", "on_a_thread", "start_process"]

# How long a dispatcher that a submission has started stays when there is nothing to do.
IDLE_S = 5.0


def start_process(context: Context) -> None:
    """Start a dispatcher in the background. It ends by itself; where several are started at
    once, all but one end at once. What it has to complain of is in `jobs/dispatcher.log`."""
    (context.root / "jobs").mkdir(mode=0o700, exist_ok=True)
    start_detached(
        (
            sys.executable or "/usr/bin/python3",
            "-m",
            "hutch",
            "--root",
            str(context.root),
            "_dispatch",
        ),
        log=str(context.root / "jobs" / "dispatcher.log"),
    )


@contextmanager
def on_a_thread(
    context: Context, *, cores: float | None, memory: int | None
) -> Iterator[Dispatcher]:
    """Dispatch on a thread for the length of the block; an error of it is raised at its end."""
    dispatcher = Dispatcher(context, cores=cores, memory=memory)
    failed: list[BaseException] = []
    ready = threading.Event()

    def work() -> None:
        try:
            dispatcher.run(ready=ready.set)
        except BaseException as exc:
            failed.append(exc)
        finally:
            ready.set()

    thread = threading.Thread(target=work, name="hutch-dispatcher", daemon=True)
    thread.start()
    ready.wait()
    try:
        if not failed:
            yield dispatcher
    finally:
        dispatcher.stop()
        thread.join()
    if failed:
        raise failed[0]
