"""The maps of sparse files in tar: GNU's old header, PAX 0.0, 0.1 and 1.0."""

from __future__ import annotations

from collections.abc import Callable

from hutch.errors import IntegrityError

__all__ = ["Map", "checked", "old_gnu", "pax_map"]

Map = list[tuple[int, int]]

_BLOCK = 512
_MAX_PAIRS = 1 << 17
_MAX_SIZE = 1 << 62
_BAD = "tar sparse file has a bad map"


def old_gnu(block: bytes, take: Callable[[int], bytes]) -> tuple[Map, int]:
    """Return the map and real size of a GNU `S` header, reading its extension blocks."""
    pairs = _table(block, 386, 4)
    real = _field(block[483:495])
    extended = block[482]
    while extended:
        more = take(_BLOCK)
        pairs += _table(more, 0, 21)
        extended = more[504]
        if len(pairs) > _MAX_PAIRS:
            raise IntegrityError(_BAD)
    return pairs, real


def _table(block: bytes, start: int, count: int) -> Map:
    pairs: Map = []
    for at in range(start, start + 24 * count, 24):
        if block[at] == 0:
            break
        pairs.append((_field(block[at : at + 12]), _field(block[at + 12 : at + 24])))
    return pairs


def _field(field: bytes) -> int:
    if field[0] & 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b" \0")
        if digits and (not digits.isdigit() or b"8" in digits or b"9" in digits):
            raise IntegrityError(_BAD)
        value = int(digits or b"0", 8)
    if value > _MAX_SIZE:
        raise IntegrityError(_BAD)
    return value


def pax_map(pax: dict[bytes, bytes], take: Callable[[int], bytes]) -> tuple[bytes, int, Map | None]:
    """Return (name or nothing, real size, map) of a PAX sparse entry.

    Version 1.0 keeps its map at the head of the data, read here with `take`.
    """
    name = pax.get(b"GNU.sparse.name", b"")
    real = _decimal(pax.get(b"GNU.sparse.realsize", pax.get(b"GNU.sparse.size", b"0")))
    if pax.get(b"GNU.sparse.major") == b"1":
        return name, real, _map_in_data(take)
    text = pax.get(b"GNU.sparse.map", b"")
    if text.count(b",") > 2 * _MAX_PAIRS:
        raise IntegrityError(_BAD)
    numbers = [_decimal(n) for n in text.split(b",")] if text else []
    if len(numbers) % 2:
        raise IntegrityError(_BAD)
    return name, real, list(zip(numbers[::2], numbers[1::2], strict=True))


def _map_in_data(take: Callable[[int], bytes]) -> Map:
    text = b""
    lines: list[bytes] = []
    wanted = 1
    while len(lines) < wanted:
        text += take(_BLOCK)
        *done, text = text.split(b"\n")
        lines += done
        if lines and wanted == 1:
            count = _decimal(lines[0])
            if count > _MAX_PAIRS:
                raise IntegrityError(_BAD)
            wanted = 1 + 2 * count
        if len(text) > 64:
            if text.strip(b"\0") == b"" and len(lines) >= wanted:
                break
            if len(lines) < wanted:
                raise IntegrityError(_BAD)
    numbers = [_decimal(n) for n in lines[1:wanted]]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def checked(pairs: Map, size: int, stored: int, name: str) -> Map:
    """Return the map if it is ordered, within `size`, and accounts for the data exactly."""
    at = total = 0
    for offset, length in pairs:
        if offset < at or offset + length > size:
            raise IntegrityError(f"tar entry {name}: sparse map out of order or out of range")
        at = offset + length
        total += length
    if total != stored:
        raise IntegrityError(f"tar entry {name}: sparse map does not match the data")
    return pairs


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 19 or int(value) > _MAX_SIZE:
        raise IntegrityError(_BAD)
    return int(value)
