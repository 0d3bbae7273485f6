"""What stands in the way of a machine that runs is named at once, with the cure."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from hutch.drivers.moving import Streams
from hutch.engine import Engine, migrate_live
from hutch.engine.lookup import load
from hutch.engine.migrate_check import _check_room
from hutch.engine.migrate_machines import _processor
from hutch.engine.migrate_send import Sender
from hutch.engine.records import SUSPENDED, InstanceRecord
from hutch.errors import Busy, Unsupported, WrongState
from hutch.host.processors import HostProcessor
from hutch.lifecycle import State
from hutch.migration.messages import Live, Offer
from hutch.migration.wire import Wire
from hutch.records import silent
from hutch.storage.snapshots import DISK_FILE
from tests.migration.conftest import Other
from tests.requires import live_qemu, requires

pytestmark = [
    requires("root", "qemu", "live-qemu", "apt-mirror", "busybox", "cgroup", "netns", "erofs"),
    requires("mke2fs", "nftables", "seccomp"),
    pytest.mark.integration,
    pytest.mark.timeout(600),
]


def live(cpu: str, **more: object) -> Live:
    return Live(streams=Streams(), disk_size=1, cpu=cpu, **more)  # type: ignore[arg-type]


def test_processors_that_the_target_has_not_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = HostProcessor(vendor="GenuineIntel", flags=("fpu", "sse2"))
    monkeypatch.setattr("hutch.engine.migrate_machines.host_processor", lambda: here)
    qemu = str(live_qemu())
    there = HostProcessor(vendor="AuthenticAMD", flags=("fpu", "sse2", "avx2"))
    found = list(_processor(live("host", accelerator="kvm", processor=there), qemu))
    assert "AuthenticAMD" in found[0]
    assert "avx2" in found[1]
    assert "--cpu-model" in found[1]
    model = live("Skylake-Server,-erms", accelerator="tcg", lacking=("avx512f",))
    (said,) = _processor(model, qemu)
    assert "avx512bw" in said
    assert "avx512f," not in said
    (said,) = _processor(live("no-such", accelerator="tcg"), qemu)
    assert "no-such is not known" in said
    assert list(_processor(live("max", accelerator="tcg", processor=there), qemu)) == []


def test_everything_that_holds_a_machine_is_named_and_it_runs_on(
    source: Engine, target: Other, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with a directory of the host, in a network that the target lacks, which has another
    QEMU; and while one that can go is on its way, nobody stops it."""
    monkeypatch.setenv("HUTCH_QEMU", str(live_qemu()))
    source.networks.create("only-here")
    holding = source.start(
        "busybox",
        ["sleep", "1000"],
        name="holding",
        isolation="vm",
        memory="128M",
        volumes=[f"{tmp_path}:/data"],
        network="only-here",
    )
    try:
        other = target.destination.replace("exec:", "exec:env -u HUTCH_QEMU ")
        with pytest.raises(WrongState) as caught:
            source.migrate("holding", other)
        said = caught.value.message
        assert str(tmp_path) in said
        assert "network only-here is not at the target (make it there" in said
        assert "QEMU" in said
        assert holding.info().state == "running"
        assert holding.exec(["ls", "/data"]).exit_code == 0
    finally:
        holding.remove(force=True)
        source.networks.remove("only-here")


def test_a_machine_under_way_is_busy_and_answers(
    source: Engine, target: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUTCH_QEMU", str(live_qemu()))
    box = source.start("busybox", ["sleep", "1000"], name="moved", isolation="vm", memory="128M")
    real = migrate_live._Journey.copy_memory
    busy: list[str] = []

    def look(self: migrate_live._Journey) -> None:
        for change in (box.stop, box.pause, lambda: box.remove(force=True)):
            with pytest.raises(Busy, match="is being migrated") as caught:
                change()
            busy.append(caught.value.hint or "")
        assert box.info().state == "running"
        assert box.exec(["true"]).exit_code == 0
        real(self)

    monkeypatch.setattr(migrate_live._Journey, "copy_memory", look)
    source.migrate("moved", target.destination)
    assert len(busy) == 3
    target.hutch("rm", "-f", "moved")


def test_what_only_a_copy_while_it_runs_has_is_refused_of_one_that_cannot(
    source: Engine, target: Other
) -> None:
    box = source.create("busybox", ["true"], name="moved")
    try:
        with pytest.raises(Unsupported, match="CRIU saves its memory as a whole"):
            source.migrate("moved", target.destination, post_copy=True)
    finally:
        box.remove()


def offered(engine: Engine, record: InstanceRecord) -> Offer:
    sender = Sender(engine._context, cast(Wire, None), record, progress=silent)
    assert sender.prepare("token", with_volumes=False) == []
    return sender.offer


def test_the_room_asked_for_is_what_is_allocated(source: Engine, tmp_path: Path) -> None:
    """Not what a disk could hold; a suspended memory once; all of a disk that a twin shares."""
    box = source.create("busybox", ["true"], name="moved", isolation="vm", disk="20G")
    try:
        record = load(source._context, box.id)
        directory = source._context.directory(box.id)
        empty = offered(source, record).size
        assert 0 < empty < 64 << 20
        os.link(directory / DISK_FILE, tmp_path / "a twin's")
        assert offered(source, record).size == empty
        (directory / SUSPENDED).mkdir()
        (directory / SUSPENDED / "memory").write_bytes(b"m" * (8 << 20))
        suspended = msgspec.structs.replace(record, state=State.SUSPENDED)
        grown = offered(source, suspended).size - empty
        assert 8 << 20 <= grown < 9 << 20
    finally:
        box.remove()


def test_a_target_with_too_little_room_is_told(
    source: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = source.create("busybox", ["true"], name="moved", isolation="vm")
    try:
        offer = msgspec.structs.replace(
            offered(source, load(source._context, box.id)), size=1 << 30
        )
        wanted = (1 << 30) + (offer.kernel.size if offer.kernel else 0)
        enough = wanted + wanted // 16 + (64 << 20)
        found: list[str] = []
        for free in (enough, enough - 1):
            status = SimpleNamespace(f_bavail=free, f_frsize=1)
            monkeypatch.setattr(os, "statvfs", lambda _, status=status: status)
            _check_room(source._context, offer, True, found)
        assert found == [f"it needs {enough} bytes of disk, the target has {enough - 1} free"]
    finally:
        monkeypatch.undo()
        box.remove()
