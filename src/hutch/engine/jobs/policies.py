"""The queues of a root as one policy, and jobs as policies see them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hutch.engine.context import Context
from hutch.engine.jobs.records import QUEUES, JobRecord, QueueRecord
from hutch.sched import Capacity, Decisions, Job, Phase, Policy, create
from hutch.sched.estimators import Estimator, create_estimator
from hutch.sched.queues import MultiLevel, QueueSpec

__all__ = ["QueuePolicy", "build_policy", "sched_job"]

_LEAST_STEP_S = 0.01  # so that a job's timer does not go off all the time


def sched_job(record: JobRecord) -> Job:
    """Return a job as policies see it. Times are seconds since the epoch."""
    return Job(
        id=record.id,
        seq=record.id,
        arrival=(record.eligible_ns or record.submitted_ns) / 1e9,
        cores=int(record.cores) if record.cores.is_integer() else record.cores,
        memory=record.memory,
        estimate=record.predicted_s or record.estimate_s or math.inf,
        priority=record.priority,
        user=record.owner,
        deadline=record.deadline_ns / 1e9 if record.deadline_ns else math.inf,
        queue=record.queue,
        key=record.key,
        devices=tuple((name, 1) for name in record.devices),
        limit=record.timeout_s or record.estimate_s or math.inf,
        served=record.ran_ns / 1e9,
        since=record.mark / 1e9,
        began=record.started_ns / 1e9 if record.started_ns else -1,
    )


def build_policy(records: Sequence[QueueRecord], capacity: Capacity) -> Policy:
    """Make the policy of some queues: one alone is what it says, several share by weight.

    Raises `InvalidArgument` for a policy that is none, or that cannot share the machine.
    """
    if not records:
        return create("fcfs", capacity)
    if len(records) == 1 and not records[0].cores:
        return create(records[0].policy, capacity)
    return MultiLevel(
        capacity,
        [
            QueueSpec(name=r.name, policy=r.policy, weight=r.weight, cap=r.cores or math.inf)
            for r in records
        ],
    )


class _Asked:
    """A job as estimators ask for it."""

    def __init__(self, record: JobRecord) -> None:
        self.estimate = record.estimate_s or None
        self.user = record.owner
        self.key = record.key


class QueuePolicy:
    """One policy over all queues, which gives out a capacity."""

    def __init__(self, context: Context, capacity: Capacity) -> None:
        self._context = context
        self._capacity = capacity
        self._records: tuple[QueueRecord, ...] = ()
        self._estimators: dict[str, Estimator] = {}
        self._policy = self._build()
        self.running = 0

    def refresh(self) -> bool:
        """Read the queues anew; tell whether they are others than before. Then `clear` is to
        follow, and every job is to be told again."""
        with self._context.store.read() as tx:
            found = tuple(record for _, record in tx.items(QUEUES, QueueRecord))
        if found == self._records:
            return False
        self._records = found
        return True

    def clear(self) -> None:
        """Begin with a new policy, which knows no job."""
        self._policy = self._build()
        self.running = 0

    def is_open(self, name: str) -> bool:
        """Tell whether jobs of a queue may run."""
        return any(r.name == name and not r.paused for r in self._records)

    def _build(self) -> Policy:
        """Make the policy of the queues that there are."""
        self._estimators = {r.name: create_estimator(r.predictor) for r in self._records}
        return build_policy(self._records, self._capacity)

    def resize(self, capacity: Capacity, now: float) -> None:
        """Tell that there is more or less to give out."""
        if capacity != self._capacity:
            self._capacity = capacity
            self._policy.resize(capacity, now)

    def suspends_after(self, name: str) -> float:
        """Return for how many seconds a machine of a queue may wait in memory; 0: for ever."""
        return next((r.suspend_s for r in self._records if r.name == name), 0.0)

    # ---- how long jobs take ----------------------------------------------------------------

    def predict(self, record: JobRecord) -> float:
        """Return how long a job is expected to run, in seconds; 0 where nobody knows."""
        estimator = self._estimators.get(record.queue)
        if estimator is None:
            return record.estimate_s
        foretold = estimator.predict(_Asked(record))
        return foretold if math.isfinite(foretold) else 0.0

    def correct(self, job: Job, now: float, ran_s: float) -> float:
        """Raise the estimate of a job that has outlived it; return the new one, which is above
        what it has run: by the record, or by the policy's clock, which begins a little later."""
        estimator = self._estimators.get(job.queue)
        if estimator is not None:
            ran_s = max(ran_s, job.served_at(now))
            job.estimate = max(estimator.correct(job, ran_s), ran_s + _LEAST_STEP_S)
            job.corrections += 1
            self._policy.revise(job, now)
        return job.estimate

    def learn(self, record: JobRecord) -> None:
        """Take note of how long a job ran, for what is predicted of others."""
        estimator = self._estimators.get(record.queue)
        if estimator is not None:
            estimator.learn(sched_job(record), record.ran_ns / 1e9)

    # ---- the policy ------------------------------------------------------------------------

    @property
    def wake(self) -> float:
        """When `decide` is to be asked again at the latest."""
        return self._policy.wake

    @property
    def pending(self) -> int:
        """How many jobs wait for their turn, those that were preempted included."""
        return self._policy.pending

    def submit(self, job: Job, now: float) -> None:
        """Tell of a job that may run; raise `InvalidArgument` if it never fits."""
        self._policy.submit(job, now)

    def adopt(self, job: Job, now: float, *, paused: bool) -> None:
        """Tell of a job that has an instance already."""
        job.phase = Phase.PAUSED if paused else Phase.RUNNING
        self._policy.adopt(job, now)
        self.running += not paused

    def put_back(self, job: Job, now: float) -> None:
        """Tell that a job which was to go on stays paused."""
        served, began = job.served, job.began
        self.finish(job, now)
        job.served, job.began, job.phase = served, began, Phase.PAUSED
        self._policy.adopt(job, now)

    def finish(self, job: Job, now: float) -> None:
        """Tell that a running job has ended."""
        self._policy.finish(job, now)
        self.running -= 1

    def withdraw(self, job: Job, now: float) -> None:
        """Take back a job that does not run."""
        self._policy.withdraw(job, now)

    def revise(self, job: Job, now: float) -> None:
        """Tell that a priority has changed."""
        self._policy.revise(job, now)

    def decide(self, now: float) -> Decisions:
        """Return what to do now."""
        decisions = self._policy.decide(now)
        self.running += len(decisions.start) - len(decisions.pause)
        return decisions
