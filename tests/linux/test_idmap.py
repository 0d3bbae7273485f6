"""Subordinate ids, maps, and user namespaces that carry one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hutch.errors import InvalidArgument, NotFound
from hutch.linux import idmap, mount
from hutch.linux.idmap import IdMapping, IdRange
from tests.requires import requires

SUBIDS = "alice:100000:65536\n# note\nbob:200000:10\n1000:300000:5\nalice:nonsense:1\n\nalice:1:0\n"


def test_ranges_are_found_by_name_and_by_number(tmp_path: Path) -> None:
    path = tmp_path / "subuid"
    path.write_text(SUBIDS)
    assert idmap.subordinate_ids("alice", 1000, str(path)) == ((100000, 65536), (300000, 5))
    assert idmap.subordinate_ids("carol", 7, str(path)) == ()
    assert idmap.subordinate_ids("alice", 1000, str(tmp_path / "none")) == ()


def test_a_remapped_instance_has_the_ranges_one_after_the_other(tmp_path: Path) -> None:
    path = str(tmp_path / "sub")
    Path(path).write_text(SUBIDS)
    mapping = idmap.remap_mapping("alice", 1000, subuid=path, subgid=path)
    assert mapping.uids == (
        IdRange(inside=0, outside=100000, size=65536),
        IdRange(inside=65536, outside=300000, size=5),
    )
    assert idmap.to_outside(mapping.uids, 33) == 100033
    assert idmap.to_outside(mapping.uids, 65537) == 300001
    assert idmap.to_outside(mapping.uids, 70000) is None
    with pytest.raises(NotFound) as caught:
        idmap.remap_mapping("carol", 7, subuid=path, subgid=path)
    assert "usermod" in (caught.value.hint or "")


def test_a_user_is_root_inside(tmp_path: Path) -> None:
    path = str(tmp_path / "sub")
    Path(path).write_text("alice:100000:65536\n")
    mapping = idmap.rootless_mapping("alice", 1000, 1001, subuid=path, subgid=path)
    assert idmap.map_arguments(mapping.uids) == ["0", "1000", "1", "1", "100000", "65536"]
    assert idmap.map_arguments(mapping.gids) == ["0", "1001", "1", "1", "100000", "65536"]


@pytest.mark.parametrize(
    ("lines", "field"),
    [
        ([], "uid_maps"),
        (["0:0"], r"uid_maps\[0\]"),
        (["0:-1:5"], r"uid_maps\[0\]"),
        (["0:0:0"], r"uid_maps\[0\]"),
        (["0:4294967290:100"], r"uid_maps\[0\]"),
        (["0:1000:10", "5:2000:10"], r"uid_maps\[1\]"),
        (["0:1000:10", "10:1005:10"], r"uid_maps\[1\]"),
        (["0:0:1"] * 341, "uid_maps"),
    ],
)
def test_a_bad_map_is_refused_with_its_place(lines: list[str], field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}: "):
        idmap.parse_mapping(lines, field="uid_maps")


@contextmanager
def holder() -> Iterator[int]:
    """Hold a user namespace as the launcher would."""
    with subprocess.Popen(
        ["unshare", "-U", "sh", "-c", "printf r; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.read(1) == b"r"
        yield child.pid
        child.stdin.close()


@requires("root", "userns")
def test_a_namespace_is_made_once_per_mapping() -> None:
    one = idmap.parse_mapping(["0:100000:65536"], field="x")
    two = idmap.parse_mapping(["0:200000:65536"], field="x")
    kept = idmap.UserNamespaces(holder)
    first = kept.fd(IdMapping(uids=one, gids=one))
    assert kept.fd(IdMapping(uids=one, gids=one)) == first
    assert kept.fd(IdMapping(uids=two, gids=one)) != first
    assert not os.get_inheritable(first)
    kept.close()
    with pytest.raises(OSError):
        os.fstat(first)


@requires("root", "userns", "idmapped-mounts")
def test_a_mount_shows_the_ids_of_the_mapping(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    ranges = idmap.parse_mapping(["0:100000:65536"], field="x")
    userns = idmap.create_userns_fd(IdMapping(uids=ranges, gids=ranges), holder)
    try:
        tree = mount.open_tree(mount.AT_FDCWD, str(tmp_path), mount.OPEN_TREE_CLONE)
        try:
            mount.mount_setattr(tree, "", attr_set=mount.MOUNT_ATTR_IDMAP, userns_fd=userns)
            assert os.stat("file", dir_fd=tree).st_uid == 100000
        finally:
            os.close(tree)
    finally:
        os.close(userns)


def test_apparmor_is_read_from_sysfs(tmp_path: Path) -> None:
    from hutch.linux import apparmor

    assert not apparmor.is_enabled(str(tmp_path))
    assert apparmor.loaded_profiles(str(tmp_path)) == {}
    (tmp_path / "module/apparmor/parameters").mkdir(parents=True)
    (tmp_path / "module/apparmor/parameters/enabled").write_text("Y\n")
    (tmp_path / "kernel/security/apparmor").mkdir(parents=True)
    (tmp_path / "kernel/security/apparmor/profiles").write_text(
        "docker-default (enforce)\n/usr/bin/man (complain)\nodd name (x) (enforce)\n"
    )
    assert apparmor.is_enabled(str(tmp_path))
    assert apparmor.is_profile_loaded("docker-default", str(tmp_path))
    assert apparmor.loaded_profiles(str(tmp_path))["odd name (x)"] == "enforce"
