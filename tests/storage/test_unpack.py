"""Unpacking layers: everything a file can be, and nothing outside the root."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hutch.errors import Exhausted, HutchError, IntegrityError
from hutch.storage.tarstream import CHR, DIR, FIFO, LNK, REG, SYM
from hutch.storage.tarwrite import END, header
from hutch.storage.unpack import UnpackLimits, UnpackOptions
from tests.leaks import open_files
from tests.requires import requires
from tests.storage.tars import (
    directory,
    file,
    hard_link,
    python_tar,
    raw_header,
    symlink,
    unpack_bytes,
)

COMPRESSORS = {
    "plain": bytes,
    "gzip": gzip.compress,
    "gzip in two members": lambda d: gzip.compress(d[:700]) + gzip.compress(d[700:]),
    "gzip with padding": lambda d: gzip.compress(d) + bytes(100),
    "zstd": lambda d: zstandard.ZstdCompressor().compress(d),
    "zstd in two frames": lambda d: b"".join(
        zstandard.ZstdCompressor().compress(part) for part in (d[:700], d[700:])
    ),
    "zstd after a skippable frame": lambda d: (
        b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.ZstdCompressor().compress(d)
    ),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("how", COMPRESSORS)
def test_a_layer_is_digested_and_unpacked_whatever_its_compression(
    how: str, tmp_path: Path
) -> None:
    data = directory("d") + file("d/f", b"hello" * 500) + END
    compressed = COMPRESSORS[how](data)  # type: ignore[operator]
    result = unpack_bytes(compressed, tmp_path / "out")
    assert result.diff_id == "sha256:" + hashlib.sha256(data).hexdigest()
    assert (result.size, result.entries) == (len(data), 2)
    assert (tmp_path / "out/d/f").read_bytes() == b"hello" * 500


@pytest.mark.parametrize("how", ["gzip", "xz", "bzip2"])
@pytest.mark.parametrize("damage", ["cut", "flip", "tail"])
def test_a_damaged_stream_is_refused(how: str, damage: str, tmp_path: Path) -> None:
    data = bytearray(COMPRESSORS[how](file("f", os.urandom(3000)) + END))  # type: ignore[operator]
    if damage == "cut":
        del data[-5:]
    elif damage == "flip":
        data[len(data) // 2] ^= 0x55
    else:
        data += b"garbage"
    with pytest.raises(IntegrityError):
        unpack_bytes(bytes(data), tmp_path / "out")


def test_a_wrong_diff_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="expected sha256:00"):
        unpack_bytes(file("f") + END, tmp_path / "out", diff_id="sha256:" + "0" * 64)


def test_bytes_after_the_end_count_for_the_digest(tmp_path: Path) -> None:
    data = file("f", b"1") + END + bytes(8192)
    result = unpack_bytes(data, tmp_path / "out")
    assert result.diff_id == "sha256:" + hashlib.sha256(data).hexdigest()


# ---- what files are ---------------------------------------------------------------------


def describe(root: Path) -> dict[str, tuple[object, ...]]:
    """Return everything there is to compare of a tree."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        st_ = path.lstat()
        kind = stat.S_IFMT(st_.st_mode)
        extra: object = None
        if kind == stat.S_IFREG:
            extra = (path.read_bytes(), st_.st_nlink)
        elif kind == stat.S_IFLNK:
            extra = os.readlink(path)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            extra = st_.st_rdev
        xattrs = {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
        }
        found[str(path.relative_to(root))] = (
            st_.st_mode,
            st_.st_uid,
            st_.st_gid,
            st_.st_mtime_ns // 10**9,
            extra,
            xattrs,
        )
    return found


def make_everything(root: Path) -> None:
    root.mkdir()
    (root / "etc").mkdir(mode=0o755)
    (root / "etc/passwd").write_text("root:x:0:0\n")
    (root / ("long-" * 30)).mkdir()
    (root / ("long-" * 30) / ("name-" * 40)).write_bytes(b"deep")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "locked").mkdir()
    (root / "locked/inside").write_text("x")
    (root / "locked").chmod(0o500)
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "dangling").symlink_to("no/where")
    (
        root / "unicode-é-\udcff".encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    ).touch()
    os.link(root / "etc/passwd", root / "etc/passwd-")
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chmod(root / "null", 0o666)
    os.mknod(root / "loop", stat.S_IFBLK | 0o660, os.makedev(7, 0))
    (root / "mail").mkdir()
    os.chown(root / "mail", 0, 8)
    (root / "mail").chmod(0o2775)
    (root / "mail/box").write_text("mine")
    os.chown(root / "mail/box", 0, 0)
    program = root / "program"
    program.write_bytes(b"\x7fELF")
    os.chown(program, 1000, 2_500_000)
    program.chmod(0o6755)
    capable = root / "capable"
    capable.write_bytes(b"ping")
    os.setxattr(
        capable, "security.capability", bytes.fromhex("0100000200200000000000000000000000000000")
    )
    os.setxattr(root / "etc", "user.note", b"hello\nworld=1")
    with open(root / "sparse", "wb") as sparse:
        sparse.seek(50 << 20)
        sparse.write(b"end")
    for path in (root / "etc", root / "tmp", root / "etc/passwd", root / "null"):
        os.utime(path, (1_000_000_000, 1_234_567_890))
    os.utime(root / "dangling", (1, 1_111_111_111), follow_symlinks=False)


@requires("root")
@pytest.mark.parametrize("form", ["gnu", "posix"])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_gnu_tar_and_we_see_the_same_files(form: str, umask: int, tmp_path: Path) -> None:
    make_everything(tmp_path / "in")
    more = ["--xattrs", "--xattrs-include=*"] if form == "posix" else []
    command = ["tar", "-cS", f"--format={form}", *more, "-C", str(tmp_path / "in"), "."]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    assert len(data) < 1 << 20
    before = os.umask(umask)
    try:
        unpack_bytes(data, tmp_path / "out")
    finally:
        os.umask(before)
    expected, found = describe(tmp_path / "in"), describe(tmp_path / "out")
    if form == "gnu":
        for name in ("capable", "etc"):
            expected[name] = (*expected[name][:-1], {})
    assert found == expected
    assert (tmp_path / "out/sparse").stat().st_blocks < 1000


@requires("root")
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_python_and_we_see_the_same_files(format: int, tmp_path: Path) -> None:
    make_everything(tmp_path / "in")
    os.truncate(tmp_path / "in/sparse", 5000)
    for name in ("capable", "etc"):
        for attribute in os.listxattr(tmp_path / "in" / name):
            os.removexattr(tmp_path / "in" / name, attribute)
    unpack_bytes(python_tar(tmp_path / "in", format), tmp_path / "out")
    assert describe(tmp_path / "out") == describe(tmp_path / "in")


@requires("root")
def test_owners_are_right_beneath_set_group_id_directories(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    data = (
        directory("mail", mode=0o2775, gid=8)
        + directory("mail/sub", gid=0)
        + file("mail/box", gid=0)
        + END
    )
    unpack_bytes(data, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out/mail").stat().st_mode) == 0o2775
    assert [(tmp_path / "out" / n).stat().st_gid for n in ("mail", "mail/sub", "mail/box")] == [
        8,
        0,
        0,
    ]


@requires("root")
def test_the_root_entry_gives_the_root_its_mode_and_time(tmp_path: Path) -> None:
    unpack_bytes(directory("./", mode=0o711, mtime=1000) + file("./a") + END, tmp_path / "out")
    found = (tmp_path / "out").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime) == (0o711, 1000)


def test_overlayfs_and_security_module_attributes_are_not_taken(tmp_path: Path) -> None:
    attributes = {
        b"SCHILY.xattr.trusted.overlay.redirect": b"/etc",
        b"SCHILY.xattr.trusted.overlay.opaque": b"y",
        b"SCHILY.xattr.user.overlay.opaque": b"y",
        b"SCHILY.xattr.security.selinux": b"x",
        b"SCHILY.xattr.security.ima": b"x",
    }
    unpack_bytes(header(b"d/", DIR, mode=0o755, pax=attributes) + END, tmp_path / "out")
    assert os.listxattr(tmp_path / "out/d") == []


# ---- the same name twice ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([file("a", b"1"), file("a", b"2")], "file 2"),
        ([directory("a"), file("a/b"), file("a", b"2")], "file 2"),
        ([file("a", b"1"), directory("a")], "directory"),
        ([symlink("a", "etc"), directory("etc"), directory("a")], "directory"),
        ([symlink("a", "etc"), file("a", b"2")], "file 2"),
        ([file("a", b"1"), symlink("a", "b")], "link b"),
        ([directory("a"), file("a/x"), directory("a")], "directory"),
        ([file("b", b"2"), directory("a"), file("a/x"), hard_link("a", "b")], "file 2"),
        ([file("b", b"2"), hard_link("a", "b"), hard_link("a", "b")], "file 2"),
    ],
)
def test_the_last_entry_of_a_name_stays(
    entries: list[bytes], expected: str, tmp_path: Path
) -> None:
    unpack_bytes(b"".join(entries) + END, tmp_path / "out")
    path = tmp_path / "out/a"
    if path.is_symlink():
        found = f"link {os.readlink(path)}"
    elif path.is_dir():
        found = "directory"
    else:
        found = f"file {path.read_text()}"
    assert found == expected


def test_missing_parents_are_made_and_told(tmp_path: Path) -> None:
    result = unpack_bytes(file("a/b/c") + directory("a/b") + END, tmp_path / "out")
    assert result.implicit == (b"a",)
    assert stat.S_IMODE((tmp_path / "out/a").stat().st_mode) == 0o755


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_last_mode_of_a_directory_counts(umask: int, tmp_path: Path) -> None:
    data = file("a/x") + directory("a", mode=0o700) + directory("b") + directory("b", mode=0o700)
    before = os.umask(umask)
    try:
        unpack_bytes(data + file("c/x") + END, tmp_path / "out")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / "out" / n).stat().st_mode) for n in "abc"]
    assert modes == [0o700, 0o700, 0o755]


def test_entries_beneath_a_linked_directory_go_where_it_leads(tmp_path: Path) -> None:
    data = directory("usr/bin") + symlink("bin", "/usr/bin") + file("bin/sh", b"x") + END
    unpack_bytes(data, tmp_path / "out")
    assert (tmp_path / "out/usr/bin/sh").read_bytes() == b"x"
    assert (tmp_path / "out/bin").is_symlink()


# ---- attacks -----------------------------------------------------------------------------


def escapes(outside: Path) -> dict[str, bytes]:
    out = str(outside)
    up = "../" * 40
    return {
        "dot-dot": file("../escaped", b"x"),
        "dot-dot inside": file("a/../../escaped", b"x"),
        "many dot-dots": file(f"{up}{out}/escaped", b"x"),
        "absolute": file(f"{out}/escaped", b"x"),
        "link to outside, then through it": symlink("l", out) + file("l/escaped", b"x"),
        "relative link to outside": symlink("l", f"{up}{out}") + file("l/escaped", b"x"),
        "chain of links": symlink("a", up) + symlink("b", "a") + file(f"b{out}/escaped", b"x"),
        "link in place of a directory": directory("d")
        + file("d/one")
        + symlink("d", out)
        + file("d/escaped", b"x"),
        "write through a link": symlink("l", f"{out}/target") + file("l", b"overwritten"),
        "hard link to outside": hard_link("h", f"{out}/target") + file("h", b"overwritten"),
        "hard link by dot-dot": hard_link("h", f"{up}{out}/target"),
        "hard link through a link": symlink("l", out) + hard_link("h", "l/target"),
        "hard link to a link": symlink("l", f"{out}/target")
        + hard_link("h", "l")
        + file("h", b"x"),
        "directory over a link": symlink("l", out) + directory("l", mode=0o777),
        "fifo through a link": symlink("l", out) + header(b"l/escaped", FIFO),
        "whiteout through a link": symlink("l", out) + file("l/.wh.target"),
        "opaque through a link": symlink("l", out) + file("l/.wh..wh..opq"),
        "whiteout of dot-dot": file(".wh..."),
        "whiteout of dot": file(".wh.."),
        "whiteout of nothing": file(".wh."),
        "proc": symlink("l", "/proc/self/root") + file(f"l{out}/escaped", b"x"),
        "proc cwd": symlink("l", "/proc/self/cwd") + file("l/escaped", b"x"),
        "link to itself": symlink("l", "l") + file("l/escaped", b"x"),
        "dangling parent": symlink("l", "nowhere") + file("l/escaped", b"x"),
        "NUL in a name": header(b"x", REG, pax={b"path": b"a\0b"}),
        "NUL in a target": header(b"x", SYM, pax={b"linkpath": b"a\0b"}),
        "name of dots": file(".."),
        "file as the root": file(".", b"x"),
        "link as the root": symlink("./", out),
        "empty link": header(b"x", SYM),
        "link to the root": hard_link("x", "/"),
        "missing target": hard_link("x", "y"),
        "target is a directory": directory("d") + hard_link("x", "d"),
        "very long part": file("x" * 300),
        "set group id of outside": symlink("l", out) + directory("l/", mode=0o2777),
        "owner out of range": header(b"x", REG, pax={b"uid": b"99999999999"}),
    }


@pytest.mark.parametrize("attack", sorted(escapes(Path("/x"))))
def test_no_archive_reaches_outside(attack: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "target").write_bytes(b"precious")
    before = describe(tmp_path)
    mode = outside.stat().st_mode
    try:
        unpack_bytes(escapes(outside)[attack] + END, tmp_path / "out")
    except IntegrityError:
        pass
    subprocess.run(["rm", "-rf", str(tmp_path / "out")], check=True)
    assert describe(tmp_path) == before
    assert outside.stat().st_mode == mode


names = st.lists(
    st.sampled_from(["a", "b", "..", ".", "", "l", ".wh.a", ".wh..wh..opq", "outside"]),
    min_size=1,
    max_size=5,
).map("/".join)
entries = st.one_of(
    st.builds(lambda n: file(n or "x", b"evil"), names),
    st.builds(lambda n: directory(n or "x"), names),
    st.builds(lambda n, t: symlink(n or "x", t or "y"), names, names),
    st.builds(lambda n, t: symlink(n or "x", "/" + t), names, names),
    st.builds(lambda n, t: hard_link(n or "x", t or "y"), names, names),
    st.builds(lambda n: header((n or "x").encode(), FIFO), names),
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=st.lists(entries, min_size=1, max_size=12))
def test_no_mixture_of_entries_reaches_outside(parts: list[bytes], tmp_path: Path) -> None:
    work = tmp_path / os.urandom(8).hex()
    (work / "outside").mkdir(parents=True)
    (work / "outside/a").write_bytes(b"precious")
    try:
        unpack_bytes(b"".join(parts) + END, work / "out")
    except HutchError as error:
        assert isinstance(error, IntegrityError)
    assert sorted(os.listdir(work)) == ["out", "outside"]
    assert os.listdir(work / "outside") == ["a"]
    assert (work / "outside/a").read_bytes() == b"precious"
    assert (work / "outside/a").stat().st_nlink == 1
    shutil.rmtree(work)


numbers = st.one_of(
    st.binary(min_size=12, max_size=12),
    st.integers(0, (1 << 88) - 1).map(lambda n: b"\x80" + n.to_bytes(11, "big")),
    st.integers(0, (1 << 56) - 1).map(lambda n: b"\x80" + n.to_bytes(7, "big")),
    st.integers(0, 8**7 - 1).map(lambda n: b"%07o\0" % n),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from([REG, LNK, SYM, b"3", b"4", DIR, FIFO, b"S", b"\0", b"7"]),
    fields=st.dictionaries(
        st.sampled_from(["mode", "uid", "gid", "mtime", "devmajor", "devminor", "size"]), numbers
    ),
    texts=st.dictionaries(
        st.sampled_from(["name", "linkname", "prefix", "magic"]), st.binary(max_size=155)
    ),
)
@example(kind=b"3", fields={"devmajor": b"\x80" + (1 << 50).to_bytes(7, "big")}, texts={})
@example(kind=b"4", fields={"devminor": b"\x80" + (1 << 32).to_bytes(7, "big")}, texts={})
def test_any_header_is_unpacked_or_refused(
    kind: bytes, fields: dict[str, bytes], texts: dict[str, bytes], tmp_path: Path
) -> None:
    try:
        unpack_bytes(raw_header(kind, **fields, **texts) + END, tmp_path / os.urandom(8).hex())
    except HutchError as error:
        assert isinstance(error, (IntegrityError, Exhausted)), error


@requires("root")
@pytest.mark.parametrize("size", [5_000, 65_000, 70_000])
def test_an_attribute_too_large_for_the_file_system_is_not_a_full_disk(
    size: int, tmp_path: Path
) -> None:
    entry = header(b"x", REG, pax={b"SCHILY.xattr.user.a": bytes(size)})
    try:
        unpack_bytes(entry + END, tmp_path / "out")
    except Exhausted as error:
        assert f"'user.a' of {size} bytes" in error.message
        assert "prune" not in str(error.hint)
    else:
        assert os.getxattr(tmp_path / "out/x", "user.a") == bytes(size)


@requires("root")
def test_an_attribute_that_the_kernel_refuses_is_named(tmp_path: Path) -> None:
    entry = header(b"x", REG, pax={b"SCHILY.xattr.security.capability": b"no capability"})
    with pytest.raises(IntegrityError, match=r"'security\.capability'"):
        unpack_bytes(entry + END, tmp_path / "out")


# ---- limits ------------------------------------------------------------------------------


def bomb() -> bytes:
    return gzip.compress(header(b"zeros", REG, size=64 << 20) + bytes(64 << 20) + END)


@pytest.mark.parametrize(
    ("data", "limits", "named"),
    [
        (bomb(), UnpackLimits(max_bytes=1 << 20), "max_bytes"),
        (bomb(), UnpackLimits(max_ratio=20, ratio_floor=1 << 20), "max_ratio"),
        (b"".join(file(f"f{i}") for i in range(20)) + END, UnpackLimits(max_entries=10), "entries"),
        (file("/".join("d" * 50)) + END, UnpackLimits(max_entries=20), "entries"),
        (file("/".join("d" * 50)) + END, UnpackLimits(max_depth=20), "max_depth"),
        (file("/".join(["d" * 200] * 30)) + END, UnpackLimits(), "max_path"),
    ],
    ids=["bytes", "ratio", "entries", "parents", "depth", "path"],
)
def test_a_bomb_meets_the_limit(
    data: bytes, limits: UnpackLimits, named: str, tmp_path: Path
) -> None:
    with pytest.raises(Exhausted, match=named):
        unpack_bytes(data, tmp_path / "out", limits=limits)
    used = sum(p.lstat().st_blocks * 512 for p in tmp_path.rglob("*"))
    assert used < 32 << 20


@requires("root")
@pytest.mark.integration
def test_a_full_disk_is_said_with_a_cure(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(small)], check=True)
    try:
        with pytest.raises(Exhausted, match="no space left") as caught:
            unpack_bytes(file("big", bytes(4 << 20)) + END, small / "out")
        assert caught.value.hint
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ---- whiteouts ---------------------------------------------------------------------------


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A lower tree and a place to mount it under a layer."""
    lower = tmp_path / "lower"
    (lower / "dir/sub").mkdir(parents=True)
    for name in ("keep", "gone", "dir/old", "dir/sub/deep"):
        (lower / name).write_text("lower")
    return tmp_path


def merged(base: Path) -> list[str]:
    mounted = base / "merged"
    mounted.mkdir()
    options = f"lowerdir={base / 'out'}:{base / 'lower'}"
    subprocess.run(["mount", "-t", "overlay", "o", "-o", options, str(mounted)], check=True)
    try:
        return sorted(str(p.relative_to(mounted)) for p in mounted.rglob("*"))
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


ALL = ["dir", "dir/old", "dir/sub", "dir/sub/deep", "gone", "keep"]


@requires("root", "overlayfs")
@pytest.mark.integration
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (file(".wh.gone"), [n for n in ALL if n != "gone"]),
        (file("dir/.wh.sub"), ["dir", "dir/old", "gone", "keep"]),
        (directory("dir") + file("dir/.wh..wh..opq"), ["dir", "gone", "keep"]),
        (file("dir/.wh..wh..opq") + file("dir/new"), ["dir", "dir/new", "gone", "keep"]),
        (file("dir/new") + file("dir/.wh..wh..opq"), ["dir", "dir/new", "gone", "keep"]),
        (file(".wh.dir") + file("dir/new"), ["dir", "dir/new", "gone", "keep"]),
        (file(".wh.dir") + directory("dir"), ["dir", "gone", "keep"]),
        (directory("dir") + file("dir/new") + file(".wh.dir"), ["dir", "dir/new", "gone", "keep"]),
        (file("gone", b"new") + file(".wh.gone"), ALL),
        (file(".wh.gone") + file("gone", b"new"), ALL),
        (file(".wh..wh.plnk") + file(".wh..wh.aufs"), ALL),
    ],
)
def test_whiteouts_hide_what_is_below_and_only_that(
    layer: bytes, expected: list[str], overlay: Path
) -> None:
    unpack_bytes(layer + END, overlay / "out")
    assert merged(overlay) == expected


@requires("root")
def test_without_root_opaque_directories_are_marked_for_user_xattrs(tmp_path: Path) -> None:
    data = file("d/.wh..wh..opq") + file(".wh.x") + header(b"null", CHR, device=(1, 3)) + END
    unpack_bytes(data, tmp_path / "out", options=UnpackOptions(userxattr=True))
    assert os.getxattr(tmp_path / "out/d", "user.overlay.opaque") == b"y"
    hidden = (tmp_path / "out/x").lstat()
    assert stat.S_ISCHR(hidden.st_mode) and hidden.st_rdev == 0


UNPRIVILEGED = """
import os, sys
sys.path.insert(0, {src!r})
from hutch.storage.unpack import unpack, UnpackOptions
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
fd = os.open({out!r}, os.O_RDONLY)
options = UnpackOptions(userxattr=True, ignore_chown_errors=True)
unpack(open({tar!r}, "rb"), fd, options=options)
"""


@requires("root")
def test_an_ordinary_user_can_unpack_what_the_kernel_lets_him(tmp_path: Path) -> None:
    import sys

    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        if parent != Path("/tmp"):
            parent.chmod(0o755)
    out, tar = tmp_path / "out", tmp_path / "layer.tar"
    out.mkdir()
    os.chown(out, 65534, 65534)
    tar.write_bytes(
        directory("closed", mode=0o500, uid=0)
        + file("closed/f", b"x", mode=0o4755, uid=0)
        + header(b"null", CHR, device=(1, 3))
        + file(".wh.gone")
        + file("closed/.wh..wh..opq")
        + END
    )
    src = str(Path(__file__).parents[2] / "src")
    script = UNPRIVILEGED.format(src=src, out=str(out), tar=str(tar))
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (out / "closed/f").read_bytes() == b"x"
    assert stat.S_IMODE((out / "closed").stat().st_mode) == 0o500
    assert not (out / "null").exists()
    assert stat.S_ISCHR((out / "gone").lstat().st_mode)


def test_nothing_stays_open(tmp_path: Path) -> None:
    data = b"".join(file(f"{i}/{i}/f") for i in range(70))
    unpack_bytes(data + END, tmp_path / "a")
    with pytest.raises(IntegrityError):
        unpack_bytes(data + hard_link("x", "y") + END, tmp_path / "b")
    assert [name for name in open_files() if name.startswith(str(tmp_path))] == []


def test_reading_ahead_ends_with_the_extraction(tmp_path: Path) -> None:
    class Endless(io.RawIOBase):
        def read(self, size: int = -1, /) -> bytes:
            return b"\xff" * size

    import threading

    (tmp_path / "out").mkdir()
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    from hutch.storage.unpack import unpack

    with pytest.raises(IntegrityError):
        unpack(Endless(), fd)
    os.close(fd)
    for thread in threading.enumerate():
        if thread.name == "hutch-unpack":
            thread.join(60)
            assert not thread.is_alive()
