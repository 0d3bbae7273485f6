"""Volumes as streams: backups, which carry what the volume is and a digest, and plain tars.

A backup is a tar that any tar can read: `hutch-volume.json`, the files beneath `data/`, and last
`hutch-digest`, the SHA-256 of all that comes before it. In either direction the memory needed
does not grow with the volume (but with the number of hard links in it).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from hutch.decoding import decode_json
from hutch.errors import IntegrityError, Unavailable
from hutch.storage.compression import decompress
from hutch.storage.extract import Extractor, UnpackLimits
from hutch.storage.pack import pack_directory
from hutch.storage.tarstream import LNK, REG, Entry, TarReader
from hutch.storage.tarwrite import END, header, padding
from hutch.storage.unpack import default_options

if TYPE_CHECKING:
    from hutch.storage.compression import Readable

__all__ = ["BackupHead", "BackupReader", "extract_tar", "pack_backup", "pack_plain"]

_HEAD, _DATA, _DIGEST = b"hutch-volume.json", b"data", b"hutch-digest"
_TEXT = 64 + len("sha256:") + 1
# The header and data of the digest, and the end of the archive: always as long.
_TAIL = 512 + 512 + len(END)
_MOST_HEAD = 1 << 20
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# A volume is its owner's: nothing bounds it but where it is put.
_LIMITS = UnpackLimits(max_bytes=1 << 62, max_entries=1 << 40, max_depth=400, max_ratio=1 << 30)


class BackupHead(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup says of its volume; `format` changes where older readers would misread it."""

    format: int = 1
    name: str
    created_at: float
    options: dict[str, str] = {}
    labels: dict[str, str] = {}


def pack_backup(path: str, head: BackupHead) -> Iterator[bytes]:
    """Yield the backup of a volume whose files are in the directory `path`."""
    digest = hashlib.sha256()
    for piece in _body(path, msgspec.json.encode(head)):
        digest.update(piece)
        yield piece
    text = f"sha256:{digest.hexdigest()}\n".encode()
    yield header(_DIGEST, REG, size=len(text)) + text + padding(len(text)) + END


def _body(path: str, head: bytes) -> Iterator[bytes]:
    yield header(_HEAD, REG, size=len(head)) + head + padding(len(head))
    yield from _pack(path, name=_DATA, end=b"")


def pack_plain(path: str) -> Iterator[bytes]:
    """Yield a tar of the directory's content, named from its top."""
    yield from _pack(path, name=b"", end=END)


def _pack(path: str, *, name: bytes, end: bytes) -> Iterator[bytes]:
    directory, base = os.path.split(os.fsencode(path))
    fd = os.open(directory, _OPEN)
    try:
        yield from pack_directory(fd, base, name, contents_only=not name, exact=True, end=end)
    finally:
        os.close(fd)


class _Hashed:
    """Chunks as they pass, with the digest of all but the last `_TAIL` bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._digest = hashlib.sha256()
        self._held = b""

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._take(chunk)
            yield chunk

    def _take(self, chunk: bytes) -> None:
        held = self._held + chunk[-_TAIL:] if len(chunk) < _TAIL else chunk[-_TAIL:]
        self._digest.update(self._held if len(chunk) >= _TAIL else held[:-_TAIL])
        self._digest.update(chunk[:-_TAIL])
        self._held = held[-_TAIL:]

    @property
    def value(self) -> bytes:
        return f"sha256:{self._digest.hexdigest()}\n".encode()


class BackupReader:
    """Read a backup: its head first, then its files, then whether all of it is as it was."""

    def __init__(self, stream: Readable, *, label: str = "backup") -> None:
        """Read the head; raise `IntegrityError` for what is no backup."""
        self._label = label
        self._hashed = _Hashed(_read(stream, label))
        self._reader = TarReader(iter(self._hashed))
        try:
            self.head = self._load_head()
        except (StopIteration, IntegrityError, msgspec.DecodeError) as exc:
            reason = f"{label}: is no backup of a volume"
            raise IntegrityError(reason, hint="of plain tars: hutch volume import") from exc

    def _load_head(self) -> BackupHead:
        entry = next(self._reader)
        if entry.name != _HEAD or entry.type != REG or entry.size > _MOST_HEAD:
            raise IntegrityError("no head")
        head = decode_json(self._reader.take(entry.size), BackupHead)
        if head.format != 1:
            raise IntegrityError(f"format {head.format}")
        return head

    def extract(self, path: str) -> None:
        """Put the files into the empty directory `path`; raise `IntegrityError` where the
        backup is damaged or cut short: what is there then is not to be used."""
        entries = _Entries(self._reader)
        _extract(path, entries, label=self._label)
        if not entries.digest:
            raise IntegrityError(f"{self._label}: is cut short: it has no digest")
        if entries.digest != self._hashed.value:
            raise IntegrityError(
                f"{self._label}: is damaged: its content is {self._hashed.value.decode().strip()},"
                f" expected {entries.digest.decode(errors='replace').strip()}"
            )


class _Entries:
    """A tar reader that shows the files of a backup only, named from their top."""

    def __init__(self, reader: TarReader) -> None:
        self._reader = reader
        self.piece: Callable[..., memoryview] = reader.piece
        self.digest = b""

    def __iter__(self) -> Iterator[Entry]:
        for entry in self._reader:
            if entry.name == _DIGEST and entry.size <= _TEXT and not self.digest:
                self.digest = self._reader.take(entry.size)
                continue
            name, _, rest = entry.name.partition(b"/")
            if name != _DATA or self.digest:
                raise IntegrityError(f"holds {os.fsdecode(entry.name[:80])!r}")
            entry.name = rest or b"."
            entry.linkname = self._link(entry)
            yield entry

    @staticmethod
    def _link(entry: Entry) -> bytes:
        # A hard link names another entry; a symbolic one is text.
        if entry.type == LNK and entry.linkname.startswith(_DATA + b"/"):
            return entry.linkname[len(_DATA) + 1 :]
        return entry.linkname


def extract_tar(path: str, stream: Readable, *, label: str = "tar") -> None:
    """Put a tar's files, compressed or not, into a directory; what is there by the same names
    is replaced."""
    _extract(path, TarReader(_read(stream, label)), label=label)


def _read(stream: Readable, label: str) -> Iterator[bytes]:
    """Yield what a stream holds, expanded; its failures are not those of the disk."""
    try:
        yield from decompress(stream)
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise Unavailable(f"{label}: cannot be read: {reason}") from exc


def _extract(path: str, reader: TarReader | _Entries, *, label: str) -> None:
    fresh = not os.listdir(path)
    fd = os.open(path, _OPEN)
    try:
        Extractor(
            fd,
            reader,  # type: ignore[arg-type]  # it asks for entries and their data only
            limits=_LIMITS,
            options=msgspec.structs.replace(default_options(), whiteouts=False, fresh=fresh),
            label=label,
        ).run()
    finally:
        os.close(fd)
