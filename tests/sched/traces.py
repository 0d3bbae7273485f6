"""Small traces for tests, and what simulating them gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hutch.sched import Capacity, create
from hutch.sched.metrics import Summary
from hutch.sched.simulator import SimJob, simulate
from hutch.sched.workload import TraceJob


class Recorder:
    """Keeps every slice and every job."""

    def __init__(self) -> None:
        self.slices: list[tuple[str | int, float, float, float]] = []
        self.jobs: dict[str | int, SimJob] = {}

    def slice(self, job: SimJob, began: float, ended: float) -> None:
        self.slices.append((job.id, began, ended, job.cores))

    def done(self, jobs: list[SimJob]) -> None:
        self.jobs |= {job.id: job for job in jobs}


def jobs(*pairs: tuple[float, float], **facts: Sequence[Any]) -> list[TraceJob]:
    """Make jobs 1, 2, … from (arrival, run time) and other facts by name."""
    return [
        TraceJob(
            id=n + 1, submit=a, runtime=b, **{name: values[n] for name, values in facts.items()}
        )
        for n, (a, b) in enumerate(pairs)
    ]


def run(policy: str, trace: Iterable[TraceJob], cores: int = 1, **options: Any) -> Summary:
    """Simulate a trace; options beyond `memory` go to the simulator."""
    capacity = Capacity(cores=cores, memory=options.pop("memory", None))
    return simulate(trace, create(policy, capacity), **options)


def record(policy: str, trace: Iterable[TraceJob], cores: int = 1, **options: Any) -> Recorder:
    """Simulate a trace; return what ran when."""
    recorder = Recorder()
    run(policy, trace, cores, observer=recorder, **options)
    return recorder
