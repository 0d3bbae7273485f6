"""User namespaces for remapped containers: which ids, and a namespace that carries the map."""

from __future__ import annotations

import os
import pwd

import msgspec

from hutch.errors import NotFound
from hutch.linux.idmap import IdMapping, IdRange, UserNamespaces, remap_mapping
from hutch.plan.ops import Idmap
from hutch.process.userns import hold_user_namespace
from hutch.spec.model import InstanceSpec

__all__ = ["RemappedIds", "UserMaps", "mapping_of", "remapped_root"]

_USER = "hutch"
_FALLBACK = IdMapping(
    uids=(IdRange(inside=0, outside=1_000_000, size=65_536),),
    gids=(IdRange(inside=0, outside=1_000_000, size=65_536),),
)


class RemappedIds(msgspec.Struct, frozen=True, kw_only=True):
    """A map in the form of plans, and the descriptor of a namespace with it (borrowed)."""

    uids: tuple[Idmap, ...]
    gids: tuple[Idmap, ...]
    fd: int

    @property
    def root(self) -> tuple[int, int]:
        """The host's ids of the superuser inside."""
        return self.uids[0].outside, self.gids[0].outside


class UserMaps:
    """The maps of this process, each with its namespace held open."""

    def __init__(self) -> None:
        self._namespaces = UserNamespaces(hold_user_namespace)

    def remapped(self) -> RemappedIds:
        """Return the map for `--userns remap`.

        Ids come from the subordinate ids of user `hutch`, else of the present user, else
        1000000 and up.
        """
        mapping = _mapping()
        return RemappedIds(
            uids=_lines(mapping.uids),
            gids=_lines(mapping.gids),
            fd=self._namespaces.fd(mapping),
        )


def mapping_of(spec: InstanceSpec) -> IdMapping | None:
    """Return the map of a remapped instance's ids, None for one without a map."""
    return None if spec.userns in ("", "host") else _mapping()


def remapped_root() -> tuple[int, int]:
    """Return the host's ids of the superuser of a remapped container."""
    mapping = _mapping()
    return mapping.uids[0].outside, mapping.gids[0].outside


def _mapping() -> IdMapping:
    for name, uid in ((_USER, -1), (_own_name(), os.geteuid())):
        try:
            return remap_mapping(name, uid)
        except NotFound:
            continue
    return _FALLBACK


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _lines(ranges: tuple[IdRange, ...]) -> tuple[Idmap, ...]:
    return tuple(Idmap(inside=r.inside, outside=r.outside, size=r.size) for r in ranges)
