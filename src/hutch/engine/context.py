"""What the use cases share: the root directory and, made on first use, its parts."""

from __future__ import annotations

import os
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.errors import Denied, Exhausted, Unavailable
from hutch.linux.boot import boot_id
from hutch.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hutch.drivers.base import Driver
    from hutch.drivers.vm.driver import VmDriver
    from hutch.drivers.vm.kernels import Kernels
    from hutch.image.catalog import Images as ImageCatalog
    from hutch.image.catalog import ImageUser
    from hutch.image.registry_config import RegistryConfig
    from hutch.network import Networks
    from hutch.process.launcher import Launcher
    from hutch.records import Transaction
    from hutch.resources.groups import InstanceGroups
    from hutch.resources.memory_pool import MemoryPool
    from hutch.storage.content import ContentStore
    from hutch.storage.diskkeys import DiskKey
    from hutch.storage.disks import Disks
    from hutch.storage.gc import Collector
    from hutch.storage.layers import Layers
    from hutch.storage.leases import Leases
    from hutch.storage.rootdisk import RootDisks
    from hutch.storage.snapshots import Snapshots
    from hutch.storage.trash import Trash
    from hutch.storage.volumes import Volumes

__all__ = ["BootRecord", "Context", "default_root"]

_SUBDIRECTORIES = ("instances", "cache", "locks")


def default_root() -> Path:
    """Return $HUTCH_ROOT, else /var/lib/hutch for root, else a directory of the user's."""
    named = os.environ.get("HUTCH_ROOT")
    if named:
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/hutch")
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "hutch"


class BootRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The boot of the host for which the root was last put right."""

    boot_id: str


class Context:
    """One root directory, opened."""

    def __init__(self, root: str | Path | None, registry: RegistryConfig | None = None) -> None:
        self.root = Path(os.path.abspath(root if root is not None else default_root()))
        self._instances = self.root / "instances"
        self._registry = registry
        self.rootless = os.geteuid() != 0
        try:
            for name in _SUBDIRECTORIES:
                (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        except PermissionError as exc:
            raise Denied(
                f"{self.root}: {exc.strerror}",
                hint="name a root of yours with --root or HUTCH_ROOT",
            ) from exc
        except NotADirectoryError as exc:
            raise Unavailable(f"{self.root}: not a directory") from exc
        except OSError as exc:
            raise _storage_error(self.root, exc) from exc
        self.store = Store.open(self.root / "hutch.db")
        # Of encrypted disks, by instance: what this process was given. Never written down.
        self.disk_keys: dict[str, DiskKey] = {}

    def was_rebooted(self) -> bool:
        """Tell whether the host was started anew since the root was last put right."""
        with self.store.read() as tx:
            noted = tx.get("meta", "boot", BootRecord)
        return noted is None or noted.boot_id != self.boot_id

    def close(self) -> None:
        """Release what this process holds; instances go on."""
        trash = self.__dict__.get("trash")
        if trash is not None:
            trash.drain()
        self.store.close()
        launcher = self.__dict__.get("launcher")
        if launcher is not None:
            launcher.close()

    @cached_property
    def boot_id(self) -> str:
        """The identifier of this boot."""
        return boot_id()

    @cached_property
    def launcher(self) -> Launcher:
        """The native launcher, loaded once."""
        from hutch.process.launcher import Launcher

        return Launcher()

    @cached_property
    def content(self) -> ContentStore:
        """Blobs by digest."""
        from hutch.storage.content import ContentStore

        return ContentStore(self.root)

    @cached_property
    def layers(self) -> Layers:
        """Unpacked layers by chain identifier."""
        from hutch.storage.layers import Layers

        return Layers(self.root, self.store, trash=self.trash)

    @cached_property
    def rootdisks(self) -> RootDisks:
        """Images as read-only disks of virtual machines."""
        from hutch.storage.rootdisk import RootDisks

        return RootDisks(self.root, self.layers, trash=self.trash)

    @cached_property
    def disks(self) -> Disks:
        """Writable disks of virtual machines."""
        from hutch.storage.disks import Disks

        return Disks(self.root)

    @cached_property
    def kernels(self) -> Kernels:
        """Guest kernels of virtual machines."""
        from hutch.drivers.vm.kernels import Kernels

        return Kernels(self.root, self.store, trash=self.trash)

    @cached_property
    def leases(self) -> Leases:
        """What must not be collected while work is under way."""
        from hutch.storage.leases import Leases

        return Leases(self.store)

    @cached_property
    def snapshots(self) -> Snapshots:
        """Writable layers of instances."""
        from hutch.storage.snapshots import Snapshots

        return Snapshots(self.root, self.store, layers=self.layers, trash=self.trash)

    @cached_property
    def volumes(self) -> Volumes:
        """Named and anonymous volumes."""
        from functools import partial

        from hutch.engine.disk_room import admit_promise
        from hutch.storage.volumes import Volumes

        return Volumes(self.root, self.store, admit=partial(admit_promise, self))

    @cached_property
    def memory_pool(self) -> MemoryPool:
        """Memory made ahead for machines."""
        from hutch.resources.memory_pool import MemoryPool

        return MemoryPool(self.root)

    @cached_property
    def images(self) -> ImageCatalog:
        """The images of the root."""
        from hutch.image.catalog import Images

        return Images(self.store, users=_image_users)

    @cached_property
    def networks(self) -> Networks:
        """Networks and the endpoints of instances."""
        from hutch.network import Networks

        return Networks(self.root, self.store)

    @cached_property
    def trash(self) -> Trash:
        """What is deleted in the background."""
        from hutch.storage.trash import Trash

        if not self.rootless:
            return Trash(self.root)
        from hutch.drivers.container.own_ids import remove_trees

        return Trash(self.root, remove_foreign=remove_trees)

    @cached_property
    def groups(self) -> InstanceGroups:
        """The control groups of instances."""
        from hutch.resources.groups import InstanceGroups

        return InstanceGroups(self.root)

    @cached_property
    def collector(self) -> Collector:
        """Garbage collection of blobs, layers and root disks."""
        from hutch.engine.builder.cache import cache_roots
        from hutch.engine.saved import snapshot_roots
        from hutch.image.catalog import image_roots
        from hutch.storage.gc import Collector

        return Collector(
            self.store,
            self.content,
            self.layers,
            self.trash,
            image_roots,
            snapshot_roots,
            cache_roots,
            disks=self.rootdisks,
        )

    @cached_property
    def registry(self) -> RegistryConfig:
        """How registries are reached; a daemon's configuration may replace it."""
        return self.read_registry()

    def read_registry(self) -> RegistryConfig:
        """Return what this engine was given, else what the files say now."""
        if self._registry is not None:
            return self._registry
        from hutch.image.registry_config import load_registry_config

        return load_registry_config(
            Path("/etc/hutch/registries.json"), self.root / "registries.json"
        )

    @cached_property
    def containers(self) -> Driver:
        """The driver of containers."""
        from hutch.drivers.container.driver import ContainerDriver

        return ContainerDriver(self.root, self.launcher)

    @cached_property
    def machines(self) -> VmDriver:
        """The driver of virtual machines."""
        from hutch.drivers.vm.driver import VmDriver

        return VmDriver(self.root, self.launcher, self.kernels)

    def driver(self, isolation: str) -> Driver:
        """Return the driver for a kind of instance."""
        return self.machines if isolation == "vm" else self.containers

    def directory(self, identifier: str) -> Path:
        """Return an instance's own directory."""
        return self._instances / identifier

    def exit_command(self, identifier: str) -> tuple[str, ...]:
        """Return the command a supervisor runs when nobody is left to hear of the exit."""
        return (
            sys.executable or "/usr/bin/python3",
            "-m",
            "hutch",
            "--root",
            str(self.root),
            "_exited",
            identifier,
        )


def _image_users(transaction: Transaction, image_id: str) -> Iterator[ImageUser]:
    from hutch.engine.images import image_users

    return image_users(transaction, image_id)


def _storage_error(path: Path, exc: OSError) -> Exception:
    import errno

    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return Exhausted(f"{path}: {exc.strerror}", hint="free disk space and retry")
    return Unavailable(
        f"{path}: {exc.strerror}", hint="name a writable directory with --root or HUTCH_ROOT"
    )
