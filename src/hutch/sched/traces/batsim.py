"""Batsim's JSON workloads: jobs that name a profile, which says what they do.

Run times come from profiles: `delay` is seconds; computing is divided by the speed of a
core; a sequence is the sum of its parts. What is sent over a network takes no time here.
The format is one JSON document, so it is read whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from hutch.errors import InvalidArgument
from hutch.sched.workload import TraceJob

__all__ = ["read_batsim", "write_batsim"]

_DEPTH = 32
_COMPUTING = ("parallel_homogeneous", "parallel_homogeneous_total", "parallel")
_HINT = "profiles may be delay, parallel, parallel_homogeneous(_total) and sequential_composition"


def read_batsim(
    data: bytes, *, where: str = "trace", flops: float | None = None
) -> tuple[int | None, list[TraceJob]]:
    """Return how many cores the workload is for, if it says so, and its jobs by submit time.

    `flops` is the speed of a core, in floating point operations a second; without it only
    delays have a run time. Raises `InvalidArgument` naming the job or the profile.
    """
    try:
        document = msgspec.json.decode(data)
    except msgspec.DecodeError as exc:
        raise InvalidArgument(
            f"is no JSON: {exc}", field=where, hint="Batsim workloads are JSON documents"
        ) from None
    if not isinstance(document, dict) or not isinstance(document.get("jobs"), list):
        raise InvalidArgument("has no list of jobs", field=f"{where}: jobs", hint="see Batsim")
    profiles = document.get("profiles")
    if not isinstance(profiles, dict):
        raise InvalidArgument("has no profiles", field=f"{where}: profiles", hint="see Batsim")
    reader = _Reader(where, profiles, flops)
    jobs = [reader.job(n, entry) for n, entry in enumerate(document["jobs"])]
    jobs.sort(key=lambda job: job.submit)
    cores = document.get("nb_res")
    return (cores if isinstance(cores, int) and cores > 0 else None), jobs


class _Reader:
    def __init__(self, where: str, profiles: dict[str, Any], flops: float | None) -> None:
        self.where = where
        self.profiles = profiles
        self.flops = flops

    def job(self, n: int, entry: Any) -> TraceJob:
        field = f"{self.where}: jobs[{n}]"
        if not isinstance(entry, dict):
            raise InvalidArgument("expected an object", field=field, hint="see Batsim")
        name = entry.get("id")
        if not isinstance(name, (str, int)):
            raise InvalidArgument(f"expected a name, got {name!r}", field=f"{field}.id")
        cores = entry.get("res", 1)
        if not isinstance(cores, int) or isinstance(cores, bool) or cores < 1:
            raise InvalidArgument(
                f"expected a whole number above 0, got {cores!r}", field=f"{field}.res"
            )
        submit = self._number(entry, "subtime", field)
        walltime = entry.get("walltime")
        limit = None if walltime in (None, -1) else self._number(entry, "walltime", field)
        return TraceJob(
            id=name,
            submit=submit,
            runtime=self.seconds(entry.get("profile"), cores, f"{field}.profile"),
            cores=cores,
            estimate=limit,
            priority=entry.get("priority", 0),
            user=str(entry.get("user", "")),
            key=str(entry.get("profile", "")),
        )

    def _number(self, entry: dict[str, Any], key: str, field: str) -> float:
        value = entry.get(key)
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not 0 <= value < math.inf
        ):
            raise InvalidArgument(
                f"expected a number from 0 on, got {value!r}",
                field=f"{field}.{key}",
                hint="seconds" if key in ("subtime", "walltime", "delay") else None,
            )
        return value

    def seconds(self, name: Any, cores: int, field: str, depth: int = 0) -> float:
        """Return how long a profile takes."""
        profile = self.profiles.get(str(name))
        if not isinstance(profile, dict):
            raise InvalidArgument(
                f"no such profile: {name!r}", field=field, hint="add it to `profiles`"
            )
        inside = f"{self.where}: profiles.{name}"
        kind = profile.get("type")
        if kind == "delay":
            return self._number(profile, "delay", inside)
        if kind in _COMPUTING:
            return self._computing(profile, cores, inside)
        if kind in ("composed", "sequential_composition"):
            if depth > _DEPTH:
                raise InvalidArgument("contains itself", field=inside, hint="end the circle")
            parts = profile.get("seq")
            repeat = profile.get("repeat", profile.get("nb", 1))
            if not isinstance(parts, list) or not isinstance(repeat, int) or repeat < 0:
                raise InvalidArgument("expected `seq` and `repeat`", field=inside, hint=_HINT)
            return repeat * sum(
                self.seconds(part, cores, f"{inside}.seq", depth + 1) for part in parts
            )
        raise InvalidArgument(f"unknown type: {kind!r}", field=f"{inside}.type", hint=_HINT)

    def _computing(self, profile: dict[str, Any], cores: int, inside: str) -> float:
        if self.flops is None:
            raise InvalidArgument(
                f"a {profile['type']} needs the speed of a core",
                field=inside,
                hint="give --flops, e.g. --flops 1e9",
            )
        work = profile.get("cpu")
        if profile["type"] == "parallel":
            if not isinstance(work, list) or not all(isinstance(w, (int, float)) for w in work):
                raise InvalidArgument("expected a list of numbers", field=f"{inside}.cpu")
            return float(max(work, default=0)) / self.flops
        amount = self._number(profile, "cpu", inside)
        share = cores if profile["type"] == "parallel_homogeneous_total" else 1
        return amount / share / self.flops


def write_batsim(jobs: Iterable[TraceJob], cores: int) -> Iterator[str]:
    """Yield the text of a workload for so many cores, a profile for each run time."""
    yield f'{{"nb_res": {cores}, "jobs": [\n'
    lengths: dict[float, str] = {}
    separator = ""
    for job in jobs:
        profile = lengths.setdefault(job.runtime, f"delay{len(lengths)}")
        entry: dict[str, Any] = {
            "id": str(job.id),
            "subtime": job.submit,
            "res": max(1, math.ceil(job.cores)),
            "profile": profile,
        }
        if job.estimate is not None and job.estimate < math.inf:
            entry["walltime"] = job.estimate
        if job.user:
            entry["user"] = job.user
        if job.priority:
            entry["priority"] = job.priority
        yield separator + msgspec.json.encode(entry).decode()
        separator = ",\n"
    profiles = {name: {"type": "delay", "delay": seconds} for seconds, name in lengths.items()}
    yield f'\n], "profiles": {msgspec.json.encode(profiles).decode()}}}\n'
