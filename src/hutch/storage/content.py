"""The content store: blobs by digest, shared by every process that uses the root.

A blob is written to `ingest/` under a lock per digest, checked, and renamed into
`blobs/`; what stands there is complete and never changes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from types import TracebackType
from typing import Protocol

import msgspec

from hutch.errors import IntegrityError, NotFound
from hutch.oci.digest import check_digest, digest_of, is_digest, new_hash
from hutch.storage.compression import CHUNK
from hutch.storage.faults import disk_errors
from hutch.storage.locking import open_locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Blob", "BlobWriter", "ContentStore", "NewBlob"]

_STALE_S = 7 * 86400.0


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """A blob in the store; `changed_at` is when it came, in seconds since the epoch."""

    digest: str
    size: int
    changed_at: float = 0


class BlobWriter:
    """Write one blob; a context manager that closes, keeping what came for a later resume.

    `complete`: the blob is in the store already (another process brought it): write
    nothing. `offset`: how much of it was there from an interrupted download, already
    hashed; `existing` reads that part again.
    """

    def __init__(self, store: ContentStore, digest: str, size: int | None, fd: int) -> None:
        self._store = store
        self.digest = digest
        self.size = size
        self._fd = fd
        self.offset = 0
        self.complete = fd < 0
        self._hash: _Hash = new_hash(digest.partition(":")[0])

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _resume(self) -> None:
        length = os.fstat(self._fd).st_size
        if self.size is not None and length > self.size:
            os.ftruncate(self._fd, 0)
        for chunk in self.existing():
            self._hash.update(chunk)
            self.offset += len(chunk)
        os.lseek(self._fd, self.offset, os.SEEK_SET)

    def existing(self) -> Iterator[bytes]:
        """Yield what has been written so far, from the beginning."""
        at = 0
        while chunk := os.pread(self._fd, CHUNK, at):
            yield chunk
            at += len(chunk)

    def write(self, data: bytes | memoryview) -> None:
        """Append; raise `IntegrityError` as soon as it is more than the expected size."""
        end = self.offset + len(data)
        if self.size is not None and end > self.size:
            self.abort()
            raise IntegrityError(f"blob {self.digest}: longer than its stated {self.size} bytes")
        with disk_errors(f"blob {self.digest}"):
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        self._hash.update(data)
        self.offset = end

    def restart(self) -> None:
        """Throw away what is there and begin again at offset 0."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self.offset = 0
        self._hash = new_hash(self.digest.partition(":")[0])

    def commit(self) -> None:
        """Check size and digest and make it a blob, safe on the disk.

        A shorter one raises and is kept for a resume; a wrong digest raises and is removed.
        """
        if self.complete:
            return
        if self.size is not None and self.offset != self.size:
            raise IntegrityError(
                f"blob {self.digest}: has {self.offset} bytes, expected {self.size}"
            )
        found = f"{self.digest.partition(':')[0]}:{self._hash.hexdigest()}"
        if found != self.digest:
            self.abort()
            raise IntegrityError(f"blob {self.digest}: content has digest {found}")
        with disk_errors(f"blob {self.digest}"):
            self._store.publish(self._fd, self._store.part_path(self.digest), self.digest)
        self.complete = True
        self.close()

    def abort(self) -> None:
        """Remove what was written."""
        if self._fd >= 0:
            with suppress(FileNotFoundError):  # Ctrl-C came when it was a blob already
                os.unlink(self._store.part_path(self.digest))
            self.close()

    def close(self) -> None:
        """Let go of the lock; without `commit` the part stays, to be resumed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class NewBlob:
    """Write a blob whose digest is found on the way; a context manager.

    Left without `commit`, nothing remains.
    """

    def __init__(self, store: ContentStore, path: str, fd: int) -> None:
        self._store = store
        self._path = path
        self._fd = fd
        self._hash: _Hash = new_hash("sha256")
        self._size = 0

    def __enter__(self) -> NewBlob:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            with suppress(FileNotFoundError):  # Ctrl-C came when it was a blob already
                os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        self._hash.update(data)
        self._size += len(data)
        with disk_errors("blob"):
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]

    @property
    def digest(self) -> str:
        """The digest of what was written so far."""
        return f"sha256:{self._hash.hexdigest()}"

    def commit(self) -> Blob:
        """Make it a blob, safe on the disk."""
        digest = self.digest
        with disk_errors(f"blob {digest}"):
            if self._store.renew(digest):
                os.unlink(self._path)
            else:
                self._store.publish(self._fd, self._path, digest)
        os.close(self._fd)
        self._fd = -1
        return Blob(digest=digest, size=self._size)


class ContentStore:
    """Blobs beneath `root`. `durable=False` leaves out fsync (tests, throw-away roots)."""

    def __init__(self, root: str | Path, *, durable: bool = True) -> None:
        self._root = os.fspath(root)
        self._blobs = os.path.join(self._root, "blobs")
        self._ingest = os.path.join(self._root, "ingest")
        self._durable = durable

    def path(self, digest: str) -> str:
        """Return where the blob is, or would be."""
        algorithm, _, digits = check_digest(digest).partition(":")
        return f"{self._blobs}/{algorithm}/{digits}"

    def part_path(self, digest: str) -> str:
        """Return where the blob is while it is being written."""
        return f"{self._ingest}/{check_digest(digest).replace(':', '-')}.part"

    def has(self, digest: str) -> bool:
        """Tell whether the blob is complete in the store."""
        return os.path.exists(self.path(digest))

    def size(self, digest: str) -> int:
        """Return the blob's length."""
        try:
            return os.stat(self.path(digest)).st_size
        except FileNotFoundError:
            raise _missing(digest) from None

    def open(self, digest: str) -> FileIO:
        """Open the blob for reading, unbuffered; the caller closes it."""
        try:
            return FileIO(self.path(digest), "rb")
        except FileNotFoundError:
            raise _missing(digest) from None

    def read(self, digest: str, limit: int = 16 << 20) -> bytes:
        """Return a small blob, its digest checked once more."""
        with self.open(digest) as file:
            data = file.read(limit + 1) or b""
        if len(data) > limit:
            raise IntegrityError(f"blob {digest}: larger than {limit} bytes")
        if digest_of(data, digest.partition(":")[0]) != digest:
            raise IntegrityError(
                f"blob {digest}: damaged on disk", hint="remove the image and pull it again"
            )
        return data

    def writer(
        self, digest: str, size: int | None = None, *, timeout_s: float | None = None
    ) -> BlobWriter:
        """Return the writer of a blob, waiting while another process or thread writes it.

        Raises `Busy` after `timeout_s`.
        """
        part = self.part_path(digest)
        if self.has(digest):
            return BlobWriter(self, digest, size, -1)
        with disk_errors(f"blob {digest}"):
            os.makedirs(self._ingest, 0o700, exist_ok=True)
            fd = open_locked(part, timeout_s=timeout_s)
        if self.has(digest):
            os.unlink(part)
            os.close(fd)
            return BlobWriter(self, digest, size, -1)
        writer = BlobWriter(self, digest, size, fd)
        try:
            writer._resume()
        except BaseException:
            writer.close()
            raise
        return writer

    def put(self, data: bytes, digest: str | None = None) -> str:
        """Store `data` and return its digest; with `digest`, check it first."""
        digest = digest or digest_of(data)
        with self.writer(digest, len(data)) as writer:
            if not writer.complete:
                if writer.offset:
                    writer.restart()
                writer.write(data)
                writer.commit()
        return digest

    def new(self) -> NewBlob:
        """Return the writer of a blob whose digest is not known beforehand."""
        path = f"{self._ingest}/new-{os.getpid()}-{os.urandom(8).hex()}.part"
        with disk_errors("blob"):
            os.makedirs(self._ingest, 0o700, exist_ok=True)
            return NewBlob(self, path, open_locked(path))

    def ingest(self, chunks: Iterable[bytes]) -> Blob:
        """Store a stream whose digest is not known beforehand."""
        with self.new() as blob:
            for chunk in chunks:
                blob.write(chunk)
            return blob.commit()

    def renew(self, digest: str) -> bool:
        """Let a blob count as made now, so that a lease begun before protects it; return
        whether there is one."""
        try:
            os.utime(self.path(digest))
        except FileNotFoundError:
            return False
        return True

    def publish(self, fd: int, path: str, digest: str) -> None:
        """Give the finished file `path` (open as `fd`) its name among the blobs."""
        target = self.path(digest)
        os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
        os.fchmod(fd, 0o400)
        if self._durable:
            os.fsync(fd)
        os.rename(path, target)
        if self._durable:
            directory = os.open(os.path.dirname(target), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def delete(self, digest: str) -> bool:
        """Remove a blob; return whether there was one."""
        try:
            os.unlink(self.path(digest))
        except FileNotFoundError:
            return False
        return True

    def list(self) -> Iterator[Blob]:
        """Yield the blobs, in no particular order."""
        for algorithm in ("sha256", "sha512"):
            try:
                entries = os.scandir(f"{self._blobs}/{algorithm}")
            except FileNotFoundError:
                continue
            with entries:
                for entry in entries:
                    digest = f"{algorithm}:{entry.name}"
                    if is_digest(digest):
                        try:
                            st = entry.stat(follow_symlinks=False)
                            yield Blob(digest=digest, size=st.st_size, changed_at=st.st_ctime)
                        except FileNotFoundError:
                            continue

    def clean_ingest(self, *, older_than_s: float = _STALE_S, now: float | None = None) -> int:
        """Remove parts that nobody writes and that are old; return the bytes freed.

        What an import or a commit left without finishing goes at once: it has no digest
        to be resumed by.
        """
        now = time.time() if now is None else now
        freed = 0
        try:
            names = os.listdir(self._ingest)
        except FileNotFoundError:
            return 0
        for name in names:
            path = f"{self._ingest}/{name}"
            try:
                fd = open_locked(path, timeout_s=0)
            except Exception:
                continue
            try:
                st = os.fstat(fd)
                if name.startswith("new-") or now - st.st_mtime > older_than_s:
                    os.unlink(path)
                    freed += st.st_size
            finally:
                os.close(fd)
        return freed


def _missing(digest: str) -> NotFound:
    return NotFound(f"blob {digest}: not in the content store", hint="pull the image again")
