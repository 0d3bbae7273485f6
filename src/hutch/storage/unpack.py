"""Unpack one layer from its compressed stream: digest, expand and extract in one pass.

A thread reads, expands and hashes ahead while the caller's thread extracts: both spend
their time in calls that release the interpreter.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from hashlib import sha256

import msgspec

from hutch.errors import Exhausted, IntegrityError, Unavailable
from hutch.storage.compression import Readable, decompress
from hutch.storage.extract import Extractor, UnpackLimits, UnpackOptions
from hutch.storage.tarstream import TarReader

__all__ = ["UnpackLimits", "UnpackOptions", "UnpackResult", "default_options", "unpack"]

_AHEAD = 8


class UnpackResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came out: the diffID, the plain tar's length, the number of entries, and the
    directories that the layer uses without describing them (`implicit`); and whether it set
    any extended attribute."""

    diff_id: str
    size: int
    entries: int
    implicit: tuple[bytes, ...]
    has_xattrs: bool = False


def unpack(
    stream: Readable,
    root_fd: int,
    *,
    diff_id: str | None = None,
    limits: UnpackLimits | None = None,
    options: UnpackOptions | None = None,
    label: str = "layer",
) -> UnpackResult:
    """Extract the (compressed) tar `stream` beneath `root_fd`, an empty directory.

    Raises `IntegrityError` for a damaged or hostile archive or a wrong `diff_id`, and
    `Exhausted` past a limit or on a full disk. The tree is then incomplete; the caller
    removes it.
    """
    limits = limits or UnpackLimits()
    ahead = _ReadAhead(stream, limits, label)
    try:
        extractor = Extractor(
            root_fd,
            TarReader(iter(ahead)),
            limits=limits,
            options=options or default_options(),
            label=label,
        )
        extractor.run()
        ahead.finish()
    finally:
        ahead.close()
    found = "sha256:" + ahead.digest.hexdigest()
    if diff_id is not None and found != diff_id:
        raise IntegrityError(f"{label}: content is {found}, expected {diff_id}")
    return UnpackResult(
        diff_id=found,
        size=ahead.size,
        entries=extractor.entries,
        implicit=tuple(sorted(extractor.implicit)),
        has_xattrs=extractor.has_xattrs,
    )


def default_options() -> UnpackOptions:
    """Return the options for this process: what an ordinary user, or root in a user
    namespace, may not do is done otherwise or left out."""
    if os.geteuid() == 0 and not _in_user_namespace():
        return UnpackOptions()
    return UnpackOptions(userxattr=True, ignore_chown_errors=True)


def _in_user_namespace() -> bool:
    with open("/proc/self/uid_map", "rb") as file:
        return file.read().split() != [b"0", b"0", b"4294967295"]


class _Counted:
    """Count what is read of a stream, and tell its failures from those of the disk."""

    def __init__(self, stream: Readable, label: str) -> None:
        self._stream = stream
        self._label = label
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = self._stream.read(size)
        except OSError as error:
            # Not to be taken for a fault of the disk that is written to.
            reason = (error.strerror or str(error) or type(error).__name__).lower()
            raise Unavailable(f"{self._label}: cannot be read: {reason}") from error
        self.count += len(data)
        return data


class _ReadAhead:
    """Expand and hash in a thread, at most `_AHEAD` chunks ahead of the reader."""

    def __init__(self, stream: Readable, limits: UnpackLimits, label: str) -> None:
        self._stream = _Counted(stream, label)
        self._limits = limits
        self._label = label
        self._ready: list[bytes] = []
        self._lock = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self.digest = sha256()
        self.size = 0
        self._thread = threading.Thread(target=self._run, name="hutch-unpack", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._lock:
                while not self._ready and not self._ended:
                    self._lock.wait()
                chunks, self._ready = self._ready, []
                self._lock.notify()
            if not chunks:
                if self._error is not None:
                    raise self._error
                return
            yield from chunks

    def finish(self) -> None:
        """Read to the end, so that digest and size are of the whole stream."""
        for _ in self:
            pass
        self._thread.join()

    def close(self) -> None:
        """Stop reading ahead; a read under way ends with the caller's stream."""
        with self._lock:
            self._stopped = True
            self._ready = []
            self._lock.notify_all()

    def _run(self) -> None:
        try:
            for chunk in decompress(self._stream):
                self.digest.update(chunk)
                self.size += len(chunk)
                self._check()
                with self._lock:
                    while len(self._ready) >= _AHEAD and not self._stopped:
                        self._lock.wait()
                    if self._stopped:
                        return
                    self._ready.append(chunk)
                    self._lock.notify()
        except BaseException as error:
            self._error = error
        finally:
            with self._lock:
                self._ended = True
                self._lock.notify_all()

    def _check(self) -> None:
        limits = self._limits
        if self.size > limits.max_bytes:
            raise Exhausted(
                f"{self._label}: more than {limits.max_bytes} bytes unpacked (limit max_bytes)"
            )
        if self.size > limits.ratio_floor and self.size > limits.max_ratio * self._stream.count:
            raise Exhausted(
                f"{self._label}: expands more than {limits.max_ratio} times (limit max_ratio)"
            )
