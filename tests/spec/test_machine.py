"""The options that only a virtual machine has."""

from __future__ import annotations

from typing import Any

import pytest

from hutch.errors import InvalidArgument
from hutch.spec.build import build
from hutch.spec.defaults import ImageDefaults
from hutch.spec.model import MachineOptions

IMAGE = ImageDefaults(cmd=("sh",))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, MachineOptions()),
        ({"accel": "tcg"}, MachineOptions(accel="tcg")),
        ({"disk": "20G"}, MachineOptions(disk=20 << 30)),
        ({"cpus_max": "4", "cpus": 4}, MachineOptions(cpus_max=4)),
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
