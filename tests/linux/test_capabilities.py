"""Capability names, Docker's rules for adding and dropping, and the sets of processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.errors import InvalidArgument
from hutch.linux import capabilities
from hutch.linux.capabilities import CAPABILITIES, DEFAULT, from_mask, parse, to_mask

ALL = (1 << 41) - 1


def mask(*names: str) -> int:
    return to_mask(f"CAP_{name}" for name in names)


def test_numbers_are_those_of_the_kernel() -> None:
    assert CAPABILITIES["CAP_CHOWN"] == 0
    assert CAPABILITIES["CAP_SYS_ADMIN"] == 21
    assert CAPABILITIES["CAP_SETFCAP"] == 31
    assert CAPABILITIES["CAP_CHECKPOINT_RESTORE"] == 40


def test_the_default_is_dockers_fourteen() -> None:
    assert len(DEFAULT) == 14
    assert parse(last=40) == 0xA80425FB


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        (["NET_ADMIN"], [], to_mask(DEFAULT) | mask("NET_ADMIN")),
        (["cap_net_admin"], [], to_mask(DEFAULT) | mask("NET_ADMIN")),
        ([], ["CHOWN"], to_mask(DEFAULT) & ~mask("CHOWN")),
        ([], ["ALL"], 0),
        (["KILL"], ["ALL"], mask("KILL")),
        (["ALL"], [], ALL),
        (["CAP_ALL"], ["SYS_ADMIN"], ALL & ~mask("SYS_ADMIN")),
        (["ALL"], ["ALL"], ALL),
        (["CHOWN"], ["CHOWN"], to_mask(DEFAULT)),
    ],
)
def test_adding_and_dropping(add: list[str], drop: list[str], expected: int) -> None:
    assert parse(add, drop, last=40) == expected


def test_privileged_has_all_that_the_kernel_knows() -> None:
    assert parse((), ["CHOWN"], privileged=True, last=37) == (1 << 38) - 1


def test_what_the_kernel_does_not_know_is_left_out() -> None:
    assert parse(["CHECKPOINT_RESTORE"], ["ALL"], last=37) == 0


@pytest.mark.parametrize(
    ("add", "drop", "field"),
    [(["KILL", "FLY"], [], "cap_add[1]"), ([], [""], "cap_drop[0]"), ([3], [], "cap_add[0]")],
)
def test_an_unknown_name_is_refused_with_its_place(
    add: list[str], drop: list[str], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(add, drop)
    assert caught.value.field == field


def test_names_and_masks_are_inverse() -> None:
    assert to_mask(from_mask(ALL)) == ALL
    assert set(from_mask(to_mask(DEFAULT))) == set(DEFAULT)


def test_own_sets_come_from_proc(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/status").write_text("Name:\tx\nCapInh:\t01\nCapPrm:\t03\nCapBnd:\tff\n")
    sets = capabilities.own_sets(7, proc=str(tmp_path))
    assert (sets.inheritable, sets.permitted, sets.effective, sets.bounding) == (1, 3, 0, 255)


def test_the_kernels_highest_number() -> None:
    assert capabilities.last_capability() >= 37
    own = capabilities.own_sets()
    assert own.effective & ~own.permitted == 0
    if os.geteuid() == 0:
        assert own.effective & mask("CHOWN")
