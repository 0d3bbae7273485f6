"""One layer on its way: from the socket into the content store and, in the same pass, unpacked.

The unpacker pulls; what it reads has just been written and hashed. What an interrupted
download left is read back first, so that a resumed layer is one stream again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from hutch.errors import Busy, HutchError, IntegrityError, Unavailable
from hutch.image.registry import Repository
from hutch.image.transport import Cancelled
from hutch.oci.types import Descriptor
from hutch.records import Progress, ProgressEvent
from hutch.storage.content import BlobWriter, ContentStore
from hutch.storage.layers import Layer, Layers

__all__ = ["LayerJob", "Meter", "fetch_layer"]

_LOCK_SLICE_S = 0.25
_REPORT_EVERY_S = 0.1


class LayerJob(Protocol):
    """What identifies a layer: its blob and its place in the chain."""

    @property
    def blob(self) -> Descriptor:
        """The compressed layer."""
        ...

    @property
    def diff_id(self) -> str:
        """The digest of the plain tar."""
        ...

    @property
    def chain_id(self) -> str:
        """The layer's identity upon its parents."""
        ...

    @property
    def parent(self) -> str:
        """The parent's chain id, "" for the lowest layer."""
        ...


class Meter:
    """Pass progress on, from several threads one at a time and not too often per item."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self.fetched = 0

    def phase(self, item: str, phase: str, done: int = 0, total: int | None = None) -> None:
        """Report a change of phase, always."""
        with self._lock:
            self._last[item] = self._clock()
            self._progress(ProgressEvent(item=item, phase=phase, done=done, total=total))

    def advance(
        self, item: str, done: int, total: int, more: int, *, phase: str = "downloading"
    ) -> None:
        """Report bytes that went over the network, unless the item was reported just now."""
        with self._lock:
            self.fetched += more
            now = self._clock()
            if done < total and now - self._last.get(item, 0.0) < _REPORT_EVERY_S:
                return
            self._last[item] = now
            self._progress(ProgressEvent(item=item, phase=phase, done=done, total=total))


class _Tee:
    """A blob as a stream for the unpacker: each piece is stored before it is handed on.

    The end of the stream is only reached by a blob that was verified and committed.
    """

    def __init__(
        self,
        writer: BlobWriter,
        source: Callable[[int], Iterator[bytes]],
        stop: threading.Event,
        report: Callable[[int, int], None],
    ) -> None:
        self._writer = writer
        self._stop = stop
        self._report = report
        self._lock = threading.Lock()
        self._closed = False
        self._rest = b""
        self._chunks = self._stream(source)

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes; nothing means the end."""
        with self._lock:
            if self._closed or self._stop.is_set():
                raise Cancelled("stopped")
            data = self._rest or next(self._chunks, b"")
            if 0 <= size < len(data):
                data, self._rest = data[:size], data[size:]
            else:
                self._rest = b""
            return data

    def finish(self) -> None:
        """Read what the unpacker left, so that the blob is whole and verified."""
        while self.read(1 << 20):
            pass

    def close(self) -> None:
        """Let no further read touch the writer."""
        with self._lock:
            self._closed = True

    def _stream(self, source: Callable[[int], Iterator[bytes]]) -> Iterator[bytes]:
        if self._writer.offset:
            yield from self._writer.existing()
        if self._writer.size is None or self._writer.offset < self._writer.size:
            for chunk in source(self._writer.offset):
                if self._stop.is_set():
                    raise Cancelled("stopped")
                self._writer.write(chunk)
                self._report(self._writer.offset, len(chunk))
                yield chunk
        self._writer.commit()


def fetch_layer(
    job: LayerJob,
    repository: Repository,
    content: ContentStore,
    layers: Layers,
    meter: Meter,
    stop: threading.Event,
) -> Layer:
    """Bring a layer into the store, unpacked; return what it is.

    Another process that is fetching the same blob is waited for. A failure to reach the
    registry keeps what came for the next try; content that turns out wrong is dropped,
    and fetched once more from the registry itself if it may have been spoilt on the way
    (an old part, a mirror).
    """
    item = job.blob.digest
    mirrors = True
    while True:
        writer = _writer(content, job.blob, stop, meter)
        with writer:
            if writer.complete:
                return _unpack_stored(job, content, layers, meter)
            spoilt = writer.offset > 0 or (mirrors and repository.has_mirrors)
            try:
                return _stream_layer(job, repository, writer, layers, meter, stop, mirrors)
            except (Unavailable, Cancelled):
                raise
            except IntegrityError:
                writer.abort()
                if not spoilt:
                    raise
            except HutchError:
                writer.abort()
                raise
        mirrors = False
        meter.phase(item, "retrying")


def _writer(
    content: ContentStore, blob: Descriptor, stop: threading.Event, meter: Meter
) -> BlobWriter:
    """Return the blob's writer; waiting for another one's download ends with `stop`."""
    waiting = False
    while True:
        if stop.is_set():
            raise Cancelled("stopped")
        try:
            return content.writer(blob.digest, blob.size, timeout_s=_LOCK_SLICE_S)
        except Busy:
            if not waiting:
                waiting = True
                meter.phase(blob.digest, "waiting", total=blob.size)


def _unpack_stored(job: LayerJob, content: ContentStore, layers: Layers, meter: Meter) -> Layer:
    found = layers.get(job.chain_id)
    if found is None:
        meter.phase(job.blob.digest, "extracting", total=job.blob.size)
        with content.open(job.blob.digest) as stream:
            found = layers.unpack(
                stream,
                diff_id=job.diff_id,
                parent_chain_id=job.parent,
                chain_id=job.chain_id,
                media_type=job.blob.media_type,
            )
    meter.phase(job.blob.digest, "exists", job.blob.size, job.blob.size)
    return found


def _stream_layer(
    job: LayerJob,
    repository: Repository,
    writer: BlobWriter,
    layers: Layers,
    meter: Meter,
    stop: threading.Event,
    mirrors: bool,
) -> Layer:
    blob = job.blob
    meter.phase(blob.digest, "downloading", writer.offset, blob.size)

    def source(offset: int) -> Iterator[bytes]:
        return repository.blob(blob, offset, mirrors=mirrors)

    def report(done: int, more: int) -> None:
        meter.advance(blob.digest, done, blob.size, more)

    tee = _Tee(writer, source, stop, report)
    try:
        layer = layers.unpack(
            tee,
            diff_id=job.diff_id,
            parent_chain_id=job.parent,
            chain_id=job.chain_id,
            media_type=blob.media_type,
        )
        tee.finish()
    finally:
        tee.close()
    meter.phase(blob.digest, "done", blob.size, blob.size)
    return layer
