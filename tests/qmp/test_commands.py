"""What the drivers ask of QEMU, asked of a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.errors import NotFound, OperationTimeout, Unavailable
from hutch.qmp import CommandFailed, Monitor, blocks, conversation, descriptors, devices, machine
from hutch.qmp import migration as migrations
from tests.qmp.machines import qemu
from tests.requires import requires

pytestmark = [requires("qemu"), pytest.mark.integration]

ROOT_PORT = ("-M", "q35", "-device", "pcie-root-port,id=rp0,bus=pcie.0,addr=0x1c,chassis=1")


def test_a_machine_stops_runs_and_ends(tmp_path: Path) -> None:
    with qemu(tmp_path) as path:
        with conversation(path) as monitor:
            assert machine.query_status(monitor) == "prelaunch"
            machine.cont(monitor)
            assert machine.wait_status(monitor, machine.RUNNING, timeout_s=60) == "running"
            machine.stop(monitor)
            assert machine.query_status(monitor) == "paused"
            with pytest.raises(OperationTimeout, match="still paused, not running"):
                machine.wait_status(monitor, machine.RUNNING, timeout_s=0.05)
            assert [cpu.index for cpu in machine.query_cpus(monitor)] == [0]
        with conversation(path) as monitor:  # a second conversation, after the first
            machine.quit(monitor)
            with pytest.raises(Unavailable):
                machine.query_status(monitor)
        with pytest.raises(Unavailable):
            Monitor.connect(path)


def test_a_change_of_state_is_waited_for(tmp_path: Path) -> None:
    with qemu(tmp_path, "-no-shutdown") as path, conversation(path) as monitor:
        machine.cont(monitor)
        machine.wait_status(monitor, {"running"}, timeout_s=60)
        machine.system_powerdown(monitor)
        event = monitor.wait_event(["POWERDOWN"], timeout_s=60)
        assert event.time > 1e9


def test_an_unknown_command_is_refused_by_name(tmp_path: Path) -> None:
    with (
        qemu(tmp_path) as path,
        conversation(path) as monitor,
        pytest.raises(CommandFailed, match="fly: The command fly has not been found"),
    ):
        monitor.execute("fly")


def test_disks_come_and_go_by_descriptor(tmp_path: Path) -> None:
    disk = os.memfd_create("disk")
    os.truncate(disk, 1 << 20)
    with qemu(tmp_path, *ROOT_PORT) as path, conversation(path) as monitor:
        name = descriptors.add_fd(monitor, disk)
        os.close(disk)
        blocks.blockdev_add(
            monitor,
            {
                "driver": "raw",
                "node-name": "disk0",
                "file": {"driver": "file", "filename": name, "locking": "off"},
            },
        )
        devices.device_add(monitor, "virtio-blk-pci", id="d0", bus="rp0", drive="disk0")
        assert [s.device for s in blocks.query_blockstats(monitor)] == ["d0"]
        blocks.resize_block(monitor, "disk0", 2 << 20)
        blocks.set_io_throttle(monitor, ["d0"], "g", operations_per_s=100)
        with pytest.raises(NotFound, match="no disk d1"):
            blocks.set_io_throttle(monitor, ["d1"], "g", operations_per_s=100)
        with pytest.raises(CommandFailed, match="in use"):
            blocks.blockdev_del(monitor, "disk0")


def test_a_guest_that_does_not_run_lets_no_device_go(tmp_path: Path) -> None:
    with qemu(tmp_path, *ROOT_PORT) as path, conversation(path) as monitor:
        devices.device_add(monitor, "virtio-rng-pci", id="r0", bus="rp0")
        with pytest.raises(OperationTimeout, match="has not let the device r0 go"):
            devices.device_del(monitor, "r0", timeout_s=0.1)
        with pytest.raises(CommandFailed) as caught:
            devices.device_del(monitor, "none")
        assert caught.value.kind == "DeviceNotFound"


def test_a_device_that_needs_no_guest_goes_at_once(tmp_path: Path) -> None:
    arguments = ("-M", "q35", "-device", "virtio-serial-pci,id=ser0")
    with qemu(tmp_path, *arguments) as path, conversation(path) as monitor:
        devices.device_add(monitor, "virtserialport", id="p0", bus="ser0.0", name="x")
        devices.device_del(monitor, "p0", timeout_s=60)


def test_processors_are_plugged_into_their_places(tmp_path: Path) -> None:
    with (
        qemu(tmp_path, "-machine", "q35", "-smp", "1,maxcpus=4,sockets=2,cores=2") as path,
        Monitor.connect(path) as monitor,
    ):
        slots = devices.query_cpu_slots(monitor)
        assert [slot.place() for slot in slots] == [
            (0, 0, 0, 0),
            (0, 0, 1, 0),
            (1, 0, 0, 0),
            (1, 0, 1, 0),
        ]
        assert [bool(slot.path) for slot in slots] == [True, False, False, False]
        devices.cpu_add(monitor, slots[1], id="vcpu1")
        assert devices.query_cpu_slots(monitor)[1].path == "/machine/peripheral/vcpu1"
        assert [cpu.index for cpu in machine.query_cpus(monitor)] == [0, 1]


def test_the_balloon_is_set_and_asked(tmp_path: Path) -> None:
    with (
        qemu(tmp_path, "-device", "virtio-balloon-pci,id=balloon0") as path,
        conversation(path) as monitor,
    ):
        assert devices.query_balloon(monitor) == 16 << 20
        devices.set_balloon(monitor, 8 << 20)
    with (
        qemu(_other(tmp_path)) as path,
        conversation(path) as monitor,
        pytest.raises(CommandFailed, match="balloon"),
    ):
        devices.query_balloon(monitor)


def _other(tmp_path: Path) -> Path:
    other = tmp_path / "other"
    other.mkdir()
    return other


def test_a_screen_is_drawn_into_a_descriptor(tmp_path: Path) -> None:
    picture = tmp_path / "screen.png"
    with qemu(tmp_path, "-device", "VGA") as path, conversation(path) as monitor:
        fd = os.open(picture, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            machine.screendump(monitor, fd)
        finally:
            os.close(fd)
    assert picture.read_bytes().startswith(b"\x89PNG")


def memory(path: Path, share: str) -> tuple[str, ...]:
    backend = f"memory-backend-file,id=ram,size=16M,mem-path={path},share={share}"
    return ("-M", "q35,memory-backend=ram", "-object", backend)


def test_a_template_is_saved_once_and_loaded_by_many(tmp_path: Path) -> None:
    memory_file = tmp_path / "memory"
    state = os.memfd_create("state")
    try:
        with qemu(tmp_path, *memory(memory_file, "on")) as path, conversation(path) as monitor:
            machine.cont(monitor)
            machine.stop(monitor)
            migrations.save_state(monitor, state, ignore_shared=True)
            assert machine.query_status(monitor) == "postmigrate"
            ram = migrations.query_migrate(monitor).ram
            assert ram is not None and ram.transferred < 1 << 20
        for number in range(2):
            directory = tmp_path / str(number)
            directory.mkdir()
            arguments = (*memory(memory_file, "off"), "-incoming", "defer")
            with qemu(directory, *arguments) as path, conversation(path) as monitor:
                assert machine.query_status(monitor) == "inmigrate"
                migrations.load_state(monitor, state, ignore_shared=True)
                assert machine.query_status(monitor) == "paused"
                machine.cont(monitor)
                assert machine.wait_status(monitor, {"running"}, timeout_s=60) == "running"
    finally:
        os.close(state)


def test_a_state_that_is_none_is_refused(tmp_path: Path) -> None:
    garbage = os.memfd_create("state")
    os.write(garbage, b"not a state" * 100)
    try:
        with (
            qemu(tmp_path, "-incoming", "defer") as path,
            conversation(path) as monitor,
            pytest.raises(migrations.MigrationFailed),
        ):
            migrations.load_state(monitor, garbage, ignore_shared=False)
    finally:
        os.close(garbage)


def test_one_machine_migrates_to_another(tmp_path: Path) -> None:
    target_dir = _other(tmp_path)
    with (
        qemu(target_dir, "-incoming", "defer") as target_path,
        qemu(tmp_path) as source_path,
        conversation(target_path) as target,
        conversation(source_path) as source,
    ):
        migrations.set_capabilities(target, ["pause-before-switchover"])
        migrations.set_capabilities(source, ["pause-before-switchover"])
        migrations.set_parameters(source, downtime_limit=100, max_bandwidth=0)
        machine.cont(source)
        migrations.migrate_incoming(target, f"unix:{tmp_path}/migrate.sock")
        migrations.migrate(source, f"unix:{tmp_path}/migrate.sock")
        assert migrations.wait_migration(source, until={"pre-switchover"}) == "pre-switchover"
        migrations.continue_migration(source)
        migrations.wait_migration(source)
        migrations.wait_migration(target)
        assert machine.wait_status(target, {"running", "paused"}, timeout_s=60)
        assert migrations.query_migrate(source).status == "completed"


def test_a_migration_to_nowhere_fails_and_leaves_the_source(tmp_path: Path) -> None:
    with qemu(tmp_path) as path, conversation(path) as monitor:
        migrations.set_capabilities(monitor, [])
        with pytest.raises((migrations.MigrationFailed, CommandFailed)):
            migrations.migrate(monitor, f"unix:{tmp_path}/none.sock")
            migrations.wait_migration(monitor)
        assert machine.query_status(monitor) == "prelaunch"
