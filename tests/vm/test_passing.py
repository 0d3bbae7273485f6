"""How a machine's devices of the host come to QEMU, by what QEMU and the kernel can do."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from hutch.drivers.vm import passing
from hutch.drivers.vm.passing import Passed
from hutch.drivers.vm.sandbox import Descriptors, Sandbox
from hutch.plan.machine.model import HostDevice
from hutch.plan.machine.version import QemuVersion
from hutch.plan.vm import PassedGroup
from hutch.process.vmm import FIRST_QEMU_FD
from hutch.resources.vfio_binding import VfioNodes

CARD, SECOND = "0000:01:00.0", "0000:01:00.1"
OLD, NEW = QemuVersion(7, 2), QemuVersion(10)


@pytest.fixture
def passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Passed:
    """Two devices of one group, with nodes of their own."""
    nodes = {}
    for number, address in enumerate((CARD, SECOND)):
        node = tmp_path / f"vfio{number}"
        node.touch()
        nodes[address] = VfioNodes(group=7, group_numbers=(240, 3), character=str(node))
    (tmp_path / "iommu").touch()
    monkeypatch.setattr(passing, "_IOMMU", str(tmp_path / "iommu"))
    return Passed(nodes=nodes)


def test_a_new_qemu_gets_them_opened_and_sees_no_node(passed: Passed) -> None:
    assert passed.groups(NEW) == ()
    with ExitStack() as held:
        descriptors = Descriptors(held)
        devices, iommu = passed.pieces(NEW, Sandbox(namespaces="own"), descriptors)
        opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in descriptors.fds]
    assert [os.path.basename(path) for path in opened] == ["vfio0", "vfio1", "iommu"]
    numbers = [device.file.fd for device in devices if device.file is not None]
    assert iommu is not None
    assert [*numbers, iommu.fd] == [FIRST_QEMU_FD, FIRST_QEMU_FD + 1, FIRST_QEMU_FD + 2]


def test_an_old_one_gets_the_node_of_their_group(passed: Passed) -> None:
    group = PassedGroup(group=7, numbers=(240, 3), addresses=(CARD, SECOND))
    assert passed.groups(OLD) == (group,)
    assert passed.numbers() == ((10, 196), (240, 3))
    with ExitStack() as held:
        descriptors = Descriptors(held)
        own, iommu = passed.pieces(OLD, Sandbox(namespaces="own"), descriptors)
        hosts, _ = passed.pieces(OLD, Sandbox(namespaces="none"), descriptors)
        assert descriptors.fds == [] and iommu is None
    assert [device.directory for device in own] == [f"/dev/passed/{a}" for a in (CARD, SECOND)]
    assert hosts == (HostDevice(address=CARD), HostDevice(address=SECOND))


def test_without_nodes_of_their_own_a_new_one_is_like_an_old(
    passed: Passed, tmp_path: Path
) -> None:
    (tmp_path / "iommu").unlink()
    assert passed.groups(NEW) == passed.groups(OLD) != ()


def test_what_is_only_shown_takes_nothing() -> None:
    with ExitStack() as held:
        shown = Passed(planned=(CARD,))
        devices, _ = shown.pieces(NEW, Sandbox(namespaces="own"), Descriptors(held))
    assert devices == (HostDevice(address=CARD),) and shown.numbers() == ()
