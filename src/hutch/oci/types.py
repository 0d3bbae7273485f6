"""Wire types of the OCI image specification and of Docker's schema 2, decoded with bounds.

Both spell the same JSON: a descriptor, a manifest, an index and an image configuration.
Decoding checks size, counts, digests and media types, and names the place of an error.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from hutch.decoding import decode_json
from hutch.errors import InvalidArgument, Unsupported
from hutch.oci.digest import is_digest

__all__ = [
    "CONFIG_TYPES",
    "Descriptor",
    "HealthConfig",
    "History",
    "ImageConfig",
    "Index",
    "INDEX_TYPES",
    "LAYER_COMPRESSION",
    "MANIFEST_TYPES",
    "Manifest",
    "MediaType",
    "Platform",
    "ProcessConfig",
    "RootFS",
    "decode_config",
    "decode_index",
    "decode_manifest",
    "is_foreign_layer",
    "manifest_kind",
]

MAX_MANIFEST_BYTES = 4 << 20
MAX_CONFIG_BYTES = 16 << 20
MAX_LAYERS = 512
MAX_INDEX_ENTRIES = 2048
MAX_HISTORY = 4096
MAX_LIST = 8192
# More than execve(2) takes: of its 2 MiB each word has a pointer and a zero byte.
MAX_WORDS = 1 << 18
# Servers of telephony and the like expose ranges of tens of thousands, each port an entry.
MAX_PORTS = 65_535
_MOST = {"entrypoint": MAX_WORDS, "cmd": MAX_WORDS, "exposed_ports": MAX_PORTS}
MAX_BLOB_BYTES = 1 << 40


class MediaType:
    """Media types by name."""

    OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
    OCI_INDEX = "application/vnd.oci.image.index.v1+json"
    OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
    OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
    OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
    OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
    DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
    DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
    DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
    DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
    DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"
    DOCKER_V1 = "application/vnd.docker.distribution.manifest.v1+json"
    DOCKER_V1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"


MANIFEST_TYPES = (MediaType.OCI_MANIFEST, MediaType.DOCKER_MANIFEST)
INDEX_TYPES = (MediaType.OCI_INDEX, MediaType.DOCKER_LIST)
CONFIG_TYPES = (MediaType.OCI_CONFIG, MediaType.DOCKER_CONFIG)

LAYER_COMPRESSION = {
    MediaType.OCI_LAYER: "",
    MediaType.OCI_LAYER_GZIP: "gzip",
    MediaType.OCI_LAYER_ZSTD: "zstd",
    MediaType.DOCKER_LAYER: "",
    MediaType.DOCKER_LAYER_GZIP: "gzip",
    MediaType.DOCKER_LAYER_ZSTD: "zstd",
}
"""The layers that can be unpacked, and how each is compressed ("" for plain tar)."""


class Wire(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Base of the types whose JSON is in camel case; unknown fields are skipped."""


class Platform(Wire, frozen=True, kw_only=True, rename={"os_version": "os.version"}):
    """What an entry of an index is for; every field may be missing in the wild."""

    os: str = ""
    architecture: str = ""
    variant: str | None = None
    os_version: str | None = None


class Descriptor(Wire, frozen=True, kw_only=True):
    """A piece of content: its type, digest and size."""

    media_type: str = ""
    digest: str
    size: int
    urls: list[str] | None = None
    annotations: dict[str, str] | None = None
    platform: Platform | None = None
    artifact_type: str | None = None


class Manifest(Wire, frozen=True, kw_only=True):
    """An image manifest, OCI's or Docker's schema 2."""

    schema_version: int
    media_type: str = ""
    config: Descriptor
    layers: list[Descriptor]
    annotations: dict[str, str] | None = None
    artifact_type: str | None = None
    subject: Descriptor | None = None


class Index(Wire, frozen=True, kw_only=True):
    """An image index, or Docker's manifest list."""

    schema_version: int
    media_type: str = ""
    manifests: list[Descriptor]
    annotations: dict[str, str] | None = None
    subject: Descriptor | None = None


class Pascal(msgspec.Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """Base of the parts of an image configuration that Docker spells in Pascal case."""


class HealthConfig(Pascal, frozen=True, kw_only=True):
    """HEALTHCHECK; times in nanoseconds."""

    test: list[str] | None = None
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


class ProcessConfig(Pascal, frozen=True, kw_only=True):
    """The `config` object: how to run the image."""

    user: str | None = None
    exposed_ports: dict[str, Any] | None = None
    env: list[str] | None = None
    entrypoint: list[str] | str | None = None
    cmd: list[str] | str | None = None
    volumes: dict[str, Any] | None = None
    working_dir: str | None = None
    labels: dict[str, str] | None = None
    stop_signal: str | None = None
    healthcheck: HealthConfig | None = None
    shell: list[str] | None = None
    args_escaped: bool | None = None
    on_build: list[str] | None = None


class RootFS(msgspec.Struct, frozen=True, kw_only=True):
    """The layers by the digests of their uncompressed tar, lowest first."""

    type: str = "layers"
    diff_ids: list[str]


class History(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of the making of an image."""

    created: str | None = None
    created_by: str | None = None
    author: str | None = None
    comment: str | None = None
    empty_layer: bool | None = None


class ImageConfig(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename={"os_version": "os.version", "os_features": "os.features"},
):
    """An image configuration, OCI's or Docker's. Any text may be null, as Go writes it."""

    architecture: str | None = None
    os: str | None = None
    variant: str | None = None
    os_version: str | None = None
    os_features: list[str] | None = None
    created: str | None = None
    author: str | None = None
    comment: str | None = None
    config: ProcessConfig | None = None
    rootfs: RootFS
    history: list[History] | None = None


def decode_manifest(data: bytes, media_type: str = "", *, what: str = "manifest") -> Manifest:
    """Return a checked manifest; `media_type` is what the transport said it is.

    Raises `InvalidArgument` with the path of the offending value, `Unsupported` for
    Docker's schema 1 and for artifacts that are no image.
    """
    manifest = _decode(data, Manifest, MAX_MANIFEST_BYTES, what)
    if manifest.schema_version != 2:
        raise Unsupported(
            f"{what}: schema version {manifest.schema_version} is not supported",
            hint="push the image again with a current tool",
        )
    _check_media_type(manifest.media_type, media_type, MANIFEST_TYPES, what)
    if len(manifest.layers) > MAX_LAYERS:
        raise _bad(what, "$.layers", f"more than {MAX_LAYERS} layers")
    _check_descriptor(manifest.config, what, "$.config", MAX_CONFIG_BYTES)
    if manifest.config.media_type not in CONFIG_TYPES:
        raise Unsupported(
            f"{what}: not a container image but {manifest.config.media_type or 'unknown'!r}"
        )
    for number, layer in enumerate(manifest.layers):
        _check_descriptor(layer, what, f"$.layers[{number}]", MAX_BLOB_BYTES)
    return manifest


def decode_index(data: bytes, media_type: str = "", *, what: str = "index") -> Index:
    """Return a checked index or manifest list."""
    index = _decode(data, Index, MAX_MANIFEST_BYTES, what)
    if index.schema_version != 2:
        raise Unsupported(f"{what}: schema version {index.schema_version} is not supported")
    _check_media_type(index.media_type, media_type, INDEX_TYPES, what)
    if len(index.manifests) > MAX_INDEX_ENTRIES:
        raise _bad(what, "$.manifests", f"more than {MAX_INDEX_ENTRIES} manifests")
    for number, entry in enumerate(index.manifests):
        _check_descriptor(entry, what, f"$.manifests[{number}]", MAX_MANIFEST_BYTES)
    return index


def decode_config(data: bytes, *, what: str = "image config") -> ImageConfig:
    """Return a checked image configuration."""
    config = _decode(data, ImageConfig, MAX_CONFIG_BYTES, what)
    if config.rootfs.type != "layers":
        raise _bad(what, "$.rootfs.type", f"expected 'layers', got {config.rootfs.type[:40]!r}")
    if len(config.rootfs.diff_ids) > MAX_LAYERS:
        raise _bad(what, "$.rootfs.diff_ids", f"more than {MAX_LAYERS} layers")
    for number, diff_id in enumerate(config.rootfs.diff_ids):
        if not is_digest(diff_id):
            raise _bad(what, f"$.rootfs.diff_ids[{number}]", f"bad digest {diff_id[:80]!r}")
    if len(config.history or ()) > MAX_HISTORY:
        raise _bad(what, "$.history", f"more than {MAX_HISTORY} steps")
    if config.config is not None:
        _check_lengths(config.config, what)
    return config


def _check_lengths(config: ProcessConfig, what: str) -> None:
    names = zip(config.__struct_fields__, config.__struct_encode_fields__, strict=True)
    for name, spelt in names:
        value = getattr(config, name)
        most = _MOST.get(name, MAX_LIST)
        if isinstance(value, (list, dict)) and len(value) > most:
            raise _bad(what, f"$.config.{spelt}", f"more than {most} entries")


def manifest_kind(data: bytes, media_type: str, *, what: str = "manifest") -> str:
    """Return the media type of a manifest or index, from the transport or from itself.

    Raises `Unsupported` where it is neither.
    """
    declared = media_type.partition(";")[0].strip().lower()
    if declared in MANIFEST_TYPES or declared in INDEX_TYPES:
        return declared
    if declared in (MediaType.DOCKER_V1, MediaType.DOCKER_V1_SIGNED):
        raise Unsupported(
            f"{what}: Docker's schema 1 is not supported",
            hint="push the image again with a current tool",
        )
    probe = _decode(data, _Probe, MAX_MANIFEST_BYTES, what)
    if probe.media_type in MANIFEST_TYPES or probe.media_type in INDEX_TYPES:
        return probe.media_type
    if probe.schema_version == 1:
        return manifest_kind(data, MediaType.DOCKER_V1, what=what)
    has_manifests, has_layers = bool(bytes(probe.manifests)), bool(bytes(probe.layers))
    if has_manifests and not has_layers:
        return MediaType.OCI_INDEX
    if has_layers and not has_manifests:
        return MediaType.OCI_MANIFEST
    raise Unsupported(f"{what}: neither an image nor an index ({declared or 'no type'!r})")


def is_foreign_layer(descriptor: Descriptor) -> bool:
    """Tell whether a layer may not be distributed by registries (Windows base layers)."""
    media_type = descriptor.media_type
    return ".foreign." in media_type or ".nondistributable." in media_type


class _Probe(Wire, frozen=True, kw_only=True):
    schema_version: int = 0
    media_type: str = ""
    manifests: msgspec.Raw = msgspec.Raw()
    layers: msgspec.Raw = msgspec.Raw()


T = TypeVar("T")


def _decode(data: bytes, kind: type[T], limit: int, what: str) -> T:
    if len(data) > limit:
        raise InvalidArgument(f"{what}: larger than {limit} bytes")
    try:
        return decode_json(data, kind)
    except msgspec.ValidationError as exc:
        raise InvalidArgument(f"{what}: {_sentence(exc)}") from exc
    except msgspec.DecodeError as exc:
        raise InvalidArgument(f"{what}: not JSON: {_sentence(exc)}") from exc


def _sentence(exc: Exception) -> str:
    text = str(exc)[:300]
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def _bad(what: str, path: str, problem: str) -> InvalidArgument:
    return InvalidArgument(f"{what}: {problem} - at `{path}`")


def _check_media_type(inside: str, outside: str, allowed: tuple[str, ...], what: str) -> None:
    """Refuse a document that says to be another kind than the transport said.

    One text readable both as a manifest and as an index would be two images under one
    digest (CVE-2021-41190).
    """
    if inside and inside not in allowed:
        raise _bad(what, "$.mediaType", f"unexpected media type {inside[:120]!r}")
    outside = outside.partition(";")[0].strip().lower()
    if inside and outside in (*MANIFEST_TYPES, *INDEX_TYPES) and inside != outside:
        raise _bad(what, "$.mediaType", f"is {inside!r} where the registry said {outside!r}")


def _check_descriptor(descriptor: Descriptor, what: str, path: str, limit: int) -> None:
    if not is_digest(descriptor.digest):
        raise _bad(what, f"{path}.digest", f"bad digest {descriptor.digest[:80]!r}")
    if not 0 <= descriptor.size <= limit:
        raise _bad(what, f"{path}.size", f"{descriptor.size} is out of range (0 to {limit})")
