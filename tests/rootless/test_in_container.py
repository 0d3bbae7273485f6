"""Root in an unprivileged container, as container engines make them: machines work there."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import hutch
from tests.hosttree import host_tree
from tests.requires import requires
from tests.rootless.conftest import system_python

pytestmark = [
    requires("root", "overlayfs", "seccomp", "qemu", "mkfs.erofs", "mke2fs", "busybox"),
    requires("apt-mirror"),
    pytest.mark.integration,
    pytest.mark.skipif(not os.path.islink("/lib"), reason="the host's /lib is no part of /usr"),
    pytest.mark.skipif(
        sys.version_info[:2] != system_python(), reason="the modules are for another Python"
    ),
]

SCRIPT = """
hutch() { python3 -m hutch "$@"; }
hutch image bootstrap -q busybox
hutch vm kernel add -q --file /kernel/vmlinux --modules /kernel/modules
hutch run --rm --network none busybox true
echo "container: $?"
hutch run -d --name box --isolation auto --no-template busybox sleep 1000 || exit 1
hutch exec box ip address show eth0
for status in /proc/[0-9]*/status; do
    grep -q qemu-system $status && grep -E '^(Uid|CapBnd|Seccomp):' $status
done
hutch rm -f box
hutch image bootstrap debian:bookworm
hutch network create lab && hutch network rm lab || exit 2
hutch run --rm busybox true
hutch system reset -f || exit 3
"""


@pytest.mark.timeout(300)
def test_a_machine_runs_in_a_container_without_rights(hutch_root: Path, tmp_path: Path) -> None:
    (tmp_path / "host.tar").write_bytes(host_tree())
    libraries = [Path(module.__file__ or "").parent for module in _imported()]
    with hutch.Engine(hutch_root) as engine:
        with open(tmp_path / "host.tar", "rb") as archive:
            engine.images.import_(archive, "host:1")
        kernel = _own_kernel(hutch_root / "kernels" / engine.kernels.add().id, tmp_path / "kernel")
        done = engine.run(
            "host:1",
            ["sh", "-c", SCRIPT],
            network="none",
            env={"PYTHONPATH": "/opt", "HUTCH_ROOT": "/var/lib/hutch", "PATH": os.environ["PATH"]},
            volumes=[
                "/usr:/usr:ro",
                f"{kernel}:/kernel:ro",
                *(f"{library}:/opt/{library.name}:ro" for library in libraries),
            ],
        )
    assert done.exit_code == 0, done.stderr
    text = done.text
    assert "container: 125" in text and b"this host refuses containers" in done.stderr
    assert "10.0.2.15" in text
    words = text.split()
    assert int(words[words.index("Uid:") + 1]) > 1 << 30
    assert int(words[words.index("CapBnd:") + 1], 16) == 0
    assert words[words.index("Seccomp:") + 1] == "2"
    assert b"lets this user make no namespaces" in done.stderr
    # libnftables' own words, past every error of ours
    assert b"you must be root" not in done.stderr


def _own_kernel(kept: Path, directory: Path) -> Path:
    """Return the parts of a kernel as a user has them: what is no module is built in."""
    shutil.copytree(kept / "modules", directory / "modules")
    shutil.copy(kept / "vmlinux", directory)
    needed = ("virtio_pci", "virtio_console", "virtio_blk", "overlay", "erofs", "ext4")
    there = {path.name.partition(".")[0].replace("-", "_") for path in directory.rglob("*.ko*")}
    lines = "".join(f"kernel/{name}.ko\n" for name in needed if name not in there)
    (directory / "modules" / "modules.builtin").write_text(lines)
    return directory


def _imported() -> list[ModuleType]:
    return [import_module(n) for n in ("hutch", "msgspec", "isal", "zstandard", "urllib3")]
