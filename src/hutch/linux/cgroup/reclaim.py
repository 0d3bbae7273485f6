"""Take memory back from a control group: its file pages, what it can swap, a lower limit."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

import msgspec

from hutch.errors import Busy, Unsupported
from hutch.linux.cgroup import files

__all__ = ["GroupMemory", "Pressure", "read_memory", "read_pressure", "reclaim", "set_limit"]
__all__ += ["is_precise", "set_hard_limit", "usage_of"]

_NO_LIMIT = 1 << 62
_SLACK = 1 << 20


class GroupMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a group has; bytes. `cache` are pages of files that can go without swap, `idle_cache`
    those of them that were not used lately; `refaults` counts pages that came back soon after
    they had been taken."""

    usage: int = 0
    cache: int = 0
    idle_cache: int = 0
    swap: int = 0
    limit: int | None = None
    refaults: int = 0


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """Percentages of the last ten seconds in which some, or all, waited for memory."""

    some: float
    full: float


def _place(directories: dict[str, str]) -> tuple[str, bool]:
    """Return the directory of the memory controller, and whether it is of version 2."""
    if "memory" in directories:
        return directories["memory"], False
    return directories.get("", ""), True


def is_precise(directories: dict[str, str]) -> bool:
    """Tell whether a given amount can be taken back (Linux 5.19, cgroup v2)."""
    path, unified = _place(directories)
    return unified and os.path.exists(f"{path}/memory.reclaim")


def read_memory(directories: dict[str, str]) -> GroupMemory:
    """Return what a group has; zeros where it is gone or nobody counts."""
    path, unified = _place(directories)
    try:
        detail = files.read_keyed(f"{path}/memory.stat")
        if unified:
            usage = files.read_int(f"{path}/memory.current", 0) or 0
            limit = files.read_int(f"{path}/memory.max", None)
            swap = files.read_int(f"{path}/memory.swap.current", 0) or 0
        else:
            usage = files.read_int(f"{path}/memory.usage_in_bytes", 0) or 0
            limit = files.read_int(f"{path}/memory.limit_in_bytes", None)
            swap = detail.get("total_swap", 0)
    except OSError:
        return GroupMemory()
    prefix = "" if unified else "total_"
    inactive = detail.get(f"{prefix}inactive_file", 0)
    return GroupMemory(
        usage=usage,
        cache=inactive + detail.get(f"{prefix}active_file", 0),
        idle_cache=inactive,
        swap=swap,
        limit=limit if limit is not None and limit < _NO_LIMIT else None,
        refaults=detail.get(f"{prefix}workingset_refault_file", 0),
    )


def usage_of(directories: dict[str, str]) -> int:
    """Return the bytes that a group has now."""
    return read_memory(directories).usage


def reclaim(directories: dict[str, str], amount: int, *, swap: bool = False) -> int:
    """Take back about `amount` bytes, files first, and with `swap` what is not in files too;
    return what it was. On version 1 it is all that is in files, whatever the amount."""
    path, unified = _place(directories)
    before = usage_of(directories)
    try:
        if unified:
            _write_reclaim(path, amount, swap=swap)
        else:
            _empty(path, swap=swap)
    except FileNotFoundError as exc:
        if os.path.isdir(path):
            raise Unsupported("memory: this kernel cannot take back from a group") from exc
        return 0
    return max(0, before - usage_of(directories))


def _write_reclaim(path: str, amount: int, *, swap: bool) -> None:
    # EAGAIN says that it was less than asked for. `swappiness=` is of Linux 6.9; before, how much
    # is swapped is the group's affair.
    for text in (f"{amount} swappiness={60 if swap else 0}", str(amount)):
        try:
            files.write_text(f"{path}/memory.reclaim", text)
            return
        except OSError as exc:
            if exc.errno == errno.EAGAIN:
                return
            if exc.errno != errno.EINVAL:
                raise


def _empty(path: str, *, swap: bool) -> None:
    """Version 1: `force_empty` tries to take every page, those that the swappiness allows."""
    before = files.read_text(f"{path}/memory.swappiness")
    wanted = "100" if swap else "0"
    if before != wanted:
        files.write_text(f"{path}/memory.swappiness", wanted)
    try:
        files.write_text(f"{path}/memory.force_empty", "0")
    except OSError as exc:
        # What is in use stays: that is how it ends with processes in the group.
        if exc.errno not in (errno.EBUSY, errno.EINTR):
            raise
    finally:
        if before != wanted:
            files.write_text(f"{path}/memory.swappiness", before)


def set_limit(directories: dict[str, str], limit: int | None) -> None:
    """Bound a group, or take the bound away; `Busy` where it has more already and cannot give
    it back. On version 2 the bound is soft (`memory.high`): who goes beyond is slowed."""
    path, unified = _place(directories)
    name = "memory.high" if unified else "memory.limit_in_bytes"
    none = "max" if unified else "-1"
    try:
        files.write_text(f"{path}/{name}", none if limit is None else str(limit))
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(f"memory: more than {limit} bytes are in use") from exc
        raise


def set_hard_limit(directories: dict[str, str], limit: int | None) -> None:
    """Bound a group for good, or take the bound away; `Busy` where it has more already and
    cannot give it back."""
    path, unified = _place(directories)
    if not unified:
        set_limit(directories, limit)
        return
    if limit is not None:
        _make_fit(directories, limit)
    files.write_text(f"{path}/memory.max", "max" if limit is None else str(limit))


def _make_fit(directories: dict[str, str], limit: int) -> None:
    """Have a group give back what it has above a bound. The kernel takes any bound of
    `memory.max`, and kills until it is met (cgroup-v2.rst)."""
    above = usage_of(directories) - limit
    if above <= 0:
        return
    with suppress(Unsupported):
        reclaim(directories, above + _SLACK)
    if usage_of(directories) > limit:
        raise Busy(f"memory: more than {limit} bytes are in use")


def read_pressure(path: str) -> Pressure | None:
    """Return the stalls that a pressure file tells, None where there is none."""
    try:
        text = files.read_text(path)
    except OSError:
        return None
    found: dict[str, float] = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        for word in rest.split():
            key, _, value = word.partition("=")
            if key == "avg10":
                found[kind] = float(value)
    if "some" not in found:
        return None
    return Pressure(some=found["some"], full=found.get("full", 0.0))
