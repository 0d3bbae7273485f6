"""Real pressure, inside a control group of the test's own: a hog beside a protected instance,
idle ones, a fork bomb; everything is back after the storm."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine, Instance
from hutch.engine import reclaim as passes
from hutch.engine.reclaim import ReclaimReport
from hutch.errors import Busy, WrongState
from hutch.lifecycle import State
from hutch.linux.locks import lock_file
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox"),
    pytest.mark.integration,
]

MIB = 1 << 20
DEADLINE_S = 60.0
ALL_MIB = 192
# Below half of it is short: so there is pressure long before the kernel has any.
MARKS = {"watermarks.high": "0.6", "watermarks.low": "0.5", "watermarks.critical": "0.05"}


@pytest.fixture
def small(engine: Engine) -> Iterator[Engine]:
    """An engine whose instances have 192 MiB together, in a group of their own."""
    parent = f"hutch-test-{os.getpid()}-{time.monotonic_ns()}"
    engine.resources.configure({"parent": parent, "memory": f"{ALL_MIB}M", **MARKS})
    yield engine
    for info in engine.list(all=True):
        engine.get(info.name).remove(force=True)
    paths = engine._context.groups.hierarchy.parent.values()
    engine.resources.configure({"parent": "none"})
    assert not [path for path in paths if Path(path).exists()]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def start(engine: Engine, name: str, script: str = ":", **options: object) -> Instance:
    """Start an instance and wait until it has done its script."""
    script = f"{script}; touch /tmp/done; sleep 1000"
    values: dict[str, object] = {"network": "none", "shm_size": "256M", **options}
    box = engine.start("busybox", ["sh", "-c", script], name=name, **values)  # type: ignore[arg-type]
    until(lambda: box.files.exists("/tmp/done"), f"{name} has not begun")
    return box


def hold(mib: int, name: str = "x") -> str:
    """A script that takes memory which only its end gives back."""
    return f"dd if=/dev/zero of=/dev/shm/{name} bs=1M count={mib} 2>/dev/null"


def files(mib: int) -> str:
    """A script that fills the cache of files."""
    return f"dd if=/dev/zero of=/tmp/file bs=1M count={mib} 2>/dev/null && sync"


def ladder(engine: Engine, rungs: str, **more: str) -> None:
    engine.resources.configure({"ladder": rungs, **more})


def did(done: ReclaimReport) -> list[tuple[str, str]]:
    assert [step.error for step in done.steps if step.error] == []
    return [("undo " * step.undone + step.rung, step.name) for step in done.steps]


def usage(engine: Engine, name: str) -> int:
    return next(use.usage for use in engine.resources.memory().instances if use.name == name)


def test_nothing_is_done_while_there_is_room(small: Engine) -> None:
    ladder(small, "cache,hold,freeze,kill", idle_s="0")
    start(small, "calm", hold(10))
    done = small.resources.reclaim()
    assert done.steps == () and done.before.level == "none"
    assert done.before.total == ALL_MIB * MIB


def test_files_of_the_unprotected_go_and_those_of_the_protected_stay(small: Engine) -> None:
    ladder(small, "cache")
    start(small, "kept", files(40), memory_reservation="64M")
    start(small, "greedy", files(70))
    before = usage(small, "kept")
    foretold = small.resources.reclaim(dry_run=True)
    assert did(foretold) == [("cache", "greedy")]
    assert usage(small, "greedy") > 60 * MIB
    done = small.resources.reclaim()
    assert did(done) == [("cache", "greedy")]
    assert done.steps[0].given > 60 * MIB and "of files" in done.steps[0].reason
    assert usage(small, "greedy") < 10 * MIB and usage(small, "kept") > before - 8 * MIB
    assert done.after.level == "none"


def test_a_hog_is_held_and_the_protected_one_comes_to_what_it_was_promised(small: Engine) -> None:
    ladder(small, "cache,hold")
    kept = start(small, "kept", hold(10), memory_reservation="64M")
    hog = start(small, "hog", hold(100))
    done = small.resources.reclaim()
    assert did(done) == [("hold", "hog")] and done.steps[0].reason == "for kept"
    assert [(m.rung, m.name) for m in small.resources.memory().measures] == [("hold", "hog")]
    # The hog's growth hurts the hog alone: it is killed for it, or slowed (cgroup v2).
    hog.exec(["timeout", "5", "sh", "-c", f"exec {hold(60, 'more')}"])
    assert usage(small, "hog") < 120 * MIB
    assert kept.exec(["sh", "-c", hold(50, "more")]).exit_code == 0
    assert usage(small, "kept") > 60 * MIB
    # After the storm its own limits hold again: none.
    kept.remove(force=True)
    hog.exec(["sh", "-c", "rm -f /dev/shm/*"])
    # Where the kernel tells of stalls, the storm is over when they have faded from its average.
    steps: list[tuple[str, str]] = []

    def went_on() -> bool:
        steps[:] = did(small.resources.reclaim())
        return bool(steps)

    until(went_on, "is held still")
    assert steps == [("undo hold", "hog")]
    assert hog.exec(["sh", "-c", hold(120)]).exit_code == 0
    assert small.resources.memory().measures == ()


def test_the_idle_are_frozen_relieved_and_thawed(small: Engine) -> None:
    ladder(small, "freeze", idle_s="1")
    idle = start(small, "idle", files(60))
    start(small, "busy", hold(60))
    working = small.get("busy").exec_stream(["sh", "-c", "while :; do :; done"])

    def is_seen() -> bool:
        found = {use.name: use.idle_s for use in small.resources.memory().instances}
        return found["idle"] > 1 and found["busy"] < 0.5  # one that works is starved at times

    until(is_seen, "its idleness")
    done = small.resources.reclaim()
    assert did(done) == [("freeze", "idle")]
    assert done.steps[0].given > 50 * MIB and idle.info().state == State.PAUSED
    small.get("busy").remove(force=True)
    working.close()
    assert did(small.resources.reclaim()) == [("undo freeze", "idle")]
    assert idle.exec(["true"]).exit_code == 0


def test_killing_goes_by_the_stated_order_and_is_made_good(small: Engine) -> None:
    marks = {"watermarks.critical": "0.3", "watermarks.low": "0.3", "watermarks.high": "0.35"}
    ladder(small, "kill", **marks)
    first = start(small, "first", hold(40), oom_score_adj=700, restart="always")
    start(small, "second", hold(60))
    start(small, "kept", hold(60), memory_reservation="80M", oom_score_adj=900)
    done = small.resources.reclaim()
    assert did(done) == [("kill", "first")] and "order 700" in done.steps[0].reason
    assert done.steps[0].given > 35 * MIB and done.after.level == "none"
    assert first.info().state == State.EXITED
    assert small.get("second").info().state == State.RUNNING
    small.get("second").remove(force=True)
    assert did(small.resources.reclaim()) == [("undo kill", "first")]
    until(lambda: first.info().state == State.RUNNING, "not started again")


def test_a_pass_that_was_cut_short_is_put_right_by_the_next(
    small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder(small, "hold")
    hog = start(small, "hog", hold(100))
    start(small, "kept", memory_reservation="64M")

    def cut(*arguments: object) -> int:
        passes._hold(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setitem(passes._EFFECTS, "hold", cut)
    with pytest.raises(KeyboardInterrupt):
        small.resources.reclaim()
    monkeypatch.undo()
    hog.exec(["rm", "/dev/shm/x"])
    assert did(small.resources.reclaim()) == [("undo hold", "hog")]
    assert hog.exec(["sh", "-c", hold(90)]).exit_code == 0


def test_everything_is_undone_at_once_by_request(small: Engine) -> None:
    ladder(small, "hold,freeze", idle_s="0")
    start(small, "kept", memory_reservation="64M")
    hog = start(small, "hog", f"{hold(60)}; {files(50)}")
    small.resources.memory()
    small.resources.reclaim()
    assert {m.rung for m in small.resources.memory().measures} == {"hold", "freeze"}
    assert {step.rung for step in small.resources.release()} == {"hold", "freeze"}
    assert hog.info().state == State.RUNNING and small.resources.memory().measures == ()


def test_what_somebody_ended_is_no_measure_any_more(small: Engine) -> None:
    ladder(small, "hold")
    start(small, "kept", memory_reservation="64M")
    hog = start(small, "hog", hold(100))
    assert did(small.resources.reclaim()) == [("hold", "hog")]
    hog.remove(force=True)
    assert small.resources.memory().measures == ()
    assert small.resources.reclaim().steps == ()


def test_one_pass_at_a_time(small: Engine) -> None:
    with lock_file(small.root / "locks" / "reclaim"), pytest.raises(Busy):
        small.resources.reclaim()


def test_a_watch_makes_passes_until_it_is_left(small: Engine) -> None:
    ladder(small, "cache")
    start(small, "greedy", files(120))
    seen = small.resources.watch(0.05)
    assert did(next(seen)) == [("cache", "greedy")]
    assert did(next(seen)) == []
    seen.close()  # type: ignore[attr-defined]


def test_a_watch_does_not_wait_for_its_time_when_memory_runs_short(small: Engine) -> None:
    ladder(small, "cache")
    box = start(small, "greedy", files(40))
    seen = small.resources.watch(3600)
    assert did(next(seen)) == []
    box.exec(["sh", "-c", "dd if=/dev/zero of=/tmp/more bs=1M count=80 2>/dev/null"])
    # A stall of the host's, which is somebody else's, makes it look as well.
    assert next(filter(None, map(did, seen))) == [("cache", "greedy")]
    seen.close()  # type: ignore[attr-defined]


def test_a_fork_bomb_is_its_own_affair(small: Engine) -> None:
    kept = start(small, "kept", hold(10), memory_reservation="32M")
    bomb = start(small, "bomb", "f() { f | f & }; f 2>/dev/null", pids_limit=40)
    assert kept.exec(["echo", "here"]).text == "here\n"
    assert bomb.stats().pids.current <= 40
    bomb.kill()
    bomb.remove()
    assert kept.exec(["true"]).exit_code == 0
    assert usage(small, "kept") >= 10 * MIB


def test_the_group_above_is_not_changed_under_those_who_run(small: Engine) -> None:
    start(small, "runs")
    with pytest.raises(WrongState, match="runs"):
        small.resources.configure({"parent": "elsewhere"})
    assert small.resources.configure({"memory": "64M"}).memory == 64 * MIB
    assert small.resources.memory().total == 64 * MIB
    small.get("runs").exec(["sh", "-c", hold(40)])
    with pytest.raises(Busy):
        small.resources.configure({"memory": "16M"})
    assert small.resources.settings.memory == 64 * MIB


def test_the_group_of_all_roots_is_never_bounded(engine: Engine) -> None:
    engine.resources.configure({"memory": "64M"})
    box = start(engine, "one", memory="32M")
    paths = engine._context.groups.hierarchy.parent
    limit = Path(paths["memory"]) / "memory.limit_in_bytes" if "memory" in paths else None
    assert limit is None or int(limit.read_text()) > 1 << 60
    assert engine.resources.memory().total > 64 * MIB
    box.remove(force=True)


def test_working_sets_are_remembered_and_idleness_is_counted(small: Engine) -> None:
    box = start(small, "one", hold(30))
    first = small.resources.memory().instances[0]
    assert first.working_set >= 30 * MIB
    box.exec(["rm", "/dev/shm/x"])
    later = small.resources.memory().instances[0]
    assert later.usage < 25 * MIB and later.working_set <= later.usage
    assert later.refaults >= 0 and later.guarantee == 0
