"""The protocol between a policy and what drives it: a simulator, or a live dispatcher.

A policy decides which jobs run now. It is a plain object without threads, clock or effects:
the driver tells it what happened and when, asks what to do, and does it. The simulator and
the dispatcher of live containers drive the same objects, so what one foretells the other
does.

How to drive one:

1. Make it: `policy = create("rr:quantum=0.1", Capacity(cores=2))`. It keeps a `ledger` of
   what is free; nobody else needs to.
2. Tell what happened, each call with the time now (seconds, never going back):
   `submit` (a job may run from now on), `finish` (a running job has ended, however: done,
   failed, killed, or it could not be started), `withdraw` (a waiting or paused job shall
   not run: cancelled, held; release is `submit` again), `revise` (an estimate, a priority
   or a deadline has changed), `resize` (there is more or less to give out).
3. After everything that happened at one instant has been told, in the order finished,
   then submitted, call `decide(now)` once. It returns `Decisions`: first pause these jobs,
   then start those. A job in `start` that has run before (`job.phase` was paused) is to be
   resumed. When `decide` returns, the policy's books already say that all of it is done;
   the driver does it, and where that fails it says so by `finish`. It may call `decide`
   late, many events at once, or again with nothing new.
4. Call `decide` again at the time `policy.wake` at the latest, though nothing happens until
   then: a quantum ends, a reservation begins, priorities have aged. `wake` is read after
   each `decide`; infinity means no need.

Starting takes time on a real host. Where that matters set `job.since` to when the job
really began to run: quanta are counted from there. `job.served` and `job.phase` belong to
the policy. A dispatcher that is started anew fills in `phase` (running or paused),
`served`, `since` and `began` of the jobs that it finds alive and tells them by `adopt`;
`save` and `load` carry what a policy remembers beyond its jobs (shares used).

A decision costs what changes, not what waits: with 100,000 jobs pending it stays in
microseconds to a few hundred of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import msgspec

from hutch.errors import WrongState
from hutch.sched.job import Job, Phase
from hutch.sched.ledger import Capacity, Ledger
from hutch.sched.parameters import Parameter

__all__ = ["NOTHING", "Base", "Decisions", "Policy", "settled"]

_OUTSIDE, _QUEUED, _RUNNING, _PAUSED = Phase


class Decisions(msgspec.Struct, frozen=True, gc=False):
    """What to do now: pause these first, then start or resume those, both in order.

    No job is in both.
    """

    pause: Sequence[Job]
    start: Sequence[Job]


NOTHING = Decisions((), ())
"""What `decide` returns when all stays as it is; compare with `is`."""


def settled(paused: list[Job], started: list[Job]) -> Decisions:
    """Return decisions without those that were paused and started again within one."""
    if paused:
        out = [job for job in paused if job.phase is _PAUSED]
        if len(out) < len(paused):
            both = {id(job) for job in paused}
            started = [job for job in started if id(job) not in both]
            paused = out
    return Decisions(paused, started) if paused or started else NOTHING


class Policy(Protocol):
    """What every policy offers; see the module for how to use it."""

    name: ClassVar[str]
    summary: ClassVar[str]
    parameters: ClassVar[Mapping[str, Parameter]]
    preemptive: bool
    """Whether it ever pauses a job."""
    wake: float
    ledger: Ledger

    @property
    def pending(self) -> int:
        """How many jobs wait or are paused."""

    def submit(self, job: Job, now: float) -> None:
        """Take a job that may run from now on. Raises `InvalidArgument` if it never fits."""

    def finish(self, job: Job, now: float) -> None:
        """Note that a running job has ended."""

    def withdraw(self, job: Job, now: float) -> None:
        """Take back a job that waits or is paused."""

    def revise(self, job: Job, now: float) -> None:
        """Note that estimate, priority, weight or deadline of a job have been changed."""

    def resize(self, capacity: Capacity, now: float) -> None:
        """Note that there is more or less to give out. Running jobs are left alone."""

    def adopt(self, job: Job, now: float) -> None:
        """Take a job that runs or is paused already, as its `phase` says."""

    def decide(self, now: float) -> Decisions:
        """Return what to do now, and note it as done."""

    def save(self) -> dict[str, Any]:
        """Return what is remembered beyond the jobs, as plain JSON values."""

    def load(self, saved: Mapping[str, Any]) -> None:
        """Remember what `save` returned."""


class Base:
    """The books that policies have in common. Subclasses queue jobs and decide.

    They override `_enqueue` (a job waits from now on) and, where they keep more than a
    queue, `_started`, `_ended` and `_withdrawn`. An entry in a queue carries `job.stamp`
    as it was; it counts only as long as the job has the same (`withdraw` then costs
    nothing, wherever the entry is).
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    parameters: ClassVar[Mapping[str, Parameter]] = {}
    preemptive: bool = False

    def __init__(self, capacity: Capacity) -> None:
        self.ledger = Ledger(capacity)
        self.wake = math.inf
        self.pending = 0

    def submit(self, job: Job, now: float) -> None:
        if job.phase is not _OUTSIDE:
            raise WrongState(f"job {job.id} is submitted already")
        ledger = self.ledger
        if job.memory or job.devices or job.cores > ledger.capacity.cores:
            ledger.check(job)
        job.phase = _QUEUED
        job.stamp += 1
        self.pending += 1
        self._enqueue(job, now)

    def finish(self, job: Job, now: float) -> None:
        if job.phase is not _RUNNING:
            raise WrongState(f"job {job.id} does not run")
        ledger = self.ledger
        if job.memory or job.devices or job.cores.__class__ is not int:
            ledger.give(job)
        else:
            ledger.cores += job.cores
        if now > job.since:
            job.served += now - job.since
        job.phase = _OUTSIDE
        job.stamp += 1
        self._ended(job, now)

    def withdraw(self, job: Job, now: float) -> None:
        if job.phase is not _QUEUED and job.phase is not _PAUSED:
            raise WrongState(f"job {job.id} does not wait", hint="end it and tell `finish`")
        if job.phase is _PAUSED:
            self.ledger.give(job)
        job.phase = _OUTSIDE
        job.stamp += 1
        self.pending -= 1
        self._withdrawn(job, now)

    def revise(self, job: Job, now: float) -> None:
        if job.phase is _QUEUED or job.phase is _PAUSED:
            job.stamp += 1
            self._enqueue(job, now)
        elif job.phase is _RUNNING:
            self._revised(job, now)

    def resize(self, capacity: Capacity, now: float) -> None:
        self.ledger.resize(capacity)

    def adopt(self, job: Job, now: float) -> None:
        running = job.phase is _RUNNING
        if not running and job.phase is not _PAUSED:
            raise WrongState(f"job {job.id} neither runs nor is paused")
        job.phase = _QUEUED
        self.ledger.take(job)
        job.phase = _RUNNING
        job.stamp += 1
        if running:
            self._started(job, now)
            return
        self.ledger.pause(job)
        job.phase = _PAUSED
        self.pending += 1
        self._enqueue(job, now)

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, saved: Mapping[str, Any]) -> None:
        pass

    def _start(self, job: Job, now: float) -> None:
        """Note that a waiting or paused job runs from now on."""
        ledger = self.ledger
        if job.memory or job.devices or job.cores.__class__ is not int:
            ledger.take(job)
        else:
            ledger.cores -= job.cores
        job.phase = _RUNNING
        job.since = now
        if job.began < 0:
            job.began = now
        job.stamp += 1
        self.pending -= 1
        self._started(job, now)

    def _pause(self, job: Job, now: float) -> None:
        """Note that a running job is paused from now on. The caller queues it."""
        self.ledger.pause(job)
        job.served = job.served_at(now)
        job.phase = _PAUSED
        job.stamp += 1
        self.pending += 1

    def _enqueue(self, job: Job, now: float) -> None:
        raise NotImplementedError

    def _started(self, job: Job, now: float) -> None:
        """A job runs: just started, resumed or adopted."""

    def _ended(self, job: Job, now: float) -> None:
        """A running job has ended."""

    def _revised(self, job: Job, now: float) -> None:
        """Facts of a running job have changed."""

    def _withdrawn(self, job: Job, now: float) -> None:
        """A waiting job has been taken back; its entries have lost their stamp."""
