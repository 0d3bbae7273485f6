"""Maps of user and group ids: subordinate ids, and user namespaces that carry a map."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import msgspec

from hutch.errors import InvalidArgument, NotFound

__all__ = [
    "IdMapping",
    "IdRange",
    "UserNamespaces",
    "create_userns_fd",
    "map_arguments",
    "parse_mapping",
    "remap_mapping",
    "rootless_mapping",
    "subordinate_ids",
    "to_outside",
    "write_own_map",
]

_MAX_ID = (1 << 32) - 2
# The kernel takes so many lines in one map; see user_namespaces(7).
_MAX_LINES = 340


class IdRange(msgspec.Struct, frozen=True, kw_only=True):
    """`size` ids from `inside` are those from `outside`."""

    inside: int
    outside: int
    size: int


class IdMapping(msgspec.Struct, frozen=True, kw_only=True):
    """The maps of a user namespace."""

    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]


Holder = Callable[[], AbstractContextManager[int]]
"""Starts a process in a new user namespace that has no map yet, gives its pid when it is
there, and ends it when the block is left (`hutch-launcher --userns`)."""


def subordinate_ids(user: str, uid: int, path: str) -> tuple[tuple[int, int], ...]:
    """Return the (first, count) ranges of a user in /etc/subuid or /etc/subgid.

    A line names the user by name or by number; a line that is no such line is skipped,
    as the tools that write these files do. Empty where there is no file.
    """
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                words = line.strip().split(":")
                if len(words) != 3 or words[0] not in (user, str(uid)):
                    continue
                if words[1].isdigit() and words[2].isdigit() and int(words[2]) > 0:
                    found.append((int(words[1]), int(words[2])))
    except FileNotFoundError:
        return ()
    return tuple(found)


def remap_mapping(
    user: str, uid: int, *, subuid: str = "/etc/subuid", subgid: str = "/etc/subgid"
) -> IdMapping:
    """Return the map that puts ids from 0 on a user's subordinate ids, range after range."""
    return IdMapping(
        uids=_laid_from(0, _required(user, uid, subuid)),
        gids=_laid_from(0, _required(user, uid, subgid)),
    )


def rootless_mapping(
    user: str, uid: int, gid: int, *, subuid: str = "/etc/subuid", subgid: str = "/etc/subgid"
) -> IdMapping:
    """Return the map for an ordinary user: 0 is the user, 1 and up the subordinate ids.

    Without subordinate ids it has the user alone, which needs no setuid tool.
    """
    first_uid = IdRange(inside=0, outside=uid, size=1)
    first_gid = IdRange(inside=0, outside=gid, size=1)
    uids = _laid_from(1, subordinate_ids(user, uid, subuid))
    gids = _laid_from(1, subordinate_ids(user, uid, subgid))
    return IdMapping(uids=(first_uid, *uids), gids=(first_gid, *gids))


def _required(user: str, uid: int, path: str) -> tuple[tuple[int, int], ...]:
    ranges = subordinate_ids(user, uid, path)
    if not ranges:
        raise NotFound(
            f"no subordinate ids for {user} in {path}",
            hint=f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
        )
    return ranges


def _laid_from(inside: int, ranges: Iterable[tuple[int, int]]) -> tuple[IdRange, ...]:
    laid = []
    for outside, size in ranges:
        laid.append(IdRange(inside=inside, outside=outside, size=size))
        inside += size
    return tuple(laid)


def parse_mapping(lines: Sequence[str], *, field: str) -> tuple[IdRange, ...]:
    """Return the ranges of `inside:outside:size` texts, checked."""
    ranges = []
    for index, line in enumerate(lines):
        words = line.split(":")
        if len(words) != 3 or not all(word.isascii() and word.isdigit() for word in words):
            raise InvalidArgument(
                f"expected INSIDE:OUTSIDE:SIZE, got {line!r}", field=f"{field}[{index}]"
            )
        inside, outside, size = map(int, words)
        ranges.append(IdRange(inside=inside, outside=outside, size=size))
    _check(ranges, field)
    return tuple(ranges)


def _check(ranges: Sequence[IdRange], field: str) -> None:
    if not 1 <= len(ranges) <= _MAX_LINES:
        raise InvalidArgument(f"needs from 1 to {_MAX_LINES} ranges", field=field)
    for index, one in enumerate(ranges):
        if one.size < 1 or max(one.inside, one.outside) + one.size - 1 > _MAX_ID:
            raise InvalidArgument("ids out of range", field=f"{field}[{index}]")
        for other in ranges[:index]:
            if _overlap(one.inside, one.size, other.inside, other.size) or _overlap(
                one.outside, one.size, other.outside, other.size
            ):
                raise InvalidArgument("overlaps an earlier range", field=f"{field}[{index}]")


def _overlap(first: int, first_size: int, second: int, second_size: int) -> bool:
    return first < second + second_size and second < first + first_size


def to_outside(ranges: Iterable[IdRange], identifier: int) -> int | None:
    """Return the id outside of an id inside; None where it is not mapped."""
    for one in ranges:
        if one.inside <= identifier < one.inside + one.size:
            return one.outside + identifier - one.inside
    return None


def map_arguments(ranges: Iterable[IdRange]) -> list[str]:
    """Return the ranges as arguments of newuidmap(1) and newgidmap(1), after the pid."""
    return [str(n) for one in ranges for n in (one.inside, one.outside, one.size)]


def _map_text(ranges: Iterable[IdRange]) -> bytes:
    return "".join(f"{r.inside} {r.outside} {r.size}\n" for r in ranges).encode()


def create_userns_fd(mapping: IdMapping, hold: Holder) -> int:
    """Return a descriptor of a new user namespace with this map; the caller closes it.

    For mount_setattr(2) with MOUNT_ATTR_IDMAP. Needs CAP_SETUID and CAP_SETGID over the
    ids. The namespace lives on without a process.
    """
    with hold() as pid:
        for name, ranges in (("uid_map", mapping.uids), ("gid_map", mapping.gids)):
            # One write(2) for the whole map: the kernel takes no second one.
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, _map_text(ranges))
            finally:
                os.close(fd)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


class UserNamespaces:
    """One user namespace descriptor per mapping, made when first asked for.

    Making one takes milliseconds. The descriptors belong to this object; it is safe to
    use from several threads.
    """

    def __init__(self, hold: Holder) -> None:
        self._hold = hold
        self._lock = threading.Lock()
        self._fds: dict[IdMapping, int] = {}

    def fd(self, mapping: IdMapping) -> int:
        """Return the descriptor for a mapping; do not close it."""
        with self._lock:
            found = self._fds.get(mapping)
            if found is None:
                found = self._fds[mapping] = create_userns_fd(mapping, self._hold)
            return found

    def close(self) -> None:
        """Close all descriptors; mounts that were idmapped by them stay so."""
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()


def write_own_map(pid: int) -> None:
    """Make the user the root of the user namespace that process `pid` was born into.

    The one map that needs no privilege; setgroups(2) is given up for it, as the kernel wants.
    """
    for name, content in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {os.geteuid()} 1\n"),
        ("gid_map", f"0 {os.getegid()} 1\n"),
    ):
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, content.encode())
        finally:
            os.close(fd)
