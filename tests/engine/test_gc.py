"""Collection by policy: age, watermarks, and what is never touched."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine, gc
from hutch.errors import InvalidArgument
from tests.requires import requires

MIB = 1 << 20


def image(engine: Engine, name: str) -> None:
    """An image with a file of a megabyte."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("f")
        entry.size = MIB
        tar.addfile(entry, io.BytesIO(os.urandom(MIB)))
    buffer.seek(0)
    engine.images.import_(buffer, name)


@pytest.fixture
def engine(hutch_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine with the images a, b, c, used in this order, on a disk of a hundred bytes."""
    with Engine(hutch_root) as made:
        for name in ("a", "b", "c"):
            image(made, name)
        now = time.time()
        for age, name in enumerate(("c", "b", "a")):
            identifier = made.images.get(name).id
            with made._context.store.write() as tx:
                tx.put("image_uses", identifier, gc._Use(used_at=now + 100 - age))
        yield made


def names(engine: Engine) -> list[str]:
    return sorted(
        n.rpartition("/")[2].partition(":")[0] for i in engine.images.list() for n in i.names
    )


def test_by_itself_no_image_goes(engine: Engine) -> None:
    report = engine.gc()
    assert report.images == () and report.reached and names(engine) == ["a", "b", "c"]


def test_images_go_in_the_order_of_their_last_use_until_the_low_mark(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {3: 91.0, 2: 84.0, 1: 70.0, 0: 60.0}
    monkeypatch.setattr(gc, "used_share", lambda _: full[len(names(engine))])
    foretold = engine.gc(watermark=90, low=80, dry_run=True)
    assert foretold.images[0].endswith("/a:latest") and names(engine) == ["a", "b", "c"]
    report = engine.gc(watermark=90, low=80)
    assert [name.rpartition("/")[2] for name in report.images] == ["a:latest", "b:latest"]
    assert names(engine) == ["c"] and report.reached and report.freed >= 2 * MIB
    assert (report.before, report.after) == (91.0, 70.0)
    assert engine.gc(watermark=75).images == ()


def test_a_watermark_that_cannot_be_reached_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "used_share", lambda _: 95.0)
    report = engine.gc(watermark=90)
    assert not report.reached and names(engine) == []


def test_old_images_go(engine: Engine) -> None:
    assert engine.gc(older_than=3600).images == ()
    with engine._context.store.write() as tx:
        for name in ("a", "b", "c"):
            record = engine.images.get(name)
            age = 0 if name == "c" else 7200
            tx.put("image_uses", record.id, gc._Use(used_at=time.time() - age))
            stored = engine._context.images.by_id(record.id)
            assert stored is not None
            import msgspec

            tx.put("images", record.id, msgspec.structs.replace(stored, added_at=0, tagged_at=0))
    assert len(engine.gc(older_than=3600).images) == 2
    assert names(engine) == ["c"]


@pytest.mark.parametrize(("high", "low"), [(101, None), (50, 60), (-1, None), (None, 10)])
def test_bad_watermarks_are_refused(engine: Engine, high: float | None, low: float | None) -> None:
    with pytest.raises(InvalidArgument):
        engine.gc(watermark=high, low=low)


@requires("root", "cgroup", "overlayfs", "seccomp", "busybox")
@pytest.mark.integration
def test_what_is_used_stays_and_a_removal_counts_as_use(
    hutch_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hutch.testing import ensure_image

    ensure_image(hutch_engine, "busybox")
    identifier = hutch_engine.images.get("busybox").id
    with hutch_engine.start("busybox", ["sleep", "1000"], network="none"):
        monkeypatch.setattr(gc, "used_share", lambda _: 95.0)
        foretold = hutch_engine.gc(watermark=90, dry_run=True)
        assert not any("busybox" in name for name in foretold.images)
    with hutch_engine._context.store.read() as tx:
        used = tx.get("image_uses", identifier, gc._Use)
    assert used is not None and used.used_at > time.time() - 600
