"""Guarantees on a real hierarchy of version 2: the kernel keeps what was promised, whoever grows,
and takes back exactly from whom it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.linux.cgroup.reclaim import is_precise, read_memory, reclaim
from tests.requires import requires
from tests.resources.test_pressure import MIB, did, files, hold, ladder, small, start, usage

__all__ = ["small"]

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox", "cgroup-v2-memory"),
    pytest.mark.integration,
]


def test_an_amount_is_taken_back_and_not_all(small: Engine) -> None:
    box = start(small, "greedy", files(80))
    group = small._context.groups.hierarchy.load(box.id)
    assert is_precise(group.directories)
    given = reclaim(group.directories, 20 * MIB)
    # The kernel takes in batches, and older ones go well beyond.
    assert 18 * MIB < given < 60 * MIB
    assert read_memory(group.directories).cache > 10 * MIB


def test_the_growth_of_one_takes_nothing_of_what_another_was_promised(small: Engine) -> None:
    """All have 192 MiB together: what a hog reads and writes beyond that is taken from itself."""
    start(small, "kept", files(60), memory_reservation="80M")
    before = usage(small, "kept")
    hog = start(small, "hog")
    for name in ("a", "b", "c"):
        assert hog.exec(["sh", "-c", files(90).replace("/tmp/file", f"/tmp/{name}")]).exit_code == 0
    assert usage(small, "kept") > before - 4 * MIB


def test_pressure_from_outside_spares_what_was_promised(small: Engine) -> None:
    """The promise counts above the group of all instances too, as `memory.low` does only where
    the groups above have it."""
    kept = start(small, "kept", files(60), memory_reservation="80M")
    start(small, "other", files(60))
    parent = Path(small._context.groups.hierarchy.parent[""])
    assert (parent / "memory.low").read_text().strip() == str(80 * MIB)
    before = usage(small, "kept")
    assert reclaim({"": str(parent)}, 50 * MIB) > 40 * MIB
    assert usage(small, "other") < 30 * MIB
    assert usage(small, "kept") > before - 4 * MIB
    kept.remove(force=True)
    assert (parent / "memory.low").read_text().strip() == "0"


def test_a_strict_promise_is_kept_though_another_is_killed_for_it(small: Engine) -> None:
    """With `memory.low` the kernel takes from the protected before it kills; not with `min`."""
    kept = start(small, "kept", files(60), memory_min="80M")
    parent = Path(small._context.groups.hierarchy.parent[""])
    assert (parent / "memory.min").read_text().strip() == str(80 * MIB)
    before = usage(small, "kept")
    hog = start(small, "hog")
    grow = "x=$(head -c 160000000 /dev/zero | tr '\\0' x); echo ${#x}"
    assert hog.exec(["sh", "-c", grow]).text.strip() != "160000000"
    assert usage(small, "kept") > before - 4 * MIB
    assert kept.exec(["echo", "here"]).text == "here\n"
    kept.update(memory_min="6M")
    assert (parent / "memory.min").read_text().strip() == str(6 * MIB)


def test_the_ladder_takes_as_much_as_is_missing(small: Engine) -> None:
    ladder(small, "cache")
    start(small, "kept", files(40), memory_reservation="64M")
    start(small, "greedy", f"{hold(30)}; {files(80)}")
    before = usage(small, "kept")
    done = small.resources.reclaim()
    assert did(done) == [("cache", "greedy")] and done.after.level == "none"
    assert usage(small, "kept") > before - 4 * MIB
