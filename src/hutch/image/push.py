"""Push an image: its blobs as they were pulled or made, a few at a time, then the manifest.

The manifest goes last, so that a reference never stands for an image that is not whole.
"""

from __future__ import annotations

import threading
from functools import partial

import msgspec

from hutch.errors import InvalidArgument, NotFound
from hutch.image.catalog import Images
from hutch.image.fetch import Meter
from hutch.image.parallel import Halt, run_all
from hutch.image.records import ImageRecord
from hutch.image.registry import Repository
from hutch.image.registry_config import RegistryConfig
from hutch.image.transport import Cancelled
from hutch.image.upload import Sent, upload_blob
from hutch.oci.reference import Reference, parse
from hutch.records import Progress, silent
from hutch.storage.content import ContentStore
from hutch.storage.leases import Leases

__all__ = ["PushResult", "push"]


class PushResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a push did; `digest` is that of the manifest, `sent` says how each blob came."""

    reference: Reference
    digest: str
    size: int
    sent: dict[str, Sent]


def push(
    reference: Reference | str,
    *,
    images: Images,
    content: ContentStore,
    leases: Leases,
    config: RegistryConfig | None = None,
    source: str | None = None,
    progress: Progress = silent,
    stop: threading.Event | None = None,
) -> PushResult:
    """Push the image known by `reference` (or by `source`) to where the reference says."""
    target = reference if isinstance(reference, Reference) else parse(reference)
    if target.digest is not None:
        raise InvalidArgument("push goes to a tag, not to a digest", field="reference")
    record = images.get(source if source is not None else target.canonical())
    settings = config or RegistryConfig()
    halt = Halt(stop)
    meter = Meter(progress)
    with (
        leases.hold(*record.digests, purpose=f"push {target.familiar()}"),
        Repository(
            target, settings, actions="pull,push", mirrors=False, stop=halt.event
        ) as repository,
    ):
        manifest = _whole(content, record)
        origins = _origins(images, target)
        sent = _send(repository, record, content, origins, settings.parallel, meter, halt)
        digest = repository.put_manifest(target.target, manifest, record.manifest_media_type)
    meter.phase(target.familiar(), "complete")
    images.note_digest(record.id, f"{target.name}@{digest}", name=target.familiar())
    return PushResult(reference=target, digest=digest, size=len(manifest), sent=sent)


def _whole(content: ContentStore, record: ImageRecord) -> bytes:
    """Return the manifest, having seen that every blob is there."""
    for digest in record.digests:
        if not content.has(digest):
            raise NotFound(
                f"blob {digest}: not in the content store", hint="pull or load the image again"
            )
    return content.read(record.manifest_digest)


def _origins(images: Images, target: Reference) -> dict[str, list[str]]:
    """Return, by blob, the other repositories of the registry that should hold it."""
    found: dict[str, list[str]] = {}
    for record in images.all():
        # A digest is known of what came from there or went there; a tag may be a mere wish.
        paths = dict.fromkeys(
            known.path
            for known in map(parse, record.repo_digests)
            if known.domain == target.domain and known.path != target.path
        )
        for digest in (record.id, *(layer.digest for layer in record.layers)):
            found.setdefault(digest, []).extend(paths)
    return found


def _send(
    repository: Repository,
    record: ImageRecord,
    content: ContentStore,
    origins: dict[str, list[str]],
    parallel: int,
    meter: Meter,
    halt: Halt,
) -> dict[str, Sent]:
    """Upload every blob; the first failure ends the rest."""
    sizes = {layer.digest: layer.size for layer in record.layers}
    sizes[record.id] = record.config_size
    calls = [
        partial(
            _send_one,
            repository,
            digest,
            size,
            content,
            origins.get(digest, []),
            meter,
            halt.event,
        )
        for digest, size in sizes.items()
    ]
    results = run_all(calls, parallel=parallel, halt=halt, abort=repository.abort)
    return dict(zip(sizes, results, strict=True))


def _send_one(
    repository: Repository,
    digest: str,
    size: int,
    content: ContentStore,
    origins: list[str],
    meter: Meter,
    halt: threading.Event,
) -> Sent:
    def report(done: int) -> None:
        if halt.is_set():
            raise Cancelled("stopped")
        meter.advance(digest, done, size, 0, phase="uploading")

    meter.phase(digest, "preparing", total=size)
    sent = upload_blob(
        repository, digest, size, partial(content.open, digest), origins=origins, report=report
    )
    meter.phase(digest, sent.how, size, size)
    return sent
