"""Which processors an instance gets to itself, and which are left to share.

The rules are those of the kubelet's static policy (Kubernetes, "Control CPU Management Policies
on the Node"): whole numbers only, whole packages, nodes, caches and cores before single
threads, and what is left over is the pool that all others share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from hutch.resources.inventory import Cpu, Inventory

__all__ = ["Choice", "CpuRequest", "candidates", "choose_cpus", "kept_for_host", "shared_pool"]

Fit = Literal["first", "best", "worst", "pack", "spread"]


class CpuRequest(msgspec.Struct, frozen=True, kw_only=True):
    """How many processors, and how they are to lie. `full_cores`: a core is taken whole or not
    at all; `numa` single: all on one memory node, prefer: if that can be."""

    count: int
    numa: Literal["any", "prefer", "single"] = "prefer"
    full_cores: bool = False
    fit: Fit = "pack"


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The processors chosen; none where it does not fit, `reason` says what is in the way
    besides their number."""

    cpus: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    reason: str = ""


def kept_for_host(inventory: Inventory, reserved: float) -> frozenset[int]:
    """Return the processors that are never given to one instance alone: as many as are reserved
    for the host, rounded up, the lowest numbers first; one at least, for all who share."""
    wanted = max(1, int(-(-reserved // 1)))
    ordered = sorted(inventory.cpus, key=lambda cpu: (cpu.core, cpu.id))
    return frozenset(cpu.id for cpu in ordered[:wanted])


def shared_pool(inventory: Inventory, exclusive: Iterable[int]) -> tuple[int, ...]:
    """Return the processors that all share who have none to themselves."""
    return tuple(sorted(inventory.cpu_ids - set(exclusive)))


def candidates(
    inventory: Inventory, *, exclusive: Iterable[int], pinned: Iterable[int], reserved: float
) -> frozenset[int]:
    """Return what may be given to one instance alone: not what another has, what somebody is
    pinned to by name, or what is kept for the host."""
    taken = set(exclusive) | set(pinned)
    return inventory.cpu_ids - taken - kept_for_host(inventory, reserved)


def choose_cpus(
    inventory: Inventory,
    free: frozenset[int],
    request: CpuRequest,
    *,
    own: tuple[int, ...] = (),
) -> Choice:
    """Return which of the `free` processors a request gets; those it has (`own`) stay with it
    as far as it still wants them, and more are taken from their node."""
    own = tuple(number for number in own if number in inventory.cpu_ids)
    if not own:
        return _choose(inventory, free, request)
    if len(own) < request.count:
        nodes = {cpu.node for cpu in inventory.cpus if cpu.id in own}
        near = {cpu.id for cpu in inventory.cpus if cpu.node in nodes}
        more = msgspec.structs.replace(request, count=request.count - len(own), numa="any")
        left = free - set(own)
        extra = _choose(inventory, left & near, more)
        if not extra.cpus and request.numa != "single":
            extra = _choose(inventory, left, more)
        if not extra.cpus:
            return extra
        own = (*own, *extra.cpus)
    return _chosen(inventory, own[: request.count])


def _chosen(inventory: Inventory, taken: Sequence[int]) -> Choice:
    node_of = {cpu.id: cpu.node for cpu in inventory.cpus}
    nodes = sorted({node_of[number] for number in taken})
    return Choice(cpus=tuple(sorted(taken)), nodes=tuple(nodes))


def _choose(inventory: Inventory, free: frozenset[int], request: CpuRequest) -> Choice:
    usable = [cpu for cpu in inventory.cpus if cpu.id in free]
    threads = inventory.threads_per_core
    if request.full_cores:
        if request.count % threads:
            return Choice(reason=f"{request.count} is not a multiple of {threads} threads a core")
        usable = _whole_cores(inventory, usable)
    if request.count > len(usable):
        return Choice(reason="of whole cores" if request.full_cores else "")
    places = _nodes_that_fit(usable, request.count)
    if request.numa != "any" and places:
        node = _pick(places, request.fit, inventory)
        usable = [cpu for cpu in usable if cpu.node == node]
    elif request.numa == "single":
        most = max((len(cpus) for cpus in _by(usable, "node").values()), default=0)
        return Choice(reason=f"{most} at most on one node")
    spread = request.fit == "spread" and request.numa == "any"
    taken = (
        _spread(usable, request.count)
        if spread
        else _take(inventory, usable, request.count, request.fit)
    )
    return _chosen(inventory, taken)


def _by(cpus: Sequence[Cpu], level: str) -> dict[int, list[Cpu]]:
    found: dict[int, list[Cpu]] = {}
    for cpu in cpus:
        found.setdefault(getattr(cpu, level), []).append(cpu)
    return found


def _whole_cores(inventory: Inventory, usable: Sequence[Cpu]) -> list[Cpu]:
    """Return those whose core is free with all its threads, and has as many as a core has."""
    all_of = _by(inventory.cpus, "core")
    whole = {
        core
        for core, cpus in _by(usable, "core").items()
        if len(cpus) == len(all_of[core]) == inventory.threads_per_core
    }
    return [cpu for cpu in usable if cpu.core in whole]


def _nodes_that_fit(usable: Sequence[Cpu], count: int) -> dict[int, int]:
    """Return how many are free on each node that has enough."""
    free = {node: len(cpus) for node, cpus in _by(usable, "node").items()}
    return {node: number for node, number in free.items() if number >= count}


def _pick(free: dict[int, int], fit: Fit, inventory: Inventory) -> int:
    """Return the node that a policy takes: `free` are the processors free on each."""
    size = {node.id: max(1, len(node.cpus)) for node in inventory.nodes}
    match fit:
        case "first":
            return min(free)
        case "best":
            return min(free, key=lambda node: (free[node], node))
        case "worst":
            return min(free, key=lambda node: (-free[node], node))
        case "pack":  # the fullest, in share of what it has
            return min(free, key=lambda node: (free[node] / size.get(node, 1), node))
        case "spread":
            return min(free, key=lambda node: (-free[node] / size.get(node, 1), node))


def _take(inventory: Inventory, usable: Sequence[Cpu], count: int, fit: Fit) -> list[int]:
    """Take whole groups that are free, the largest first, then what fits closest."""
    pool = list(usable)
    taken: list[Cpu] = []
    for level in ("package", "node", "cache", "core"):
        whole = {group: len(cpus) for group, cpus in _by(inventory.cpus, level).items()}
        while len(taken) < count:
            missing = count - len(taken)
            groups = _by(pool, level)
            full = [g for g, cpus in groups.items() if len(cpus) == whole[g] <= missing]
            if not full:
                # All of the rest from one group of this level, if that can be: it stays near.
                close = [g for g, cpus in groups.items() if len(cpus) >= missing]
                if close and missing < min(whole[g] for g in close):
                    wanted = missing - missing % inventory.threads_per_core
                    best = min(
                        close,
                        key=lambda g: (
                            len(_whole_cores(inventory, groups[g])) < wanted,
                            _order(groups[g], taken, fit),
                        ),
                    )
                    pool = groups[best]
                break
            group = min(full, key=lambda g: _order(groups[g], taken, fit))
            taken += groups[group]
            pool = [cpu for cpu in pool if getattr(cpu, level) != group]
    taken += _single_threads(pool, count - len(taken))
    return [cpu.id for cpu in taken]


def _order(cpus: Sequence[Cpu], taken: Sequence[Cpu], fit: Fit) -> tuple[int, int, int]:
    """Near what was taken first, then as the policy fills groups, then by number."""
    near = {cpu.node for cpu in taken}
    distance = 0 if not near or cpus[0].node in near else 1
    size = {"worst": -len(cpus), "spread": -len(cpus), "first": 0}.get(fit, len(cpus))
    return distance, size, cpus[0].id


def _single_threads(pool: Sequence[Cpu], missing: int) -> list[Cpu]:
    """Take threads of cores that are broken already before breaking others."""
    cores = sorted(_by(pool, "core").values(), key=lambda cpus: (len(cpus), cpus[0].id))
    ordered = [cpu for cpus in cores for cpu in sorted(cpus, key=lambda c: c.id)]
    return ordered[:missing]


def _spread(usable: Sequence[Cpu], count: int) -> list[int]:
    """Take cores from the nodes in turn, the emptiest first, until there are enough."""
    nodes = sorted(_by(usable, "node").values(), key=lambda cpus: (-len(cpus), cpus[0].id))
    queues = [list(_by(cpus, "core").values()) for cpus in nodes]
    taken: list[int] = []
    while len(taken) < count:
        for queue in queues:
            if queue and len(taken) < count:
                core = queue.pop(0)
                taken += [cpu.id for cpu in core[: count - len(taken)]]
    return taken
