"""Put jobs into the store: all of a submission or none of it."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hutch.engine.context import Context
from hutch.engine.create import check_references, ensure_image, image_defaults
from hutch.engine.isolation import decide_isolation
from hutch.engine.jobs.records import (
    ACTIVE,
    DONE,
    META,
    QUEUES,
    SPECS,
    WAITING,
    Dependency,
    JobRecord,
    JobSpec,
    JobState,
    QueueRecord,
    key_of,
)
from hutch.engine.jobs.request import Request, read_request
from hutch.errors import InvalidArgument, NotFound, Unsupported
from hutch.image.records import ImageRecord
from hutch.records import Progress, Transaction, silent
from hutch.resources.demand import Demand, demand_of
from hutch.resources.settings import Settings
from hutch.spec.build import build

__all__ = ["Wanted", "find_job", "last_number", "present_user", "submit"]

_COUNTER = META
PENDING_BOUND = 1_000_000


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a submission, as the caller wrote it. `after_names` are other entries of the
    same submission; `where` goes before the names of fields in errors."""

    image: str
    command: Sequence[str] | str | None = None
    options: Mapping[str, Any]
    after_names: tuple[tuple[str, str], ...] = ()
    where: str = ""


class _Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A checked entry: what was asked, what instances are made from, what each needs."""

    request: Request
    spec: JobSpec
    needs: Demand


class _Counter(msgspec.Struct, frozen=True, kw_only=True):
    """The last number that a job was given."""

    last: int = 0


def present_user() -> str:
    """Return the name of the user of this process, or its number where it has no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def submit(
    context: Context, wanted: Sequence[Wanted], *, progress: Progress = silent
) -> list[JobRecord]:
    """Check and store jobs; return their records in order, those of an array one by one.

    When it returns they are on disk. On any error none is there.
    """
    owner = present_user()
    images: dict[str, ImageRecord] = {}
    drafts = [_draft(context, entry, owner, images, progress) for entry in wanted]
    if sum(max(1, len(draft.request.indices)) for draft in drafts) > PENDING_BOUND:
        raise InvalidArgument(f"more than {PENDING_BOUND} jobs at once", field="jobs")
    with context.store.write(durable=True) as tx:
        return _insert(tx, wanted, drafts)


def _draft(
    context: Context,
    entry: Wanted,
    owner: str,
    images: dict[str, ImageRecord],
    progress: Progress,
) -> _Draft:
    """Check one entry and build what its instances are made from."""
    request = read_request(entry.options, owner=owner, where=entry.where)
    options = request.options
    pull, platform = options.pop("pull", None) or "missing", options.pop("platform", None)
    image = images.get(entry.image)
    if image is None:
        image = ensure_image(context, entry.image, pull=pull, platform=platform, progress=progress)
        images[entry.image] = image
    decided, _ = decide_isolation(context, options)
    try:
        spec = build(entry.image, image_defaults(image), entry.command, **decided)
        context.driver(spec.isolation).check(spec)
        needs = demand_of(spec, Settings())
    except (InvalidArgument, Unsupported) as exc:
        if not entry.where:
            raise
        raise InvalidArgument(f"{entry.where}{exc.message}", hint=exc.hint) from exc
    wanted = JobSpec(instance=check_references(context, spec), image_id=image.id)
    return _Draft(request=request, spec=wanted, needs=needs)


def _insert(tx: Transaction, wanted: Sequence[Wanted], drafts: Sequence[_Draft]) -> list[JobRecord]:
    number, now = last_number(tx), time.time_ns()
    made: list[JobRecord] = []
    named: dict[str, list[int]] = {}
    for entry, draft in zip(wanted, drafts, strict=True):
        request = draft.request
        _check_queue(tx, request.queue, entry.where)
        after = (*request.after, *_among(entry, named))
        for dependency in request.after:
            find_job(tx, dependency.job, field=f"{entry.where}after")
        first = number + 1
        tx.put(SPECS, key_of(first), draft.spec)
        for index in request.indices or (0,):
            number += 1
            record = _record(number, first, index, draft, after, now)
            tx.insert(WAITING, key_of(number), record)
            made.append(record)
        if request.name:
            named[request.name] = list(range(first, number + 1))
        tx.event("job", "submit", str(first), count=str(number - first + 1), queue=request.queue)
    tx.put(_COUNTER, "last", _Counter(last=number))
    return made


def _among(entry: Wanted, named: Mapping[str, list[int]]) -> tuple[Dependency, ...]:
    """Return the dependencies on entries of the same submission."""
    found: list[Dependency] = []
    for name, condition in entry.after_names:
        if name not in named:
            raise NotFound(
                f"{entry.where}after: no job {name!r} comes before this one",
                hint="name a job that stands above it in the file",
            )
        found += msgspec.convert(
            [{"job": n, "condition": condition} for n in named[name]], list[Dependency]
        )
    return tuple(found)


def _check_queue(tx: Transaction, name: str, where: str) -> None:
    if tx.get(QUEUES, name, QueueRecord) is not None:
        return
    if name != "default":
        raise NotFound(f"{where}queue: no such queue: {name}", hint=f"`hutch queue create {name}`")
    tx.put(QUEUES, name, QueueRecord(name=name, created_ns=time.time_ns()))


def _record(
    number: int,
    first: int,
    index: int,
    draft: _Draft,
    after: tuple[Dependency, ...],
    now: int,
) -> JobRecord:
    request, instance, needs = draft.request, draft.spec.instance, draft.needs
    base = request.name or instance.image.rpartition("/")[2].partition(":")[0] or "job"
    return JobRecord(
        id=number,
        spec=first,
        name=f"{base}[{index}]" if request.indices else base,
        queue=request.queue,
        image=instance.image,
        command=instance.process.argv,
        isolation=instance.isolation,
        cores=request.cores,
        memory=needs.memory,
        devices=needs.devices,
        is_special=needs.is_special or bool(instance.device_names),
        estimate_s=request.estimate_s,
        priority=request.priority,
        deadline_ns=now + round(request.deadline_s * 1e9) if request.deadline_s else 0,
        timeout_s=request.timeout_s,
        after=after,
        retries=request.retries,
        owner=request.owner,
        group=request.group,
        outputs=request.outputs,
        labels=instance.labels,
        array=first if request.indices else 0,
        index=index,
        state=JobState.HELD if request.hold else JobState.PENDING,
        submitted_ns=now,
        eligible_ns=0 if request.hold or after else now,
    )


def last_number(tx: Transaction) -> int:
    """Return the number of the job that was submitted last, 0 where there was none."""
    counter = tx.get(_COUNTER, "last", _Counter)
    return counter.last if counter is not None else 0


def find_job(tx: Transaction, number: int, *, field: str = "") -> JobRecord:
    """Return a job's record, wherever it stands; raise `NotFound`."""
    for table in (WAITING, ACTIVE, DONE):
        found = tx.get(table, key_of(number), JobRecord)
        if found is not None:
            return found
    before = f"{field}: " if field else ""
    raise NotFound(f"{before}no such job: {number}", hint="`hutch job ls -a` lists the jobs")
