"""Workloads as CSV: a line of names, then a line for each job."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hutch.errors import InvalidArgument
from hutch.sched.traces.fields import BadLine, number, seconds, size
from hutch.sched.workload import TraceJob

__all__ = ["COLUMNS", "csv_row", "read_csv"]

COLUMNS = (
    "id",
    "submit",
    "runtime",
    "cores",
    "memory",
    "estimate",
    "priority",
    "user",
    "weight",
    "deadline",
    "queue",
    "key",
)
"""What a file may have; all but the first three are optional."""
_NEEDED = COLUMNS[:3]


def _at_least_0(text: str) -> int | float:
    value = seconds(text)
    if value < 0:
        raise InvalidArgument(f"must not be negative, got {text}")
    return value


def _above_0(text: str) -> int | float:
    value = number(text)
    if value <= 0:
        raise InvalidArgument(f"must be above 0, got {text}")
    return value


def _name(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


_READ: dict[str, tuple[Callable[[str], Any], str]] = {
    "id": (_name, "a name or a number"),
    "submit": (_at_least_0, "seconds, or as 1m30s"),
    "runtime": (_at_least_0, "seconds, or as 1m30s"),
    "cores": (_above_0, "a number"),
    "memory": (size, "bytes, or as 512M"),
    "estimate": (_at_least_0, "seconds, or empty if nobody knows"),
    "priority": (number, "a number"),
    "user": (str, "a name"),
    "weight": (_above_0, "a number"),
    "deadline": (_at_least_0, "seconds on the clock of submit"),
    "queue": (str, "a name"),
    "key": (str, "a name"),
}


def read_csv(lines: Iterable[str], *, where: str = "trace") -> Iterator[TraceJob]:
    """Yield the jobs, one line at a time. An empty cell is as if its column were absent.

    Lines that begin with `#` and empty ones are passed over. Raises `BadLine`.
    """
    rows = csv.reader(line for line in lines)
    names = _names(rows, where)
    readers = [(name, _READ[name][0]) for name in names]
    needed = [names.index(name) for name in _NEEDED]
    for cells in rows:
        if not cells or cells[0].lstrip().startswith("#"):
            continue
        if len(cells) != len(names):
            raise BadLine(
                f"expected {len(names)} cells, got {len(cells)}",
                where=where,
                line=rows.line_num,
                field="line",
                hint="put a cell that holds a comma in double quotes",
            )
        try:
            values = {
                name: read(cell.strip())
                for (name, read), cell in zip(readers, cells, strict=True)
                if cell.strip()
            }
        except (ValueError, InvalidArgument):
            _refuse(names, cells, where, rows.line_num)
        if any(not cells[place].strip() for place in needed):
            empty = next(names[place] for place in needed if not cells[place].strip())
            raise BadLine(
                "must not be empty",
                where=where,
                line=rows.line_num,
                field=empty,
                hint=f"write {_READ[empty][1]}",
            )
        yield TraceJob(**values)


def _names(rows: Any, where: str) -> list[str]:
    """Read the line of names."""
    for cells in rows:
        if not cells or cells[0].lstrip().startswith("#"):
            continue
        names = [cell.strip().lower().lstrip("\ufeff") for cell in cells]
        unknown = [name for name in names if name not in COLUMNS]
        missing = [name for name in _NEEDED if name not in names]
        twice = [name for name in names if names.count(name) > 1]
        if unknown or missing or twice:
            wrong = (
                f"has no column {missing[0]!r}"
                if missing
                else f"unknown column {unknown[0]!r}"
                if unknown
                else f"two columns {twice[0]!r}"
            )
            raise BadLine(
                wrong,
                where=where,
                line=rows.line_num,
                field="header",
                hint="the first line names the columns: " + ",".join(COLUMNS[:8]),
            )
        return names
    raise BadLine(
        "is empty",
        where=where,
        line=1,
        field="header",
        hint="the first line names the columns: " + ",".join(COLUMNS[:8]),
    )


def _refuse(names: list[str], cells: list[str], where: str, line: int) -> None:
    """Name the first cell that cannot be read."""
    for name, cell in zip(names, cells, strict=True):
        read, wanted = _READ[name]
        try:
            if cell.strip():
                read(cell.strip())
        except (ValueError, InvalidArgument) as exc:
            ours = isinstance(exc, InvalidArgument) and str(exc).startswith("must")
            raise BadLine(
                str(exc) if ours else f"expected {wanted}, got {cell.strip()!r}",
                where=where,
                line=line,
                field=name,
                hint=f"write {wanted}",
            ) from None


def csv_row(job: TraceJob) -> list[str | float | int]:
    """Return the cells of `COLUMNS` for a job."""
    return [
        job.id,
        job.submit,
        job.runtime,
        job.cores,
        job.memory,
        "" if job.estimate is None or job.estimate == math.inf else job.estimate,
        job.priority,
        job.user,
        job.weight,
        "" if job.deadline == math.inf else job.deadline,
        job.queue,
        job.key,
    ]
