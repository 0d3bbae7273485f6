"""What an instance changed: as a list, as a layer, and the whole as a tar."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hutch.storage.changes import changes
from hutch.storage.layers import Layers
from hutch.storage.overlay import Merged
from hutch.storage.pack import pack_diff, pack_merged
from tests.requires import requires
from tests.storage.tars import unpack_bytes
from tests.storage.test_unpack import describe, make_everything

pytestmark = [requires("root", "overlayfs"), pytest.mark.integration]


class Box:
    """Two layers, an upper directory, and the overlay of them, really mounted."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.low, self.high = base / "low", base / "high"
        self.upper, self.work, self.merged = base / "upper", base / "work", base / "merged"
        for path in (self.low, self.high, self.upper, self.work, self.merged):
            path.mkdir()
        self.lower = (str(self.high), str(self.low))

    def mount(self) -> None:
        options = f"lowerdir={self.high}:{self.low},upperdir={self.upper},workdir={self.work}"
        subprocess.run(["mount", "-t", "overlay", "o", "-o", options, self.merged], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", self.merged], check=True)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    for name in ("etc/passwd", "etc/sub/deep", "var/cache/a", "var/cache/b", "home/x/y/z"):
        (box.low / name).parent.mkdir(parents=True, exist_ok=True)
        (box.low / name).write_text(f"low {name}")
    (box.low / "tmp").mkdir()
    (box.low / "tmp").chmod(0o1777)
    (box.high / "etc").mkdir()
    (box.high / "etc/new-in-high").write_text("high")
    os.mknod(box.high / "var", stat.S_IFCHR, 0)
    box.mount()
    yield box
    box.unmount()


def _anew(merged: Path) -> None:
    shutil.rmtree(merged / "home")
    (merged / "home").mkdir()
    (merged / "home/q").touch()


def _file_for_directory(merged: Path) -> None:
    shutil.rmtree(merged / "home/x")
    (merged / "home/x").write_text("f")


CASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda m: None, []),
    "added": (lambda m: (m / "new").write_text("1"), ["A /new"]),
    "changed": (lambda m: (m / "etc/passwd").write_text("2"), ["C /etc", "C /etc/passwd"]),
    "of the upper layer": (
        lambda m: (m / "etc/new-in-high").unlink(),
        ["C /etc", "D /etc/new-in-high"],
    ),
    "deleted": (lambda m: (m / "etc/passwd").unlink(), ["C /etc", "D /etc/passwd"]),
    "tree deleted": (lambda m: shutil.rmtree(m / "home"), ["D /home"]),
    "deleted and made anew": (
        _anew,
        ["C /home", "D /home/x", "A /home/q"],
    ),
    "deleted below already": (lambda m: (m / "var").mkdir(), ["A /var"]),
    "mode": (
        lambda m: (m / "etc/sub/deep").chmod(0o600),
        ["C /etc", "C /etc/sub", "C /etc/sub/deep"],
    ),
    "file for a directory": (
        _file_for_directory,
        ["C /home", "C /home/x"],
    ),
    "in a sticky directory": (lambda m: (m / "tmp/t").touch(), ["C /tmp", "A /tmp/t"]),
}


@pytest.mark.parametrize("case", CASES)
def test_changes_are_told_as_docker_tells_them(case: str, box: Box) -> None:
    act, expected = CASES[case]
    act(box.merged)
    found = [f"{change.kind} {change.path}" for change in changes(str(box.upper), box.lower)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("case", CASES)
def test_the_layer_of_the_changes_gives_the_same_tree(case: str, box: Box) -> None:
    CASES[case][0](box.merged)
    expected = describe(box.merged)
    layer = b"".join(pack_diff(str(box.upper)))
    assert layer == b"".join(pack_diff(str(box.upper)))
    layers = Layers(box.base / "root")
    unpacked = layers.unpack(io.BytesIO(layer))
    mounted = box.base / "again"
    mounted.mkdir()
    options = f"lowerdir={layers.path(unpacked.chain_id)}:{box.high}:{box.low}"
    subprocess.run(["mount", "-t", "overlay", "o", "-o", options, mounted], check=True)
    try:
        assert describe(mounted) == expected
    finally:
        subprocess.run(["umount", mounted], check=True)


@pytest.mark.parametrize("case", CASES)
def test_the_merged_view_is_what_the_kernel_shows(case: str, box: Box) -> None:
    CASES[case][0](box.merged)
    with Merged((str(box.upper), *box.lower)) as merged:
        data = b"".join(pack_merged(merged))
    unpack_bytes(data, box.base / "out")
    assert describe(box.base / "out") == describe(box.merged)


def test_skipped_paths_are_left_out(box: Box) -> None:
    (box.merged / "dev").mkdir()
    (box.merged / "dev/console").touch()
    (box.merged / "kept").touch()
    skip = frozenset((b"dev",))
    assert [c.path for c in changes(str(box.upper), box.lower, skip=skip)] == ["/kept"]
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack_diff(str(box.upper), skip=skip)))) as tar:
        assert tar.getnames() == ["kept"]
    with Merged((str(box.upper), *box.lower)) as merged:
        data = b"".join(pack_merged(merged, skip=lambda name: name == b"dev"))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert "dev" not in tar.getnames() and "dev/console" not in tar.getnames()
        assert "kept" in tar.getnames()


def test_everything_survives_being_packed(tmp_path: Path) -> None:
    make_everything(tmp_path / "in")
    expected = describe(tmp_path / "in")
    data = b"".join(pack_diff(str(tmp_path / "in")))
    assert len(data) < 1 << 20
    unpack_bytes(data, tmp_path / "out")
    # Times are kept to the second.
    assert describe(tmp_path / "out") == expected
    (tmp_path / "gnu").mkdir()
    subprocess.run(
        ["tar", "-x", "--xattrs", "--xattrs-include=*", "-C", tmp_path / "gnu"],
        input=data,
        check=True,
    )
    assert describe(tmp_path / "gnu") == expected


def test_a_resolved_path_stays_in_the_stack(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "out").symlink_to("/../../../a")
    (root / "loop").symlink_to("loop")
    from hutch.errors import NotFound

    with Merged([str(root)]) as merged:
        assert merged.resolve(b"/out/b")[0] == b"a/b"
        assert merged.resolve(b"../../out/../a")[0] == b"a"
        for path in (b"/loop", b"/a/b/c", b"/out/none"):
            with pytest.raises(NotFound):
                merged.resolve(path)
