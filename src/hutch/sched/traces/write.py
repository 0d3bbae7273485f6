"""Write a workload in one of the formats, a job at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from typing import IO

from hutch.errors import InvalidArgument
from hutch.sched.traces.batsim import write_batsim
from hutch.sched.traces.swf import swf_header, swf_line
from hutch.sched.traces.table import COLUMNS, csv_row
from hutch.sched.workload import TraceJob

__all__ = ["write_trace"]


def write_trace(
    jobs: Iterable[TraceJob], out: IO[str], kind: str, *, cores: int | None = None
) -> int:
    """Write jobs as `swf`, `csv` or `batsim`; return how many. `cores`: of the machine.

    SWF knows users, queues and keys by number only: they are counted in order of
    appearance, and a name that is a number stays it where it is free. It has no priorities,
    weights or deadlines.
    """
    match kind:
        case "swf":
            return _write_swf(jobs, out, cores)
        case "csv":
            return _write_csv(jobs, out)
        case "batsim":
            entries = list(jobs)
            out.writelines(write_batsim(entries, cores or 1))
            return len(entries)
        case _:
            raise InvalidArgument(
                f"unknown format: {kind!r}", field="format", hint="write swf, csv or batsim"
            )


class Numbers:
    """Numbers for names, in order of appearance from 1; a name that is one stays it, unless
    another name has it already. No two names have the same."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._taken: set[int] = set()
        self._last = 0

    def of(self, name: str) -> int:
        """Return the number of a name; -1 of none."""
        if not name:
            return -1
        if name not in self._numbers:
            self._numbers[name] = self._new(int(name) if name.isdecimal() else None)
        return self._numbers[name]

    def _new(self, wanted: int | None) -> int:
        if wanted is None or wanted in self._taken:
            self._last += 1
            while self._last in self._taken:
                self._last += 1
            wanted = self._last
        self._taken.add(wanted)
        return wanted


def _write_swf(jobs: Iterable[TraceJob], out: IO[str], cores: int | None) -> int:
    out.write(swf_header(cores=cores, note="written by hutch"))
    users, queues, keys = Numbers(), Numbers(), Numbers()
    count = 0
    for count, job in enumerate(jobs, 1):
        out.write(
            swf_line(
                job,
                job.id if isinstance(job.id, int) else count,
                user=users.of(job.user),
                queue=queues.of(job.queue),
                executable=keys.of(job.key),
            )
        )
    return count


def _write_csv(jobs: Iterable[TraceJob], out: IO[str]) -> int:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    count = 0
    for job in jobs:
        writer.writerow(csv_row(job))
        count += 1
    return count
