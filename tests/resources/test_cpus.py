"""Which processors an instance gets to itself: the rules of the kubelet's static policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.resources.cpus import CpuRequest, candidates, choose_cpus, kept_for_host, shared_pool
from hutch.resources.inventory import Cpu, Inventory, Node
from tests.resources.trees import host


def made(packages: int, cores: int, threads: int, *, caches: int = 1) -> Inventory:
    """A host in memory: a node a package, threads of a core half the numbers apart."""
    total = packages * cores
    cpus = tuple(
        Cpu(
            id=core + t * total,
            core=core,
            cache=core // max(1, cores // caches) * max(1, cores // caches),
            node=core // cores,
            package=core // cores,
        )
        for t in range(threads)
        for core in range(total)
    )
    nodes = tuple(
        Node(id=n, cpus=tuple(c.id for c in cpus if c.node == n), memory=1, free=1)
        for n in range(packages)
    )
    return Inventory(cpus=cpus, nodes=nodes, memory=1, available=1)


def take(
    inventory: Inventory, count: int, *, without: tuple[int, ...] = (), **how: object
) -> tuple[int, ...]:
    free = inventory.cpu_ids - set(without)
    return choose_cpus(inventory, free, CpuRequest(count=count, **how)).cpus  # type: ignore[arg-type]


def test_a_core_is_taken_whole_before_single_threads() -> None:
    two = made(1, 4, 2)
    assert take(two, 2) == (0, 4)
    assert take(two, 3) == (0, 1, 4)
    # One thread goes to a core that is broken already.
    assert take(two, 1, without=(1,)) == (5,)


def test_a_package_is_taken_whole_before_cores_of_several() -> None:
    two = made(2, 4, 2)
    assert take(two, 8) == (0, 1, 2, 3, 8, 9, 10, 11)
    assert take(two, 8, without=(0,)) == (4, 5, 6, 7, 12, 13, 14, 15)
    assert take(two, 10)[:4] == (0, 1, 2, 3)


def test_what_fits_under_one_cache_stays_there() -> None:
    ccx = made(1, 16, 2, caches=4)
    assert {number % 16 // 4 for number in take(ccx, 6, without=(0, 1))} == {1}
    assert {number % 16 // 4 for number in take(ccx, 12)} == {0, 1}


def test_one_node_is_kept_to_where_that_is_asked_for() -> None:
    two = made(2, 2, 1)
    assert take(two, 3, numa="single") == ()
    assert choose_cpus(two, two.cpu_ids, CpuRequest(count=3, numa="single")).reason == (
        "2 at most on one node"
    )
    assert len(take(two, 3, numa="prefer")) == 3
    assert take(two, 2, numa="prefer", without=(0,)) == (2, 3)


def test_whole_cores_or_nothing() -> None:
    two = made(1, 4, 2)
    assert take(two, 3, full_cores=True) == ()
    assert take(two, 2, full_cores=True, without=(0, 1, 2)) == (3, 7)
    assert take(two, 4, full_cores=True, without=(0, 1, 2)) == ()


@pytest.mark.parametrize(
    ("fit", "node"), [("first", 0), ("best", 1), ("worst", 2), ("pack", 1), ("spread", 2)]
)
def test_which_node_a_policy_takes(fit: str, node: int) -> None:
    three = made(3, 4, 1)
    taken = take(three, 2, fit=fit, without=(0, 4, 5))
    assert {number // 4 for number in taken} == {node}


def test_spread_over_the_nodes() -> None:
    assert take(made(2, 4, 2), 8, numa="any", fit="spread") == (0, 1, 4, 5, 8, 9, 12, 13)


def test_what_it_has_stays_with_it() -> None:
    two = made(2, 4, 1)
    grown = choose_cpus(two, frozenset({1, 2, 6, 7}), CpuRequest(count=3), own=(4, 5))
    assert grown.cpus == (4, 5, 6)
    assert choose_cpus(two, frozenset({0}), CpuRequest(count=1), own=(4, 5)).cpus == (4,)
    assert choose_cpus(two, frozenset(), CpuRequest(count=3), own=(4, 5)).cpus == ()


def test_one_processor_is_always_left_to_share() -> None:
    four = made(1, 4, 1)
    assert kept_for_host(four, 0) == {0} and kept_for_host(four, 1.5) == {0, 1}
    free = candidates(four, exclusive=[1], pinned=[2], reserved=0)
    assert free == {3}
    assert shared_pool(four, [1, 3]) == (0, 2)


def test_the_thread_of_a_forbidden_twin_is_no_whole_core(tmp_path: Path) -> None:
    found = host(tmp_path, cpus=8, threads=2, allowed="0-3,5-7")
    assert take(found, 2, full_cores=True, without=(1, 5)) == (2, 6)


@settings(deadline=None)
@given(
    packages=st.integers(1, 3),
    cores=st.integers(1, 6),
    threads=st.integers(1, 2),
    data=st.data(),
)
def test_exactly_what_was_asked_for_or_nothing(
    packages: int, cores: int, threads: int, data: st.DataObject
) -> None:
    inventory = made(packages, cores, threads)
    free = frozenset(data.draw(st.sets(st.sampled_from(sorted(inventory.cpu_ids)))))
    request = CpuRequest(
        count=data.draw(st.integers(1, packages * cores * threads)),
        numa=data.draw(st.sampled_from(["any", "prefer", "single"])),
        full_cores=data.draw(st.booleans()),
        fit=data.draw(st.sampled_from(["first", "best", "worst", "pack", "spread"])),
    )
    taken = choose_cpus(inventory, free, request)
    assert set(taken.cpus) <= free
    if taken.cpus:
        assert len(taken.cpus) == len(set(taken.cpus)) == request.count
    elif request.numa != "single" and not request.full_cores:
        assert len(free) < request.count
    if taken.cpus and request.numa == "single":
        assert len(taken.nodes) == 1
    if taken.cpus and request.full_cores:
        assert all(
            c.id in taken.cpus
            for c in inventory.cpus
            if c.core in {o.core for o in inventory.cpus if o.id in taken.cpus}
        )
