"""Files of an instance by descriptor: nothing leads out of the root."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.errors import IntegrityError, InvalidArgument, NotFound
from hutch.linux.files import RENAME_EXCHANGE, renameat2
from hutch.storage import tree
from tests.requires import requires
from tests.storage.tars import directory, end, file, hard_link, symlink


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    root = tmp_path / "inside"
    (root / "etc").mkdir(parents=True)
    (root / "etc/hosts").write_text("inside")
    (root / "abs").symlink_to("/etc")
    (root / "up").symlink_to("../../../../../..")
    (root / "file-link").symlink_to("/etc/hosts")
    (root / "dangling").symlink_to("/no/where")
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture
def root_fd(inside: Path) -> Iterator[int]:
    fd = os.open(inside, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_files_are_read_through_links_inside_the_root(root_fd: int) -> None:
    for path in (
        "/etc/hosts",
        "etc/hosts",
        "/abs/hosts",
        "/up/etc/hosts",
        "/file-link",
        "/../etc/hosts",
    ):
        assert tree.read(root_fd, path) == b"inside"


@pytest.mark.parametrize("path", ["/no", "/dangling", "/etc/no", "/etc/hosts/x"])
def test_what_is_not_there(root_fd: int, path: str) -> None:
    with pytest.raises((NotFound, InvalidArgument)):
        tree.read(root_fd, path)


@pytest.mark.parametrize("path", ["/fifo", "/etc", "/", "", "a\0b"])
def test_only_regular_files_are_opened(root_fd: int, path: str) -> None:
    with pytest.raises(InvalidArgument):
        tree.read(root_fd, path)


@requires("root")
def test_a_device_is_not_read(root_fd: int, inside: Path) -> None:
    os.mknod(inside / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with pytest.raises(InvalidArgument, match="not a regular file"):
        tree.read(root_fd, "/zero")


def test_magic_links_of_proc_are_not_followed(inside: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host")
    root = os.open("/", os.O_PATH)
    held = os.open(tmp_path / "secret", os.O_RDONLY)
    try:
        with pytest.raises(InvalidArgument):
            tree.read(root, f"/proc/self/fd/{held}")
    finally:
        os.close(held)
        os.close(root)


def test_a_limit_on_reading(root_fd: int) -> None:
    assert tree.read(root_fd, "/etc/hosts", limit=6) == b"inside"
    with pytest.raises(InvalidArgument, match="larger"):
        tree.read(root_fd, "/etc/hosts", limit=5)


def test_stat_does_not_follow_unless_asked(root_fd: int) -> None:
    link = tree.stat(root_fd, "/file-link")
    assert link.is_symlink and link.link_target == "/etc/hosts" and link.name == "file-link"
    followed = tree.stat(root_fd, "/file-link", follow=True)
    assert followed.is_file and followed.size == 6
    assert tree.stat(root_fd, "/").is_dir


def test_a_directory_is_listed(root_fd: int) -> None:
    assert [entry.name for entry in tree.list_directory(root_fd, "/abs")] == ["hosts"]
    kinds = {entry.name: entry.mode for entry in tree.list_directory(root_fd, "/")}
    assert stat.S_ISFIFO(kinds["fifo"]) and stat.S_ISLNK(kinds["dangling"])
    with pytest.raises(InvalidArgument):
        tree.list_directory(root_fd, "/etc/hosts")


def test_writing_keeps_what_a_file_was(root_fd: int, inside: Path) -> None:
    (inside / "etc/hosts").chmod(0o600)
    tree.write(root_fd, "/abs/hosts", b"new")
    assert (inside / "etc/hosts").read_text() == "new"
    assert stat.S_IMODE((inside / "etc/hosts").stat().st_mode) == 0o600
    tree.write(root_fd, "/etc/hosts", b"!", append=True)
    assert (inside / "etc/hosts").read_text() == "new!"
    tree.write(root_fd, "/a/b/c", iter([b"1", b"2"]), mode=0o4750, parents=True)
    assert (inside / "a/b/c").read_text() == "12"
    assert stat.S_IMODE((inside / "a/b/c").stat().st_mode) == 0o4750
    with pytest.raises(NotFound):
        tree.write(root_fd, "/x/y", b"")


@requires("root")
def test_new_files_get_the_owner(root_fd: int, inside: Path) -> None:
    tree.write(root_fd, "/d/f", b"", owner=(7, 8), parents=True)
    assert [((inside / n).stat().st_uid, (inside / n).stat().st_gid) for n in ("d", "d/f")] == [
        (7, 8)
    ] * 2


def test_removal(root_fd: int, inside: Path) -> None:
    tree.remove(root_fd, "/file-link")
    assert (inside / "etc/hosts").exists()
    with pytest.raises(InvalidArgument):
        tree.remove(root_fd, "/etc")
    tree.remove(root_fd, "/abs")
    tree.remove(root_fd, "/etc", recursive=True)
    assert not (inside / "etc").exists()
    for bad in ("/", "/.", "/x/.."):
        with pytest.raises(InvalidArgument):
            tree.remove(root_fd, bad)


def unpacked(chunks: Iterator[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(b"".join(chunks)))


def test_trees_are_packed_with_the_name_asked_for(root_fd: int) -> None:
    assert unpacked(tree.pack(root_fd, "/etc")).getnames() == ["etc", "etc/hosts"]
    assert unpacked(tree.pack(root_fd, "/etc", name="n")).getnames() == ["n", "n/hosts"]
    assert unpacked(tree.pack(root_fd, "/abs/.", contents_only=True)).getnames() == [".", "hosts"]
    link = unpacked(tree.pack(root_fd, "/file-link")).getmembers()
    assert [(m.name, m.linkname) for m in link] == [("file-link", "/etc/hosts")]
    followed = unpacked(tree.pack(root_fd, "/file-link", follow=True))
    assert followed.getnames() == ["file-link"] and followed.getmembers()[0].isreg()
    whole = unpacked(tree.pack(root_fd, "/", contents_only=True)).getnames()
    assert whole == [".", "abs", "dangling", "etc", "etc/hosts", "fifo", "file-link", "up"]
    with pytest.raises(NotFound):
        tree.pack(root_fd, "/no")


def test_an_archive_is_extracted_inside(root_fd: int, inside: Path) -> None:
    data = directory("d") + file("d/f", b"1") + symlink("l", "/etc") + file(".wh.x") + end()
    tree.extract(root_fd, "/abs", io.BytesIO(data))
    assert (inside / "etc/d/f").read_text() == "1"
    assert (inside / "etc/.wh.x").exists()
    tree.extract(root_fd, "/etc", io.BytesIO(file("hosts", b"new") + end()))
    assert (inside / "etc/hosts").read_text() == "new"
    with pytest.raises(NotFound):
        tree.extract(root_fd, "/no", io.BytesIO(data))


def test_links_in_the_destination_lead_where_the_instance_sees_them(
    root_fd: int, inside: Path
) -> None:
    (inside / "dest").mkdir()
    (inside / "dest/l").symlink_to("/etc")
    tree.extract(root_fd, "/dest", io.BytesIO(file("l/new", b"x") + end()))
    assert (inside / "etc/new").read_text() == "x"


def test_extraction_leaves_the_destination_as_it_is(root_fd: int, inside: Path) -> None:
    before = (inside / "etc").stat()
    data = directory("./", mode=0o777, uid=5, mtime=5) + end()
    tree.extract(root_fd, "/etc", io.BytesIO(data))
    after = (inside / "etc").stat()
    assert (after.st_mode, after.st_uid, after.st_mtime) == (
        before.st_mode,
        before.st_uid,
        before.st_mtime,
    )


def test_a_swapped_link_never_leads_out(root_fd: int, inside: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (inside / "real").mkdir()
    (inside / "link").symlink_to(outside)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            # At once: were the name free for a moment, an extraction would make it anew.
            renameat2(root_fd, "real", root_fd, "link", RENAME_EXCHANGE)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for number in range(300):
            try:
                tree.write(root_fd, f"/real/{number}", b"x")
                tree.extract(root_fd, "/real", io.BytesIO(file(f"e{number}", b"x") + end()))
            except Exception:
                continue
    finally:
        stop.set()
        thread.join()
    assert os.listdir(outside) == []


@pytest.mark.parametrize(
    "archive",
    [
        file("hosts", b"x"),
        file("other/x", b"x"),
        file("askedx", b"x"),
        file("asked/../hosts", b"x"),
        file("/hosts", b"x"),
        directory("etc", mode=0o777),
        directory("asked") + hard_link("asked/mine", "etc/hosts"),
        symlink("asked", ".") + file("asked/hosts", b"x"),
        symlink("asked", "etc") + file("asked/hosts", b"x"),
        directory("asked") + symlink("asked/up", "..") + file("asked/up/hosts", b"x"),
        directory("asked") + symlink("asked/up", "../etc") + directory("asked/up", mode=0o777)
        + file("asked/../etc/hosts", b"x"),
    ],
)  # fmt: skip
def test_who_makes_an_archive_does_not_choose_what_is_written_beside_what_was_asked_for(
    root_fd: int, inside: Path, archive: bytes
) -> None:
    before = (inside / "etc").stat().st_mode
    with pytest.raises((IntegrityError, InvalidArgument)):
        tree.extract(root_fd, "/", io.BytesIO(archive + end()), within="asked", replace=False)
    assert sorted(os.listdir(inside / "etc")) == ["hosts"]
    assert (inside / "etc/hosts").read_text() == "inside"
    assert not {"hosts", "other", "askedx"} & set(os.listdir(inside))
    assert (inside / "etc").stat().st_mode == before
    assert (inside / "etc/hosts").stat().st_nlink == 1


def test_what_was_asked_for_is_placed_whole(root_fd: int, inside: Path) -> None:
    archive = (
        directory("asked") + file("asked/a", b"1") + symlink("asked/out", "/etc")
        + directory("asked/deep/er") + hard_link("asked/deep/b", "asked/a") + end()
    )  # fmt: skip
    for _ in range(2):
        tree.extract(root_fd, "/", io.BytesIO(archive), within="asked", replace=False)
    assert (inside / "asked/deep/b").read_bytes() == b"1"
    assert os.readlink(inside / "asked/out") == "/etc"


def test_a_directory_is_not_removed_for_a_file_nor_the_other_way_round(
    root_fd: int, inside: Path
) -> None:
    for archive in (file("etc", b"x"), symlink("etc", "/"), directory("file-link")):
        with pytest.raises(InvalidArgument, match="here, and"):
            tree.extract(root_fd, "/", io.BytesIO(archive + end()), replace=False)
    assert (inside / "etc/hosts").read_text() == "inside"
    assert (inside / "file-link").is_symlink()
