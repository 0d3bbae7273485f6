"""Turn the plan that starts a container into one in which CRIU brings its processes back.

The mounts that only the host can make (layers, directories of the host, control groups) are
put beneath a directory that only CRIU sees; the others, and the namespaces of the processes,
it makes itself as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hutch.plan import flags, ops

__all__ = ["Place", "compile_restore", "place_of", "places_of"]

_KEPT = (ops.CgroupJoin, ops.Unshare, ops.Propagation, ops.Hostname, ops.LinkUp, ops.Sync)
_CLONED = flags.CLONE_NEWNS | flags.CLONE_NEWNET | flags.CLONE_NEWUTS


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a mount of the container, `target` in it, is put on the host meanwhile."""

    target: str
    path: str
    is_dir: bool = True


def places_of(plan: ops.Plan, directory: str) -> tuple[Place, ...]:
    """Return a place beneath `directory` for each mount that the plan moves into the root;
    the root's own comes first, with an empty target."""
    moves = [op for op in plan.child if isinstance(op, ops.MoveMount)]
    return tuple(
        Place(
            target=move.target,
            path=f"{directory}/{number}",
            is_dir=not move.target or move.create == "dir",
        )
        for number, move in enumerate(moves)
    )


def place_of(places: Sequence[Place], mountpoint: str) -> str | None:
    """Return the path of what a container has mounted there: the place of exactly that mount,
    or a path in the place of one above it. None where no place leads there."""
    best: Place | None = None
    for place in places:
        target = place.target.rstrip("/")
        if not target or not (mountpoint == target or mountpoint.startswith(f"{target}/")):
            continue
        if best is None or len(target) >= len(best.target.rstrip("/")):
            best = place
    if best is None:
        return None
    return best.path + mountpoint[len(best.target.rstrip("/")) :]


def compile_restore(plan: ops.Plan, places: Sequence[Place], restore: ops.Restore) -> ops.Plan:
    """Return the plan in which `restore` takes the place of the program."""
    child: list[ops.AnyOp] = []
    left = iter(places)
    for op in plan.child:
        if isinstance(op, ops.MoveMount):
            child.append(ops.Attach(slot=op.slot, path=next(left).path))
        elif isinstance(op, _KEPT):
            child.append(op)
    child.append(restore)
    return ops.Plan(
        # CRIU makes the user namespace, and maps its ids.
        prepare=tuple(op for op in plan.prepare if not isinstance(op, ops.IdMap)),
        clone_flags=plan.clone_flags & _CLONED,
        cgroup_slot=plan.cgroup_slot,
        child=tuple(child),
        slots=plan.slots,
        supervision=plan.supervision,
    )
