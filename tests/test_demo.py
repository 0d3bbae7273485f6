"""What `make demo` runs in instances, in an image that has nothing but a shell."""

from __future__ import annotations

from pathlib import Path

from hutch.process.run import run_command
from scripts.demo import TELL
from tests.requires import requires


@requires("root", "busybox")
def test_an_image_without_a_release_file_tells_its_kernel(busybox_rootfs: Path) -> None:
    done = run_command(["chroot", str(busybox_rootfs), "/bin/sh", "-c", TELL])
    assert done.returncode == 0 and done.stdout.startswith(b"busybox on Linux ")
