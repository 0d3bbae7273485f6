"""The Standard Workload Format 2.2: 18 numbers a line, `;` for headers, -1 for unknown.

Source: Chapin et al., "Benchmarks and standards for the evaluation of parallel job
schedulers", JSSPP 1999; definition 2.2 of the Parallel Workloads Archive.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from hutch.sched.traces.fields import BadLine, number
from hutch.sched.workload import TraceJob

__all__ = ["FIELDS", "read_header", "read_swf", "swf_header", "swf_line"]

FIELDS = (
    "job number",
    "submit time",
    "wait time",
    "run time",
    "allocated processors",
    "average CPU time",
    "used memory",
    "requested processors",
    "requested time",
    "requested memory",
    "status",
    "user",
    "group",
    "executable",
    "queue",
    "partition",
    "preceding job",
    "think time",
)
_HEADER = re.compile(r"^;\s*([A-Za-z]+):\s*(.*?)\s*$")
_KIB = 1024


def read_header(lines: Iterable[str]) -> dict[str, str]:
    """Return the `; Key: value` lines before the first job; of a repeated key the first."""
    found: dict[str, str] = {}
    for line in lines:
        if line.strip() and not line.lstrip().startswith(";"):
            break
        if match := _HEADER.match(line):
            found.setdefault(match[1], match[2])
    return found


def read_swf(
    lines: Iterable[str], *, where: str = "trace", skipped: Callable[[int], None] | None = None
) -> Iterator[TraceJob]:
    """Yield the jobs of a log, one line at a time.

    Cores are those asked for, or else those that were given; memory likewise, times the
    cores. Jobs that never ran (no run time or no cores, as cancelled ones have) are left
    out, and `skipped` is told their line. Raises `BadLine`.
    """
    count = 0
    for line in lines:
        count += 1
        values = line.split()
        if not values or values[0].startswith(";"):
            continue
        if len(values) != 18:
            _refuse_length(values, where, count)
        try:
            asked, given = int(values[7]), int(values[4])
            submit, runtime = number(values[1]), number(values[3])
            limit, used, wanted = number(values[8]), number(values[6]), number(values[9])
        except ValueError:
            _refuse(values, where, count)
        cores = asked if asked > 0 else given
        if runtime < 0 or cores <= 0:
            if skipped is not None:
                skipped(count)
            continue
        if submit < 0:
            raise BadLine(
                f"must not be negative, got {values[1]}",
                where=where,
                line=count,
                field=FIELDS[1],
                hint="a log begins at 0; leave the line out",
            )
        memory = wanted if wanted > 0 else used
        name, user = values[0], values[11]
        yield TraceJob(
            int(name) if name.isdecimal() else name,
            submit,
            runtime,
            cores,
            int(memory * _KIB) * cores if memory > 0 else 0,
            limit if limit > 0 else None,
            0,
            "" if user == "-1" else user,
            queue="" if values[14] == "-1" else values[14],
            key="" if values[13] == "-1" else values[13],
        )


def _refuse_length(values: list[str], where: str, line: int) -> NoReturn:
    raise BadLine(
        f"expected 18 fields, got {len(values)}",
        where=where,
        line=line,
        field="line",
        hint="a line of a Standard Workload Format log has 18 numbers, -1 for what is unknown",
    )


def _refuse(values: list[str], where: str, line: int) -> NoReturn:
    """Name the first field that is no number."""
    for place in (1, 3, 4, 6, 7, 8, 9):
        whole = place in (4, 7)
        try:
            int(values[place]) if whole else number(values[place])
        except ValueError:
            raise BadLine(
                f"expected a {'whole ' if whole else ''}number, got {values[place]!r}",
                where=where,
                line=line,
                field=f"field {place + 1} ({FIELDS[place]})",
                hint="write -1 for what is unknown",
            ) from None
    raise AssertionError(values)


def swf_header(*, cores: float | None = None, jobs: int | None = None, note: str = "") -> str:
    """Return header lines for a log of ours."""
    lines = ["; Version: 2.2"]
    if jobs is not None:
        lines += [f"; MaxJobs: {jobs}", f"; MaxRecords: {jobs}"]
    if cores is not None:
        lines += [f"; MaxNodes: {cores:g}", f"; MaxProcs: {math.ceil(cores)}"]
    if note:
        lines.append(f"; Note: {note}")
    return "\n".join(lines) + "\n"


def swf_line(
    job: TraceJob,
    number: int,
    *,
    wait: float = -1,
    status: int = 1,
    user: int = -1,
    executable: int = -1,
    queue: int = -1,
) -> str:
    """Return one line. Names are numbers in this format: the caller counts them.

    Status: 1 done, 0 failed, 5 cancelled. The log has whole cores: parts are rounded up.
    """
    cores = max(1, math.ceil(job.cores))
    memory = math.ceil(job.memory / _KIB / cores) if job.memory else -1
    limit = -1 if job.estimate is None or job.estimate == math.inf else job.estimate
    values = (number, job.submit, wait, job.runtime, cores, -1, -1, cores, limit, memory, status,
              user, -1, executable, queue, -1, -1, -1)  # fmt: skip
    return " ".join(_written(v) for v in values) + "\n"


def _written(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(round(value, 6))
