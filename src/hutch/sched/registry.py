"""Find a policy by its name with parameters, ours or from an entry point.

A third party's package declares its class in the group `hutch.policies`:

    [project.entry-points."hutch.policies"]
    mine = "my_package.policy:Mine"

The class has `name`, `summary` and `parameters`, and is called as
`Mine(capacity, **parameters)`. What it makes follows `hutch.sched.policy.Policy`;
inheriting from `Base` there gives the books.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from hutch.errors import InvalidArgument, Unsupported
from hutch.sched.ledger import Capacity
from hutch.sched.parameters import Parameter, read_parameters
from hutch.sched.policy import Policy

__all__ = ["POLICIES", "create", "describe", "find", "theirs"]

GROUP = "hutch.policies"
_HERE = "hutch.sched.policies."
POLICIES: Mapping[str, str] = {
    "fcfs": _HERE + "ordered:FCFS",
    "sjf": _HERE + "ordered:SJF",
    "srtf": _HERE + "preemptive:SRTF",
    "priority": _HERE + "ordered:Priority",
    "priority-preemptive": _HERE + "preemptive:PreemptivePriority",
    "rr": _HERE + "sliced:RoundRobin",
    "mlfq": _HERE + "mlfq:MLFQ",
    "hrrn": _HERE + "hrrn:HRRN",
    "fair": _HERE + "fair:Fair",
    "lottery": _HERE + "sliced:Lottery",
    "stride": _HERE + "sliced:Stride",
    "edf": _HERE + "preemptive:EDF",
    "easy": _HERE + "easy:EASY",
    "conservative": _HERE + "conservative:Conservative",
}
"""Our policies: name, and where its class is."""


def theirs() -> dict[str, Any]:
    """Return the entry points of other packages' policies, by name."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def find(name: str) -> Any:
    """Return the class of a policy by its name without parameters.

    Raises `InvalidArgument` for an unknown one and `Unsupported` for a third party's that
    cannot be loaded.
    """
    where = POLICIES.get(name)
    if where is not None:
        module, _, attribute = where.partition(":")
        return getattr(import_module(module), attribute)
    others = theirs()
    if (entry := others.get(name)) is not None:
        try:
            return entry.load()
        except (ImportError, AttributeError) as exc:
            raise Unsupported(f"policy {name}: {entry.value} cannot be loaded: {exc}") from exc
    from difflib import get_close_matches

    known = [*POLICIES, *others]
    near = get_close_matches(name, known, 1, 0.5)
    raise InvalidArgument(
        f"no such policy: {name!r}",
        field="policy",
        hint=f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}",
    )


def create(text: str, capacity: Capacity, *, seed: int | None = None) -> Policy:
    """Make a policy from `name` or `name:parameter=value,…` for what there is to give out.

    `seed` is for those that draw lots, where the text does not give one.
    """
    name, _, rest = text.strip().partition(":")
    cls = find(name)
    known: dict[str, Parameter] = dict(cls.parameters)
    values = read_parameters(f"policy {name}", known, rest) if rest else {}
    if seed is not None and "seed" in known:
        values.setdefault("seed", seed)
    return cast(Policy, cls(capacity, **values))


def describe(name: str) -> tuple[str, Mapping[str, Parameter]]:
    """Return a policy's summary and its parameters."""
    cls = find(name)
    return cls.summary, cls.parameters
