"""`queue …`: where jobs wait, and by which policy they are run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hutch.cli.command import FORMAT, QUIET, Command
from hutch.cli.options import Option
from hutch.cli.output import print_json, show_result, show_rows
from hutch.cli.session import Invocation
from hutch.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hutch.engine.jobs.accuracy import Accuracy
    from hutch.engine.jobs.records import QueueRecord

__all__ = ["COMMANDS"]

_COLUMNS = (
    ("QUEUE", "Name"),
    ("POLICY", "Policy"),
    ("WEIGHT", "Weight"),
    ("CPUS", "Cpus"),
    ("PREDICTOR", "Predictor"),
    ("STATE", "State"),
    ("PENDING", "Pending"),
    ("RUNNING", "Running"),
)
_SETTINGS: tuple[Option, ...] = (
    ("cpus", "", "text", "NUMBER", "What its jobs may have at once (all)"),
    ("policy", "", "text", "NAME[:KEY=VALUE]", "How jobs are ordered, such as rr:quantum=0.5"),
    ("predictor", "", "text", "NAME[:KEY=VALUE]", "How run times are foretold (average)"),
    ("suspend-after", "", "text", "DURATION", "When a waiting machine is written to disk (5m)"),
    ("weight", "", "text", "NUMBER", "Its share against other queues (1)"),
)


def _create(invocation: Invocation) -> int:
    record = invocation.engine.queues.create(invocation.arguments[0], **invocation.options)
    return show_result(invocation, record.name, Name=record.name)


def _update(invocation: Invocation) -> int:
    record = invocation.engine.queues.update(invocation.arguments[0], **invocation.options)
    return show_result(invocation, record.name, Name=record.name)


def _number(value: float) -> float:
    """Return a number that is written without a point where it is whole."""
    return int(value) if value.is_integer() else value


def _row(record: QueueRecord, counts: Mapping[tuple[str, Any], int]) -> dict[str, Any]:
    waiting = sum(counts.get((record.name, state), 0) for state in ("pending", "held"))
    running = sum(
        counts.get((record.name, state), 0) for state in ("starting", "running", "preempted")
    )
    return {
        "Name": record.name,
        "Policy": record.policy,
        "Weight": _number(record.weight),
        "Cpus": _number(record.cores) if record.cores else "all",
        "Predictor": record.predictor,
        "State": "paused" if record.paused else "open",
        "Pending": waiting,
        "Running": running,
    }


def _ls(invocation: Invocation) -> int:
    counts = invocation.engine.jobs.counts()
    rows = [_row(record, counts) for record in invocation.engine.queues.list()]
    return show_rows(invocation, rows, _COLUMNS, identifier="Name")


def _show(invocation: Invocation) -> int:
    queues = invocation.engine.queues
    counts = invocation.engine.jobs.counts()
    print_json(
        [
            {
                **_row(queues.get(name), counts),
                "SuspendAfter": queues.get(name).suspend_s,
                "Estimates": _estimates(queues.accuracy(name)),
            }
            for name in invocation.arguments
        ]
    )
    return 0


def _estimates(found: Accuracy) -> dict[str, Any]:
    """Return how good the estimates were; times in seconds."""
    return {
        "Jobs": found.jobs,
        "Unknown": found.unknown,
        "MeanAbsoluteError": found.mean_absolute_s,
        "Bias": found.bias_s,
        "Accuracy": found.accuracy,
        "Keys": [
            {
                "Owner": key.owner,
                "Image": key.image,
                "Command": list(key.command),
                "Jobs": key.jobs,
                "MeanRan": key.mean_ran_s,
                "MeanAbsoluteError": key.mean_absolute_s,
                "Bias": key.bias_s,
            }
            for key in found.keys
        ],
    }


def _pause(invocation: Invocation) -> int:
    return invocation.each(invocation.arguments, invocation.engine.queues.pause)


def _resume(invocation: Invocation) -> int:
    return invocation.each(invocation.arguments, invocation.engine.queues.resume)


def _rm(invocation: Invocation) -> int:
    return invocation.each(invocation.arguments, invocation.engine.queues.remove)


def _run(invocation: Invocation) -> int:
    from hutch.units import parse_duration

    cpus, memory = invocation.options.get("cpus"), invocation.options.get("memory")
    idle = invocation.options.get("idle")
    invocation.engine.jobs.dispatch(
        cores=float(cpus) if cpus else None,
        memory=parse_bytes(memory, field="memory") if memory else None,
        idle=parse_duration(idle, field="idle") if idle else None,
    )
    return 0


def _export(invocation: Invocation) -> int:
    import os
    import sys

    from hutch.sched.traces.write import write_trace
    from hutch.units import parse_time

    since = invocation.options.get("since")
    jobs = invocation.engine.jobs.history(
        invocation.arguments, since=parse_time(since, "since") if since else 0.0
    )
    kind = invocation.options.get("as", "swf")
    count = write_trace(jobs, sys.stdout, kind, cores=len(os.sched_getaffinity(0)))
    print(f"{count} jobs", file=sys.stderr)
    return 0


COMMANDS = {
    "queue create": Command(
        handler=_create,
        summary="Make a queue.",
        arguments="NAME",
        low=1,
        high=1,
        options=_SETTINGS,
        examples=("hutch queue create nightly --policy easy --weight 2 --cpus 1",),
    ),
    "queue update": Command(
        handler=_update,
        summary="Change a queue; jobs that run go on.",
        arguments="NAME",
        low=1,
        high=1,
        options=_SETTINGS,
        examples=("hutch queue update default --policy rr:quantum=0.1",),
    ),
    "queue ls": Command(
        handler=_ls,
        summary="List queues.",
        options=(FORMAT, QUIET),
        examples=("hutch queue ls",),
    ),
    "queue show": Command(
        handler=_show,
        summary="Show everything about queues, and how good their estimates were.",
        arguments="NAME [NAME...]",
        low=1,
        high=-1,
        epilog="Estimates: of completed jobs, what the predictor said when they were submitted "
        "less what they ran, in seconds; Bias above 0: foretold too long. Accuracy is the mean "
        "of min(p/r, r/p), 1 at best.",
        examples=("hutch queue show default",),
    ),
    "queue pause": Command(
        handler=_pause,
        summary="Start no further job of queues.",
        arguments="NAME [NAME...]",
        low=1,
        high=-1,
        examples=("hutch queue pause nightly",),
    ),
    "queue resume": Command(
        handler=_resume,
        summary="Start jobs of queues again.",
        arguments="NAME [NAME...]",
        low=1,
        high=-1,
        examples=("hutch queue resume nightly",),
    ),
    "queue rm": Command(
        handler=_rm,
        summary="Remove queues without jobs.",
        arguments="NAME [NAME...]",
        low=1,
        high=-1,
        examples=("hutch queue rm nightly",),
    ),
    "queue export": Command(
        handler=_export,
        summary="Write the jobs that ran as a trace for `hutch sched`.",
        arguments="[QUEUE...]",
        low=0,
        high=-1,
        options=(
            ("as", "", "text", "FORMAT", "swf, csv or batsim (swf)"),
            ("since", "", "text", "TIME", "Those submitted from this time on: 7d, RFC 3339"),
        ),
        examples=(
            "hutch queue export --since 7d >week.swf",
            "hutch sched compare week.swf --policy fcfs --policy easy --cores 2",
        ),
    ),
    "queue run": Command(
        handler=_run,
        summary="Be the dispatcher of this root, until Ctrl-C.",
        options=(
            ("cpus", "", "text", "NUMBER", "What is given out (what this process may use)"),
            ("idle", "", "text", "DURATION", "End when there was nothing to do for so long"),
            ("memory", "m", "text", "SIZE", "What is given out (all)"),
        ),
        epilog="A submission starts one in the background where there is none; that one makes "
        "room for this. Jobs that run when it ends go on, and the next one takes them up.",
        examples=("hutch queue run --cpus 1.5 --memory 4g",),
    ),
}
