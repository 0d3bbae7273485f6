"""Where a volume's files lie and what keeps them there: a directory, a directory with a quota, a
btrfs subvolume, a file system in a file, a disk image.

Each form is made, opened, grown, copied and taken away here; what a volume is called and who
uses it is the business of `volumes`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from typing import assert_never

import msgspec

from hutch.errors import InvalidArgument, Unsupported
from hutch.storage.diskkeys import DiskKey
from hutch.storage.disks import DEFAULT_SIZE, Disks
from hutch.storage.faults import disk_errors
from hutch.storage.limited import (
    ensure_limited,
    give_up_limited,
    make_limited,
    point_of,
    release_limited,
    reserve,
    tree_of,
)
from hutch.storage.snapshots import LIMITED_FILE, QCOW2_FILE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hutch.storage.trash import Trash

__all__ = ["Form", "Home", "discard", "ensure", "give_up", "grow", "is_open"]
__all__ += ["limit_subvolume", "make", "path_of", "release", "thaw"]


class Form(StrEnum):
    """What holds a volume's files."""

    TREE = "tree"
    PROJECT = "project"
    SUBVOLUME = "subvolume"
    FILE = "file"
    IMAGE = "image"


class Home(msgspec.Struct, frozen=True, kw_only=True):
    """A volume's place. `directory` is its own; `size` in bytes (0: what its disk has);
    `project` the number of its quota; `reserved`: its room is taken at once, as others share
    the disk that it is on; `encrypted`: opened with a key; `disk`: for a machine to mount."""

    name: str
    directory: str
    form: Form
    size: int = 0
    project: int = 0
    reserved: bool = False
    encrypted: bool = False
    disk: bool = False


def path_of(home: Home) -> str:
    """Return the directory of the files, mounted or not."""
    if home.form in (Form.FILE, Form.IMAGE):
        return tree_of(home.directory)
    return f"{home.directory}/_data"


def make(home: Home, disks: Disks, *, key: DiskKey | None = None) -> None:
    """Make an empty volume; of a failure the caller discards what is there. An image is left
    closed."""
    os.makedirs(os.path.dirname(home.directory), 0o711, exist_ok=True)
    os.makedirs(home.directory, 0o711, exist_ok=True)
    data = f"{home.directory}/_data"
    match home.form:
        case Form.TREE:
            _make_tree(data)
        case Form.PROJECT:
            _make_tree(data)
            _limit_project(home, data)
        case Form.SUBVOLUME:
            _run(("btrfs", "subvolume", "create"), data, package="btrfs-progs")
            os.chmod(data, 0o755)
            limit_subvolume(home)
        case Form.FILE if home.disk:
            disks.create(f"{home.directory}/{LIMITED_FILE}", home.size)
            if home.reserved:
                reserve(f"{home.directory}/{LIMITED_FILE}")
        case Form.FILE:
            make_limited(
                disks, home.directory, home.size, field="options.size", reserved=home.reserved
            )
        case Form.IMAGE:
            _make_image(home, disks, key)
        case _:
            assert_never(home.form)


def _run(argv: Sequence[str], path: str, package: str, allowed: Sequence[int] = (0,)) -> None:
    from hutch.storage.poolkinds import run_tool

    run_tool(argv, path, package=package, allowed=allowed)


def _make_tree(path: str) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return
    os.chmod(path, 0o755)


def _limit_project(home: Home, data: str) -> None:
    from hutch.linux.quota import set_project, set_project_limit

    fd = os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        set_project(fd, home.project)
        set_project_limit(fd, home.project, home.size)
    finally:
        os.close(fd)


def limit_subvolume(home: Home) -> None:
    """Bound a btrfs subvolume to the volume's size."""
    if home.size:
        limit = ("btrfs", "qgroup", "limit", str(home.size))
        _run(limit, f"{home.directory}/_data", package="btrfs-progs")


def _make_image(home: Home, disks: Disks, key: DiskKey | None) -> None:
    from hutch.storage.diskimages import convert_disk

    path = f"{home.directory}/{QCOW2_FILE}"
    if os.geteuid() != 0:
        raise Unsupported("volume: disk images are mounted as root", hint="run as root")
    if home.encrypted:
        if key is None:
            raise InvalidArgument(
                "an encrypted volume needs one", field="key", hint="--key FILE, fd:N or prompt"
            )
        disks.create_encrypted(path, home.size or DEFAULT_SIZE, key)
        return
    empty = disks.empty(home.size or DEFAULT_SIZE)
    convert_disk(empty, path, source_format="raw", format="qcow2")


def is_open(home: Home) -> bool:
    """Tell whether the files are to be seen; only what is mounted may not be."""
    return home.form not in (Form.FILE, Form.IMAGE) or os.path.ismount(point_of(home.directory))


def ensure(home: Home, *, key: DiskKey | None = None) -> None:
    """Open a volume for use where it is not; the caller holds its lock."""
    if home.form == Form.FILE:
        ensure_limited(home.directory, reserved=home.reserved)
        thaw(home)
    elif home.form == Form.IMAGE:
        from hutch.storage.exports import open_image

        with disk_errors(f"volume {home.name}"):
            open_image(home.directory, point_of(home.directory), key=key)


def thaw(home: Home) -> None:
    """Let writers go on where a process that froze the volume's own file system was killed; the
    caller holds its lock, so nobody does now."""
    if home.form not in (Form.FILE, Form.IMAGE) or not is_open(home):
        return
    import errno

    from hutch.linux import files

    fd = os.open(point_of(home.directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        files.thaw(fd)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # not frozen
            raise
    finally:
        os.close(fd)


def release(home: Home) -> None:
    """Close a volume; not open is fine. Who has it mounted elsewhere keeps it."""
    if home.form == Form.FILE:
        release_limited(home.directory)
    elif home.form == Form.IMAGE:
        from hutch.storage.exports import close_image

        close_image(home.directory, point_of(home.directory))


def give_up(home: Home) -> None:
    """Close a volume for good: a machine is to have its file. `Busy` where somebody else
    still holds on to it."""
    if home.form == Form.FILE:
        give_up_limited(home.directory)
    else:
        release(home)


def discard(home: Home, trash: Trash) -> None:
    """Take a volume away with all that is in it; missing is fine."""
    release(home)
    if home.form == Form.SUBVOLUME:
        for path in _subvolumes(home.directory):
            _run(("btrfs", "subvolume", "delete"), path, package="btrfs-progs")
    if home.form == Form.PROJECT and os.path.isdir(f"{home.directory}/_data"):
        _limit_project(msgspec.structs.replace(home, size=0), f"{home.directory}/_data")
    trash.discard(home.directory)


def _subvolumes(directory: str) -> list[str]:
    found = [f"{directory}/_data"]
    try:
        found += [entry.path for entry in os.scandir(f"{directory}/snapshots")]
    except FileNotFoundError:
        pass
    return [path for path in found if os.path.isdir(path)]


def grow(home: Home, size: int, disks: Disks, *, key: DiskKey | None = None) -> None:
    """Let a volume hold `size` bytes, while it is used where its form allows that (quotas),
    else while it is closed; `home` is as it was."""
    wanted = msgspec.structs.replace(home, size=size)
    match home.form:
        case Form.PROJECT:
            _limit_project(wanted, f"{home.directory}/_data")
        case Form.SUBVOLUME:
            limit_subvolume(wanted)
        case Form.FILE:
            _grow_file(wanted, disks)
        case Form.IMAGE:
            _grow_image(wanted, key)
        case Form.TREE:
            raise InvalidArgument(f"volume {home.name} has no size to grow", field="size")
        case _:
            assert_never(home.form)


def _grow_file(home: Home, disks: Disks) -> None:
    path = f"{home.directory}/{LIMITED_FILE}"
    _closed(home, path)
    disks.grow(path, home.size)
    if home.reserved:
        reserve(path)


def _closed(home: Home, path: str) -> None:
    """Close a volume whose file system is in the file `path`; raise `Busy` where somebody has
    it mounted still, for whom it stays as it is."""
    from hutch.errors import Busy
    from hutch.storage.filemounts import mount_file, unmount_file, wait_detached

    point = point_of(home.directory)
    unmount_file(point)
    if not wait_detached(path, 1.0):
        if home.form == Form.FILE:
            ensure(home)
        else:
            mount_file(path, point, "ext4", "discard")
        raise Busy(
            f"volume {home.name}: is in use", hint="stop the instances that use it to grow it"
        )
    release(home)


def _grow_image(home: Home, key: DiskKey | None) -> None:
    from hutch.storage.diskimages import resize_disk
    from hutch.storage.exports import SERVED, close_image

    path = f"{home.directory}/{QCOW2_FILE}"
    _closed(home, f"{home.directory}/{SERVED}")
    resize_disk(path, home.size, format="qcow2", key=key)
    try:
        _resize_inside(home, key)
    finally:
        close_image(home.directory, point_of(home.directory))


def _resize_inside(home: Home, key: DiskKey | None) -> None:
    """Grow the file system in an image, through its server."""
    from hutch.storage.exports import SERVED, serve_image

    serve_image(home.directory, key=key)
    served = f"{home.directory}/{SERVED}"
    _run(("e2fsck", "-f", "-p"), served, package="e2fsprogs", allowed=(0, 1, 2))
    _run(("resize2fs",), served, package="e2fsprogs")
