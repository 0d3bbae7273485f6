"""Taking memory back from control groups of both versions, and what their files tell."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hutch.errors import Busy, Unsupported
from hutch.linux.cgroup import bound_cpusets, reclaim
from hutch.linux.psi import wait_pressure

MIB = 1 << 20


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    """A group of version 2 as its files show it."""
    (tmp_path / "memory.stat").write_text(
        "anon 20971520\ninactive_file 5242880\nactive_file 1048576\nworkingset_refault_file 7\n"
    )
    (tmp_path / "memory.current").write_text(f"{27 * MIB}\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.swap.current").write_text("8192\n")
    for name in ("memory.reclaim", "memory.high"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    """A group of version 1."""
    (tmp_path / "memory.stat").write_text(
        "inactive_file 1\ntotal_inactive_file 5242880\ntotal_active_file 1048576\ntotal_swap 4096\n"
    )
    (tmp_path / "memory.usage_in_bytes").write_text(f"{27 * MIB}\n")
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory.swappiness").write_text("60\n")
    (tmp_path / "memory.force_empty").touch()
    return tmp_path


def test_both_versions_tell_the_same(tmp_path: Path, v2: Path) -> None:
    found = reclaim.read_memory({"": str(v2)})
    assert (found.usage, found.cache, found.idle_cache) == (27 * MIB, 6 * MIB, 5 * MIB)
    assert found.limit is None and found.refaults == 7 and found.swap == 8192


def test_version_1_tells_of_the_groups_beneath_too(v1: Path) -> None:
    found = reclaim.read_memory({"memory": str(v1)})
    assert (found.usage, found.cache, found.swap) == (27 * MIB, 6 * MIB, 4096)
    assert found.limit is None


def test_a_group_that_is_gone_has_nothing(tmp_path: Path) -> None:
    assert reclaim.read_memory({"memory": f"{tmp_path}/gone"}).usage == 0
    assert reclaim.reclaim({"memory": f"{tmp_path}/gone"}, MIB) == 0


def test_an_amount_is_asked_for_without_swapping_unless_told(v2: Path) -> None:
    assert reclaim.is_precise({"": str(v2)})
    reclaim.reclaim({"": str(v2)}, MIB)
    assert (v2 / "memory.reclaim").read_text() == f"{MIB} swappiness=0"
    reclaim.reclaim({"": str(v2)}, 2 * MIB, swap=True)
    assert (v2 / "memory.reclaim").read_text() == f"{2 * MIB} swappiness=60"


def test_kernels_that_know_less_are_asked_for_less(
    v2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def write(path: str, value: str) -> None:
        asked.append(value)
        raise OSError(errno.EINVAL if "swappiness" in value else errno.EAGAIN, "no")

    monkeypatch.setattr("hutch.linux.cgroup.files.write_text", write)
    assert reclaim.reclaim({"": str(v2)}, MIB) == 0
    assert asked == [f"{MIB} swappiness=0", str(MIB)]


def test_a_kernel_that_cannot_is_named(v2: Path) -> None:
    (v2 / "memory.reclaim").unlink()
    assert not reclaim.is_precise({"": str(v2)})
    with pytest.raises(Unsupported):
        reclaim.reclaim({"": str(v2)}, MIB)


def test_version_1_is_emptied_and_has_its_swappiness_again(
    v1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hutch.linux.cgroup import files

    written: list[tuple[str, str]] = []
    plain = files.write_text

    def write(path: str, value: str) -> None:
        written.append((os.path.basename(path), value))
        if path.endswith("force_empty"):
            raise OSError(errno.EBUSY, "in use")
        plain(path, value)

    monkeypatch.setattr("hutch.linux.cgroup.files.write_text", write)
    reclaim.reclaim({"memory": str(v1)}, MIB)
    assert written == [
        ("memory.swappiness", "0"),
        ("memory.force_empty", "0"),
        ("memory.swappiness", "60"),
    ]


def test_a_bound_is_soft_on_version_2_and_taken_away_again(v2: Path) -> None:
    reclaim.set_limit({"": str(v2)}, MIB)
    assert (v2 / "memory.high").read_text() == str(MIB)
    reclaim.set_limit({"": str(v2)}, None)
    assert (v2 / "memory.high").read_text().startswith("max")
    reclaim.set_hard_limit({"": str(v2)}, 28 * MIB)
    assert (v2 / "memory.max").read_text().startswith(str(28 * MIB))


def test_a_hard_bound_kills_nobody_for_what_is_in_use(v2: Path) -> None:
    """The kernel takes any bound, and kills until it is met."""
    with pytest.raises(Busy, match="more than 2097152 bytes are in use"):
        reclaim.set_hard_limit({"": str(v2)}, 2 * MIB)
    assert (v2 / "memory.max").read_text() == "max\n"
    assert (v2 / "memory.reclaim").read_text().startswith(str(26 * MIB))
    (v2 / "memory.reclaim").unlink()
    with pytest.raises(Busy):
        reclaim.set_hard_limit({"": str(v2)}, 2 * MIB)


def test_a_bound_below_what_is_in_use_is_refused(v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: str, value: str) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr("hutch.linux.cgroup.files.write_text", write)
    with pytest.raises(Busy):
        reclaim.set_limit({"memory": str(v1)}, MIB)


def test_stalls_are_read(tmp_path: Path) -> None:
    path = tmp_path / "memory.pressure"
    path.write_text("some avg10=12.50 avg60=1.00 total=9\nfull avg10=3.00 avg60=0 total=1\n")
    assert reclaim.read_pressure(str(path)) == reclaim.Pressure(some=12.5, full=3.0)
    path.write_text("")
    assert reclaim.read_pressure(str(path)) is None
    assert reclaim.read_pressure(f"{path}.gone") is None


def test_waiting_for_a_stall_ends_with_the_time(tmp_path: Path) -> None:
    # Either is true of this host just now; what is tested is that it ends.
    assert wait_pressure(0.01) in (True, False)
    assert not wait_pressure(0.01, str(tmp_path / "none"))


def test_the_cpuset_that_instances_are_within(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cg"
    (proc / "self").mkdir(parents=True)
    mounts = "29 1 0:1 / {} rw - {} none {}\n"
    (root / "cpuset").mkdir(parents=True)
    (root / "unified").mkdir()
    (proc / "self/mountinfo").write_text(
        mounts.format(root / "cpuset", "cgroup", "rw,cpuset")
        + mounts.format(root / "unified", "cgroup2", "rw")
    )
    assert bound_cpusets(root, proc=proc) == (None, None)
    for name, text in (("cpus", "0-3"), ("mems", "0")):
        (root / f"unified/cpuset.{name}.effective").write_text(f"{text}\n")
    assert bound_cpusets(root, proc=proc) == ("0-3", "0")
    for name, text in (("cpus", "2-3"), ("mems", "1")):
        (root / f"cpuset/cpuset.effective_{name}").write_text(f"{text}\n")
    assert bound_cpusets(root, proc=proc) == ("2-3", "1")
