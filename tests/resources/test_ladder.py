"""The policy of reclaim: who gives what, in which order, and what is never taken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.resources.ladder import (
    Measure,
    Member,
    Situation,
    actions,
    estimate,
    level_of,
    missing_bytes,
    to_undo,
)
from hutch.resources.settings import RUNGS, Settings, Watermarks

MIB = 1 << 20
GIB = 1 << 30
MARKS = Watermarks()
ALL = Settings(ladder=RUNGS)
LOW = Situation(total=10 * GIB, available=GIB - MIB)
CRITICAL = Situation(total=10 * GIB, available=GIB // 4)
WELL = Situation(total=10 * GIB, available=8 * GIB)


def member(name: str, usage: int, **more: object) -> Member:
    values: dict[str, object] = {"kind": "container", "state": "running", **more}
    return Member(id=f"{name}-id", name=name, usage=usage, **values)  # type: ignore[arg-type]


def names(rung: str, now: Situation, *members: Member, **more: object) -> list[str]:
    chosen = Settings(ladder=RUNGS, **more)  # type: ignore[arg-type]
    return [action.name for action in actions(rung, now, members, (), chosen)]


@pytest.mark.parametrize(
    ("available", "some", "full", "level"),
    [
        (8.0, None, None, "none"),
        (8.0, 19.0, 4.0, "none"),
        (0.9, None, None, "low"),
        (8.0, 25.0, 0.0, "low"),
        (0.4, None, None, "critical"),
        (8.0, 30.0, 6.0, "critical"),
    ],
)
def test_levels_by_marks_and_by_stalls(
    available: float, some: float | None, full: float | None, level: str
) -> None:
    now = Situation(total=10 * GIB, available=int(available * GIB), some=some, full=full)
    assert level_of(now, MARKS) == level
    assert bool(missing_bytes(now, MARKS)) == (level != "none")


def test_what_is_missing_reaches_to_the_high_mark() -> None:
    assert missing_bytes(LOW, MARKS) == int(1.5 * GIB) - (GIB - MIB)
    stalled = Situation(total=10 * GIB, available=8 * GIB, some=50.0)
    assert missing_bytes(stalled, MARKS) == 10 * GIB // 100


def test_nothing_is_done_without_pressure() -> None:
    fat = member("fat", 5 * GIB, cache=4 * GIB, balloon=GIB, kind="vm", idle_s=999.0)
    assert all(actions(rung, WELL, [fat], (), ALL) == [] for rung in RUNGS)


def test_a_balloon_leaves_a_guest_what_it_uses_and_what_it_was_promised() -> None:
    vm = member("vm", 2 * GIB, kind="vm", balloon=2 * GIB, working_set=256 * MIB)
    (action,) = actions("balloon", CRITICAL, [vm], (), ALL)
    assert action.amount == 2 * GIB - action.target >= missing_bytes(CRITICAL, MARKS)
    small = member("s", GIB, kind="vm", balloon=GIB, working_set=256 * MIB, guarantee=900 * MIB)
    (action,) = actions("balloon", CRITICAL, [small], (), ALL)
    assert action.target == 900 * MIB
    assert (
        actions("balloon", CRITICAL, [member("p", GIB, balloon=GIB, state="paused")], (), ALL) == []
    )


def test_a_balloon_promises_what_its_machine_has_and_comes_last_where_that_is_nothing() -> None:
    few = member("few", 100 * MIB, kind="vm", balloon=4 * GIB, working_set=80 * MIB)
    full = member("full", GIB // 2, kind="vm", balloon=GIB, working_set=80 * MIB)
    found = actions("balloon", CRITICAL, [few, full], (), ALL)
    assert [(a.name, a.amount) for a in found] == [("full", (512 - 112) * MIB), ("few", 0)]


def test_a_balloon_takes_no_more_than_is_missing() -> None:
    vms = [member(n, 4 * GIB, kind="vm", balloon=4 * GIB, working_set=MIB) for n in "ab"]
    found = actions("balloon", LOW, vms, (), ALL)
    assert len(found) == 1
    assert missing_bytes(LOW, MARKS) <= found[0].amount < missing_bytes(LOW, MARKS) + MIB


def test_cache_goes_from_the_idle_and_the_greedy_first() -> None:
    idle = member("idle", GIB, cache=100 * MIB, idle_s=60.0)
    greedy = member("greedy", 5 * GIB, cache=100 * MIB)
    modest = member("modest", GIB, cache=200 * MIB)
    assert names("cache", CRITICAL, modest, greedy, idle) == ["idle", "greedy", "modest"]


def test_cache_below_a_guarantee_stays() -> None:
    mine = member("mine", GIB, cache=600 * MIB, guarantee=GIB // 2)
    # All or nothing on cgroup v1: that would cross the guarantee.
    assert names("cache", CRITICAL, mine) == []
    precise = Situation(total=10 * GIB, available=0, precise=True)
    (action,) = actions("cache", precise, [mine], (), ALL)
    assert action.amount == GIB // 2
    assert names("cache", precise, member("all", GIB, cache=GIB, guarantee=2 * GIB)) == []


def test_swap_takes_what_is_not_in_use_where_there_is_swap() -> None:
    cold = member("cold", GIB, working_set=100 * MIB)
    assert names("swap", CRITICAL, cold) == []
    roomy = Situation(total=10 * GIB, available=0, swap_free=50 * MIB)
    (action,) = actions("swap", roomy, [cold], (), ALL)
    assert action.amount == 50 * MIB


def test_who_is_above_its_share_is_held_while_somebody_is_owed() -> None:
    hog = member("hog", 5 * GIB)
    owed = member("owed", 100 * MIB, guarantee=GIB)
    (action,) = actions("hold", LOW, [hog, owed], (), ALL)
    assert action.name == "hog" and action.reason == "for owed"
    assert 5 * GIB < action.target < 6 * GIB
    assert names("hold", LOW, hog) == [] and names("hold", CRITICAL, hog) == ["hog"]
    bounded = member("bounded", 5 * GIB, limit=5 * GIB)
    assert names("hold", LOW, bounded, owed) == []


def test_only_the_idle_are_frozen() -> None:
    idle = member("idle", GIB, cache=GIB // 2, idle_s=61.0)
    busy = member("busy", GIB, cache=GIB // 2, idle_s=5.0)
    assert names("freeze", CRITICAL, idle, busy) == ["idle"]
    # What would be gained is nothing.
    assert names("freeze", CRITICAL, member("anon", GIB, idle_s=99.0)) == []


def test_machines_without_a_promise_are_suspended() -> None:
    idle = member("idle", GIB, kind="vm", may_suspend=True, idle_s=61.0)
    busy = member("busy", GIB, kind="vm", may_suspend=True)
    kept = member("kept", GIB, kind="vm", may_suspend=True, guarantee=MIB, idle_s=99.0)
    assert names("suspend", LOW, idle, busy, kept) == ["idle"]
    assert names("suspend", CRITICAL, busy, kept) == ["busy"]


def test_killing_is_last_and_in_the_stated_order() -> None:
    first = member("first", 300 * MIB, order=500)
    fat = member("fat", 600 * MIB)
    thin = member("thin", 300 * MIB)
    spared = member("spared", 5 * GIB, order=-1000)
    within = member("within", 5 * GIB, guarantee=5 * GIB, order=1000)
    everybody = (spared, thin, fat, within, first)
    assert names("kill", LOW, *everybody) == []
    assert names("kill", CRITICAL, *everybody) == ["first", "fat", "thin"]


def test_what_is_done_already_is_not_done_again() -> None:
    idle = member("idle", GIB, cache=GIB // 2, idle_s=61.0)
    done = Measure(rung="freeze", id="idle-id", name="idle")
    assert actions("freeze", CRITICAL, [idle], [done], ALL) == []


def measure(rung: str, given: int) -> Measure:
    return Measure(rung=rung, id=rung, name=rung, given=given)


def test_what_hurts_most_is_undone_first_and_as_far_as_there_is_room() -> None:
    done = [measure("balloon", GIB), measure("freeze", 2 * GIB), measure("cache", 0)]
    found = to_undo(WELL, done, ALL)
    assert found is not None and found.rung == "freeze"
    tight = Situation(total=10 * GIB, available=int(2.5 * GIB))
    found = to_undo(tight, done, ALL)
    assert found is not None and found.rung == "cache"
    assert to_undo(LOW, done, ALL) is None
    assert to_undo(WELL, [], ALL) is None


def test_a_working_set_is_forgotten_slowly() -> None:
    assert estimate(100, 200, 1.0) == 200
    assert estimate(1000, 10, 300.0) == 500
    assert estimate(1000, 10, 0.0) == 1000


@settings(deadline=None)
@given(
    members=st.lists(
        st.builds(
            Member,
            id=st.uuids().map(str),
            name=st.text("abc", min_size=1, max_size=3),
            kind=st.sampled_from(["container", "vm"]),
            state=st.sampled_from(["running", "paused"]),
            usage=st.integers(0, 8 * GIB),
            cache=st.integers(0, GIB),
            working_set=st.integers(0, 4 * GIB),
            guarantee=st.integers(0, 8 * GIB),
            limit=st.none() | st.integers(0, 8 * GIB),
            balloon=st.integers(0, 8 * GIB),
            idle_s=st.floats(0, 1000),
            may_suspend=st.booleans(),
            order=st.integers(-1000, 1000),
        ),
        max_size=6,
    ),
    available=st.integers(0, 10 * GIB),
    precise=st.booleans(),
    swap=st.integers(0, GIB),
)
def test_no_rung_crosses_a_guarantee(
    members: list[Member], available: int, precise: bool, swap: int
) -> None:
    now = Situation(total=10 * GIB, available=available, precise=precise, swap_free=swap)
    by_id = {m.id: m for m in members}
    for rung in RUNGS:
        for action in actions(rung, now, members, (), ALL):
            if not action.id:
                continue
            one = by_id[action.id]
            match rung:
                case "balloon" | "hold":
                    assert action.target >= one.guarantee
                case "cache" | "swap" | "freeze":
                    assert one.usage - action.amount >= one.guarantee
                case "suspend":
                    assert one.guarantee == 0
                case "kill":
                    assert one.usage > one.guarantee and one.order > -1000
