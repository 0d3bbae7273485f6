"""Make an image of what an instance has written: its image's layers and one more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import msgspec

from hutch.errors import InvalidArgument, NotFound
from hutch.image.assemble import now_text, store_image, store_layer
from hutch.image.catalog import Images
from hutch.image.instructions import apply_changes
from hutch.image.records import ImageRecord, LayerRecord
from hutch.oci.reference import parse
from hutch.oci.types import Descriptor
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.content import ContentStore
from hutch.storage.layers import Layers
from hutch.storage.leases import Leases
from hutch.storage.pack import pack_diff

__all__ = ["commit"]


def commit(
    upper: str,
    base: ImageRecord,
    *,
    images: Images,
    content: ContentStore,
    layers: Layers,
    leases: Leases,
    name: str | None = None,
    author: str = "",
    message: str = "",
    changes: Iterable[str] = (),
    config: dict[str, Any] | None = None,
    skip: Collection[bytes] = (),
    created_by: str = "",
    created_s: float | None = None,
    progress: Progress = silent,
) -> ImageRecord:
    """Commit the upper directory `upper` of an instance of `base` and return the image.

    `config` replaces the image's configuration object (as its JSON spells it), `changes`
    are instructions upon that. `skip` are relative paths that the engine put into the
    instance itself. The caller has paused the instance if it wants one moment of it.
    """
    names = [parse(name, field="reference").canonical()] if name else []
    item = name or base.id
    with leases.hold(*base.digests, *base.chain_ids, purpose=f"commit {item}") as lease:
        document = _document(content, base)
        settings = dict(document.get("config") or {}) if config is None else config
        document["config"] = apply_changes(settings, changes)
        parent = base.chain_ids[-1] if base.layers else ""

        def report(count: int) -> None:
            progress(ProgressEvent(item=item, phase="committing", done=count))

        made = store_layer(
            content,
            layers,
            _Chunks(pack_diff(upper, skip=skip)),
            parent_chain_id=parent,
            report=report,
        )
        lease.add(made.descriptor.digest, made.layer.chain_id)
        layers.settle((*base.chain_ids, made.layer.chain_id))
        created = now_text(created_s)
        document["created"] = created
        document["author"] = author or document.get("author", "")
        step = {
            "created": created,
            "author": author,
            "created_by": created_by,
            "comment": message,
        }
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


def _document(content: ContentStore, base: ImageRecord) -> dict[str, Any]:
    """Return the base's configuration as it is, so that nothing in it is lost."""
    for layer in base.layers:
        if not content.has(layer.digest):
            raise NotFound(
                f"blob {layer.digest}: not in the content store", hint="pull the image again"
            )
    try:
        return msgspec.json.decode(content.read(base.config_digest), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"image {base.id}: bad configuration: {error}") from error


def _descriptor(layer: LayerRecord) -> Descriptor:
    return Descriptor(media_type=_oci(layer.media_type), digest=layer.digest, size=layer.size)


def _oci(media_type: str) -> str:
    """Return the OCI name of a layer's media type: a manifest does not mix the two."""
    from hutch.oci.types import LAYER_COMPRESSION, MediaType

    kinds = {
        "": MediaType.OCI_LAYER,
        "gzip": MediaType.OCI_LAYER_GZIP,
        "zstd": MediaType.OCI_LAYER_ZSTD,
    }
    return kinds[LAYER_COMPRESSION[media_type]]


class _Chunks:
    """A stream out of chunks, small ones joined."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def read(self, size: int, /) -> bytes:
        parts: list[bytes] = []
        length = 0
        for chunk in self._chunks:
            parts.append(chunk)
            length += len(chunk)
            if length >= size:
                break
        return b"".join(parts)
