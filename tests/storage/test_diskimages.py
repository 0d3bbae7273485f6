"""Disk images of other formats: in and out, with nothing of the host's read along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hutch.errors import AlreadyExists, Busy, HutchError, IntegrityError, InvalidArgument, NotFound
from hutch.records import ProgressEvent
from hutch.storage.diskimages import (
    FORMATS,
    DiskFormat,
    convert_disk,
    create_disk,
    disk_info,
    import_disk,
)
from hutch.storage.diskkeys import DiskKey
from tests.requires import requires

pytestmark = requires("qemu-img")
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw disk of 16 MiB with a little in it."""
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(16 * MIB)
        for at in (0, 5 * MIB, 16 * MIB - 512):
            file.seek(at)
            file.write(os.urandom(512))
    return path


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "luks"])
def test_a_disk_goes_out_and_comes_back(disk: Path, tmp_path: Path, format: DiskFormat) -> None:
    out = convert_disk(str(disk), str(tmp_path / "out"), source_format="raw", format=format)
    assert (out.format, out.references) == (format, ())
    assert out.size == 16 * MIB
    assert out.allocated < 8 * MIB
    back = import_disk(out.path, str(tmp_path / "back"))
    assert back.format == "raw"
    assert Path(back.path).read_bytes() == disk.read_bytes()
    assert back.allocated < 2 * MIB
    assert sorted(os.listdir(tmp_path)) == ["back", "disk.raw", "out"]


def test_a_disk_is_compressed_where_the_format_can(disk: Path, tmp_path: Path) -> None:
    with open(disk, "r+b") as file:
        file.seek(MIB)
        file.write(b"again and again " * 65536)
    sizes = [
        convert_disk(
            *(str(disk), str(tmp_path / f"{compress}")),
            source_format="raw",
            format="qcow2",
            compress=compress,
        ).allocated
        for compress in (False, True)
    ]
    assert sizes[1] < sizes[0] / 2
    with pytest.raises(InvalidArgument, match="compress: only qcow2"):
        convert_disk(
            str(disk), str(tmp_path / "x"), source_format="raw", format="raw", compress=True
        )


def test_progress_is_told_and_ends_at_the_whole(disk: Path, tmp_path: Path) -> None:
    seen: list[ProgressEvent] = []
    convert_disk(
        str(disk), str(tmp_path / "x"), source_format="raw", format="qcow2", progress=seen.append
    )
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (100, 100, "%")


@pytest.mark.parametrize("kind", ["backing", "data", "extent", "raw-backing"])
def test_an_image_that_names_further_files_is_refused(tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret".ljust(MIB, b"\0"))
    evil = tmp_path / "evil"
    if kind == "backing":
        qemu_img("create", "-f", "qcow2", "-b", secret, "-F", "raw", evil)
    elif kind == "raw-backing":
        qemu_img("create", "-f", "qcow2", evil, "1M")
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", "/nowhere/at/all", "-F", "raw", evil)
    elif kind == "data":
        qemu_img("create", "-f", "qcow2", "-o", f"data_file={secret},data_file_raw=on", evil, "1M")
    else:
        qemu_img("create", "-f", "vmdk", "-o", "subformat=monolithicFlat", evil, "1M")
    with pytest.raises((InvalidArgument, IntegrityError)) as told:
        import_disk(str(evil), str(tmp_path / "in"))
    assert "further files" in told.value.message or kind == "raw-backing"
    assert not (tmp_path / "in").exists()


def test_a_raw_disk_that_pretends_to_be_qcow2_stays_raw(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", tmp_path / "disk", "1M")
    plain = (tmp_path / "disk").read_bytes()
    import_disk(str(tmp_path / "disk"), str(tmp_path / "in"), source_format="raw")
    assert (tmp_path / "in").read_bytes()[: len(plain)] == plain


def test_a_name_that_is_taken_is_left_alone(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"precious")
    with pytest.raises(AlreadyExists):
        convert_disk(str(disk), str(tmp_path / "out"), source_format="raw", format="qcow2")
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_what_is_not_there_is_told(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        disk_info("nbd://localhost/x")
    with pytest.raises(NotFound, match="no such file or directory"):
        convert_disk(str(disk), str(tmp_path / "no/out"), source_format="raw", format="qcow2")


def test_a_damaged_image_is_told_and_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    convert_disk(str(disk), str(tmp_path / "q"), source_format="raw", format="qcow2")
    with open(tmp_path / "q", "r+b") as file:
        file.seek(40)  # the offset of the table of clusters
        file.write(b"\xff" * 8)
    with pytest.raises(HutchError) as told:
        import_disk(str(tmp_path / "q"), str(tmp_path / "in"))
    assert isinstance(told.value, IntegrityError)
    assert sorted(os.listdir(tmp_path)) == ["disk.raw", "q"]


def test_a_format_that_is_not_known_is_refused(disk: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-O", "qcow", disk, tmp_path / "old")
    with pytest.raises(InvalidArgument, match=r"expected raw, qcow2, vmdk, .*, got qcow"):
        import_disk(str(tmp_path / "old"), str(tmp_path / "in"))


@requires("qemu")
@pytest.mark.integration
def test_a_disk_that_a_machine_writes_to_is_not_copied(disk: Path, tmp_path: Path) -> None:
    machine = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-M", "q35", "-m", "64", "-S", "-nodefaults"),
            *("-display", "none", "-qmp", "stdio"),
            *("-blockdev", f"driver=file,filename={disk},node-name=file"),
            *("-blockdev", "driver=raw,file=file,node-name=disk"),
            *("-device", "virtio-blk-pci,drive=disk"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert machine.stdin is not None
        assert machine.stdout is not None
        machine.stdin.write(b'{"execute": "qmp_capabilities"}')
        machine.stdin.flush()
        # The greeting comes at once, the answer when the machine is complete.
        assert b"QMP" in machine.stdout.readline()
        assert b"return" in machine.stdout.readline()
        with pytest.raises(Busy, match="a machine uses it"):
            convert_disk(str(disk), str(tmp_path / "o"), source_format="raw", format="qcow2")
        assert not (tmp_path / "o").exists()
    finally:
        machine.kill()
        machine.communicate()


ON_A_FULL_DISK = """
import os, sys
from hutch.errors import Exhausted
from hutch.linux.mount import mount
from hutch.storage.diskimages import convert_disk
mount("tmpfs", sys.argv[2], "tmpfs", 0, "size=1m")
try:
    convert_disk(sys.argv[1], sys.argv[2] + "/out", source_format="raw", format=sys.argv[3])
except Exhausted as exc:
    print(exc.message)
print(os.listdir(sys.argv[2]))
"""


@requires("root")
@pytest.mark.integration
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_full_disk_is_told_and_leaves_nothing(disk: Path, tmp_path: Path, format: str) -> None:
    with open(disk, "r+b") as file:
        file.write(os.urandom(6 * MIB))
    (tmp_path / "full").mkdir()
    done = subprocess.run(
        [
            *("unshare", "-m", sys.executable, "-c", ON_A_FULL_DISK),
            *(str(disk), str(tmp_path / "full"), format),
        ],
        capture_output=True,
        text=True,
    )
    assert "no space left on device" in done.stdout, done.stderr
    assert done.stdout.endswith("[]\n")


def test_a_host_too_busy_to_measure_is_given_more_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, count = tmp_path / "qemu-img", tmp_path / "count"
    program.write_text(
        f'#!/bin/sh\necho x >>{count}\n[ $(wc -l <{count}) -gt 2 ] && exec /usr/bin/qemu-img "$@"\n'
        "echo 'qemu-img: Unable to get accurate CPU usage' >&2; exit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr("hutch.storage.diskimages._require", lambda: str(program))
    made = create_disk(str(tmp_path / "d"), MIB, format="luks", key=DiskKey("geheim"))
    assert (made.encrypted, made.size) == (True, MIB)
