"""A running machine is given processors and memory, and gives them back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import InvalidArgument, WrongState
from tests.requires import requires
from tests.vm.machines import NEEDS, machine_root, processes, until

pytestmark = [*NEEDS, pytest.mark.timeout(600)]

MIB = 1 << 20
OPTIONS = {
    "isolation": "vm",
    "network": "none",
    "memory": "256M",
    "cpus_max": 4,
    "memory_max": "2G",
    "shm_size": "1G",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with machine_root(tmp_path_factory.mktemp("resize") / "root") as engine:
        yield engine


@pytest.fixture
def box(engine: Engine) -> Iterator[Instance]:
    box = engine.start("busybox", ["sleep", "10000"], **OPTIONS)  # type: ignore[arg-type]
    yield box
    box.remove(force=True)


def shape(box: Instance) -> tuple[int, int]:
    """Return the processors and the MiB of memory that the guest says it has."""
    text = box.exec(["sh", "-c", "nproc; grep MemTotal /proc/meminfo"]).text
    processors, memory = re.findall(r"(\d+)", text)
    return int(processors), int(memory) // 1024


def _takes_processors(box: Instance) -> bool:
    """Tell whether the guest's kernel has room for processors that come later."""
    possible = box.exec(["cat", "/sys/devices/system/cpu/possible"], check=True).text.strip()
    release = box.exec(["uname", "-r"], check=True).text
    # The older ones must: what they have is no reason to let this pass.
    return possible != "0" or int(release.split(".")[0]) < 7


@pytest.mark.versions
def test_it_gets_more_and_gives_it_back(box: Instance) -> None:
    processors, memory = shape(box)
    assert (processors, memory < 256) == (1, True)
    kernel = 256 - memory
    if not _takes_processors(box):
        with pytest.raises(WrongState) as refused:
            box.update(cpus=3)
        assert "take no processors that come later" in (refused.value.hint or "")
        assert shape(box) == (1, memory)
        return

    box.update(cpus=3, memory="1G")
    assert shape(box) == (3, 1024 - kernel)
    machine = box.info().machine
    assert machine is not None
    assert (machine.vcpus, machine.memory) == (3, 1024 * MIB)
    assert (machine.vcpus_max, machine.memory_max) == (4, 2048 * MIB)
    limit = box.stats().memory.limit
    assert limit is not None and limit >= 900 * MIB

    box.update(cpus=2, memory="512M")
    assert shape(box) == (2, 512 - kernel)
    box.update(cpus=4, memory="2G")
    assert shape(box) == (4, 2048 - kernel)
    box.update(cpus=1, memory="256M")
    assert shape(box) == (1, memory)


@pytest.mark.versions
@pytest.mark.soak
def test_new_memory_can_be_used_at_once(box: Instance) -> None:
    box.update(memory="1G")
    script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=500 2>/dev/null; stat -c %s /dev/shm/x"
    assert box.exec(["sh", "-c", script]).text.strip() == str(500 * MIB)


def test_what_was_taken_below_its_beginning_cannot_be_used(box: Instance) -> None:
    """The balloon alone would give way to a program that wants more."""
    box.update(memory="128M")
    greedy = "x=a; while :; do x=$x$x; done"
    assert box.exec(["sh", "-c", greedy]).exit_code in (137, 1, 2)
    machine = box.info().machine
    assert machine is not None and machine.memory == 128 * MIB
    assert box.stats().memory.limit == 128 * MIB
    assert box.info().state == "running"
    box.update(memory="256M")
    assert box.exec(["true"]).exit_code == 0


def test_memory_that_is_used_is_not_taken(box: Instance) -> None:
    box.exec(["dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=90"])
    with pytest.raises(WrongState, match="memory: the guest uses") as caught:
        box.update(memory="100M")
    assert caught.value.hint
    machine = box.info().machine
    assert machine is not None and machine.memory == 256 * MIB
    assert box.info().spec.resources.memory == 256 * MIB


@pytest.mark.versions
def test_it_keeps_what_it_got_wherever_it_goes_on(box: Instance, engine: Engine) -> None:
    box.update(cpus=2, memory="768M")
    before = shape(box)
    twin = box.fork()
    assert isinstance(twin, Instance)
    try:
        assert shape(twin) == before
        twin.update(cpus=3, memory="1G")
        assert shape(twin)[0] == 3
        twin.suspend()
        twin.resume()
        assert shape(twin) == (3, before[1] + 256)
        twin.update(cpus=1, memory="256M")
        assert shape(twin)[0] == 1
    finally:
        twin.remove(force=True)
    assert shape(box) == before


def test_a_new_start_begins_with_what_it_had(box: Instance) -> None:
    """Its writes too: a program that pays no heed to SIGTERM is killed in the guest, which
    then writes out what is only in its memory."""
    box.update(cpus=2, memory="512M")
    written = box.exec(["sh", "-c", "seq 100000 > /root/kept; md5sum /root/kept"])
    box.stop(timeout=0.1)
    assert box.info().exit_code == 137
    box.start()
    assert box.exec(["md5sum", "/root/kept"]).text == written.text
    processors, memory = shape(box)
    assert processors == 2 and 450 < memory < 512


def test_a_limit_beyond_its_room_is_refused(box: Instance) -> None:
    before = shape(box)
    with pytest.raises(InvalidArgument, match=r"memory: .*memory_max"):
        box.update(memory="4G")
    with pytest.raises(InvalidArgument, match=r"cpus: .*cpus_max"):
        box.update(cpus=8)
    assert shape(box) == before


def test_a_paused_machine_cannot_help(box: Instance) -> None:
    box.pause()
    with pytest.raises(WrongState, match="paused") as caught:
        box.update(cpus=2)
    assert caught.value.hint == "unpause it first"
    box.unpause()
    assert shape(box)[0] == 1


@requires("virtiofsd")
def test_memory_that_came_later_is_shared_with_directories(
    engine: Engine, tmp_path: os.PathLike[str]
) -> None:
    options = {**OPTIONS, "volumes": [f"{tmp_path}:/data"]}
    box = engine.start("busybox", ["sleep", "10000"], **options)  # type: ignore[arg-type]
    try:
        box.update(memory="1G")
        # More than the memory from the start, through the shared directory.
        script = "dd if=/dev/zero of=/data/x bs=1M count=400 2>/dev/null; wc -c </data/x"
        assert box.exec(["sh", "-c", script]).text.strip() == str(400 * MIB)
    finally:
        box.remove(force=True)


def resident(engine: Engine, box: Instance) -> int:
    """Return the MiB of QEMU's own memory that the host holds."""
    pid = processes(engine, box)["qemu"]
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"Private_Dirty:\s+(\d+)", rollup)
    assert found is not None
    return int(found[1]) // 1024


@pytest.mark.parametrize("template", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_memory_that_it_no_longer_uses_goes_back_to_the_host(
    engine: Engine, template: bool
) -> None:
    options = {**OPTIONS, "memory": "512M", "template": template}
    box = engine.start("busybox", ["sleep", "10000"], **options)  # type: ignore[arg-type]
    try:
        fill = ["dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=200"]
        box.exec(fill)
        full = resident(engine, box)
        box.exec(["rm", "/dev/shm/x"])
        until(lambda: resident(engine, box) < full - 150, "the host does not get it back")
        # What was given back can be had again, and the guest is well.
        box.exec(fill)
        assert box.exec(["sh", "-c", "cmp -n 209715200 /dev/shm/x /dev/zero"]).exit_code == 0
        log = engine.root / "instances" / box.id / "qemu.log"
        assert "discard" not in log.read_text()
    finally:
        box.remove(force=True)
