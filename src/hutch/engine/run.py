"""Run a program in an instance of its own, to its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hutch.engine.context import Context
from hutch.engine.create import create
from hutch.engine.finish import finish
from hutch.engine.records import InstanceRecord
from hutch.engine.results import Completed
from hutch.engine.session import check_feed, collect, collect_flags
from hutch.engine.start import start
from hutch.engine.stop import remove
from hutch.errors import NotFound, WrongState
from hutch.records import Progress

__all__ = ["run"]


def run(
    context: Context,
    image: str,
    command: Sequence[str] | str | None,
    *,
    input: bytes | str | None,
    timeout_s: float | None,
    limit: int,
    progress: Progress,
    options: dict[str, Any],
) -> Completed:
    """Create, start, collect, book; the instance is gone afterwards unless told to stay."""
    data = check_feed(input, timeout_s)
    keep = options.get("remove") is False
    # An instance that goes away at its exit never needs its files again: no syncing.
    volatile = not keep and not options.get("restart")
    options["remove"] = not keep
    record = create(
        context,
        image,
        command,
        name=options.pop("name", None),
        pull=options.pop("pull", None) or "missing",
        platform=options.pop("platform", None),
        progress=progress,
        volatile=volatile,
        options=options,
    )
    try:
        flags = collect_flags(stdin=data is not None)
        link = start(context, record.id, attach=flags, progress=progress)
        if link is None:
            raise WrongState(f"instance {record.name} was started by somebody else")
        completed = collect(
            link, input=data, timeout_s=timeout_s, limit=limit, identifier=record.id
        )
        booked = finish(context, record.id)
    except BaseException:
        _give_up(context, record, keep=keep)
        raise
    if booked is not None and booked.oom_killed:
        import msgspec

        completed = msgspec.structs.replace(completed, oom_killed=True)
    return completed


def _give_up(context: Context, record: InstanceRecord, *, keep: bool) -> None:
    """End what runs; remove it unless it was to stay."""
    try:
        if keep:
            from hutch.engine.stop import kill

            kill(context, record.id)
        else:
            # By way of its exit: that makes room first where the program filled the disk.
            context.driver(record.spec.isolation).kill_all(record.id)
            finish(context, record.id)
            remove(context, record.id, force=True, remove_volumes=True)
    except (NotFound, WrongState):
        pass
