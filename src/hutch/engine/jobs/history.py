"""What the queues did, as a workload: for `hutch sched` to ask what another policy had done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hutch.engine.context import Context
from hutch.engine.jobs.board import list_jobs
from hutch.engine.jobs.queues import get
from hutch.engine.jobs.records import JobRecord, JobState
from hutch.sched.workload import TraceJob

__all__ = ["history"]

_RAN = (JobState.COMPLETED, JobState.FAILED, JobState.TIMEOUT, JobState.CANCELLED)


def history(
    context: Context, queues: Sequence[str] = (), *, since_s: float = 0.0
) -> Iterator[TraceJob]:
    """Return the jobs that ran to an end, in order of their submission; of some queues, or of
    all. Times count from the first of them; `since_s` is seconds since the epoch. Raises
    `NotFound` for a queue that there is not, and of which there are no jobs either."""
    ended = list_jobs(context, states=_RAN)
    missing = set(queues) - {record.queue for record in ended}
    for name in sorted(missing):
        get(context, name)
    records = [
        record
        for record in ended
        if record.ran_ns
        and (not queues or record.queue in queues)
        and record.submitted_ns >= since_s * 1e9
    ]
    records.sort(key=lambda record: record.eligible_ns)
    first = records[0].eligible_ns if records else 0
    return (_trace_job(record, first) for record in records)


def _trace_job(record: JobRecord, first_ns: int) -> TraceJob:
    job = TraceJob(
        id=record.id,
        submit=(record.eligible_ns - first_ns) / 1e9,
        runtime=record.ran_ns / 1e9,
        cores=int(record.cores) if record.cores.is_integer() else record.cores,
        memory=record.memory,
        estimate=record.timeout_s or record.estimate_s or None,
        priority=record.priority,
        user=record.owner,
        queue=record.queue,
        key=record.key,
    )
    if not record.deadline_ns:
        return job
    import msgspec

    return msgspec.structs.replace(job, deadline=(record.deadline_ns - first_ns) / 1e9)
