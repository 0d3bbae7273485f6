"""What a launch does another way than its plan says, since that costs less."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.plan import ops
from tests.native.boxes import Runner
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """A cgroup of version 2, where the host has a hierarchy of it."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, at, kind, *_ = line.split()
        if kind == "cgroup2":
            made = Path(at, f"hutch-test-{os.getpid()}-{tmp_path.name[-8:]}")
            made.mkdir()
            yield made
            made.rmdir()
            return
    pytest.fail("no cgroup2 is mounted")


def own_group(files: tuple[str, ...]) -> ops.Plan:
    script = "grep ^0: /proc/self/cgroup"
    return ops.Plan(
        child=(
            ops.CgroupJoin(files=files),
            ops.Exec(argv=("/bin/sh", "-c", script), env=("PATH=/usr/bin:/bin",)),
        ),
        supervision=ops.Supervision(linger=False),
    )


def test_a_process_is_in_its_cgroup_of_version_2(runner: Runner, group: Path) -> None:
    status, out, err = runner.run(own_group((f"{group}/cgroup.procs",)))
    assert (status.code, err) == (0, b"")
    assert out.decode().strip().endswith(f"/{group.name}")


def test_a_process_in_several_cgroups_joins_each(runner: Runner, group: Path) -> None:
    inner = group / "inner"
    inner.mkdir()
    try:
        files = (f"{group}/cgroup.procs", f"{inner}/cgroup.procs")
        _, out, _ = runner.run(own_group(files))
        assert out.decode().strip().endswith(f"/{group.name}/inner")
    finally:
        inner.rmdir()


# Loads the number of the system call; access(2) and its kin end the process, all else may be.
_NO_LOOKING = b"".join(
    struct.pack("<HBBI", *line)
    for line in (
        (0x20, 0, 0, 0),
        (0x15, 3, 0, 21),  # access
        (0x15, 2, 0, 269),  # faccessat
        (0x15, 1, 0, 439),  # faccessat2
        (0x06, 0, 0, 0x7FFF0000),  # allow
        (0x06, 0, 0, 0x80000000),  # kill the process
    )
)


def test_the_program_is_looked_for_before_a_filter_forbids_it(
    runner: Runner, tmp_path: Path
) -> None:
    path = ":".join([*(f"{tmp_path}/{n}" for n in range(3)), "", "/usr/bin", "/bin"])
    plan = ops.Plan(
        child=(
            ops.NoNewPrivs(),
            ops.Seccomp(program=_NO_LOOKING),
            ops.Exec(argv=("busybox", "echo", "found"), env=(f"PATH={path}",)),
        ),
        supervision=ops.Supervision(linger=False),
    )
    status, out, _ = runner.run(plan)
    assert (status.code, status.signal, out) == (0, 0, b"found\n")


def test_a_program_that_appears_later_in_path_is_found_past_a_refusal(
    runner: Runner, tmp_path: Path
) -> None:
    refused, good = tmp_path / "refused", tmp_path / "good"
    for place in (refused, good):
        place.mkdir()
    (refused / "tool").write_text("#!/bin/sh\necho no\n")
    (good / "tool").write_text("#!/bin/sh\necho yes\n")
    (good / "tool").chmod(0o755)
    plan = ops.Plan(
        child=(ops.Exec(argv=("tool",), env=(f"PATH=/nowhere:{refused}:{good}",)),),
        supervision=ops.Supervision(linger=False),
    )
    _, out, _ = runner.run(plan)
    assert out == b"yes\n"
