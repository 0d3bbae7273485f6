"""A job as policies see it: what it asks for, what is believed about it, what it got so far."""

from __future__ import annotations

import math
from enum import IntEnum

import msgspec

__all__ = ["Job", "Phase"]


class Phase(IntEnum):
    """Where a job is, in the books of the policy that has it."""

    OUTSIDE = 0
    """Not submitted yet, or finished, or withdrawn."""
    QUEUED = 1
    """Waits; it never ran."""
    RUNNING = 2
    PAUSED = 3
    """Waits; it ran before and keeps what it has done."""


class Job(msgspec.Struct, eq=False, gc=False):
    """One job. The driver fills the first part; the policy that has the job keeps the second.

    Times are seconds on the driver's clock, whatever its zero. Whole numbers stay whole.
    Two jobs are the same only if they are one object. Nothing here is the true run time:
    a policy cannot know it.
    """

    id: str | int
    seq: int
    """The order of submission, unique in a policy; ties are broken by it."""
    arrival: float
    cores: float = 1
    """All of them at once, and only whole: a job never runs on fewer. Fractions are counted
    in millionths."""
    estimate: float = math.inf
    """Run time expected, of the whole job; infinite where nobody knows. See `Policy.revise`."""
    memory: int = 0
    """Bytes."""
    priority: float = 0
    """Lower is more urgent."""
    user: str = ""
    weight: float = 1
    """Tickets in a lottery; the share of the job's user in `fair`; more is more."""
    deadline: float = math.inf
    devices: tuple[tuple[str, int], ...] = ()
    """Kinds of device and how many of each."""
    queue: str = ""
    """Which queue of a multi-level queue."""
    limit: float = math.inf
    """The user's own estimate, after which the job is ended; predictions stay below it."""
    key: str = ""
    """What jobs alike have in common (image and command): predictions are kept by it."""

    phase: Phase = Phase.OUTSIDE
    served: float = 0
    """Run time got in slices that have ended."""
    since: float = 0
    """While it runs: when this slice began. The driver may set it later, to when the job
    really ran: a quantum counts from here."""
    began: float = -1
    """When it first ran; negative before."""
    corrections: int = 0
    """How often the estimate was raised because the job outlived it."""
    stamp: int = 0
    """Counts its ways into a queue, so that what older entries say is not believed."""

    def served_at(self, now: float) -> float:
        """Return the run time got until `now`."""
        if self.phase is Phase.RUNNING and now > self.since:
            return self.served + now - self.since
        return self.served

    def remaining_at(self, now: float) -> float:
        """Return how much of the estimate is left; 0 for a job that has outlived it."""
        left = self.estimate - self.served_at(now)
        return left if left > 0 else 0
