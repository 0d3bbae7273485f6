"""Caches in a registry: which layer each step made, as an artifact of its own or in an image.

The artifact is a manifest whose layers are the steps' and whose configuration says by which
key each is found (`ENTRIES`); with `type=inline` the image's own configuration says it of the
image's own layers. A layer is fetched once a step asks for it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.decoding import decode_json, encode_json
from hutch.engine.builder.cache import CacheRecord
from hutch.engine.builder.options import parse_cache
from hutch.errors import HutchError, InvalidArgument, NotFound
from hutch.image.records import LayerRecord
from hutch.image.registry import Repository
from hutch.image.upload import upload_blob
from hutch.oci.digest import digest_of
from hutch.oci.reference import parse
from hutch.oci.types import Descriptor, MediaType
from hutch.storage.layers import chain_id_of

if TYPE_CHECKING:
    from hutch.engine.builder.build import Build
    from hutch.engine.builder.events import Step
    from hutch.image.registry_config import RegistryConfig

__all__ = ["INLINE", "RemoteCache", "export_cache", "inline_entries"]

CONFIG_TYPE = "application/vnd.hutch.buildcache.config.v1+json"
INLINE = "hutch.buildcache"
_MAX_CONFIG = 16 << 20
_MAX_ENTRIES = 50_000


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A step as the artifact tells it."""

    key: str
    description: str
    kind: str
    digest: str
    size: int
    media_type: str
    diff_id: str
    unpacked_size: int
    created_at: float


class RemoteCache:
    """The caches that a build was told to look into; thread-safe."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._lock = threading.Lock()
        self._sources: list[tuple[str, dict[str, Entry]]] | None = None

    def find(self, key: str, parent: str, step: Step) -> CacheRecord | None:
        """Return what a step of this key made according to one of them, fetched."""
        if not self._build.options.cache_from:
            return None
        with self._lock:
            if self._sources is None:
                self._sources = self._load()
            sources = self._sources
        for name, entries in sources:
            entry = entries.get(key)
            if entry is None:
                continue
            try:
                self._fetch(name, entry, step)
            except HutchError as error:
                self._build.check()
                self._build.reporter.warn(f"cache {name}: {error.message}")
                continue
            self._build.cache.store(key, _record(entry, parent))
            return self._build.cache.find(key, parent)
        return None

    def _load(self) -> list[tuple[str, dict[str, Entry]]]:
        found = []
        for text in self._build.options.cache_from:
            _, name = parse_cache(text, "cache_from")
            try:
                found.append((name, self._entries(name)))
            except InvalidArgument:
                raise
            except HutchError as error:
                self._build.reporter.warn(f"cache {name}: {error.message}")
        return found

    def _entries(self, name: str) -> dict[str, Entry]:
        """Return the steps that a name in a registry, or an image that is here, tells of."""
        context = self._build.context
        reference = parse(name, field="cache_from")
        local = context.images.find(name)
        if local is not None:
            return _of_image(context.content.read(local.id))
        with Repository(reference, _config(self._build, name)) as repository:
            fetched = repository.manifest(reference.target)
            manifest = decode_json(fetched.data, dict[str, Any])
            config = _descriptor(manifest.get("config"))
            if config.size > _MAX_CONFIG:
                raise InvalidArgument(f"cache {name}: its configuration is too large")
            data = b"".join(repository.blob(config))
        if digest_of(data) != config.digest:
            raise NotFound(f"cache {name}: its configuration is damaged")
        if config.media_type != CONFIG_TYPE:
            return _of_image(data)
        return _decode(data)

    def _fetch(self, name: str, entry: Entry, step: Step) -> None:
        content = self._build.context.content
        self._build.lease.add(entry.digest, entry.diff_id)
        reference = parse(name)
        blob = Descriptor(media_type=entry.media_type, digest=entry.digest, size=entry.size)
        with content.writer(entry.digest, entry.size, timeout_s=600) as writer:
            if writer.complete:
                return
            with Repository(reference, _config(self._build, name)) as repository:
                for chunk in repository.blob(blob, writer.offset):
                    self._build.check()
                    writer.write(chunk)
                    step.progress(f"{entry.digest}: downloading", writer.offset, entry.size)
            writer.commit()


def _record(entry: Entry, parent: str) -> CacheRecord:
    layer = LayerRecord(
        digest=entry.digest,
        size=entry.size,
        media_type=entry.media_type,
        diff_id=entry.diff_id,
        chain_id=chain_id_of(parent, entry.diff_id),
        unpacked_size=entry.unpacked_size,
    )
    return CacheRecord(
        description=entry.description,
        kind=entry.kind,
        parent=parent,
        layer=layer,
        created_at=entry.created_at,
        size=entry.size + entry.unpacked_size,
    )


def _descriptor(value: object) -> Descriptor:
    try:
        return msgspec.convert(value, Descriptor)
    except msgspec.ValidationError as error:
        raise NotFound(f"cache: not a manifest: {error}") from None


def _config(build: Build, name: str) -> RegistryConfig:
    from hutch.engine.images import registry_config

    return registry_config(build.context, name, build.credentials(name))


def _of_image(data: bytes) -> dict[str, Entry]:
    try:
        document = decode_json(data, dict[str, Any])
        return _checked(msgspec.convert(document.get(INLINE) or [], list[Entry]))
    except msgspec.DecodeError as error:
        raise NotFound(f"cache: cannot be read: {error}") from None


def _decode(data: bytes) -> dict[str, Entry]:
    try:
        return _checked(decode_json(data, list[Entry]))
    except msgspec.DecodeError as error:
        raise NotFound(f"cache: cannot be read: {error}") from None


def _checked(entries: list[Entry]) -> dict[str, Entry]:
    from hutch.oci.digest import is_digest

    if len(entries) > _MAX_ENTRIES:
        raise NotFound("cache: too many entries")
    return {
        entry.key: entry
        for entry in entries
        if is_digest(entry.digest) and is_digest(entry.diff_id) and entry.size >= 0
    }


# ---- writing ------------------------------------------------------------------------------


def _made(build: Build) -> list[Entry]:
    return [
        Entry(
            key=key,
            description=record.description,
            kind=record.kind,
            digest=record.layer.digest,
            size=record.layer.size,
            media_type=record.layer.media_type,
            diff_id=record.layer.diff_id,
            unpacked_size=record.layer.unpacked_size,
            created_at=record.created_at,
        )
        for key, record in sorted(build.keys.items())
        if record.layer is not None
    ]


def inline_entries(build: Build, layers: list[LayerRecord]) -> list[dict[str, Any]]:
    """Return what an image says of its own layers."""
    own = {layer.digest for layer in layers}
    return [msgspec.to_builtins(entry) for entry in _made(build) if entry.digest in own]


def export_cache(build: Build, text: str) -> None:
    """Write what the steps of a build made to where `--cache-to` says."""
    kind, name = parse_cache(text, "cache_to")
    if kind == "inline":
        return
    entries = _made(build)
    content = build.context.content
    data = encode_json(entries)
    content.put(data)
    config = digest_of(data)
    build.lease.add(config)
    layers = {entry.digest: entry for entry in entries}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MediaType.OCI_MANIFEST,
        "config": {"mediaType": CONFIG_TYPE, "digest": config, "size": len(data)},
        "layers": [
            {"mediaType": entry.media_type, "digest": digest, "size": entry.size}
            for digest, entry in layers.items()
        ],
    }
    reference = parse(name, field="cache_to")
    reach = _config(build, name)
    with Repository(reference, reach, actions="pull,push", mirrors=False) as repository:
        for digest, size in [*((d, e.size) for d, e in layers.items()), (config, len(data))]:
            build.check()

            def opener(digest: str = digest) -> Any:
                return content.open(digest)

            upload_blob(repository, digest, size, opener)
        repository.put_manifest(reference.target, encode_json(manifest), MediaType.OCI_MANIFEST)
