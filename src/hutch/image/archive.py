"""Load images from archives: OCI layouts (a directory or a tar) and Docker archives.

The tar is read once and in order, so it may come through a pipe, compressed or not: every
file in it becomes a blob by its own digest, and what no image needs is freed at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from hutch.decoding import decode_json
from hutch.errors import HutchError, IntegrityError, InvalidArgument, NotFound
from hutch.image.assemble import open_archive
from hutch.image.catalog import Images
from hutch.image.records import ImageRecord
from hutch.image.register import build_record, check_layers, register_image
from hutch.image.saving import save_images
from hutch.image.unpacking import unpack_stored
from hutch.oci.digest import digest_of, is_digest
from hutch.oci.platform import WantedPlatform, choose, host_platform, parse_platform
from hutch.oci.reference import parse
from hutch.oci.types import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    MediaType,
    decode_config,
    decode_index,
    decode_manifest,
)
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.beneath import normalise
from hutch.storage.compression import Readable, decompress, detect
from hutch.storage.content import ContentStore
from hutch.storage.gc import Collector
from hutch.storage.layers import Layers
from hutch.storage.leases import Lease, Leases
from hutch.storage.tarstream import LNK, REG, SYM, TarReader

__all__ = ["load_images", "save_images"]

T = TypeVar("T")

_MAX_FILES = 20_000
_MAX_DOCUMENT = 16 << 20
_MAX_DEPTH = 4
_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


class _DockerImage(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """One image of a Docker archive's manifest.json."""

    config: str
    repo_tags: list[str] | None = None
    layers: list[str] | None = None


def load_images(
    source: Readable | str | os.PathLike[str],
    *,
    images: Images,
    content: ContentStore,
    layers: Layers,
    leases: Leases,
    collector: Collector,
    references: Sequence[str] = (),
    platform: str | None = None,
    progress: Progress = silent,
) -> list[ImageRecord]:
    """Load every image of an archive (those named in `references`, if any) and return them.

    `source` is a stream, or the path of an archive or of an OCI layout directory. Raises
    `InvalidArgument` where it is neither kind of archive, `IntegrityError` where content
    does not match its digest, and `NotFound` where a wanted reference is not in it. The
    phase `loaded` of `progress` is told for each name an image came by, or for its id.
    """
    wanted = parse_platform(platform) if platform else host_platform()
    archive = _Archive(content, layers)
    try:
        with leases.hold(purpose="load") as lease:
            _read(archive, source, progress)
            found = _Loader(archive, wanted, references, lease).images()
            return [_register(one, archive, images, layers, lease, progress) for one in found]
    finally:
        _forget_unused(archive, collector)


def _read(archive: _Archive, source: Readable | str | os.PathLike[str], progress: Progress) -> None:
    label = "archive"
    try:
        if not isinstance(source, (str, os.PathLike)):
            _read_tar(archive, source, progress)
        elif os.path.isdir(source):
            _read_directory(archive, os.fspath(source))
        else:
            label = f"archive {os.fspath(source)}"
            with open_archive(source) as file:
                _read_tar(archive, file, progress)
    except IntegrityError as error:
        raise IntegrityError(f"{label}: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise InvalidArgument(f"{label}: {(error.strerror or str(error)).lower()}") from error


def _forget_unused(archive: _Archive, collector: Collector) -> None:
    """Free what came with the archive and no image has, nor somebody else by now."""
    try:
        collector.collect(only=archive.new)
    except (HutchError, OSError):
        # Whatever failed before is what the caller has to hear of; the next collection
        # frees these too.
        pass


class _Archive:
    """The files of an archive by name, each a blob in the content store."""

    def __init__(self, content: ContentStore, layers: Layers) -> None:
        self.content = content
        self._layers = layers
        self._files: dict[str, tuple[str, int]] = {}
        self._links: dict[str, str] = {}
        self.new: set[str] = set()

    def add(self, name: str, chunks: Iterable[bytes]) -> None:
        """Take a file in."""
        if len(self._files) >= _MAX_FILES:
            raise InvalidArgument(f"archive: more than {_MAX_FILES} files")
        with self.content.new() as blob:
            for chunk in chunks:
                blob.write(chunk)
            digest = blob.digest
            if not self.content.has(digest):
                self.new.add(digest)
            done = blob.commit()
        self._files[name] = (done.digest, done.size)

    def link(self, name: str, target: str) -> None:
        """Take a link in."""
        self._links[name] = target

    def find(self, name: str) -> tuple[str, int]:
        """Return digest and size of a file, links followed within the archive."""
        for _ in range(16):
            if name in self._files:
                return self._files[name]
            if name not in self._links:
                break
            name = self._links[name]
        raise InvalidArgument(f"archive: has no {name[:200]!r}")

    @property
    def is_empty(self) -> bool:
        """Whether no file came."""
        return not self._files

    def has(self, name: str) -> bool:
        return name in self._files or name in self._links

    def read(self, name: str) -> bytes:
        """Return a document's bytes."""
        digest, size = self.find(name)
        if size > _MAX_DOCUMENT:
            raise InvalidArgument(f"archive: {name} is larger than {_MAX_DOCUMENT} bytes")
        return self.content.read(digest, _MAX_DOCUMENT)

    def blob(self, descriptor: Descriptor) -> bytes:
        """Return a blob of the layout, checked against its descriptor."""
        self.check(descriptor)
        return self.read(_blob_name(descriptor.digest))

    def check(self, descriptor: Descriptor) -> None:
        """Raise unless the blob is here and is what the descriptor says."""
        if not is_digest(descriptor.digest):
            raise InvalidArgument(f"archive: not a digest: {descriptor.digest[:100]!r}")
        digest, size = self.find(_blob_name(descriptor.digest))
        if digest != descriptor.digest or size != descriptor.size:
            raise IntegrityError(
                f"archive: blob {descriptor.digest} has digest {digest} and {size} bytes"
            )

    def note_layers(self, chain_ids: Iterable[str]) -> None:
        """Remember which of these layers are not there yet."""
        self.new.update(chain for chain in chain_ids if not self._layers.has(chain))


def _blob_name(digest: str) -> str:
    algorithm, _, digits = digest.partition(":")
    return f"blobs/{algorithm}/{digits}"


def _read_tar(archive: _Archive, stream: Readable, progress: Progress) -> None:
    reader = TarReader(decompress(stream))
    done = 0
    for entry in reader:
        name = os.fsdecode(normalise(entry.name))
        if entry.type == REG and name:
            if entry.sparse is not None:
                raise InvalidArgument(f"archive: {name} is a sparse file")
            archive.add(name, _pieces(reader))
            done += entry.size
            progress(ProgressEvent(item="archive", phase="loading", done=done))
        elif entry.type == LNK:
            archive.link(name, os.fsdecode(normalise(entry.linkname)))
        elif entry.type == SYM:
            # Old Docker archives share layers by links to ../ID/layer.tar.
            parent = name.rpartition("/")[0]
            target = os.fsdecode(entry.linkname)
            archive.link(name, os.path.normpath(f"{parent}/{target}").lstrip("/"))


def _pieces(reader: TarReader) -> Iterator[bytes]:
    while piece := reader.piece():
        yield bytes(piece)


def _read_directory(archive: _Archive, path: str) -> None:
    names = ["oci-layout", "index.json"]
    for algorithm in ("sha256", "sha512"):
        directory = f"{path}/blobs/{algorithm}"
        if os.path.isdir(directory):
            names += sorted(f"blobs/{algorithm}/{name}" for name in os.listdir(directory))
    for name in names:
        try:
            fd = os.open(f"{path}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        with open(fd, "rb") as file:
            archive.add(name, _chunks(file))


def _chunks(stream: Readable) -> Iterator[bytes]:
    while data := stream.read(1 << 20):
        yield data


class _Image(msgspec.Struct, frozen=True, kw_only=True):
    """One image found in an archive."""

    names: tuple[str, ...]
    manifest: bytes
    media_type: str
    repo_digests: tuple[str, ...] = ()


class _Loader:
    """Find the images of an archive."""

    def __init__(
        self,
        archive: _Archive,
        platform: WantedPlatform,
        references: Sequence[str],
        lease: Lease,
    ) -> None:
        self._archive = archive
        self._platform = platform
        self._wanted = {parse(r, field="references").canonical() for r in references}
        self._lease = lease

    def images(self) -> list[_Image]:
        """Return the wanted images, all of their blobs being in the archive."""
        archive = self._archive
        if archive.has("oci-layout") and archive.has("index.json"):
            found = list(self._layout())
        elif archive.has("manifest.json"):
            found = [self._docker(image) for image in self._docker_images()]
        elif archive.is_empty:
            # Most likely the program before in the pipe has failed.
            raise InvalidArgument("archive: is empty")
        else:
            raise InvalidArgument(
                "archive: neither an OCI layout (index.json) nor a Docker archive (manifest.json)",
                hint="to make an image of a root file system, use 'hutch import'",
            )
        if self._wanted:
            missing = self._wanted - {name for image in found for name in image.names}
            if missing:
                raise NotFound(f"archive: has no image {sorted(missing)[0]}")
            found = [
                msgspec.structs.replace(image, names=tuple(self._wanted & set(image.names)))
                for image in found
                if self._wanted & set(image.names)
            ]
        if not found:
            raise InvalidArgument("archive: holds no image")
        return found

    # ---- OCI layout -----------------------------------------------------------------

    def _layout(self) -> Iterator[_Image]:
        tags: dict[str, list[str]] = {}
        if self._archive.has("manifest.json"):
            for image in self._docker_images():
                digest, _ = self._archive.find(_clean(image.config))
                tags.setdefault(digest, []).extend(_canonical(image.repo_tags or []))
        index = decode_index(self._archive.read("index.json"), MediaType.OCI_INDEX)
        merged: dict[str, _Image] = {}
        for entry in index.manifests:
            names = _names(entry)
            found = self._follow(entry, 0)
            if found is None:
                continue
            data, media_type, manifest_digest = found
            config = decode_manifest(data, media_type).config.digest
            names = (*names, *tags.get(config, []))
            known = merged.get(manifest_digest)
            if known is not None:
                names = (*known.names, *names)
            merged[manifest_digest] = _Image(
                names=tuple(dict.fromkeys(names)), manifest=data, media_type=media_type
            )
        yield from merged.values()

    def _follow(self, entry: Descriptor, depth: int) -> tuple[bytes, str, str] | None:
        """Return the manifest that a descriptor leads to, through indexes by platform."""
        if depth > _MAX_DEPTH:
            raise InvalidArgument("archive: indexes nested too deep")
        if entry.media_type in INDEX_TYPES:
            index = decode_index(self._archive.blob(entry), entry.media_type)
            return self._follow(choose(index, self._platform, what="archive"), depth + 1)
        if entry.media_type not in MANIFEST_TYPES:
            return None
        return self._archive.blob(entry), entry.media_type, entry.digest

    # ---- Docker archive ---------------------------------------------------------------

    def _docker_images(self) -> list[_DockerImage]:
        try:
            return decode_json(self._archive.read("manifest.json"), list[_DockerImage])
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"archive: manifest.json: {error}") from error

    def _docker(self, image: _DockerImage) -> _Image:
        """Return an image of a Docker archive with a manifest made for it."""
        archive = self._archive
        config_name = _clean(image.config)
        config = archive.read(config_name)
        decode_config(config)
        blobs = []
        for name in image.layers or []:
            digest, size = archive.find(_clean(name))
            with archive.content.open(digest) as file:
                kind = detect(file.read(6) or b"")
            if kind not in _LAYER_TYPES:
                raise InvalidArgument(f"archive: layer {name[:100]!r} is compressed by {kind}")
            blobs.append({"mediaType": _LAYER_TYPES[kind], "digest": digest, "size": size})
        manifest = msgspec.json.encode(
            {
                "schemaVersion": 2,
                "mediaType": MediaType.OCI_MANIFEST,
                "config": {
                    "mediaType": MediaType.OCI_CONFIG,
                    "digest": digest_of(config),
                    "size": len(config),
                },
                "layers": blobs,
            }
        )
        return _Image(
            names=tuple(_canonical(image.repo_tags or [])),
            manifest=manifest,
            media_type=MediaType.OCI_MANIFEST,
        )


_LAYER_TYPES = {
    "none": MediaType.OCI_LAYER,
    "gzip": MediaType.OCI_LAYER_GZIP,
    "zstd": MediaType.OCI_LAYER_ZSTD,
}


def _clean(name: str) -> str:
    return os.fsdecode(normalise(os.fsencode(name)))


def _canonical(names: Iterable[str]) -> list[str]:
    return [parse(name, field="RepoTags").canonical() for name in names if name != "<none>:<none>"]


def _names(entry: Descriptor) -> tuple[str, ...]:
    """Return the names that a layout gives an image: containerd's whole one, else the
    reference if it is more than a bare tag."""
    annotations = entry.annotations or {}
    for key in _NAMES:
        text = annotations.get(key, "")
        if not text or (key == _NAMES[1] and not any(mark in text for mark in "/:")):
            continue
        try:
            reference = parse(text)
        except HutchError:
            continue
        return (reference.canonical(),) if reference.digest is None else ()
    return ()


def _register(
    image: _Image,
    archive: _Archive,
    images: Images,
    layers: Layers,
    lease: Lease,
    progress: Progress,
) -> ImageRecord:
    manifest = decode_manifest(image.manifest, image.media_type)
    content = archive.content
    lease.add(*(blob.digest for blob in (manifest.config, *manifest.layers)))
    # A Docker archive's layers lie under names of their own: look for blobs by digest.
    for blob in (manifest.config, *manifest.layers):
        if not content.has(blob.digest) or content.size(blob.digest) != blob.size:
            raise IntegrityError(f"archive: blob {blob.digest} is missing or of wrong size")
    config = content.read(manifest.config.digest)
    check_layers(manifest, decode_config(config), what="archive")
    record = build_record(manifest=image.manifest, media_type=image.media_type, config=config)
    lease.add(*record.digests, *record.chain_ids)
    archive.note_layers(record.chain_ids)
    progress(ProgressEvent(item=record.id, phase="extracting"))
    done = unpack_stored(record.layers, content, layers)
    if not content.has(digest_of(image.manifest)):
        archive.new.add(digest_of(image.manifest))
    content.put(image.manifest)
    record = register_image(
        images,
        manifest=image.manifest,
        media_type=image.media_type,
        config=config,
        unpacked_sizes=[layer.size for layer in done],
        names=image.names,
        action="load",
    )
    for name in image.names:
        progress(ProgressEvent(item=parse(name).familiar(), phase="loaded"))
    if not image.names:
        progress(ProgressEvent(item=record.id, phase="loaded"))
    return record
