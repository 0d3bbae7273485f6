"""Volumes under running instances: kept consistent while they are read, closed after their last
use, full for the writer alone; and everything as before after the storm."""

from __future__ import annotations

import io
import os
import tarfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.errors import Busy, HutchError, WrongState
from hutch.storage import diskimages
from hutch.testing import ensure_image
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox", "mke2fs", "loop"),
    pytest.mark.integration,
]

MIB = 1 << 20


@pytest.fixture
def name(hutch_engine: Engine) -> Iterator[str]:
    """A fresh name for a volume and its pool, which are gone at the end."""
    chosen = f"v{uuid.uuid4().hex[:12]}"
    ensure_image(hutch_engine, "busybox")
    yield chosen
    for volume in hutch_engine.volumes.list({"name": [chosen]}):
        for user in hutch_engine.volumes.users(volume.name):
            hutch_engine.get(user).remove(force=True)
        hutch_engine.volumes.remove(volume.name)
    for pool in hutch_engine.pools.list():
        if pool.name == chosen:
            hutch_engine.pools.remove(chosen)


@requires("btrfs")
@pytest.mark.soak
def test_a_disk_hog_beside_a_protected_instance(hutch_engine: Engine, name: str) -> None:
    engine = hutch_engine
    pool = engine.pools.create(name, "btrfs", size="256M")
    for part in ("hog", "kept"):
        engine.volumes.create(f"{name}-{part}", pool=name, size="64M")
    written = "while :; do echo line >> /data/log || echo lost; done"
    with engine.start(
        "busybox",
        ["sh", "-c", written],
        network="none",
        mounts=[f"type=volume,src={name}-kept,dst=/data"],
    ) as kept:
        hog = engine.run(
            "busybox",
            ["sh", "-c", "while dd if=/dev/zero of=/data/$((i+=1)) bs=1M count=16; do :; done"],
            network="none",
            mounts=[f"type=volume,src={name}-hog,dst=/data"],
        )
        assert hog.exit_code == 0 and b"quota exceeded" in hog.stderr
        before = int(kept.exec(["stat", "-c", "%s", "/data/log"]).text)
        deadline = time.monotonic() + 200
        while int(kept.exec(["stat", "-c", "%s", "/data/log"]).text) == before:
            assert time.monotonic() < deadline
        kept.kill()
        kept.wait()
        assert not [record for record in kept.logs() if b"lost" in record.data]
    full = engine.pools.get(name)
    engine.volumes.remove(f"{name}-hog")
    engine.volumes.remove(f"{name}-kept")
    engine.pools.trim(name)
    after = engine.pools.get(name)
    assert after.used < full.used - 32 * MIB and after.allocated < full.allocated
    assert after.kind == pool.kind and after.volumes == ()


@requires("fuse", "qemu-img")
def test_an_encrypted_volume_is_open_while_it_is_used(
    hutch_engine: Engine, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diskimages, "_GUESS_MS", 10)
    engine = hutch_engine
    (tmp_path / "key").write_text("swordfish\n")
    volume = engine.volumes.create(name, size="64M", key=str(tmp_path / "key"))
    mount = [f"type=volume,src={name},dst=/data"]
    assert not os.path.exists(volume.path)
    options: dict[str, object] = {"network": "none", "mounts": mount}
    with engine.start("busybox", ["sleep", "1000"], **options) as one:  # type: ignore[arg-type]
        one.exec(["sh", "-c", "echo text > /data/f"])
        assert Path(volume.path, "f").read_text() == "text\n"
        seen = engine.run("busybox", ["cat", "/data/f"], **options)  # type: ignore[arg-type]
        assert seen.text == "text\n" and os.path.exists(volume.path)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                assert b"swordfish" not in (process / "cmdline").read_bytes()
                assert b"swordfish" not in (process / "environ").read_bytes()
            except OSError:
                continue
    assert not os.path.exists(volume.path)
    (tmp_path / "key").unlink()
    with pytest.raises(HutchError, match="no such file"):
        engine.run("busybox", ["true"], **options)  # type: ignore[arg-type]
    assert not os.path.exists(volume.path)


@requires("fuse", "qemu-img")
def test_a_key_that_is_held_opens_a_volume_for_starts(
    hutch_engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diskimages, "_GUESS_MS", 10)
    engine = hutch_engine
    path = engine.volumes.create(name, size="64M", key=b"swordfish").path
    options: dict[str, object] = {
        "network": "none",
        "mounts": [f"type=volume,src={name},dst=/data"],
    }
    assert engine.run("busybox", ["touch", "/data/f"], **options).exit_code == 0  # type: ignore[arg-type]
    engine.volumes.close(name)
    with pytest.raises(WrongState, match="key is not at hand"):
        engine.run("busybox", ["true"], **options)  # type: ignore[arg-type]
    assert os.listdir(engine.volumes.open(name, key=b"swordfish").path) == ["f"]
    engine.volumes.close(name)
    assert not os.path.exists(path)


@pytest.mark.parametrize("size", ["", "64M"])
def test_a_backup_of_a_volume_in_use_is_of_one_moment(
    hutch_engine: Engine, name: str, size: str
) -> None:
    """A writer keeps two files alike; a reader that lets it go on would find them different."""
    engine = hutch_engine
    engine.volumes.create(name, size=size or 0)
    script = "i=0; while :; do i=$((i+1)); echo $i > /data/a; echo $i > /data/z; done"
    with engine.start(
        "busybox",
        ["sh", "-c", script],
        network="none",
        mounts=[f"type=volume,src={name},dst=/data"],
    ) as writer:
        path = Path(engine.volumes.get(name).path)
        deadline = time.monotonic() + 200
        while not (path / "z").exists():
            assert time.monotonic() < deadline
        for _ in range(3):
            out = io.BytesIO()
            engine.volumes.backup(name, out)
            with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
                one, other = (int(_read(tar, f"data/{n}") or 0) for n in "az")
            # Between the two writes, or within one (truncated).
            assert one - other in (0, 1) or 0 in (one, other)
            assert writer.info().state == "running"
        engine.volumes.snapshot(name, "s")
        engine.volumes.clone(name, f"{name}-twin")
        before, deadline = (path / "a").read_text(), time.monotonic() + 200
        while (path / "a").read_text() in (before, ""):
            assert time.monotonic() < deadline
        with pytest.raises(Busy):
            engine.volumes.remove(name)


def _read(tar: tarfile.TarFile, member: str) -> bytes:
    found = tar.extractfile(member)
    assert found is not None
    return found.read()


def test_who_was_paused_by_a_process_that_was_killed_goes_on(
    hutch_engine: Engine, name: str
) -> None:
    from hutch.engine import quiet

    engine = hutch_engine
    engine.volumes.create(name)
    with engine.start(
        "busybox",
        ["sleep", "1000"],
        network="none",
        mounts=[f"type=volume,src={name},dst=/data"],
    ) as box:
        box.pause()
        mark = quiet._Pause(pid=1, started=0, boot_id=engine._context.boot_id)
        with engine._context.store.write() as tx:
            tx.put("volume_pauses", box.id, mark)
        engine.reconcile()
        assert box.info().state == "running"
