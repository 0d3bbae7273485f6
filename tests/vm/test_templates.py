"""Templates: what a clone finds behind the devices that the template's drivers have seen."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from typing import Any, cast

import pytest

import hutch
from hutch.drivers.base import Launch
from hutch.drivers.vm.driver import VmDriver
from hutch.drivers.vm.machine import Host, shape_of, template_shape
from hutch.drivers.vm.placeholders import seen_size
from hutch.drivers.vm.setup import image_setup, late_setup, machine_setup
from hutch.drivers.vm.templates import _ask_for_memory
from hutch.engine.results import UsageRow
from hutch.plan import guest
from hutch.plan.machine.model import Accelerator
from hutch.plan.machine.version import QemuVersion
from hutch.spec.model import InstanceSpec, MachineOptions, Placement, ProcessSpec
from hutch.storage.disks import DEFAULT_SIZE
from tests.requires import requires

GIB = 1 << 30
MODULES = ("virtio_blk", "virtio_net", "ext4")


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        (64 << 20, DEFAULT_SIZE),
        (DEFAULT_SIZE, DEFAULT_SIZE),
        (DEFAULT_SIZE + 1, 16 * GIB),
        (16 * GIB, 16 * GIB),
        (17 * GIB, 32 * GIB),
    ],
)
def test_a_template_shows_a_disk_at_least_as_large_as_the_instances(size: int, seen: int) -> None:
    assert seen_size(size) == seen


@pytest.mark.parametrize(
    ("accelerator", "asked", "model"),
    [("tcg", "", "max,-erms,-fsrm"), ("kvm", "", "host"), ("tcg", "EPYC", "EPYC")],
)
def test_only_an_emulated_processor_of_our_choice_copies_by_words(
    accelerator: Accelerator, asked: str, model: str
) -> None:
    host = Host(qemu="q", version=QemuVersion(7, 2), accelerator=accelerator, reason="")
    spec = InstanceSpec(
        image="x", process=ProcessSpec(argv=("x",)), machine=MachineOptions(cpu_model=asked)
    )
    assert shape_of(spec, host).cpu == model


def test_memory_that_is_made_ahead_comes_from_no_template() -> None:
    host = Host(qemu="q", version=QemuVersion(7, 2), accelerator="tcg", reason="")
    placement = Placement(prealloc=True)
    spec = InstanceSpec(image="x", process=ProcessSpec(argv=("x",)), placement=placement)
    assert shape_of(spec, host).backend.preallocate
    assert template_shape(shape_of(spec, host)) is None


def _setup(*, resumed: bool) -> list[guest.SetupOp]:
    spec = InstanceSpec(image="x", process=ProcessSpec(argv=("true",)))
    launch = Launch(id="1" * 64, name="one", spec=spec, directory="/d")
    return machine_setup(launch, modules=MODULES, resumed=resumed, files=[])


def test_a_clone_does_nothing_again_that_its_template_has_done() -> None:
    done = late_setup(MODULES, nics=0)
    cold, resumed = _setup(resumed=False), _setup(resumed=True)
    assert [op for op in cold if op in done] == done
    assert not [op for op in resumed if op in done]


def test_a_template_without_a_card_does_not_load_its_driver() -> None:
    def loaded(nics: int) -> list[str]:
        return [op.path for op in late_setup(MODULES, nics=nics) if isinstance(op, guest.Insmod)]

    assert "/lib/modules/virtio_net.ko" in loaded(1)
    assert "/lib/modules/virtio_net.ko" not in loaded(0)


def test_the_cards_of_an_images_template_are_up_and_without_an_address() -> None:
    setup = image_setup(volatile=True, files=(), nics=2)
    assert [op.interface for op in setup if isinstance(op, guest.LinkUp)] == ["eth0", "eth1"]
    assert not [op for op in setup if isinstance(op, guest.Address)]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hutch.Engine]:
    root = tmp_path_factory.mktemp("machines")
    with hutch.Engine(root) as engine:
        engine.images.bootstrap("busybox")
        yield engine
        VmDriver.prune_templates(cast(VmDriver, engine._context.driver("vm")))
        engine._context.networks.teardown()


def _run(engine: hutch.Engine, script: str, **options: Any) -> str:
    done = engine.run(
        "busybox", ["sh", "-c", script], isolation="vm", memory="160M", timeout=240, **options
    )
    assert done.exit_code == 0, done.stderr
    return done.stdout.decode()


@requires("root", "apt-mirror", "busybox", "qemu")
@pytest.mark.integration
@pytest.mark.parametrize("size", [128 << 20, DEFAULT_SIZE, 12 * GIB])
def test_a_clones_guest_hears_of_the_size_of_its_disk(machines: hutch.Engine, size: int) -> None:
    script = f"until [ $(cat /sys/block/vdb/size) = {size // 512} ]; do sleep 0.1; done; df -k /"
    seen = int(_run(machines, script, disk=size, network="none").splitlines()[-1].split()[1])
    assert 0.85 * size < seen * 1024 <= size


@requires("root", "apt-mirror", "busybox", "qemu")
@pytest.mark.integration
def test_a_clones_card_has_the_offloads_of_a_tap(machines: hutch.Engine) -> None:
    bits = _run(machines, "cat /sys/class/net/eth0/device/features").strip()
    # VIRTIO_NET_F_CSUM, GUEST_TSO4, HOST_TSO4: virtio 1.2, 5.1.3
    assert [bits[bit] for bit in (0, 7, 11)] == ["1", "1", "1"]


@requires("root", "apt-mirror", "busybox", "qemu")
@pytest.mark.integration
def test_the_memory_of_a_template_is_sealed_against_writing(machines: hutch.Engine) -> None:
    _run(machines, "true", network="none")
    runs = [path / "run" for path in (machines.root / "templates").iterdir() if path.is_dir()]
    memories = [fd for fd in map(_ask_for_memory, runs) if fd is not None]
    assert memories
    for fd in memories:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        os.close(fd)
        assert seals & fcntl.F_SEAL_WRITE


@requires("root", "apt-mirror", "busybox", "qemu")
@pytest.mark.integration
def test_a_card_without_an_address_of_ipv6_does_not_speak_it(machines: hutch.Engine) -> None:
    assert _run(machines, "cat /proc/sys/net/ipv6/conf/eth0/disable_ipv6").strip() == "1"


@pytest.mark.integration
@requires("root", "qemu", "busybox", "apt-mirror")
def test_the_first_start_of_a_kind_tells_that_it_boots_and_later_ones_are_silent(
    machines: hutch.Engine,
) -> None:
    told: list[str] = []
    for _ in range(2):
        done = machines.run(
            "busybox",
            ["true"],
            isolation="vm",
            memory="176M",
            network="none",
            progress=lambda event: told.append(event.phase),
        )
        assert done.exit_code == 0
    assert [phase for phase in told if phase.startswith(("booting", "ready"))] == [
        "booting, for this and later starts",
        "ready",
    ]


@pytest.mark.integration
@requires("root", "qemu", "busybox", "apt-mirror")
def test_templates_are_seen_by_df_and_taken_by_prune(machines: hutch.Engine) -> None:
    def row() -> UsageRow:
        return next(row for row in machines.df().rows if row.kind == "templates")

    with machines.start(
        "busybox", ["sleep", "1000"], isolation="vm", memory="176M", network="none"
    ) as box:
        before = row()
        assert before.total >= 1
        # A booted guest has some tens of megabytes of its own.
        assert before.reclaimable == before.size > 20 << 20
        report = machines.prune()
        assert report.templates == before.total
        assert report.reclaimed >= before.size
        assert (row().total, row().size) == (0, 0)
        assert box.exec(["echo", "on"]).text == "on\n"
