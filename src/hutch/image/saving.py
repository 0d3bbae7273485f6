"""Save images as one archive that docker, podman, skopeo and containerd all read.

It is an OCI layout with Docker's manifest.json beside it, as Docker itself writes since
version 25. The same images give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from hutch.errors import InvalidArgument, NotFound
from hutch.image.catalog import Images
from hutch.image.records import ImageRecord
from hutch.oci.reference import parse
from hutch.oci.types import MediaType
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.content import ContentStore
from hutch.storage.output import new_directory, open_output
from hutch.storage.tarstream import DIR, REG
from hutch.storage.tarwrite import END, header, padding

__all__ = ["FORMATS", "save_images"]

FORMATS = ("docker", "oci-archive", "oci-dir")
Wanted = tuple[ImageRecord, list[str]]
_CHUNK = 1 << 20
_NAME = "io.containerd.image.name"
_REF = "org.opencontainers.image.ref.name"


class Writable(Protocol):
    """Anything with `write`."""

    def write(self, data: bytes, /) -> object:
        """Write all of `data`."""
        ...


def save_images(
    names: Sequence[str],
    target: Writable | str | os.PathLike[str],
    *,
    images: Images,
    content: ContentStore,
    format: str = "docker",
    progress: Progress = silent,
) -> None:
    """Write images to a stream or a path: one archive, or with `oci-dir` a directory.

    An image given by reference goes by that name there; one given by its id has none.
    Nothing is written where an image or a blob is missing; a file or directory that cannot
    be written whole stays as it was. The caller holds a lease, or the images stay as
    nothing removes them.
    """
    if format not in FORMATS:
        raise InvalidArgument(
            f"expected one of {', '.join(FORMATS)}, got {format!r}", field="format"
        )
    wanted = _wanted(names, images)
    digests = _blobs(wanted, content)
    if format == "oci-dir":
        if not isinstance(target, (str, os.PathLike)):
            raise InvalidArgument("oci-dir is written to a directory", field="output")
        _save_layout(wanted, digests, os.fspath(target), content)
        return
    chunks = _archive(wanted, digests, content, docker=format == "docker")
    if isinstance(target, (str, os.PathLike)):
        with open_output(target) as file:
            _write(file, chunks, progress)
    else:
        _write(target, chunks, progress)


def _wanted(names: Sequence[str], images: Images) -> list[Wanted]:
    """Return each image once, with the names it was asked for by."""
    found: dict[str, tuple[ImageRecord, list[str]]] = {}
    for name in names:
        record = images.get(name)
        entry = found.setdefault(record.id, (record, []))
        try:
            canonical = parse(name).canonical()
        except InvalidArgument:
            continue
        if canonical in record.names and canonical not in entry[1]:
            entry[1].append(canonical)
    if not found:
        raise InvalidArgument("no image is named", field="images")
    return list(found.values())


def _write(target: Writable, chunks: Iterable[bytes], progress: Progress) -> None:
    done = 0
    for chunk in chunks:
        target.write(chunk)
        done += len(chunk)
        if len(chunk) > _CHUNK // 2:
            progress(ProgressEvent(item="archive", phase="saving", done=done))


def _save_layout(
    wanted: Sequence[Wanted], digests: dict[str, int], path: str, content: ContentStore
) -> None:
    with new_directory(path) as directory:
        for digest in digests:
            name = f"{directory}/{_blob(digest)}"
            os.makedirs(os.path.dirname(name), exist_ok=True)
            with content.open(digest) as source, open(name, "wb") as target:
                while data := source.read(_CHUNK):
                    target.write(data)
        for name, text in (("oci-layout", _LAYOUT), ("index.json", _index(wanted))):
            with open(f"{directory}/{name}", "wb") as target:
                target.write(text)


_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


def _blobs(wanted: Sequence[Wanted], content: ContentStore) -> dict[str, int]:
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
    wanted: Sequence[Wanted],
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


def _index(wanted: Sequence[Wanted]) -> bytes:
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


def _docker_manifest(wanted: Sequence[Wanted]) -> bytes:
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
