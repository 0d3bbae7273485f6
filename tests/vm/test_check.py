"""What a root holds is read against its digests, and is in the account of disk use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from tests.cli.conftest import Cli
from tests.requires import requires
from tests.vm.bootdisks import sector_disk

pytestmark = [pytest.mark.integration, requires("root", "busybox", "mkfs.erofs")]


@pytest.fixture
def engine(hutch_root: Path) -> Iterator[Engine]:
    with Engine(hutch_root) as engine:
        engine.images.bootstrap("busybox")
        yield engine


def _flip(path: str | Path) -> None:
    """Change one bit in the middle of a file, as a disk that decays does."""
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_a_root_disk_that_decayed_is_told_and_made_anew(engine: Engine, hutch_root: Path) -> None:
    context = engine._context
    chain = context.images.get("busybox").chain_ids
    disk = context.rootdisks.ensure(chain)
    before = Path(disk).read_bytes()
    report = engine.check()
    assert (report.checked >= 2, report.damaged) == (True, ())
    _flip(disk)
    (damage,) = engine.check().damaged
    assert (damage.kind, damage.name) == ("root disk", chain[-1])
    cli = Cli(hutch_root)
    done = cli("system", "check", "-q")
    assert (done.returncode, b"1 damaged" in done.stdout) == (1, True)
    assert b"made anew" in cli("system", "check", "-q", "--repair").stdout
    assert Path(context.rootdisks.ensure(chain)).read_bytes() == before
    assert engine.check().damaged == ()


def test_a_blob_that_decayed_is_told(engine: Engine) -> None:
    content = engine._context.content
    largest = max(content.list(), key=lambda blob: blob.size)
    _flip(content.path(largest.digest))
    report = engine.check(repair=True)
    assert [(one.kind, one.name) for one in report.damaged] == [("blob", largest.digest)]
    assert report.repaired == ()


@requires("qemu-img", "qemu", "cc")
def test_a_machine_s_disk_with_broken_tables_is_told(engine: Engine, tmp_path: Path) -> None:
    base = sector_disk(tmp_path / "base.raw")
    with engine.machines.create(base, size="64M", memory="128M", network="none") as machine:
        assert engine.check().damaged == ()
        rows = {row.kind: row for row in engine.df().rows}
        assert rows["instances"].size > 0
        kept = machine.snapshot()
        rows = {row.kind: row for row in engine.df().rows}
        assert (rows["snapshots"].total, rows["snapshots"].size > 0) == (1, True)
        with open(Path(machine.info().directory, "disk.qcow2"), "r+b") as file:
            file.seek(0x30000)  # the table of clusters
            file.write(b"\x80\0\0\0\0\0\xff\xff" * 8)
        (damage,) = engine.check().damaged
        assert (damage.kind, damage.name) == ("disk", machine.name)
        engine.snapshots.remove(f"{machine.name}/{kept.tag}")
        assert {row.kind: row for row in engine.df().rows}["snapshots"].size == 0
