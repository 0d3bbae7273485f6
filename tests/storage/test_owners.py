"""Owners in remapped instances: out as seen inside, in as the host has them."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from hutch.errors import HutchError
from hutch.linux.idmap import IdMapping, IdRange
from hutch.storage import tree
from hutch.storage.overlay import Merged
from hutch.storage.owners import Owners
from hutch.storage.pack import pack_diff, pack_merged
from tests.requires import requires
from tests.storage.tars import end, file

RANGE = (IdRange(inside=0, outside=1_000_000, size=65_536),)
MAPPING = IdMapping(uids=RANGE, gids=RANGE)

pytestmark = requires("root")


def owners_in(data: bytes) -> dict[str, tuple[int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: (member.uid, member.gid) for member in archive}


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    upper = tmp_path / "upper"
    upper.mkdir()
    (upper / "written").touch()
    os.chown(upper / "written", 1_000_033, 1_000_000)
    (upper / "plain").touch()
    os.chown(upper / "plain", 7, 8)
    return upper


def test_a_layer_and_an_export_have_the_ids_seen_inside(upper: Path) -> None:
    expected = {"written": (33, 0), "plain": (7, 8)}
    assert owners_in(b"".join(pack_diff(str(upper), owners=Owners(MAPPING)))) == expected
    with Merged([str(upper)]) as merged:
        found = owners_in(b"".join(pack_merged(merged, owners=Owners(MAPPING))))
    assert {**found, **expected} == found


def test_copies_translate_both_ways(upper: Path) -> None:
    root = os.open(upper, os.O_PATH)
    try:
        out = b"".join(tree.pack(root, "/written", mapping=MAPPING))
        assert owners_in(out) == {"written": (33, 0)}
        tree.extract(root, "/", io.BytesIO(file("in", uid=5, gid=6) + end()), mapping=MAPPING)
        found = (upper / "in").stat()
        assert (found.st_uid, found.st_gid) == (1_000_005, 1_000_006)
        with pytest.raises(HutchError, match="not in the instance's map"):
            tree.extract(root, "/", io.BytesIO(file("x", uid=70_000) + end()), mapping=MAPPING)
    finally:
        os.close(root)
