"""One job of a recorded or generated workload, with the run time that only the trace knows."""

from __future__ import annotations

import math

import msgspec

__all__ = ["TraceJob"]


class TraceJob(msgspec.Struct, frozen=True, gc=False):
    """What a trace says of one job. Times in seconds, memory in bytes, both for the whole job.

    A trace is any iterable of these in order of `submit`; the simulator reads one ahead.
    """

    id: str | int
    submit: float
    runtime: float
    cores: float = 1
    memory: int = 0
    estimate: float | None = None
    """The user's, which is the limit too; None: the user gave none."""
    priority: float = 0
    user: str = ""
    weight: float = 1
    deadline: float = math.inf
    """On the clock of `submit`."""
    devices: tuple[tuple[str, int], ...] = ()
    queue: str = ""
    key: str = ""
