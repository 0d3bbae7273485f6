"""What an instance needs of the host, and who holds what: the two sides of an admission."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from hutch.errors import InvalidArgument
from hutch.resources.settings import Settings
from hutch.spec.disk_room import disk_room
from hutch.spec.model import InstanceSpec

__all__ = ["Demand", "Holding", "demand_of"]

# What a machine's QEMU takes beside the guest's memory: 96 to 109 MB were measured.
_QEMU = 128 << 20
_GUEST = 512 << 20


class Demand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is asked for. Memory, disk and huge pages (by page size) in bytes; `cpus` is a share
    of processor time, `exclusive` a number of processors for itself alone; `pinned` those it
    named; `devices` names of devices that only one may have."""

    memory: int = 0
    cpus: float = 0.0
    exclusive: int = 0
    pinned: tuple[int, ...] = ()
    numa: Literal["any", "prefer", "single"] = "prefer"
    full_cores: bool = False
    fit: str = ""
    huge: dict[int, int] = {}
    devices: tuple[str, ...] = ()
    disk: int = 0

    @property
    def is_special(self) -> bool:
        """Tell whether it wants what only one can have: it is recorded even where nothing is
        given out up to a limit."""
        return bool(self.exclusive or self.huge or self.devices)


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody holds now: `cpus` a share, `exclusive` the processors by number. One that
    only waits to be started again holds its disk alone."""

    id: str
    name: str
    memory: int = 0
    cpus: float = 0.0
    exclusive: tuple[int, ...] = ()
    pinned: tuple[int, ...] = ()
    huge: Mapping[int, int] = {}
    devices: tuple[str, ...] = ()
    disk: int = 0


def demand_of(spec: InstanceSpec, settings: Settings) -> Demand:
    """Return what a specification needs.

    Memory is its reservation, else its limit, as a Kubernetes request is; without both it is
    none. A virtual machine needs its guest's memory and what QEMU takes beside it.
    """
    resources, placement = spec.resources, spec.placement
    is_machine = spec.isolation == "vm"
    memory = resources.guarantee or resources.memory
    huge = _huge(spec)
    if is_machine:
        # Huge pages and the pool are counted by themselves: they are no other's already.
        ahead = huge or placement.memory == "pool"
        memory = (0 if ahead else memory or _GUEST) + _QEMU
    cpus = resources.cpus
    if not cpus and resources.cpu_quota_us:
        cpus = resources.cpu_quota_us / (resources.cpu_period_us or 100_000)
    if is_machine and not cpus:
        cpus = 1.0
    exclusive = _exclusive(spec, settings)
    return Demand(
        memory=memory,
        cpus=0.0 if exclusive else cpus,
        exclusive=exclusive,
        pinned=_pinned(resources.cpuset_cpus),
        numa=placement.numa,
        full_cores=placement.smt == "full",
        fit=placement.fit or settings.fit,
        huge=huge,
        devices=tuple(name for name in spec.device_names if name.startswith("vfio=")),
        disk=disk_room(spec),
    )


def _huge(spec: InstanceSpec) -> dict[int, int]:
    """Return the huge pages that are needed; a machine's memory is in them whole."""
    wanted = dict(spec.placement.huge)
    if not wanted:
        return {}
    field = "placement.huge"
    if spec.isolation != "vm":
        if 0 in wanted.values():
            raise InvalidArgument(
                "a container's amount is missing", field=field, hint="for example huge=2M:64M"
            )
        return wanted
    guest = -(-(spec.resources.memory or _GUEST) >> 20) << 20
    (page, amount), *more = wanted.items()
    if more or amount not in (0, guest) or guest % page:
        raise InvalidArgument(
            f"a virtual machine's memory is in pages of one size, all {guest} bytes of it",
            field=field,
            hint="huge=2M, and a --memory that is a multiple of the page",
        )
    return {page: guest}


def _pinned(cpuset: str) -> tuple[int, ...]:
    from hutch.resources.cpulist import parse_cpulist

    return parse_cpulist(cpuset, field="cpuset_cpus") if cpuset else ()


def _exclusive(spec: InstanceSpec, settings: Settings) -> int:
    """Return how many processors are to be its own: those of a request for whole ones."""
    resources = spec.resources
    if spec.placement.cpus == "exclusive":
        if resources.cpuset_cpus:
            raise InvalidArgument(
                "cannot be combined with cpuset_cpus",
                field="placement.cpus",
                hint="leave out --cpuset-cpus: which processors is chosen here",
            )
        if resources.cpus < 1 or not resources.cpus.is_integer():
            raise InvalidArgument(
                f"exclusive needs a whole number of cpus, got {resources.cpus:g}",
                field="placement.cpus",
                hint="for example --cpus 2 --placement cpus=exclusive",
            )
        return int(resources.cpus)
    static = settings.cpu_policy == "static" and spec.placement.cpus != "shared"
    whole = resources.cpus >= 1 and math.floor(resources.cpus) == resources.cpus
    # The kubelet's rule: only who is bounded in memory too has whole processors.
    if static and whole and (resources.memory or spec.isolation == "vm"):
        return 0 if resources.cpuset_cpus else int(resources.cpus)
    return 0
