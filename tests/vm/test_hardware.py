"""How a machine's processors, memory and disk are arranged, as its guest and the host see them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import Exhausted, HutchError, InvalidArgument, Unsupported, WrongState
from tests.vm.machines import NEEDS, SMALL, machine_root, processes

pytestmark = [*NEEDS, pytest.mark.timeout(600)]

PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
CPU = "/sys/devices/system/cpu/cpu0/topology"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with machine_root(tmp_path_factory.mktemp("hardware") / "root") as engine:
        yield engine


@contextmanager
def started(engine: Engine, **options: Any) -> Iterator[Instance]:
    box = engine.start("busybox", ["sleep", "10000"], **{**SMALL, **options})
    try:
        yield box
    finally:
        box.remove(force=True)


def says(box: Instance, script: str) -> list[str]:
    """Return the lines that a shell in the machine prints."""
    return box.exec(["sh", "-c", script]).text.split("\n")[:-1]


def host(engine: Engine, box: Instance, name: str) -> str:
    """Return what the host's kernel says of QEMU."""
    return Path(f"/proc/{processes(engine, box)['qemu']}/{name}").read_text()


def placed(engine: Engine, box: Instance) -> dict[str, str]:
    """Return on which of the host's processors each of the machine's may run."""
    found = {}
    for task in Path(f"/proc/{processes(engine, box)['qemu']}/task").iterdir():
        name = (task / "comm").read_text()
        if name.startswith("CPU "):
            allowed = re.search(r"Cpus_allowed_list:\s+(\S+)", (task / "status").read_text())
            assert allowed is not None
            found[name.split("/")[0]] = allowed[1]
    return found


def test_processors_are_arranged(engine: Engine) -> None:
    with started(engine, cpu_topology="sockets=1,cores=2,threads=2") as box:
        assert says(box, f"nproc; cat {CPU}/core_cpus_list {CPU}/package_cpus_list") == [
            "4",
            "0-1",
            "0-3",
        ]
    with started(engine, cpus=2, cpu_topology={"sockets": 2, "cores": 2}) as box:
        box.update(cpus=4)
        assert says(box, f"nproc; cat {CPU}/package_cpus_list") == ["4", "0-1"]


def test_a_model_is_what_the_guest_sees(engine: Engine) -> None:
    with started(engine, cpu_model="Haswell") as box:
        assert "Haswell" in says(box, "grep -m1 'model name' /proc/cpuinfo")[0]
    with pytest.raises(HutchError, match="Nonesuch"):
        engine.start("busybox", ["true"], **SMALL, cpu_model="Nonesuch")


# TPM2_CreatePrimary of an ECC key for the owner: the same one as long as the TPM has its seed.
_CREATE_PRIMARY = (
    "800200000043000001314000000100000009400000090000000000000400000000001a0023000b00030472"
    "000000060080004300100003001000000000000000000000"
)


def primary_key(box: Instance) -> str:
    """Return a digest of a key that the TPM of a machine makes of its seed."""
    request = "".join(f"\\x{_CREATE_PRIMARY[at : at + 2]}" for at in range(0, 134, 2))
    script = f"exec 3<>/dev/tpmrm0; printf '{request}' >&3; head -c 150 <&3 | md5sum"
    (key,) = says(box, script)
    return key


def keeps_its_tpm(box: Instance) -> None:
    """Check that the TPM is the same one after a suspension and after a new start."""
    key = primary_key(box)
    with pytest.raises(Unsupported, match="TPM") as caught:
        box.fork()
    assert caught.value.hint and "hutch suspend" in caught.value.hint
    box.suspend()
    box.resume()
    assert primary_key(box) == key
    box.stop(timeout=0)
    box.start()
    assert primary_key(box) == key


def test_nodes_have_their_processors_and_memory(engine: Engine) -> None:
    """And a TPM, which as they do makes the machine boot."""
    options: dict[str, Any] = {"memory": None, "numa": ["cpus=0,memory=96M"], "tpm": True}
    options["numa"].append("cpus=1-2,memory=160M,host=0")
    with started(engine, **options) as box:
        script = "cd /sys/devices/system/node; cat online node0/cpulist node1/cpulist"
        assert says(box, script) == ["0-1", "0", "1-2"]
        (total,) = says(box, "awk '/MemTotal/ {print $4}' /sys/devices/system/node/node1/meminfo")
        assert 110 << 10 < int(total) <= 160 << 10
        assert "bind:0" in host(engine, box, "numa_maps")
        with pytest.raises(InvalidArgument, match="numa: the nodes have"):
            box.update(memory="512M")
        keeps_its_tpm(box)
    with pytest.raises(InvalidArgument, match=r"numa\[0\]\.host: this host has no node 99"):
        engine.create("busybox", isolation="vm", numa="cpus=0,memory=256M,host=99")


@pytest.mark.serial
def test_a_machine_of_huge_pages_gets_no_more_than_there_are(engine: Engine) -> None:
    count = PAGES / "nr_hugepages"
    before = int(count.read_text())
    try:
        count.write_text(str(before + 128))
        with started(engine, memory="128M", memory_max="64G", placement="huge=2M") as box:
            rollup = host(engine, box, "smaps_rollup")
            found = re.search(r"Private_Hugetlb:\s+(\d+)", rollup)
            assert found is not None and int(found[1]) == 128 << 10
            # The guest is refused what the host has no pages for, and nothing dies of it.
            with pytest.raises(Exhausted, match=r"the guest took|huge pages"):
                box.update(memory="16G")
            assert says(box, "echo well") == ["well"]
    finally:
        count.write_text(str(before))


def test_a_machine_of_an_image_has_no_disk_to_export(engine: Engine, tmp_path: Path) -> None:
    box = engine.create("busybox", ["true"], **SMALL)
    try:
        with pytest.raises(Unsupported, match="has no disk that starts by itself"):
            engine.machines.export_disk(box.name, tmp_path / "d.qcow2")
    finally:
        box.remove()
    assert not (tmp_path / "d.qcow2").exists()


def test_locked_memory_stays_where_it_is(engine: Engine) -> None:
    with started(engine, memory_lock=True) as box:
        locked = re.search(r"VmLck:\s+(\d+)", host(engine, box, "status"))
        assert locked is not None and int(locked[1]) >= 128 << 10
        with pytest.raises(WrongState, match="the machine, whose memory is locked, was started"):
            box.update(memory="256M")
    with started(engine) as box:
        assert re.search(r"VmLck:\s+0 kB", host(engine, box, "status"))


def test_equal_pages_are_shared_only_on_request(engine: Engine) -> None:
    """Memory is marked for it (`mg`), and never part of a dump (`dd`). It is there from the
    beginning where that is asked for."""
    guest = 128 << 10
    there: list[int] = []

    def flags(box: Instance) -> set[str]:
        found: set[str] = set()
        size = 0
        for line in host(engine, box, "smaps").splitlines():
            if line.startswith("Size:"):
                size = int(line.split()[1])
            elif line.startswith("Rss:") and size == guest:
                there.append(int(line.split()[1]))
            elif line.startswith("VmFlags:") and size == guest:
                found |= set(line.split()[1:])
        return found

    with started(engine, placement="merge=on,prealloc=on") as box:
        assert {"mg", "dd"} <= flags(box)
        # The guest may have given some of it back by now; without that it takes a third.
        assert max(there) > guest * 3 // 4
    with started(engine) as box:
        assert "dd" in flags(box) and "mg" not in flags(box)


@pytest.mark.parametrize(
    "options",
    [
        {"disk_cache": "none", "disk_aio": "native"},
        {"disk_cache": "unsafe"},
        {"disk_aio": "io_uring"},
    ],
)
def test_a_disk_is_written_as_is_asked(engine: Engine, options: dict[str, Any]) -> None:
    with started(engine, **options) as box:
        assert says(box, "echo kept >/x && sync && cat /x") == ["kept"]
        pid = processes(engine, box)["qemu"]
        disk = str(engine.root / "instances" / box.id / "disk.raw")
        modes = [
            int(re.search(r"flags:\s+(\d+)", (info).read_text())[1], 8)  # type: ignore[index]
            for info in Path(f"/proc/{pid}/fdinfo").iterdir()
            if (Path(f"/proc/{pid}/fd") / info.name).readlink() == Path(disk)
        ]
        # O_DIRECT, see open(2).
        assert modes and all(bool(m & 0o40000) == ("native" in options.values()) for m in modes)


@pytest.mark.serial
def test_processors_keep_to_their_places(engine: Engine) -> None:
    options: dict[str, Any] = {"cpus": 2, "cpu_pin": True, "cpuset_cpus": "0-1"}
    with started(engine, **options) as box:
        assert placed(engine, box) == {"CPU 0": "0", "CPU 1": "1"}
        box.update(cpus=1, cpuset_cpus="1")
        assert placed(engine, box)["CPU 0"] == "1"
    with started(engine, cpuset_cpus="0") as box:
        assert set(placed(engine, box).values()) == {"0"}
