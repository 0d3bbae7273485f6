"""Every job's figures, written as they end: CSV, or JSON a line."""

from __future__ import annotations

import csv
from typing import IO, Any

import msgspec

from hutch.sched.simulator import SimJob

__all__ = ["JOB_COLUMNS", "JobWriter", "job_cells"]

JOB_COLUMNS = (
    "policy",
    "id",
    "user",
    "cores",
    "submit",
    "start",
    "finish",
    "runtime",
    "estimate",
    "turnaround",
    "waiting",
    "response",
    "slowdown",
    "bounded_slowdown",
    "preemptions",
)


def job_cells(job: SimJob, policy: str, tau: float = 10) -> list[Any]:
    """Return the cells of `JOB_COLUMNS`; None where there is no value."""
    turnaround = job.finish - job.arrival
    waiting = job.began - job.arrival if not job.pauses else turnaround - job.runtime
    return [
        policy,
        job.id,
        job.user,
        job.cores,
        job.arrival,
        job.began,
        job.finish,
        job.runtime,
        job.foretold if job.foretold < float("inf") else None,
        turnaround,
        max(waiting, 0),
        job.began - job.arrival,
        turnaround / job.runtime if job.runtime else None,
        max(1, turnaround / max(job.runtime, tau)),
        job.pauses,
    ]


class JobWriter:
    """Writes jobs of one policy after another into one file; `lines` for JSON lines."""

    def __init__(self, file: IO[str], *, lines: bool, tau: float = 10) -> None:
        self._file = file
        self._lines = lines
        self._tau = tau
        self._rows = csv.writer(file, lineterminator="\n")
        if not lines:
            self._rows.writerow(JOB_COLUMNS)

    def of(self, policy: str) -> _JobsOf:
        """Return the observer that writes a policy's jobs."""
        return _JobsOf(self, policy)

    def write(self, jobs: list[SimJob], policy: str) -> None:
        rows = (job_cells(job, policy, self._tau) for job in jobs)
        if not self._lines:
            self._rows.writerows(rows)
            return
        for row in rows:
            entry = dict(zip(JOB_COLUMNS, row, strict=True))
            self._file.write(msgspec.json.encode(entry).decode() + "\n")


class _JobsOf:
    def __init__(self, writer: JobWriter, policy: str) -> None:
        self._writer = writer
        self._policy = policy

    def slice(self, job: SimJob, began: float, ended: float) -> None:
        pass

    def done(self, jobs: list[SimJob]) -> None:
        self._writer.write(jobs, self._policy)
