"""The writable layer of an instance: upper and work directories over an image's layers."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from hutch.errors import NotFound
from hutch.records import Records, Transaction
from hutch.storage.diskchain import allocated
from hutch.storage.layers import Layers
from hutch.storage.trash import Trash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "DISK_FILE",
    "LIMITED_FILE",
    "QCOW2_FILE",
    "SNAPSHOTS",
    "OverlayAssets",
    "SnapshotRecord",
    "Snapshots",
    "Usage",
    "is_limited",
    "measure",
]

SNAPSHOTS = "snapshots"
DISK_FILE = "disk.raw"
LIMITED_FILE = "limited.raw"  # the file system of a layer or a volume of a size
QCOW2_FILE = "disk.qcow2"  # of a machine without an image
"""What the writable disk of a virtual machine is called in its instance's directory."""


class OverlayAssets(msgspec.Struct, frozen=True, kw_only=True):
    """What an overlay mount needs; `lower` is topmost first."""

    lower: tuple[str, ...]
    upper: str
    work: str


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Which layers an instance stands on, lowest first: garbage collection keeps them."""

    chain_ids: tuple[str, ...]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Disk space really taken (blocks), and inodes."""

    bytes: int
    inodes: int


class Snapshots:
    """The snapshots of one root, in `<root>/instances/<id>/{upper,work}`."""

    def __init__(
        self,
        root: str | Path,
        records: Records,
        *,
        layers: Layers | None = None,
        trash: Trash | None = None,
    ) -> None:
        self._instances = os.path.join(os.fspath(root), "instances")
        self._records = records
        self._trash = trash or Trash(root)
        self._layers = layers or Layers(root, trash=self._trash)

    def directory(self, instance_id: str) -> str:
        """Return the instance's directory."""
        return f"{self._instances}/{instance_id}"

    def upper(self, instance_id: str) -> str:
        """Return the directory of what an instance wrote."""
        return self.upper_of(self.directory(instance_id))

    @classmethod
    def upper_of(cls, directory: str) -> str:
        """Return the same for an instance's directory."""
        return cls._assets(directory, ()).upper

    def prepare(
        self,
        instance_id: str,
        chain_ids: Sequence[str],
        *,
        transaction: Transaction | None = None,
        owner: tuple[int, int] | None = None,
    ) -> OverlayAssets:
        """Make upper and work over the layers (lowest first) and record their use.

        With `transaction` (a write one) the record goes in there. `owner` is who owns the
        root inside a user namespace. Raises `NotFound` where a layer is not unpacked.
        """
        if transaction is None:
            with self._records.write() as own:
                return self.prepare(instance_id, chain_ids, transaction=own, owner=owner)
        self.note(transaction, instance_id, chain_ids)
        return self.make(instance_id, chain_ids, owner=owner)

    @staticmethod
    def note(transaction: Transaction, instance_id: str, chain_ids: Sequence[str]) -> None:
        """Record that an instance stands on these layers."""
        transaction.put(SNAPSHOTS, instance_id, SnapshotRecord(chain_ids=tuple(chain_ids)))

    @staticmethod
    def forget(transaction: Transaction, instance_id: str) -> None:
        """Remove the record of an instance's layers."""
        transaction.delete(SNAPSHOTS, instance_id)

    def make(
        self,
        instance_id: str,
        chain_ids: Sequence[str],
        *,
        owner: tuple[int, int] | None = None,
        size: int = 0,
    ) -> OverlayAssets:
        """Make upper and work; whoever calls it sees to the record (`note`). With `size` they
        hold so many bytes and no more."""
        lower = self._layers.lower(chain_ids)
        directory = self.directory(instance_id)
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            pass
        except FileNotFoundError:
            os.makedirs(directory, 0o700)
        if size:
            from hutch.storage.disks import Disks
            from hutch.storage.limited import make_limited

            disks = Disks(os.path.dirname(self._instances))
            make_limited(disks, directory, size, field="storage_opts.size")
        assets = self._assets(directory, lower)
        _ensure(assets.upper)
        _ensure(assets.work)
        # The merged root looks as the upper directory does.
        st = os.stat(lower[0])
        uid, gid = owner or (st.st_uid, st.st_gid)
        if (uid, gid) != (os.geteuid(), os.getegid()):
            os.chown(assets.upper, uid, gid)
            os.chown(assets.work, uid, gid)
        os.chmod(assets.upper, st.st_mode & 0o7777)
        return assets

    def load(self, instance_id: str, chain_ids: Sequence[str]) -> OverlayAssets:
        """Return the assets of a prepared snapshot whose layers the caller knows."""
        return self._assets(self.directory(instance_id), self._layers.lower(chain_ids))

    @staticmethod
    def _assets(directory: str, lower: tuple[str, ...]) -> OverlayAssets:
        if not is_limited(directory):
            return OverlayAssets(lower=lower, upper=f"{directory}/upper", work=f"{directory}/work")
        from hutch.storage.limited import ensure_limited, tree_of, work_of

        ensure_limited(directory)
        return OverlayAssets(lower=lower, upper=tree_of(directory), work=work_of(directory))

    def get(self, instance_id: str) -> OverlayAssets:
        """Return the assets of a prepared snapshot; raise `NotFound` where there is none."""
        with self._records.read() as transaction:
            record = transaction.get(SNAPSHOTS, instance_id, SnapshotRecord)
        if record is None:
            raise NotFound(f"snapshot of instance {instance_id[:12]}: not found")
        return self.load(instance_id, record.chain_ids)

    def remove(self, instance_id: str, *, transaction: Transaction | None = None) -> None:
        """Take upper and work away and the record with them; missing is fine."""
        directory = self.directory(instance_id)
        self._trash.discard(f"{directory}/upper")
        self._trash.discard(f"{directory}/work")
        if transaction is None:
            with self._records.write() as own:
                own.delete(SNAPSHOTS, instance_id)
        else:
            transaction.delete(SNAPSHOTS, instance_id)

    def usage(self, instance_id: str) -> Usage:
        """Return what the instance has written, to its directory or to its disk, and where it
        is suspended its memory."""
        directory = self.directory(instance_id)
        within = f"{directory}/limited" if is_limited(directory) else directory
        places = (f"{within}/upper", f"{directory}/suspended", f"{directory}/tpm")
        written = [measure(path) for path in places]
        disk = allocated(directory) + _allocated(f"{directory}/{QCOW2_FILE}")
        return Usage(
            bytes=sum(one.bytes for one in written) + disk,
            inodes=sum(one.inodes for one in written),
        )


def is_limited(directory: str) -> bool:
    """Tell whether a directory keeps its files in a file system of their own."""
    return os.path.exists(f"{directory}/{LIMITED_FILE}")


def _allocated(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def _ensure(path: str) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        pass


def measure(path: str) -> Usage:
    """Return the disk space of a tree, each hard-linked file counted once."""
    seen: set[tuple[int, int]] = set()
    blocks = inodes = 0
    pending = [path]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    st = entry.stat(follow_symlinks=False)
                    if st.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                        if (st.st_dev, st.st_ino) in seen:
                            continue
                        seen.add((st.st_dev, st.st_ino))
                    blocks += st.st_blocks
                    inodes += 1
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except OSError:
            # It may go while we look; a path may also have grown past PATH_MAX.
            continue
    return Usage(bytes=blocks * 512, inodes=inodes)
