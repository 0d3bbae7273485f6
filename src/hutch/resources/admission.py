"""Whether there is room for an instance, and if not, why and what would help. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hutch.errors import Exhausted
from hutch.resources.cpus import Choice, CpuRequest, candidates, choose_cpus, kept_for_host
from hutch.resources.demand import Demand, Holding
from hutch.resources.inventory import Inventory
from hutch.resources.settings import Settings
from hutch.units import format_bytes

__all__ = ["Decision", "Held", "NoRoom", "Shortage", "capacity_of", "decide", "shortage_of"]

_NAMED = 4


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds how much of what is short."""

    id: str
    name: str
    amount: float


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """One thing of which there is not enough. Amounts of memory and disk in bytes, of
    processors and devices in numbers; `capacity` is what is given out in all, with the host's
    share taken off and overcommitment counted in."""

    resource: str
    needed: float
    free: float
    capacity: float
    held: tuple[Held, ...] = ()
    cures: tuple[str, ...] = ()
    detail: str = ""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a demand; with `fits`, `cpus` and `nodes` are what it would get for itself
    alone (none for one that shares)."""

    fits: bool
    demand: Demand
    cpus: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    shortages: tuple[Shortage, ...] = ()

    def explain(self) -> str:
        """Return the answer as a sentence: what is needed, what is free, who has the rest."""
        if self.fits:
            own = f"; processors {','.join(map(str, self.cpus))}" if self.cpus else ""
            return "fits" + own
        return "; ".join(_sentence(shortage) for shortage in self.shortages)


class NoRoom(Exhausted):
    """There is no room for an instance; `decision` says of what, and who holds it."""

    def __init__(self, name: str, decision: Decision) -> None:
        cures = [cure for shortage in decision.shortages for cure in shortage.cures]
        hint = f"fits if {' or '.join(cures)}" if cures else None
        super().__init__(f"no room for {name}: {decision.explain()}", hint=hint)
        self.decision = decision


def decide(
    inventory: Inventory,
    settings: Settings,
    holdings: Sequence[Holding],
    demand: Demand,
    *,
    own: tuple[int, ...] = (),
) -> Decision:
    """Say whether a demand fits beside what others hold (the asker is not among them). `own`
    are the processors that it has to itself already, and keeps."""
    shortages = [
        shortage
        for shortage in (
            _memory(inventory, settings, holdings, demand),
            _cpu_time(inventory, settings, holdings, demand),
            _disk(inventory, settings, holdings, demand),
            *_huge(inventory, holdings, demand),
            *_devices(holdings, demand),
        )
        if shortage is not None
    ]
    choice = Choice()
    if demand.exclusive:
        choice, shortage = _exclusive(inventory, settings, holdings, demand, own)
        if shortage is not None:
            shortages.append(shortage)
    elif demand.pinned and (shortage := _pinned(inventory, holdings, demand)) is not None:
        shortages.append(shortage)
    return Decision(
        fits=not shortages,
        demand=demand,
        cpus=choice.cpus,
        nodes=choice.nodes,
        shortages=tuple(shortages),
    )


def capacity_of(inventory: Inventory, settings: Settings) -> dict[str, float | None]:
    """Return how much of each is given out in all; None for what has no limit."""
    # Huge pages and the pool are set aside, and nobody has them in any other way.
    apart = sum(pages.size * pages.total for pages in inventory.huge)
    apart += sum(size * count for size, count in settings.memory_pool.items())
    memory = min(settings.memory or inventory.memory, inventory.memory - apart)
    rooms = sum(room.total for room in inventory.rooms)
    return {
        "memory": _given_out(
            settings.limits_memory,
            memory - settings.reserved.memory,
            settings.overcommit.memory,
        ),
        "cpus": _given_out(
            settings.limits_cpus,
            len(inventory.cpus) - settings.reserved.cpus,
            settings.overcommit.cpus,
        ),
        "disk": _given_out(
            settings.limits_disk, rooms - settings.reserved.disk, settings.overcommit.disk
        ),
    }


def _given_out(limited: bool, there: float, ratio: float | None) -> float | None:
    return max(0.0, there) * (ratio or 1.0) if limited else None


def _memory(
    inventory: Inventory, settings: Settings, holdings: Sequence[Holding], demand: Demand
) -> Shortage | None:
    capacity = capacity_of(inventory, settings)["memory"]
    held = [Held(id=h.id, name=h.name, amount=h.memory) for h in holdings if h.memory]
    return shortage_of("memory", demand.memory, capacity, held, "memory")


def _cpu_time(
    inventory: Inventory, settings: Settings, holdings: Sequence[Holding], demand: Demand
) -> Shortage | None:
    capacity = capacity_of(inventory, settings)["cpus"]
    held = [
        Held(id=h.id, name=h.name, amount=h.cpus + len(h.exclusive))
        for h in holdings
        if h.cpus or h.exclusive
    ]
    return shortage_of("cpus", demand.cpus + demand.exclusive, capacity, held, "cpus")


def _disk(
    inventory: Inventory, settings: Settings, holdings: Sequence[Holding], demand: Demand
) -> Shortage | None:
    capacity = capacity_of(inventory, settings)["disk"]
    held = [Held(id=h.id, name=h.name, amount=h.disk) for h in holdings if h.disk]
    return shortage_of("disk", demand.disk, capacity, held, "")


def shortage_of(
    resource: str, needed: float, capacity: float | None, held: list[Held], option: str
) -> Shortage | None:
    """Return what is missing of something that is given out by amount, None for nothing."""
    if capacity is None or not needed:
        return None
    free = capacity - sum(holder.amount for holder in held)
    # Shares of processors are sums of fractions.
    if needed <= free + 1e-9:
        return None
    held.sort(key=lambda holder: (-holder.amount, holder.name))
    cures = []
    ending = _to_end(held, needed - free)
    # Disk is held by who is there, the rest by who runs.
    on_disk = resource == "disk"
    if ending:
        one, more = ("is removed", "are removed") if on_disk else ("ends", "end")
        cures.append(f"{_names(ending)} {one if len(ending) == 1 else more}")
    if free > 0 and (option or on_disk):
        # What sets it is called differently for instances, volumes and pools.
        what = "the size" if on_disk else f"--{option}"
        cures.append(f"{what} is at most {_amount(resource, free)}")
    return Shortage(
        resource=resource,
        needed=needed,
        free=max(0.0, free),
        capacity=capacity,
        held=tuple(held),
        cures=tuple(cures),
    )


def _to_end(held: Sequence[Held], missing: float) -> list[Held]:
    """Return the fewest holders whose end gives enough; the one that has least of those."""
    enough = [holder for holder in held if holder.amount >= missing - 1e-9]
    if enough:
        return [enough[-1]]
    chosen: list[Held] = []
    for holder in held:
        chosen.append(holder)
        missing -= holder.amount
        if missing <= 1e-9:
            return chosen
    return []


def _exclusive(
    inventory: Inventory,
    settings: Settings,
    holdings: Sequence[Holding],
    demand: Demand,
    own: tuple[int, ...],
) -> tuple[Choice, Shortage | None]:
    free = candidates(
        inventory,
        exclusive=[cpu for h in holdings for cpu in h.exclusive],
        pinned=[cpu for h in holdings if not h.exclusive for cpu in h.pinned],
        reserved=settings.reserved.cpus,
    )
    request = CpuRequest(
        count=demand.exclusive,
        numa=demand.numa,
        full_cores=demand.full_cores,
        fit=demand.fit or settings.fit,  # type: ignore[arg-type]
    )
    choice = choose_cpus(inventory, free, request, own=own)
    if choice.cpus:
        return choice, None
    held = [
        Held(id=h.id, name=h.name, amount=len(h.exclusive or h.pinned))
        for h in holdings
        if h.exclusive or h.pinned
    ]
    held.sort(key=lambda holder: (-holder.amount, holder.name))
    ending = _to_end(held, demand.exclusive - len(free))
    return choice, Shortage(
        resource="exclusive cpus",
        needed=demand.exclusive,
        free=len(free),
        capacity=len(inventory.cpus) - len(kept_for_host(inventory, settings.reserved.cpus)),
        held=tuple(held),
        cures=(f"{_names(ending)} end{'s' if len(ending) == 1 else ''}",) if ending else (),
        detail=choice.reason,
    )


def _pinned(inventory: Inventory, holdings: Sequence[Holding], demand: Demand) -> Shortage | None:
    """Refuse one who names processors that another has to itself."""
    wanted = set(demand.pinned)
    held = [
        Held(id=h.id, name=h.name, amount=len(wanted & set(h.exclusive)))
        for h in holdings
        if wanted & set(h.exclusive)
    ]
    if not held:
        return None
    return Shortage(
        resource="cpuset_cpus",
        needed=len(wanted),
        free=len(wanted) - sum(holder.amount for holder in held),
        capacity=len(inventory.cpus),
        held=tuple(held),
        cures=(f"{_names(held)} end{'s' if len(held) == 1 else ''}", "other processors are named"),
        detail="processors that are somebody's alone",
    )


def _huge(
    inventory: Inventory, holdings: Sequence[Holding], demand: Demand
) -> list[Shortage | None]:
    there = {pages.size: pages.size * pages.total for pages in inventory.huge}
    found = []
    for size, needed in sorted(demand.huge.items()):
        held = [
            Held(id=h.id, name=h.name, amount=h.huge[size]) for h in holdings if h.huge.get(size)
        ]
        shortage = shortage_of(
            f"huge pages of {format_bytes(size)}", needed, there.get(size, 0), held, ""
        )
        if shortage is not None:
            more = "the host keeps more of them ready (sysctl vm.nr_hugepages)"
            shortage = msgspec.structs.replace(shortage, cures=(*shortage.cures, more))
        found.append(shortage)
    return found


def _devices(holdings: Sequence[Holding], demand: Demand) -> list[Shortage | None]:
    found: list[Shortage | None] = []
    for device in demand.devices:
        held = [Held(id=h.id, name=h.name, amount=1) for h in holdings if device in h.devices]
        if held:
            cure = f"{_names(held)} ends"
            found.append(
                Shortage(
                    resource=f"device {device}",
                    needed=1,
                    free=0,
                    capacity=1,
                    held=tuple(held),
                    cures=(cure,),
                )
            )
    return found


def _amount(resource: str, number: float) -> str:
    if resource in ("memory", "disk") or resource.startswith("huge"):
        return format_bytes(int(number))
    return f"{number:g}"


def _names(holders: Sequence[Held]) -> str:
    names = [holder.name for holder in holders[:_NAMED]]
    if len(holders) > _NAMED:
        names.append(f"{len(holders) - _NAMED} more")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(shortage: Shortage) -> str:
    """`memory: needs 2GiB; 1.4GiB of 2GiB free: 0.6GiB held by web and db`."""
    name = shortage.resource
    text = f"{name}: needs {_amount(name, shortage.needed)}; {_amount(name, shortage.free)} free"
    text += f" of {_amount(name, shortage.capacity)}"
    if shortage.detail:
        text += f" ({shortage.detail})"
    if shortage.held:
        total = sum(holder.amount for holder in shortage.held)
        text += f": {_amount(name, total)} held by {_names(shortage.held)}"
    return text
