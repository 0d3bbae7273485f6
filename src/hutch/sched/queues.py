"""A queue of queues: each has a policy of its own, a weight, and perhaps a cap."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import msgspec

from hutch.errors import InvalidArgument
from hutch.sched.job import Job
from hutch.sched.ledger import Capacity, Ledger
from hutch.sched.parameters import Parameter
from hutch.sched.policy import NOTHING, Decisions, Policy
from hutch.sched.registry import create

__all__ = ["MultiLevel", "QueueSpec", "parse_queue"]

_WHOLE_MACHINE = ("conservative",)


class QueueSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One queue: its name, its policy with parameters, and its part of the machine.

    `weight` is its share among the queues that have jobs; `cap` the most cores it ever has.
    """

    name: str
    policy: str = "fcfs"
    weight: float = 1
    cap: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise InvalidArgument(
                f"must be above 0, got {self.weight!r}", field=f"queue {self.name}.weight"
            )
        if not self.cap > 0:
            raise InvalidArgument(
                f"must be above 0, got {self.cap!r}", field=f"queue {self.name}.cap"
            )


def parse_queue(text: str) -> QueueSpec:
    """Read `NAME=POLICY;weight=3;cap=64`, of which weight and cap may be left out."""
    first, *rest = text.split(";")
    name, equals, policy = first.partition("=")
    if not equals or not name.strip():
        raise InvalidArgument(
            f"expected NAME=POLICY, got {text!r}",
            field="queue",
            hint="for instance interactive=rr:quantum=1;weight=3;cap=64",
        )
    numbers: dict[str, float] = {}
    for part in rest:
        key, _, value = part.partition("=")
        if key.strip() not in ("weight", "cap"):
            raise InvalidArgument(
                f"no such setting: {key.strip()!r}",
                field=f"queue {name.strip()}",
                hint="it has weight and cap",
            )
        try:
            numbers[key.strip()] = float(value)
        except ValueError:
            raise InvalidArgument(
                f"expected a number, got {value!r}", field=f"queue {name.strip()}.{key.strip()}"
            ) from None
    return QueueSpec(name=name.strip(), policy=policy.strip() or "fcfs", **numbers)


class _Queue:
    """A queue at work. `used`: the cores of its jobs that run."""

    __slots__ = ("policy", "spec", "used")

    def __init__(self, spec: QueueSpec, policy: Policy) -> None:
        self.spec = spec
        self.policy = policy
        self.used: float = 0

    @property
    def need(self) -> float:
        return self.used / self.spec.weight


class MultiLevel:
    """Several queues on one machine, itself a policy.

    A queue with jobs is due its weight's share of the cores, among those that have jobs.
    First each may fill its share, the one furthest below it first; what is left over is
    lent in the same order, so that no core idles while a job fits, and comes back as jobs
    end: queues do not pause each other's jobs. A queue never has more than its cap. A job
    wider than its queue's share runs on what is lent. Jobs go to the queue of their name;
    with no name, to the first.
    """

    name: ClassVar[str] = "multilevel"
    summary: ClassVar[str] = "a queue of queues, each with its policy, weight and cap"
    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def __init__(
        self, capacity: Capacity, queues: Sequence[QueueSpec], *, seed: int | None = None
    ) -> None:
        if not queues:
            raise InvalidArgument("needs at least one queue", field="queues")
        self.ledger = Ledger(capacity)
        self.wake = math.inf
        self._queues: dict[str, _Queue] = {}
        for spec in queues:
            if spec.name in self._queues:
                raise InvalidArgument(f"two queues of the name {spec.name!r}", field="queues")
            if spec.policy.partition(":")[0] in _WHOLE_MACHINE:
                raise InvalidArgument(
                    f"{spec.policy} plans the whole machine",
                    field=f"queue {spec.name}.policy",
                    hint="take easy",
                )
            policy = create(spec.policy, self._part(capacity, spec), seed=seed)
            self._queues[spec.name] = _Queue(spec, policy)
        self._first = next(iter(self._queues.values()))
        self.preemptive = any(queue.policy.preemptive for queue in self._queues.values())

    @staticmethod
    def _part(capacity: Capacity, spec: QueueSpec) -> Capacity:
        return msgspec.structs.replace(capacity, cores=min(capacity.cores, spec.cap))

    @property
    def pending(self) -> int:
        """How many jobs wait or are paused, in all queues."""
        return sum(queue.policy.pending for queue in self._queues.values())

    def used(self) -> dict[str, float]:
        """Return how many cores each queue has."""
        return {name: queue.used for name, queue in self._queues.items()}

    def _of(self, job: Job) -> _Queue:
        if not job.queue:
            return self._first
        queue = self._queues.get(job.queue)
        if queue is None:
            raise InvalidArgument(
                f"no such queue: {job.queue!r}",
                field=f"job {job.id}: queue",
                hint=f"there are {', '.join(self._queues)}",
            )
        return queue

    @contextmanager
    def _lent(self, queue: _Queue, cores: float) -> Iterator[Policy]:
        """Lend a queue so many free cores, all memory and devices; take back what is left."""
        ours, theirs = self.ledger, queue.policy.ledger
        theirs.cores, theirs.memory, theirs.devices = cores, ours.memory, ours.devices
        yield queue.policy
        taken = cores - theirs.cores
        queue.used = round(queue.used + taken, 6)
        ours.cores = round(ours.cores - taken, 6)
        ours.memory = theirs.memory

    def submit(self, job: Job, now: float) -> None:
        with self._lent(self._of(job), 0) as policy:
            policy.submit(job, now)

    def finish(self, job: Job, now: float) -> None:
        with self._lent(self._of(job), 0) as policy:
            policy.finish(job, now)

    def withdraw(self, job: Job, now: float) -> None:
        with self._lent(self._of(job), 0) as policy:
            policy.withdraw(job, now)

    def revise(self, job: Job, now: float) -> None:
        with self._lent(self._of(job), 0) as policy:
            policy.revise(job, now)

    def adopt(self, job: Job, now: float) -> None:
        with self._lent(self._of(job), 0) as policy:
            policy.adopt(job, now)

    def resize(self, capacity: Capacity, now: float) -> None:
        self.ledger.resize(capacity)
        for queue in self._queues.values():
            queue.policy.resize(self._part(capacity, queue.spec), now)

    def decide(self, now: float) -> Decisions:
        paused: list[Job] = []
        started: list[Job] = []
        active = [q for q in self._queues.values() if q.policy.pending or q.used]
        weights = sum(queue.spec.weight for queue in active)
        due = {q.spec.name: q.spec.weight / weights * self.ledger.capacity.cores for q in active}
        for shared in (True, False):
            for queue in sorted(active, key=lambda q: q.need):
                if not queue.policy.pending and queue.policy.wake > now:
                    continue
                room = min(self.ledger.cores, queue.spec.cap - queue.used)
                if shared:
                    room = min(room, due[queue.spec.name] - queue.used)
                # Cores below 0 keep it from starting, not from changing turns.
                decisions = self._ask(queue, max(room, 0), now)
                paused += decisions.pause
                started += decisions.start
        self.wake = min((q.policy.wake for q in active), default=math.inf)
        return _merged(paused, started)

    def _ask(self, queue: _Queue, room: float, now: float) -> Decisions:
        whole = int(room) if float(room).is_integer() else room
        with self._lent(queue, whole) as policy:
            return policy.decide(now)

    def save(self) -> dict[str, Any]:
        return {name: queue.policy.save() for name, queue in self._queues.items()}

    def load(self, saved: Mapping[str, Any]) -> None:
        for name, queue in self._queues.items():
            queue.policy.load(saved.get(name, {}))


def _merged(paused: list[Job], started: list[Job]) -> Decisions:
    """Return the decisions of two rounds as one: what the second undid is left out."""
    if not paused and not started:
        return NOTHING
    both = {id(job) for job in paused} & {id(job) for job in started}
    if both:
        paused = [job for job in paused if id(job) not in both]
        started = [job for job in started if id(job) not in both]
    return Decisions(paused, started)
