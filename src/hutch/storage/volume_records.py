"""What the store knows of volumes and of pools: tables, records, names."""

from __future__ import annotations

from typing import Literal

import msgspec

from hutch.errors import InvalidArgument

__all__ = ["POOLS", "VOLUMES", "VOLUME_OPENINGS", "VOLUME_SNAPSHOTS", "VOLUME_USERS"]
__all__ += ["PoolRecord", "VolumeOpening", "VolumeRecord", "VolumeSnapshotRecord", "VolumeUser"]
__all__ += ["PoolKind", "check_name"]

PoolKind = Literal["directory", "ext4", "xfs", "btrfs", "qcow2"]

POOLS = "pools"
VOLUMES = "volumes"
VOLUME_USERS = "volume_users"
VOLUME_OPENINGS = "volume_openings"
VOLUME_SNAPSHOTS = "volume_snapshots"

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


class PoolRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A pool as the store has it. `source`: its directory, "" for one in the root; `size` of
    its file; `quotas`: its file system keeps volumes to their sizes; `reserved`: the host's
    disk holds room for all of it; `last_project`: the number of the quota made last."""

    kind: PoolKind
    created_at: float
    source: str = ""
    size: int = 0
    quotas: bool = False
    reserved: bool = False
    last_project: int = 0


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A volume as the store has it. `populated`: it has been given to an instance, and is
    not filled from an image again. `project` is the number of its quota. `arrived`: the token
    of the migration that has brought it."""

    created_at: float
    driver: str = "local"
    options: dict[str, str] = {}
    labels: dict[str, str] = {}
    anonymous: bool = False
    populated: bool = False
    project: int = 0
    arrived: str = ""

    @property
    def pool(self) -> str:
        """The name of the pool that it lies in, "" for none."""
        return self.options.get("pool", "")


class VolumeUser(msgspec.Struct, frozen=True, kw_only=True):
    """That an instance uses a volume (key: `<volume>/<instance>`)."""

    since: float


class VolumeOpening(msgspec.Struct, frozen=True, kw_only=True):
    """That a volume which is opened for use is open for somebody (key: `<volume>/<instance>`,
    or `<volume>/@` for who opened it by hand), in this boot of the host."""

    boot_id: str


class VolumeSnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A volume as it was once (key: `<volume>/<snapshot>`)."""

    created_at: float


def check_name(name: str, *, field: str = "name") -> str:
    """Return a name that may be one; raise `InvalidArgument`."""
    if not name or len(name) > 255 or name[0] in "_.-" or not _LETTERS.issuperset(name):
        raise InvalidArgument(
            f"expected letters, digits, '_', '.' and '-', got {name[:80]!r}", field=field
        )
    return name
