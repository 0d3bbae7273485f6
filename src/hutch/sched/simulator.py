"""Play a trace against a policy, event by event, and hand each job that ends to a collector.

Memory grows with the jobs that wait and run, not with the trace: it is read one job ahead,
and a job that has ended is dropped once it was counted.

At one instant, jobs end first, then jobs arrive in the order of the trace, then the policy
decides (so a job arriving when a quantum ends is before the one that was running).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import NoReturn, Protocol, cast

from hutch.errors import InternalError, InvalidArgument
from hutch.sched.estimators import Estimator
from hutch.sched.job import Job, Phase
from hutch.sched.metrics import Summary
from hutch.sched.policy import NOTHING, Policy
from hutch.sched.workload import TraceJob

__all__ = ["Observer", "SimJob", "simulate"]

_BATCH = 4096
# A quantum that ends so little before its job does is not worth a pause: sums of fractions
# of seconds miss each other by that much.
_SLACK = 1e-9
_SPINS = 1000
# Seconds are floating numbers: times beyond this have no thousandths left to tell turns apart.
_FAR_S = 1e12


class SimJob(Job):
    """A job in a simulation: what the policy sees, and what only the simulator knows."""

    runtime: float = 0
    left: float = 0
    """Run time still to go when its slice began."""
    slice_began: float = 0
    overhead: float = 0
    """Of this slice: what resuming costs, before work goes on."""
    ends: float = -1
    """When its slice ends if nobody pauses it; negative while it does not run."""
    finish: float = 0
    pauses: int = 0
    foretold: float = 0
    """The estimate at submission."""


class Observer(Protocol):
    """Whoever wants to see every slice and every job."""

    def slice(self, job: SimJob, began: float, ended: float) -> None:
        """A job has run, without a pause, from one time to the other."""

    def done(self, jobs: list[SimJob]) -> None:
        """These jobs have ended, in this order."""


def simulate(
    trace: Iterable[TraceJob],
    policy: Policy,
    *,
    estimator: Estimator | None = None,
    preemption_cost: float = 0,
    observer: Observer | None = None,
    tau: float = 10,
) -> Summary:
    """Return what the policy would have made of the trace.

    `preemption_cost` is the time in seconds that a paused job needs, on its cores, before
    it goes on. Without an `estimator` policies get the trace's estimate, and the true run
    time where there is none. `tau` bounds the bounded slowdown.

    Raises `InvalidArgument` naming the job for a trace that goes back in time, a time beyond
    1e12 seconds or a job that never fits.
    """
    run = _Run(policy, estimator, preemption_cost, observer, tau)
    run.play(trace)
    return run.summary


class _Run:
    """One simulation under way."""

    def __init__(
        self,
        policy: Policy,
        estimator: Estimator | None,
        cost: float,
        observer: Observer | None,
        tau: float,
    ) -> None:
        self.policy = policy
        self.estimator = estimator
        self.cost = cost
        self.observer = observer
        self.summary = Summary(capacity=policy.ledger.capacity, preemption_cost=cost, tau=tau)
        self.ends: list[tuple[float, int, SimJob]] = []
        self.alarms: list[tuple[float, int, SimJob]] = []
        self.done: list[SimJob] = []
        self.seq = 0
        self.last = -math.inf

    def play(self, trace: Iterable[TraceJob]) -> None:
        policy, ends, alarms = self.policy, self.ends, self.alarms
        submit, decide = policy.submit, policy.decide
        coming = iter(trace)
        arriving = next(coming, None)
        arrival = arriving.submit if arriving is not None else math.inf
        before, spins, wake = -math.inf, 0, math.inf
        while True:
            now = ends[0][0] if ends else math.inf
            if arrival < now:
                now = arrival
            if wake < now:
                now = wake
                if ends and ends[0][0] - now < _SLACK:
                    now = ends[0][0]
            if alarms and alarms[0][0] < now:
                now = alarms[0][0]
            if now == math.inf:
                break
            if now > before:
                before, spins = now, 0
            else:
                now, spins = before, spins + 1
                if spins > _SPINS:
                    raise InternalError(f"policy {policy.name} does not go on from {now}")
            while ends and ends[0][0] <= now:
                end, _, job = heappop(ends)
                if job.ends == end:
                    self._finish(job, now)
            while arrival <= now and arriving is not None:
                submit(self._arrive(arriving), now)
                arriving = next(coming, None)
                arrival = arriving.submit if arriving is not None else math.inf
            if alarms and alarms[0][0] <= now:
                self._correct(now)
            decisions = decide(now)
            wake = policy.wake
            if decisions is not NOTHING:
                for paused in decisions.pause:
                    self._pause(cast(SimJob, paused), now)
                for started in decisions.start:
                    self._start(cast(SimJob, started), now)
        if policy.pending:
            raise InternalError(f"policy {policy.name} left {policy.pending} jobs waiting")
        self._flush()

    def _arrive(self, entry: TraceJob) -> SimJob:
        if entry.submit < self.last:
            raise InvalidArgument(
                f"is before that of the job ahead of it ({entry.submit:g} < {self.last:g})",
                field=f"job {entry.id}: submit",
                hint="sort the trace by submit time (--sort)",
            )
        self.last = entry.submit
        self.seq += 1
        runtime = entry.runtime
        if not (entry.submit <= _FAR_S and 0 <= runtime <= _FAR_S):
            _refuse_time(entry)
        estimate = entry.estimate
        if self.estimator is not None:
            estimate = self.estimator.predict(entry)
        elif estimate is None:
            estimate = runtime
        return SimJob(
            entry.id,
            self.seq,
            entry.submit,
            entry.cores,
            estimate,
            entry.memory,
            entry.priority,
            entry.user,
            entry.weight,
            entry.deadline,
            entry.devices,
            entry.queue,
            math.inf if entry.estimate is None else entry.estimate,
            entry.key,
            runtime=runtime,
            left=runtime,
            foretold=estimate,
        )

    def _start(self, job: SimJob, now: float) -> None:
        job.slice_began = now
        if job.pauses:
            job.overhead = self.cost
            end = now + self.cost + job.left
        else:
            end = now + job.left
        job.ends = end
        heappush(self.ends, (end, job.seq, job))
        if self.estimator is not None:
            alarm = now + job.overhead + job.remaining_at(now)
            if alarm < end:
                heappush(self.alarms, (alarm, job.seq, job))

    def _pause(self, job: SimJob, now: float) -> None:
        ran = now - job.slice_began
        job.ends = -1
        job.pauses += 1
        worked = ran - job.overhead
        if worked > 0:
            job.left -= worked
        self.summary.busy += job.cores * ran
        if self.observer is not None:
            self.observer.slice(job, job.slice_began, now)

    def _finish(self, job: SimJob, now: float) -> None:
        self.policy.finish(job, now)
        job.finish = now
        job.ends = -1
        if self.estimator is not None:
            self.estimator.learn(job, job.runtime)
        if self.observer is not None:
            self.observer.slice(job, job.slice_began, now)
        done = self.done
        done.append(job)
        if len(done) == _BATCH:
            self._flush()

    def _correct(self, now: float) -> None:
        """Raise the estimates of jobs that run longer than was foretold."""
        assert self.estimator is not None
        alarms = self.alarms
        while alarms and alarms[0][0] <= now:
            _, seq, job = heappop(alarms)
            if job.phase is not Phase.RUNNING:
                continue
            ran = job.served_at(now)
            # The alarm is a sum and this a difference: they may be apart by the last digits.
            if ran < job.estimate - 4 * math.ulp(now):
                continue  # it was paused meanwhile; its own alarm is on its way
            ran = max(ran, job.estimate)
            estimate = self.estimator.correct(job, ran)
            if estimate <= job.estimate:
                continue
            job.estimate = estimate
            job.corrections += 1
            self.policy.revise(job, now)
            alarm = now + estimate - ran
            if alarm < job.ends:
                heappush(alarms, (alarm, seq, job))

    def _flush(self) -> None:
        self.summary.add(self.done)
        if self.observer is not None:
            self.observer.done(self.done)
        self.done.clear()


def _refuse_time(entry: TraceJob) -> NoReturn:
    """Name the time of a job that cannot be simulated."""
    what = "submit" if not entry.submit <= _FAR_S else "runtime"
    raise InvalidArgument(
        f"must be from 0 to {_FAR_S:g} seconds, got {getattr(entry, what):g}",
        field=f"job {entry.id}: {what}",
        hint="correct it, or leave the job out",
    )
