"""What an ordinary user gets: the same trees, marked as his kernel wants them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hutch.errors import Unavailable
from hutch.storage.layers import Layers
from hutch.storage.tarwrite import header
from tests.requires import requires
from tests.storage.tars import directory, end, file

IN_NAMESPACE = """
import io, os, sys
from hutch.storage.layers import Layers
from hutch.storage.merged import open_merged
from hutch.storage.snapshots import OverlayAssets
from hutch.storage import tree
layers = Layers(sys.argv[1])
low = layers.unpack(open(sys.argv[2], "rb"))
high = layers.unpack(open(sys.argv[3], "rb"), parent_chain_id=low.chain_id)
upper, work = sys.argv[1] + "/upper", sys.argv[1] + "/work"
os.mkdir(upper), os.mkdir(work)
chain = [low.chain_id, high.chain_id]
fd = open_merged(OverlayAssets(lower=layers.lower(chain), upper=upper, work=work))
print([entry.name for entry in tree.list_directory(fd, "/")])
print([entry.name for entry in tree.list_directory(fd, "/dir")])
"""


@requires("root", "userns", "overlayfs")
@pytest.mark.integration
def test_root_of_a_user_namespace_unpacks_and_mounts(tmp_path: Path) -> None:
    low = directory("dir") + file("dir/old", uid=4) + file("gone") + header(b"tty", b"3") + end()
    high = file("dir/.wh..wh..opq") + file("dir/new") + file(".wh.gone") + end()
    (tmp_path / "low").write_bytes(low)
    (tmp_path / "high").write_bytes(high)
    arguments = [str(tmp_path / "root"), str(tmp_path / "low"), str(tmp_path / "high")]
    done = subprocess.run(
        ["unshare", "-U", "-r", "-m", sys.executable, "-c", IN_NAMESPACE, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['dir']\n['new']\n"


def test_a_broken_source_is_not_the_disks_fault(hutch_root: Path) -> None:
    class Broken:
        def read(self, size: int, /) -> bytes:
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(Unavailable, match="connection reset"):
        Layers(hutch_root).unpack(Broken())
    assert os.listdir(hutch_root / "layers") == []
