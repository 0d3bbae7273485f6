"""The options that only a virtual machine has."""

from __future__ import annotations

from typing import Any

import pytest

from hutch.errors import InvalidArgument
from hutch.spec.build import build
from hutch.spec.defaults import ImageDefaults
from hutch.spec.model import CpuTopology, MachineOptions, NumaNode

IMAGE = ImageDefaults(cmd=("sh",))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, MachineOptions()),
        ({"accel": "tcg"}, MachineOptions(accel="tcg")),
        ({"disk": "20G"}, MachineOptions(disk=20 << 30)),
        ({"cpus_max": "4", "cpus": 4}, MachineOptions(cpus_max=4)),
        (
            {"cpu_topology": "sockets=2,cores=2,threads=1", "cpus": 3},
            MachineOptions(cpu_topology=CpuTopology(sockets=2, cores=2)),
        ),
        (
            {"numa": ["cpus=0,2,memory=1G", {"cpus": [1], "memory": "2G", "host": "0-1"}]},
            MachineOptions(
                numa=(
                    NumaNode(cpus=(0, 2), memory=1 << 30),
                    NumaNode(cpus=(1,), memory=2 << 30, host_nodes=(0, 1)),
                )
            ),
        ),
        ({"memory_lock": True}, MachineOptions(memory_lock=True)),
        (
            {"disk_cache": "none", "disk_aio": "native"},
            MachineOptions(disk_cache="none", disk_aio="native"),
        ),
        ({"cpu_pin": True, "cpuset_cpus": "0-1", "cpus": 2}, MachineOptions(cpu_pin=True)),
        ({"memory_max": "4G", "memory": "4G"}, MachineOptions(memory_max=4 << 30)),
        ({"cpu_model": "EPYC,+svm,-avx2"}, MachineOptions(cpu_model="EPYC,+svm,-avx2")),
        ({"kernel": "6.1.0-56-cloud-amd64"}, MachineOptions(kernel="6.1.0-56-cloud-amd64")),
        ({"machine": "q35", "template": False}, MachineOptions(machine="q35", template=False)),
    ],
)  # fmt: skip
def test_options_of_a_machine_are_read(given: dict[str, Any], expected: MachineOptions) -> None:
    assert build("busybox", IMAGE, isolation="vm", **given).machine == expected


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"accel": "hvf"}, "accel"),
        ({"disk": "1M"}, "disk"),
        ({"disk": "65T"}, "disk"),
        ({"disk": "much"}, "disk"),
        ({"kernel": "../vmlinux"}, "kernel"),
        ({"kernel": ""}, "kernel"),
        ({"cpus_max": 0}, "cpus_max"),
        ({"cpus_max": 256}, "cpus_max"),
        ({"cpus_max": 2, "cpus": 2.5}, "cpus: are more"),
        ({"cpu_topology": "cores=0"}, "cpu_topology.cores"),
        ({"cpu_topology": "clusters=2"}, "cpu_topology: unknown key"),
        ({"cpu_topology": "2"}, "cpu_topology: expected KEY=VALUE"),
        ({"cpu_topology": "sockets=16,cores=16"}, "cpu_topology: more than"),
        ({"cpu_topology": "sockets=1,cores=2", "cpus": 3}, "cpu_topology: 1 sockets"),
        ({"numa": "memory=1G"}, r"numa\[0\]: cpus is missing"),
        ({"numa": "cpus=0,memory=1000"}, r"numa\[0\].memory"),
        ({"numa": "cpus=1-0,memory=1G"}, r"numa\[0\].cpus"),
        ({"numa": "cpus=0,0,memory=1G"}, r"numa\[0\].cpus: a number is there twice"),
        ({"numa": "cpus=1,memory=1G"}, "numa: each processor"),
        ({"numa": "cpus=0,memory=1G", "cpus": 2}, "numa: the nodes have 1 processors"),
        ({"numa": "cpus=0,memory=1G", "memory": "2G"}, "numa: the nodes have"),
        ({"memory_lock": True, "memory_max": "1G"}, "memory_max: memory that is locked"),
        ({"disk_cache": "writethrough"}, "disk_cache"),
        ({"disk_aio": "native"}, "disk_aio: native needs"),
        ({"disk_aio": "posix"}, "disk_aio"),
        ({"cpu_pin": True, "cpuset_cpus": "0", "cpus": 2}, "cpuset_cpus: 1 processors"),
        ({"memory_max": "0"}, "memory_max"),
        ({"memory_max": "5T"}, "memory_max"),
        ({"memory_max": "1G", "memory": "2G"}, "memory: is more"),
        ({"machine": "q35,kernel-irqchip=off"}, "machine"),
        ({"cpu_model": "max,help="}, "cpu_model"),
        ({"cpu_model": "+svm"}, "cpu_model"),
        ({"template": "perhaps"}, "template"),
    ],
)
def test_a_bad_option_of_a_machine_is_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=field):
        build("busybox", IMAGE, isolation="vm", **given)


@pytest.mark.parametrize(
    "given", [{"accel": "tcg"}, {"disk": "20G"}, {"kernel": "x"}, {"template": False}]
)
def test_a_container_has_no_options_of_a_machine(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=f"{next(iter(given))}.*virtual machines") as caught:
        build("busybox", IMAGE, **given)
    assert caught.value.hint is not None and "--vm" in caught.value.hint


def test_an_arrangement_says_how_many_there_are() -> None:
    nodes = ["cpus=0-1,memory=256M", "cpus=2,memory=256M"]
    resources = build("busybox", IMAGE, isolation="vm", numa=nodes).resources
    assert (resources.cpus, resources.memory) == (3, 512 << 20)
    sockets = "sockets=1,cores=2,threads=2"
    assert build("busybox", IMAGE, isolation="vm", cpu_topology=sockets).resources.cpus == 4
