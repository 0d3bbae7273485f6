"""Make an image of what an instance has written: its image's layers and one more."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from hutch.decoding import decode_json
from hutch.errors import InvalidArgument, NotFound
from hutch.image.assemble import now_text, store_image, store_layer
from hutch.image.catalog import Images
from hutch.image.instructions import apply_changes
from hutch.image.records import ImageRecord, LayerRecord
from hutch.linux.idmap import IdMapping
from hutch.oci.reference import parse
from hutch.oci.types import Descriptor
from hutch.records import Progress, ProgressEvent, silent
from hutch.spec.model import ProcessSpec
from hutch.storage.content import ContentStore
from hutch.storage.layers import Layers
from hutch.storage.leases import Leases
from hutch.storage.owners import Owners
from hutch.storage.pack import pack_diff
from hutch.storage.snapshots import OverlayAssets
from hutch.storage.streams import ChunkStream

__all__ = ["commit_image", "oci_media_type"]


def commit_image(
    base: ImageRecord,
    assets: OverlayAssets,
    *,
    images: Images,
    content: ContentStore,
    layers: Layers,
    leases: Leases,
    reference: str | None = None,
    author: str = "",
    message: str = "",
    changes: Iterable[str] = (),
    process: ProcessSpec | None = None,
    skip: Collection[bytes] = (),
    mapping: IdMapping | None = None,
    created_s: float | None = None,
    progress: Progress = silent,
) -> ImageRecord:
    """Commit what an instance of `base` has written and return the image.

    Its configuration is the image's, with the command, environment, user and directory of
    `process`, and `changes` are instructions upon that. `skip` are relative paths that the
    engine put there itself; `mapping` is the map of ids of a remapped instance. The caller
    has paused the instance if it wants one moment of it.
    """
    names = [parse(reference, field="reference").canonical()] if reference else []
    item = reference or base.id
    with leases.hold(*base.digests, *base.chain_ids, purpose=f"commit {item}") as lease:
        document = _document(content, base)
        settings = dict(document.get("config") or {})
        if process is not None:
            _as_run(settings, process, base)
        document["config"] = apply_changes(settings, changes)
        parent = base.chain_ids[-1] if base.layers else ""

        owners = Owners(mapping) if mapping is not None else None

        def report(count: int) -> None:
            progress(ProgressEvent(item=item, phase="committing", done=count))

        made = store_layer(
            content,
            layers,
            ChunkStream(pack_diff(assets.upper, skip=skip, owners=owners)),
            parent_chain_id=parent,
            report=report,
        )
        lease.add(made.descriptor.digest, made.layer.chain_id)
        layers.settle((*base.chain_ids, made.layer.chain_id))
        created = now_text(created_s)
        document["created"] = created
        document["author"] = author or document.get("author", "")
        ran = " ".join(process.argv) if process is not None else ""
        step = {"created": created, "author": author, "created_by": ran, "comment": message}
        document["history"] = [
            *(document.get("history") or []),
            {key: value for key, value in step.items() if value},
        ]
        document["rootfs"] = {
            "type": "layers",
            "diff_ids": [*(layer.diff_id for layer in base.layers), made.layer.diff_id],
        }
        return store_image(
            images,
            content,
            document,
            [*map(_descriptor, base.layers), made.descriptor],
            unpacked_sizes=[*(layer.unpacked_size for layer in base.layers), made.layer.size],
            names=names,
            action="commit",
        )


def _as_run(settings: dict[str, Any], process: ProcessSpec, base: ImageRecord) -> None:
    """Let the image run as the instance did, its entrypoint kept where it had one."""
    entrypoint = base.config.entrypoint
    if entrypoint and process.argv[: len(entrypoint)] == entrypoint:
        settings["Cmd"] = list(process.argv[len(entrypoint) :])
    else:
        settings.pop("Entrypoint", None)
        settings["Cmd"] = list(process.argv)
    settings["Env"] = list(process.env)
    settings["User"] = process.user
    if process.cwd != "/" or settings.get("WorkingDir"):
        settings["WorkingDir"] = process.cwd


def _document(content: ContentStore, base: ImageRecord) -> dict[str, Any]:
    """Return the base's configuration as it is, so that nothing in it is lost."""
    for layer in base.layers:
        if not content.has(layer.digest):
            raise NotFound(
                f"blob {layer.digest}: not in the content store", hint="pull the image again"
            )
    try:
        return decode_json(content.read(base.config_digest), dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"image {base.id}: bad configuration: {error}") from error


def _descriptor(layer: LayerRecord) -> Descriptor:
    return Descriptor(
        media_type=oci_media_type(layer.media_type), digest=layer.digest, size=layer.size
    )


def oci_media_type(media_type: str) -> str:
    """Return the OCI name of a layer's media type: a manifest does not mix the two."""
    from hutch.oci.types import LAYER_COMPRESSION, MediaType

    kinds = {
        "": MediaType.OCI_LAYER,
        "gzip": MediaType.OCI_LAYER_GZIP,
        "zstd": MediaType.OCI_LAYER_ZSTD,
    }
    return kinds[LAYER_COMPRESSION[media_type]]
