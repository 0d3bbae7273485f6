"""Root disks of virtual machines: an image's layers as one read-only erofs file.

`<root>/rootdisks/<hex of the top chainID>/disk.erofs`, made whole or not at all, once per
stack of layers and shared by all instances of it. As with layers, the directories are the
record of what there is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import msgspec

from hutch.decoding import decode_json
from hutch.errors import IntegrityError, Unsupported
from hutch.linux.boot import boot_id
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.faults import disk_errors
from hutch.storage.layers import Layers
from hutch.storage.sealing import Seal
from hutch.storage.trash import Trash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MKFS", "RootDisk", "RootDisks", "disk_key"]

MKFS = "mkfs.erofs"
_EMPTY = "0" * 64
# mkfs.erofs stamps the file system with this and clamps later times of files to it, so
# that a stack of layers always gives the same bytes: 2100-01-01.
_EPOCH = "4102444800"
_TIMEOUT_S = 3600.0


class RootDisk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A root disk; `size` is that of the file, `boot_id` the boot of the host it was made in;
    the others are its seal."""

    chain_id: str
    size: int
    boot_id: str
    sha256: str = ""
    pieces: str = ""
    verity: str = ""
    stamp: str = ""

    @property
    def seal(self) -> Seal:
        """How the file was when it was made."""
        return Seal(sha256=self.sha256, pieces=self.pieces, verity=self.verity, stamp=self.stamp)


def disk_key(chain_ids: Sequence[str]) -> str:
    """Return what marks the root disk of a stack of layers for garbage collection."""
    return f"disk:{_top(chain_ids)}"


def _top(chain_ids: Sequence[str]) -> str:
    return chain_ids[-1] if chain_ids else f"sha256:{_EMPTY}"


class RootDisks:
    """The root disks of one root; thread-safe, shared with other processes."""

    def __init__(self, root: str | Path, layers: Layers, *, trash: Trash | None = None) -> None:
        self._directory = os.path.join(os.fspath(root), "rootdisks")
        self._layers = layers
        self._trash = trash or Trash(root)

    # ---- asking -----------------------------------------------------------------------

    def path(self, chain_ids: Sequence[str]) -> str:
        """Return the disk of a stack of layers (lowest first), or where it would be."""
        return f"{self._place(_top(chain_ids))}/disk.erofs"

    def _place(self, chain_id: str) -> str:
        return f"{self._directory}/{chain_id.removeprefix('sha256:')}"

    def has(self, chain_ids: Sequence[str]) -> bool:
        """Tell whether the disk is made."""
        return os.path.exists(self.path(chain_ids))

    def get(self, chain_id: str) -> RootDisk | None:
        """Return the disk of a top chainID, or None where there is none."""
        try:
            with open(f"{self._place(chain_id)}/disk.json", "rb") as file:
                return decode_json(file.read(), RootDisk)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def list(self) -> Iterator[RootDisk]:
        """Yield the disks that there are."""
        for name in sorted(self._names()):
            if not name.startswith("."):
                disk = self.get(name)
                if disk is not None:
                    yield disk

    def made_at(self, chain_id: str) -> float:
        """Return when the disk came, in seconds since the epoch (0: it is not there)."""
        try:
            return os.stat(self._place(chain_id)).st_ctime
        except FileNotFoundError:
            return 0.0

    # ---- making -----------------------------------------------------------------------

    def ensure(self, chain_ids: Sequence[str], *, progress: Progress = silent) -> str:
        """Return the path of the disk of a stack of layers (lowest first, all unpacked),
        made where it is not there yet.

        Hold a lease on the layers. Another process that makes the same disk is waited for.
        Without root all files belong to root in the disk, as their owners are not known.
        Raises `Unsupported` without erofs-utils, `Exhausted` when the disk is full,
        `NotFound` where a layer is not unpacked, `IntegrityError` for a disk that is there
        and not as it was made.
        """
        from hutch.storage.locking import file_lock

        path = self.path(chain_ids)
        if os.path.exists(path):
            self._require_intact(_top(chain_ids), path)
            return path
        chain_id = _top(chain_ids)
        lower = self._layers.lower(chain_ids)
        found = [self._layers.get(layer) for layer in chain_ids]
        xattrs = any(layer is None or layer.xattrs for layer in found)
        tool = _require_mkfs()
        name = chain_id.removeprefix("sha256:")
        with disk_errors(f"root disk {chain_id}"):
            os.makedirs(self._directory, 0o700, exist_ok=True)
            with file_lock(f"{self._directory}/.{name}.lock"):
                if not os.path.exists(path):
                    progress(ProgressEvent(item=chain_id, phase="making the root disk"))
                    tmp = f"{self._directory}/.{name}.tmp"
                    self._make(tmp, lower, _Maker(tool=tool, chain_id=chain_id, xattrs=xattrs))
        return path

    def _require_intact(self, chain_id: str, path: str) -> None:
        """Check a disk's seal; one that was touched, and is as it was, gets a new one."""
        from hutch.storage.sealing import check_seal

        disk = self.get(chain_id)
        if disk is None:
            return
        seal = disk.seal
        with disk_errors(f"root disk {chain_id}"):
            try:
                hint = "hutch system check --repair"
                found = check_seal(path, seal, what=f"root disk {chain_id}", hint=hint)
            except FileNotFoundError:
                return  # it has just been thrown away
            if found != seal:
                self._note(msgspec.structs.replace(disk, stamp=found.stamp))

    def _note(self, disk: RootDisk) -> None:
        place = self._place(disk.chain_id)
        partial = f"{place}/disk.json.{os.urandom(4).hex()}"
        _write(partial, msgspec.json.encode(disk))
        os.replace(partial, f"{place}/disk.json")

    def _make(self, tmp: str, lower: Sequence[str], maker: _Maker) -> None:
        from hutch.storage.sealing import make_seal

        self._trash.discard(tmp)
        os.mkdir(tmp, 0o700)
        try:
            target = f"{tmp}/disk.erofs"
            _with_tree(lower, tmp, lambda tree: _mkfs(maker, tree, target))
            self._trash.discard(f"{tmp}/tree")
            seal = make_seal(target)
            disk = RootDisk(
                chain_id=maker.chain_id,
                size=os.stat(target).st_size,
                boot_id=boot_id(),
                pieces=seal.pieces,
                verity=seal.verity,
                stamp=seal.stamp,
            )
            _write(f"{tmp}/disk.json", msgspec.json.encode(disk))
            os.rename(tmp, self._place(maker.chain_id))
        except BaseException:
            self._trash.discard(tmp)
            raise

    # ---- removing and repairing -------------------------------------------------------

    def remove(self, chain_id: str) -> bool:
        """Take a disk away; return whether there was one. Who has it open keeps it."""
        return self._trash.discard(self._place(chain_id))

    def sync(self) -> int:
        """Make every disk safe on the host's disk; return how many were not yet."""
        count = 0
        for name in self._names():
            place = f"{self._directory}/{name}"
            if name.startswith(".") or os.path.exists(f"{place}/synced"):
                continue
            try:
                for path in (f"{place}/disk.erofs", f"{place}/disk.json", place):
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    try:
                        os.fsync(fd)
                    finally:
                        os.close(fd)
                _write(f"{place}/synced", b"")
                count += 1
            except FileNotFoundError:
                continue
        return count

    def reconcile(self) -> tuple[str, ...]:
        """Throw away what a dead process or a power cut left; return the chainIDs removed.

        A disk that was not known to be safe when the host went down may be incomplete, and
        goes; it is made anew from the layers when it is next wanted.
        """
        from hutch.storage.locking import try_file_lock

        boot = boot_id()
        removed = []
        for name in self._names():
            place = f"{self._directory}/{name}"
            if name.startswith("."):
                if name.endswith(".tmp"):
                    with try_file_lock(f"{place[:-4]}.lock") as mine:
                        if mine:
                            self._trash.discard(place)
                continue
            disk = self.get(name)
            unsafe = disk is not None and disk.boot_id != boot
            broken = disk is None or (unsafe and not os.path.exists(f"{place}/synced"))
            if broken and self._trash.discard(place):
                removed.append(f"sha256:{name}")
        return tuple(removed)

    def _names(self) -> Sequence[str]:
        try:
            return os.listdir(self._directory)
        except FileNotFoundError:
            return []


def _require_mkfs() -> str:
    from hutch.host.programs import find_program

    tool = find_program(MKFS)
    if tool is None:
        raise Unsupported(f"root disk: {MKFS} is not installed", hint="apt-get install erofs-utils")
    return tool


def _with_tree(lower: Sequence[str], workspace: str, use: Callable[[str], None]) -> None:
    """Call `use` with the path of the tree that overlayfs would show of the layers.

    One layer is its own tree. More are mounted where that is allowed, else linked together.
    """
    if len(lower) == 1:
        use(lower[0])
        return
    tree = f"{workspace}/tree"
    os.mkdir(tree, 0o700)
    if os.geteuid() == 0:
        from hutch.storage.merging import use_mounted

        # Where a layer takes away what no layer beneath it has, overlayfs lists the name and
        # finds nothing under it. Linked together, the name is not there.
        with suppress(FileNotFoundError):
            if use_mounted(lower, tree, use):
                return
    from hutch.storage.merging import link_tree

    link_tree(lower, tree)
    use(tree)


class _Maker(msgspec.Struct, frozen=True, kw_only=True):
    """What makes the file system of one disk; without `xattrs` no file of it has any."""

    tool: str
    chain_id: str
    xattrs: bool


def _mkfs(maker: _Maker, tree: str, target: str) -> None:
    """Make the file system, not compressed: what the host's page cache shares, an emulated
    CPU need not unpack."""
    import uuid

    from hutch.process.run import run_command

    identity = uuid.uuid5(uuid.NAMESPACE_OID, maker.chain_id)
    command = [maker.tool, "--quiet", "-U", str(identity)]
    if os.geteuid() != 0:
        command.append("--all-root")
    if not maker.xattrs:
        # It would ask for them twice for every file: through an overlay of layers that is a
        # fifth of all it does.
        command.append("-x-1")
    environment = {"SOURCE_DATE_EPOCH": _EPOCH, "LC_ALL": "C.UTF-8", "PATH": os.defpath}
    done = run_command([*command, target, tree], env=environment, timeout_s=_TIMEOUT_S)
    if done.returncode != 0:
        said = (done.stderr + done.stdout).decode(errors="replace")
        raise _failure(said, maker.chain_id, tree, target)


def _failure(said: str, chain_id: str, tree: str, target: str) -> Exception:
    if "No space left" in said or _is_full(target):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
    if "Permission denied" in said:
        # Without root: a file of the image that not even its owner may read.
        return OSError(errno.EACCES, os.strerror(errno.EACCES), tree)
    if "No such file" in said:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), tree)
    lines = [line for line in said.splitlines() if line.strip()] or ["no reason was given"]
    return IntegrityError(f"root disk {chain_id}: {MKFS}: {lines[0].strip()}")


def _is_full(target: str) -> bool:
    status = os.statvfs(os.path.dirname(target))
    return status.f_bavail * status.f_frsize < 1 << 20


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
