"""One pass of reclaim: climb the ladder while memory is short, step down when it is not.

What lasts is noted before it is done, so that a pass that was killed is put right by the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from hutch.engine.context import Context
from hutch.engine.headroom import headroom
from hutch.engine.lookup import load
from hutch.engine.memory import (
    MEASURES,
    MemoryReport,
    View,
    load_measures,
    look_again,
    observe,
    report,
)
from hutch.errors import HutchError, NotFound
from hutch.lifecycle import State
from hutch.linux.cgroup.reclaim import reclaim as take_back
from hutch.linux.cgroup.reclaim import set_limit, usage_of
from hutch.resources.ladder import (
    Action,
    Measure,
    Situation,
    actions,
    level_of,
    missing_bytes,
    to_undo,
)
from hutch.resources.settings import Settings, load_settings

__all__ = ["ReclaimReport", "ReclaimStep", "reclaim_pass", "release_all", "watch"]

_KSM = Path("/sys/kernel/mm/ksm/run")
# These cost somebody something: one at a time, and a look after each.
_ONE_BY_ONE = frozenset(("freeze", "suspend", "kill"))
_LASTING = frozenset(("balloon", "merge", "swap", "hold", "freeze", "suspend", "kill"))
# A guest is not left with less of what it began with.
_LEAST = 96 << 20
_BALLOON_S = 5.0
_MOST_STEPS = 1000
_MIB = 1 << 20


class ReclaimStep(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was done, or undone: to whom, why, and the bytes that it gave back."""

    rung: str
    id: str
    name: str
    undone: bool = False
    given: int = 0
    reason: str = ""
    error: str = ""


class ReclaimReport(msgspec.Struct, frozen=True, kw_only=True):
    """A pass: how it was before and after, and what was done. With a dry run nothing was."""

    before: MemoryReport
    after: MemoryReport
    steps: tuple[ReclaimStep, ...]


def reclaim_pass(context: Context, *, dry_run: bool = False) -> ReclaimReport:
    """Take memory back where it is short, give back what was taken where it is not.

    `Busy` where another pass is at work on this root.
    """
    from hutch.linux.locks import lock_file

    settings = load_settings(context.root)
    with lock_file(context.root / "locks" / "reclaim", timeout_s=0.2):
        if not dry_run:
            _forget_ended(context)
        view = observe(context, settings)
        before = report(context, settings, view)
        if dry_run:
            return ReclaimReport(
                before=before, after=before, steps=_foretell(view, before, settings)
            )
        if missing_bytes(view.situation, settings.watermarks):
            steps, view = _climb(context, settings, view)
        else:
            steps, view = _step_down(context, settings, view)
        after = report(context, settings, view) if steps else before
    return ReclaimReport(before=before, after=after, steps=tuple(steps))


def watch(context: Context, interval_s: float) -> Iterator[ReclaimReport]:
    """Make a pass now and then, and at once where the kernel tells of a stall, or memory has come
    to be short since the last; never ends."""
    from hutch.errors import Busy
    from hutch.linux.psi import wait_pressure

    while True:
        left = None
        with suppress(Busy):
            done = reclaim_pass(context)
            left = _Left(context, done.after)
            yield done
        wait_pressure(interval_s, until=left.is_less if left is not None else lambda: False)


class _Left:
    """What a pass has left, for quick looks that tell whether it has shrunk and is too little."""

    def __init__(self, context: Context, after: MemoryReport) -> None:
        self._context, self._after = context, after
        self._marks = load_settings(context.root).watermarks
        self._free = headroom(context)

    def is_less(self) -> bool:
        after = self._after
        gone = self._free - headroom(self._context)
        # Where nothing was to be had, there is no point in asking again for a little.
        if gone < max(after.total // 50, _MIB):
            return False
        now = Situation(total=after.total, available=max(0, after.available - gone))
        return level_of(now, self._marks) != "none"


def release_all(context: Context) -> list[ReclaimStep]:
    """Undo everything that is in force, however short memory is."""
    from hutch.linux.locks import lock_file

    with lock_file(context.root / "locks" / "reclaim", timeout_s=30.0):
        _forget_ended(context)
        return [_undo(context, measure) for measure in reversed(load_measures(context))]


def _foretell(view: View, before: MemoryReport, settings: Settings) -> tuple[ReclaimStep, ...]:
    """Return what the next rungs would do, as if each gave what it promises."""
    steps = []
    now = view.situation
    for rung in settings.ladder:
        for action in actions(rung, now, view.members, before.measures, settings):
            steps.append(_step(action, action.amount))
            more = min(now.total, now.available + action.amount)
            now = msgspec.structs.replace(now, available=more)
    if not steps and (measure := to_undo(now, before.measures, settings)) is not None:
        steps.append(_undone(measure))
    return tuple(steps)


# ---- up -----------------------------------------------------------------------------------


def _climb(context: Context, settings: Settings, view: View) -> tuple[list[ReclaimStep], View]:
    steps: list[ReclaimStep] = []
    for rung in settings.ladder:
        tried: set[str] = set()
        while len(steps) < _MOST_STEPS:
            found = actions(rung, view.situation, view.members, load_measures(context), settings)
            found = [action for action in found if action.id not in tried]
            if not found:
                break
            for action in found[:1] if rung in _ONE_BY_ONE else found:
                tried.add(action.id)
                steps.append(_do(context, action, view))
            view = look_again(context, settings, view)
        if not missing_bytes(view.situation, settings.watermarks):
            break
    return steps, view


def _do(context: Context, action: Action, view: View) -> ReclaimStep:
    """Do one thing, note it, and measure what it gave."""
    lasting = action.rung in _LASTING
    try:
        if lasting:
            _note(context, action, before=_present(context, action, view))
        given = _EFFECTS[action.rung](context, action, view)
    except (HutchError, OSError) as exc:
        if lasting:
            _drop(context, action.rung, action.id)
        return msgspec.structs.replace(_step(action, 0), error=str(exc))
    if lasting:
        _note_given(context, action, given)
    _tell(context, action.rung, action.id, action.name, given, action.reason)
    return _step(action, given)


def _step(action: Action, given: int) -> ReclaimStep:
    return ReclaimStep(
        rung=action.rung, id=action.id, name=action.name, given=given, reason=action.reason
    )


def _present(context: Context, action: Action, view: View) -> int:
    """Return what a measure is put back to."""
    member = next((m for m in view.members if m.id == action.id), None)
    if member is None:
        return 0
    return member.balloon if action.rung == "balloon" else member.limit or 0


def _key(rung: str, identifier: str) -> str:
    return f"{rung}/{identifier}"


def _note(context: Context, action: Action, *, before: int) -> None:
    with context.store.write() as tx:
        key = _key(action.rung, action.id)
        earlier = tx.get(MEASURES, key, Measure)
        measure = Measure(
            rung=action.rung,
            id=action.id,
            name=action.name,
            # A second squeeze is put back to what was there before the first.
            before=before if earlier is None else earlier.before,
            target=action.target,
            given=0 if earlier is None else earlier.given,
            since_ns=time.time_ns() if earlier is None else earlier.since_ns,
            reason=action.reason,
        )
        tx.put(MEASURES, key, measure)


def _note_given(context: Context, action: Action, given: int) -> None:
    with context.store.write() as tx:
        key = _key(action.rung, action.id)
        measure = tx.get(MEASURES, key, Measure)
        if measure is not None:
            tx.put(MEASURES, key, msgspec.structs.replace(measure, given=measure.given + given))


def _drop(context: Context, rung: str, identifier: str) -> None:
    with context.store.write() as tx:
        tx.delete(MEASURES, _key(rung, identifier))


def _tell(context: Context, rung: str, identifier: str, name: str, given: int, reason: str) -> None:
    with context.store.write() as tx:
        tx.event("memory", rung, identifier, name=name, given=str(given), reason=reason)


def _balloon(context: Context, action: Action, view: View) -> int:
    from hutch.qmp import conversation
    from hutch.qmp.devices import query_balloon, query_plugged, set_balloon

    before = usage_of(view.groups[action.id])
    deadline = time.monotonic() + _BALLOON_S
    with conversation(f"{context.directory(action.id)}/run/qmp.sock") as monitor:
        # What came while it runs is not the balloon's to take.
        target = max(action.target - query_plugged(monitor), _LEAST)
        set_balloon(monitor, target)
        if action.amount < _MIB:
            return 0
        # The guest goes there in its own time, and stops where it needs what it has.
        last, size = 0, query_balloon(monitor)
        while size > target + _MIB and size != last and time.monotonic() < deadline:
            time.sleep(0.1)
            last, size = size, query_balloon(monitor)
    return max(0, before - usage_of(view.groups[action.id]))


def _merge(context: Context, action: Action, view: View) -> int:
    _KSM.write_text("1")
    return 0


def _cache(context: Context, action: Action, view: View) -> int:
    return take_back(view.groups[action.id], action.amount)


def _swap(context: Context, action: Action, view: View) -> int:
    return take_back(view.groups[action.id], action.amount, swap=True)


def _hold(context: Context, action: Action, view: View) -> int:
    set_limit(view.groups[action.id], action.target)
    return 0


def _freeze(context: Context, action: Action, view: View) -> int:
    from hutch.engine.stop import pause

    pause(context, action.id)
    swap = view.situation.swap_free > 0
    return take_back(view.groups[action.id], action.amount, swap=swap)


def _suspend(context: Context, action: Action, view: View) -> int:
    from hutch.engine.suspend import suspend

    before = usage_of(view.groups[action.id])
    suspend(context, action.id)
    return before


def _kill(context: Context, action: Action, view: View) -> int:
    from hutch.engine.stop import kill

    before = usage_of(view.groups[action.id])
    kill(context, action.id)
    return before


_EFFECTS: dict[str, Callable[[Context, Action, View], int]] = {
    "balloon": _balloon,
    "merge": _merge,
    "cache": _cache,
    "swap": _swap,
    "hold": _hold,
    "freeze": _freeze,
    "suspend": _suspend,
    "kill": _kill,
}


# ---- down ---------------------------------------------------------------------------------


def _step_down(context: Context, settings: Settings, view: View) -> tuple[list[ReclaimStep], View]:
    steps: list[ReclaimStep] = []
    while len(steps) < _MOST_STEPS:
        measure = to_undo(view.situation, load_measures(context), settings)
        if measure is None:
            break
        steps.append(_undo(context, measure))
        view = look_again(context, settings, view)
    return steps, view


def _undone(measure: Measure, error: str = "") -> ReclaimStep:
    return ReclaimStep(
        rung=measure.rung,
        id=measure.id,
        name=measure.name,
        undone=True,
        given=measure.given,
        reason="there is room again",
        error=error,
    )


def _undo(context: Context, measure: Measure) -> ReclaimStep:
    """Put one thing back. One that cannot be is not tried for ever: the instance has gone on
    without us, and the error is told."""
    error = ""
    try:
        _UNDO[measure.rung](context, measure)
    except (HutchError, OSError) as exc:
        error = str(exc)
    _drop(context, measure.rung, measure.id)
    _tell(context, "undo", measure.id, measure.name, measure.given, measure.rung)
    return _undone(measure, error)


def _undo_balloon(context: Context, measure: Measure) -> None:
    from hutch.qmp import conversation
    from hutch.qmp.devices import query_plugged, set_balloon

    with conversation(f"{context.directory(measure.id)}/run/qmp.sock") as monitor:
        set_balloon(monitor, max(measure.before - query_plugged(monitor), _LEAST))


def _undo_merge(context: Context, measure: Measure) -> None:
    # 2 would tear apart what is merged, which takes the memory that was saved.
    _KSM.write_text("0")


def _undo_swap(context: Context, measure: Measure) -> None:
    """Have what was swapped out read back before somebody has to wait for it."""
    from hutch.linux.memory import swap_in

    for pid in context.groups.hierarchy.load(measure.id).pids():
        swap_in(pid)


def _undo_hold(context: Context, measure: Measure) -> None:
    limit = load(context, measure.id).spec.resources.memory
    set_limit(context.groups.hierarchy.load(measure.id).directories, limit or None)


def _undo_freeze(context: Context, measure: Measure) -> None:
    from hutch.engine.stop import unpause

    if load(context, measure.id).state == State.PAUSED:
        unpause(context, measure.id)


def _undo_suspend(context: Context, measure: Measure) -> None:
    _start(context, measure.id, (State.SUSPENDED,))


def _undo_kill(context: Context, measure: Measure) -> None:
    """Start it again where its restart policy would have."""
    if load(context, measure.id).spec.restart.name != "no":
        _start(context, measure.id, (State.EXITED,))


def _start(context: Context, identifier: str, states: tuple[State, ...]) -> None:
    from hutch.engine.start import start

    if load(context, identifier).state in states:
        link = start(context, identifier)
        if link is not None:
            link.close()


_UNDO: dict[str, Callable[[Context, Measure], None]] = {
    "balloon": _undo_balloon,
    "merge": _undo_merge,
    "swap": _undo_swap,
    "hold": _undo_hold,
    "freeze": _undo_freeze,
    "suspend": _undo_suspend,
    "kill": _undo_kill,
}
# What an instance must be for a measure to be in force still.
_STATES: dict[str, tuple[State, ...]] = {
    "balloon": (State.RUNNING, State.PAUSED),
    "swap": (State.RUNNING, State.PAUSED),
    "hold": (State.RUNNING, State.PAUSED),
    "freeze": (State.PAUSED,),
    "suspend": (State.SUSPENDED,),
    "kill": (State.EXITED,),
}


def _forget_ended(context: Context) -> None:
    """Drop measures on instances that somebody has since ended, started or thawed."""
    for measure in load_measures(context):
        wanted = _STATES.get(measure.rung)
        if wanted is None:
            continue
        try:
            record = load(context, measure.id)
            # The run that it was done to has ended where another began since.
            same = measure.rung in ("suspend", "kill") or record.started_ns < measure.since_ns
            if record.state in wanted and same:
                continue
        except NotFound:
            pass
        _drop(context, measure.rung, measure.id)
