"""Files of a guest, through the agent's helper: nothing leads out of the root."""

from __future__ import annotations

import errno
import io
import os
import random
import stat
import struct
import tarfile
from pathlib import Path

import pytest

from hutch.plan import guest, guest_answers
from tests import fuzzing
from tests.native import guests
from tests.native.guests import Peer
from tests.requires import requires

pytestmark = [requires("root", "cc"), pytest.mark.integration]

FOLLOW, CONTENTS = 1, 2
APPEND, PARENTS = 1, 2


@pytest.fixture
def root(peer: Peer, tmp_path: Path) -> Path:
    """The tree that the helper works in; beside it a secret that it must not reach."""
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "root"


def read(peer: Peer, path: str, **where: int) -> bytes:
    head, body = peer.files(guest.ReadFile(path=path, **where))
    assert head.errno == 0, head
    return body


def fails(peer: Peer, request: guest.Files, content: bytes = b"") -> int:
    head, body = peer.files(request, content)
    assert body == b""
    return head.errno


def stat_of(peer: Peer, path: str, *, follow: bool = False) -> guest_answers.FileStat:
    head, body = peer.files(guest.StatFile(path=path, follow=follow))
    assert head.errno == 0, head
    return guest_answers.decode_stat(body)


def test_what_is_written_is_read(peer: Peer, root: Path) -> None:
    content = random.Random(1).randbytes(500_000)
    assert fails(peer, guest.WriteContent(path="/a"), content) == 0
    assert (root / "a").read_bytes() == content == read(peer, "/a")
    assert read(peer, "/a", offset=499_990) == content[-10:]
    assert read(peer, "/a", offset=10, limit=5) == content[10:15]
    assert read(peer, "/a", offset=600_000) == b""


def test_a_new_file_has_what_was_asked_and_an_old_one_keeps_it(peer: Peer, root: Path) -> None:
    request = guest.WriteContent(path="/d/e/f", mode=0o4750, uid=5, gid=6, flags=PARENTS)
    assert fails(peer, request, b"one") == 0
    assert fails(peer, guest.WriteContent(path="/d/e/f", flags=APPEND), b"two") == 0
    found = (root / "d/e/f").stat()
    assert (found.st_uid, found.st_gid) == (5, 6)
    assert (root / "d/e/f").read_bytes() == b"onetwo"
    assert fails(peer, guest.WriteContent(path="/new"), b"") == 0
    assert stat.S_IMODE((root / "new").stat().st_mode) == 0o644


def test_a_new_file_whose_sender_goes_away_is_not_left_half_made(peer: Peer, root: Path) -> None:
    (root / "old").write_bytes(b"old")
    channel = peer.open(guests.FILES)
    channel.write(guest.encode_files(guest.WriteContent(path="/half")) + bytes(200_000))
    channel.close()
    while (root / "half").exists():
        assert peer.call(guest.Call.PING).errno == 0


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (guest.ReadFile(path="/none"), errno.ENOENT),
        (guest.ReadFile(path="/dir"), errno.EISDIR),
        (guest.ReadFile(path="/fifo"), errno.EINVAL),
        (guest.WriteContent(path="/dir"), errno.EISDIR),
        (guest.WriteContent(path="/fifo"), errno.ENXIO),
        (guest.WriteContent(path="/none/x"), errno.ENOENT),
        (guest.ListFiles(path="/file"), errno.ENOTDIR),
        (guest.StatFile(path="/none"), errno.ENOENT),
        (guest.RemoveFile(path="/"), errno.EINVAL),
        (guest.RemoveFile(path="/dir/.."), errno.EINVAL),
        (guest.RemoveFile(path="/dir"), errno.ENOTEMPTY),
        (guest.RemoveFile(path="/none", recursive=True), errno.ENOENT),
        (guest.MakeDirectory(path="/file/x"), errno.ENOTDIR),
        (guest.MakeDirectory(path="/file"), errno.ENOTDIR),
        (guest.PackFiles(path="/none", name="x"), errno.ENOENT),
        (guest.PackFiles(path="/file", flags=CONTENTS), errno.ENOTDIR),
        (guest.UnpackFiles(path="/file"), errno.ENOTDIR),
    ],
)
def test_a_request_that_cannot_be_done_says_why(
    peer: Peer, root: Path, request_: guest.Files, error: int
) -> None:
    (root / "dir").mkdir()
    (root / "dir/inside").touch()
    (root / "file").touch()
    os.mkfifo(root / "fifo")
    assert fails(peer, request_) == error


def test_links_stay_inside_the_root(peer: Peer, root: Path, tmp_path: Path) -> None:
    (root / "etc").mkdir()
    (root / "absolute").symlink_to("/etc")
    (root / "up").symlink_to("../../../../../..")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "magic").symlink_to("/proc/self/root")
    assert fails(peer, guest.WriteContent(path="/absolute/x"), b"x") == 0
    assert (root / "etc/x").read_bytes() == b"x"
    assert read(peer, "/up/etc/x") == b"x"
    assert read(peer, "/../../etc/x") == b"x"
    assert fails(peer, guest.ReadFile(path="/out")) == errno.ENOENT
    assert fails(peer, guest.ReadFile(path="/magic/etc/passwd")) == errno.ENOENT
    assert fails(peer, guest.MakeDirectory(path="/up/made")) == 0
    assert (root / "made").is_dir()
    assert fails(peer, guest.RemoveFile(path="/up/made", recursive=True)) == 0
    assert (tmp_path / "secret").read_text() == "secret"


def test_a_link_is_removed_and_not_what_it_points_to(peer: Peer, root: Path) -> None:
    (root / "kept/inside").mkdir(parents=True)
    (root / "tree").mkdir()
    (root / "tree/link").symlink_to("/kept")
    (root / "tree/deep/er").mkdir(parents=True)
    assert fails(peer, guest.RemoveFile(path="/tree", recursive=True)) == 0
    assert os.listdir(root) == ["kept"]
    assert (root / "kept/inside").is_dir()


def test_stat_and_list_tell_everything(peer: Peer, root: Path) -> None:
    (root / "file").write_bytes(b"12345")
    os.chown(root / "file", 7, 8)
    os.utime(root / "file", ns=(0, 1_600_000_000_123_456_789))
    (root / "link").symlink_to("file")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    found = stat_of(peer, "/file")
    assert (found.name, found.size, found.uid, found.gid) == ("file", 5, 7, 8)
    assert found.mtime_ns == 1_600_000_000_123_456_789
    assert stat_of(peer, "/link").target == "file"
    assert stat_of(peer, "/link", follow=True).size == 5
    assert stat_of(peer, "/null").rdev == (1, 3)
    head, body = peer.files(guest.ListFiles(path="/"))
    assert head.errno == 0
    assert {f.name for f in guest_answers.decode_listing(body)} == {"file", "link", "null"}


# Archives.


def tree(top: Path) -> None:
    """Make one of everything below `top`."""
    (top / "dir").mkdir(parents=True)
    (top / "dir" / ("n" * 200)).write_bytes(b"long name")
    (top / "file").write_bytes(b"x" * 1000)
    os.chmod(top / "file", 0o4755)
    os.chown(top / "file", 3_000_000, 9)
    os.utime(top / "file", (1_500_000_000, 1_500_000_000))
    os.link(top / "file", top / "again")
    (top / "link").symlink_to("t" * 150)
    os.mkfifo(top / "fifo")
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.utime(top / "dir", (1_400_000_000, 1_400_000_000))


def described(top: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        s = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(s.st_mode) else b""
        target = os.readlink(path) if path.is_symlink() else ""
        links = s.st_nlink if stat.S_ISREG(s.st_mode) else 0
        times = int(s.st_mtime)
        found[str(path.relative_to(top))] = (
            s.st_mode, s.st_uid, s.st_gid, s.st_rdev, links, times, content, target,
        )  # fmt: skip
    return found


def test_a_packed_tree_is_what_tarfile_reads(peer: Peer, root: Path, tmp_path: Path) -> None:
    tree(root / "top")
    head, body = peer.files(guest.PackFiles(path="/top", name="renamed"))
    assert head.errno == 0
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        archive.extractall(tmp_path / "out", numeric_owner=True, filter="fully_trusted")
    assert described(tmp_path / "out/renamed") == described(root / "top")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_an_archive_of_tarfile_is_unpacked(
    peer: Peer, root: Path, tmp_path: Path, form: int
) -> None:
    tree(tmp_path / "from")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        archive.add(tmp_path / "from", arcname=".")
    (root / "to").mkdir()
    head, body = peer.files(guest.UnpackFiles(path="/to"), buffer.getvalue())
    assert head.errno == 0, head
    assert guest_answers.decode_count(body) == 7
    assert described(root / "to") == described(tmp_path / "from")


def test_what_is_packed_is_unpacked(peer: Peer, root: Path) -> None:
    tree(root / "from")
    (root / "to").mkdir()
    _, body = peer.files(guest.PackFiles(path="/from", flags=CONTENTS))
    head, _ = peer.files(guest.UnpackFiles(path="/to"), body)
    assert head.errno == 0, head
    assert described(root / "to") == described(root / "from")


def test_a_followed_link_is_packed_as_what_it_leads_to(peer: Peer, root: Path) -> None:
    (root / "file").write_bytes(b"content")
    (root / "link").symlink_to("file")
    _, body = peer.files(guest.PackFiles(path="/link", flags=FOLLOW, name="name"))
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        member = archive.extractfile("name")
        assert member is not None and member.read() == b"content"
    _, body = peer.files(guest.PackFiles(path="/link", name="name"))
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        assert archive.getmember("name").linkname == "file"


def archive_of(*members: tuple[str, bytes, str]) -> bytes:
    """Return a tar of (name, type, link) entries; files have a content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"evil"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "members",
    [
        [("../../secret", tarfile.REGTYPE, "")],
        [("/secret", tarfile.REGTYPE, "")],
        [("l", tarfile.SYMTYPE, "../.."), ("l/secret", tarfile.REGTYPE, "")],
        [("l", tarfile.SYMTYPE, "/"), ("l/../secret", tarfile.REGTYPE, "")],
        [("secret", tarfile.LNKTYPE, "../../secret"), ("secret", tarfile.REGTYPE, "")],
    ],
)
def test_an_archive_cannot_write_outside(
    peer: Peer, root: Path, tmp_path: Path, members: list[tuple[str, bytes, str]]
) -> None:
    (root / "to").mkdir()
    (root / "secret").write_text("inner")
    peer.files(guest.UnpackFiles(path="/to"), archive_of(*members))
    assert (tmp_path / "secret").read_text() == "secret"
    assert (root / "secret").read_text() == "inner"


def test_owners_may_be_set_for_all(peer: Peer, root: Path) -> None:
    data = archive_of(("a/b", tarfile.REGTYPE, ""))
    head, _ = peer.files(guest.UnpackFiles(path="/", uid=12, gid=13), data)
    assert head.errno == 0
    assert ((root / "a/b").stat().st_uid, (root / "a").stat().st_gid) == (12, 13)


def test_the_upper_directory_becomes_a_layer(peer: Peer, root: Path) -> None:
    # In these tests the root stands for the upper directory too.
    (root / "opaque").mkdir()
    os.setxattr(root / "opaque", "trusted.overlay.opaque", b"y")
    (root / "opaque/new").touch()
    os.mknod(root / "gone", stat.S_IFCHR, 0)
    head, body = peer.files(guest.PackUpper())
    assert head.errno == 0
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        names = archive.getnames()
    assert sorted(names) == [".wh.gone", "opaque", "opaque/.wh..wh..opq", "opaque/new"]


def test_requests_that_nobody_meant(peer: Peer, root: Path) -> None:
    dice = fuzzing.dice(5)
    good = guest.encode_files(guest.PackFiles(path="/", flags=0, name="x"))
    for _ in range(fuzzing.rounds(60)):
        data = bytearray(good)
        at = dice.randrange(4, len(data))
        data[at] = dice.randrange(256)
        channel = peer.open(guests.FILES)
        channel.write(bytes(data[: dice.randrange(len(data)) + 1]))
        channel.eof()
        channel.rest()
    assert peer.call(guest.Call.PING).errno == 0
    channel = peer.open(guests.FILES)
    channel.write(struct.pack("<I", 99))
    channel.eof()
    head = guest_answers.decode_files_head(channel.rest())
    assert head is not None and head.errno == errno.ENOSYS


def test_archives_that_nobody_meant(peer: Peer, root: Path, tmp_path: Path) -> None:
    dice = fuzzing.dice(6)
    tree(tmp_path / "from")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(tmp_path / "from", arcname="x")
    good = buffer.getvalue()
    for _ in range(fuzzing.rounds(80)):
        data = bytearray(good)
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        peer.files(guest.UnpackFiles(path="/"), bytes(data[: dice.randrange(len(data))]))
    assert peer.call(guest.Call.PING).errno == 0
