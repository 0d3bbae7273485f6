"""A stopped instance's root, mounted for a moment: on kernels of both kinds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.linux import mount
from hutch.storage.merged import open_merged
from hutch.storage.snapshots import OverlayAssets
from tests.requires import requires

pytestmark = [requires("root", "overlayfs"), pytest.mark.integration]


@pytest.fixture
def assets(tmp_path: Path) -> OverlayAssets:
    lower = tuple(str(tmp_path / f"{'deep' * 40}/{n}") for n in range(3))
    for number, path in enumerate(lower):
        os.makedirs(path)
        Path(path, f"f{number}").write_text(str(number))
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    return OverlayAssets(lower=lower, upper=str(tmp_path / "upper"), work=str(tmp_path / "work"))


@pytest.mark.parametrize("takes_layers", [True, False])
@pytest.mark.parametrize("read_only", [True, False])
def test_all_layers_are_seen_and_written_only_when_asked(
    assets: OverlayAssets, monkeypatch: pytest.MonkeyPatch, takes_layers: bool, read_only: bool
) -> None:
    if not takes_layers:  # the test in a guest runs on a kernel that says so itself
        monkeypatch.setattr(mount, "overlay_takes_layers", lambda fd: False)
    fd = open_merged(assets, read_only=read_only)
    try:
        directory = os.open(".", os.O_RDONLY, dir_fd=fd)
        assert sorted(os.listdir(directory)) == ["f0", "f1", "f2"]
        os.close(directory)
        assert bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY) == read_only
        if not read_only:
            os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    finally:
        os.close(fd)
    assert os.listdir(assets.upper) == ([] if read_only else ["new"])
    assert os.path.dirname(assets.upper) not in Path("/proc/self/mountinfo").read_text()


def test_a_stack_too_high_for_an_old_kernel_is_told(
    assets: OverlayAssets, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hutch.errors import Unsupported

    monkeypatch.setattr(mount, "overlay_takes_layers", lambda fd: False)
    many = OverlayAssets(lower=assets.lower * 100, upper=assets.upper, work=assets.work)
    with pytest.raises(Unsupported, match="301 layers"):
        open_merged(many)
