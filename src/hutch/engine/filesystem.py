"""An instance's file system against its image: differences, export, commit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from hutch.engine.context import Context
from hutch.engine.records import InstanceRecord
from hutch.engine.results import Change
from hutch.engine.stop import current, pause, unpause
from hutch.errors import Denied, Unsupported
from hutch.image.records import ImageRecord
from hutch.lifecycle import State
from hutch.storage.snapshots import OverlayAssets

__all__ = ["commit", "diff", "export", "own_paths", "writable"]

# What starting an instance itself puts into its writable layer: mount points.
_MOUNT_POINTS = (
    "dev",
    "proc",
    "sys",
    "etc/hosts",
    "etc/hostname",
    "etc/resolv.conf",
)


def own_paths(record: InstanceRecord) -> frozenset[bytes]:
    """Return the paths that are hutch's, not the program's, and never leave with it."""
    targets = [mount.target.lstrip("/") for mount in record.mounts]
    return frozenset(os.fsencode(path) for path in (*_MOUNT_POINTS, *targets))


@contextmanager
def writable(context: Context, record: InstanceRecord) -> Iterator[OverlayAssets]:
    """Hold an instance's layers; the writable one of a machine is fetched from its guest."""
    if record.spec.isolation == "vm":
        from hutch.engine.guest_files import writable_layer

        with writable_layer(context, record) as assets:
            yield assets
    else:
        yield context.snapshots.load(record.id, record.chain_ids)


def _with_layers(record: InstanceRecord) -> InstanceRecord:
    """Refuse a machine whose files are on a disk that only it can read."""
    if record.spec.machine.from_disk is not None:
        raise Unsupported(
            f"instance {record.name}: its files are on a disk that only it reads",
            hint="`hutch export --disk` writes the disk",
        )
    return record


def diff(context: Context, identifier: str) -> list[Change]:
    """Return what differs from the image, by path."""
    from hutch.storage.changes import changes

    record = _with_layers(current(context, identifier))
    with writable(context, record) as assets:
        return [
            Change(kind=change.kind, path=change.path)
            for change in changes(assets.upper, assets.lower, skip=own_paths(record))
        ]


def export(context: Context, identifier: str) -> Iterator[bytes]:
    """Yield the whole file system as a tar, mounts left out."""
    from hutch.storage.overlay import Merged
    from hutch.storage.pack import pack_merged

    record = _with_layers(current(context, identifier))

    def stream() -> Iterator[bytes]:
        with (
            writable(context, record) as assets,
            Merged((assets.upper, *assets.lower)) as merged,
        ):
            yield from pack_merged(merged)

    return stream()


def commit(
    context: Context,
    identifier: str,
    reference: str | None,
    *,
    author: str,
    message: str,
    changes: Sequence[str],
    pause: bool,
) -> ImageRecord:
    """Make an image of an instance; a running one is paused meanwhile unless told not to."""
    from hutch.drivers.container.idmaps import mapping_of
    from hutch.image.commit import commit_image

    record = _with_layers(current(context, identifier))
    with ExitStack() as stack:
        if pause and record.state == State.RUNNING:
            _pause(context, identifier)
            stack.callback(unpause, context, identifier)
        return commit_image(
            context.images.get(record.image_id),
            stack.enter_context(writable(context, record)),
            images=context.images,
            content=context.content,
            layers=context.layers,
            leases=context.leases,
            reference=reference,
            author=author,
            message=message,
            changes=changes,
            process=record.spec.process,
            skip=own_paths(record),
            mapping=mapping_of(record.spec),
        )


def _pause(context: Context, identifier: str) -> None:
    try:
        pause(context, identifier, programs_only=True)
    except Denied as exc:
        hint = "stop it first, or copy it while it runs: --pause=false (pause=False)"
        raise Denied(exc.message, hint=hint) from exc
