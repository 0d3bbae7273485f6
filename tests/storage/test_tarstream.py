"""Reading tar streams: every dialect, every damage."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.errors import IntegrityError
from hutch.storage.tarstream import CHR, DIR, LNK, REG, SYM, Entry, TarReader
from hutch.storage.tarwrite import END, header, padding
from tests.storage import tars


def chunked(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def content(reader: TarReader) -> bytes:
    parts = []
    while piece := reader.piece():
        parts.append(bytes(piece))
    return b"".join(parts)


def read_all(data: bytes, size: int = 1 << 20) -> list[tuple[Entry, bytes]]:
    reader = TarReader(chunked(data, size))
    return [(entry, content(reader)) for entry in reader]


@pytest.mark.parametrize("chunk", [1, 7, 511, 512, 513, 4096, 1 << 20])
def test_entries_are_the_same_whatever_the_chunks(chunk: int) -> None:
    data = tars.file("a", b"x" * 1000) + tars.directory("d/") + tars.file("d/b", b"y") + END
    entries = read_all(data, chunk)
    assert [(e.name, e.type, c) for e, c in entries] == [
        (b"a", REG, b"x" * 1000),
        (b"d/", DIR, b""),
        (b"d/b", REG, b"y"),
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_python_are_read(format: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name in ("short", "d" * 60 + "/" + "n" * 90):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uid, info.gid, info.mtime = 3, 0o4711, 7, 8, 1234567890
            archive.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "short"
        archive.addfile(link)
    entries = read_all(buffer.getvalue())
    assert [e.name for e, _ in entries] == [b"short", b"d" * 60 + b"/" + b"n" * 90, b"link"]
    first = entries[0][0]
    assert (first.mode, first.uid, first.gid) == (0o4711, 7, 8)
    assert first.mtime_ns == 1234567890 * 10**9
    assert (entries[2][0].type, entries[2][0].linkname) == (SYM, b"short")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_does_not_fit_the_old_header_is_read(format: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        info = tarfile.TarInfo("é" * 200)
        info.uid, info.gid, info.mtime = 3_000_000_000, 2_500_000, -5
        archive.addfile(info)
        link = tarfile.TarInfo("l")
        link.type, link.linkname = tarfile.LNKTYPE, "x" * 300
        archive.addfile(link)
    (first, _), (second, _) = read_all(buffer.getvalue())
    assert first.name == ("é" * 200).encode()
    assert (first.uid, first.gid, first.mtime_ns) == (3_000_000_000, 2_500_000, -5 * 10**9)
    assert (second.type, second.linkname) == (LNK, b"x" * 300)


def test_times_of_pax_keep_their_nanoseconds() -> None:
    block = header(b"f", REG, pax={b"mtime": b"1700000000.123456789"})
    assert read_all(block + END)[0][0].mtime_ns == 1700000000123456789


@pytest.mark.parametrize("form", ["gnu", "posix 0.0", "posix 0.1", "posix 1.0"])
def test_sparse_files_of_gnu_tar_are_read(form: str, tmp_path: Path) -> None:
    source = tmp_path / "hole"
    with open(source, "wb") as f:
        for index in range(40):
            f.seek(index * 200_000)
            f.write(b"%05d" % index * 1000)
        f.truncate(9_000_000)
    kind, _, version = form.partition(" ")
    command = ["tar", "-cSf", "-", "-C", str(tmp_path), f"--format={kind}"]
    if version:
        command.append(f"--sparse-version={version}")
    data = subprocess.run([*command, "hole"], capture_output=True, check=True).stdout
    assert len(data) < 1_000_000
    reader = TarReader(chunked(data, 10_000))
    entry = next(reader)
    assert (entry.name, entry.size) == (b"hole", 9_000_000)
    plain = bytearray(entry.size)
    for offset, length in entry.sparse or ():
        at = offset
        while at < offset + length:
            piece = reader.piece(offset + length - at)
            plain[at : at + len(piece)] = piece
            at += len(piece)
    assert bytes(plain) == source.read_bytes()
    with pytest.raises(StopIteration):
        next(reader)


def test_an_archive_without_its_end_marker_is_read() -> None:
    assert len(read_all(tars.file("a", b"1"))) == 1


def test_a_link_that_states_a_size_has_no_data() -> None:
    data = header(b"l", LNK, linkname=b"a", size=5000) + tars.file("b", b"2") + END
    assert [e.name for e, _ in read_all(data)] == [b"l", b"b"]


def test_global_headers_are_passed_over() -> None:
    body = b"22 comment=0123456789\n"
    data = header(b"pax_global_header", b"g", size=len(body)) + body + padding(len(body))
    assert [e.name for e, _ in read_all(data + tars.file("a") + END)] == [b"a"]


def test_devices_keep_their_numbers() -> None:
    (entry, _), *_ = read_all(header(b"null", CHR, device=(1, 3)) + END)
    assert (entry.devmajor, entry.devminor) == (1, 3)


def pax(records: bytes) -> bytes:
    body = header(b"x", b"x", size=len(records)) + records + padding(len(records))
    return body + tars.file("a", b"1") + END


@pytest.mark.parametrize(
    "data",
    [
        tars.file("a", b"x" * 600)[:700],
        tars.file("a", b"x" * 600)[:-1],
        tars.file("a")[:100],
        b"not a tar at all" * 64,
        b"\x01" + tars.file("a")[1:] + END,
        bytes(512) + tars.file("a") + END,
        header(b"a", b"?") + END,
        header(b"x", b"x", size=2 << 20) + bytes(2 << 20) + END,
        pax(b"nonsense"),
        pax(b"9999 path=a\n"),
        pax(b"-1 path=a\n"),
        pax(b"5 a=b\n"),
        pax(b"6 a=b\nX"),
        pax(b"6 nokey\n"),
        pax(b"12 size=-12\n"),
        pax(b"25 size=9999999999999999\n"),
        pax(b"13 mtime=1e9\n"),
        pax(b"17 uid=0x1000000\n"),
    ],
    ids=range(18),
)
def test_damage_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        read_all(data)


@pytest.mark.parametrize(
    "records",
    [
        {b"GNU.sparse.map": b"0,10,5,10", b"GNU.sparse.size": b"100"},
        {b"GNU.sparse.map": b"0,1", b"GNU.sparse.size": b"0"},
        {b"GNU.sparse.map": b"0", b"GNU.sparse.size": b"10"},
        {b"GNU.sparse.map": b"0,999999999999", b"GNU.sparse.size": b"10"},
        {b"GNU.sparse.map": b"x,y", b"GNU.sparse.size": b"10"},
        {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"9"},
    ],
    ids=range(6),
)
def test_sparse_maps_that_lie_are_refused(records: dict[bytes, bytes]) -> None:
    data = header(b"a", REG, size=512, pax=records) + b"7\n" * 256 + END
    with pytest.raises(IntegrityError):
        read_all(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_gives_entries_or_an_integrity_error(data: st.DataObject) -> None:
    archive = bytearray(
        tars.file("a/" + "n" * 150, b"x" * 700, uid=3_000_000)
        + tars.symlink("s", "y" * 200)
        + header(b"p", REG, pax={b"GNU.sparse.map": b"0,0", b"GNU.sparse.size": b"9"})
        + END
    )
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(archive) - 1))
        archive[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(archive)))
    # Checksums are put right again, so that what is behind them is reached.
    for start in range(0, len(archive) - 511, 512):
        if archive[start + 257 : start + 262] == b"ustar":
            archive[start + 148 : start + 156] = b" " * 8
            archive[start + 148 : start + 156] = b"%06o\0 " % sum(archive[start : start + 512])
    try:
        read_all(bytes(archive[:cut]), data.draw(st.sampled_from([100, 512, 1 << 20])))
    except IntegrityError:
        pass


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=4096))
def test_noise_is_never_more_than_an_integrity_error(noise: bytes) -> None:
    try:
        read_all(noise)
    except IntegrityError:
        pass


@settings(max_examples=100, deadline=None)
@given(
    name=st.binary(min_size=1, max_size=300).filter(lambda n: b"\0" not in n),
    link=st.binary(min_size=1, max_size=300).filter(lambda n: b"\0" not in n),
    uid=st.integers(0, 2**32 - 2),
    size=st.integers(0, 3000),
    mtime=st.integers(-(2**40), 2**40),
)
def test_what_is_written_is_read_back(
    name: bytes, link: bytes, uid: int, size: int, mtime: int
) -> None:
    data = os.urandom(size)
    archive = (
        header(name, REG, uid=uid, gid=uid, size=size, mtime=mtime)
        + data
        + padding(size)
        + header(name, SYM, linkname=link)
        + END
    )
    (first, found), (second, _) = read_all(archive)
    assert (first.name, first.uid, first.gid, found) == (name, uid, uid, data)
    assert first.mtime_ns == mtime * 10**9
    assert (second.name, second.linkname) == (name, link)
