"""Owners of files in an instance whose ids are remapped: as the host has them, as it has."""

from __future__ import annotations

from collections.abc import Sequence

from hutch.errors import InvalidArgument
from hutch.linux.idmap import IdMapping, IdRange, to_outside

__all__ = ["Owners"]


class Owners:
    """Translate owners by the map of a user namespace.

    Files of the image keep their plain ids on disk, while what the instance wrote has the
    host's: an id outside the map's host side is taken for plain already.
    """

    def __init__(self, mapping: IdMapping) -> None:
        self._mapping = mapping

    def inside(self, uid: int, gid: int) -> tuple[int, int]:
        """Return an owner on disk as the instance sees it."""
        return _inside(self._mapping.uids, uid), _inside(self._mapping.gids, gid)

    def outside(self, uid: int, gid: int) -> tuple[int, int]:
        """Return an owner inside as it is on disk; raise where the map has no place for it."""
        host = to_outside(self._mapping.uids, uid), to_outside(self._mapping.gids, gid)
        if host[0] is None or host[1] is None:
            raise InvalidArgument(f"owner {uid}:{gid} is not in the instance's map of ids")
        return host[0], host[1]


def _inside(ranges: Sequence[IdRange], identifier: int) -> int:
    for one in ranges:
        if one.outside <= identifier < one.outside + one.size:
            return one.inside + identifier - one.outside
    return identifier
