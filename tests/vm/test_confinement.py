"""What QEMU of a running machine is and may do on the host, by what the kernel says of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine, Instance
from hutch.linux.cgroup import detect
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "seccomp", "netns", "nftables", "busybox", "qemu", "apt-mirror"),
    requires("mkfs.erofs", "mke2fs"),
    pytest.mark.integration,
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("confined") / "root"
    with Engine(root) as opened:
        opened.images.bootstrap("busybox")
        yield opened
        opened._context.machines.prune_templates()
        opened._context.networks.teardown()


@pytest.fixture(scope="module")
def machines(engine: Engine) -> Iterator[tuple[Instance, Instance]]:
    """Two machines, with a network."""
    options = {"isolation": "vm", "memory": "128m"}
    with (
        engine.start("busybox", ["sleep", "1000"], **options) as one,  # type: ignore[arg-type]
        engine.start("busybox", ["sleep", "1000"], **options) as two,  # type: ignore[arg-type]
    ):
        yield one, two


def _qemu(engine: Engine, machine: Instance) -> Path:
    """Return the directory in /proc of a machine's QEMU."""
    for pid in engine._context.machines.processes(machine.id):
        comm = Path(f"/proc/{pid}/comm").read_text()
        if comm.startswith("qemu"):
            return Path(f"/proc/{pid}")
    raise AssertionError("no QEMU in the machine's group")


@pytest.fixture(scope="module")
def qemu(engine: Engine, machines: tuple[Instance, Instance]) -> Path:
    return _qemu(engine, machines[0])


@pytest.fixture(scope="module")
def status(qemu: Path) -> dict[str, str]:
    lines = (qemu / "status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _everybody(engine: Engine, machine: Instance) -> list[Path]:
    return [Path(f"/proc/{pid}") for pid in engine._context.machines.processes(machine.id)]


@pytest.mark.versions
def test_every_process_of_a_machine_is_an_unprivileged_one(
    engine: Engine, machines: tuple[Instance, Instance]
) -> None:
    everybody = _everybody(engine, machines[0])
    assert len(everybody) == 2, "hutch-vmm and QEMU"
    for process in everybody:
        text = (process / "status").read_text()
        fields = {k: v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
        assert all(int(uid) >= 1 << 30 for uid in fields["Uid"].split())
        assert all(int(gid) >= 1 << 30 for gid in fields["Gid"].split())
        assert fields["Groups"] == ""
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(fields[kind], 16) == 0, kind
        assert fields["NoNewPrivs"] == "1"


def test_two_machines_are_two_users(engine: Engine, machines: tuple[Instance, Instance]) -> None:
    one, two = (_qemu(engine, machine) for machine in machines)
    assert one.stat().st_uid != two.stat().st_uid


@pytest.mark.versions
def test_qemu_is_held_to_a_filter_of_system_calls(status: dict[str, str]) -> None:
    assert status["Seccomp"] == "2"
    assert int(status["Seccomp_filters"]) >= 1


@pytest.mark.parametrize("kind", ["mnt", "pid", "net", "ipc", "uts"])
def test_its_namespaces_are_its_own(
    engine: Engine, machines: tuple[Instance, Instance], kind: str
) -> None:
    found = {os.readlink(_qemu(engine, machine) / "ns" / kind) for machine in machines}
    assert len(found) == 2 and os.readlink(f"/proc/self/ns/{kind}") not in found


def test_its_network_leads_to_its_own_tap_only(qemu: Path) -> None:
    names = [line.split(":")[0].strip() for line in (qemu / "net/dev").read_text().splitlines()[2:]]
    assert [name for name in names if name[:2] not in ("br", "ta", "et")] == ["lo"]
    # No address but the loopback's own, which is down: nothing of the host is reached.
    assert "LOCAL" not in (qemu / "net/fib_trie").read_text().replace("127.0.0.1", "")


def test_its_root_shows_programs_and_nothing_of_the_hosts_own(engine: Engine, qemu: Path) -> None:
    root = qemu / "root"
    assert set(os.listdir(root)) <= {
        *("bin", "dev", "hutch-vmm", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin"),
        *("tmp", "usr"),
    }
    for path in ("etc", "home", "root", "var", "sys", str(engine.root).lstrip("/")):
        assert not (root / path).exists(), path
    assert os.listdir(root / "run") == os.listdir(root / "tmp") == []


@pytest.mark.versions
def test_its_root_is_read_only(qemu: Path) -> None:
    for line in (qemu / "mountinfo").read_text().splitlines():
        fields = line.split()
        where, options = fields[4], fields[5].split(",")
        if not where.startswith("/proc"):
            assert "ro" in options, f"{where} can be written to"
        assert "nosuid" in options or where == "/", where


def test_its_devices_are_the_harmless_ones(qemu: Path) -> None:
    assert set(os.listdir(qemu / "root/dev")) <= {"kvm", "null", "random", "urandom", "zero"}


def test_it_sees_no_process_but_its_own(qemu: Path) -> None:
    seen = sorted(int(name) for name in os.listdir(qemu / "root/proc") if name.isdigit())
    assert seen == [1, 2]


def _opened(process: Path) -> dict[int, tuple[str, int]]:
    """Return target and open mode of every descriptor."""
    found = {}
    for link in (process / "fd").iterdir():
        info = (process / "fdinfo" / link.name).read_text()
        flags = int(info.split("flags:")[1].split()[0], 8)
        found[int(link.name)] = (os.readlink(link), flags & os.O_ACCMODE)
    return found


def test_what_it_holds_open_is_its_own(
    engine: Engine, machines: tuple[Instance, Instance], qemu: Path
) -> None:
    mine = str(engine.root / "instances" / machines[0].id)
    writable = {
        target
        for target, mode in _opened(qemu).values()
        if target.startswith("/") and mode != os.O_RDONLY and not target.startswith("/memfd:")
    }
    outside = {t for t in writable if not t.startswith((f"{mine}/", "/dev/"))}
    assert outside == set()
    assert {os.path.basename(t) for t in writable if t.startswith(mine)} <= {
        "disk.raw",
    }
    readable = {target for target, _ in _opened(qemu).values() if target.startswith("/")}
    other = str(engine.root / "instances" / machines[1].id)
    assert not [target for target in readable if target.startswith(other)]


def test_shared_disks_and_kernels_are_open_for_reading_only(engine: Engine, qemu: Path) -> None:
    shared = [
        (target, mode)
        for target, mode in _opened(qemu).values()
        if target.startswith((str(engine.root / "rootdisks"), str(engine.root / "kernels")))
    ]
    assert shared and all(mode == os.O_RDONLY for _, mode in shared)


def test_the_templates_memory_is_sealed_and_private(engine: Engine, qemu: Path) -> None:
    import fcntl

    held = [
        number
        for number, (target, _) in _opened(qemu).items()
        if target.startswith("/memfd:hutch-")
        and os.stat(qemu / "fd" / str(number)).st_size >= 128 << 20
    ]
    assert held
    for number in held:
        with open(qemu / "fd" / str(number), "rb") as file:
            seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_WRITE and seals & fcntl.F_SEAL_SEAL
    for line in (qemu / "maps").read_text().splitlines():
        if "/memfd:hutch-" in line:
            assert line.split()[1][3] == "p", line


def test_files_of_machines_are_closed_to_other_users(
    engine: Engine, machines: tuple[Instance, Instance]
) -> None:
    directory = engine.root / "instances" / machines[0].id
    assert stat.S_IMODE(directory.stat().st_mode) & 0o077 == 0
    for name in ("disk.raw", "console.log", "qemu.log", "run/qmp.sock", "run/agent.sock"):
        path = directory / name
        if path.exists():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, name


def test_it_is_in_the_machines_control_group(
    engine: Engine, machines: tuple[Instance, ...]
) -> None:
    group = detect().load(machines[0].id)
    assert len(list(group.pids())) == 2


def test_a_disk_of_another_machine_cannot_be_opened_by_name(
    engine: Engine, machines: tuple[Instance, Instance], qemu: Path
) -> None:
    disk = engine.root / "instances" / machines[1].id / "disk.raw"
    assert disk.exists()
    assert not (qemu / "root" / str(disk).lstrip("/")).exists()
