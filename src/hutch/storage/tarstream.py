"""Read a tar stream: ustar, GNU long names and sparse files, PAX with its sparse maps.

Nothing touches the file system here. Every length is bounded before it is believed, and
whatever is not a well-formed archive raises `IntegrityError`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from hutch.errors import IntegrityError
from hutch.storage.tarsparse import Map, checked, old_gnu, pax_map

__all__ = ["BLK", "CHR", "DIR", "FIFO", "LNK", "REG", "SYM", "Entry", "TarReader"]

REG, LNK, SYM, CHR, BLK, DIR, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"

_BLOCK = 512
_ZERO = bytes(_BLOCK)
_MAX_EXTENDED = 1 << 20
_MAX_SIZE = 1 << 62
_FIELDS = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x")
_ADLER = 65521
_KINDS = frozenset((REG, LNK, SYM, CHR, BLK, DIR, FIFO))
_XATTR = b"SCHILY.xattr."


class Entry:
    """One member: names are bytes as written, times nanoseconds, `sparse` the data's map.

    `size` is the length of the file; the stream may hold less of it (a sparse file).
    """

    __slots__ = (
        "devmajor",
        "devminor",
        "gid",
        "linkname",
        "mode",
        "mtime_ns",
        "name",
        "size",
        "sparse",
        "type",
        "uid",
        "xattrs",
    )

    def __init__(self) -> None:
        self.name = b""
        self.type = REG
        self.mode = 0
        self.uid = 0
        self.gid = 0
        self.size = 0
        self.mtime_ns = 0
        self.linkname = b""
        self.devmajor = 0
        self.devminor = 0
        self.xattrs: dict[bytes, bytes] | None = None
        self.sparse: Map | None = None


class TarReader:
    """Iterate over the entries of a tar given in chunks.

    `left` is what remains of the present entry's data; `piece` gives it without copying.
    Unread data is passed over by the next step.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = b""
        self._view = memoryview(b"")
        self._pos = 0
        self._end = 0
        self._padding = 0
        self.left = 0

    def __iter__(self) -> Iterator[Entry]:
        return self

    def __next__(self) -> Entry:
        if self.left or self._padding:
            self._skip(self.left + self._padding)
            self.left = self._padding = 0
        pax: dict[bytes, bytes] | None = None
        long_name = long_link = b""
        while True:
            block = self._header()
            if block is None:
                raise StopIteration
            kind = block[156:157]
            if kind == b"x":
                pax = _parse_pax(self._extended(block))
            elif kind == b"L":
                long_name = self._extended(block).partition(b"\0")[0]
            elif kind == b"K":
                long_link = self._extended(block).partition(b"\0")[0]
            elif kind in (b"g", b"V"):
                self._extended(block)
            else:
                break
        entry = self._entry(block)
        if long_name:
            entry.name = long_name
        if long_link:
            entry.linkname = long_link
        if pax is not None:
            self._apply_pax(entry, pax)
        self._finish(entry)
        return entry

    def piece(self, most: int = _MAX_SIZE) -> memoryview:
        """Return the next piece of the entry's data, at most `most`; empty at its end."""
        if not self.left:
            return memoryview(b"")
        if self._pos >= self._end and not self._refill():
            raise IntegrityError("tar stream ends within a file")
        start = self._pos
        stop = min(start + self.left, start + most, self._end)
        self._pos = stop
        self.left -= stop - start
        return self._view[start:stop]

    def take(self, size: int) -> bytes:
        """Return exactly `size` bytes of the entry's data."""
        if size > self.left:
            raise IntegrityError("tar entry is shorter than its own map says")
        self.left -= size
        return self._take(size)

    # ---- the stream ---------------------------------------------------------------

    def _refill(self) -> bool:
        for chunk in self._chunks:
            if chunk:
                self._chunk = chunk
                self._view = memoryview(chunk)
                self._pos = 0
                self._end = len(chunk)
                return True
        return False

    def _take(self, size: int) -> bytes:
        start = self._pos
        stop = start + size
        if stop <= self._end:
            self._pos = stop
            return self._chunk[start:stop]
        parts = [self._chunk[start:]]
        missing = stop - self._end
        self._pos = self._end
        while missing:
            if not self._refill():
                raise IntegrityError("tar stream is truncated")
            part = self._chunk[:missing]
            self._pos = len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _skip(self, size: int) -> None:
        while size:
            if self._pos >= self._end and not self._refill():
                raise IntegrityError("tar stream is truncated")
            step = min(size, self._end - self._pos)
            self._pos += step
            size -= step

    def _header(self) -> bytes | None:
        """Return the next header block, checked; None at the end of the archive."""
        if self._pos >= self._end and not self._refill():
            return None
        block = self._take(_BLOCK)
        field = block[148:156]
        digits = field.strip(b" \0")
        if digits and digits.isdigit():
            # Adler-32's low half is one more than the sum of the bytes, modulo 65521:
            # the tar checksum at the speed of C.
            total = zlib.adler32(block[156:], zlib.adler32(b"        ", zlib.adler32(block[:148])))
            try:
                if (int(digits, 8) + 1) % _ADLER == total & 0xFFFF:
                    return block
            except ValueError:
                pass
        if block == _ZERO:
            self._drain()
            return None
        raise IntegrityError("not a tar archive, or a damaged one: wrong header checksum")

    def _drain(self) -> None:
        """Read to the end of the stream after the first zero block."""
        if self._pos >= self._end and not self._refill():
            return
        if self._end - self._pos >= _BLOCK and self._take(_BLOCK) != _ZERO:
            raise IntegrityError("tar archive has entries after its end")
        while self._refill():
            pass
        self._pos = self._end

    def _extended(self, block: bytes) -> bytes:
        size = _number(block[124:136])
        if size > _MAX_EXTENDED:
            raise IntegrityError(f"tar extended header of {size} bytes is over {_MAX_EXTENDED}")
        data = self._take(size)
        self._skip(-size % _BLOCK)
        return data

    # ---- headers ------------------------------------------------------------------

    def _entry(self, block: bytes) -> Entry:
        entry = Entry()
        (name, mode, uid, gid, size, mtime, _, kind, link, magic, _, _, major, minor, prefix) = (
            _FIELDS.unpack(block)
        )
        name = name.partition(b"\0")[0]
        if magic == b"ustar\x0000" and prefix[0]:
            name = prefix.partition(b"\0")[0] + b"/" + name
        entry.name = name
        entry.mode = _number(mode) & 0o7777
        entry.uid = _number(uid)
        entry.gid = _number(gid)
        entry.size = _number(size)
        entry.mtime_ns = _number(mtime, signed=True) * 1_000_000_000
        if kind in (b"0", b"\0", b"7"):
            kind = DIR if name.endswith(b"/") and kind == b"\0" else REG
        elif kind in (LNK, SYM):
            entry.linkname = link.partition(b"\0")[0]
        elif kind in (CHR, BLK):
            entry.devmajor = _number(major)
            entry.devminor = _number(minor)
        elif kind == b"S":
            kind = REG
            entry.sparse, real = old_gnu(block, self._take)
            self.left = entry.size
            entry.size = real
            entry.type = REG
            return entry
        elif kind not in _KINDS:
            raise IntegrityError(f"tar entry {_show(name)}: unknown type {kind!r}")
        entry.type = kind
        self.left = entry.size
        return entry

    def _apply_pax(self, entry: Entry, pax: dict[bytes, bytes]) -> None:
        for key, value in pax.items():
            if key == b"path":
                entry.name = value
            elif key == b"linkpath":
                entry.linkname = value
            elif key == b"size":
                size = _decimal(value)
                if entry.sparse is None:
                    entry.size = size
                self.left = size
            elif key == b"uid":
                entry.uid = _decimal(value)
            elif key == b"gid":
                entry.gid = _decimal(value)
            elif key == b"mtime":
                entry.mtime_ns = _nanoseconds(value)
            elif key.startswith(_XATTR):
                if entry.xattrs is None:
                    entry.xattrs = {}
                entry.xattrs[key[len(_XATTR) :]] = value
        if any(key.startswith(b"GNU.sparse.") for key in pax):
            self._pax_sparse(entry, pax)

    def _pax_sparse(self, entry: Entry, pax: dict[bytes, bytes]) -> None:
        if entry.type != REG:
            return
        name, real, pairs = pax_map(pax, self.take)
        entry.name = name or entry.name
        entry.size = real
        entry.sparse = pairs

    def _finish(self, entry: Entry) -> None:
        if entry.type != REG:
            # A link, a directory or a device carries no data whatever its size field says
            # (POSIX pax, "size"); some writers put the target's size into hard links.
            self.left = entry.size = 0
        if self.left > _MAX_SIZE or entry.size > _MAX_SIZE:
            raise IntegrityError(f"tar entry {_show(entry.name)}: size out of range")
        if entry.sparse is not None:
            entry.sparse = checked(entry.sparse, entry.size, self.left, _show(entry.name))
        self._padding = -self.left % _BLOCK


def _number(field: bytes, *, signed: bool = False) -> int:
    """Decode an octal or base-256 field."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            if not signed:
                raise IntegrityError("tar header has a negative number")
            value -= 1 << (8 * len(field) - 1)
        if abs(value) > _MAX_SIZE:
            raise IntegrityError("tar header has a number out of range")
        return value
    digits = field.strip(b" \0")
    if not digits:
        return 0
    try:
        if digits.isdigit() or (signed and digits[1:].isdigit()):
            return int(digits, 8)
    except ValueError:
        pass
    raise IntegrityError(f"tar header has a bad number {field!r}")


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        raise IntegrityError(f"tar extended header has a bad number {value[:40]!r}")
    return int(value)


def _nanoseconds(value: bytes) -> int:
    sign = -1 if value.startswith(b"-") else 1
    whole, _, part = value.removeprefix(b"-").partition(b".")
    if (whole and not whole.isdigit()) or (part and not part.isdigit()) or not whole + part:
        raise IntegrityError(f"tar extended header has a bad time {value[:40]!r}")
    if len(whole) > 18:
        raise IntegrityError(f"tar extended header has a time out of range {value[:40]!r}")
    return sign * (int(whole or b"0") * 1_000_000_000 + int(part[:9].ljust(9, b"0") or b"0"))


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
    """Decode `length key=value\\n` records; the numbered pairs of sparse 0.0 are joined."""
    found: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    pos = 0
    while pos < len(data):
        space = data.find(b" ", pos, pos + 12)
        digits = data[pos:space] if space > 0 else b""
        if not digits.isdigit():
            if not data[pos:].strip(b"\0"):
                break
            raise IntegrityError("tar extended header has a record without a length")
        stop = pos + int(digits)
        if stop > len(data) or stop <= space + 1 or data[stop - 1] != 0x0A:
            raise IntegrityError("tar extended header has a record of wrong length")
        key, equals, value = data[space + 1 : stop - 1].partition(b"=")
        if not equals or not key:
            raise IntegrityError("tar extended header has a record without a key")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            pairs.append(value)
        elif value or key.startswith(_XATTR):
            found[key] = value
        else:
            found.pop(key, None)
        pos = stop
    if pairs:
        found[b"GNU.sparse.map"] = b",".join(pairs)
    return found


def _show(name: bytes) -> str:
    return ascii(name.decode("utf-8", "backslashreplace")[:200])
