"""The cheap facts: true to the kernel, cached per boot, never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from hutch.host.facts import Facts, cgroup_mode, gather_facts, load_facts
from hutch.linux.boot import boot_id
from tests.requires import requires


def cache_of(root: Path) -> Path:
    return root / "cache" / f"facts-{os.geteuid()}.json"


def test_facts_name_the_running_kernel() -> None:
    facts = gather_facts()
    assert facts.kernel == os.uname().release
    assert facts.boot_id == boot_id()
    assert facts.euid == os.geteuid()


@requires("root", "overlayfs")
def test_overlay_is_found_where_it_can_be_mounted() -> None:
    assert gather_facts().overlay


def test_facts_are_cached_under_the_root(tmp_path: Path) -> None:
    facts = load_facts(tmp_path)
    assert msgspec.json.decode(cache_of(tmp_path).read_bytes(), type=Facts) == facts


def test_a_cache_of_this_boot_is_believed(tmp_path: Path) -> None:
    changed = msgspec.structs.replace(load_facts(tmp_path), kernel="from the cache")
    cache_of(tmp_path).write_bytes(msgspec.json.encode(changed))
    assert load_facts(tmp_path).kernel == "from the cache"


def test_a_cache_of_another_boot_is_gathered_again(tmp_path: Path) -> None:
    stale = msgspec.structs.replace(load_facts(tmp_path), boot_id="another", kernel="stale")
    cache_of(tmp_path).write_bytes(msgspec.json.encode(stale))
    assert load_facts(tmp_path) == gather_facts()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff\x00"])
def test_a_broken_cache_is_gathered_again(tmp_path: Path, content: bytes) -> None:
    cache_of(tmp_path).parent.mkdir()
    cache_of(tmp_path).write_bytes(content)
    assert load_facts(tmp_path) == gather_facts()


def test_a_root_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    assert load_facts(blocked) == gather_facts()


def controllers(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    return root


@pytest.mark.parametrize(
    ("files", "mode"),
    [
        (("cgroup.controllers",), "v2"),
        (("memory/cgroup.procs",), "v1"),
        (("memory/cgroup.procs", "unified/cgroup.controllers"), "hybrid"),
        (("unified/cgroup.controllers",), "v2"),
        ((), "none"),
    ],
)
def test_cgroup_mode_is_read_off_the_mounts(
    tmp_path: Path, files: tuple[str, ...], mode: str
) -> None:
    assert cgroup_mode(controllers(tmp_path, *files)) == mode
