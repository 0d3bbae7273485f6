"""What somebody asks of a job, checked: the scheduling part and the part of its instance.

Pure: nothing of the root is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hutch.engine.jobs.records import Condition, Dependency
from hutch.errors import InvalidArgument
from hutch.spec.build import check_name
from hutch.spec.parse import integer, items, number, strings, text
from hutch.units import parse_bytes, parse_duration

__all__ = ["JOB_OPTIONS", "Request", "read_array", "read_dependencies", "read_request"]

JOB_OPTIONS = frozenset(
    """after array deadline estimate group hold name outputs owner priority queue retries
    timeout""".split()
)
_PRIORITY_BOUND = 1_000_000
_RETRIES_BOUND = 1000
_ARRAY_BOUND = 1_000_000
_LONGEST_S = 10 * 365 * 86400.0
_REFUSED = {
    "remove": "the queue removes the instance when it has what it keeps of it",
    "restart": "use retries=",
    "interactive": "a job has no input",
    "stdin_once": "a job has no input",
    "env_file": "the command line reads it; from Python pass env=",
}
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request. Durations in seconds, `deadline` seconds from its submission (0 for
    none), `indices` those of an array (empty for a single job); `options` are those of the
    instance."""

    name: str
    queue: str
    cores: float
    memory: int
    estimate_s: float
    priority: int
    deadline_s: float
    timeout_s: float
    after: tuple[Dependency, ...]
    retries: int
    owner: str
    group: str
    outputs: tuple[str, ...]
    hold: bool
    indices: tuple[int, ...]
    options: dict[str, Any]


def read_request(options: Mapping[str, Any], *, owner: str, where: str = "") -> Request:
    """Return the request that these options are; `where` goes before names of fields.

    Raises `InvalidArgument` naming the field. What concerns the instance alone is left in
    `options` for `hutch.spec.build`, with its limits set to what is scheduled.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, cure in _REFUSED.items():
        if given.get(name):
            raise InvalidArgument("is not possible for a job", field=where + name, hint=cure)
    cores = number(given.get("cpus", 1.0), where + "cpus", low=0.01, high=65536)
    rest = {name: value for name, value in given.items() if name not in JOB_OPTIONS}
    rest["cpus"] = cores
    return Request(
        name=check_name(given["name"], where + "name") if "name" in given else "",
        queue=check_name(given.get("queue", "default"), where + "queue"),
        cores=cores,
        memory=parse_bytes(given.get("memory", 0), field=where + "memory"),
        estimate_s=_seconds(given.get("estimate", 0), where + "estimate"),
        priority=integer(
            given.get("priority", 0),
            where + "priority",
            low=-_PRIORITY_BOUND,
            high=_PRIORITY_BOUND,
        ),
        deadline_s=_seconds(given.get("deadline", 0), where + "deadline"),
        timeout_s=_seconds(given.get("timeout", 0), where + "timeout"),
        after=read_dependencies(given.get("after", ()), where + "after"),
        retries=integer(given.get("retries", 0), where + "retries", low=0, high=_RETRIES_BOUND),
        owner=text(given.get("owner", owner), where + "owner", empty=False),
        group=text(given.get("group", ""), where + "group"),
        outputs=_outputs(given.get("outputs", ()), where + "outputs"),
        hold=bool(given.get("hold", False)),
        indices=read_array(given.get("array"), where + "array"),
        options=rest,
    )


def _seconds(value: Any, field: str) -> float:
    seconds = float(parse_duration(value, field=field))
    if seconds > _LONGEST_S:
        raise InvalidArgument("longer than ten years", field=field)
    return seconds


def _outputs(value: Any, field: str) -> tuple[str, ...]:
    paths = strings(value, field)
    for i, path in enumerate(paths):
        if not path.startswith("/"):
            raise InvalidArgument(f"must be absolute, got {path[:80]!r}", field=f"{field}[{i}]")
    return tuple(dict.fromkeys(paths))


def read_dependencies(value: Any, field: str) -> tuple[Dependency, ...]:
    """Return dependencies from numbers of jobs or `NUMBER:CONDITION` (ok, failed, any)."""
    found = {}
    for i, entry in enumerate(items(value, field)):
        name = f"{field}[{i}]"
        job, _, condition = str(entry).partition(":")
        if not job.isascii() or not job.isdecimal() or len(job) > 12:
            raise InvalidArgument(
                f"expected the number of a job, got {str(entry)[:40]!r}",
                field=name,
                hint="7, or 7:ok, 7:failed, 7:any",
            )
        if condition and condition not in tuple(Condition):
            raise InvalidArgument(
                f"expected {', '.join(Condition)}, got {condition[:40]!r}", field=name
            )
        found[int(job)] = Dependency(job=int(job), condition=Condition(condition or "ok"))
    return tuple(found.values())


def read_array(value: Any, field: str) -> tuple[int, ...]:
    """Return the indices of an array: a count, a sequence of numbers, or text such as
    `0-9`, `1-100:10` or `1,5,7-9`, as Slurm has it. None is no array."""
    if value is None:
        return ()
    if isinstance(value, int) and not isinstance(value, bool):
        return tuple(range(integer(value, field, low=1, high=_ARRAY_BOUND)))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(
            dict.fromkeys(
                integer(v, f"{field}[{i}]", low=0, high=2**31) for i, v in enumerate(value)
            )
        )
    indices: dict[int, None] = {}
    for part in text(value, field, empty=False).split(","):
        indices.update(dict.fromkeys(_range(part.strip(), field)))
        if len(indices) > _ARRAY_BOUND:
            raise InvalidArgument(f"more than {_ARRAY_BOUND} jobs", field=field)
    return tuple(indices)


def _range(part: str, field: str) -> range:
    match = _RANGE.fullmatch(part)
    if match is None or any(len(digits or "") > 9 for digits in match.groups()):
        raise InvalidArgument(
            f"expected indices, got {part[:40]!r}", field=field, hint="0-9, 1-100:10 or 1,5,7"
        )
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    step = int(match[3]) if match[3] else 1
    if last < first or step < 1:
        raise InvalidArgument(f"no indices in {part!r}", field=field, hint="FIRST-LAST[:STEP]")
    if (last - first) // step >= _ARRAY_BOUND:
        raise InvalidArgument(f"more than {_ARRAY_BOUND} jobs", field=field)
    return range(first, last + 1, step)
