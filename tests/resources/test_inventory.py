"""What is read of sysfs and procfs, on hosts of several shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hutch.errors import InvalidArgument
from hutch.resources.cpulist import format_cpulist, parse_cpulist
from hutch.resources.inventory import HugePages, read_inventory
from tests.resources.trees import GIB, host, write


def test_one_node_without_threads(tmp_path: Path) -> None:
    found = host(tmp_path, cpus=4, memory=8 * GIB)
    assert found.cpu_ids == {0, 1, 2, 3}
    assert [cpu.core for cpu in found.cpus] == [0, 1, 2, 3]
    assert {cpu.cache for cpu in found.cpus} == {0}
    assert [node.cpus for node in found.nodes] == [(0, 1, 2, 3)]
    assert found.memory == 8 * GIB and found.available == 4 * GIB


def test_two_nodes_with_two_threads_a_core(tmp_path: Path) -> None:
    found = host(tmp_path, cpus=16, nodes=2, threads=2)
    assert found.threads_per_core == 2
    assert [node.cpus for node in found.nodes] == [
        (0, 1, 2, 3, 8, 9, 10, 11),
        (4, 5, 6, 7, *range(12, 16)),
    ]
    by_id = {cpu.id: cpu for cpu in found.cpus}
    assert by_id[8].core == 0 and by_id[15].core == 7
    assert by_id[3].package == 0 and by_id[12].package == 1
    assert found.nodes[1].distances == (21, 10)
    assert found.nodes[0].memory == 4 * GIB


def test_core_complexes_share_a_cache_each(tmp_path: Path) -> None:
    # As an EPYC: one package, one node, four complexes of four cores.
    found = host(tmp_path, cpus=32, threads=2, cache_cores=4)
    complexes = {cpu.cache for cpu in found.cpus}
    assert complexes == {0, 4, 8, 12}
    assert {cpu.id for cpu in found.cpus if cpu.cache == 4} == {4, 5, 6, 7, 20, 21, 22, 23}


def test_processors_that_are_off_are_not_given_out(tmp_path: Path) -> None:
    found = host(tmp_path, cpus=8, threads=2, online="0-2,4-6")
    assert found.cpu_ids == {0, 1, 2, 4, 5, 6} and found.offline == (3, 7)
    # The twin of a thread that is off is a core of its own.
    shrunk = host(tmp_path / "b", cpus=4, threads=2, online="0-2")
    assert {cpu.id: cpu.core for cpu in shrunk.cpus} == {0: 0, 1: 1, 2: 0}


def test_a_cpuset_bounds_what_there_is(tmp_path: Path) -> None:
    found = host(tmp_path, cpus=8, nodes=2, allowed="2-5")
    assert found.cpu_ids == {2, 3, 4, 5} and found.forbidden == (0, 1, 6, 7)
    assert [node.cpus for node in found.nodes] == [(2, 3), (4, 5)]
    narrower = read_inventory(tmp_path / "sys", tmp_path / "proc", cpuset="6-7", mems="1")
    assert narrower.cpu_ids == {6, 7} and [node.id for node in narrower.nodes] == [1]


def test_huge_pages_by_size(tmp_path: Path) -> None:
    found = host(tmp_path, cpus=2, huge=[(1 << 30, 2, 1), (2 << 20, 64, 64)])
    assert found.huge == (
        HugePages(size=2 << 20, total=64, free=64),
        HugePages(size=1 << 30, total=2, free=1),
    )


def test_a_kernel_that_tells_little_has_one_node_of_single_threads(tmp_path: Path) -> None:
    write(tmp_path, "sys/devices/system/cpu/online", "0-1")
    write(tmp_path, "proc/meminfo", "MemTotal: 1024 kB\nMemFree: 512 kB")
    found = read_inventory(tmp_path / "sys", tmp_path / "proc")
    assert [(cpu.id, cpu.core, cpu.node) for cpu in found.cpus] == [(0, 0, 0), (1, 1, 0)]
    assert found.available == 512 << 10 and len(found.nodes) == 1


def test_this_host_can_be_read() -> None:
    found = read_inventory(rooms=("/",))
    assert found.cpus and found.memory >= found.available > 0 and found.rooms[0].total > 0


@pytest.mark.parametrize(
    ("text", "numbers"), [("", ()), ("0", (0,)), ("0-3,8\n", (0, 1, 2, 3, 8)), ("5,1-2", (1, 2, 5))]
)
def test_lists_of_processors(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_cpulist(text) == numbers
    assert parse_cpulist(format_cpulist(numbers)) == numbers


@pytest.mark.parametrize("text", ["a", "3-1", "1-", "-1", "99999999999", "²"])
def test_a_list_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_cpulist(text)
