"""Debian's own kernel with cgroup v2 alone: limits, freezer, kill, device program, overlay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guests.guest import MODULES, build_disk, build_initramfs, load_kernel, run_guest
from tests.requires import requires

pytestmark = [requires("root", "qemu", "busybox", "apt-mirror", "seccomp"), pytest.mark.slow]

TESTS = ("tests/guests/inside/life.py", "tests/linux/test_cgroup_v2.py::TestOnTheKernel")

START = f"""#!/bin/sh
export PATH=/bin:/sbin:/usr/bin HOME=/root PYTHONPATH=/hutch/src:/hutch:/hutch/site
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
cd /hutch
python -m pytest -q -p no:cacheprovider -p no:hypothesispytest --color=no --timeout 100 \\
    {" ".join(TESTS)}
echo "pytest: $?"
poweroff -f
"""


@pytest.mark.timeout(600)
def test_containers_live_on_debians_kernel_with_cgroup_v2_alone(tmp_path: Path) -> None:
    """Each of the guest's tests is a test of its own; this one says how they went."""
    kernel = load_kernel()
    build_initramfs(tmp_path / "initramfs", kernel.modules(MODULES))
    build_disk(tmp_path / "disk", START)
    said = run_guest(kernel, tmp_path / "initramfs", tmp_path / "disk", timeout_s=500)
    assert "\npytest: 0\n" in said, said
