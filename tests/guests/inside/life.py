"""What a host with cgroup v2 alone and Debian's own kernel decides, asked of the real thing.

`tests/guests/test_guest.py` runs this module in its guest; nothing collects it elsewhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import HutchError
from hutch.host.facts import gather_facts

CGROUP = Path("/sys/fs/cgroup/hutch")
DISK = os.stat("/dev/vda").st_rdev
DISK_NUMBERS = f"{os.major(DISK)}:{os.minor(DISK)}"
MiB = 1 << 20


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(Path("/var/hutch")) as engine:
        engine.images.bootstrap("busybox")
        yield engine
        assert engine.list(all=True) == []
    assert list(CGROUP.iterdir()) == [] or all(p.is_file() for p in CGROUP.iterdir())


def group_of(box: Instance) -> Path:
    return CGROUP / box.id


def value(box: Instance, name: str) -> str:
    return (group_of(box) / name).read_text().strip()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 80
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


def test_the_host_is_what_it_is_meant_to_be() -> None:
    facts = gather_facts()
    release = tuple(int(part) for part in facts.kernel.split(".")[:2])
    assert facts.cgroup_mode == "v2"
    assert facts.overlay
    assert facts.overlay_lowerdir_append == (release >= (6, 8))


def test_every_limit_reaches_its_file_and_is_changed_live(engine: Engine) -> None:
    with engine.start(
        "busybox", ["sleep", "1000"], network="none",
        cpus=1.5, cpu_shares=512, cpuset_cpus="0", memory="64M", memory_swap="96M",
        memory_reservation="32M", pids_limit=50, blkio_weight=500,
        device_read_bps=["/dev/vda:1mb"], device_write_iops=["/dev/vda:100"],
    ) as box:  # fmt: skip
        assert value(box, "cpu.max") == "150000 100000"
        assert value(box, "cpu.weight") == "20"
        assert value(box, "cpuset.cpus") == "0"
        assert value(box, "memory.max") == str(64 * MiB)
        assert value(box, "memory.swap.max") == str(32 * MiB)
        assert value(box, "memory.low") == str(32 * MiB)
        assert value(box, "pids.max") == "50"
        assert f"{DISK_NUMBERS} rbps=1048576 wbps=max riops=max wiops=100" in value(box, "io.max")
        assert value(box, "io.weight").startswith("default ")
        box.update(cpus=0.5, memory="48M", memory_swap="48M", pids_limit=20, cpuset_cpus="0-1")
        assert value(box, "cpu.max") == "50000 100000"
        assert value(box, "cpuset.cpus") == "0-1"
        assert value(box, "memory.max") == str(48 * MiB)
        assert value(box, "memory.swap.max") == "0"
        assert value(box, "pids.max") == "20"


def test_an_exec_is_in_the_group_too(engine: Engine) -> None:
    with engine.start("busybox", ["sleep", "1000"], network="none") as box:
        done = box.exec(["sh", "-c", "cat /proc/self/cgroup"])
        assert done.text == "0::/\n"
        before = box.stats().pids.current
        assert before == 1


def test_a_fork_bomb_is_held(engine: Engine) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; wait"
    with engine.start("busybox", ["sh", "-c", script], network="none", pids_limit=6) as box:
        wait_until(lambda: "max 0" not in value(box, "pids.events"), "a refused fork")
        assert box.stats().pids.current <= 6


def test_running_out_of_memory_is_told(engine: Engine) -> None:
    eat = ["sh", "-c", "x=a; while :; do x=$x$x; done"]
    options = {"network": "none", "memory": "24M", "memory_swap": "24M"}
    box = engine.create("busybox", eat, **options)  # type: ignore[arg-type]
    try:
        box.start()
        assert box.wait(60) == 137
        info = box.info()
        assert (info.exit_code, info.oom_killed) == (137, True)
    finally:
        box.remove(force=True)


def test_the_freezer_stops_and_kill_reaches_what_is_frozen(engine: Engine) -> None:
    count = "i=0; while :; do i=$((i+1)); echo $i > /n; done"
    with engine.start("busybox", ["sh", "-c", count], network="none") as box:
        wait_until(lambda: box.files.exists("/n"), "the first number")
        box.pause()
        assert "frozen 1" in value(box, "cgroup.events")
        first = box.files.read("/n")
        assert box.files.read("/n") == first
        box.unpause()
        assert "frozen 0" in value(box, "cgroup.events")
        wait_until(lambda: box.files.read("/n") not in (first, b""), "the count to go on")
        box.pause()
        box.remove(force=True)
    assert not group_of(box).exists()


def test_the_device_program_lets_through_what_was_given(engine: Engine) -> None:
    script = f"mknod /d b {DISK_NUMBERS.replace(':', ' ')} && head -c 512 /d | wc -c"
    denied = engine.run("busybox", ["sh", "-c", script], network="none")
    assert b"512" not in denied.stdout and b"not permitted" in denied.stderr
    given = engine.run(
        "busybox", ["sh", "-c", "head -c 512 /dev/vda | wc -c; echo > /dev/vda"],
        network="none", devices=["/dev/vda:/dev/vda:r"],
    )  # fmt: skip
    assert given.stdout.strip() == b"512" and b"not permitted" in given.stderr
    ruled = engine.run(
        "busybox", ["sh", "-c", script], network="none",
        device_cgroup_rules=[f"b {DISK_NUMBERS} rm"],
    )  # fmt: skip
    assert ruled.stdout.strip() == b"512"


def test_what_is_used_is_counted(engine: Engine) -> None:
    script = "dd if=/dev/zero of=/f bs=1M count=4 conv=fsync 2>/dev/null; i=0;" \
        " while [ $i -lt 5000 ]; do i=$((i+1)); done; touch /done; sleep 1000"  # fmt: skip
    with engine.start("busybox", ["sh", "-c", script], network="none", cpus=0.2) as box:
        wait_until(lambda: box.files.exists("/done"), "the work to be done")
        stats = box.stats()
        assert stats.cpu.total_ns > 0 and stats.cpu.throttled_periods > 0
        assert stats.memory.usage > 0 and stats.memory.max_usage >= 0
        assert sum(device.write_bytes for device in stats.block) >= 4 * MiB
        assert stats.pids.current >= 1


def test_swap_has_its_own_limit(engine: Engine) -> None:
    swap = Path("/var/swap")
    swap.write_bytes(bytes(48 * MiB))
    swap.chmod(0o600)
    assert os.system("mkswap /var/swap >/dev/null && swapon /var/swap") == 0
    try:
        script = "dd if=/dev/zero of=/t/f bs=1M count=32 2>/dev/null; echo $? > /code; sleep 1000"
        with engine.start(
            "busybox", ["sh", "-c", script], network="none",
            memory="24M", memory_swap="64M", tmpfs=["/t"],
        ) as box:  # fmt: skip
            wait_until(lambda: box.files.exists("/code"), "the file to be written")
            assert box.files.read("/code") == b"0\n"
            assert box.stats().memory.swap > 4 * MiB
            assert box.stats().memory.oom_kills == 0
    finally:
        os.system("swapoff /var/swap")
        swap.unlink()


# ---- an overlay of mount(2) -----------------------------------------------------------


def test_many_layers_are_run_copied_and_committed(engine: Engine) -> None:
    image = "busybox"
    for number in range(4):
        script = f"echo {number} > /n{number}; rm -f /n{number - 1}"
        box = engine.create(image, ["sh", "-c", script], network="none")
        box.start()
        assert box.wait(60) == 0
        image = f"layered:{number}"
        box.commit(image)
        box.remove()
    box = engine.create(image, ["sh", "-c", "ls /n*; cat /put"], network="none")
    try:
        box.files.write("/put", b"put\n")
        assert box.files.read("/n3") == b"3\n"
        assert not box.files.exists("/n2")
        box.start()
        box.wait(60)
        assert b"".join(record.data for record in box.logs()) == b"/n3\nput\n"
    finally:
        box.remove(force=True)


def test_remapped_ids_are_others_outside(engine: Engine) -> None:
    with engine.start("busybox", ["sleep", "1000"], network="none", userns="remap") as box:
        assert box.exec(["sh", "-c", "id -u; stat -c %u /bin/busybox; touch /f"]).text == "0\n0\n"
        assert box.exec(["stat", "-c", "%u", "/f"]).text == "0\n"
        assert os.stat(f"/proc/{box.info().pid}").st_uid != 0


def test_a_read_only_root_with_a_volume(engine: Engine) -> None:
    done = engine.run(
        "busybox", ["sh", "-c", "touch /x; echo v > /v/f && cat /v/f"], network="none",
        read_only=True, volumes=["guest-volume:/v"],
    )  # fmt: skip
    engine.volumes.remove("guest-volume")
    assert done.stdout == b"v\n" and b"Read-only" in done.stderr


def test_what_the_kernel_refuses_is_told_by_field_and_leaves_nothing(engine: Engine) -> None:
    with pytest.raises(HutchError, match="cpuset_cpus"):
        engine.run("busybox", ["true"], network="none", cpuset_cpus="7")
    assert engine.list(all=True) == []
