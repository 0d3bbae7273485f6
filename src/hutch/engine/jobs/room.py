"""What jobs may have of the host: the room that others leave, and what each job takes of it.

Jobs and plain instances share one ledger, the reservations of the root. A policy is told what
others leave (`resize`), and a job that is to start takes its reservation in the transaction that
notes the start; where another was quicker, the job waits on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.engine.context import Context
from hutch.engine.jobs.records import META, SPECS, JobRecord, JobSpec, Limits, key_of
from hutch.engine.records import RESERVATIONS
from hutch.errors import InvalidArgument, NotFound
from hutch.sched import Capacity, Job
from hutch.units import format_bytes

if TYPE_CHECKING:
    from hutch.resources.admission import Decision
    from hutch.resources.demand import Demand, Holding
    from hutch.resources.inventory import Inventory

__all__ = ["Room", "demand_of_job", "fits_in", "is_less"]

_LEAST_CORES = 1e-6
_INVENTORY_S = 30.0


def fits_in(job: Job, capacity: Capacity) -> bool:
    """Tell whether a job would fit if no other job ran."""
    return (
        job.cores <= capacity.cores
        and (capacity.memory is None or job.memory <= capacity.memory)
        and all(count <= capacity.devices.get(name, 0) for name, count in job.devices)
    )


def is_less(now: Capacity, before: Capacity) -> bool:
    """Tell whether there is less of anything than before."""
    return (
        now.cores < before.cores
        or (now.memory or 0) < (before.memory or 0)
        or any(now.devices.get(name, 0) < count for name, count in before.devices.items())
    )


def demand_of_job(context: Context, record: JobRecord) -> Demand:
    """Return what a job's instance needs, by the settings of now; `NotFound` where its
    specification is gone, as that of a job that is over."""
    from hutch.resources.demand import demand_of
    from hutch.resources.settings import load_settings

    with context.store.read() as tx:
        wanted = tx.get(SPECS, key_of(record.spec), JobSpec)
    if wanted is None:
        raise NotFound(f"the specification of job {record.id} is gone")
    return demand_of(wanted.instance, load_settings(context.root))


class Room:
    """The room of one dispatcher. `whole` is what jobs might have if nobody else held anything,
    `now` what the others leave."""

    def __init__(self, context: Context, *, cores: float | None, memory: int | None) -> None:
        self._context = context
        self._cores, self._memory = cores, memory
        self._devices: set[str] = set()
        self._host: tuple[float, Inventory] | None = None
        self._seen: Any = None
        self._published: Limits | None = None
        self.whole = self.now = self._plain()

    # ---- looking --------------------------------------------------------------------------

    def look(self, own: Collection[str]) -> bool:
        """See what others hold now; `own` are the instances of jobs. Tells whether that is
        anything else than before, or whether jobs have ended since: who was refused may try
        again."""
        seen = self._look(own)
        if seen == self._seen:
            return False
        self._seen = seen
        self._publish()
        return True

    def _look(self, own: Collection[str]) -> Any:
        if not self.counts():
            self.whole = self.now = self._plain()
            return self.now, frozenset(own)
        from hutch.engine.admitting import holdings
        from hutch.resources.settings import load_settings

        settings = load_settings(self._context.root)
        with self._context.store.write() as tx:
            found = holdings(self._context, tx, settings)
        others = sorted((h for h in found if h.id not in own), key=lambda holding: holding.id)
        from hutch.resources.admission import capacity_of

        limits = capacity_of(self._inventory(), settings)
        self.whole = self._bounded(limits["cpus"], limits["memory"])
        self.now = self._left(others, limits)
        return settings, others, frozenset(own), self.whole

    def counts(self) -> bool:
        """Tell whether anything is given out up to a limit, or belongs to one alone."""
        if os.path.exists(f"{self._context.root}/resources.json") or self._devices:
            return True
        with self._context.store.read() as tx:
            return tx.count(RESERVATIONS) > 0

    def _plain(self) -> Capacity:
        return self._bounded(None, None)

    def _bounded(self, cpus: float | None, memory: float | None) -> Capacity:
        """Return what jobs may have of so much: as much as the dispatcher was given, or by
        default what this process may use."""
        cores = self._cores
        if cores is None:
            cores = cpus if cpus is not None else len(os.sched_getaffinity(0))
        elif cpus is not None:
            cores = min(cores, cpus)
        bytes_ = self._memory
        if bytes_ is None:
            bytes_ = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if memory is not None:
            bytes_ = min(bytes_, int(memory)) if self._memory is not None else int(memory)
        return _capacity(cores, bytes_, dict.fromkeys(self._devices, 1))

    def _left(self, others: Sequence[Holding], limits: dict[str, float | None]) -> Capacity:
        whole = self.whole
        cores, memory = whole.cores, whole.memory or 0
        if limits["cpus"] is not None:
            cores = min(cores, limits["cpus"] - sum(h.cpus + len(h.exclusive) for h in others))
        else:
            cores -= sum(len(h.exclusive) for h in others)
        if limits["memory"] is not None:
            memory = min(memory, int(limits["memory"]) - sum(h.memory for h in others))
        held = {name for h in others for name in h.devices}
        return _capacity(cores, memory, {name: int(name not in held) for name in self._devices})

    def _inventory(self) -> Inventory:
        from hutch.engine.admitting import inventory

        now = time.monotonic()
        if self._host is None or now - self._host[0] > _INVENTORY_S:
            self._host = now, inventory(self._context)
        return self._host[1]

    def _publish(self) -> None:
        """Tell other processes how much there is, for what they say of jobs that wait."""
        limits = Limits(
            cores=self.whole.cores,
            memory=self.whole.memory or 0,
            cores_now=self.now.cores,
            memory_now=self.now.memory or 0,
        )
        if limits != self._published:
            self._published = limits
            with self._context.store.write() as tx:
                tx.put(META, "limits", limits)

    # ---- jobs -----------------------------------------------------------------------------

    def admit(self, job: Job) -> bool:
        """Tell whether a job fits beside what others hold; raise `InvalidArgument` for one that
        would not fit if nobody held anything."""
        new = {name for name, _ in job.devices} - self._devices
        if new:
            self._devices |= new
            self._seen = None
            self.whole = _with_devices(self.whole, new)
            self.now = _with_devices(self.now, new)
        whole = self.whole
        if job.cores > whole.cores:
            raise InvalidArgument(
                f"job {job.id} needs {job.cores:g}, there are {whole.cores:g}", field="cores"
            )
        if job.memory > (whole.memory or 0):
            there = format_bytes(whole.memory or 0)
            raise InvalidArgument(
                f"job {job.id} needs {format_bytes(job.memory)}, there are {there}",
                field="memory",
            )
        return fits_in(job, self.now)

    def explain(self, record: JobRecord) -> Decision | None:
        """Return why a job does not fit beside what instances hold, None if it does."""
        from hutch.engine.admitting import decide_for

        decision = decide_for(self._context, demand_of_job(self._context, record))
        return None if decision.fits else decision

    def take(self, identifier: str, record: JobRecord) -> Decision | None:
        """Reserve for an instance that is about to be made or started; None where that went
        well, else why not. It is this process's until the instance runs."""
        if not self._concerns(record):
            return None
        from hutch.engine.admitting import try_take

        with self._context.store.read() as tx:
            wanted = tx.get(SPECS, key_of(record.spec), JobSpec)
        if wanted is None:
            return None  # its attempt will say so
        decision = try_take(self._context, identifier, wanted.instance, f"job {record.id}")
        return None if decision.fits else decision

    def drop(self, identifier: str) -> None:
        """Give back what was taken for an instance that is not made."""
        if identifier and self.counts():
            from hutch.engine.reserve import release

            release(self._context, identifier)

    def give_way(self, identifier: str, record: JobRecord, usage: int) -> None:
        """Leave to others what a job does not need while it is frozen: its processors, and the
        memory above the `usage` that it has."""
        if self._concerns(record):
            from hutch.engine.admitting import shrink

            shrink(self._context, identifier, usage)

    def come_back(self, identifier: str, record: JobRecord) -> Decision | None:
        """Take again what `give_way` left; None where that went well, else why not."""
        if not self._concerns(record):
            return None
        from hutch.engine.admitting import grow

        return grow(self._context, identifier)

    def _concerns(self, record: JobRecord) -> bool:
        return record.is_special or os.path.exists(f"{self._context.root}/resources.json")


def _capacity(cores: float, memory: int, devices: dict[str, int]) -> Capacity:
    whole = round(cores, 6)
    return Capacity(
        cores=max(int(whole) if float(whole).is_integer() else whole, _LEAST_CORES),
        memory=max(memory, 0),
        devices=devices,
    )


def _with_devices(capacity: Capacity, names: Collection[str]) -> Capacity:
    devices = {**capacity.devices, **dict.fromkeys(names, 1)}
    return msgspec.structs.replace(capacity, devices=devices)
