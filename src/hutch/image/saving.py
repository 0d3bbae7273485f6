"""Save images as one archive that docker, podman, skopeo and containerd all read.

It is an OCI layout with Docker's manifest.json beside it, as Docker itself writes since
version 25. The same images give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from hutch.errors import InvalidArgument, NotFound
from hutch.image.records import ImageRecord
from hutch.oci.reference import parse
from hutch.oci.types import MediaType
from hutch.storage.content import ContentStore
from hutch.storage.tarstream import DIR, REG
from hutch.storage.tarwrite import END, header, padding

__all__ = ["FORMATS", "save_images", "save_layout"]

FORMATS = ("docker-archive", "oci-archive")
_CHUNK = 1 << 20
_NAME = "io.containerd.image.name"
_REF = "org.opencontainers.image.ref.name"


def save_images(
    wanted: Sequence[tuple[ImageRecord, Sequence[str]]],
    *,
    content: ContentStore,
    format: str = "docker-archive",
) -> Iterator[bytes]:
    """Return the archive of images, each with the (canonical) names it gets there.

    Raises before the first chunk where a blob is missing. The caller holds a lease on
    the images' blobs.
    """
    if format not in FORMATS:
        raise InvalidArgument(
            f"expected one of {', '.join(FORMATS)}, got {format!r}", field="format"
        )
    digests = _blobs(wanted, content)
    return _archive(wanted, digests, content, docker=format == "docker-archive")


def save_layout(
    wanted: Sequence[tuple[ImageRecord, Sequence[str]]], path: str, *, content: ContentStore
) -> None:
    """Write the images as an OCI layout directory, which must be missing or empty."""
    digests = _blobs(wanted, content)
    if os.path.isdir(path) and os.listdir(path):
        raise InvalidArgument(f"{path}: not empty", field="output")
    os.makedirs(f"{path}/blobs/sha256", exist_ok=True)
    for digest in digests:
        with content.open(digest) as source, open(f"{path}/{_blob(digest)}", "wb") as target:
            while data := source.read(_CHUNK):
                target.write(data)
    for name, text in (("oci-layout", _LAYOUT), ("index.json", _index(wanted))):
        with open(f"{path}/{name}", "wb") as target:
            target.write(text)


_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


def _blobs(
    wanted: Sequence[tuple[ImageRecord, Sequence[str]]], content: ContentStore
) -> dict[str, int]:
    """Return every blob that is needed, with its size, in a fixed order."""
    sizes: dict[str, int] = {}
    for record, _ in wanted:
        for digest in record.digests:
            if not content.has(digest):
                raise NotFound(
                    f"image {record.id}: blob {digest} is not in the store",
                    hint="pull the image again",
                )
            sizes[digest] = content.size(digest)
    return dict(sorted(sizes.items()))


def _archive(
    wanted: Sequence[tuple[ImageRecord, Sequence[str]]],
    digests: dict[str, int],
    content: ContentStore,
    *,
    docker: bool,
) -> Iterator[bytes]:
    made = {name.rpartition("/")[0] for name in map(_blob, digests)}
    for name in ("blobs", *sorted(made)):
        yield header(name.encode() + b"/", DIR, mode=0o755)
    for digest, size in digests.items():
        yield header(_blob(digest).encode(), REG, size=size)
        yield from _content(content, digest, size)
    yield from _document("index.json", _index(wanted))
    if docker:
        yield from _document("manifest.json", _docker_manifest(wanted))
    yield from _document("oci-layout", _LAYOUT)
    yield END


def _content(content: ContentStore, digest: str, size: int) -> Iterator[bytes]:
    with content.open(digest) as file:
        left = size
        while left and (data := file.read(min(_CHUNK, left))):
            left -= len(data)
            yield data
        if left:
            raise NotFound(f"blob {digest}: shorter than it was")
    yield padding(size)


def _document(name: str, text: bytes) -> Iterator[bytes]:
    yield header(name.encode(), REG, size=len(text))
    yield text + padding(len(text))


def _blob(digest: str) -> str:
    algorithm, _, digits = digest.partition(":")
    return f"blobs/{algorithm}/{digits}"


def _index(wanted: Sequence[tuple[ImageRecord, Sequence[str]]]) -> bytes:
    entries: list[dict[str, Any]] = []
    for record, names in wanted:
        entry: dict[str, Any] = {
            "mediaType": record.manifest_media_type,
            "digest": record.manifest_digest,
            "size": record.manifest_size,
            "platform": {"architecture": record.architecture, "os": record.os},
        }
        if record.variant:
            entry["platform"]["variant"] = record.variant
        if not names:
            entries.append(entry)
        for name in names:
            tag = parse(name).tag
            annotations = {_NAME: name, **({_REF: tag} if tag else {})}
            entries.append({**entry, "annotations": annotations})
    return msgspec.json.encode(
        {"schemaVersion": 2, "mediaType": MediaType.OCI_INDEX, "manifests": entries}
    )


def _docker_manifest(wanted: Sequence[tuple[ImageRecord, Sequence[str]]]) -> bytes:
    return msgspec.json.encode(
        [
            {
                "Config": _blob(record.config_digest),
                "RepoTags": [parse(name).familiar() for name in names] or None,
                "Layers": [_blob(layer.digest) for layer in record.layers],
            }
            for record, names in wanted
        ]
    )
