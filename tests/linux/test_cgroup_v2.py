"""Version 2 groups: what is written, against a tree of files that looks like the kernel's;
and freezing, killing and devices against the host's own, where it mounts one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.errors import AlreadyExists, InvalidArgument, NotFound, OperationTimeout, Unsupported
from hutch.linux.cgroup import DEFAULT_DEVICES, Limits, detect, v2
from hutch.linux.cgroup.hybrid import HybridHierarchy, NoHierarchy
from hutch.linux.cgroup.v1 import V1Hierarchy
from hutch.linux.cgroup.v2 import V2Group, V2Hierarchy, find_v2
from tests.linux.cgroups import fresh_parent, member, remove_parents
from tests.requires import requires

MiB = 1 << 20

_FILES = {
    "cpu.max": "max 100000",
    "cpu.weight": "100",
    "cpuset.cpus": "",
    "cpuset.mems": "",
    "memory.max": "max",
    "memory.low": "0",
    "memory.min": "0",
    "memory.swap.max": "max",
    "pids.max": "max",
    "io.max": "",
    "io.weight": "default 100",
    "cgroup.procs": "",
    "cgroup.controllers": "cpuset cpu io memory pids",
    "cgroup.subtree_control": "",
}


def look_like_a_group(path: Path, **contents: str) -> None:
    for name, text in {**_FILES, **contents}.items():
        (path / name).write_text(text)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    look_like_a_group(tmp_path)
    return tmp_path


@pytest.fixture
def group(base: Path) -> V2Group:
    """A group whose directory has the kernel's files, as a real mkdir would make them."""
    path = base / "hutch/g"
    path.mkdir(parents=True)
    look_like_a_group(path)
    return V2Hierarchy(str(base), "hutch").load("g")


def written(group: V2Group, name: str) -> str:
    return Path(group.directories[""], name).read_text()


@pytest.mark.parametrize(
    ("limits", "name", "text"),
    [
        (Limits(cpus=1.5), "cpu.max", "150000 100000"),
        (Limits(cpu_quota_us=20000, cpu_period_us=50000), "cpu.max", "20000 50000"),
        (Limits(cpu_quota_us=20000), "cpu.max", "20000 100000"),
        (Limits(cpu_period_us=50000), "cpu.max", "max 50000"),
        (Limits(cpu_quota_us=-1), "cpu.max", "max 100000"),
        (Limits(cpu_shares=2), "cpu.weight", "1"),
        (Limits(cpu_shares=1024), "cpu.weight", "39"),
        (Limits(cpu_shares=262144), "cpu.weight", "10000"),
        (Limits(cpuset_cpus="0-1"), "cpuset.cpus", "0-1"),
        (Limits(cpuset_mems="0"), "cpuset.mems", "0"),
        (Limits(memory=64 * MiB), "memory.max", str(64 * MiB)),
        (Limits(memory=-1), "memory.max", "max"),
        (Limits(memory_reservation=MiB), "memory.low", str(MiB)),
        (Limits(memory_min=MiB), "memory.min", str(MiB)),
        (Limits(memory=64 * MiB, memory_swap=80 * MiB), "memory.swap.max", str(16 * MiB)),
        (Limits(memory=64 * MiB, memory_swap=64 * MiB), "memory.swap.max", "0"),
        (Limits(memory=64 * MiB, memory_swap=-1), "memory.swap.max", "max"),
        (Limits(pids=10), "pids.max", "10"),
        (Limits(pids=-1), "pids.max", "max"),
        (Limits(blkio_weight=10), "io.weight", "default 1"),
        (Limits(blkio_weight=1000), "io.weight", "default 10000"),
        (Limits(device_read_bps=((8, 0, 1000),)), "io.max", "8:0 rbps=1000"),
        (Limits(device_write_iops=((8, 0, 0),)), "io.max", "8:0 wiops=max"),
    ],
)
def test_each_limit_has_its_file_and_form(
    group: V2Group, limits: Limits, name: str, text: str
) -> None:
    group.update(limits)
    # A real control file takes each write as a whole; this one keeps what was longer.
    assert written(group, name).startswith(text)


@pytest.mark.parametrize(
    ("field", "file"), [("memory_reservation", "memory.low"), ("memory_min", "memory.min")]
)
def test_the_groups_above_have_what_those_beneath_were_promised(
    base: Path, field: str, file: str
) -> None:
    owner = V2Hierarchy(str(base), "above/hutch")
    (base / "above/hutch").mkdir(parents=True)
    for place in ("above", "above/hutch"):
        look_like_a_group(base / place)
    for name in ("a", "b"):
        (base / "above/hutch" / name).mkdir()
        look_like_a_group(base / "above/hutch" / name)
        owner.load(name).update(Limits(**{field: 16 * MiB}))  # type: ignore[arg-type]
    for place in ("above", "above/hutch"):
        assert (base / place / file).read_text() == str(32 * MiB)
    assert (base / file).read_text() == "0"
    # Of as many digits: these files keep what was longer.
    owner.load("a").update(Limits(**{field: 10 * MiB}))  # type: ignore[arg-type]
    assert (base / "above" / file).read_text() == str(26 * MiB)


def test_a_memory_update_keeps_the_total_of_memory_and_swap(group: V2Group) -> None:
    Path(group.directories[""], "memory.max").write_text(str(64 * MiB))
    Path(group.directories[""], "memory.swap.max").write_text(str(64 * MiB))
    group.update(Limits(memory=96 * MiB))
    assert written(group, "memory.swap.max") == str(32 * MiB)
    with pytest.raises(InvalidArgument, match="memory: "):
        group.update(Limits(memory=256 * MiB))


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(memory_swappiness=10), "memory_swappiness"),
        (Limits(oom_kill_disable=True), "oom_kill_disable"),
    ],
)
def test_what_only_version_1_can_do_is_unsupported(
    group: V2Group, limits: Limits, field: str
) -> None:
    with pytest.raises(Unsupported, match=f"^{field}: "):
        group.update(limits)


def test_a_missing_controller_is_named_with_a_cure(base: Path) -> None:
    (base / "cgroup.controllers").write_text("cpu pids")
    with pytest.raises(Unsupported, match="memory: this host has no memory") as caught:
        V2Hierarchy(str(base), "hutch").create("g", Limits(memory=MiB))
    assert "Delegate" in (caught.value.hint or "")
    assert not (base / "hutch").exists()


def test_counters_are_read_in_nanoseconds_and_bytes(group: V2Group) -> None:
    path = Path(group.directories[""])
    (path / "cpu.stat").write_text(
        "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 5\nnr_throttled 2\n"
        "throttled_usec 7\n"
    )
    (path / "memory.current").write_text("1000")
    (path / "memory.stat").write_text("anon 600\nfile 300\ninactive_file 250\n")
    (path / "memory.events").write_text("low 0\nmax 4\noom 1\noom_kill 1\n")
    (path / "memory.swap.current").write_text("50")
    (path / "pids.current").write_text("3")
    (path / "io.stat").write_text("8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n")
    stats = group.stats()
    assert (stats.cpu.total_ns, stats.cpu.user_ns, stats.cpu.throttled_ns) == (30000, 20000, 7000)
    assert (stats.memory.usage, stats.memory.working_set, stats.memory.rss) == (1000, 750, 600)
    assert (stats.memory.limit, stats.memory.failures, stats.memory.oom_kills) == (None, 4, 1)
    assert stats.pids.current == 3
    assert [(b.major, b.read_bytes, b.write_ops) for b in stats.block] == [(8, 10, 2)]
    assert group.oom_kills() == 1


def fake_proc(tmp_path: Path, mountinfo: str, cgroup: str) -> Path:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self/mountinfo").write_text(mountinfo)
    (proc / "self/cgroup").write_text(cgroup)
    return proc


def test_detection_of_a_pure_version_2_host(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    root.mkdir()
    look_like_a_group(root)
    line = f"30 24 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
    found = detect(root, proc=fake_proc(tmp_path, line, "0::/user.slice/x.scope\n"))
    assert found.version == "v2"
    assert {"cpu", "memory", "pids", "io", "cpuset", "freezer"} <= found.controllers


def test_detection_of_version_1_with_shared_mounts(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    (root / "cpu,cpuacct").mkdir(parents=True)
    (root / "blkio").mkdir()
    lines = (
        f"31 30 0:27 / {root}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        f"32 30 0:28 / {root}/blkio rw - cgroup cgroup rw,blkio\n"
        "33 30 0:29 / /elsewhere/memory rw - cgroup cgroup rw,memory\n"
    )
    found = detect(root, proc=fake_proc(tmp_path, lines, ""))
    assert found.version == "v1"
    assert found.controllers == {"cpu", "cpuacct", "io"}
    group = found.create("g", Limits())
    assert len(group.join_files()) == 2


def test_without_any_mount_instances_run_without_limits(tmp_path: Path) -> None:
    found = detect(tmp_path, proc=fake_proc(tmp_path, "", ""))
    assert isinstance(found, NoHierarchy)
    group = found.create("g", Limits(devices=DEFAULT_DEVICES))
    assert group.join_files() == ()
    with pytest.raises(Unsupported, match="memory: no control group can be made here"):
        found.create("h", Limits(memory=MiB))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
def test_a_user_gets_the_highest_group_that_was_delegated_to_them(tmp_path: Path) -> None:
    delegated = tmp_path / "user.slice/user@7.service"
    scope = delegated / "app.slice/run.scope"
    scope.mkdir(parents=True)
    for path in (tmp_path, delegated.parent, delegated, delegated / "app.slice", scope):
        look_like_a_group(path)
    for path in (delegated, delegated / "cgroup.procs", scope, scope / "cgroup.procs"):
        os.chown(path, 12345, 12345)
    proc = fake_proc(tmp_path, "", "0::/user.slice/user@7.service/app.slice/run.scope\n")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path.stat().st_mode & 0o077 == 0:
            path.chmod(path.stat().st_mode | 0o055)
    # access(2) asks for the real user.
    os.setresuid(12345, 0, 0)
    try:
        found = find_v2(str(tmp_path), str(proc), "hutch")
    finally:
        os.setresuid(0, 0, 0)
    assert found is not None
    assert found._root == f"{delegated}/hutch"


UNIFIED = Path("/sys/fs/cgroup/unified")
if not UNIFIED.exists():
    UNIFIED = Path("/sys/fs/cgroup")
real = [
    requires("root", "cgroup"),
    pytest.mark.skipif(
        not (UNIFIED / "cgroup.controllers").exists(), reason="no version 2 is mounted"
    ),
]

beside_version_1 = pytest.mark.skipif(
    not Path("/sys/fs/cgroup/freezer").exists(), reason="needs a version 1 freezer"
)


@pytest.fixture
def parent() -> Iterator[str]:
    name = fresh_parent()
    yield name
    remove_parents(name)


@pytest.fixture
def live(parent: str) -> Iterator[V2Group]:
    group = V2Hierarchy(str(UNIFIED), parent).create("g", Limits())
    yield group
    group.kill_all()
    group.remove()


class TestOnTheKernel:
    pytestmark = real

    def test_a_second_group_of_the_same_name_is_refused(self, parent: str, live: V2Group) -> None:
        with pytest.raises(AlreadyExists):
            V2Hierarchy(str(UNIFIED), parent).create("g", Limits())

    def test_freezing_waits_until_all_stand_still(self, live: V2Group) -> None:
        with member(live, "cat") as child:
            live.freeze()
            assert live.is_frozen()
            assert live.pids() == {child.pid}
            live.thaw()
            assert not live.is_frozen()

    def test_killing_reaches_frozen_members_and_inner_groups(self, live: V2Group) -> None:
        inner = Path(live.directories[""], "inner")
        inner.mkdir()
        with member(live, "cat") as child, member(live, "cat") as other:
            (inner / "cgroup.procs").write_text(str(other.pid))
            live.freeze()
            live.kill_all()
            assert (child.wait(60), other.wait(60)) == (-9, -9)
        live.remove()
        assert not inner.exists()

    def test_killing_one_by_one_on_old_kernels(
        self, live: V2Group, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with member(live, "cat") as child:
            live._kill_one_by_one()
            assert child.wait(60) == -9

    def test_a_wait_that_takes_too_long_is_a_timeout(self, live: V2Group) -> None:
        with member(live, "cat"), pytest.raises(OperationTimeout):
            live._wait_event("populated", 0, 0.01)

    def test_a_group_that_is_gone_is_not_found(self, parent: str) -> None:
        group = V2Hierarchy(str(UNIFIED), parent).create("gone", Limits())
        group.remove()
        group.remove()
        group.kill_all()
        for call in (group.stats, group.freeze, group.thaw):
            with pytest.raises(NotFound):
                call()

    def test_the_directory_can_be_opened_for_clone(self, live: V2Group) -> None:
        fd = live.open_dir()
        assert fd is not None
        assert os.readlink(f"/proc/self/fd/{fd}") == live.directories[""]
        assert not os.get_inheritable(fd)
        os.close(fd)

    def test_devices_are_controlled_by_a_program(self, parent: str, tmp_path: Path) -> None:
        limits = Limits(devices=DEFAULT_DEVICES)
        group = V2Hierarchy(str(UNIFIED), parent).create("dev", limits)
        node = tmp_path / "mem"
        os.mknod(node, 0o600 | 0o020000, os.makedev(1, 1))
        script = f"head -c1 /dev/zero >/dev/null && echo zero; cat {node}"
        try:
            with member(group, "sh", "-c", script) as child:
                output, errors = child.communicate(timeout=60)
            assert output == "zero\n"
            assert "Operation not permitted" in errors
            group.update(Limits(devices=()))
            with member(group, "sh", "-c", "head -c1 /dev/zero") as child:
                _, errors = child.communicate(timeout=60)
            assert "Operation not permitted" in errors
        finally:
            group.kill_all()
            group.remove()

    @beside_version_1
    def test_hybrid_uses_version_2_only_where_version_1_lacks_something(self, parent: str) -> None:
        unified = V2Hierarchy(str(UNIFIED), parent)
        freezer = {"freezer": "/sys/fs/cgroup/freezer"}
        hybrid = HybridHierarchy(V1Hierarchy(freezer, parent), unified)
        plain = hybrid.create("plain", Limits())
        mixed = hybrid.create("mixed", Limits(devices=DEFAULT_DEVICES))
        try:
            assert plain.open_dir() is None
            assert "" in mixed.directories
            assert hybrid.list_groups() == ["mixed", "plain"]
            loaded = hybrid.load("mixed")
            assert loaded.directories == mixed.directories
        finally:
            plain.remove()
            mixed.remove()
        assert hybrid.list_groups() == []

    @beside_version_1
    def test_hybrid_with_tracking_always_has_both(self, parent: str) -> None:
        freezer = {"freezer": "/sys/fs/cgroup/freezer"}
        unified = V2Hierarchy(str(UNIFIED), parent)
        hybrid = HybridHierarchy(V1Hierarchy(freezer, parent), unified, track=True)
        group = hybrid.create("g", Limits())
        fd = group.open_dir()
        assert fd is not None
        os.close(fd)
        with member(group, "cat") as child:
            group.add(child.pid)
            group.freeze()
            group.kill_all()
            assert child.wait(60) == -9
        group.remove()
        assert hybrid.list_groups() == []

    @requires("cgroup-v2-hugetlb")
    def test_processes_make_room_when_a_delegated_group_gets_controllers(
        self, parent: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(v2, "_SWITCHED", ("hugetlb",))
        control = UNIFIED / "cgroup.subtree_control"
        before = control.read_text().split()
        base = UNIFIED / parent
        outer = V2Hierarchy(str(UNIFIED), parent)
        group = outer.create("delegated", Limits())
        try:
            with member(group, "cat") as child:
                inner = V2Hierarchy(str(base / "delegated"), "hutch")
                made = inner.create("g", Limits())
                assert (base / "delegated/hutch.host/cgroup.procs").read_text() == f"{child.pid}\n"
                assert "hugetlb" in made.controllers
                assert made.pids() == set()
        finally:
            group.kill_all()
            group.remove()
            base.rmdir()
            if "hugetlb" not in before:
                control.write_text("-hugetlb")
