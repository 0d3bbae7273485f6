"""Turn one value as a caller may write it (text, number, sequence, mapping) into a checked one.

Every function takes the name of the field it reads and raises `InvalidArgument` naming it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from hutch.errors import InvalidArgument

__all__ = [
    "absolute_path",
    "flag",
    "integer",
    "ip_address",
    "items",
    "mapping",
    "number",
    "one_of",
    "split_csv",
    "strings",
    "text",
]

T = TypeVar("T")
_MAX_TEXT = 128 * 1024 - 1  # MAX_ARG_STRLEN of execve(2), less the terminating zero
_MAX_ITEMS = 20_000
_TRUE = frozenset({"1", "t", "true"})
_FALSE = frozenset({"0", "f", "false"})


def text(value: object, field: str, *, empty: bool = True) -> str:
    """Return a string (a number or a path is written out) without NUL and of bounded length."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            value = str(value)
        except ValueError:  # more digits than the interpreter converts
            raise InvalidArgument("number is too long", field=field) from None
    if not isinstance(value, str):
        raise InvalidArgument(f"expected text, got {type(value).__name__}", field=field)
    if "\0" in value:
        raise InvalidArgument("holds a NUL character", field=field)
    if len(value) > _MAX_TEXT:
        raise InvalidArgument(f"longer than {_MAX_TEXT} characters", field=field)
    if not empty and not value:
        raise InvalidArgument("must not be empty", field=field)
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidArgument("is not valid unicode text", field=field) from None
    return value


def items(value: object, field: str, *, most: int = _MAX_ITEMS) -> list[Any]:
    """Return the members of a sequence, `most` at most; a value that is none becomes its only
    member."""
    if value is None:
        return []
    if isinstance(value, (list, tuple, set, frozenset)):
        members = sorted(value, key=str) if isinstance(value, (set, frozenset)) else list(value)
        if len(members) > most:
            raise InvalidArgument(f"more than {most} values", field=field)
        return members
    if isinstance(value, (bytes, bytearray)):
        raise InvalidArgument("expected text, got bytes", field=field)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return [value]


def strings(value: object, field: str, *, most: int = _MAX_ITEMS) -> tuple[str, ...]:
    """Return a tuple of strings from one string or a sequence of `most` at most."""
    members = items(value, field, most=most)
    return tuple(text(member, f"{field}[{i}]") for i, member in enumerate(members))


def mapping(value: object, field: str) -> dict[str, str]:
    """Return a dictionary from a mapping or from `KEY=VALUE` texts (`KEY` alone: empty)."""
    result: dict[str, str] = {}
    if isinstance(value, Mapping):
        for key, entry in value.items():
            name = text(key, field, empty=False)
            inner = "" if entry is None else entry
            result[name] = text(_lower_bool(inner), f"{field}.{name}")
        return result
    for i, member in enumerate(strings(value, field)):
        key, _, entry = member.partition("=")
        if not key:
            raise InvalidArgument(f"expected KEY=VALUE, got {member!r}", field=f"{field}[{i}]")
        result[key] = entry
    return result


def _lower_bool(value: object) -> object:
    return str(value).lower() if isinstance(value, (bool, float)) else value


def flag(value: object, field: str) -> bool:
    """Return a boolean from one or from `true`, `false`, `1`, `0`, `t`, `f`."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (str, int)):
        lowered = text(value, field).lower()
        if lowered in _TRUE:
            return True
        if lowered in _FALSE:
            return False
    raise InvalidArgument(f"expected true or false, got {_short(value)}", field=field)


def integer(value: object, field: str, *, low: int | None = None, high: int | None = None) -> int:
    """Return a whole number within bounds from a number or its decimal text."""
    result: int
    if isinstance(value, str) and len(value) <= 24:
        try:
            result = int(value.strip())
        except ValueError:
            raise InvalidArgument(f"expected a whole number, got {value!r}", field=field) from None
    elif isinstance(value, int) and not isinstance(value, bool):
        result = value
    else:
        raise InvalidArgument(f"expected a whole number, got {_short(value)}", field=field)
    if (low is not None and result < low) or (high is not None and result > high):
        shown = _short(result)
        bounds = (
            f"from {low} to {high}"
            if low is not None and high is not None
            else (f"at least {low}" if low is not None else f"at most {high}")
        )
        raise InvalidArgument(f"must be {bounds}, got {shown}", field=field)
    return result


def number(value: object, field: str, *, low: float, high: float) -> float:
    """Return a finite number within bounds from a number or its decimal text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InvalidArgument(f"expected a number, got {_short(value)}", field=field)
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise InvalidArgument(f"expected a number, got {_short(value)}", field=field) from None
    if not low <= result <= high:  # false for NaN too
        raise InvalidArgument(f"must be from {low:g} to {high:g}, got {_short(value)}", field=field)
    return result


def one_of(value: object, field: str, allowed: Sequence[str]) -> str:
    """Return the text if it is one of `allowed`."""
    given = text(value, field)
    if given not in allowed:
        shown = ", ".join(name for name in allowed if name)
        raise InvalidArgument(f"expected one of {shown}; got {_short(given)}", field=field)
    return given


def absolute_path(value: object, field: str, *, root: bool = False) -> str:
    """Return a cleaned absolute path (`/a//b/../c` becomes `/a/c`); `/` only with `root`."""
    import posixpath

    given = text(value, field, empty=False)
    if not given.startswith("/"):
        raise InvalidArgument(
            f"must be absolute, got {_short(given)}", field=field, hint="start the path with /"
        )
    cleaned = "/" + posixpath.normpath(given).lstrip("/")
    if cleaned == "/" and not root:
        raise InvalidArgument("must not be the root directory /", field=field)
    return cleaned


def ip_address(value: object, field: str, *, version: int | None = None) -> str:
    """Return an IP address in its usual writing; `version` 4 or 6 narrows it."""
    import ipaddress

    given = text(value, field)
    try:
        address = ipaddress.ip_address(given)
    except ValueError:
        raise InvalidArgument(f"expected an IP address, got {_short(given)}", field=field) from None
    if version is not None and address.version != version:
        raise InvalidArgument(f"expected an IPv{version} address, got {given}", field=field)
    if getattr(address, "scope_id", None):
        raise InvalidArgument(f"an address with a zone is not possible: {given}", field=field)
    return str(address)


def split_csv(value: str, field: str) -> list[str]:
    """Split at commas; double quotes protect them, as in a CSV record."""
    if '"' not in value:
        return value.split(",")
    import csv

    try:
        rows = list(csv.reader([value], strict=True))
    except csv.Error as exc:
        raise InvalidArgument(f"not a CSV record: {exc}", field=field) from exc
    if len(rows) != 1:
        raise InvalidArgument("expected one CSV record", field=field)
    return rows[0]


def _short(value: object) -> str:
    """Show a value in a message, cut where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "a huge number"
    shown = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
    return shown if len(shown) <= 80 else shown[:77] + "..."
