"""What a schedule was worth, per job and summed up.

With arrival a, run time b, first run s and end f: turnaround = f − a, waiting = f − a − b
(for preemptive policies too), response = s − a, slowdown = turnaround / b, bounded slowdown
= max(1, turnaround / max(b, τ)). Makespan is from the first arrival to the last end;
utilisation = busy core-seconds / (cores × makespan); Jain's index is that of the slowdowns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hutch.sched.ledger import Capacity
from hutch.sched.quantiles import Quantiles

if TYPE_CHECKING:
    from hutch.sched.simulator import SimJob

__all__ = ["METRICS", "Distribution", "Summary", "mean_execution", "weighted_response"]

METRICS = ("turnaround", "waiting", "response", "slowdown", "bounded_slowdown")
"""Per job and summed. Slowdown leaves out jobs without run time, for which it has no value."""


def mean_execution(times: Iterable[float]) -> float:
    """Return T_avg = (1/n) Σ T_i, the mean of the execution times of jobs in seconds."""
    values = list(times)
    return _sum(values) / len(values) if values else math.nan


def weighted_response(jobs: Iterable[tuple[float, float, float]]) -> float:
    """Return T_avg = (1/n) Σ (w_i + w_i · r_i / s_i), weighted by priorities, in seconds.

    Each job is (w, r, s): execution time, time remaining, priority above 0.
    """
    values = [w + w * r / s for w, r, s in jobs]
    return _sum(values) / len(values) if values else math.nan


def _sum(values: Sequence[float]) -> float:
    """Return the sum: exact of whole numbers, rounded once of others."""
    total = sum(values)
    return total if isinstance(total, int) else math.fsum(values)


class Distribution:
    """One metric over all jobs."""

    __slots__ = ("_quantiles", "_sum", "count", "highest")

    def __init__(self) -> None:
        self._sum: float = 0
        self.count = 0
        self.highest: float = 0
        self._quantiles = Quantiles()

    def add(self, values: list[float]) -> None:
        """Count the values of some jobs."""
        if values:
            self._sum += _sum(values)
            self.count += len(values)
            self.highest = max(self.highest, max(values))
            self._quantiles.add(values)

    @property
    def mean(self) -> float:
        return self._sum / self.count if self.count else math.nan

    @property
    def exact(self) -> bool:
        """Whether the quantiles are exact; those of more than 50,000 jobs are within 0.1 %."""
        return self._quantiles.exact

    def quantiles(self, *fractions: float) -> list[float]:
        return self._quantiles.at(*fractions)

    def curve(self, points: int = 200) -> list[tuple[float, float]]:
        """Return points (value, share of jobs up to it)."""
        return self._quantiles.curve(points)

    def as_dict(self) -> dict[str, float | None]:
        median, p95, p99 = self._quantiles.at(0.5, 0.95, 0.99)
        return {
            "mean": _number(self.mean),
            "median": _number(median),
            "p95": _number(p95),
            "p99": _number(p99),
        }


def _number(value: float) -> float | None:
    """Return the value as JSON can hold it: nothing has no mean."""
    return value if math.isfinite(value) else None


def _waited(job: SimJob) -> float:
    """Return the time a job did not run: end − arrival − run time.

    For one that ran in one piece the same is had without rounding.
    """
    if not job.pauses:
        return job.began - job.arrival
    waited = job.finish - job.arrival - job.runtime
    return waited if waited > 0 else 0


class EstimateError:
    """How far predictions at submission were from the run times."""

    __slots__ = ("absolute", "accuracy", "known", "short", "unknown")

    def __init__(self) -> None:
        self.known = self.unknown = self.short = 0
        self.absolute: float = 0
        self.accuracy: float = 0

    def add(self, pairs: Iterable[tuple[float, float]]) -> None:
        """Count (foretold, run time) of some jobs."""
        for foretold, runtime in pairs:
            if foretold == runtime:
                self.known += 1
                self.accuracy += 1
            elif foretold == math.inf:
                self.unknown += 1
            else:
                self.known += 1
                self.absolute += abs(foretold - runtime)
                if foretold < runtime:
                    self.short += 1
                    self.accuracy += foretold / runtime
                else:
                    self.accuracy += runtime / foretold

    def as_dict(self) -> dict[str, float | None]:
        """Return the mean absolute error in seconds; the accuracy, which is the mean of
        min(p/r, r/p); the share of predictions below the run time; how many had none."""
        n = self.known
        return {
            "mean_absolute_error": self.absolute / n if n else None,
            "accuracy": self.accuracy / n if n else None,
            "too_short": self.short / n if n else None,
            "unknown": self.unknown,
        }


class Summary:
    """What one policy made of one trace. `busy` is in core-seconds."""

    def __init__(self, *, capacity: Capacity, preemption_cost: float = 0, tau: float = 10) -> None:
        self.capacity = capacity
        self.preemption_cost = preemption_cost
        self.tau = tau
        self.policy = ""
        self.jobs = 0
        self.preemptions = 0
        self.busy: float = 0
        self.first_arrival: float = math.inf
        self.last_finish: float = -math.inf
        self.missed_deadlines = 0
        self.turnaround = Distribution()
        self.waiting = Distribution()
        self.response = Distribution()
        self.slowdown = Distribution()
        self.bounded_slowdown = Distribution()
        self.estimates = EstimateError()
        self._squares: float = 0
        self._executed: float = 0
        self._weighted: float = 0

    def add(self, jobs: Sequence[SimJob]) -> None:
        """Count jobs that have ended."""
        if not jobs:
            return
        self.jobs += len(jobs)
        self.first_arrival = min(self.first_arrival, min([job.arrival for job in jobs]))
        self.last_finish = max(self.last_finish, max([job.finish for job in jobs]))
        self.preemptions += sum([job.pauses for job in jobs])
        # The last slice of each; those before a pause were counted at the pause.
        self.busy += sum([job.cores * (job.finish - job.slice_began) for job in jobs])
        self.missed_deadlines += sum([job.finish > job.deadline for job in jobs])
        times = [job.runtime for job in jobs]
        turnarounds = [job.finish - job.arrival for job in jobs]
        slowdowns = [t / b for t, b in zip(turnarounds, times, strict=True) if b]
        tau = self.tau
        self.turnaround.add(turnarounds)
        self.waiting.add([_waited(job) for job in jobs])
        self.response.add([job.began - job.arrival for job in jobs])
        self.slowdown.add(slowdowns)
        self.bounded_slowdown.add(
            [
                (t / b if t > b else 1) if b > tau else (t / tau if t > tau else 1)
                for t, b in zip(turnarounds, times, strict=True)
            ]
        )
        self._squares += math.fsum([s * s for s in slowdowns])
        self._executed += _sum(times)
        self._weighted += math.fsum(
            [
                b + b * b / (job.priority if job.priority > 0 else 1)
                for job, b in zip(jobs, times, strict=True)
            ]
        )
        self.estimates.add([(job.foretold, job.runtime) for job in jobs])

    @property
    def makespan(self) -> float:
        """Seconds from the first arrival to the last end."""
        return self.last_finish - self.first_arrival if self.jobs else 0

    @property
    def utilisation(self) -> float:
        """The share of core-seconds that were busy, resuming included."""
        whole = self.capacity.cores * self.makespan
        return self.busy / whole if whole else 0

    @property
    def jain(self) -> float:
        """Jain's fairness index of the slowdowns: 1 when all are equal, 1/n at worst."""
        n = self.slowdown.count
        if not n or not self._squares:
            return math.nan
        total = self.slowdown.mean * n
        return total * total / (n * self._squares)

    @property
    def mean_execution(self) -> float:
        """The mean run time; see the function of this name."""
        return self._executed / self.jobs if self.jobs else math.nan

    @property
    def weighted_response(self) -> float:
        """The estimate of this name at submission, where all of a job remains (r = w).

        A priority that is not above 0 counts as 1.
        """
        return self._weighted / self.jobs if self.jobs else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values. Times in seconds; None where there is no value."""
        return {
            "policy": self.policy,
            "jobs": self.jobs,
            "makespan": self.makespan,
            "utilisation": self.utilisation,
            **{name: getattr(self, name).as_dict() for name in METRICS},
            "jain": _number(self.jain),
            "preemptions": self.preemptions,
            "preemption_cost": self.preemption_cost,
            "mean_execution": _number(self.mean_execution),
            "weighted_response": _number(self.weighted_response),
            "missed_deadlines": self.missed_deadlines,
            "estimates": self.estimates.as_dict(),
            "exact_quantiles": self.turnaround.exact,
        }
