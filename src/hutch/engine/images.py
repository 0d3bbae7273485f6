"""Images of an engine: pull, push, build from archives, name, list, remove."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from hutch.engine.context import Context
from hutch.engine.jobs.records import jobs_of_image
from hutch.engine.records import (
    INSTANCES,
    MACHINE_SNAPSHOTS,
    InstanceRecord,
    SnapshotRecord,
)
from hutch.errors import Exhausted, HutchError, Unavailable
from hutch.image.catalog import ImageUser, Removed
from hutch.image.records import HistoryRecord, ImageRecord
from hutch.lifecycle import State
from hutch.records import Progress, Transaction, silent

if TYPE_CHECKING:
    import threading

    from hutch.image.pull import PullResult
    from hutch.image.push import PushResult
    from hutch.image.registry_config import Credentials, RegistryConfig
    from hutch.image.remote import FoundImage, RemoteImage

__all__ = ["ImagePrune", "Images", "image_users", "pull_image"]

_LIVE = (State.STARTING, State.RUNNING, State.PAUSED)


class ImagePrune(msgspec.Struct, frozen=True, kw_only=True):
    """What a prune of images removed: names untagged, identifiers deleted, bytes freed."""

    untagged: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    reclaimed: int = 0


def image_users(transaction: Transaction, image_id: str) -> Iterator[ImageUser]:
    """Yield the instances made from an image."""
    for _, record in transaction.items(INSTANCES, InstanceRecord):
        if record.image_id == image_id:
            yield ImageUser(name=record.name, running=record.state in _LIVE)
    for number in jobs_of_image(transaction, image_id):
        yield ImageUser(name=f"job {number}", running=False)
    for name, snapshot in transaction.items(MACHINE_SNAPSHOTS, SnapshotRecord):
        if snapshot.image_id == image_id:
            yield ImageUser(name=name, running=False)


def pull_image(
    context: Context,
    reference: str,
    *,
    platform: str | None,
    credentials: Credentials | None = None,
    progress: Progress,
) -> ImageRecord:
    """Pull an image and return its record."""
    images = Images(context)
    return images.pull(
        reference, platform=platform, credentials=credentials, progress=progress
    ).record


def registry_config(
    context: Context, reference: str, credentials: Credentials | None
) -> RegistryConfig:
    """Return how to reach registries, with credentials for that of a reference."""
    from hutch.oci.reference import parse

    config = context.registry
    if credentials is None:
        return config
    known = config.credentials | {parse(reference).domain: credentials}
    return msgspec.structs.replace(config, credentials=known)


# A method named `list` hides the type from the annotations after it.
ImageRecords = list[ImageRecord]
Names = list[str]


class Images:
    """The images of one root."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._catalog = context.images

    def get(self, name_or_id: str) -> ImageRecord:
        """Return an image by reference, identifier or unique prefix of it."""
        return self._catalog.get(name_or_id)

    def list(self, filters: Mapping[str, Sequence[str]] | None = None) -> ImageRecords:
        """Return the images, newest first, that pass Docker's filters."""
        from hutch.image.selection import parse_filters, select

        return select(self._catalog, parse_filters(filters or {}))

    def pull(
        self,
        reference: str,
        *,
        platform: str | None = None,
        credentials: Credentials | None = None,
        stop: threading.Event | None = None,
        progress: Progress = silent,
    ) -> PullResult:
        """Pull an image from its registry; nothing present is fetched again.

        `credentials` go before those that are configured; setting `stop` from another thread
        ends it with `Cancelled`.
        """
        from hutch.image.pull import pull

        context = self._context
        # What an interrupted pull brought serves the next one; on a full disk, or past a
        # limit, it would only stand in the way.
        with self._freeing(Exhausted):
            return pull(
                reference,
                images=self._catalog,
                content=context.content,
                layers=context.layers,
                leases=context.leases,
                config=self._config(reference, credentials),
                platform=platform,
                progress=progress,
                stop=stop,
            )

    def push(
        self,
        reference: str,
        *,
        credentials: Credentials | None = None,
        stop: threading.Event | None = None,
        progress: Progress = silent,
    ) -> PushResult:
        """Push an image to the registry that its reference names; as for `pull` otherwise."""
        from hutch.image.push import push

        context = self._context
        return push(
            reference,
            images=self._catalog,
            content=context.content,
            leases=context.leases,
            config=self._config(reference, credentials),
            progress=progress,
            stop=stop,
        )

    def remote(self, reference: str, *, credentials: Credentials | None = None) -> RemoteImage:
        """Describe what a registry has under a reference; nothing of it is fetched."""
        from hutch.image.remote import look_up

        return look_up(reference, self._config(reference, credentials))

    def remote_tags(self, repository: str, *, credentials: Credentials | None = None) -> Names:
        """Return the tags of a repository in its registry."""
        from hutch.image.registry import Repository
        from hutch.oci.reference import parse

        with Repository(parse(repository), self._config(repository, credentials)) as remote:
            return remote.tags()

    def check_login(self, registry: str, credentials: Credentials) -> None:
        """See that a registry (`docker.io`, `host:port`) takes credentials; raise `Denied`."""
        from hutch.image.remote import check_login

        check_login(registry, credentials, self._context.registry)

    def search(self, term: str, *, limit: int = 25) -> Sequence[FoundImage]:
        """Search a registry (`host/TERM`), or Docker Hub, for repositories."""
        from hutch.image.remote import search

        return search(term, self._context.registry, limit=limit)

    def _config(self, reference: str, credentials: Credentials | None) -> RegistryConfig:
        return registry_config(self._context, reference, credentials)

    def tag(self, source: str, target: str) -> None:
        """Give an image another name."""
        self._catalog.tag(source, target)

    def remove(self, name_or_id: str, *, force: bool = False) -> Removed:
        """Remove a name, and the image with its last one; its content is freed."""
        removed = self._catalog.remove(name_or_id, force=force)
        if removed.deleted:
            self._collect()
        return removed

    def history(self, name_or_id: str) -> tuple[HistoryRecord, ...]:
        """Return the steps an image came from, oldest first."""
        return self._catalog.get(name_or_id).history

    def config(self, name_or_id: str) -> bytes:
        """Return an image's configuration as its maker wrote it (JSON)."""
        return self._context.content.read(self._catalog.get(name_or_id).id)

    def manifest(self, name_or_id: str) -> bytes:
        """Return an image's manifest as its maker wrote it (JSON)."""
        return self._context.content.read(self._catalog.get(name_or_id).manifest_digest)

    def users(self, name_or_id: str) -> tuple[ImageUser, ...]:
        """Return the instances made from an image."""
        return self._catalog.used(self._catalog.get(name_or_id).id)

    def load(self, source: BinaryIO | str, *, progress: Progress = silent) -> ImageRecords:
        """Load the images of an archive (OCI layout or archive, `docker save`), a file
        name or an open stream, compressed or not."""
        from hutch.image.archive import load_images

        context = self._context
        with self._freeing(Exhausted):
            return load_images(
                source,
                images=self._catalog,
                content=context.content,
                layers=context.layers,
                leases=context.leases,
                collector=context.collector,
                progress=progress,
            )

    def save(
        self,
        names: Sequence[str] | str,
        target: BinaryIO | str,
        *,
        format: str = "docker",
        progress: Progress = silent,
    ) -> None:
        """Write images to an archive: `docker` (which is an OCI layout too), `oci-archive`
        or `oci-dir`."""
        from hutch.image.archive import save_images

        wanted = [names] if isinstance(names, str) else list(names)
        with self._context.leases.hold(purpose="save") as lease:
            lease.add(*(digest for name in wanted for digest in self._catalog.get(name).digests))
            save_images(
                wanted,
                target,
                images=self._catalog,
                content=self._context.content,
                format=format,
                progress=progress,
            )

    def import_(
        self,
        source: BinaryIO | str,
        reference: str | None = None,
        *,
        changes: Sequence[str] = (),
        message: str = "",
        platform: str | None = None,
        progress: Progress = silent,
    ) -> ImageRecord:
        """Make an image of one layer from a tar of a root file system."""
        from hutch.image.importer import import_image

        context = self._context
        with self._freeing(BaseException):
            return import_image(
                source,
                images=self._catalog,
                content=context.content,
                layers=context.layers,
                leases=context.leases,
                reference=reference,
                changes=changes,
                message=message,
                platform=platform,
                progress=progress,
            )

    def bootstrap(
        self,
        what: str,
        *,
        variant: str = "minbase",
        packages: Sequence[str] = (),
        mirror: str | None = None,
        keyring: str | None = None,
        reference: str | None = None,
        progress: Progress = silent,
    ) -> ImageRecord:
        """Make an image from a distribution's own packages (`debian:bookworm`, `busybox`)."""
        from pathlib import Path

        from hutch.image.bootstrap import bootstrap_tar, parse_base
        from hutch.image.importer import import_image
        from hutch.storage.faults import disk_errors
        from hutch.storage.scratch import clean_scratch, scratch_directory

        base = parse_base(what, variant=variant, packages=packages, mirror=mirror, keyring=keyring)
        context = self._context
        purpose = f"bootstrap of {base.reference}"
        clean_scratch(context.root, context.trash)
        with (
            self._freeing(BaseException),
            disk_errors(purpose),
            scratch_directory(context.root, context.trash, purpose=purpose) as workspace,
            bootstrap_tar(base, Path(workspace), progress=progress) as tar,
        ):
            return import_image(
                tar,
                images=self._catalog,
                content=context.content,
                layers=context.layers,
                leases=context.leases,
                reference=reference or base.reference,
                config=base.config,
                message=f"bootstrapped {base.reference}",
                action="bootstrap",
                progress=progress,
            )

    def prune(
        self,
        *,
        all_images: bool = False,
        filters: Mapping[str, Sequence[str]] | None = None,
    ) -> ImagePrune:
        """Delete images that no instance uses: those without a name, or all of them."""
        from hutch.image.selection import parse_filters, prune

        removed = prune(self._catalog, unused=all_images, only=parse_filters(filters or {}))
        return ImagePrune(
            untagged=removed.untagged,
            deleted=removed.deleted,
            reclaimed=self._collect(parts=True),
        )

    @contextmanager
    def _freeing(self, kind: type[BaseException]) -> Iterator[None]:
        """Free what the work of the block brought in, where it fails like that.

        A failure to free is passed over: the next collection does it.
        """
        try:
            yield
        except kind as error:
            full = isinstance(error, Exhausted)
            if full:
                # The records have to be written to free anything: make room for that.
                self._context.trash.drain()
            with suppress(HutchError, OSError):
                self._collect(parts=full)
            raise

    def _collect(self, *, parts: bool = False) -> int:
        """Free what no image needs any more, unless work on images is under way."""
        from hutch.storage.scratch import clean_scratch

        context = self._context
        clean_scratch(context.root, context.trash)
        # Before the records are asked for anything: on a full disk they need some of that.
        freed = context.content.clean_ingest(older_than_s=-1.0) if parts else 0
        try:
            context.leases.end_over()
            return freed + context.collector.collect(parts=parts).bytes
        except Unavailable:
            return freed
