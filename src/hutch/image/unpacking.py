"""Make sure that an image's layers are unpacked, from blobs that are in the content store.

After a power cut `Layers.reconcile` throws away layers that may not have reached the disk;
this brings them back without a registry. Load and import unpack through it too.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from functools import partial

from hutch.errors import Exhausted, NotFound
from hutch.image.parallel import Halt, run_all
from hutch.image.records import ImageRecord, LayerRecord
from hutch.storage.content import ContentStore
from hutch.storage.layers import Layer, Layers

__all__ = ["MAX_UNPACKED", "Budget", "ensure_unpacked", "unpack_stored"]

_PARALLEL = 2
MAX_UNPACKED = 256 << 30


class Budget:
    """What the layers of one image may take together; thread-safe.

    Each layer has limits of its own, so what is there before this says stop is bounded too.
    """

    def __init__(self, limit: int, *, hint: str | None = None) -> None:
        self._limit = limit
        self._hint = hint
        self._taken = 0
        self._lock = threading.Lock()

    def spend(self, layer: Layer) -> Layer:
        """Count a layer and return it; raise `Exhausted` past the limit."""
        with self._lock:
            self._taken += layer.size
            if self._taken > self._limit:
                raise Exhausted(
                    f"image: its layers unpack to more than {self._limit} bytes", hint=self._hint
                )
        return layer


def ensure_unpacked(record: ImageRecord, content: ContentStore, layers: Layers) -> None:
    """Unpack those layers of an image that are missing; raise `NotFound` for a lost blob.

    Costs one look per layer when nothing is missing. Hold a lease on the image.
    """
    if all(layers.has(layer.chain_id) for layer in record.layers):
        return
    # The image was taken in before, under whatever limit held then.
    unpack_stored(record.layers, content, layers, limit=sys.maxsize)


def unpack_stored(
    wanted: Sequence[LayerRecord],
    content: ContentStore,
    layers: Layers,
    *,
    stop: threading.Event | None = None,
    limit: int = MAX_UNPACKED,
) -> list[Layer]:
    """Unpack layers, lowest first, from their blobs; those that are there are left alone.

    Raises `Exhausted` where they come to more than `limit` bytes.
    """
    budget = Budget(limit)
    calls = [
        partial(_unpack, layer, parent, content, layers, budget)
        for layer, parent in zip(wanted, ("", *(one.chain_id for one in wanted)), strict=False)
    ]
    found = run_all(calls, parallel=_PARALLEL, halt=Halt(stop), abort=lambda: None)
    layers.settle([layer.chain_id for layer in found])
    return found


def _unpack(
    layer: LayerRecord, parent: str, content: ContentStore, layers: Layers, budget: Budget
) -> Layer:
    known = layers.get(layer.chain_id)
    if known is not None:
        return budget.spend(known)
    if not content.has(layer.digest):
        raise NotFound(
            f"layer {layer.chain_id}: neither unpacked nor its blob {layer.digest} stored",
            hint="pull or load the image again",
        )
    with content.open(layer.digest) as stream:
        made = layers.unpack(
            stream,
            diff_id=layer.diff_id,
            parent_chain_id=parent,
            chain_id=layer.chain_id,
            media_type=layer.media_type,
        )
    return budget.spend(made)
