"""The guest kernels of one root: `<root>/kernels/<id>/`, made whole or not at all.

A kernel's directory holds `vmlinux`, what it was taken from (`vmlinuz`), `modules/NAME.ko`
and the initramfs files made for it; what is in it is recorded in the store. Its identifier is
the digest of its content.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hutch.drivers.vm.modules import BOOT, LATE, Modules
from hutch.errors import Busy, IntegrityError, InvalidArgument, NotFound, Unsupported
from hutch.records import Progress, ProgressEvent, Records, Transaction, silent
from hutch.storage.faults import disk_errors
from hutch.storage.trash import Trash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["KERNELS", "KERNEL_USES", "KernelRecord", "KernelUse", "Kernels"]

KERNELS = "kernels"
KERNEL_USES = "kernel_uses"
_LIMIT = 512 << 20


class KernelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A guest kernel. `boot` and `late` are its modules in the order of loading: those that
    the agent's channel needs, and those that may be loaded through it. `source` is the
    package with its version, or the file that it came from."""

    id: str
    release: str
    source: str
    vmlinux_sha256: str
    size: int
    boot: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    added_at: float = 0.0


class KernelUse(msgspec.Struct, frozen=True, kw_only=True):
    """That an instance or a template stands on a kernel."""

    kernel_id: str


# A method named `list` hides the type from the annotations after it.
KernelRecords = list[KernelRecord]


class Kernels:
    """The kernels of one root; thread-safe, shared with other processes."""

    def __init__(self, root: str | Path, records: Records, *, trash: Trash | None = None) -> None:
        self._root = Path(root)
        self._directory = self._root / "kernels"
        self._records = records
        self._trash = trash or Trash(root)

    # ---- asking -----------------------------------------------------------------------

    def directory(self, kernel_id: str) -> Path:
        """Return a kernel's own directory."""
        return self._directory / kernel_id

    def vmlinux(self, kernel: KernelRecord) -> Path:
        """Return the ELF file that QEMU boots."""
        return self.directory(kernel.id) / "vmlinux"

    def vmlinuz(self, kernel: KernelRecord) -> Path:
        """Return the file that the distribution ships, which brings its own loader.

        Raises `Unsupported` where the kernel was added without it.
        """
        path = self.directory(kernel.id) / "vmlinuz"
        if not path.exists():
            raise Unsupported(
                f"kernel {kernel.release}: was added without its vmlinuz",
                hint=f"hutch vm kernel rm {kernel.id[:12]}, then add it again from its package",
            )
        return path

    def module(self, kernel: KernelRecord, name: str) -> Path:
        """Return the file of one of the kernel's modules."""
        return self.directory(kernel.id) / "modules" / f"{name}.ko"

    def list(self) -> KernelRecords:
        """Return the kernels, the one added last first."""
        with self._records.read() as transaction:
            return _all(transaction)

    def get(self, name: str | None = None) -> KernelRecord:
        """Return a kernel by release, package, identifier or the beginning of it.

        Of several with one name, and without a name, it is the one added last.
        """
        with self._records.read() as transaction:
            return _require(transaction, name)

    def users(self, kernel_id: str) -> tuple[str, ...]:
        """Return who stands on a kernel, as noted by `note`."""
        with self._records.read() as transaction:
            return _users(transaction, kernel_id)

    # ---- being used -------------------------------------------------------------------

    def note(self, transaction: Transaction, user: str, name: str | None = None) -> KernelRecord:
        """Record that `user` (an instance's identifier, a template's key) stands on a
        kernel, chosen as by `get`, which then is not removed; return it."""
        record = _require(transaction, name)
        transaction.put(KERNEL_USES, user, KernelUse(kernel_id=record.id))
        return record

    @staticmethod
    def forget(transaction: Transaction, user: str) -> None:
        """Remove the record of what `user` stands on; none is fine."""
        transaction.delete(KERNEL_USES, user)

    # ---- adding -----------------------------------------------------------------------

    def add_package(
        self, package: str | None = None, *, progress: Progress = silent
    ) -> KernelRecord:
        """Add the kernel of a Debian package, fetched by the host's apt: Debian's newest
        kernel for virtual machines, or the named `linux-image-…`.

        A package that is here already in this version is not fetched again.
        """
        from hutch.drivers.vm.kernel_packages import fetch_kernel, find_package

        found = find_package(package)
        source = f"{found.name} {found.version}"
        with self._workspace(source) as workspace:
            for record in self.list():
                if record.source == source:
                    progress(ProgressEvent(item=found.name, phase="already here"))
                    return self._store(record, source)
            with fetch_kernel(found, workspace, progress=progress) as (image, modules):
                return self._add(image, modules, source, workspace, progress)

    def add_file(
        self, kernel: str | Path, modules: str | Path, *, progress: Progress = silent
    ) -> KernelRecord:
        """Add a kernel of one's own: its vmlinuz or vmlinux, and the directory
        (`/lib/modules/VERSION`) that has its modules."""
        source = os.path.abspath(kernel)
        try:
            with open(source, "rb") as file:
                image = file.read(_LIMIT)
        except OSError as exc:
            raise InvalidArgument(f"{source}: {exc.strerror}", field="file") from exc
        found = Modules.from_directory(Path(modules))
        with self._workspace(source) as workspace:
            return self._add(image, found, source, workspace, progress)

    def add_content(self, kernel: KernelRecord, parts: Mapping[str, bytes]) -> KernelRecord:
        """Add a kernel that another root had: `parts` are `vmlinux` and its modules by name.

        Raises `IntegrityError` where they are not what its identifier stands for.
        """
        try:
            vmlinux = parts["vmlinux"]
            boot = {name: parts[name] for name in kernel.boot}
            late = {name: parts[name] for name in kernel.late}
        except KeyError as exc:
            raise IntegrityError(f"kernel {kernel.release}: {exc.args[0]} is missing") from None
        if _identifier(vmlinux, boot, late) != kernel.id:
            raise IntegrityError(f"kernel {kernel.release}: is not what its identifier says")
        with self._workspace(kernel.source) as workspace:
            new = self._lay_out(workspace, b"", vmlinux, boot | late)
            return self._store(kernel, kernel.source, new)

    def _lay_out(
        self, workspace: Path, image: bytes, vmlinux: bytes, modules: Mapping[str, bytes]
    ) -> Path:
        """Write a kernel's directory into the workspace, safe on the disk."""
        new = workspace / "kernel"
        (new / "modules").mkdir(parents=True, mode=0o700)
        _write(new / "vmlinux", vmlinux)
        if image and image != vmlinux:
            _write(new / "vmlinuz", image)
        for name, content in modules.items():
            _write(new / "modules" / f"{name}.ko", content)
        _sync_directory(new / "modules")
        _sync_directory(new)
        return new

    @contextmanager
    def _workspace(self, source: str) -> Iterator[Path]:
        """Yield an empty directory; who adds from the same source waits meanwhile."""
        from hutch.oci.digest import digest_of
        from hutch.storage.locking import file_lock

        key = digest_of(source.encode()).removeprefix("sha256:")[:24]
        path = self._directory / f".{key}.tmp"
        with disk_errors(f"kernel {source}"):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with file_lock(str(self._directory / f".{key}.lock")):
                self._trash.discard(str(path))
                path.mkdir(mode=0o700)
                try:
                    yield path
                finally:
                    self._trash.discard(str(path))

    def _add(
        self, image: bytes, modules: Modules, source: str, workspace: Path, progress: Progress
    ) -> KernelRecord:
        from hutch.drivers.vm.vmlinux import extract_vmlinux, release_of

        vmlinux = extract_vmlinux(image)
        modules.check()
        boot = modules.order(BOOT)
        late = modules.order(LATE, known=tuple(boot))
        release = release_of(vmlinux) or "unknown"
        progress(ProgressEvent(item=release, phase="storing"))
        new = self._lay_out(workspace, image, vmlinux, boot | late)
        record = KernelRecord(
            id=_identifier(vmlinux, boot, late),
            release=release,
            source=source,
            vmlinux_sha256=_sha256(vmlinux),
            size=len(vmlinux) + sum(map(len, (boot | late).values())),
            boot=tuple(boot),
            late=tuple(late),
        )
        return self._store(record, source, new)

    def _store(self, record: KernelRecord, source: str, new: Path | None = None) -> KernelRecord:
        """Give a kernel its name and its record, newest of all, in one transaction.

        Removing one happens in such a transaction too, so that the two never cross.
        """
        kept = msgspec.structs.replace(record, source=source, added_at=time.time())
        target = self.directory(record.id)
        with self._records.write(durable=True) as transaction:
            if new is None and transaction.get(KERNELS, record.id, KernelRecord) is None:
                raise Busy(f"kernel {record.release}: removed meanwhile", hint="add it once more")
            if new is not None and not target.exists():
                os.rename(new, target)
                _sync_directory(self._directory)
            transaction.put(KERNELS, record.id, kept)
            transaction.event("kernel", "add", record.id, name=record.release)
        return kept

    # ---- removing ---------------------------------------------------------------------

    def remove(self, name: str) -> KernelRecord:
        """Remove a kernel; raise `Busy` while an instance or a template stands on it."""
        with self._records.write(durable=True) as transaction:
            record = _require(transaction, name)
            users = _users(transaction, record.id)
            if users:
                raise Busy(
                    f"kernel {record.release}: in use by {', '.join(u[:12] for u in users[:3])}"
                    + (f" and {len(users) - 3} more" if len(users) > 3 else ""),
                    hint="remove the instances that use it first",
                )
            self._delete(transaction, record)
        return record

    def prune(self) -> KernelRecords:
        """Remove the kernels that nothing uses, but the one added last; return them."""
        with self._records.write(durable=True) as transaction:
            idle = [k for k in _all(transaction)[1:] if not _users(transaction, k.id)]
            for record in idle:
                self._delete(transaction, record)
        return idle

    def _delete(self, transaction: Transaction, record: KernelRecord) -> None:
        transaction.delete(KERNELS, record.id)
        transaction.event("kernel", "remove", record.id, name=record.release)
        self._trash.discard(str(self.directory(record.id)))

    def reconcile(self) -> Sequence[str]:
        """Put records and directories right after a crash; return the identifiers that
        went: kernels without a record, records without a kernel, work left unfinished."""
        from hutch.storage.locking import try_file_lock

        gone: list[str] = []
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            names = []
        for name in names:
            if name.startswith(".") and name.endswith(".tmp"):
                with try_file_lock(str(self._directory / f"{name[:-4]}.lock")) as mine:
                    if mine:
                        self._trash.discard(str(self._directory / name))
        with self._records.write() as transaction:
            known = {record.id for record in _all(transaction)}
            for name in names:
                if not name.startswith(".") and name not in known:
                    self._trash.discard(str(self._directory / name))
                    gone.append(name)
            for name in known:
                if not (self.directory(name) / "vmlinux").exists():
                    transaction.delete(KERNELS, name)
                    gone.append(name)
        return gone


def _all(transaction: Transaction) -> KernelRecords:
    found = [record for _, record in transaction.items(KERNELS, KernelRecord)]
    return sorted(found, key=lambda record: (record.added_at, record.id), reverse=True)


def _require(transaction: Transaction, name: str | None) -> KernelRecord:
    known = _all(transaction)
    if name is None:
        if known:
            return known[0]
        raise NotFound("no guest kernel here", hint="hutch vm kernel add")
    for record in known:
        if name in (record.id, record.release, record.source.split(" ")[0]):
            return record
    matches = [k for k in known if len(name) >= 4 and k.id.startswith(name)]
    if len(matches) > 1:
        raise InvalidArgument(
            f"kernel {name}: is the beginning of {len(matches)} identifiers",
            hint="give more digits",
        )
    if not matches:
        raise NotFound(f"kernel {name}: not found", hint="hutch vm kernel ls")
    return matches[0]


def _users(transaction: Transaction, kernel_id: str) -> tuple[str, ...]:
    uses = transaction.items(KERNEL_USES, KernelUse)
    return tuple(user for user, use in uses if use.kernel_id == kernel_id)


def _identifier(vmlinux: bytes, boot: dict[str, bytes], late: dict[str, bytes]) -> str:
    parts = [_sha256(vmlinux)]
    for group in (boot, late):
        parts += [f"{name} {_sha256(content)}" for name, content in group.items()]
        parts.append("")
    return _sha256("\n".join(parts).encode())


def _sha256(data: bytes) -> str:
    from hutch.oci.digest import digest_of

    return digest_of(data).removeprefix("sha256:")


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
