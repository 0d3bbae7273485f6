"""Make layers and images in the store: what import, commit and load have in common."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO
from typing import Any

import msgspec

from hutch.decoding import encode_json
from hutch.errors import InvalidArgument, NotFound
from hutch.image.catalog import Images
from hutch.image.records import ImageRecord
from hutch.image.register import register_image
from hutch.oci.digest import digest_of
from hutch.oci.types import Descriptor, MediaType
from hutch.storage.compression import CHUNK, Readable, compress, decompress, detect
from hutch.storage.content import Blob, ContentStore, NewBlob
from hutch.storage.layers import Layer, Layers
from hutch.storage.streams import Rewound

__all__ = ["StoredLayer", "now_text", "open_archive", "store_image", "store_layer"]

_GZIP = MediaType.OCI_LAYER_GZIP
_ZSTD = MediaType.OCI_LAYER_ZSTD


class StoredLayer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer just made: its blob and what came out unpacked."""

    descriptor: Descriptor
    layer: Layer


def now_text(epoch_s: float | None = None) -> str:
    """Return a time as image configurations have it (RFC 3339, UTC)."""
    moment = time.gmtime(time.time() if epoch_s is None else epoch_s)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)


def open_archive(path: str | os.PathLike[str]) -> FileIO:
    """Open an archive for reading, unbuffered; raise `NotFound` where there is none."""
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise NotFound(f"{os.fspath(path)}: no such file") from None
    except OSError as error:
        raise InvalidArgument(
            f"{os.fspath(path)}: {(error.strerror or '').lower()}", field="source"
        ) from error


def store_layer(
    content: ContentStore,
    layers: Layers,
    stream: Readable,
    *,
    parent_chain_id: str = "",
    report: Callable[[int], None] = lambda count: None,
) -> StoredLayer:
    """Store a tar stream as a blob and unpack it, in one pass.

    A gzip or zstd stream is kept as it is; anything else is stored as gzip. `report`
    gets the number of bytes read so far. The caller holds a lease.
    """
    with content.new() as blob:
        tee = _Tee(stream, blob, report)
        try:
            layer = layers.unpack(tee, parent_chain_id=parent_chain_id)
            stored = tee.finish()
        finally:
            tee.close()
    descriptor = Descriptor(media_type=tee.media_type, digest=stored.digest, size=stored.size)
    return StoredLayer(descriptor=descriptor, layer=layer)


class _Tee:
    """Hand a stream on for unpacking and write it to a blob, compressed."""

    def __init__(self, stream: Readable, blob: NewBlob, report: Callable[[int], None]) -> None:
        self._stream = stream
        self._blob = blob
        self._report = report
        self._count = 0
        self._lock = threading.Lock()
        self._closed = False
        self._head = b""
        while len(self._head) < 6 and (data := stream.read(CHUNK)):
            self._head += data
        if not self._head:
            # Most likely the program before in the pipe has failed.
            raise InvalidArgument("is empty", field="source")
        kind = detect(self._head)
        self.media_type = _ZSTD if kind == "zstd" else _GZIP
        self._plain: Iterator[bytes] | None = None
        self._pressed: _Press | None = None
        if kind not in ("gzip", "zstd"):
            self._plain = decompress(Rewound(self._head, stream))
            self._pressed = _Press(blob)

    def read(self, size: int, /) -> bytes:
        """Return the next of the stream, whatever length it comes in."""
        if self._plain is None:
            data, self._head = self._head or self._stream.read(size), b""
        else:
            data = next(self._plain, b"")
        with self._lock:
            if self._closed or not data:
                return b""
            if self._pressed is not None:
                self._pressed.write(data)
            else:
                self._blob.write(data)
        self._count += len(data)
        self._report(self._count)
        return data

    def finish(self) -> Blob:
        """Read to the end and make the blob."""
        while self.read(CHUNK):
            pass
        if self._pressed is not None:
            self._pressed.finish()
        return self._blob.commit()

    def close(self) -> None:
        """Write nothing more: whoever still reads ahead finds the end."""
        with self._lock:
            self._closed = True
        if self._pressed is not None:
            self._pressed.stop()


class _Press:
    """Compress into a blob in a thread of its own, a few chunks behind."""

    def __init__(self, blob: NewBlob) -> None:
        import queue

        self._queue: queue.Queue[bytes] = queue.Queue(maxsize=8)
        self._error: BaseException | None = None
        self._blob = blob
        self._thread = threading.Thread(target=self._run, name="hutch-gzip", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        chunks = iter(self._queue.get, b"")
        try:
            for data in compress(chunks, "gzip"):
                self._blob.write(data)
        except BaseException as error:
            self._error = error
            for _ in chunks:
                pass

    def write(self, data: bytes) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(data)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(b"")
            self._thread.join()

    def finish(self) -> None:
        self.stop()
        if self._error is not None:
            raise self._error


def store_image(
    images: Images,
    content: ContentStore,
    config: dict[str, Any],
    blobs: Iterable[Descriptor],
    *,
    unpacked_sizes: Sequence[int],
    names: Iterable[str] = (),
    action: str,
) -> ImageRecord:
    """Store configuration and manifest of an image whose layers are in the store, and
    record it. The caller holds a lease."""
    data = encode_json(config)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MediaType.OCI_MANIFEST,
        "config": {
            "mediaType": MediaType.OCI_CONFIG,
            "digest": digest_of(data),
            "size": len(data),
        },
        "layers": [
            {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}
            for blob in blobs
        ],
    }
    text = encode_json(manifest)
    content.put(data)
    content.put(text)
    return register_image(
        images,
        manifest=text,
        media_type=MediaType.OCI_MANIFEST,
        config=data,
        unpacked_sizes=unpacked_sizes,
        names=names,
        action=action,
    )
