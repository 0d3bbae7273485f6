"""Guest kernels of a root: whole or not at all, used or removable, whoever races."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hutch.drivers.vm.kernel_packages import KernelPackage, fetch_kernel, find_package
from hutch.drivers.vm.kernels import Kernels
from hutch.drivers.vm.vmlinux import has_pvh_entry, release_of
from hutch.errors import Busy, InvalidArgument, NotFound, Unavailable, Unsupported
from hutch.records import ProgressEvent
from tests.requires import requires
from tests.vm.conftest import Fetched
from tests.vm.elves import kernel, own_kernel


def names(kernels: Kernels) -> list[str]:
    return sorted(os.listdir(kernels.directory("x").parent))


def add(kernels: Kernels, directory: Path, release: str = "6.9.0-test") -> str:
    directory.mkdir()
    return kernels.add_file(*own_kernel(directory, kernel(release=release))).id


def test_an_own_kernel_is_added_with_its_modules(kernels: Kernels, tmp_path: Path) -> None:
    added = kernels.add_file(*own_kernel(tmp_path / "own"))
    assert added.release == "6.9.0-test"
    assert added.boot == ("virtio", "virtio_pci", "virtio_console")
    assert added.late == ("virtio_blk", "ext4", "erofs", "overlay")
    assert kernels.vmlinux(added).read_bytes() == kernel()
    assert kernels.module(added, "virtio_pci").is_file()
    assert kernels.list() == [added]
    assert names(kernels) == [added.id]


def test_the_same_kernel_is_kept_once_and_becomes_the_first(
    kernels: Kernels, tmp_path: Path
) -> None:
    one, two = add(kernels, tmp_path / "1", "6.1.0"), add(kernels, tmp_path / "2", "6.2.0")
    assert kernels.get().id == two
    assert add(kernels, tmp_path / "3", "6.1.0") == one
    assert [k.id for k in kernels.list()] == [one, two]


def test_a_kernel_is_found_by_release_or_the_beginning_of_its_id(
    kernels: Kernels, tmp_path: Path
) -> None:
    one = add(kernels, tmp_path / "1")
    assert kernels.get("6.9.0-test").id == kernels.get(one[:12]).id == one
    with pytest.raises(NotFound, match=r"kernel 5\.10: not found"):
        kernels.get("5.10")


def test_no_kernel_says_how_to_get_one(kernels: Kernels) -> None:
    with pytest.raises(NotFound) as told:
        kernels.get()
    assert told.value.hint == "hutch vm kernel add"


def test_a_kernel_in_use_is_not_removed(kernels: Kernels, tmp_path: Path) -> None:
    one, two = add(kernels, tmp_path / "1", "6.1.0"), add(kernels, tmp_path / "2", "6.2.0")
    with kernels._records.write() as transaction:
        assert kernels.note(transaction, "box", "6.1.0").id == one
    assert kernels.users(one) == ("box",)
    with pytest.raises(Busy, match="in use by box"):
        kernels.remove("6.1.0")
    assert kernels.prune() == []
    with kernels._records.write() as transaction:
        kernels.forget(transaction, "box")
    assert [k.id for k in kernels.prune()] == [one]
    assert kernels.remove("6.2.0").id == two
    assert names(kernels) == []


@pytest.mark.parametrize("what", ["vmlinux", "modules", "incomplete"])
def test_what_cannot_be_added_leaves_nothing(kernels: Kernels, tmp_path: Path, what: str) -> None:
    image, modules = own_kernel(tmp_path / "own")
    if what == "vmlinux":
        image.write_bytes(b"none")
    elif what == "modules":
        modules = tmp_path / "none"
    else:
        (modules / "kernel/erofs.ko").unlink()
    with pytest.raises((InvalidArgument, Unsupported)):
        kernels.add_file(image, modules)
    assert kernels.list() == []
    assert not kernels.directory("x").parent.exists() or names(kernels) == []


def test_threads_that_add_the_same_kernel_get_the_same(kernels: Kernels, tmp_path: Path) -> None:
    files = own_kernel(tmp_path / "own")
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(kernels.add_file(*files).id)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert names(kernels) == [found[0]]


KILLED = """
import os, sys
from pathlib import Path
from hutch.drivers.vm import kernels
from hutch.store.database import Store
root = sys.argv[1]
kernels._sync_directory = lambda path: os._exit(9) if path.name == sys.argv[4] else None
kernels.Kernels(root, Store.open(Path(root, "hutch.db"))).add_file(sys.argv[2], sys.argv[3])
"""


@pytest.mark.parametrize("at", ["modules", "kernels"])
def test_what_a_killed_process_left_goes(kernels: Kernels, tmp_path: Path, at: str) -> None:
    files = own_kernel(tmp_path / "own")
    root = str(kernels.directory("x").parents[1])
    argv = [sys.executable, "-c", KILLED, root, *map(str, files), at]
    assert subprocess.run(argv).returncode == 9
    assert kernels.list() == []
    assert len([n for n in names(kernels) if not n.endswith(".lock")]) == 1 + (at == "kernels")
    kernels.reconcile()
    assert [n for n in names(kernels) if not n.endswith(".lock")] == []
    kernels.add_file(*files)


def test_a_record_whose_files_are_gone_goes(kernels: Kernels, tmp_path: Path) -> None:
    one = add(kernels, tmp_path / "1")
    kernels._trash.discard(str(kernels.directory(one)))
    assert kernels.reconcile() == [one]
    assert kernels.list() == []


ON_A_FULL_DISK = """
import os, sys
from pathlib import Path
from hutch.drivers.vm.kernels import Kernels
from hutch.errors import Exhausted
from hutch.linux.mount import mount
from hutch.store.database import Store
mount("tmpfs", sys.argv[1], "tmpfs", 0, "size=1m")
kernels = Kernels(sys.argv[1], Store.open(Path(sys.argv[1], "hutch.db")))
try:
    kernels.add_file(sys.argv[2], sys.argv[3])
except Exhausted as exc:
    print(exc.message)
print(os.listdir(sys.argv[1] + "/kernels"), kernels.list())
"""


@requires("root")
@pytest.mark.integration
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    files = own_kernel(tmp_path / "own", kernel() + bytes(4 << 20))
    (tmp_path / "small").mkdir()
    argv = ["unshare", "-m", sys.executable, "-c", ON_A_FULL_DISK]
    done = subprocess.run(
        [*argv, str(tmp_path / "small"), *map(str, files)], capture_output=True, text=True
    )
    assert "no space left on device" in done.stdout, done.stderr
    assert done.stdout.endswith("[] []\n")


# ---- packages -------------------------------------------------------------------------------


@requires("apt-mirror")
def test_debians_kernel_is_fetched_and_not_installed(fetched: Fetched) -> None:
    record = fetched.record
    vmlinux = fetched.kernels.vmlinux(record).read_bytes()
    assert has_pvh_entry(vmlinux)
    assert release_of(vmlinux) == record.release
    assert record.source.startswith(f"linux-image-{record.release} ")
    assert {"virtio_blk", "virtio_net", "erofs", "overlay"} <= {*record.boot, *record.late}
    assert not Path(f"/boot/vmlinuz-{record.release}").exists()


@requires("apt-mirror")
def test_a_package_that_is_there_is_not_fetched_again(fetched: Fetched) -> None:
    seen: list[ProgressEvent] = []
    again = fetched.kernels.add_package(fetched.record.source.split(" ")[0], progress=seen.append)
    assert again.id == fetched.record.id
    assert [event.phase for event in seen] == ["already here"]


@requires("apt-mirror")
def test_a_package_of_a_series_leads_to_its_kernel() -> None:
    found = find_package("linux-image-cloud-amd64")
    assert found.name.removeprefix("linux-image-")[0].isdigit()
    assert find_package(found.name) == found


@pytest.mark.parametrize("name", ["bash", "-o", "linux-image-/x", "linux-image-6.1 evil"])
def test_what_is_no_package_of_a_kernel_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="package: expected a package linux-image"):
        find_package(name)


@requires("apt-mirror")
def test_a_package_that_apt_does_not_know_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"linux-image-0\.0\.1-none: apt does not"):
        find_package("linux-image-0.0.1-none")
    gone = KernelPackage(name="linux-image-cloud-amd64", version="0.0")
    with (
        pytest.raises(Unavailable, match="package linux-image-cloud-amd64"),
        fetch_kernel(gone, tmp_path),
    ):
        pass
