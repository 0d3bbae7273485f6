"""`hutch vm kernel`: kernels come, are listed, and go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.vm.elves import kernel, own_kernel


@pytest.fixture
def own(hutch_root: Path) -> Cli:
    """The command line on an empty root."""
    return Cli(hutch_root)


def test_the_life_of_a_guest_kernel(own: Cli, tmp_path: Path) -> None:
    image, modules = own_kernel(tmp_path / "own", kernel(release="6.9.1-cli"))
    added = own("vm", "kernel", "add", "--file", str(image), "--modules", str(modules))
    assert added.stdout == b"6.9.1-cli\n"
    assert b"6.9.1-cli: storing" in added.stderr
    header, row = own.out("vm", "kernel", "ls").splitlines()[:2]
    assert header.split("  ")[0] == "KERNEL ID"
    assert "6.9.1-cli" in row
    (found,) = json.loads(own.out("vm", "kernel", "ls", "-o", "json"))
    assert (found["Release"], len(found["ID"]), found["UsedBy"]) == ("6.9.1-cli", 64, 0)
    assert "Kernels" in own.out("df")
    assert own.out("vm", "kernel", "rm", found["ID"][:12]) == "6.9.1-cli\n"
    assert own("vm", "kernel", "rm", "6.9.1-cli").returncode == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--file", "x"], "modules: a kernel of one's own needs its modules"),
        (["--modules", "x"], "modules: goes with a file"),
        (["--file", "x", "--modules", "y", "linux-image-1"], "package: give a package or a file"),
        (["bash"], "package: expected a package linux-image-"),
    ],
)
def test_a_kernel_that_cannot_be_meant_is_refused(own: Cli, options: list[str], words: str) -> None:
    done = own("vm", "kernel", "add", *options)
    assert done.returncode != 0
    assert words in done.stderr.decode()


def test_a_group_within_a_group_has_help(own: Cli) -> None:
    assert "Usage: hutch vm kernel COMMAND" in own.out("vm", "kernel", "--help")
    assert "kernel add" in own.out("vm", "--help")
    assert b"did you mean `hutch vm kernel ls`?" in own("vm", "kernel", "lss").stderr
    assert own.out("_complete", "--", "vm", "kernel", "").split() == ["add", "ls", "rm"]
