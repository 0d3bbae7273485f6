"""Guest kernels of an engine: what its virtual machines boot."""

from __future__ import annotations

import time
from pathlib import Path

from hutch.drivers.vm.kernels import KernelRecord
from hutch.engine.context import Context
from hutch.errors import InvalidArgument
from hutch.records import Progress, silent

__all__ = ["Kernels"]

# A method named `list` hides the type from the annotations after it.
KernelRecords = list[KernelRecord]


class Kernels:
    """The guest kernels of one root."""

    def __init__(self, context: Context) -> None:
        self._kernels = context.kernels

    def add(
        self,
        package: str | None = None,
        *,
        file: str | Path | None = None,
        modules: str | Path | None = None,
        progress: Progress = silent,
    ) -> KernelRecord:
        """Add a kernel: Debian's newest for virtual machines, that of a package
        (`linux-image-…`), or a `file` (vmlinuz or vmlinux) with the directory of its
        `modules`. It becomes the one that virtual machines get where none is named."""
        if file is None:
            if modules is not None:
                raise InvalidArgument("goes with a file", field="modules")
            return self._kernels.add_package(package, progress=progress)
        if package is not None:
            raise InvalidArgument("give a package or a file, not both", field="package")
        if modules is None:
            raise InvalidArgument(
                "a kernel of one's own needs its modules",
                field="modules",
                hint="the directory /lib/modules/VERSION of that kernel",
            )
        return self._kernels.add_file(file, modules, progress=progress)

    def get(self, name: str | None = None) -> KernelRecord:
        """Return a kernel by release, package or the beginning of its identifier; without a
        name the one added last."""
        return self._kernels.get(name)

    def list(self) -> KernelRecords:
        """Return the kernels, the one added last first."""
        return self._kernels.list()

    def users(self, name: str) -> tuple[str, ...]:
        """Return the identifiers of what uses a kernel."""
        return self._kernels.users(self._kernels.get(name).id)

    def remove(self, name: str) -> KernelRecord:
        """Remove a kernel; raise `Busy` while an instance uses it."""
        return self._kernels.remove(name)

    def prune(self) -> KernelRecords:
        """Remove the kernels that nothing uses, but the one added last; return them."""
        from hutch.drivers.vm.initramfs import trim

        removed = self._kernels.prune()
        trim(self._kernels, now=time.time())
        return removed
