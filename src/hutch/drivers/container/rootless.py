"""Containers of an ordinary user: a user namespace of one's own, with its maps.

Id 0 inside is the user; ids from 1 are the user's subordinate ids where there are any and
the tools that may map them (newuidmap, newgidmap of shadow-utils) are installed.
"""

from __future__ import annotations

import os
import pwd

from hutch.errors import Unsupported
from hutch.linux.idmap import (
    IdMapping,
    IdRange,
    map_arguments,
    rootless_mapping,
    to_outside,
    write_own_map,
)
from hutch.plan.assets import ResolvedUser
from hutch.plan.ops import Idmap

__all__ = ["check_user", "has_one_id", "own_maps", "write_maps"]

_TOOLS = ("/usr/bin/newuidmap", "/usr/bin/newgidmap")


def _mapping() -> IdMapping:
    uid, gid = os.geteuid(), os.getegid()
    single = IdMapping(
        uids=(IdRange(inside=0, outside=uid, size=1),),
        gids=(IdRange(inside=0, outside=gid, size=1),),
    )
    if not all(os.path.exists(tool) for tool in _TOOLS):
        return single
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    found = rootless_mapping(name, uid, gid)
    # Both or none: an image's files have an owner and a group.
    return found if len(found.uids) > 1 and len(found.gids) > 1 else single


def has_one_id() -> bool:
    """Tell whether the only user of a container is its root."""
    return len(_mapping().uids) == 1


def check_user(user: ResolvedUser) -> None:
    """Raise `Unsupported` for ids that the user namespace has not."""
    mapping = _mapping()
    wanted = ((user.uid, mapping.uids), *((gid, mapping.gids) for gid in (user.gid, *user.groups)))
    for number, ranges in wanted:
        if to_outside(ranges, number) is None:
            raise Unsupported(
                f"user: id {number} is not among those this user may give to a container",
                hint="give the user subordinate ids: usermod --add-subuids 100000-165535"
                " --add-subgids 100000-165535 NAME, and install uidmap",
            )


def own_maps() -> tuple[tuple[Idmap, ...], tuple[Idmap, ...]]:
    """Return the maps of user and group ids in the form of plans."""
    mapping = _mapping()
    return _lines(mapping.uids), _lines(mapping.gids)


def _lines(ranges: tuple[IdRange, ...]) -> tuple[Idmap, ...]:
    return tuple(Idmap(inside=r.inside, outside=r.outside, size=r.size) for r in ranges)


def write_maps(pid: int) -> None:
    """Map the ids of the user namespace that process `pid` has just been born into."""
    mapping = _mapping()
    if len(mapping.uids) == 1:
        write_own_map(pid)
        return
    from hutch.process.run import run_command

    for tool, ranges in zip(_TOOLS, (mapping.uids, mapping.gids), strict=True):
        done = run_command([tool, str(pid), *map_arguments(ranges)], timeout_s=10)
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip()
            raise Unsupported(
                f"user namespace: {os.path.basename(tool)}: {reason}",
                hint="check /etc/subuid and /etc/subgid, and that the tool is set-user-id root",
            )
