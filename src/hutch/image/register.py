"""From a manifest and a configuration to the record of an image: the last step of pull,
load, import, commit and build."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hutch.errors import InvalidArgument, Unsupported
from hutch.image.catalog import Images
from hutch.image.records import (
    HealthcheckConfig,
    HistoryRecord,
    ImageRecord,
    LayerRecord,
    RuntimeConfig,
)
from hutch.oci.digest import chain_ids, digest_of
from hutch.oci.platform import normalize
from hutch.oci.types import (
    LAYER_COMPRESSION,
    Descriptor,
    HealthConfig,
    ImageConfig,
    Manifest,
    ProcessConfig,
    decode_config,
    decode_manifest,
    is_foreign_layer,
)

__all__ = ["build_record", "check_layers", "register_image", "runtime_config"]

_NS = 1_000_000_000
_MAX_PORTS = 65_535


def register_image(
    images: Images,
    *,
    manifest: bytes,
    media_type: str,
    config: bytes,
    unpacked_sizes: Sequence[int] = (),
    names: Iterable[str] = (),
    repo_digests: Iterable[str] = (),
    action: str = "pull",
) -> ImageRecord:
    """Record an image and give it `names` (canonical `repository:tag`).

    Its blobs (manifest and configuration too) and unpacked layers must be in the store,
    held by a lease until this returns. `unpacked_sizes` has one entry per layer, or none.
    """
    record = build_record(
        manifest=manifest,
        media_type=media_type,
        config=config,
        unpacked_sizes=unpacked_sizes,
        names=names,
        repo_digests=repo_digests,
    )
    return images.add(record, action=action)


def build_record(
    *,
    manifest: bytes,
    media_type: str,
    config: bytes,
    unpacked_sizes: Sequence[int] = (),
    names: Iterable[str] = (),
    repo_digests: Iterable[str] = (),
) -> ImageRecord:
    """Return the record of an image; raise `InvalidArgument` where its parts disagree."""
    decoded = decode_manifest(manifest, media_type)
    if digest_of(config, decoded.config.digest.partition(":")[0]) != decoded.config.digest:
        raise InvalidArgument("image config: is not the one that the manifest names")
    image = decode_config(config)
    check_layers(decoded, image)
    platform = normalize(image.os or "", image.architecture or "", image.variant)
    return ImageRecord(
        id=decoded.config.digest,
        names=tuple(names),
        repo_digests=tuple(repo_digests),
        manifest_digest=digest_of(manifest),
        manifest_media_type=media_type,
        manifest_size=len(manifest),
        config_size=len(config),
        layers=_layers(decoded.layers, image.rootfs.diff_ids, unpacked_sizes),
        os=platform.os,
        architecture=platform.architecture,
        variant=platform.variant,
        created=image.created or "",
        author=image.author or "",
        comment=image.comment or "",
        config=runtime_config(image.config),
        history=_history(image),
    )


def check_layers(manifest: Manifest, image: ImageConfig, *, what: str = "image") -> None:
    """Refuse an image whose layers cannot be unpacked or do not match its configuration."""
    for number, layer in enumerate(manifest.layers):
        if is_foreign_layer(layer):
            raise Unsupported(
                f"{what}: layer {number} ({layer.digest[:19]}…) may not be distributed by"
                f" registries ({layer.media_type})",
                hint="images with foreign layers (Windows base images) are not supported",
            )
        if layer.media_type not in LAYER_COMPRESSION:
            raise Unsupported(
                f"{what}: layer {number} has media type {layer.media_type[:120]!r},"
                " which cannot be unpacked"
            )
    if len(manifest.layers) != len(image.rootfs.diff_ids):
        raise InvalidArgument(
            f"{what}: {len(manifest.layers)} layers in the manifest,"
            f" {len(image.rootfs.diff_ids)} in the configuration"
        )


def runtime_config(config: ProcessConfig | None, *, what: str = "image config") -> RuntimeConfig:
    """Return the checked, normalised form of an image's `config` object."""
    if config is None:
        return RuntimeConfig()
    return RuntimeConfig(
        env=_env(config.env or (), what),
        cmd=_argv(config.cmd, config.shell, "Cmd", what),
        entrypoint=_argv(config.entrypoint, config.shell, "Entrypoint", what),
        user=_text(config.user, "User", what),
        workdir=_text(config.working_dir, "WorkingDir", what),
        volumes=tuple(sorted(_path(path, "Volumes", what) for path in config.volumes or ())),
        exposed_ports=_ports(config.exposed_ports or (), what),
        labels=dict(config.labels or {}),
        stop_signal=_text(config.stop_signal, "StopSignal", what),
        healthcheck=_health(config.healthcheck),
        shell=tuple(config.shell or ()),
        on_build=tuple(config.on_build or ()),
    )


def _bad(what: str, field: str, problem: str) -> InvalidArgument:
    return InvalidArgument(f"{what}: {problem} - at `$.config.{field}`")


def _text(value: str | None, field: str, what: str) -> str:
    text = value or ""
    if "\0" in text:
        raise _bad(what, field, "contains a NUL character")
    return text


def _argv(
    value: list[str] | str | None, shell: list[str] | None, field: str, what: str
) -> tuple[str, ...]:
    """Return a command as words; a plain text is for the image's shell."""
    if isinstance(value, str):
        return (*(shell or ("/bin/sh", "-c")), _text(value, field, what))
    return tuple(_text(word, field, what) for word in value or ())


def _env(entries: Iterable[str], what: str) -> tuple[str, ...]:
    """Return KEY=VALUE entries, the last of a key winning in the place of the first."""
    seen: dict[str, str] = {}
    for entry in entries:
        key, equals, value = _text(entry, "Env", what).partition("=")
        if not key:
            raise _bad(what, "Env", f"an entry without a name: {entry[:40]!r}")
        if equals:
            seen[key] = value
    return tuple(f"{key}={value}" for key, value in seen.items())


def _path(path: str, field: str, what: str) -> str:
    import posixpath

    text = _text(path, field, what)
    # A relative one is taken from the root, as Docker does.
    normal = posixpath.normpath("/" + text).replace("//", "/")
    if normal == "/":
        raise _bad(what, field, f"a volume cannot be the root directory: {path[:80]!r}")
    return normal


def _ports(entries: Iterable[str], what: str) -> tuple[str, ...]:
    """Return `80/tcp` for every port that `80`, `80/udp` or `8000-8010/tcp` names, sorted."""
    ports: set[tuple[int, str]] = set()
    for entry in entries:
        low, high, protocol = _port_range(entry, what)
        if len(ports) + high - low >= _MAX_PORTS:
            raise _bad(what, "ExposedPorts", f"more than {_MAX_PORTS} ports")
        ports.update((number, protocol) for number in range(low, high + 1))
    return tuple(f"{number}/{protocol}" for number, protocol in sorted(ports))


def _port_range(text: str, what: str) -> tuple[int, int, str]:
    ports, _, protocol = text.partition("/")
    first, dash, last = ports.partition("-")
    protocol = protocol.lower() or "tcp"
    numbers = [first, last] if dash else [first]
    valid = all(n.isascii() and n.isdigit() and len(n) <= 5 for n in numbers)
    if not valid or protocol not in ("tcp", "udp", "sctp"):
        raise _bad(what, "ExposedPorts", f"expected port/protocol, got {text[:40]!r}")
    low, high = int(numbers[0]), int(numbers[-1])
    if not 1 <= low <= high <= 65535:
        raise _bad(what, "ExposedPorts", f"out of range: {text[:40]!r}")
    return low, high, protocol


def _health(health: HealthConfig | None) -> HealthcheckConfig | None:
    if health is None or not health.test:
        return None
    return HealthcheckConfig(
        test=tuple(health.test),
        interval_s=max(0, health.interval) / _NS,
        timeout_s=max(0, health.timeout) / _NS,
        start_period_s=max(0, health.start_period) / _NS,
        start_interval_s=max(0, health.start_interval) / _NS,
        retries=max(0, health.retries),
    )


def _layers(
    blobs: Sequence[Descriptor], diff_ids: Sequence[str], unpacked_sizes: Sequence[int]
) -> tuple[LayerRecord, ...]:
    sizes = unpacked_sizes or [0] * len(blobs)
    chain = chain_ids(list(diff_ids))
    return tuple(
        LayerRecord(
            digest=blob.digest,
            size=blob.size,
            media_type=blob.media_type,
            diff_id=diff_id,
            chain_id=chain_id,
            unpacked_size=size,
        )
        for blob, diff_id, chain_id, size in zip(blobs, diff_ids, chain, sizes, strict=True)
    )


def _history(image: ImageConfig) -> tuple[HistoryRecord, ...]:
    """Return the steps with the layer each made; steps and layers may disagree in the wild."""
    records, layer = [], 0
    for step in image.history or ():
        made = not step.empty_layer and layer < len(image.rootfs.diff_ids)
        records.append(
            HistoryRecord(
                created=step.created or "",
                created_by=step.created_by or "",
                author=step.author or "",
                comment=step.comment or "",
                layer=layer if made else -1,
            )
        )
        layer += made
    return tuple(records)
