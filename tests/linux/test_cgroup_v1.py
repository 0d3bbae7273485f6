"""Version 1 groups of this host: limits, processes, counters and removal, for real."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hutch.errors import AlreadyExists, Busy, InvalidArgument, NotFound, Unsupported
from hutch.linux.cgroup import ALL_DEVICES, DEFAULT_DEVICES, DeviceRule, Group, Limits, detect, v1
from hutch.linux.cgroup.detect import _mounts
from hutch.linux.cgroup.v1 import V1Group, V1Hierarchy
from tests.linux.cgroups import fresh_parent, member, remove_parents
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup"),
    pytest.mark.skipif(
        not Path("/sys/fs/cgroup/memory/tasks").exists(), reason="no version 1 controllers"
    ),
]

MiB = 1 << 20
SOURCE = str(Path(v1.__file__).parents[3])


@pytest.fixture
def parent() -> Iterator[str]:
    name = fresh_parent()
    yield name
    remove_parents(name)


@pytest.fixture
def hierarchy(parent: str) -> V1Hierarchy:
    mounts, _ = _mounts("/sys/fs/cgroup", "/proc")
    return V1Hierarchy(mounts, parent)


@pytest.fixture
def make(hierarchy: V1Hierarchy) -> Iterator[Callable[[Limits], V1Group]]:
    made: list[V1Group] = []

    def create(limits: Limits) -> V1Group:
        made.append(hierarchy.create(f"g{len(made)}", limits))
        return made[-1]

    yield create
    for group in made:
        group.kill_all()
        group.remove()


def value(group: V1Group, controller: str, name: str) -> str:
    return Path(group.directories[controller], name).read_text().strip()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def test_detection_finds_the_controllers_of_this_host(parent: str) -> None:
    found = detect(parent=parent)
    assert found.version in ("v1", "hybrid")
    assert {"cpu", "memory", "pids", "freezer", "devices"} <= found.controllers


def test_limits_are_written_to_their_files(make: Callable[[Limits], V1Group]) -> None:
    group = make(
        Limits(
            cpus=0.5,
            cpu_shares=512,
            cpuset_cpus="0",
            memory=64 * MiB,
            memory_reservation=32 * MiB,
            memory_swappiness=10,
            pids=50,
        )
    )
    assert value(group, "cpu", "cpu.cfs_quota_us") == "50000"
    assert value(group, "cpu", "cpu.cfs_period_us") == "100000"
    assert value(group, "cpu", "cpu.shares") == "512"
    assert value(group, "cpuset", "cpuset.cpus") == "0"
    assert value(group, "memory", "memory.limit_in_bytes") == str(64 * MiB)
    assert value(group, "memory", "memory.soft_limit_in_bytes") == str(32 * MiB)
    assert value(group, "memory", "memory.swappiness") == "10"
    assert value(group, "pids", "pids.max") == "50"


@pytest.mark.parametrize(
    ("swap", "total"),
    [(None, str(128 * MiB)), (0, str(128 * MiB)), (64 * MiB, str(64 * MiB)), (-1, None)],
)
def test_memory_swap_counts_memory_and_swap_together(
    make: Callable[[Limits], V1Group], swap: int | None, total: str | None
) -> None:
    group = make(Limits(memory=64 * MiB, memory_swap=swap))
    written = value(group, "memory", "memory.memsw.limit_in_bytes")
    assert written == total if total else int(written) > 1 << 60


@pytest.mark.parametrize("steps", [(64, 256), (256, 64), (64, 100, 30)])
def test_memory_and_swap_change_in_both_directions(
    make: Callable[[Limits], V1Group], steps: tuple[int, ...]
) -> None:
    first, *rest = steps
    group = make(Limits(memory=first * MiB, memory_swap=first * MiB))
    for step in rest:
        group.update(Limits(memory=step * MiB, memory_swap=2 * step * MiB))
        assert value(group, "memory", "memory.limit_in_bytes") == str(step * MiB)
        assert value(group, "memory", "memory.memsw.limit_in_bytes") == str(2 * step * MiB)


def test_memory_above_the_present_swap_limit_is_refused_with_a_cure(
    make: Callable[[Limits], V1Group],
) -> None:
    group = make(Limits(memory=64 * MiB, memory_swap=64 * MiB))
    with pytest.raises(InvalidArgument, match=r"memory: .*limit of memory and swap") as caught:
        group.update(Limits(memory=128 * MiB))
    assert caught.value.hint == "set memory_swap too"
    assert value(group, "memory", "memory.limit_in_bytes") == str(64 * MiB)


def test_taking_the_limits_away(make: Callable[[Limits], V1Group]) -> None:
    group = make(Limits(memory=64 * MiB, pids=5, cpus=1))
    group.update(Limits(memory=-1, pids=-1, cpu_quota_us=-1))
    stats = group.stats()
    assert stats.memory.limit is None
    assert stats.pids.limit is None
    assert value(group, "cpu", "cpu.cfs_quota_us") == "-1"


def test_unset_limits_are_left_by_an_update(make: Callable[[Limits], V1Group]) -> None:
    group = make(Limits(memory=64 * MiB, pids=5))
    group.update(Limits(pids=6))
    assert group.stats().memory.limit == 64 * MiB
    assert group.stats().pids.limit == 6


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(cpuset_cpus="9999"), "cpuset_cpus"),
        (Limits(cpuset_cpus="nonsense"), "cpuset_cpus"),
        (Limits(cpu_period_us=50_000_000), "cpu_period_us"),
        (Limits(device_read_bps=((253, 9999, 1),)), r"device_read_bps\[0\]"),
        (Limits(cpus=0.001), "cpus"),
        (Limits(cpus=float("nan")), "cpus"),
        (Limits(cpus=1, cpu_quota_us=5000), "cpus"),
        (Limits(memory=0), "memory"),
        (Limits(memory=-2), "memory"),
        (Limits(memory_min=1 << 20), "memory_min"),
        (Limits(memory=64, memory_swap=32), "memory_swap"),
        (Limits(memory_swappiness=101), "memory_swappiness"),
        (Limits(pids=0), "pids"),
        (Limits(blkio_weight=5), "blkio_weight"),
        (Limits(devices=(DeviceRule(kind="x"),)), r"devices\[0\].kind"),
        (Limits(devices=(DeviceRule(kind="c", access="rx"),)), r"devices\[0\].access"),
    ],
)
def test_a_refused_limit_names_its_field_and_leaves_nothing(
    hierarchy: V1Hierarchy, limits: Limits, field: str
) -> None:
    with pytest.raises((InvalidArgument, Unsupported), match=f"^{field}: "):
        hierarchy.create("g", limits)
    assert hierarchy.list_groups() == []


def test_a_limit_without_its_controller_says_which_is_missing(parent: str) -> None:
    mounts, _ = _mounts("/sys/fs/cgroup", "/proc")
    del mounts["memory"]
    with pytest.raises(Unsupported, match="memory: this host has no memory controller"):
        V1Hierarchy(mounts, parent).create("g", Limits(memory=MiB))


def test_a_second_group_of_the_same_name_is_refused_and_the_first_stays(
    hierarchy: V1Hierarchy, make: Callable[[Limits], V1Group]
) -> None:
    make(Limits(pids=5))
    with pytest.raises(AlreadyExists):
        hierarchy.create("g0", Limits())
    assert hierarchy.load("g0").stats().pids.limit == 5


def test_a_failure_at_any_directory_leaves_nothing(
    hierarchy: V1Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_directory = hierarchy.make_directory
    for step in range(6):
        done = 0

        def fail(controller: str, identifier: str, step: int = step) -> str:
            nonlocal done
            if done == step:
                raise OSError(28, "no space")
            done += 1
            return make_directory(controller, identifier)

        monkeypatch.setattr(hierarchy, "make_directory", fail)
        with pytest.raises(OSError, match="no space"):
            hierarchy.create("g", Limits(memory=64 * MiB))
        assert hierarchy.list_groups() == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x" * 200, "a\n", ".hidden"])
def test_a_name_that_is_no_directory_name_is_refused(hierarchy: V1Hierarchy, name: str) -> None:
    with pytest.raises(InvalidArgument):
        hierarchy.create(name, Limits())


def test_a_group_that_is_not_there_is_not_found(hierarchy: V1Hierarchy) -> None:
    with pytest.raises(NotFound):
        hierarchy.load("nothing")


def test_a_removed_group_is_gone_and_may_be_removed_again(hierarchy: V1Hierarchy) -> None:
    group = hierarchy.create("g", Limits())
    other = hierarchy.load("g")
    group.remove()
    group.remove()
    other.remove()
    hierarchy.remove("g")
    assert hierarchy.oom_kills("g") == 0
    assert hierarchy.list_groups() == []
    with pytest.raises(NotFound):
        hierarchy.load("g")


def test_removal_takes_the_groups_made_inside_along(hierarchy: V1Hierarchy) -> None:
    group = hierarchy.create("g", Limits())
    for path in group.directories.values():
        Path(path, "inner/most").mkdir(parents=True)
    hierarchy.remove("g")
    assert hierarchy.list_groups() == []
    group = hierarchy.create("g", Limits())
    for path in group.directories.values():
        Path(path, "inner/most").mkdir(parents=True)
    group.remove()
    assert hierarchy.list_groups() == []


def test_removal_with_a_process_inside_is_busy(make: Callable[[Limits], V1Group]) -> None:
    group = make(Limits())
    with member(group, "cat") as child:
        wait_until(lambda: group.pids() == {child.pid})
        with pytest.raises(Busy, match=str(child.pid)):
            group.remove(timeout_s=0)


def test_a_memory_hog_is_killed_and_counted(make: Callable[[Limits], V1Group]) -> None:
    group = make(Limits(memory=16 * MiB, memory_swap=16 * MiB))
    with member(group, "dd", "if=/dev/zero", "of=/dev/null", "bs=128M", "count=1") as child:
        assert child.wait(60) == -9
    assert group.oom_kills() == group._owner.oom_kills(group.id) == 1
    memory = group.stats().memory
    assert memory.oom_kills == 1
    assert memory.max_usage <= 16 * MiB


def test_a_fork_beyond_the_limit_fails(make: Callable[[Limits], V1Group]) -> None:
    group = make(Limits(pids=1))
    with member(group, "sh", "-c", "(true); true") as child:
        _, errors = child.communicate(timeout=60)
    assert "fork" in errors.lower()


def test_cpu_time_and_members_are_counted(make: Callable[[Limits], V1Group]) -> None:
    group = make(Limits(cpus=0.05))
    with member(group, "sh", "-c", "while :; do :; done") as child:
        wait_until(lambda: group.stats().cpu.throttled_ns > 0)
        stats = group.stats()
        assert group.pids() == {child.pid}
    assert stats.pids.current == 1
    assert stats.cpu.total_ns > 0
    assert stats.cpu.throttled_periods > 0
    assert sum(stats.cpu.per_cpu_ns) > 0
    assert stats.memory.usage >= stats.memory.working_set > 0


def test_a_frozen_group_stands_still_until_thawed(make: Callable[[Limits], V1Group]) -> None:
    group = make(Limits())
    with member(group, "sh", "-c", "while :; do :; done"):
        wait_until(lambda: group.stats().cpu.total_ns > 0)
        group.freeze()
        assert group.is_frozen()
        before = group.stats().cpu.total_ns
        assert group.stats().cpu.total_ns == before
        group.thaw()
        assert not group.is_frozen()
        wait_until(lambda: group.stats().cpu.total_ns > before)


def test_kill_all_kills_members_of_inner_groups_and_frozen_ones(
    make: Callable[[Limits], V1Group],
) -> None:
    group = make(Limits())
    with member(group, "sh", "-c", "sleep 1000 & sleep 1000 & wait") as child:
        wait_until(lambda: len(group.pids()) == 3)
        inner = Path(group.directories["freezer"], "inner")
        inner.mkdir()
        (inner / "cgroup.procs").write_text(str(child.pid))
        group.freeze()
        group.kill_all()
        assert child.wait(60) == -9
    assert group.pids() == set()


def test_a_controller_added_later_takes_the_members_over(
    make: Callable[[Limits], V1Group],
) -> None:
    group = make(Limits())
    assert "cpuset" not in group.controllers
    with member(group, "cat") as child:
        wait_until(lambda: group.pids() == {child.pid})
        group.update(Limits(cpuset_cpus="0"))
        assert value(group, "cpuset", "cgroup.procs") == str(child.pid)
        assert os.sched_getaffinity(child.pid) == {0}


def test_the_default_devices_are_open_and_others_closed(
    make: Callable[[Limits], V1Group], tmp_path: Path
) -> None:
    group = make(Limits(devices=DEFAULT_DEVICES))
    node = tmp_path / "mem"
    os.mknod(node, 0o600 | 0o020000, os.makedev(1, 1))
    with member(group, "sh", "-c", f"head -c1 /dev/zero >/dev/null && cat {node}") as child:
        _, errors = child.communicate(timeout=60)
    assert "Operation not permitted" in errors
    assert str(node) in errors


def test_device_rules_apply_in_order(make: Callable[[Limits], V1Group]) -> None:
    deny_null = DeviceRule(allow=False, kind="c", major=1, minor=3, access="w")
    group = make(Limits(devices=(*DEFAULT_DEVICES, deny_null)))
    listed = value(group, "devices", "devices.list").splitlines()
    assert "c 1:3 rm" in listed
    assert "c 1:5 rwm" in listed


def test_all_devices_are_allowed_again_by_an_update(make: Callable[[Limits], V1Group]) -> None:
    group = make(Limits(devices=()))
    group.update(Limits(devices=ALL_DEVICES))
    assert value(group, "devices", "devices.list") == "a *:* rwm"


def test_a_group_of_an_earlier_process_is_listed_and_loaded(
    hierarchy: V1Hierarchy, make: Callable[[Limits], V1Group]
) -> None:
    first: Group = make(Limits(pids=7))
    assert hierarchy.list_groups() == ["g0"]
    loaded = hierarchy.load("g0")
    assert loaded.stats().pids.limit == 7
    assert set(loaded.join_files()) == set(first.join_files())


def test_a_limit_below_what_is_in_use_is_busy_and_the_old_one_stays(
    make: Callable[[Limits], V1Group],
) -> None:
    group = make(Limits(memory=128 * MiB, memory_swap=128 * MiB))
    hold = "x = bytearray(64 << 20); print('held', flush=True); input()"
    with member(group, sys.executable, "-S", "-c", hold) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(Busy, match=r"memory: .*more is in use"):
            group.update(Limits(memory=4 * MiB))
        assert group.stats().memory.limit == 128 * MiB


def test_an_ordinary_user_without_delegation_runs_without_limits() -> None:
    script = (
        f"import os, sys; sys.path.insert(0, {SOURCE!r})\n"
        "from hutch.linux.cgroup import DEFAULT_DEVICES, Limits, detect, hybrid\n"
        "from hutch.errors import HutchError\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "found = detect()\n"
        "print(found.version, found.create('g', Limits(devices=DEFAULT_DEVICES)).join_files())\n"
        "try:\n    found.create('g', Limits(pids=5))\n"
        "except HutchError as exc:\n    print(exc, '|', exc.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "none ()"
    assert second.startswith("pids: no control group can be made here | run as root")
