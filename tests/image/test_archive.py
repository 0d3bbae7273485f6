"""Archives of images: written for and by other tools, through files and pipes."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hutch.errors import HutchError, IntegrityError, InvalidArgument, NotFound
from hutch.image.archive import load_images, save_images
from hutch.image.importer import import_image
from hutch.image.records import ImageRecord
from tests.image.registries import Root, digest
from tests.requires import requires
from tests.storage.tars import directory, end, file, hard_link, symlink

ROOTFS = directory("bin") + file("bin/sh", b"#!shell" * 500, mode=0o755) + directory("tmp") + end()


def make(root: Root, name: str | None = "test/image:1", data: bytes = ROOTFS) -> ImageRecord:
    return import_image(
        io.BytesIO(data),
        **root.parts(),
        reference=name,
        changes=['CMD ["sh"]', "ENV A=1"],
        created_s=1e9,
    )


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Root]:
    opened = Root(tmp_path / "other")
    yield opened
    opened.close()


def save(root: Root, *names: str, format: str = "docker") -> bytes:
    out = io.BytesIO()
    save_images(names, out, images=root.images, content=root.content, format=format)
    return out.getvalue()


def load(root: Root, source: Any, **more: Any) -> list[ImageRecord]:
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    return load_images(source, **root.parts(), collector=root.collector(), **more)


def tree(root: Root, record: ImageRecord) -> list[str]:
    paths = [Path(root.layers.path(chain)) for chain in record.chain_ids]
    return sorted(str(p.relative_to(base)) for base in paths for p in base.rglob("*"))


# ---- our own -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["docker", "oci-archive"])
@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress], ids=["", "gz", "zst"]
)
def test_what_is_saved_is_loaded_again(
    format: str, compress: Callable[[bytes], bytes], root: Root, other: Root
) -> None:
    made = make(root)
    (found,) = load(other, compress(save(root, "test/image:1", format=format)))
    assert (found.id, found.manifest_digest) == (made.id, made.manifest_digest)
    assert found.names == ("docker.io/test/image:1",)
    assert found.config == made.config
    assert tree(other, found) == ["bin", "bin/sh", "tmp"]
    assert other.images.get("test/image:1").id == made.id


def test_the_same_image_gives_the_same_archive(root: Root, other: Root) -> None:
    make(root)
    make(other)
    assert save(root, "test/image:1") == save(other, "test/image:1")


def test_several_images_share_an_archive(root: Root, other: Root) -> None:
    make(root, "one")
    make(root, "two", file("other") + end())
    root.images.tag("one", "again:v2")
    data = save(root, "one", "two", "again:v2")
    found = load(other, data)
    assert [record.names for record in found] == [
        ("docker.io/library/one:latest", "docker.io/library/again:v2"),
        ("docker.io/library/two:latest",),
    ]


def test_only_the_wanted_are_loaded(root: Root, other: Root) -> None:
    make(root, "one")
    make(root, "two", file("other") + end())
    data = save(root, "one", "two")
    (found,) = load(other, data, references=["two"])
    assert found.names == ("docker.io/library/two:latest",)
    with pytest.raises(NotFound):
        other.images.get("one")
    assert {blob.digest for blob in other.content.list()} == set(found.digests)
    with pytest.raises(NotFound, match="three"):
        load(other, data, references=["three"])


def test_an_image_saved_by_id_has_no_name(root: Root, other: Root) -> None:
    made = make(root)
    (found,) = load(other, save(root, made.id))
    assert found.names == () and other.images.get(made.id[7:19]).id == made.id


def test_a_layout_directory_is_written_and_read(root: Root, other: Root, tmp_path: Path) -> None:
    made = make(root)
    target = tmp_path / "layout"
    save_images(
        ["test/image:1"], target, images=root.images, content=root.content, format="oci-dir"
    )
    assert load(other, target)[0].id == made.id
    with pytest.raises(InvalidArgument, match="not an empty directory"):
        save_images(
            ["test/image:1"], target, images=root.images, content=root.content, format="oci-dir"
        )


def test_a_file_is_written_and_read(root: Root, other: Root, tmp_path: Path) -> None:
    made = make(root)
    path = tmp_path / "image.tar"
    save_images(["test/image:1"], path, images=root.images, content=root.content)
    assert load(other, str(path))[0].id == made.id
    with pytest.raises(NotFound):
        load(other, tmp_path / "missing.tar")


def test_an_image_that_is_not_there_is_not_saved(root: Root, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        save_images(["no"], tmp_path / "x", images=root.images, content=root.content)
    assert not (tmp_path / "x").exists()


def test_an_archive_comes_through_a_pipe(root: Root, other: Root) -> None:
    made = make(root)
    data = save(root, "test/image:1")
    reading, writing = os.pipe()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=writing) as cat:
        os.close(writing)
        with open(reading, "rb", buffering=0) as pipe:
            import threading

            def feed() -> None:
                assert cat.stdin is not None
                cat.stdin.write(data)
                cat.stdin.close()

            thread = threading.Thread(target=feed)
            thread.start()
            found = load(other, pipe)
            thread.join()
    assert found[0].id == made.id


# ---- other tools --------------------------------------------------------------------------


def skopeo(*arguments: str) -> str:
    done = subprocess.run(
        ["skopeo", "--insecure-policy", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@requires("skopeo")
def test_skopeo_reads_what_we_save(root: Root, tmp_path: Path) -> None:
    made = make(root)
    path = tmp_path / "image.tar"
    path.write_bytes(save(root, "test/image:1"))
    found = json.loads(skopeo("inspect", "--config", f"docker-archive:{path}:test/image:1"))
    assert found["config"]["Cmd"] == ["sh"]
    found = json.loads(skopeo("inspect", f"oci-archive:{path}"))
    assert found["Layers"] == [layer.digest for layer in made.layers]
    skopeo("copy", f"docker-archive:{path}", f"dir:{tmp_path / 'a'}")
    skopeo("copy", f"oci-archive:{path}", f"dir:{tmp_path / 'b'}")


@requires("skopeo")
@pytest.mark.parametrize(
    "kind", ["docker-archive", "oci-archive", "oci", "oci zstd", "oci uncompressed"]
)
def test_we_load_what_skopeo_writes(kind: str, root: Root, other: Root, tmp_path: Path) -> None:
    made = make(root)
    source, target = tmp_path / "ours.tar", tmp_path / "theirs"
    source.write_bytes(save(root, "test/image:1", format="oci-archive"))
    form, _, compression = kind.partition(" ")
    options = ["--dest-compress-format", compression, "--dest-compress-level", "1"]
    if compression == "uncompressed":
        options = ["--dest-decompress"]
    skopeo(
        "copy",
        *(options if compression else []),
        f"oci-archive:{source}",
        f"{form}:{target}:docker.io/test/image:7",
    )
    (found,) = load(other, target)
    assert found.layers[0].diff_id == made.layers[0].diff_id
    assert found.names == ("docker.io/test/image:7",)
    assert found.config.cmd == ("sh",)
    assert tree(other, found) == ["bin", "bin/sh", "tmp"]


# ---- Docker's old archives ------------------------------------------------------------------


def docker_archive(**changes: Any) -> bytes:
    """Return an archive as `docker save` wrote before version 25."""
    layer = file("f", b"one") + end()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer), digest(layer)]},
        }
    ).encode()
    name = digest(config)[7:] + ".json"
    manifest = [
        {"Config": name, "RepoTags": ["old:1", "old:2"], "Layers": ["a/layer.tar", "b/layer.tar"]}
    ]
    entries = {
        "a/layer.tar": file("a/layer.tar", changes.get("layer", layer)),
        "b/layer.tar": changes.get("link", symlink("b/layer.tar", "../a/layer.tar")),
        "config": file(name, changes.get("config", config)),
        "manifest": file("manifest.json", json.dumps(changes.get("manifest", manifest)).encode()),
    }
    for gone in changes.get("without", ()):
        del entries[gone]
    return b"".join(entries.values()) + end()


@pytest.mark.parametrize(
    "link", [symlink("b/layer.tar", "../a/layer.tar"), hard_link("b/layer.tar", "a/layer.tar")]
)
def test_an_old_docker_archive_is_loaded(root: Root, link: bytes) -> None:
    (found,) = load(root, docker_archive(link=link))
    assert found.names == ("docker.io/library/old:1", "docker.io/library/old:2")
    assert len(found.layers) == 2 and found.layers[0].digest == found.layers[1].digest
    assert root.images.get("old:2").config.cmd == ("sh",)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", InvalidArgument),
        (file("hello") + end(), InvalidArgument),
        (b"garbage" * 1000, IntegrityError),
        (docker_archive(without=["config"]), InvalidArgument),
        (docker_archive(without=["a/layer.tar"]), InvalidArgument),
        (docker_archive(layer=file("f", b"two") + end()), IntegrityError),
        (docker_archive(layer=file("../f", b"two") + end()), IntegrityError),
        (docker_archive(config=b"{}"), HutchError),
        (docker_archive(config=b"nonsense"), HutchError),
        (docker_archive(manifest={"x": 1}), InvalidArgument),
        (docker_archive(manifest=[]), InvalidArgument),
        (docker_archive(manifest=[{"Config": "../../etc/passwd", "Layers": []}]), HutchError),
        (docker_archive(link=symlink("b/layer.tar", "../../../../etc/passwd")), InvalidArgument),
        (docker_archive(link=symlink("b/layer.tar", "layer.tar")), InvalidArgument),
        (docker_archive()[:2000], IntegrityError),
    ],
    ids=range(15),
)
def test_a_bad_archive_changes_nothing(data: bytes, error: type[Exception], root: Root) -> None:
    with pytest.raises(error):
        load(root, data)
    assert root.images.all() == []
    assert list(root.content.list()) == []


def test_a_layout_whose_blob_is_not_what_its_name_says_is_refused(root: Root, other: Root) -> None:
    made = make(root)
    data = save(root, "test/image:1", format="oci-archive")
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            content = old.extractfile(member)
            body = content.read() if content else b""
            if member.name.endswith(made.id[7:]):
                body = body.replace(b'"A=1"', b'"A=2"')
            new.addfile(member, io.BytesIO(body))
    with pytest.raises(HutchError):
        load(other, out.getvalue())
    assert other.images.all() == []


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_gives_an_image_or_an_error_of_ours(data: st.DataObject, root: Root) -> None:
    archive = bytearray(docker_archive())
    for _ in range(data.draw(st.integers(1, 4))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    try:
        load(root, bytes(archive))
    except HutchError:
        pass


def test_a_load_that_fails_takes_nothing_from_another(root: Root) -> None:
    """Two loads share a blob; the one that brought it fails while the other goes on."""
    good = docker_archive()
    bad = docker_archive(config=b"nonsense")
    shared = digest(file("f", b"one") + end())
    results: list[list[ImageRecord]] = []

    class Slow(io.BytesIO):
        """Lets the other load run once the layer of this one is in the store."""

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            if not data and not results:
                assert root.content.has(shared)
                results.append(load(root, good))
            return data

    with pytest.raises(HutchError):
        load(root, Slow(bad))
    assert len(results) == 1 and results[0][0].names
    for kept in results[0][0].digests:
        assert root.content.has(kept)
    assert {blob.digest for blob in root.content.list()} == set(results[0][0].digests)


def test_a_load_that_fails_late_leaves_no_layers(root: Root) -> None:
    """The first of two images is whole; the second turns out bad when it is unpacked."""
    layers = [file("a", b"1") + end(), file("../b", b"2") + end()]
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
        }
    ).encode()
    manifest = [{"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["1.tar", "2.tar"]}]
    data = file("1.tar", layers[0]) + file("2.tar", layers[1]) + file("c.json", config)
    with pytest.raises(IntegrityError, match="leaves the root"):
        load(root, data + file("manifest.json", json.dumps(manifest).encode()) + end())
    assert list(root.content.list()) == [] and list(root.layers.list()) == []


@pytest.mark.parametrize("cut", [700, 2000])
def test_a_damaged_archive_is_named(cut: int, root: Root, tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(docker_archive()[:cut])
    with pytest.raises(IntegrityError, match=f"^archive {path}: tar stream"):
        load(root, path)
