"""Pull an image: reference → manifest → configuration → layers in parallel → record.

Nothing that is present is fetched again, whoever brought it. Until the record is written
the image does not exist; what came until then is kept for the next try.
"""

from __future__ import annotations

import threading
from functools import partial

import msgspec

from hutch.errors import Exhausted, IntegrityError, NotFound, Unsupported
from hutch.image.answers import read_bounded
from hutch.image.catalog import Images
from hutch.image.fetch import Meter, fetch_layer
from hutch.image.parallel import Halt, run_all
from hutch.image.records import ImageRecord
from hutch.image.register import check_layers, register_image
from hutch.image.registry import FetchedManifest, Repository
from hutch.image.registry_config import RegistryConfig
from hutch.image.unpacking import Budget
from hutch.oci.digest import chain_ids, digest_of
from hutch.oci.platform import WantedPlatform, choose, host_platform, normalize, parse_platform
from hutch.oci.reference import Reference, parse
from hutch.oci.types import (
    INDEX_TYPES,
    MAX_CONFIG_BYTES,
    Descriptor,
    ImageConfig,
    Manifest,
    decode_config,
    decode_index,
    decode_manifest,
)
from hutch.records import Progress, silent
from hutch.storage.content import ContentStore
from hutch.storage.layers import Layer, Layers
from hutch.storage.leases import Lease, Leases

__all__ = ["PullResult", "pull"]

_MAX_NESTING = 3


class PullResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a pull did. `digest` is that of the manifest or index the reference stood for;
    `changed` is whether the reference stands for another image than before;
    `fetched_bytes` came over the network for layers."""

    record: ImageRecord
    reference: Reference
    digest: str
    changed: bool
    fetched_bytes: int = 0


class _Job(msgspec.Struct, frozen=True, kw_only=True):
    blob: Descriptor
    diff_id: str
    chain_id: str
    parent: str


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest that was chosen; `top` is what the reference itself stood for."""

    top: FetchedManifest
    data: bytes
    media_type: str
    digest: str
    manifest: Manifest


def pull(
    reference: Reference | str,
    *,
    images: Images,
    content: ContentStore,
    layers: Layers,
    leases: Leases,
    config: RegistryConfig | None = None,
    platform: str | None = None,
    progress: Progress = silent,
    stop: threading.Event | None = None,
) -> PullResult:
    """Pull an image and return it as recorded.

    `platform` defaults to the host's. Setting `stop` from another thread ends the pull
    with `Cancelled`. On any failure there is no half image: what was fetched stays in the
    content store for the next pull, or for garbage collection.
    """
    wanted = reference if isinstance(reference, Reference) else parse(reference)
    settings = config or RegistryConfig()
    chosen = parse_platform(platform) if platform else host_platform()
    before = images.find(wanted.canonical())
    halt = Halt(stop)
    with (
        leases.hold(purpose=f"pull {wanted.familiar()}") as lease,
        Repository(wanted, settings, stop=halt.event) as repository,
    ):
        work = _Pull(repository, images, content, layers, lease, settings, Meter(progress), halt)
        if before is not None and _serves(before, chosen, strict=platform is not None):
            digest = work.unchanged(wanted, before)
            if digest is not None:
                return PullResult(record=before, reference=wanted, digest=digest, changed=False)
        found = work.resolve(wanted, chosen)
        record = work.bring(wanted, found, chosen, strict=platform is not None)
    changed = before is None or before.id != record.id
    return PullResult(
        record=record,
        reference=wanted,
        digest=found.top.digest,
        changed=changed,
        fetched_bytes=work.meter.fetched,
    )


class _Pull:
    """The state of one pull."""

    def __init__(
        self,
        repository: Repository,
        images: Images,
        content: ContentStore,
        layers: Layers,
        lease: Lease,
        config: RegistryConfig,
        meter: Meter,
        halt: Halt,
    ) -> None:
        self.repository = repository
        self.images = images
        self.content = content
        self.layers = layers
        self.lease = lease
        self.config = config
        self.meter = meter
        self.halt = halt

    def unchanged(self, wanted: Reference, known: ImageRecord) -> str | None:
        """Return the reference's digest if the image known by it is current and whole."""
        self.lease.add(*known.digests, *known.chain_ids)
        if not all(map(self.content.has, known.digests)):
            return None
        if not all(map(self.layers.has, known.chain_ids)):
            return None
        if wanted.digest is not None:
            return wanted.digest
        digest = self.repository.head(wanted.target)
        return digest if digest and f"{wanted.name}@{digest}" in known.repo_digests else None

    def resolve(self, wanted: Reference, platform: WantedPlatform) -> _Found:
        """Find the manifest for a platform, through an index where there is one."""
        self.meter.phase(wanted.familiar(), "resolving")
        name = wanted.familiar()
        top = current = self.repository.manifest(wanted.target)
        for _ in range(_MAX_NESTING):
            if current.media_type not in INDEX_TYPES:
                break
            index = decode_index(current.data, current.media_type, what=f"index of {name}")
            entry = choose(index, platform, what=name)
            current = self._manifest(entry)
        else:
            raise Unsupported(f"{name}: indexes nested more than {_MAX_NESTING} deep")
        manifest = decode_manifest(current.data, current.media_type, what=f"manifest of {name}")
        return _Found(
            top=top,
            data=current.data,
            media_type=current.media_type,
            digest=current.digest,
            manifest=manifest,
        )

    def _manifest(self, entry: Descriptor) -> FetchedManifest:
        if self.content.has(entry.digest):
            return FetchedManifest(
                data=self.content.read(entry.digest),
                media_type=entry.media_type,
                digest=entry.digest,
            )
        return self.repository.manifest(entry.digest, size=entry.size)

    def bring(
        self, wanted: Reference, found: _Found, platform: WantedPlatform, *, strict: bool
    ) -> ImageRecord:
        """Fetch configuration and layers, and record the image."""
        name = wanted.familiar()
        total = sum(layer.size for layer in found.manifest.layers)
        if total > self.config.max_image_bytes:
            raise Exhausted(
                f"image {name}: {total} bytes, more than the limit of"
                f" {self.config.max_image_bytes}",
                hint="raise max_image_bytes of registries.json",
            )
        blobs = [layer.digest for layer in found.manifest.layers]
        self.lease.add(digest_of(found.data), found.manifest.config.digest, *blobs)
        data = self._config(found.manifest.config, name)
        image = decode_config(data, what=f"config of {name}")
        check_layers(found.manifest, image, what=f"image {name}")
        _check_platform(image, platform, name, strict=strict)
        jobs = _jobs(found.manifest, image)
        self.lease.add(*(job.chain_id for job in jobs))
        unpacked = self._layers(jobs)
        self.content.put(found.data, digest_of(found.data))
        digests = dict.fromkeys((found.top.digest, found.digest))
        record = register_image(
            self.images,
            manifest=found.data,
            media_type=found.media_type,
            config=data,
            unpacked_sizes=[layer.size for layer in unpacked],
            names=() if wanted.digest is not None else (wanted.canonical(),),
            repo_digests=[f"{wanted.name}@{digest}" for digest in digests],
        )
        self.meter.phase(name, "complete")
        return record

    def _config(self, blob: Descriptor, name: str) -> bytes:
        if self.content.has(blob.digest):
            return self.content.read(blob.digest, MAX_CONFIG_BYTES)
        data = read_bounded(self.repository.blob(blob), MAX_CONFIG_BYTES, f"config of {name}")
        if digest_of(data, blob.digest.partition(":")[0]) != blob.digest:
            raise IntegrityError(f"config of {name}: does not match its digest {blob.digest}")
        self.content.put(data, blob.digest)
        return data

    def _layers(self, jobs: list[_Job]) -> list[Layer]:
        """Fetch and unpack the layers, a few at a time; the first failure stops the rest."""
        budget = Budget(
            self.config.max_unpacked_bytes,
            hint="if the image is to be trusted, raise max_unpacked_bytes of registries.json",
        )
        calls = [
            partial(
                _fetch,
                budget,
                job,
                self.repository,
                self.content,
                self.layers,
                self.meter,
                self.halt.event,
            )
            for job in jobs
        ]
        unpacked = run_all(
            calls, parallel=self.config.parallel, halt=self.halt, abort=self.repository.abort
        )
        self.layers.settle([layer.chain_id for layer in unpacked])
        return unpacked


def _fetch(
    budget: Budget,
    job: _Job,
    repository: Repository,
    content: ContentStore,
    layers: Layers,
    meter: Meter,
    stop: threading.Event,
) -> Layer:
    return budget.spend(fetch_layer(job, repository, content, layers, meter, stop))


def _jobs(manifest: Manifest, image: ImageConfig) -> list[_Job]:
    chain = chain_ids(image.rootfs.diff_ids)
    return [
        _Job(blob=blob, diff_id=diff_id, chain_id=chain_id, parent=parent)
        for blob, diff_id, chain_id, parent in zip(
            manifest.layers, image.rootfs.diff_ids, chain, ("", *chain), strict=False
        )
    ]


def _serves(record: ImageRecord, platform: WantedPlatform, *, strict: bool) -> bool:
    """Tell whether a known image is for the platform; its variant counts if one was asked for."""
    if (record.os, record.architecture) != (platform.os, platform.architecture):
        return False
    return record.variant == platform.variant or not strict


def _check_platform(
    image: ImageConfig, platform: WantedPlatform, name: str, *, strict: bool
) -> None:
    found = normalize(image.os or "", image.architecture or "", image.variant)
    if found.os != "linux":
        raise Unsupported(f"image {name}: is for {found.os}, and this host runs linux")
    other = (found.os, found.architecture) != (platform.os, platform.architecture)
    if strict and found.architecture and other:
        raise NotFound(
            f"image {name}: is for {found}, not for {platform}",
            hint=f"there is only {found}; leave --platform out",
        )
