"""Garbage collection: what something names stays, the rest goes, and nothing in between."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.oci.digest import digest_of
from hutch.records import Transaction
from hutch.storage.content import ContentStore
from hutch.storage.gc import Collector
from hutch.storage.layers import Layers
from hutch.storage.leases import LEASES, LeaseRecord, Leases
from hutch.storage.snapshots import Snapshots
from hutch.storage.trash import Trash
from hutch.storage.volumes import Volumes
from hutch.store.database import Store
from tests.storage.tars import end, file


class Stored:
    """A root with everything on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Store.open(path / "hutch.db")
        self.content = ContentStore(path, durable=False)
        self.trash = Trash(path)
        self.layers = Layers(path, trash=self.trash)
        self.snapshots = Snapshots(path, self.store, layers=self.layers, trash=self.trash)
        self.volumes = Volumes(path, self.store, trash=self.trash)
        self.leases = Leases(self.store)
        self.roots: set[str] = set()
        self.collector = Collector(self.store, self.content, self.layers, self.trash, self._named)

    def _named(self, _: Transaction) -> set[str]:
        return self.roots

    def layer(self, text: bytes) -> str:
        return self.layers.unpack(io.BytesIO(file("f", text) + end())).chain_id


@pytest.fixture
def stored(hutch_root: Path) -> Iterator[Stored]:
    stored = Stored(hutch_root)
    yield stored
    stored.trash.drain(10)
    stored.store.close()


def test_what_is_named_stays_and_the_rest_goes(stored: Stored) -> None:
    kept, gone = stored.content.put(b"kept"), stored.content.put(b"gone")
    kept_layer, gone_layer = stored.layer(b"kept"), stored.layer(b"gone")
    stored.roots = {kept, kept_layer}
    would = stored.collector.collect(dry_run=True)
    assert stored.content.has(gone) and stored.layers.has(gone_layer)
    done = stored.collector.collect()
    assert done == would
    assert (done.blobs, done.layers) == ((gone,), (gone_layer,))
    assert done.bytes > len(b"gone")
    assert stored.content.has(kept) and stored.layers.has(kept_layer)
    assert not stored.content.has(gone) and not stored.layers.has(gone_layer)
    assert stored.collector.collect().bytes == 0


def test_layers_of_an_instance_stay(stored: Stored) -> None:
    chain = stored.layer(b"used")
    stored.snapshots.prepare("one", [chain])
    stored.collector.collect()
    assert stored.layers.has(chain)
    stored.snapshots.remove("one")
    stored.collector.collect()
    assert not stored.layers.has(chain)


def test_a_lease_keeps_what_it_names(stored: Stored) -> None:
    old = stored.content.put(b"old")
    os.utime(stored.content.path(old))
    with stored.leases.hold(old):
        stored.collector.collect()
        assert stored.content.has(old)
    stored.collector.collect()
    assert not stored.content.has(old)


def test_a_lease_keeps_what_is_made_while_it_is_held(stored: Stored) -> None:
    with stored.leases.hold(purpose="pull"):
        blob, chain = stored.content.put(b"new"), stored.layer(b"new")
        assert stored.collector.collect().blobs == ()
        assert stored.content.has(blob) and stored.layers.has(chain)
    assert stored.collector.collect().blobs == (blob,)
    assert not stored.layers.has(chain)


def test_names_added_to_a_lease_are_kept(stored: Stored) -> None:
    with stored.leases.hold() as lease:
        blob = stored.content.put(b"x")
        lease.add(blob)
        assert [record.references for record in stored.leases.list()] == [(blob,)]
    assert list(stored.leases.list()) == []


HOLDER = """
import sys
import time
from pathlib import Path
from hutch.storage.leases import Leases
from hutch.store.database import Store
with Leases(Store.open(Path(sys.argv[1]))).hold(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lease_ends_with_its_process(stored: Stored) -> None:
    blob = stored.content.put(b"x")
    command = [sys.executable, "-c", HOLDER, str(stored.path / "hutch.db"), blob]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        stored.collector.collect()
        assert stored.content.has(blob)
        holder.kill()
    stored.collector.collect()
    assert not stored.content.has(blob)
    with stored.store.read() as transaction:
        assert transaction.items(LEASES, LeaseRecord) == []


def test_a_lease_outlives_a_clock_that_is_set_forward(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    with stored.leases.hold("sha256:x"):
        monkeypatch.setattr(time, "time", lambda: now() + 2 * 24 * 3600)
        assert [lease.references for lease in stored.leases.list()] == [("sha256:x",)]


def test_a_lease_ends_with_its_time(stored: Stored) -> None:
    blob = stored.content.put(b"x")
    with stored.leases.hold(blob, ttl_s=-1):
        stored.collector.collect()
    assert not stored.content.has(blob)


def test_reconcile_forgets_what_no_instance_has(stored: Stored) -> None:
    chain = stored.layer(b"x")
    stored.snapshots.prepare("alive", [chain])
    stored.snapshots.prepare("dead", [chain])
    (stored.path / "trash/left").mkdir(parents=True, exist_ok=True)
    stored.collector.reconcile(stored.snapshots, ["alive"])
    assert os.path.exists(stored.snapshots.get("alive").upper)
    assert not (stored.path / "instances/dead/upper").exists()
    assert os.listdir(stored.path / "trash") == []


def test_usage_tells_what_could_be_freed(stored: Stored) -> None:
    blob, chain = stored.content.put(b"12345"), stored.layer(b"x")
    stored.content.put(b"123")
    stored.roots = {blob}
    assets = stored.snapshots.prepare("one", [chain])
    Path(assets.upper, "f").write_bytes(b"x" * 5000)
    stored.volumes.create("v")
    usage = stored.collector.usage(stored.snapshots, stored.volumes)
    assert (usage.blobs.total, usage.blobs.active) == (2, 1)
    assert (usage.blobs.size, usage.blobs.reclaimable) == (8, 3)
    assert (usage.layers.total, usage.layers.active, usage.layers.reclaimable) == (1, 1, 0)
    assert usage.instances.total == 1 and usage.instances.size >= 5000
    assert usage.instances.reclaimable == usage.instances.size
    assert (usage.volumes.total, usage.volumes.active) == (1, 0)
    running = stored.collector.usage(stored.snapshots, stored.volumes, running=["one"])
    assert running.instances.reclaimable == 0


def test_collection_may_be_narrowed(stored: Stored) -> None:
    first, second = stored.content.put(b"first"), stored.content.put(b"second")
    stored.collector.collect(only={first})
    assert not stored.content.has(first) and stored.content.has(second)


def test_interrupted_downloads_go_when_asked(stored: Stored) -> None:
    lost, busy = digest_of(b"lost"), digest_of(b"busy")
    with stored.content.writer(lost, 100) as writer:
        writer.write(b"part")
    with stored.content.writer(busy, 100) as writer:
        writer.write(b"part")
        assert stored.collector.collect().bytes == 0
        assert stored.collector.collect(parts=True).bytes == 4
        assert os.path.exists(stored.content.part_path(busy))
    assert not os.path.exists(stored.content.part_path(lost))
