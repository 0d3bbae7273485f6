"""The rung `swap` with real swap, in a file and compressed in memory (zram): what it gives back is
measured, nothing is lost, and it is undone."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.linux.cgroup.reclaim import read_memory
from hutch.linux.memory import swap_in
from tests.requires import requires
from tests.resources.test_pressure import MIB, did, hold, ladder, small, start, until, usage

__all__ = ["small"]

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox", "swap"),
    pytest.mark.integration,
    pytest.mark.serial,
]

_ENV = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, env=_ENV, capture_output=True)


@pytest.fixture(params=["file", pytest.param("zram", marks=requires("zram"))])
def swap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Swap of 256 MiB for the length of a test."""
    if request.param == "file":
        path = str(tmp_path / "swap")
        with open(path, "wb", opener=lambda p, f: os.open(p, f, 0o600)) as file:
            for _ in range(256):
                file.write(bytes(MIB))
    else:
        device = Path("/sys/block/zram0")
        path = "/dev/zram0"
        (device / "disksize").write_text(str(256 * MIB))
    try:
        run("mkswap", path)
        # As low as it goes: what else there is comes first for others.
        run("swapon", path)
        yield path
        run("swapoff", path)
    finally:
        if request.param == "zram":
            Path("/sys/block/zram0/reset").write_text("1")


def test_what_is_not_in_use_is_swapped_measured_and_undone(small: Engine, swap: str) -> None:
    ladder(small, "swap", idle_s="0")
    # Half of it in a file of memory, half in a program's own.
    script = f"{hold(40)}; cat /dev/shm/x | md5sum > /tmp/sum"
    idle = start(small, "idle", script)
    kept = start(small, "kept", hold(60), memory_reservation="80M")
    before = usage(small, "idle")
    small.get("idle").pause()
    small.resources.memory()
    done = small.resources.reclaim()
    assert did(done) == [("swap", "idle")]
    assert done.steps[0].given > 20 * MIB and "not in use" in done.steps[0].reason
    assert usage(small, "idle") < before - 20 * MIB
    found = {use.name: use for use in small.resources.memory().instances}
    assert found["idle"].swap > 20 * MIB and found["idle"].measures == ("swap",)
    # The promised one keeps its memory.
    assert found["kept"].swap < MIB and found["kept"].usage > 60 * MIB
    kept.remove(force=True)
    assert did(small.resources.reclaim()) == [("undo swap", "idle")]
    assert small.resources.memory().measures == ()
    idle.unpause()
    same = "cat /dev/shm/x | md5sum | cmp - /tmp/sum"
    assert idle.exec(["sh", "-c", same]).exit_code == 0


def test_what_a_process_has_is_read_back(small: Engine, swap: str) -> None:
    from hutch.linux.cgroup.reclaim import reclaim

    box = start(small, "one")
    group = small._context.groups.hierarchy.load(box.id)
    code = (
        "import mmap, sys; m = mmap.mmap(-1, 48 << 20)\n"
        "for at in range(0, len(m), 4096): m[at] = 1 + at % 251\n"
        "print('full', flush=True); sys.stdin.readline()\n"
        "print(sum(m[at] != 1 + at % 251 for at in range(0, len(m), 4096)), flush=True)"
    )
    with subprocess.Popen(
        ["python3", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_ENV
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            _join(group.directories, child.pid)
            # What it had before belongs to the group it was in: it begins after.
            until(lambda: child.pid in group.pids(), "it has not joined")
            assert child.stdout.readline() == "full\n"
            reclaim(group.directories, 64 * MIB, swap=True)
            out = read_memory(group.directories).swap
            assert swap_in(child.pid)
            if out:
                until(lambda: _swapped(child.pid) < out // 4, "it was not read back")
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "0\n"
        finally:
            child.kill()
    assert mmap.PAGESIZE


def _join(directories: dict[str, str], pid: int) -> None:
    for directory in directories.values():
        Path(directory, "cgroup.procs").write_text(str(pid))


def _swapped(pid: int) -> int:
    """Return the bytes of a process that are out, and not in the swap cache."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmSwap:"):
            return int(line.split()[1]) * 1024
    return 0
