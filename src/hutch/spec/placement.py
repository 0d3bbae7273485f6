"""Where an instance is to run (`--placement`), and devices by a vendor's names (`--gpus`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hutch.errors import InvalidArgument
from hutch.spec.model import Placement
from hutch.spec.parse import flag, integer, one_of, split_csv, text
from hutch.units import parse_bytes

__all__ = ["is_device_name", "parse_gpus", "read_placement"]

_CHOICES = {
    "cpus": ("shared", "exclusive"),
    "numa": ("any", "prefer", "single"),
    "smt": ("any", "full"),
    "memory": ("demand", "pool"),
    "fit": ("first", "best", "worst", "pack", "spread"),
}
# `vendor.com/class=name` of the Container Device Interface, or `vfio=ADDRESS` of ours.
_VENDOR_NAME = re.compile(
    r"[A-Za-z][A-Za-z0-9_.-]*/[A-Za-z][A-Za-z0-9_-]*=[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?"
)
_PCI_ADDRESS = re.compile(r"vfio=[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_MAX_GPUS = 1024


def read_placement(value: object, field: str = "placement") -> Placement:
    """Read `cpus=exclusive,numa=single,smt=full,fit=best,huge=2M:64M`, or a mapping of that."""
    if isinstance(value, Placement):
        return value
    values: dict[str, Any] = {}
    huge: dict[int, int] = {}
    for key, given in _pairs(value, field):
        where = f"{field}.{key}"
        if key == "huge":
            page, amount = _huge(given, where)
            huge[page] = huge.get(page, 0) + amount
        elif key in ("merge", "prealloc"):
            values[key] = _switch(given, where)
        elif key in _CHOICES:
            values[key] = one_of(given, where, _CHOICES[key])
        else:
            raise InvalidArgument(
                f"unknown key {key[:40]!r}",
                field=field,
                hint="cpus, numa, smt, fit, huge, memory, merge or prealloc",
            )
    return Placement(**values, huge=huge)


def _pairs(value: object, field: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(text(key, field), given) for key, given in value.items()]
    pairs = []
    for part in split_csv(text(value, field, empty=False), field):
        key, equals, given = part.partition("=")
        if not equals:
            raise InvalidArgument(
                f"expected KEY=VALUE, got {part[:80]!r}",
                field=field,
                hint="for example cpus=exclusive,numa=single",
            )
        pairs.append((key, given))
    return pairs


def _switch(value: object, field: str) -> bool:
    return flag({"on": True, "off": False}.get(str(value), value), field)


def _huge(value: object, field: str) -> tuple[int, int]:
    """Return page size and amount of `2M:64M`, in bytes; `2M` alone is all of a machine's."""
    page_text, colon, amount_text = text(value, field).partition(":")
    page = parse_bytes(page_text, field=field)
    if not page or page & (page - 1) or page < 64 << 10:
        raise InvalidArgument(
            f"no size of huge pages: {page_text[:40]!r}", field=field, hint="for example 2M:64M"
        )
    amount = parse_bytes(amount_text, field=field) if colon else 0
    if (colon and not amount) or amount % page:
        raise InvalidArgument(f"must be a multiple of {page_text[:40]}", field=field)
    return page, amount


def is_device_name(given: str) -> bool:
    """Tell whether a device is named by its vendor or by its address, not by a path."""
    return bool(_VENDOR_NAME.fullmatch(given) or _PCI_ADDRESS.fullmatch(given))


def parse_gpus(value: object, field: str = "gpus") -> str:
    """Read `all`, a number, or `device=0,1` and return it in one form."""
    given = text(value, field, empty=False).strip().strip('"').lower()
    if given in ("all", "-1"):
        return "all"
    names, found = "", given
    for part in split_csv(given, field):
        key, equals, rest = part.partition("=")
        if key == "count" and equals:
            return parse_gpus(rest, field)
        if key == "device" and equals:
            names = given[given.index("device=") + len("device=") :]
            break
        if key in ("capabilities", "driver", "options"):
            found = "all"
    if names:
        chosen = [name.strip() for name in names.split(",")]
        if not all(re.fullmatch(r"[a-z0-9][a-z0-9_.:-]*", name) for name in chosen):
            raise InvalidArgument(f"not names of devices: {names[:80]!r}", field=field)
        return f"device={','.join(chosen)}"
    if found == "all":
        return found
    return str(integer(found, field, low=1, high=_MAX_GPUS))
