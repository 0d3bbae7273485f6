"""`pool …`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hutch.cli.command import FORMAT, QUIET, Command
from hutch.cli.output import print_json, show_result, show_rows, stamp
from hutch.cli.session import Invocation, Told
from hutch.units import format_bytes

if TYPE_CHECKING:
    from hutch.storage.pools import Pool

__all__ = ["COMMANDS"]

_COLUMNS = (
    ("NAME", "Name"),
    ("KIND", "Kind"),
    ("SIZE", "Size"),
    ("USED", "Used"),
    ("FREE", "Free"),
    ("ON DISK", "OnDisk"),
    ("VOLUMES", "Volumes"),
    ("LIMITS", "Limits"),
)


def _create(invocation: Invocation) -> int:
    values = invocation.options
    pool = invocation.engine.pools.create(
        invocation.arguments[0],
        values.get("kind", "directory"),
        size=values.get("size", 0),
        source=values.get("source", ""),
        reserved=invocation.flag("reserve"),
    )
    return show_result(invocation, pool.name, Name=pool.name)


def _ls(invocation: Invocation) -> int:
    rows = [
        {
            "Name": pool.name,
            "Kind": pool.kind,
            "Size": format_bytes(pool.size) if pool.size else "-",
            "Used": format_bytes(pool.used) if pool.mounted else "-",
            "Free": format_bytes(pool.free) if pool.mounted else "-",
            "OnDisk": format_bytes(pool.allocated) if pool.allocated else "-",
            "Volumes": str(len(pool.volumes)),
            "Limits": pool.limits,
        }
        for pool in invocation.engine.pools.list()
    ]
    return show_rows(invocation, rows, _COLUMNS, identifier="Name")


def _shape(pool: Pool) -> dict[str, Any]:
    return {
        "Name": pool.name,
        "Kind": pool.kind,
        "Path": pool.path,
        "CreatedAt": stamp(int(pool.created_at * 1e9)),
        "Size": pool.size,
        "Used": pool.used,
        "Free": pool.free,
        "OnDisk": pool.allocated,
        "Reserved": pool.reserved,
        "Mounted": pool.mounted,
        "Limits": pool.limits,
        "LimitsWhy": _LIMITS[pool.limits],
        "Volumes": list(pool.volumes),
    }


_LIMITS = {
    "project": "volumes are kept to their sizes by project quotas",
    "subvolume": "volumes are kept to their sizes by quotas of btrfs",
    "file": "volumes of a size are file systems in files of that size: there are no quotas here",
    "image": "each volume is a disk image of its size",
}


def _inspect(invocation: Invocation) -> int:
    print_json([_shape(invocation.engine.pools.get(name)) for name in invocation.arguments])
    return 0


def _grow(invocation: Invocation) -> int:
    name, size = invocation.arguments
    pool = invocation.engine.pools.grow(name, size)
    return show_result(invocation, format_bytes(pool.size), Name=pool.name, Size=pool.size)


def _trim(invocation: Invocation) -> int:
    pools = invocation.engine.pools

    def trim(name: str) -> Told:
        freed = pools.trim(name)
        return f"{name}: {format_bytes(freed)}", {"SpaceReclaimed": freed}

    return invocation.each(invocation.arguments, trim)


def _rm(invocation: Invocation) -> int:
    return invocation.each(invocation.arguments, invocation.engine.pools.remove)


COMMANDS = {
    "pool create": Command(
        handler=_create,
        summary="Create a storage pool; print its name.",
        arguments="NAME",
        low=1,
        high=1,
        options=(
            ("kind", "", "text", "KIND", "directory (default), ext4, xfs, btrfs or qcow2"),
            ("reserve", "", "flag", "", "Keep room for all of it on the host's disk"),
            ("size", "", "text", "SIZE", "What it holds: of kinds with a file system"),
            ("source", "", "text", "DIRECTORY", "Where it is kept: an empty directory"),
        ),
        epilog="ext4, xfs and btrfs are file systems in one file, sparse unless reserved; in a "
        "pool of qcow2 each volume is a disk image. What this host cannot do is told.",
        examples=(
            "hutch pool create --kind btrfs --size 100G fast",
            "hutch pool create --source /mnt/disk2/hutch slow",
        ),
    ),
    "pool ls": Command(
        handler=_ls,
        summary="List storage pools.",
        options=(FORMAT, QUIET),
        examples=("hutch pool ls",),
    ),
    "pool inspect": Command(
        handler=_inspect,
        summary="Show everything about storage pools, as JSON.",
        arguments="POOL [POOL...]",
        low=1,
        high=-1,
        examples=("hutch pool inspect fast",),
    ),
    "pool grow": Command(
        handler=_grow,
        summary="Give a storage pool more room; print its size.",
        arguments="POOL SIZE",
        low=2,
        high=2,
        examples=("hutch pool grow fast 200G",),
    ),
    "pool trim": Command(
        handler=_trim,
        summary="Give what storage pools do not use back to the host's disk.",
        arguments="POOL [POOL...]",
        low=1,
        high=-1,
        examples=("hutch pool trim fast",),
    ),
    "pool rm": Command(
        handler=_rm,
        summary="Remove storage pools that have no volumes.",
        arguments="POOL [POOL...]",
        low=1,
        high=-1,
        examples=("hutch pool rm fast",),
    ),
}
