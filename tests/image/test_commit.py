"""Images made of what is there: a root file system, an instance's changes."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from hutch.errors import IntegrityError, InvalidArgument
from hutch.image.commit import commit_image
from hutch.image.importer import config_object, import_image
from hutch.image.instructions import apply_changes
from hutch.image.records import HealthcheckConfig, ImageRecord, RuntimeConfig
from hutch.image.register import runtime_config
from hutch.oci.types import ProcessConfig
from hutch.spec.model import ProcessSpec
from hutch.storage.snapshots import OverlayAssets, Snapshots
from tests.image.registries import Root, digest
from tests.requires import requires
from tests.storage.tars import directory, end, file

TAR = directory("tmp", mode=0o1777) + directory("etc") + file("etc/x", b"1" * 3000) + end()


def import_(root: Root, data: bytes = TAR, **more: Any) -> ImageRecord:
    return import_image(io.BytesIO(data), **root.parts(), **more)


@pytest.mark.parametrize(
    ("compress", "kept"),
    [
        (bytes, False),
        (gzip.compress, True),
        (zstandard.ZstdCompressor().compress, True),
        (bz2.compress, False),
        (lzma.compress, False),
    ],
    ids=["plain", "gzip", "zstd", "bzip2", "xz"],
)
def test_a_root_file_system_is_imported(
    root: Root, compress: Callable[[bytes], bytes], kept: bool
) -> None:
    data = compress(TAR)
    record = import_(root, data, reference="base:1", message="hello")
    assert record.layers[0].diff_id == digest(TAR)
    assert (record.layers[0].digest == digest(data)) is kept
    assert record.names == ("docker.io/library/base:1",)
    assert record.history[0].comment == "hello" and record.size == len(TAR)
    assert Path(root.layers.path(record.chain_ids[0]), "etc/x").read_bytes() == b"1" * 3000
    root.collector().collect()
    assert all(root.content.has(digest) for digest in record.digests)
    assert list(root.leases.list()) == []


def test_an_import_of_the_same_is_the_same(root: Root) -> None:
    first = import_(root, created_s=5)
    assert import_(root, created_s=5).id == first.id
    assert len(root.images.all()) == 1 and first.created == "1970-01-01T00:00:05Z"


def test_changes_and_a_configuration_are_taken(root: Root) -> None:
    record = import_(
        root,
        config=RuntimeConfig(env=("PATH=/bin",), cmd=("bash",)),
        changes=["ENV A=1", "USER me", "EXPOSE 80"],
        platform="linux/arm64",
    )
    assert record.config.env == ("PATH=/bin", "A=1")
    assert (record.config.cmd, record.config.user) == (("bash",), "me")
    assert record.config.exposed_ports == ("80/tcp",)
    assert record.architecture == "arm64"


@pytest.mark.parametrize(
    "data", [TAR[:700], file("../x") + end(), gzip.compress(TAR)[:-3], b"hello" * 300]
)
def test_a_bad_root_file_system_changes_nothing(root: Root, data: bytes) -> None:
    with pytest.raises(IntegrityError):
        import_(root, data, reference="x")
    assert root.images.all() == [] and list(root.content.list()) == []
    assert list(root.layers.list()) == []
    assert not [t for t in threading.enumerate() if t.name == "hutch-gzip"]


def test_a_bad_name_is_refused_before_anything_is_read(root: Root) -> None:
    stream = io.BytesIO(TAR)
    with pytest.raises(InvalidArgument, match="reference"):
        import_image(stream, **root.parts(), reference="UPPER:x")
    assert stream.tell() == 0


# ---- instructions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ('CMD ["a", "b c"]', "Cmd", ["a", "b c"]),
        ("cmd echo hi", "Cmd", ["/bin/sh", "-c", "echo hi"]),
        ('ENTRYPOINT ["/init"]', "Entrypoint", ["/init"]),
        ('ENV A=1 B="two words" C=a\\ b', "Env", ["OLD=x", "A=1", "B=two words", "C=a b"]),
        ("ENV OLD=y", "Env", ["OLD=y"]),
        ("ENV KEY value with spaces", "Env", ["OLD=x", "KEY=value with spaces"]),
        ("LABEL a=1 b='2 3'", "Labels", {"a": "1", "b": "2 3"}),
        ("WORKDIR /srv", "WorkingDir", "/srv"),
        ("WORKDIR sub/../x", "WorkingDir", "/x"),
        ("USER 1000:1000", "User", "1000:1000"),
        (
            "EXPOSE 80 53/udp 8000-8010",
            "ExposedPorts",
            {"80/tcp": {}, "53/udp": {}, "8000-8010/tcp": {}},
        ),
        ('VOLUME ["/a", "/b"]', "Volumes", {"/a": {}, "/b": {}}),
        ("VOLUME /a /b", "Volumes", {"/a": {}, "/b": {}}),
        ("STOPSIGNAL SIGINT", "StopSignal", "SIGINT"),
        ('SHELL ["bash", "-c"]', "Shell", ["bash", "-c"]),
        ("ONBUILD RUN x", "OnBuild", ["RUN x"]),
        ("HEALTHCHECK NONE", "Healthcheck", {"Test": ["NONE"]}),
        (
            "HEALTHCHECK --interval=5s --retries=3 CMD curl x",
            "Healthcheck",
            {"Test": ["CMD-SHELL", "curl x"], "Interval": 5 * 10**9, "Retries": 3},
        ),
    ],
)
def test_instructions_do_what_they_say(change: str, key: str, value: object) -> None:
    before = {"Env": ["OLD=x"], "Unknown": 1}
    changed = apply_changes(before, [change])
    assert changed[key] == value and changed["Unknown"] == 1
    assert before == {"Env": ["OLD=x"], "Unknown": 1}
    runtime_config(msgspec.convert(changed, ProcessConfig))


@pytest.mark.parametrize(
    "change",
    [
        "RUN x",
        "CMD",
        'CMD ["a"',
        "CMD [1]",
        "ENV A",
        "ENV A=1 B",
        "ENV A='x",
        "EXPOSE x",
        "EXPOSE 99999",
        "EXPOSE 80/sctpx",
        "VOLUME a",
        "USER a b",
        "STOPSIGNAL NOPE",
        "SHELL sh",
        "HEALTHCHECK RUN x",
        "HEALTHCHECK --colour=red CMD x",
        "",
    ],
)
def test_bad_instructions_are_named(change: str) -> None:
    with pytest.raises(InvalidArgument, match=r"changes\[1\]"):
        apply_changes({}, ["USER x", change])


def test_a_configuration_goes_out_and_comes_back() -> None:
    config = RuntimeConfig(
        env=("A=1",),
        cmd=("c",),
        entrypoint=("e",),
        user="u",
        workdir="/w",
        volumes=("/v",),
        exposed_ports=("1/udp",),
        labels={"l": "1"},
        stop_signal="SIGINT",
        healthcheck=HealthcheckConfig(test=("CMD", "x"), interval_s=1.5, retries=2),
        shell=("s",),
        on_build=("RUN x",),
    )
    assert runtime_config(msgspec.convert(config_object(config), ProcessConfig)) == config
    assert config_object(RuntimeConfig()) == {}


# ---- commit --------------------------------------------------------------------------------


@pytest.fixture
def base(root: Root) -> ImageRecord:
    return import_(root, reference="base", changes=['ENTRYPOINT ["/init"]', "LABEL keep=me"])


@pytest.fixture
def assets(root: Root, base: ImageRecord) -> OverlayAssets:
    assets = Snapshots(root.path, root.store, layers=root.layers).prepare("i", base.chain_ids)
    upper = Path(assets.upper)
    (upper / "etc").mkdir()
    (upper / "etc/new").write_text("new")
    (upper / "dev").mkdir()
    return assets


@requires("root")
def test_a_commit_adds_one_layer(root: Root, base: ImageRecord, assets: OverlayAssets) -> None:
    os.mknod(Path(assets.upper, "etc/x"), 0o020000, 0)
    record = commit_image(
        base,
        assets,
        **root.parts(),
        reference="mine:1",
        author="me",
        message="why",
        changes=["ENV A=1"],
        process=ProcessSpec(argv=("/init", "run"), env=("E=1",), cwd="/srv", user="7"),
        skip=frozenset((b"dev",)),
    )
    assert record.names == ("docker.io/library/mine:1",)
    assert record.layers[0] == base.layers[0] and len(record.layers) == 2
    top = Path(root.layers.path(record.chain_ids[1]))
    assert sorted(str(p.relative_to(top)) for p in top.rglob("*")) == ["etc", "etc/new", "etc/x"]
    assert (top / "etc/x").is_char_device()
    config = record.config
    assert (config.entrypoint, config.cmd) == (("/init",), ("run",))
    assert (config.env, config.workdir, config.user) == (("E=1", "A=1"), "/srv", "7")
    assert config.labels == {"keep": "me"}
    assert (record.author, record.history[-1].comment, record.history[-1].layer) == ("me", "why", 1)
    document = json.loads(root.content.read(record.id))
    assert document["rootfs"]["diff_ids"] == [layer.diff_id for layer in record.layers]
    root.collector().collect()
    assert all(map(root.layers.has, record.chain_ids))


def test_a_commit_of_another_entrypoint_keeps_the_command_whole(
    root: Root, base: ImageRecord, assets: OverlayAssets
) -> None:
    record = commit_image(base, assets, **root.parts(), process=ProcessSpec(argv=("sh", "-c", "x")))
    assert (record.config.entrypoint, record.config.cmd) == ((), ("sh", "-c", "x"))
    assert record.names == ()


def test_a_commit_that_fails_records_nothing(
    root: Root, base: ImageRecord, assets: OverlayAssets
) -> None:
    Path(assets.upper, ".wh.bad").touch()
    with pytest.raises(IntegrityError, match=r"\.wh\."):
        commit_image(base, assets, **root.parts(), reference="mine")
    assert [record.id for record in root.images.all()] == [base.id]
    root.collector().collect()
    assert {blob.digest for blob in root.content.list()} == set(base.digests)
