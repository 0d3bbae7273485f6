"""Which modules a guest gets, and in which order."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.drivers.vm.modules import Modules, read_modinfo
from hutch.errors import HutchError, IntegrityError, InvalidArgument, Unsupported
from tests.vm.elves import module, own_kernel

FILES = {
    "net_failover.ko": module("net_failover", "failover"),
    "failover.ko.xz": lzma.compress(module("failover")),
    "virtio-net.ko.zst": zstandard.compress(module("virtio_net", "net_failover,virtio-ring")),
    "virtio_ring.ko.gz": gzip.compress(module("virtio_ring")),
    "erofs.ko": module("erofs", "", softdep="pre: crc32c libcrc32c post: other"),
    "libcrc32c.ko": module("libcrc32c"),
    "one.ko": module("one", "two"),
    "two.ko": module("two", "one"),
    "notes.txt": b"",
}


@pytest.fixture
def modules() -> Modules:
    return Modules(FILES, FILES.__getitem__, ["kernel/fs/ext4/ext4.ko"])


def test_modules_come_after_what_they_need(modules: Modules) -> None:
    order = modules.order(["virtio_net"])
    assert list(order) == ["failover", "net_failover", "virtio_ring", "virtio_net"]
    assert order["failover"] == module("failover")
    assert order["virtio_ring"] == module("virtio_ring")


def test_a_soft_dependency_counts_where_it_is_there(modules: Modules) -> None:
    assert list(modules.order(["erofs"])) == ["libcrc32c", "erofs"]


def test_a_soft_dependency_may_be_an_alias() -> None:
    files = {
        "libcrc32c.ko": module("libcrc32c", "", softdep="pre: crc32c"),
        "crc32c-intel.ko": module("crc32c_intel", "", alias="crc32c"),
        "crc32c_generic.ko": module("crc32c_generic", "", alias="crc32c"),
        "crc32c_other.ko": module("crc32c_other"),
    }
    modules = Modules(files, files.__getitem__)
    assert list(modules.order(["libcrc32c"])) == ["crc32c_generic", "libcrc32c"]


def test_what_is_loaded_built_in_or_unknown_is_left_out(modules: Modules) -> None:
    wanted = ["net_failover", "ext4", "nothing_like_it"]
    assert list(modules.order(wanted, known=["failover"])) == ["net_failover"]


def test_a_circle_of_dependencies_ends(modules: Modules) -> None:
    assert sorted(modules.order(["one"])) == ["one", "two"]


def test_a_kernel_without_what_a_guest_needs_is_refused(modules: Modules) -> None:
    with pytest.raises(Unsupported, match="has no virtio_pci, virtio_console, virtio_blk, overlay"):
        modules.check()


def test_a_directory_of_modules_is_read(tmp_path: Path) -> None:
    _, directory = own_kernel(tmp_path)
    (directory / "modules.builtin").write_text("kernel/fs/fuse/fuse.ko\n")
    found = Modules.from_directory(directory)
    found.check()
    assert found.builtin == {"fuse"}
    assert list(found.order(["virtio_pci"])) == ["virtio", "virtio_pci"]


def test_a_directory_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="modules: no kernel modules beneath"):
        Modules.from_directory(tmp_path)


def test_a_damaged_module_is_told() -> None:
    with pytest.raises(IntegrityError, match="not an ELF file"):
        read_modinfo(b"MZ")
    whole = module("x")
    with pytest.raises(IntegrityError, match="damaged"):
        read_modinfo(whole[:100])


@settings(deadline=None)
@given(st.binary(max_size=120), st.integers(0, 400))
def test_no_damage_breaks_the_reader(junk: bytes, at: int) -> None:
    data = bytearray(module("virtio_net", "a,b"))
    data[at : at + len(junk)] = junk
    try:
        read_modinfo(bytes(data))
    except HutchError:
        pass
