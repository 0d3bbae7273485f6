"""Unpacked layers by chainID: `<root>/layers/<hex>/fs`, made whole or not at all.

A layer's directory also holds `layer.json` (what it is), `implicit` while directories it
does not describe wait for the parent's modes, and `synced` once it is known to be on the
disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from hutch.decoding import decode_json
from hutch.errors import IntegrityError, NotFound
from hutch.linux.boot import boot_id
from hutch.records import Records
from hutch.storage.faults import disk_errors
from hutch.storage.trash import Trash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from hutch.storage.compression import Readable
    from hutch.storage.extract import UnpackLimits, UnpackOptions
    from hutch.storage.unpack import UnpackResult

__all__ = ["Layer", "Layers", "chain_id_of"]

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """An unpacked layer. `size` is that of the plain tar, `entries` how many it has, and
    `xattrs` whether files may have attributes beside overlayfs's own."""

    chain_id: str
    diff_id: str
    parent: str = ""
    size: int = 0
    entries: int = 0
    boot_id: str = ""
    xattrs: bool = True


def chain_id_of(parent: str, diff_id: str) -> str:
    """Return the chainID of a layer upon `parent` ("" for none)."""
    if not parent:
        return diff_id
    from hutch.oci.digest import digest_of

    return digest_of(f"{parent} {diff_id}".encode())


class Layers:
    """The unpacked layers of one root; thread-safe, shared with other processes.

    The directories themselves are the record of what there is, so nothing is kept in
    `records`: a rename makes a layer appear or go, and no database can disagree.
    """

    def __init__(
        self,
        root: str | Path,
        records: Records | None = None,
        *,
        trash: Trash | None = None,
        limits: UnpackLimits | None = None,
        options: UnpackOptions | None = None,
    ) -> None:
        self._root = os.fspath(root)
        self._layers = os.path.join(self._root, "layers")
        self._trash = trash or Trash(root)
        self._limits = limits
        self._options = options

    # ---- the path of a start --------------------------------------------------------

    def path(self, chain_id: str) -> str:
        """Return the layer's tree, or where it would be."""
        return f"{self._layers}/{chain_id.removeprefix('sha256:')}/fs"

    def has(self, chain_id: str) -> bool:
        """Tell whether the layer is unpacked."""
        return os.path.exists(self.path(chain_id))

    # ---- making ---------------------------------------------------------------------

    def unpack(
        self,
        stream: Readable,
        *,
        diff_id: str | None = None,
        parent_chain_id: str = "",
        chain_id: str | None = None,
        media_type: str = "",
    ) -> Layer:
        """Unpack a layer from its blob's stream, which is read to its end in any case.

        The compression is told from the content; `media_type` only appears in errors.
        Parents need not be there yet: layers may be unpacked in parallel, and `settle`
        finishes them. Without `diff_id` it is what comes out. Another process that
        unpacks the same layer is waited for, and then nothing is written.
        """
        from hutch.storage.locking import file_lock

        if diff_id is not None:
            chain_id = chain_id or chain_id_of(parent_chain_id, diff_id)
        key = (chain_id or f"new-{os.urandom(16).hex()}").removeprefix("sha256:")
        label = f"layer {diff_id or media_type or 'import'}"
        with disk_errors(label):
            os.makedirs(self._layers, 0o700, exist_ok=True)
            with file_lock(f"{self._layers}/.{key}.lock"):
                if chain_id is not None and (found := self.get(chain_id)) is not None:
                    while stream.read(1 << 20):
                        pass
                    return found
                return self._unpack(
                    stream, f"{self._layers}/.{key}.tmp", label, diff_id, parent_chain_id
                )

    def _unpack(
        self, stream: Readable, tmp: str, label: str, diff_id: str | None, parent: str
    ) -> Layer:
        from hutch.storage.unpack import unpack

        self._trash.discard(tmp)
        os.mkdir(tmp, 0o700)
        try:
            os.mkdir(f"{tmp}/fs", 0o755)
            fd = os.open(f"{tmp}/fs", _OPEN)
            try:
                os.fchmod(fd, 0o755)
                result = unpack(
                    stream,
                    fd,
                    diff_id=diff_id,
                    limits=self._limits,
                    options=self._options,
                    label=label,
                )
            finally:
                os.close(fd)
            layer = self._publish(tmp, result, parent)
        except BaseException:
            self._trash.discard(tmp)
            raise
        if result.implicit and parent and self.has(parent):
            self.settle((parent, layer.chain_id))
        return layer

    def _publish(self, tmp: str, result: UnpackResult, parent: str) -> Layer:
        layer = Layer(
            chain_id=chain_id_of(parent, result.diff_id),
            diff_id=result.diff_id,
            parent=parent,
            size=result.size,
            entries=result.entries,
            boot_id=boot_id(),
            xattrs=result.has_xattrs,
        )
        if result.implicit and parent:
            _write(f"{tmp}/implicit", msgspec.msgpack.encode(result.implicit))
        _write(f"{tmp}/layer.json", msgspec.json.encode(layer))
        try:
            os.rename(tmp, os.path.dirname(self.path(layer.chain_id)))
        except OSError:
            # Without a diffID beforehand two may have made the same layer: the first stays.
            if not self._renew(layer.chain_id):
                raise
            self._trash.discard(tmp)
        return layer

    def _renew(self, chain_id: str) -> bool:
        """Let a layer count as made now, so that a lease begun before protects it."""
        try:
            os.utime(os.path.dirname(self.path(chain_id)))
        except FileNotFoundError:
            return False
        return True

    def settle(self, chain_ids: Sequence[str]) -> None:
        """Give directories that a layer uses without describing them their parent's mode,
        owner and time. `chain_ids` go from the lowest layer to the highest, all unpacked.

        Overlayfs shows a directory as the topmost layer has it: without this a layer that
        only brings `tmp/x` would turn /tmp from 1777 into 0755.
        """
        for index, chain_id in enumerate(chain_ids):
            marker = f"{os.path.dirname(self.path(chain_id))}/implicit"
            if index == 0 or not os.path.exists(marker):
                continue
            with open(marker, "rb") as file:
                paths = msgspec.msgpack.decode(file.read(), type=list[bytes])
            below = [self.path(c) for c in reversed(chain_ids[:index])]
            with disk_errors(f"layer {chain_id}"):
                _inherit(self.path(chain_id), below, paths)
                try:
                    os.unlink(marker)
                except FileNotFoundError:
                    pass

    # ---- asking ---------------------------------------------------------------------

    def get(self, chain_id: str) -> Layer | None:
        """Return what is known of a layer, or None where it is not unpacked."""
        try:
            with open(f"{os.path.dirname(self.path(chain_id))}/layer.json", "rb") as file:
                return decode_json(file.read(), Layer)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise IntegrityError(
                f"layer {chain_id}: its description is damaged",
                hint="run 'hutch system prune', then pull the image again",
            ) from error

    def made_at(self, chain_id: str) -> float:
        """Return when the layer came, in seconds since the epoch (0: it is not there)."""
        try:
            return os.stat(os.path.dirname(self.path(chain_id))).st_ctime
        except FileNotFoundError:
            return 0.0

    def list(self) -> Iterator[Layer]:
        """Yield the unpacked layers."""
        try:
            names = sorted(os.listdir(self._layers))
        except FileNotFoundError:
            return
        for name in names:
            if not name.startswith("."):
                layer = self.get(name)
                if layer is not None:
                    yield layer

    def lower(self, chain_ids: Iterable[str]) -> tuple[str, ...]:
        """Return overlay's lower directories for chainIDs lowest first: topmost first.

        Raises `NotFound` for one that is not unpacked. An image of no layers gets an
        empty directory, as overlayfs wants one.
        """
        paths = []
        for chain_id in chain_ids:
            path = self.path(chain_id)
            if not os.path.exists(path):
                raise NotFound(
                    f"layer {chain_id}: not unpacked", hint="pull or load the image again"
                )
            paths.append(path)
        if not paths:
            empty = f"{self._root}/empty"
            os.makedirs(empty, 0o755, exist_ok=True)
            return (empty,)
        paths.reverse()
        return tuple(paths)

    # ---- removing and repairing -----------------------------------------------------

    def remove(self, chain_id: str) -> bool:
        """Take a layer away (deleted in the background); return whether there was one."""
        return self._trash.discard(os.path.dirname(self.path(chain_id)))

    def sync(self) -> int:
        """Make every unpacked layer safe on the disk; return how many were not yet."""
        from hutch.linux.files import syncfs

        waiting = [d for d in self._directories() if not os.path.exists(f"{d}/synced")]
        if waiting:
            fd = os.open(self._layers, _OPEN)
            try:
                syncfs(fd)
            finally:
                os.close(fd)
            for directory in waiting:
                try:
                    _write(f"{directory}/synced", b"")
                except FileNotFoundError:
                    continue
        return len(waiting)

    def reconcile(self) -> tuple[str, ...]:
        """Throw away what a dead process or a power cut left; return the chainIDs removed.

        A layer that was not yet known to be on the disk when the host went down may be
        incomplete, and goes; its blob is still there to unpack it from.
        """
        from hutch.storage.locking import try_file_lock

        boot = boot_id()
        removed = []
        for directory in self._directories():
            name = os.path.basename(directory)
            try:
                layer = self.get(name)
            except IntegrityError:
                layer = None
            unsafe = layer is not None and layer.boot_id != boot
            broken = layer is None or (unsafe and not os.path.exists(f"{directory}/synced"))
            if broken and self._trash.discard(directory):
                removed.append(f"sha256:{name}")
        for name in self._names():
            if name.startswith(".") and name.endswith(".tmp"):
                with try_file_lock(f"{self._layers}/{name[:-4]}.lock") as mine:
                    if mine:
                        self._trash.discard(f"{self._layers}/{name}")
        return tuple(removed)

    def _names(self) -> Sequence[str]:
        try:
            return os.listdir(self._layers)
        except FileNotFoundError:
            return []

    def _directories(self) -> Sequence[str]:
        return [f"{self._layers}/{n}" for n in self._names() if not n.startswith(".")]


def _inherit(path: str, below: list[str], directories: list[bytes]) -> None:
    """Copy mode, owner and times of `directories` from the topmost layer that has them."""
    from hutch.linux.files import open_in_root

    flags = os.O_RDONLY | os.O_DIRECTORY
    roots = [os.open(p, _OPEN) for p in below]
    own = os.open(path, _OPEN)
    try:
        for directory in directories:
            for root in roots:
                try:
                    source = open_in_root(root, directory, flags)
                except OSError:
                    continue
                target = open_in_root(own, directory, flags)
                st = os.fstat(source)
                os.fchown(target, st.st_uid, st.st_gid)
                os.fchmod(target, st.st_mode & 0o7777)
                os.utime(target, ns=(st.st_mtime_ns, st.st_mtime_ns))
                os.close(source)
                os.close(target)
                break
    finally:
        for root in roots:
            os.close(root)
        os.close(own)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
