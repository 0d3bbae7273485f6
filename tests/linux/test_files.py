"""Opening beneath a root, renaming, holes, sealed memory, and processes by descriptor."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
from pathlib import Path

import pytest

from hutch.linux import files, pidfd, prctl
from hutch.linux.inotify import IN_CLOSE_WRITE, IN_CREATE, Inotify


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    (path / "etc").mkdir(parents=True)
    (path / "etc/passwd").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    return path


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("/etc/passwd", True),
        ("../../../../etc/passwd", True),
        ("../secret", False),
        ("../../secret", False),
    ],
)
def test_a_link_cannot_lead_out_of_the_root(root: Path, target: str, found: bool) -> None:
    (root / "link").symlink_to(target)
    root_fd = os.open(root, os.O_PATH | os.O_CLOEXEC)
    try:
        if found:
            fd = files.open_in_root(root_fd, "/link", os.O_RDONLY)
            assert os.read(fd, 10) == b"inside"
            assert not os.get_inheritable(fd)
            os.close(fd)
        else:
            with pytest.raises(FileNotFoundError):
                files.open_in_root(root_fd, "/link", os.O_RDONLY)
    finally:
        os.close(root_fd)


def test_a_magic_link_is_refused() -> None:
    with pytest.raises(OSError) as caught:
        proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
        try:
            files.open_in_root(proc, "self/root", os.O_RDONLY)
        finally:
            os.close(proc)
    assert caught.value.errno in (errno.ELOOP, errno.EXDEV)


def test_opening_beneath_creates_with_the_mode(root: Path) -> None:
    root_fd = os.open(root, os.O_PATH | os.O_CLOEXEC)
    before = os.umask(0)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        os.close(files.openat2(root_fd, "new", flags, 0o640, files.RESOLVE_BENEATH))
        with pytest.raises(OSError) as caught:
            files.openat2(root_fd, "../out", flags, 0o640, files.RESOLVE_BENEATH)
    finally:
        os.umask(before)
        os.close(root_fd)
    assert (root / "new").stat().st_mode & 0o777 == 0o640
    assert caught.value.errno == errno.EXDEV


def test_renaming_without_replacing_and_by_exchange(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    fd = os.open(tmp_path, os.O_PATH | os.O_CLOEXEC)
    try:
        with pytest.raises(FileExistsError) as caught:
            files.renameat2(fd, "a", fd, "b", files.RENAME_NOREPLACE)
        files.renameat2(fd, "a", fd, "b", files.RENAME_EXCHANGE)
    finally:
        os.close(fd)
    assert (caught.value.filename, caught.value.filename2) == ("a", "b")
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("b", "a")


def test_an_unnamed_file_gets_a_name_once_it_is_whole(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, b"whole")
        files.link_fd(fd, directory, "named")
        with pytest.raises(FileExistsError):
            files.link_fd(fd, directory, "named")
        files.syncfs(directory)
    finally:
        os.close(fd)
        os.close(directory)
    assert (tmp_path / "named").read_bytes() == b"whole"


def test_a_hole_gives_the_blocks_back_and_reads_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        before = os.stat(path).st_blocks
        files.punch_hole(file.fileno(), 0, 1 << 19)
    after = os.stat(path)
    assert after.st_blocks < before
    assert after.st_size == 1 << 20
    assert path.read_bytes()[: 1 << 19].count(0) == 1 << 19


def test_directories_in_one_are_spread_where_the_file_system_can(tmp_path: Path) -> None:
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    try:
        files.set_topdir(tmp_path)
    except OSError as exc:
        assert "ext" not in kind, exc
        return
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        flags = fcntl.ioctl(fd, files.FS_IOC_GETFLAGS, bytes(8))
    finally:
        os.close(fd)
    assert int.from_bytes(flags[:4], "little") & files.FS_TOPDIR_FL
    (tmp_path / "made").mkdir()  # as before


def test_a_sealed_memfd_cannot_be_changed() -> None:
    fd = files.create_sealed_memfd("test", b"content")
    try:
        assert os.read(fd, 100) == b"content"
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        with pytest.raises(PermissionError):
            writer = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
            try:
                os.write(writer, b"x")
            finally:
                os.close(writer)
    finally:
        os.close(fd)


def test_a_process_is_signalled_and_awaited_by_descriptor() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        fd = pidfd.pidfd_open(child.pid)
        try:
            assert not pidfd.wait_pidfd(fd, 0)
            pidfd.pidfd_send_signal(fd, signal.SIGKILL)
            assert pidfd.wait_pidfd(fd, 10)
        finally:
            os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_descriptor_is_taken_from_another_process() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        fd = pidfd.pidfd_open(child.pid)
        try:
            taken = pidfd.pidfd_getfd(fd, 1)
        finally:
            os.close(fd)
        assert os.readlink(f"/proc/self/fd/{taken}") == os.readlink(
            f"/proc/self/fd/{child.stdout.fileno()}"
        )
        os.close(taken)
        child.stdin.close()
        assert child.wait(60) == 0


def test_prctl_reports_refusals() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        prctl.prctl(9999)
    assert prctl.get_no_new_privs() in (True, False)


def test_changes_in_a_directory_are_told(tmp_path: Path) -> None:
    with Inotify() as watcher:
        watch = watcher.add(tmp_path, IN_CREATE | IN_CLOSE_WRITE)
        assert watcher.read(0) == []
        (tmp_path / "new").write_text("x")
        events = watcher.read(10)
        assert [(e.watch, e.mask, e.name) for e in events] == [
            (watch, IN_CREATE, "new"),
            (watch, IN_CLOSE_WRITE, "new"),
        ]
        with pytest.raises(FileNotFoundError):
            watcher.add(tmp_path / "missing", IN_CREATE)
    watcher.close()
