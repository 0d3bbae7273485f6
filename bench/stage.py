"""What all cases share: a private stage (namespaces, directories), one image, the engine.

The whole bench runs in network and mount namespaces made here, so that the bridges and
rules of hutch, docker and podman end with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["IMAGE", "Stage", "enter_namespaces", "is_inside", "stage"]

IMAGE = "bench"
_INSIDE = "HUTCH_BENCH_INSIDE"
_CGROUPS_LEFT = ("docker", "libpod_parent")


def is_inside() -> bool:
    """Tell whether this program runs in the namespaces already."""
    return os.environ.get(_INSIDE) == "1"


def enter_namespaces() -> None:
    """Start this program again in namespaces of its own, unless it is there already."""
    if is_inside():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    os.environ[_INSIDE] = "1"
    arguments = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable]
    os.execvp("unshare", [*arguments, "-m", "bench.run", *sys.argv[1:]])


class Stage:
    """Directories of one run and the root file system that every peer runs."""

    def __init__(self, directory: Path) -> None:
        from hutch.image.busybox import busybox_program, write_busybox_tar

        self.directory = directory
        self.tar = directory / "busybox.tar"
        with open(self.tar, "wb") as tar:
            write_busybox_tar(tar, busybox_program(directory), mtime=0)
        self.rootfs = directory / "rootfs"
        self.rootfs.mkdir()
        subprocess.run(["tar", "-xf", str(self.tar), "-C", str(self.rootfs)], check=True)
        self._count = 0

    def name(self) -> str:
        """Return a container name that was not used before."""
        self._count += 1
        return f"bench-{os.getpid()}-{self._count}"

    @contextmanager
    def engine(self) -> Iterator[Any]:
        """An engine on a root of the bench's own that holds the image; empty at the end."""
        import hutch

        with hutch.Engine(self.directory / "hutch") as engine:
            engine.images.import_(str(self.tar), IMAGE)
            try:
                yield engine
            finally:
                for info in engine.list(all=True):
                    engine.get(info.id).remove(force=True, volumes=True)


@contextmanager
def stage() -> Iterator[Stage]:
    """Make the stage; remove what the bench and its peers leave."""
    directory = Path(tempfile.mkdtemp(prefix="hutch-bench-"))
    directory.chmod(0o755)
    try:
        yield Stage(directory)
    finally:
        with open("/proc/self/mountinfo") as table:
            points = [line.split()[4] for line in table if str(directory) in line.split()[4]]
        for point in reversed(points):
            subprocess.run(["umount", "-l", point], stderr=subprocess.DEVNULL)
        shutil.rmtree(directory, ignore_errors=True)
        _remove_cgroups()


def _remove_cgroups() -> None:
    for hierarchy in Path("/sys/fs/cgroup").iterdir():
        for name in _CGROUPS_LEFT:
            top = hierarchy / name
            groups = sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True)
            for group in [*groups, top]:
                try:
                    group.rmdir()
                except OSError:
                    continue
