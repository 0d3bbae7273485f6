"""The reclaim ladder: whose memory is taken back next, by which means, and what is undone when
the pressure is over. Pure: what is seen goes in, what is to be done comes out.

Rungs are climbed in the order of the settings, each only as far as what is still missing. No
rung takes from an instance what it was guaranteed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from hutch.resources.settings import RUNGS, Settings, Watermarks
from hutch.units import format_bytes

__all__ = ["Action", "Measure", "Member", "Situation", "actions", "estimate", "level_of"]
__all__ += ["missing_bytes", "to_undo"]

_MIB = 1 << 20
# Less than this is not worth a disturbance.
_LEAST = 1 * _MIB
# What a guest is left above what it uses, so that it does not stall at once.
_GUEST_ROOM = 32 * _MIB
_GUEST_LEAST = 64 * _MIB
_HALF_LIFE_S = 300.0
_SPARED = -1000

Level = Literal["none", "low", "critical"]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One running instance as reclaim sees it; bytes. `cache` is file pages, which go without
    swap; `guarantee` is what it keeps; `balloon` what a guest may use now (0: no balloon);
    `idle_s` for how long it has done next to nothing; `may_suspend` that it can be saved to
    disk; `order` is its oom_score_adj: the higher, the sooner it is killed."""

    id: str
    name: str
    kind: str
    state: str
    usage: int
    cache: int = 0
    working_set: int = 0
    guarantee: int = 0
    limit: int | None = None
    balloon: int = 0
    idle_s: float = 0.0
    may_suspend: bool = False
    order: int = 0
    started_ns: int = 0

    @property
    def excess(self) -> int:
        """What it has above its guarantee."""
        return max(0, self.usage - self.guarantee)


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """The memory that all share; bytes. `available` can be had without taking anything from an
    instance. `some` and `full` are the percentages of the last ten seconds in which somebody,
    or everybody, waited for memory (None: the kernel does not tell). `precise`: a group can be
    relieved of a part of its cache (cgroup v2), and not only of all of it."""

    total: int
    available: int
    swap_free: int = 0
    some: float | None = None
    full: float | None = None
    precise: bool = False
    merging: bool | None = None


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to do: `target` is the size to which something goes (a balloon, a limit),
    `amount` what is asked for, `reason` why this one."""

    rung: str
    id: str = ""
    name: str = ""
    amount: int = 0
    target: int = 0
    reason: str = ""


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was done and is in force: `before` is what it is put back to, `given` the
    bytes that it gave back."""

    rung: str
    id: str
    name: str
    before: int = 0
    target: int = 0
    given: int = 0
    since_ns: int = 0
    reason: str = ""


def level_of(now: Situation, marks: Watermarks) -> Level:
    """Return how bad it is: by stalls where the kernel tells them, and by watermarks."""
    share = now.available / now.total if now.total else 1.0
    if share < marks.critical or (now.full or 0.0) >= marks.stall_full:
        return "critical"
    if share < marks.low or (now.some or 0.0) >= marks.stall_some:
        return "low"
    return "none"


def missing_bytes(now: Situation, marks: Watermarks) -> int:
    """Return how much is to be given back: up to the high mark; under stalls alone, a little."""
    if level_of(now, marks) == "none":
        return 0
    below = int(marks.high * now.total) - now.available
    return max(below, now.total // 100, _LEAST)


def estimate(previous: int, now: int, elapsed_s: float) -> int:
    """Return a working set: what is used now, or the greatest of before, halved every five
    minutes since."""
    return max(now, int(previous * 0.5 ** (max(0.0, elapsed_s) / _HALF_LIFE_S)))


# ---- taking -------------------------------------------------------------------------------


def actions(
    rung: str,
    now: Situation,
    members: Sequence[Member],
    measures: Iterable[Measure],
    settings: Settings,
) -> list[Action]:
    """Return what a rung does in this situation, at most as much as is missing."""
    missing = missing_bytes(now, settings.watermarks)
    if not missing:
        return []
    done = {measure.id for measure in measures if measure.rung == rung}
    fresh = [member for member in members if member.id not in done]
    critical = level_of(now, settings.watermarks) == "critical"
    match rung:
        case "balloon":
            return _until(missing, map(_balloon, _by_slack(members)))
        case "merge":
            return [_merge()] if now.merging is False else []
        case "cache":
            return _until(missing, (_cache(m, precise=now.precise) for m in _by_excess(members)))
        case "swap":
            room = min(missing, now.swap_free)
            return _until(room, map(_swap, _by_excess(members))) if room else []
        case "hold":
            return _hold(fresh, critical=critical)
        case "freeze":
            idle = [m for m in fresh if m.state == "running" and m.idle_s >= settings.idle_s]
            return _until(missing, (_freeze(m, now) for m in _by_idleness(idle)))
        case "suspend":
            return _until(missing, map(_suspend, _suspendable(fresh, settings, critical=critical)))
        case "kill":
            return _until(missing, map(_kill, _by_order(fresh))) if critical else []
    raise ValueError(rung)


def _until(missing: int, found: Iterable[Action | None]) -> list[Action]:
    """Take actions until they promise enough; the last is trimmed where it can be."""
    chosen: list[Action] = []
    for action in found:
        if missing <= 0:
            break
        # A balloon that gives nothing now keeps its guest from growing.
        if action is None or (action.amount < _LEAST and action.rung != "balloon"):
            continue
        if action.rung in ("balloon", "swap") and action.amount > missing:
            less = -(-missing // _MIB) * _MIB
            spared = max(0, action.amount - less)
            action = msgspec.structs.replace(
                action,
                amount=action.amount - spared,
                target=action.target + spared if action.rung == "balloon" else 0,
            )
        chosen.append(action)
        missing -= action.amount
    return chosen


def _by_excess(members: Iterable[Member]) -> list[Member]:
    return sorted(members, key=lambda m: (-m.idle_s, -m.excess, m.name))


def _by_idleness(members: Iterable[Member]) -> list[Member]:
    return sorted(members, key=lambda m: (-m.idle_s, -m.excess))


def _by_slack(members: Iterable[Member]) -> list[Member]:
    return sorted(members, key=lambda m: _floor(m) - min(m.balloon, m.usage))


def _floor(member: Member) -> int:
    """Return what a guest is left: its guarantee, and what it uses with some room."""
    used = member.working_set + max(_GUEST_ROOM, member.working_set // 8)
    return -(-max(member.guarantee, used, _GUEST_LEAST) // _MIB) * _MIB


def _balloon(member: Member) -> Action | None:
    floor = _floor(member)
    if not member.balloon or member.state != "running" or member.balloon <= floor:
        return None
    why = f"uses {format_bytes(member.working_set)} of {format_bytes(member.balloon)}"
    # What the guest never touched, or has given back by itself, is not to be had again.
    gain = min(member.balloon, member.usage) - floor
    return _action("balloon", member, gain, why, target=floor)


def _merge() -> Action:
    return Action(rung="merge", amount=_LEAST, reason="equal pages of virtual machines")


def _cache(member: Member, *, precise: bool) -> Action | None:
    """All of the cache, or as much of it as is above the guarantee where that can be said."""
    amount = min(member.cache, member.excess)
    if member.cache > member.excess and not precise:
        return None
    why = f"{format_bytes(member.cache)} of files, {format_bytes(member.excess)} above its own"
    return _action("cache", member, amount, why)


def _swap(member: Member) -> Action | None:
    cold = member.usage - member.cache - max(member.guarantee, member.working_set)
    if member.state == "paused":
        cold = member.excess
    return _action("swap", member, cold, f"{format_bytes(max(0, cold))} not in use")


def _hold(members: Sequence[Member], *, critical: bool) -> list[Action]:
    """Let nobody grow who is above what was promised, while others have yet to come to theirs:
    a limit just above what it has now."""
    owed = [m for m in members if m.guarantee > m.usage]
    if not owed and not critical:
        return []
    names = ", ".join(m.name for m in owed[:3]) or "the host"
    found = []
    for member in members:
        target = max(member.guarantee, member.usage + max(_MIB, member.usage // 20))
        bounded = member.limit is not None and member.limit <= target
        if member.kind == "container" and member.excess >= _LEAST and not bounded:
            found.append(_action("hold", member, 0, f"for {names}", target=target))
    return found


def _freeze(member: Member, now: Situation) -> Action | None:
    amount = member.excess if now.swap_free else min(member.cache, member.excess)
    return _action("freeze", member, amount, f"idle for {member.idle_s:.0f} s")


def _suspendable(members: Iterable[Member], settings: Settings, *, critical: bool) -> list[Member]:
    """Machines without a guarantee: the idle ones, and when it is critical any."""
    return [
        m
        for m in _by_idleness(members)
        if m.may_suspend
        and not m.guarantee
        and m.state == "running"
        and (critical or m.idle_s >= settings.idle_s)
    ]


def _suspend(member: Member) -> Action | None:
    return _action("suspend", member, member.usage, f"idle for {member.idle_s:.0f} s")


def _by_order(members: Iterable[Member]) -> list[Member]:
    """In the order in which they are killed: as their oom_score_adj says, then who has most
    above what was promised, then who came last. Who is within its guarantee is spared."""
    killable = [m for m in members if m.order > _SPARED and m.excess >= _LEAST]
    return sorted(killable, key=lambda m: (-m.order, -m.excess, -m.started_ns))


def _kill(member: Member) -> Action | None:
    why = f"order {member.order}, {format_bytes(member.excess)} above what was promised"
    return _action("kill", member, member.usage, why)


def _action(rung: str, member: Member, amount: int, reason: str, *, target: int = 0) -> Action:
    return Action(
        rung=rung,
        id=member.id,
        name=member.name,
        amount=max(0, amount),
        target=target,
        reason=reason,
    )


# ---- giving back --------------------------------------------------------------------------


def to_undo(now: Situation, measures: Sequence[Measure], settings: Settings) -> Measure | None:
    """Return the measure that is undone next, None for none: the highest rung first, and only
    where what it gave may be taken again without falling to the low mark."""
    marks = settings.watermarks
    if level_of(now, marks) != "none" or not measures:
        return None
    ordered = sorted(measures, key=lambda m: (-RUNGS.index(m.rung), m.since_ns))
    spare = now.available - int(marks.low * now.total)
    return next((measure for measure in ordered if measure.given < spare), None)
