"""Encrypted disks of machines: the key opens them, and is nowhere to be found but in it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import Denied, InvalidArgument, Unsupported, WrongState
from hutch.storage.diskimages import convert_disk, create_disk, disk_info
from hutch.storage.diskkeys import DiskKey
from tests.requires import requires
from tests.vm.bootdisks import SIZE, sector_disk
from tests.vm.test_from_disk import engine, start, until

__all__ = ["engine"]

pytestmark = [pytest.mark.integration, requires("root", "qemu", "qemu-img", "cc")]

KEY = b"correct horse battery staple"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    return path


def _command_lines(engine: Engine, machine: Instance) -> bytes:
    pids = engine._context.machines.processes(machine.id)
    found = [Path(f"/proc/{pid}/{name}").read_bytes() for pid in pids for name in _SHOWN]
    return b"\n".join(found)


_SHOWN = ("cmdline", "environ")


def _is_told_nowhere(engine: Engine, machine: Instance) -> None:
    shown = _command_lines(engine, machine) + repr(machine.info()).encode()
    assert KEY not in shown
    # Not by ourselves: closing a file of SQLite's gives up the locks that this process has.
    places = [engine.root / "hutch.db", engine.root / "cache", Path(machine.info().directory)]
    words = ["grep", "-rlaF", "--devices=skip", "-e", KEY.decode(), *map(str, places)]
    found = subprocess.run(words, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")


@requires("busybox", "apt-mirror")
@pytest.mark.soak
def test_the_writable_disk_of_an_image_s_machine(machines: Engine) -> None:
    mark = "plaintext-that-must-not-be-seen"
    with machines.create(
        "busybox",
        ["sh", "-c", f"test -e /kept || for i in $(seq 9999); do echo {mark}; done >/kept; "
         "sync; wc -l </kept; sleep 1000"],
        isolation="vm", memory="160M", network="none", disk="256M", disk_key=KEY,
    ) as box:  # fmt: skip
        disk = Path(box.info().directory, "disk.raw")
        with box.start_attached() as session:
            until(session, b"9999\n")
        assert box.exec(["sh", "-c", "echo more >>/kept; sync; wc -l </kept"]).text == "10000\n"
        assert mark.encode() not in disk.read_bytes()
        _is_told_nowhere(machines, box)
        box.update(disk="320M")
        with pytest.raises(Unsupported, match="its disk is encrypted, and the target has no key"):
            machines.migrate(box.name, "exec:true")
        for share in (box.fork, box.snapshot):
            with pytest.raises(Unsupported, match="its disk is encrypted, and is not shared"):
                share()
        box.suspend()
        box.resume()
        assert box.exec(["wc", "-l", "/kept"]).text.split()[0] == "10000"
        box.kill()
        with pytest.raises(Unsupported, match="grows only while"):
            box.update(disk="1G")
        assert b"more\n" in box.files.read("/kept")  # of a stopped one, by a machine of its own
        with Engine(machines.root) as other:
            with pytest.raises(WrongState, match="its key is not at hand"):
                other.get(box.id).start()
            with pytest.raises(WrongState, match="its key is not at hand"):
                other.get(box.id).restart()
            other.get(box.id).unlock(b"another one")
            with pytest.raises(Denied, match="the key does not open its disk"):
                other.get(box.id).start()
            assert other.get(box.id).info().state == "exited"
            other.get(box.id).unlock(KEY)
            other.get(box.id).start()
            assert other.get(box.id).exec(["wc", "-l", "/kept"]).text.split()[0] == "10000"


def test_a_machine_from_a_disk_keeps_what_it_writes_encrypted(
    engine: Engine, tmp_path: Path, key_file: Path
) -> None:
    base = sector_disk(tmp_path / "base.raw")
    with engine.machines.create(
        base, memory="128M", network="none", disk_key=str(key_file), restart="always"
    ) as machine:
        assert disk_info(f"{machine.info().directory}/disk.qcow2", format="qcow2").encrypted
        with start(machine) as session:
            session.send(b"w")
            until(session, b"written")
        _is_told_nowhere(engine, machine)
        machine.stop(timeout=60)
        with pytest.raises(InvalidArgument, match="a disk of format vmdk is not encrypted"):
            engine.machines.export_disk(machine.name, tmp_path / "out.vmdk", format="vmdk")
        whole = engine.machines.export_disk(machine.name, tmp_path / "whole.qcow2")
        assert (whole.encrypted, whole.references) == (True, ())
        plain = engine.machines.export_disk(
            machine.name, tmp_path / "plain.raw", format="raw", plain=True
        )
        assert b"disk B runs" in Path(plain.path).read_bytes()[:512]
    # What was exported is a disk to start from, by its key only.
    with pytest.raises(InvalidArgument, match="disk_key: the disk is encrypted"):
        engine.machines.create(tmp_path / "whole.qcow2", memory="128M", network="none")
    with engine.machines.create(
        tmp_path / "whole.qcow2", memory="128M", network="none", disk_key=KEY
    ) as machine:
        start(machine, "B").close()


def test_attached_disks_are_opened_by_their_keys(
    engine: Engine, tmp_path: Path, key_file: Path
) -> None:
    base = sector_disk(tmp_path / "base.raw")
    data = str(tmp_path / "data.luks")
    create_disk(data, SIZE, format="luks", key=DiskKey(KEY))
    options: dict[str, Any] = {"memory": "128M", "network": "none"}
    with pytest.raises(InvalidArgument, match=r"disks\[0\]: .*is encrypted"):
        engine.machines.create(base, disks=[data], **options)
    with pytest.raises(InvalidArgument, match=r"disks\[0\]: .*is not encrypted"):
        engine.machines.create(base, disks=[f"{base},key={key_file}"], **options)
    with engine.machines.create(base, disks=[f"{data},key={key_file}"], **options) as machine:
        start(machine).close()
        _is_told_nowhere(engine, machine)


def test_a_disk_that_needs_its_key_typed_does_not_start_by_itself(
    engine: Engine, tmp_path: Path
) -> None:
    base = sector_disk(tmp_path / "base.raw")
    before = os.listdir(engine.root / "instances")
    with pytest.raises(InvalidArgument, match="restart: cannot be combined with a key"):
        engine.machines.create(base, disk_key=KEY, restart="always")
    for bad, said in ((b"", "empty"), (b"\xff\xfe", "not text"), (b"x" * 5000, "at most")):
        with pytest.raises(InvalidArgument, match=f"disk_key: .*{said}"):
            engine.machines.create(base, disk_key=bad)
    assert os.listdir(engine.root / "instances") == before


def test_disks_are_encrypted_converted_and_grown_by_their_keys(tmp_path: Path) -> None:
    key, other = DiskKey(KEY), DiskKey("other")
    plain = tmp_path / "plain.raw"
    plain.write_bytes(os.urandom(1 << 20) + bytes(3 << 20))
    made = convert_disk(
        str(plain), str(tmp_path / "a.qcow2"), source_format="raw", format="qcow2", key=key
    )
    assert (made.encrypted, made.size) == (True, 4 << 20)
    assert plain.read_bytes()[:4096] not in (tmp_path / "a.qcow2").read_bytes()
    for wrong, error in ((None, InvalidArgument), (other, Denied)):
        with pytest.raises(error):
            convert_disk(
                made.path,
                str(tmp_path / "b.raw"),
                source_format="qcow2",
                format="raw",
                source_key=wrong,
            )
    convert_disk(
        made.path, str(tmp_path / "b.raw"), source_format="qcow2", format="raw", source_key=key
    )
    assert (tmp_path / "b.raw").read_bytes() == plain.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.qcow2", "b.raw", "plain.raw"]
    assert "horse" not in repr(key)
