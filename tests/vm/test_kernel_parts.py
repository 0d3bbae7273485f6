"""A kernel whose image, modules and lists come in packages of their own, as Debian's do now."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from hutch.drivers.vm.kernel_packages import fetch_kernel, find_package
from hutch.image.apt import Source
from hutch.process.run import run_command
from scripts.debian import environment
from tests.requires import requires

RELEASE = "7.1.2+deb14-cloud-amd64"
VERSION = "7.1.2-1"
DIRECTORY = f"usr/lib/modules/{RELEASE}"
FILES = {
    f"linux-base-{RELEASE}": {f"{DIRECTORY}/modules.builtin": b"kernel/fs/ext4/ext4.ko\n"},
    f"linux-binary-{RELEASE}": {f"{DIRECTORY}/vmlinuz": b"the kernel"},
    f"linux-modules-{RELEASE}": {f"{DIRECTORY}/kernel/drivers/net/virtio_net.ko": b"a module"},
    f"linux-image-{RELEASE}": {f"usr/share/doc/linux-image-{RELEASE}/copyright": b"see there"},
    "linux-image-cloud-amd64": {"usr/share/doc/linux-image-cloud-amd64/copyright": b"see there"},
}
DEPENDS = {
    "linux-image-cloud-amd64": f"linux-base-cloud-amd64 (= {VERSION}), linux-image-{RELEASE} "
    f"(= {VERSION})",
    f"linux-image-{RELEASE}": "dracut | linux-initramfs-tool, "
    + ", ".join(f"{name} (= {VERSION})" for name in list(FILES)[:3]),
}


def _archive(directory: Path) -> None:
    """Make an archive of packages as apt reads it."""
    index = []
    for name, files in FILES.items():
        tree = directory / name
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(content)
        fields = (
            f"Package: {name}\nVersion: {VERSION}\nArchitecture: amd64\nMaintainer: a <a@b.c>\n"
            f"Depends: {DEPENDS.get(name, 'libc6')}\nDescription: a part of a kernel\n"
        )
        (tree / "DEBIAN").mkdir()
        (tree / "DEBIAN/control").write_text(fields)
        deb = directory / f"{name}.deb"
        done = run_command(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(deb)])
        assert done.returncode == 0, done.stderr
        shutil.rmtree(tree)
        content = deb.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        index.append(f"{fields}Filename: ./{deb.name}\nSize: {len(content)}\nSHA256: {digest}\n")
    (directory / "Packages").write_text("\n".join(index))


@requires("apt-mirror")
def test_a_kernel_in_parts_is_fetched_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, workspace = tmp_path / "archive", tmp_path / "workspace"
    archive.mkdir()
    workspace.mkdir()
    _archive(archive)
    here = Source(uri=f"file:{archive}", suites=("./",), components=(), trusted=True)
    variables = environment(here, tmp_path / "apt")
    monkeypatch.setenv("APT_CONFIG", variables["APT_CONFIG"])

    found = find_package()
    assert found.name == f"linux-image-{RELEASE}" and found.parts == tuple(FILES)[:3]
    with fetch_kernel(found, workspace) as (image, modules):
        assert image == b"the kernel"
        assert modules.content("virtio_net") == b"a module"
        assert modules.builtin == {"ext4"}
