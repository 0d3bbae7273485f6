"""What there is, what is taken, and whether a job fits: cores, memory and devices at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from hutch.errors import InvalidArgument
from hutch.sched.job import Job, Phase
from hutch.units import format_bytes

__all__ = ["Capacity", "Ledger"]

_DIGITS = 6
_NO_DEVICES: Mapping[str, int] = {}


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy may give out. Memory None: not counted.

    A paused job gives its cores back. Its memory too, unless `paused_keep_memory`: what
    is frozen can be written to swap or to disk when somebody needs it. Devices it keeps.
    """

    cores: float = 1
    memory: int | None = None
    devices: Mapping[str, int] = msgspec.field(default_factory=dict)
    paused_keep_memory: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.cores < math.inf:
            raise InvalidArgument(f"must be above 0 and finite, got {self.cores!r}", field="cores")
        if self.memory is not None and self.memory < 0:
            raise InvalidArgument(f"must not be negative, got {self.memory!r}", field="memory")
        for name, count in self.devices.items():
            if count < 0:
                raise InvalidArgument(
                    f"must not be negative, got {count!r}", field=f"devices.{name}"
                )


class Ledger:
    """The books of one capacity. `cores`, `memory` and `devices` are what is free now.

    After `resize` to less than is taken they are negative, and nothing fits until enough
    has come back.
    """

    __slots__ = ("capacity", "cores", "devices", "memory")

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.cores: float = capacity.cores
        self.memory: float = math.inf if capacity.memory is None else capacity.memory
        self.devices: dict[str, int] = dict(capacity.devices)

    def check(self, job: Job) -> None:
        """Raise `InvalidArgument` for a job that would not fit an empty machine."""
        whole = self.capacity
        if job.cores <= whole.cores and not job.memory and not job.devices:
            return
        asked = [("cores", job.cores, whole.cores)]
        if whole.memory is not None:
            asked.append(("memory", job.memory, whole.memory))
        asked += [(f"devices.{k}", n, whole.devices.get(k, 0)) for k, n in job.devices]
        for what, wanted, there in asked:
            if wanted > there:
                raise InvalidArgument(
                    f"job {job.id} needs {_told(what, wanted)}, there are {_told(what, there)}",
                    field=what,
                    hint="it would wait for ever: give more, or leave the job out",
                )

    def fits(self, job: Job) -> bool:
        """Tell whether the job can start, or go on, with what is free."""
        if job.cores > self.cores:
            return False
        return not (job.memory or job.devices) or self._fits_beside_cores(job)

    def _fits_beside_cores(self, job: Job) -> bool:
        paused = job.phase is Phase.PAUSED
        if job.memory > self.memory and not (paused and self.capacity.paused_keep_memory):
            return False
        return self.fits_devices(job)

    def fits_devices(self, job: Job) -> bool:
        """Tell whether the devices that a job needs are free or, as it is paused, its own."""
        if job.phase is Phase.PAUSED or not job.devices:
            return True
        free = self.devices
        return all(count <= free.get(name, 0) for name, count in job.devices)

    def take(self, job: Job) -> None:
        """Take what a job needs to start or, when it is paused, to go on."""
        free = self.cores - job.cores
        self.cores = free if free.__class__ is int else round(free, _DIGITS)
        if not job.memory and not job.devices:
            return
        paused = job.phase is Phase.PAUSED
        if not (paused and self.capacity.paused_keep_memory):
            self.memory -= job.memory
        if not paused:
            self._devices(job, -1)

    def pause(self, job: Job) -> None:
        """Give back what a running job does not need while it is paused."""
        self._cores(job.cores)
        if job.memory and not self.capacity.paused_keep_memory:
            self.memory += job.memory

    def give(self, job: Job) -> None:
        """Give back all that a job holds; it runs or is paused."""
        running = job.phase is Phase.RUNNING
        if running:
            free = self.cores + job.cores
            self.cores = free if free.__class__ is int else round(free, _DIGITS)
        if not job.memory and not job.devices:
            return
        if running or self.capacity.paused_keep_memory:
            self.memory += job.memory
        self._devices(job, 1)

    def resize(self, capacity: Capacity) -> None:
        """Change what there is; what is taken stays taken."""
        old = self.capacity
        if (capacity.memory is None) != (old.memory is None):
            raise InvalidArgument(
                "counted memory cannot become uncounted, nor the other way round", field="memory"
            )
        self.capacity = capacity
        self._cores(capacity.cores - old.cores)
        if capacity.memory is not None and old.memory is not None:
            self.memory += capacity.memory - old.memory
        for name in {*old.devices, *capacity.devices}:
            change = capacity.devices.get(name, 0) - old.devices.get(name, 0)
            self.devices[name] = self.devices.get(name, 0) + change

    def _cores(self, change: float) -> None:
        free = self.cores + change
        # Tenths of cores do not add up in binary; what is left over would keep a job out.
        self.cores = free if free.__class__ is int else round(free, _DIGITS)

    def _devices(self, job: Job, sign: int) -> None:
        for name, count in job.devices:
            self.devices[name] += sign * count


def _told(what: str, amount: float) -> str:
    """Return an amount for people."""
    return format_bytes(int(amount)) if what == "memory" else f"{amount:g}"
