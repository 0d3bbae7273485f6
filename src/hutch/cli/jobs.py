"""`job …`: work that waits for its turn."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from hutch.cli.command import FORMAT, NO_TRUNC, QUIET, Command
from hutch.cli.options import Option, UsageError
from hutch.cli.output import ago, print_json, show_result, show_rows, stamp, visible, write_bytes
from hutch.cli.run_options import CREATE_OPTIONS, engine_options
from hutch.cli.session import Invocation
from hutch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.engine.jobs.facade import Job
    from hutch.engine.jobs.records import JobRecord, Slice

__all__ = ["COMMANDS"]

_COLUMNS = (
    ("JOB", "ID"),
    ("NAME", "Name"),
    ("QUEUE", "Queue"),
    ("OWNER", "Owner"),
    ("STATE", "State"),
    ("RAN", "Ran"),
    ("SUBMITTED", "SubmittedSince"),
    ("CORES", "Cores"),
    ("MEMORY", "Memory"),
    ("REASON", "Reason"),
)
# Options of `run` that a job cannot have: it has no terminal and no input.
_NOT_FOR_JOBS = ("attach", "cidfile", "dry-run", "interactive", "rm", "tty", "restart", "name")
_JOB_OPTIONS: tuple[Option, ...] = (
    ("after", "", "list", "JOB[:CONDITION]", "Wait for a job: 7, 7:ok, 7:failed, 7:any"),
    ("array", "", "text", "INDICES", "Many jobs, such as 0-9, 1-100:10 or 1,5,7"),
    ("deadline", "", "text", "DURATION", "When it should be done, from now"),
    ("estimate", "", "text", "DURATION", "How long it will run"),
    ("file", "", "text", "FILE", "Submit the jobs of a YAML file; - for stdin"),
    ("group", "", "text", "NAME", "The group whose share it takes"),
    ("hold", "", "flag", "", "Do not start it before `hutch job release`"),
    ("keep", "", "list", "PATH", "Keep this path of it for `hutch job output`"),
    ("name", "", "text", "NAME", "Name of the job"),
    ("owner", "", "text", "NAME", "The user whose share it takes"),
    ("priority", "", "int", "NUMBER", "Lower goes first (0)"),
    ("queue", "", "text", "NAME", "The queue (default)"),
    ("retries", "", "int", "NUMBER", "Try again so many times when it fails (0)"),
    ("timeout", "", "text", "DURATION", "End it, as `stop` does, when it has run so long"),
    ("wait", "", "flag", "", "Wait for its end; leave with its exit code"),
)
_CHOSEN: tuple[Option, ...] = (
    ("all", "a", "flag", "", "All jobs that it is possible for; print how many"),
    ("array", "", "int", "JOB", "Those of the array whose first job this is"),
    ("owner", "", "text", "NAME", "Those of this user"),
    ("queue", "", "text", "NAME", "Those of this queue"),
)
_EXIT_CODES = {"cancelled": 130, "timeout": 124, "unknown": 125}


def _submit(invocation: Invocation) -> int:
    values = dict(invocation.options)
    wait, path = values.pop("wait", False), values.pop("file", None)
    if path is not None:
        made = _submit_file(invocation, path)
    elif not invocation.arguments:
        raise UsageError("job submit: expected an image or --file", exit_code=1)
    else:
        made = _submit_one(invocation, values)
    if not invocation.json:
        for job in made:
            print(job.id, flush=True)
    elif not wait:
        print_json([_row(job.info(), full=True) for job in made])
    return _wait_all(made, quiet=True, as_json=invocation.json) if wait else 0


def _submit_one(invocation: Invocation, values: dict[str, Any]) -> list[Job]:
    from hutch.cli.progress import pull_progress

    quiet = bool(values.get("quiet"))
    options = engine_options(values)
    if "keep" in options:
        options["outputs"] = options.pop("keep")
    image, *command = invocation.arguments
    array = options.pop("array", None)
    with pull_progress(quiet=quiet) as progress:
        if array is None:
            return [
                invocation.engine.jobs.submit(image, command or None, progress=progress, **options)
            ]
        return invocation.engine.jobs.submit_array(
            image, command or None, array=array, progress=progress, **options
        )


def _submit_file(invocation: Invocation, path: str) -> list[Job]:
    from hutch.cli.progress import pull_progress

    others = [name for name in invocation.options if name not in ("file", "wait", "quiet")]
    if others or invocation.arguments:
        raise UsageError("--file: everything else stands in the file", exit_code=1)
    try:
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
    except OSError as exc:
        raise UsageError(f"--file: {path}: {exc.strerror}", exit_code=1) from exc
    with pull_progress(quiet=invocation.flag("quiet")) as progress:
        return invocation.engine.jobs.submit_file(data, source=path, progress=progress)


def _wait(invocation: Invocation) -> int:
    from hutch.units import parse_duration

    limit = invocation.options.get("timeout")
    timeout_s = parse_duration(limit, field="timeout") if limit else None
    jobs = [_job(invocation, text) for text in invocation.arguments]
    return _wait_all(jobs, as_json=invocation.json, timeout_s=timeout_s)


def _wait_all(
    jobs: list[Job],
    *,
    quiet: bool = False,
    as_json: bool = False,
    timeout_s: float | None = None,
) -> int:
    """Wait for jobs; return the exit code of the first that did not do well."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    code = 0
    done: list[dict[str, object]] = []
    for job in jobs:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        record = job.wait(left)
        done.append({"Id": record.id, "State": str(record.state), "ExitCode": record.exit_code})
        if not (quiet or as_json):
            print(f"{record.id} {record.state} {record.exit_code}", flush=True)
        code = code or _exit_code(record)
    if as_json:
        print_json(done)
    return code


def _exit_code(record: JobRecord) -> int:
    """Return what `wait` leaves with: of a job that somebody has ended, not what its program
    had to say to that."""
    done_well = 0 if record.state == "completed" else 1
    return _EXIT_CODES.get(record.state) or record.exit_code or done_well


def _job(invocation: Invocation, text: str) -> Job:
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise UsageError(f"expected the number of a job, got {text[:40]!r}", exit_code=1)
    return invocation.engine.jobs.get(int(text))


def _row(record: JobRecord, *, full: bool) -> dict[str, Any]:
    now = time.time_ns()
    ran_ns = record.ran_ns + (now - record.mark if record.mark else 0)
    row: dict[str, Any] = {
        "ID": record.id,
        "Name": record.name,
        "Queue": record.queue,
        "Owner": record.owner,
        "Image": record.image,
        "State": str(record.state),
        "Cores": f"{record.cores:g}",
        "Memory": format_bytes(record.memory) if record.memory else "-",
        "Ran": f"{ran_ns / 1e9:.1f}s" if ran_ns else "-",
        "SubmittedSince": ago(record.submitted_ns),
        "Reason": _reason(record),
    }
    return {**row, **_details(record, ran_ns)} if full else row


def _reason(record: JobRecord) -> str:
    if record.reason:
        return record.reason
    if record.oom_killed:
        return "out of memory"
    if record.state == "failed":
        return f"exit code {record.exit_code}"
    if record.state == "pending" and not record.eligible_ns and record.after:
        return "waits for " + ", ".join(str(d.job) for d in record.after)
    return ""


def _details(record: JobRecord, ran_ns: int) -> dict[str, Any]:
    """Return what only JSON shows; times in seconds, stamps as RFC 3339."""
    from hutch.engine.jobs.accuracy import error_of

    waiting_ns = 0
    if record.eligible_ns:
        until = record.finished_ns or time.time_ns()
        waiting_ns = max(0, until - record.eligible_ns - ran_ns)
    return {
        "Cores": record.cores,
        "Memory": record.memory,
        "Command": list(record.command),
        "Isolation": record.isolation,
        "Group": record.group,
        "Labels": record.labels,
        "Priority": record.priority,
        "Array": record.array,
        "Index": record.index,
        "After": [{"Job": d.job, "Condition": str(d.condition)} for d in record.after],
        "Estimate": record.estimate_s,
        "Predicted": record.predicted_s,
        "PredictionError": error_of(record),
        "Timeout": record.timeout_s,
        "Deadline": stamp(record.deadline_ns),
        "Retries": record.retries,
        "Attempt": record.attempt,
        "Outputs": list(record.outputs),
        "Instance": record.instance,
        "ExitCode": record.exit_code,
        "OOMKilled": record.oom_killed,
        "SubmittedAt": stamp(record.submitted_ns),
        "StartedAt": stamp(record.started_ns),
        "FinishedAt": stamp(record.finished_ns),
        "Ran": ran_ns / 1e9,
        "Waiting": waiting_ns / 1e9,
        "Preemptions": record.preemptions,
        "Slices": [_slice(piece) for piece in record.slices],
    }


def _slice(piece: Slice) -> dict[str, Any]:
    """Return a time in which a job ran, and what was done to it then."""
    row: dict[str, Any] = {"Begin": piece.begin / 1e9, "End": piece.end / 1e9}
    if piece.then:
        row["Then"] = piece.then
    if piece.given:
        row["Given"] = piece.given
    return row


def _ls(invocation: Invocation) -> int:
    from hutch.engine.jobs.records import JobState

    states = []
    for text in invocation.options.get("state", ()):
        if text not in tuple(JobState):
            raise UsageError(f"--state: expected {', '.join(JobState)}, got {text!r}", exit_code=1)
        states.append(JobState(text))
    records = invocation.engine.jobs.list(
        all=invocation.flag("all"),
        queue=invocation.options.get("queue"),
        owner=invocation.options.get("owner"),
        states=states,
        last=max(0, invocation.options.get("last") or 0),
    )
    full = invocation.json or bool(invocation.options.get("format"))
    return show_rows(invocation, [_row(r, full=full) for r in records], _COLUMNS, identifier="ID")


def _show(invocation: Invocation) -> int:
    jobs = [_job(invocation, text) for text in invocation.arguments]
    print_json([{**_row(job.info(), full=True), "Why": job.why().text} for job in jobs])
    return 0


def _why(invocation: Invocation) -> int:
    import msgspec

    found = [_job(invocation, text).why() for text in invocation.arguments]
    if invocation.json:
        print_json(msgspec.to_builtins(found))
        return 0
    for answer in found:
        print(f"job {answer.job}: {answer.text}")
        for shortage in answer.decision.shortages if answer.decision is not None else ():
            if shortage.cures:
                print(f"  fits if {' or '.join(shortage.cures)}")
    return 0


def _logs(invocation: Invocation) -> int:
    job = _job(invocation, invocation.arguments[0])
    tail = invocation.options.get("tail")
    wrote = False
    for record in job.logs(follow=invocation.flag("follow"), tail=tail):
        write_bytes(record.data, record.stream)
        wrote = True
    if not wrote and (reason := job.info().reason):
        # One that could not be started has nothing to show but this.
        print(f"hutch: job {job.id} wrote nothing: {visible(reason)}", file=sys.stderr)
    return 0


def _cancel(invocation: Invocation) -> int:
    return _ask(invocation, lambda job: job.cancel(), invocation.engine.jobs.cancel)


def _hold(invocation: Invocation) -> int:
    return _ask(invocation, lambda job: job.hold(), invocation.engine.jobs.hold)


def _release(invocation: Invocation) -> int:
    return _ask(invocation, lambda job: job.release(), invocation.engine.jobs.release)


def _ask(invocation: Invocation, one: Callable[[Job], None], many: Callable[..., int]) -> int:
    """Ask something of jobs by number, or of all that are chosen by their options."""
    chosen = {
        name: value
        for name in ("queue", "owner", "array")
        if (value := invocation.options.get(name))
    }
    if not (chosen or invocation.flag("all")):
        if not invocation.arguments:
            raise UsageError(
                "expected the number of a job, --all, --queue, --owner or --array", exit_code=1
            )
        return invocation.each(invocation.arguments, lambda text: one(_job(invocation, text)))
    if invocation.arguments:
        raise UsageError("expected numbers of jobs or --all and the like, not both", exit_code=1)
    count = many(**chosen)
    return show_result(invocation, str(count), Count=count)


def _priority(invocation: Invocation) -> int:
    text, *numbers = invocation.arguments
    try:
        priority = int(text)
    except ValueError:
        raise UsageError(f"expected a priority, got {text!r}", exit_code=1) from None
    return invocation.each(numbers, lambda number: _job(invocation, number).set_priority(priority))


def _output(invocation: Invocation) -> int:
    number, directory = (*invocation.arguments, ".")[:2]
    saved = _job(invocation, number).save_outputs(directory)
    if invocation.json:
        print_json([{"Path": str(name)} for name in saved])
        return 0
    for name in saved:
        print(name)
    return 0


def _prune(invocation: Invocation) -> int:
    from hutch.units import parse_duration

    age_s = parse_duration(invocation.options.get("older_than", "0"), field="older-than")
    count = invocation.engine.jobs.prune(age_s)
    if invocation.json:
        print_json({"Removed": count})
    else:
        print(count)
    return 0


def _top(invocation: Invocation) -> int:
    """Show the jobs that are not over again and again, on a terminal; once elsewhere."""
    from hutch.cli.output import is_tty, table_lines

    pause = float(invocation.options.get("interval") or 2)
    while True:
        records = invocation.engine.jobs.list()
        records.sort(key=lambda r: (r.state in ("pending", "held"), r.id))
        rows = [_row(r, full=False) for r in records]
        shown = [[row[key] for _, key in _COLUMNS] for row in rows[:40]]
        lines = table_lines([title for title, _ in _COLUMNS], shown)
        counts: dict[str, int] = {}
        for record in records:
            counts[record.state] = counts.get(record.state, 0) + 1
        head = ", ".join(f"{number} {state}" for state, number in counts.items()) or "no jobs"
        if not is_tty(1):
            print("\n".join([head, *lines]))
            return 0
        print("\x1b[H\x1b[2J" + "\n".join([head, "", *lines]), flush=True)
        time.sleep(pause)


COMMANDS = {
    "job submit": Command(
        handler=_submit,
        summary="Put a job into a queue; print its number.",
        arguments="IMAGE [COMMAND] [ARG...]",
        low=0,
        high=-1,
        options=tuple(o for o in CREATE_OPTIONS if o[0] not in _NOT_FOR_JOBS) + _JOB_OPTIONS,
        interspersed=False,
        epilog="It runs when the queue's policy says so, in an instance made for it. --cpus (1) "
        "and --memory are what it is given, and its limits. Options end at IMAGE.",
        examples=(
            "hutch job submit debian:bookworm sh -c 'sleep 5; echo done'",
            "hutch job submit --queue nightly --estimate 10m --retries 2 --keep /data app train",
            "hutch job submit --array 0-9 --after 17 busybox sh -c 'echo $HUTCH_ARRAY_INDEX'",
            "hutch job submit --file jobs.yaml",
        ),
    ),
    "job ls": Command(
        handler=_ls,
        summary="List the jobs that are not over.",
        options=(
            ("all", "a", "flag", "", "Those too that are over"),
            ("last", "n", "int", "NUMBER", "The last so many only"),
            ("owner", "", "text", "NAME", "Jobs of this user"),
            ("queue", "", "text", "NAME", "Jobs of this queue"),
            ("state", "", "list", "STATE", "Jobs in this state"),
            FORMAT,
            NO_TRUNC,
            QUIET,
        ),
        examples=("hutch job ls -a", "hutch job ls --state failed -o json"),
    ),
    "job show": Command(
        handler=_show,
        summary="Show everything about jobs, their slices too.",
        arguments="JOB [JOB...]",
        low=1,
        high=-1,
        examples=("hutch job show 7",),
    ),
    "job why": Command(
        handler=_why,
        summary="Say why jobs do not run yet: who has what they need, what would help.",
        arguments="JOB [JOB...]",
        low=1,
        high=-1,
        examples=("hutch job why 7", "hutch job why 7 -o json"),
    ),
    "job logs": Command(
        handler=_logs,
        summary="Show what a job wrote, in its last attempt.",
        arguments="JOB",
        low=1,
        high=1,
        options=(
            ("follow", "f", "flag", "", "Go on until it ends"),
            ("tail", "n", "int", "LINES", "The last lines only"),
        ),
        examples=("hutch job logs -f 7",),
    ),
    "job cancel": Command(
        handler=_cancel,
        options=_CHOSEN,
        summary="End jobs, or take them from their queue.",
        arguments="[JOB...]",
        low=0,
        high=-1,
        examples=("hutch job cancel 7 8", "hutch job cancel --queue nightly"),
    ),
    "job hold": Command(
        handler=_hold,
        options=_CHOSEN,
        summary="Keep pending jobs from being started.",
        arguments="[JOB...]",
        low=0,
        high=-1,
        examples=("hutch job hold 7", "hutch job hold --queue nightly"),
    ),
    "job release": Command(
        handler=_release,
        options=_CHOSEN,
        summary="Let held jobs be started.",
        arguments="[JOB...]",
        low=0,
        high=-1,
        examples=("hutch job release 7", "hutch job release --queue nightly"),
    ),
    "job priority": Command(
        handler=_priority,
        summary="Change the priority of jobs; lower goes first.",
        arguments="NUMBER JOB [JOB...]",
        low=2,
        high=-1,
        examples=("hutch job priority -- -5 7",),
    ),
    "job wait": Command(
        handler=_wait,
        summary="Wait until jobs are over; print their state and exit code.",
        arguments="JOB [JOB...]",
        low=1,
        high=-1,
        options=(("timeout", "t", "text", "DURATION", "Wait no longer than this"),),
        epilog="Leaves with the exit code of the first job that did not do well: 124 after a "
        "time limit, 125 where the outcome is unknown, 130 when it was cancelled.",
        examples=("hutch job wait 7 8",),
    ),
    "job output": Command(
        handler=_output,
        summary="Write the paths that a job was asked to keep into a directory, made if missing.",
        arguments="JOB [DIRECTORY]",
        low=1,
        high=2,
        examples=("hutch job output 7 results/",),
    ),
    "job top": Command(
        handler=_top,
        summary="Show jobs as they run, until Ctrl-C.",
        options=(("interval", "", "text", "SECONDS", "Time between two looks (2)"),),
        examples=("hutch job top",),
    ),
    "job prune": Command(
        handler=_prune,
        summary="Forget jobs that are over, with their logs and outputs; print how many.",
        options=(("older-than", "", "text", "DURATION", "Those that ended longer ago (0)"),),
        examples=("hutch job prune --older-than 7d",),
    ),
}
