"""The records of jobs and queues in the store.

A job's record moves from table to table: who waits is in `jobs_waiting`, who has an instance in
`jobs_active`, and who has ended in `jobs_done`. So a dispatcher reads what is left to do, however
long the history is. What an instance of it needs, which is larger, lies in `jobs_specs`.
"""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
from collections.abc import Iterator
from enum import StrEnum
from typing import Protocol

import msgspec

from hutch.records import Transaction
from hutch.spec.model import InstanceSpec

__all__ = ["LABEL", "ACTIVE", "DONE", "META", "QUEUES", "REQUESTS", "SPECS", "WAITING"]
__all__ += ["Condition", "Dependency", "JobRecord", "JobRequest", "JobSpec", "JobState"]
__all__ += ["Limits", "QueueRecord", "RequestKind", "Selection", "Slice", "jobs_of_image", "key_of"]
__all__ += ["name_of_instance"]

WAITING, ACTIVE, DONE = "jobs_waiting", "jobs_active", "jobs_done"
SPECS, REQUESTS, QUEUES, META = "jobs_specs", "jobs_requests", "queues", "jobs_meta"

# The label that tells the job of an instance.
LABEL = "hutch.job"
# The slices that are kept of a job; their number and their sum are right beyond that.
SLICES_KEPT = 200


class JobState(StrEnum):
    """Where a job stands. `unknown`: it was started, and nobody can say how it ended."""

    HELD = "held"
    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    UNKNOWN = "unknown"

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self in _FINAL


_FINAL = frozenset(
    {
        JobState.COMPLETED,
        JobState.FAILED,
        JobState.CANCELLED,
        JobState.TIMEOUT,
        JobState.UNKNOWN,
    }
)


class Condition(StrEnum):
    """How another job must have ended."""

    OK = "ok"
    FAILED = "failed"
    ANY = "any"


class Dependency(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A job that must have ended first, and how."""

    job: int
    condition: Condition = Condition.OK


class Slice(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One time in which a job ran, in nanoseconds since the epoch, and what was done to it
    then: nothing where it ended, `paused`, `reclaimed` (paused, and what could go of its memory
    was taken: `given` bytes), `suspended` (its memory is on disk)."""

    begin: int
    end: int
    then: str = ""
    given: int = 0


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance of a job is made from."""

    instance: InstanceSpec
    image_id: str


# A hundred thousand of them are looked through by nobody's garbage collector: none is in a cycle.
class JobRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One job. Times in nanoseconds since the epoch (0: not yet), durations in seconds (0: none
    stated), memory in bytes, as it counts: of a virtual machine with what QEMU takes. `devices`
    are those that only one may have; `is_special` says that it wants something of that kind, or
    processors of its own. `spec` is the number under which its `JobSpec` is kept: all jobs
    of an array share that of the first.

    `estimate_s` is the user's and `predicted_s` what the queue's predictor said when it was
    submitted; lower `priority` goes first; `array` is the number of the first job of its array.
    `slices` are the last times in which it ran (begin, end); `ran_ns` is the sum of all of them
    in this attempt and `preemptions` their number less one. `mark` is the time from which the
    current slice counts. `keeps_instance`: it has what could not be kept otherwise.
    """

    id: int
    spec: int = 0
    name: str
    queue: str
    image: str
    command: tuple[str, ...]
    isolation: str = "container"
    cores: float = 1.0
    memory: int = 0
    devices: tuple[str, ...] = ()
    is_special: bool = False
    estimate_s: float = 0.0
    predicted_s: float = 0.0
    priority: int = 0
    deadline_ns: int = 0
    timeout_s: float = 0.0
    after: tuple[Dependency, ...] = ()
    retries: int = 0
    owner: str = ""
    group: str = ""
    outputs: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    array: int = 0
    index: int = 0
    state: JobState = JobState.PENDING
    reason: str = ""
    submitted_ns: int
    eligible_ns: int = 0
    started_ns: int = 0
    finished_ns: int = 0
    attempt: int = 0
    boot_id: str = ""
    instance: str = ""
    exit_code: int = 0
    oom_killed: bool = False
    keeps_instance: bool = False
    ran_ns: int = 0
    mark: int = 0
    preemptions: int = 0
    slices: tuple[Slice, ...] = ()

    @property
    def key(self) -> str:
        """What the run times of like jobs are kept under."""
        return f"{self.owner}\0{self.image}\0{' '.join(self.command)}"


class QueueRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A queue: its policy with parameters, its share against other queues, the cores that its
    jobs may have at once (0: all), how run times are foretold, and after how many seconds of
    waiting a preempted virtual machine is written to disk (0: only for want of memory)."""

    name: str
    policy: str = "fcfs"
    weight: float = 1.0
    cores: float = 0.0
    predictor: str = "average"
    suspend_s: float = 300.0
    paused: bool = False
    created_ns: int = 0


class RequestKind(StrEnum):
    """What may be asked of a job that waits or runs."""

    CANCEL = "cancel"
    HOLD = "hold"
    RELEASE = "release"
    PRIORITY = "priority"


class HasPlace(Protocol):
    """Where a job belongs."""

    @property
    def queue(self) -> str: ...
    @property
    def owner(self) -> str: ...
    @property
    def array(self) -> int: ...
    @property
    def state(self) -> JobState: ...


class Selection(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Jobs by what they have in common; what is empty does not matter."""

    queue: str = ""
    owner: str = ""
    array: int = 0
    states: tuple[JobState, ...] = ()

    def has(self, record: HasPlace) -> bool:
        """Tell whether a job is meant."""
        return (
            (not self.queue or record.queue == self.queue)
            and (not self.owner or record.owner == self.owner)
            and (not self.array or record.array == self.array)
            and (not self.states or record.state in self.states)
        )


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something asked of the dispatcher, which alone changes jobs after they were submitted; of
    one job, or of all that `of` means."""

    job: int = 0
    kind: RequestKind
    priority: int = 0
    of: Selection | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the present dispatcher gives out to jobs: processors and bytes of memory, in all and
    with what others have taken off."""

    cores: float
    memory: int
    cores_now: float
    memory_now: int


def key_of(number: int) -> str:
    """Return the key of a job's record: the order of keys is that of submission."""
    return f"{number:012d}"


def name_of_instance(job: JobRecord) -> str:
    """Return the name of the instance of a job's present attempt: nobody can make it twice."""
    return f"job-{job.id}" if job.attempt <= 1 else f"job-{job.id}-{job.attempt}"


def jobs_of_image(transaction: Transaction, image_id: str) -> Iterator[int]:
    """Yield the jobs that are not over and that need an image."""
    if not transaction.count(SPECS):
        return
    needed: dict[int, int] = {}
    for table in (WAITING, ACTIVE):
        for _, job in transaction.items(table, JobRecord):
            needed.setdefault(job.spec, job.id)
    for number, job_id in needed.items():
        wanted = transaction.get(SPECS, key_of(number), JobSpec)
        if wanted is not None and wanted.image_id == image_id:
            yield job_id
