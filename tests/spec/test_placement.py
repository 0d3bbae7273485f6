"""Where an instance is to run, and devices by name."""

from __future__ import annotations

import pytest

from hutch.errors import InvalidArgument
from hutch.spec.build import ImageDefaults, build
from hutch.spec.model import DeviceNode, InstanceSpec, Placement
from hutch.spec.placement import parse_gpus, read_placement


def spec(**options: object) -> InstanceSpec:
    return build("i", ImageDefaults(), ["true"], **options)  # type: ignore[arg-type]


def test_a_placement_from_text_and_from_a_mapping() -> None:
    wanted = Placement(
        cpus="exclusive", numa="single", smt="full", fit="best", huge={2 << 20: 64 << 20}
    )
    text = "cpus=exclusive,numa=single,smt=full,fit=best,huge=2M:64M"
    assert read_placement(text) == wanted
    given = dict(part.split("=") for part in text.split(","))
    assert read_placement(given) == wanted
    assert spec(placement=text).placement == read_placement(wanted)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cpus",
        "cpus=some",
        "cpu=shared",
        "huge=",
        "huge=2M:",
        "huge=2M:0",
        "huge=3M:6M",
        "huge=2M:3M",
        "huge=4k:8k",
    ],
)
def test_a_wrong_placement_names_its_key(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_placement(text)
    assert (caught.value.field or "").startswith("placement")


def test_merging_is_asked_for_by_machines() -> None:
    assert spec(isolation="vm", placement="merge=on").placement.merge
    assert not spec(isolation="vm", placement={"merge": False}).placement.merge
    for options in ({"placement": "merge=on"}, {"isolation": "vm", "placement": "merge=maybe"}):
        with pytest.raises(InvalidArgument, match=r"placement\.merge"):
            spec(**options)


def test_memory_made_ahead_is_for_machines() -> None:
    assert spec(isolation="vm", placement="prealloc=on").placement.prealloc
    with pytest.raises(InvalidArgument, match=r"placement\.prealloc"):
        spec(placement="prealloc=on")


def test_huge_pages_without_an_amount_are_all_of_a_machines_memory() -> None:
    assert read_placement("huge=2M").huge == {2 << 20: 0}


def test_devices_by_path_and_by_name() -> None:
    found = spec(devices=["/dev/null:/dev/x:r", "nvidia.com/gpu=0", "vfio=0000:01:00.0"])
    assert found.devices == (DeviceNode(source="/dev/null", target="/dev/x", permissions="r"),)
    assert found.device_names == ("nvidia.com/gpu=0", "vfio=0000:01:00.0")


@pytest.mark.parametrize("name", ["gpu=0", "nvidia.com/gpu=", "vfio=1:0", "a/b=c/../d"])
def test_a_device_that_is_neither_path_nor_name(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        spec(devices=[name])
    assert (caught.value.field or "").startswith("devices[0]")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("all", "all"),
        (-1, "all"),
        (2, "2"),
        ("count=2", "2"),
        ("device=0,1", "device=0,1"),
        ('"device=0,1"', "device=0,1"),
        ("all,capabilities=utility", "all"),
    ],
)
def test_gpus_as_docker_writes_them(text: object, wanted: str) -> None:
    assert parse_gpus(text) == wanted


@pytest.mark.parametrize("text", ["", "none", "0", "device=", "device=../x", "1.5"])
def test_wrong_gpus(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_gpus(text)
