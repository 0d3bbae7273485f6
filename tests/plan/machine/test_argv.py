"""QEMU's argument list: golden, refused where pieces do not fit, and accepted by QEMU.

After a change that is meant, write the golden files anew with
`HUTCH_GOLDEN=write pytest tests/plan/machine`, and read the difference.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hutch.errors import HutchError, InvalidArgument, Unsupported
from hutch.host.kvm import tiny_guest
from hutch.plan.machine.argv import machine_arguments
from hutch.plan.machine.disks import blockdev, throttle_limits
from hutch.plan.machine.kernel import kernel_command_line
from hutch.plan.machine.model import (
    MICROVM,
    Descriptor,
    Disk,
    DiskFile,
    Firmware,
    HostDevice,
    HostForward,
    Kernel,
    Machine,
    Memory,
    Nic,
    NumaNode,
    PluggedMemory,
    Shape,
    Share,
    Tap,
    Throttle,
    UserNet,
)
from hutch.plan.machine.version import QemuVersion, parse_version
from hutch.process.run import run_command, spawn
from hutch.qmp import Monitor, blocks, descriptors, devices, machine, migration
from tests.plan.machine.configurations import CONFIGURATIONS, RealHardware, StatedHardware
from tests.requires import live_qemu, requires

HERE = Path(__file__).parent
VERSIONS = {"7.2": QemuVersion(7, 2, 22), "10.0": QemuVersion(10, 0, 2)}
# Not started here: they need hardware, the servers of their directories, huge pages.
_ELSEWHERE = {"kvm", "shared-directories", "huge-pages", "devices-of-groups", "devices-opened"}
_NEEDS = {"tpm": ("swtpm",), "uefi": ("ovmf",)}
QEMU = os.environ.get("HUTCH_TEST_QEMU", "qemu-system-x86_64")


def golden(name: str, version: str) -> Path:
    """The file of a configuration; a version has one of its own where it differs."""
    own = HERE / f"{name}-{version}.txt"
    return own if own.exists() else HERE / f"{name}.txt"


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_argument_list_is_as_it_was(name: str, version: str) -> None:
    arguments = machine_arguments(
        CONFIGURATIONS[name](StatedHardware()), version=VERSIONS[version], qemu="qemu"
    )
    lines = [f"{' ' if not a.startswith('-') else ''}{a}\n" for a in arguments[1:]]
    path = golden(name, version)
    if os.environ.get("HUTCH_GOLDEN") == "write":
        if version != "7.2" and path.read_text() != "".join(lines):
            path = HERE / f"{name}-{version}.txt"
        path.write_text("".join(lines))
    assert "".join(lines) == path.read_text()


def _companions(name: str, directory: Path, stack: ExitStack) -> None:
    """Have at the stated paths what QEMU opens or connects to by itself."""
    if name == "clone":
        (directory / "template.mem").touch()
        os.truncate(directory / "template.mem", 256 << 20)
    if name == "disks":
        for file in ("base,v1.qcow2", "overlay.qcow2"):
            run_command(["qemu-img", "create", "-q", "-f", "qcow2", f"{directory}/{file}", "1M"])
    if name == "tpm":
        control = stack.enter_context(socket.socket(socket.AF_UNIX))
        control.bind(str(directory / "swtpm.sock"))
        control.listen(1)
        argv = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={directory}"]
        argv += ["--ctrl", f"type=unixio,fd={control.fileno()}"]
        stack.enter_context(spawn(argv, pass_fds=[control.fileno()]))


@pytest.mark.versions
@requires("qemu", "root")
@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=requires(*_NEEDS.get(name, ())))
        for name in sorted(set(CONFIGURATIONS) - _ELSEWHERE)
    ],
)
def test_qemu_accepts_it(name: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        hardware = RealHardware(tmp_path, stack, tiny_guest())
        made = CONFIGURATIONS[name](hardware)
        _companions(name, tmp_path, stack)
        version = parse_version(run_command([QEMU, "--version"]).stdout.decode())
        argv = machine_arguments(made, version=version, qemu=QEMU)
        log = stack.enter_context(open(tmp_path / "log", "w+b"))
        stack.enter_context(spawn(argv, stdout=log, stderr=log, pass_fds=hardware.fds))
        hardware.leave_to_qemu()
        assert made.monitor is not None
        try:
            with Monitor.connect(hardware.paths[made.monitor.fd], timeout_s=60) as monitor:
                expected = "inmigrate" if made.incoming else "prelaunch"
                assert machine.query_status(monitor) == expected
                assert monitor.version == version
                machine.quit(monitor)
        except HutchError as exc:
            exc.add_note((tmp_path / "log").read_text())
            raise


@pytest.mark.versions
@requires("live-qemu", "root")
@pytest.mark.integration
def test_qemu_takes_devices_that_come_opened(tmp_path: Path) -> None:
    qemu = str(live_qemu())
    with ExitStack() as stack:
        hardware = RealHardware(tmp_path, stack, tiny_guest())
        made = CONFIGURATIONS["devices-opened"](hardware)
        version = parse_version(run_command([qemu, "--version"]).stdout.decode())
        argv = machine_arguments(made, version=version, qemu=qemu)
        done = run_command(argv, pass_fds=hardware.fds, timeout_s=60)
    # These are sockets: it gets as far as giving one to the other.
    wanted = f"error bind device fd={made.host_devices[0].file.fd} to iommufd={made.iommu.fd}"  # type: ignore[union-attr]
    assert wanted in done.stderr.decode()


# ---- what does not fit ----------------------------------------------------------------

MIB = 1 << 20
KERNEL = Kernel(path="/vmlinux")
IMAGE = DiskFile(file="/disk")


def arguments(shape: dict[str, Any] | None = None, **pieces: Any) -> tuple[str, ...]:
    made = Machine(
        **{
            "name": "box",
            "shape": Shape(**{"memory": 64 * MIB, **(shape or {})}),
            "boot": KERNEL,
            **pieces,
        }
    )
    return machine_arguments(made, version=VERSIONS["7.2"], qemu="qemu")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: arguments({"memory": 100}), "shape.memory: a multiple of 1 MiB"),
        (lambda: arguments({"memory": MIB}), "shape.memory: at least"),
        (lambda: arguments({"max_memory": 128 * MIB}), "shape.memory_slots"),
        (lambda: arguments({"vcpus": 0}), "shape.vcpus: at least 1"),
        (lambda: arguments(plugged=PluggedMemory(requested=0, port="rp0")), "machine.plugged"),
        (lambda: arguments({"vcpus": 3, "cores": 2}), "shape.cores: 3 processors do not fill"),
        (lambda: arguments({"backend": Memory(kind="file")}), "backend.path"),
        (
            lambda: arguments({"numa": (NumaNode(memory=32 * MIB, vcpus=(0,)),)}),
            "shape.numa: the nodes' memory",
        ),
        (
            lambda: arguments({"numa": (NumaNode(memory=64 * MIB, vcpus=(0, 1)),)}),
            "shape.numa: each processor",
        ),
        (lambda: arguments(shares=(Share(tag="x", socket="/s"),)), "machine.shares: memory shared"),
        (lambda: arguments(disks=(Disk(image=IMAGE, serial="x" * 21),)), r"disks\[0\].serial"),
        (lambda: arguments(disks=(Disk(image=IMAGE, serial="x"),) * 2), "one serial"),
        (
            lambda: arguments(
                disks=tuple(Disk(image=IMAGE, serial=str(n)) for n in range(65)),
            ),
            "machine.disks: at most 64, got 65",
        ),
        (
            lambda: arguments(
                disks=(Disk(image=IMAGE, serial="y", throttle=Throttle(bytes=1, read_bytes=1)),)
            ),
            "throttle.bytes: give a total or its parts",
        ),
        (
            lambda: arguments(disks=(Disk(image=IMAGE, serial="x", kind="cdrom"),)),
            "read_only: a cdrom",
        ),
        (
            lambda: arguments(
                disks=(Disk(image=DiskFile(file="/d", backing=IMAGE), serial="x"),),
            ),
            "no backing file",
        ),
        (lambda: arguments(nics=(Nic(mac="01:00:00:00:00:01"),)), r"nics\[0\].mac: a unicast"),
        (
            lambda: arguments(nics=(Nic(mac="52:54:00:00:00:01", backend=Tap(fds=())),)),
            "at least one descriptor",
        ),
        (
            lambda: arguments(
                nics=(
                    Nic(
                        mac="52:54:00:00:00:01",
                        backend=UserNet(forwards=(HostForward(port=0, guest_port=1),)),
                    ),
                )
            ),
            "forwards: a port, got 0",
        ),
        (lambda: arguments(root_ports=17), "machine.root_ports: at most 16"),
        (lambda: arguments(boot=Firmware(code="/x")), "boot.variables: UEFI needs"),
        (
            lambda: arguments(host_devices=(HostDevice(address="x", file=Descriptor(9)),)),
            "machine.iommu: an opened device needs",
        ),
        (lambda: arguments(name="a,b"), "machine.name: a comma"),
        (lambda: arguments(boot=Kernel(path="/a\nb")), "boot.path: has a control character"),
        (lambda: kernel_command_line(accelerator="tcg", extra="x" * 3000), "command_line: the"),
    ],
)
def test_pieces_that_do_not_fit_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


@pytest.mark.parametrize(
    "pieces",
    [
        {"root_ports": 1},
        {"boot": Firmware()},
        {"generation": "auto"},
        {"disks": (Disk(image=IMAGE, serial="x", kind="cdrom", read_only=True),)},
        {"host_devices": (HostDevice(address="0000:01:00.0"),)},
    ],
)
def test_microvm_says_what_it_has_not(pieces: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match="microvm"):
        arguments({"machine": MICROVM}, **pieces)


def test_a_comma_in_a_path_does_not_start_an_option() -> None:
    memory = Memory(kind="file", path="/a,share=on", share=False)
    (backend,) = [a for a in arguments({"backend": memory}) if a.startswith("memory-backend-file")]
    assert "mem-path=/a,,share=on,share=off" in backend


def test_a_qcow2_opens_nothing_that_its_header_names() -> None:
    disk = Disk(image=DiskFile(file="/d", format="qcow2"), serial="x")
    assert '"backing":null' in " ".join(arguments(disks=(disk,)))


def test_a_descriptor_used_twice_is_in_one_set() -> None:
    base = DiskFile(file=Descriptor(9))
    overlays = tuple(
        Disk(image=DiskFile(file=Descriptor(fd), format="qcow2", backing=base), serial=f"d{fd}")
        for fd in (10, 11)
    )
    assert arguments(disks=overlays).count("fd=9,set=9") == 1


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", QemuVersion(7, 2, 22)),
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)", QemuVersion(10, 0, 2)),
        ("11.0", QemuVersion(11)),
    ],
)
def test_versions_are_read(text: str, version: QemuVersion) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "QEMU", "QEMU emulator version 6.2.0"])
def test_no_version_or_an_old_one_is_refused(text: str) -> None:
    with pytest.raises(Unsupported):
        parse_version(text)


# ---- a template and its clones --------------------------------------------------------


def _run(made: Machine, hardware: RealHardware, stack: ExitStack) -> Monitor:
    """Start a machine and return its monitor."""
    version = parse_version(run_command([QEMU, "--version"]).stdout.decode())
    argv = machine_arguments(made, version=version, qemu=QEMU)
    stack.enter_context(spawn(argv, pass_fds=hardware.fds))
    hardware.leave_to_qemu()
    assert made.monitor is not None
    return stack.enter_context(Monitor.connect(hardware.paths[made.monitor.fd], timeout_s=60))


@requires("qemu")
@pytest.mark.integration
def test_a_clone_takes_the_state_of_its_template_and_then_a_disk(tmp_path: Path) -> None:
    state = os.memfd_create("state")
    with ExitStack() as stack:
        stack.callback(os.close, state)
        hardware = RealHardware(tmp_path, stack, tiny_guest())
        monitor = _run(CONFIGURATIONS["template"](hardware), hardware, stack)
        machine.cont(monitor)
        machine.stop(monitor)
        migration.save_state(monitor, state, ignore_shared=True)
        machine.quit(monitor)
        image = hardware.file(os.O_RDWR, MIB)
        monitor = _run(CONFIGURATIONS["clone"](hardware), hardware, stack)
        migration.load_state(monitor, state, ignore_shared=True)
        path = descriptors.add_fd(monitor, image.fd)
        limits = Throttle(reads=9)
        disk = Disk(image=DiskFile(file=path), serial="late", throttle=limits)
        devices.object_add(
            monitor, "throttle-group", id="late-limits", limits=throttle_limits(limits)
        )
        blocks.blockdev_add(monitor, blockdev(disk, "late"))
        devices.device_add(monitor, "virtio-blk-pci", id="late-dev", bus="rp1", drive="late")
        blocks.set_throttle_group(monitor, "late-limits", throttle_limits(Throttle(writes=5)))
        now = devices.qom_get(monitor, "/objects/late-limits", "limits")
        assert (now["iops-read"], now["iops-write"]) == (0, 5)
        machine.cont(monitor)
        assert machine.wait_status(monitor, machine.RUNNING, timeout_s=30)
        assert [stats.node for stats in blocks.query_blockstats(monitor)] == ["late"]
        machine.quit(monitor)


def test_a_share_at_a_port_comes_after_that_port() -> None:
    share = Share(tag="x", socket="/s", port="rp0")
    line = arguments({"backend": Memory(kind="memfd")}, shares=(share,), root_ports=1)
    devices = [line[n + 1] for n, word in enumerate(line) if word == "-device"]
    port = next(n for n, device in enumerate(devices) if "id=rp0" in device)
    (at,) = (n for n, device in enumerate(devices) if device.startswith("vhost-user-fs"))
    assert at > port
    assert "bus=rp0" in devices[at]
    assert "addr=" not in devices[at]
