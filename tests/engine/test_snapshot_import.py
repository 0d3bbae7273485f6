"""Archives that are no snapshot of ours, or want what they may not have, change nothing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine
from hutch.errors import HutchError, IntegrityError, InvalidArgument, NotFound, Unsupported
from tests.requires import requires

Changed = Callable[[dict[str, Any]], None]


@pytest.fixture
def engine(hutch_root: Path) -> Iterator[Engine]:
    with Engine(hutch_root) as engine:
        yield engine


def record(**changes: Any) -> bytes:
    spec = {
        "image": "busybox",
        "process": {"argv": ["sh"]},
        "isolation": "vm",
        "machine": {"kernel": "f" * 64},
        **changes.pop("spec", {}),
    }
    return json.dumps(
        {
            "id": "a" * 64,
            "source": "b" * 64,
            "source_name": "web",
            "tag": "one",
            "created_ns": 1,
            "size": 1,
            "memory": False,
            "spec": spec,
            "image_id": "sha256:" + "c" * 64,
            "image_name": "busybox",
            "chain_ids": ["sha256:" + "d" * 64],
            **changes,
        }
    ).encode()


def archive(files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        if kind != tarfile.REGTYPE:
            entry = tarfile.TarInfo("state")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    return made.getvalue()


def refused(engine: Engine, data: bytes, kind: type[HutchError], match: str) -> None:
    with pytest.raises(kind, match=match):
        engine.snapshots.import_([data])
    assert engine.snapshots.list() == []
    assert [n for n in os.listdir(engine.root / "snapshots") if not n.startswith(".")] == []


DISK = {"disk.raw": b"x" * 512}


@pytest.mark.parametrize(
    ("files", "kind", "match"),
    [
        ({}, IntegrityError, "snapshot.json is missing"),
        ({"snapshot.json": b"{}"}, IntegrityError, "snapshot.json"),
        ({"snapshot.json": b"\xff"}, IntegrityError, "snapshot.json"),
        ({"snapshot.json": record()}, IntegrityError, "disk.raw is missing"),
        ({"snapshot.json": record(), **DISK, "authorized_keys": b""}, IntegrityError, "belong"),
        ({"snapshot.json": record(), **DISK, ".wh.x": b""}, IntegrityError, "belong"),
        ({"snapshot.json": record(memory=True), **DISK}, IntegrityError, "memory"),
        ({"snapshot.json": record(), **DISK, "state": b""}, IntegrityError, "memory"),
        ({"snapshot.json": record(tag="../x"), **DISK}, InvalidArgument, "tag"),
        ({"snapshot.json": record(source_name="a/b"), **DISK}, InvalidArgument, "tag|name"),
        ({"snapshot.json": record(), **DISK, "addresses.json": b"[]"}, NotFound, "image busybox"),
    ],
)
def test_what_is_no_snapshot_is_refused(
    engine: Engine, files: dict[str, bytes], kind: type[HutchError], match: str
) -> None:
    refused(engine, archive(files), kind, match)


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("mounts", {"mounts": [{"type": "bind", "source": "/", "target": "/host"}]}),
        ("mounts", {"mounts": [{"type": "volume", "name": "other", "target": "/host"}]}),
        ("devices", {"device_names": ["vendor.com/gpu=0"]}),
        ("volumes_from", {"volumes_from": ["other"]}),
        ("network", {"network_mode": "container:other"}),
        ("isolation", {"isolation": "container"}),
        ("from_disk", {"machine": {"from_disk": {}}}),
    ],
)
def test_what_reaches_for_the_host_is_refused(
    engine: Engine, field: str, spec: dict[str, Any]
) -> None:
    made = archive({"snapshot.json": record(spec=spec), **DISK})
    refused(engine, made, Unsupported, field)


def test_a_link_is_no_file_of_a_snapshot(engine: Engine) -> None:
    made = archive({"snapshot.json": record(), **DISK}, tarfile.SYMTYPE)
    refused(engine, made, IntegrityError, "state")


def test_an_archive_that_is_cut_short_is_refused(engine: Engine) -> None:
    made = archive({"snapshot.json": record(), "disk.raw": b"x" * 100_000})
    refused(engine, made[:50_000], HutchError, "snapshot")


@requires("qemu-img")
def test_an_overlay_that_names_another_file_is_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"x" * 512)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", "top"],
        cwd=tmp_path,
        check=True,
    )
    overlay = (tmp_path / "top").read_bytes()
    made = archive({"snapshot.json": record(), **DISK, "disk.1.qcow2": overlay})
    refused(engine, made, IntegrityError, "names another file")
