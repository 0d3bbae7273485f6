"""Machines that start from a disk: one sector of our own in the place of a system."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest

from hutch.engine import Engine, Instance
from hutch.engine.session import Session
from hutch.errors import (
    Exhausted,
    HutchError,
    InvalidArgument,
    NotFound,
    OperationTimeout,
    Unsupported,
    WrongState,
)
from hutch.network import Endpoint
from hutch.process import Output
from hutch.qmp import conversation
from hutch.qmp.machine import stop
from hutch.storage.diskimages import convert_disk, create_disk, disk_info
from hutch.storage.diskkeys import DiskKey
from tests.requires import requires
from tests.vm.bootdisks import SIZE, iso_file, run, sector_disk
from tests.vm.confined import assert_confined

pytestmark = [pytest.mark.integration, requires("root", "qemu", "qemu-img", "cc")]

WAIT_S = 200.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("disk-machines") / "root") as engine:
        yield engine
        engine._context.networks.teardown()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk that starts; no test writes to it."""
    return sector_disk(tmp_path_factory.mktemp("disks") / "base.raw")


@pytest.fixture
def machine(engine: Engine, base: Path) -> Iterator[Instance]:
    with engine.machines.create(base, memory="128M", network="none", size="64M") as made:
        yield made


def until(session: Session, words: bytes, timeout_s: float = WAIT_S) -> bytes:
    """Read the serial console up to these words."""
    seen = b""
    try:
        for item in session.output(timeout_s):
            assert isinstance(item, Output), item
            seen += item.data
            if words in seen:
                return seen
    except OperationTimeout:
        pass
    raise AssertionError(f"no {words!r} in {seen!r}")


def start(machine: Instance, mark: str = "A") -> Session:
    session = machine.start_attached()
    until(session, b"disk %s runs\r\n" % mark.encode())
    return session


@pytest.mark.versions
def test_the_serial_console_is_its_streams(machine: Instance, engine: Engine) -> None:
    with start(machine) as session:
        assert_confined(engine, machine)
        session.send(b"typed\n")
        assert until(session, b"\n") == b"typed\n"
    assert b"disk A runs\r\n" in b"".join(record.data for record in machine.logs())


def test_a_console_may_be_left_and_taken_up_again(machine: Instance) -> None:
    start(machine).close()
    with machine.attach(stdin=True) as session:
        session.send(b"back\n")
        assert until(session, b"\n") == b"back\n"


def test_to_stop_it_the_power_button_is_pressed(machine: Instance) -> None:
    with start(machine) as session:
        machine.stop(timeout=WAIT_S)
        assert until(session, b"off\r\n")
    info = machine.info()
    assert (info.state, info.exit_code) == ("exited", 0)


def test_a_machine_deaf_to_the_button_is_killed(engine: Engine, tmp_path: Path) -> None:
    create_disk(str(tmp_path / "empty.raw"), SIZE, format="raw")
    with engine.machines.start(tmp_path / "empty.raw", memory="128M", network="none") as machine:
        machine.stop(timeout=0.1)
        assert (machine.info().state, machine.info().exit_code) == ("exited", 137)


def test_a_reset_starts_it_again(machine: Instance) -> None:
    with start(machine) as session:
        session.send(b"r")
        assert until(session, b"disk A runs\r\n")


def test_what_it_writes_stays_and_the_disk_below_is_as_it_was(
    machine: Instance, base: Path, tmp_path: Path, engine: Engine
) -> None:
    before = base.read_bytes()
    with start(machine) as session:
        session.send(b"w")
        until(session, b"written\r\n")
        machine.stop(timeout=WAIT_S)
    start(machine, "B").close()
    with pytest.raises(WrongState, match="is running"):
        engine.machines.export_disk(machine.name, tmp_path / "early.raw")
    machine.kill()
    assert base.read_bytes() == before
    whole = engine.machines.export_disk(machine.name, tmp_path / "whole.qcow2")
    assert (whole.size, whole.references) == (64 << 20, ())
    raw = engine.machines.export_disk(machine.name, tmp_path / "whole.raw", format="raw")
    assert (raw.size, (tmp_path / "whole.raw").read_bytes()[:512].count(b"B")) == (64 << 20, 1)
    assert machine.disk_size().writable > 0


def test_life_is_that_of_every_instance(machine: Instance, engine: Engine) -> None:
    session = start(machine)
    machine.pause()
    assert machine.info().state == "paused"
    machine.unpause()
    session.send(b"on\n")
    until(session, b"on\n")
    session.close()
    assert machine.stats().cpu.total_ns > 0
    assert machine.info().image == "base.raw"
    assert machine.name in [info.name for info in engine.list()]
    machine.restart()
    machine.kill()
    assert machine.wait(timeout=WAIT_S) == 137


def test_what_needs_an_agent_says_that_there_is_none(machine: Instance) -> None:
    start(machine).close()
    for ask in (
        lambda: machine.exec(["true"]),
        lambda: machine.top(),
        lambda: machine.files.read("/etc/passwd"),
    ):
        with pytest.raises(Unsupported, match="has no agent"):
            ask()


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx"])
def test_disks_of_other_formats_start(
    engine: Engine, base: Path, tmp_path: Path, format: str
) -> None:
    path = tmp_path / f"disk.{format}"
    convert_disk(str(base), str(path), source_format="raw", format=format)  # type: ignore[arg-type]
    before = path.read_bytes()
    with engine.machines.create(path, memory="128M", network="none") as machine:
        start(machine).close()
    assert path.read_bytes() == before


def test_a_cd_is_started_while_the_disk_is_empty(engine: Engine, tmp_path: Path) -> None:
    """As with an installer: El Torito without emulation, one sector of 2048 bytes."""
    (tmp_path / "files").mkdir()
    sector_disk(tmp_path / "files/boot.img")
    iso = tmp_path / "installer.iso"
    run("genisoimage", "-quiet", "-o", iso, "-no-emul-boot", "-boot-load-size", "4",
        "-b", "boot.img", "-c", "boot.cat", tmp_path / "files")  # fmt: skip
    with engine.machines.create(cdroms=[iso], size="64M", memory="128M", network="none") as machine:
        start(machine).close()
        assert machine.info().image == "installer.iso"


def test_a_disk_that_is_attached_is_written_to_unless_it_is_read_only(
    engine: Engine, base: Path, tmp_path: Path
) -> None:
    empty, extra = tmp_path / "none.raw", tmp_path / "extra.raw"
    create_disk(str(empty), SIZE, format="raw")
    extra.write_bytes(base.read_bytes())
    # The BIOS starts the first disk that can be started: only the base can.
    with engine.machines.create(
        base, disks=[f"{extra}:ro", empty], memory="128M", network="none"
    ) as machine:
        start(machine).close()
        wish = machine.info().spec.machine.from_disk
        assert wish is not None
        assert [disk.read_only for disk in wish.disks] == [True, False]
        before = os.stat(extra).st_mtime_ns
    assert os.stat(extra).st_mtime_ns == before


# ---- its state ------------------------------------------------------------------------------


def _echoes(session: Session, words: bytes) -> None:
    session.send(words + b"\n")
    until(session, words + b"\n")


def _address(machine: Instance) -> list[tuple[str, str]]:
    found = cast("tuple[Endpoint, ...]", machine.info().endpoints)
    return [(endpoint.ipv4, endpoint.mac) for endpoint in found]


@pytest.mark.versions
def test_it_is_suspended_and_goes_on_with_its_addresses(engine: Engine, base: Path) -> None:
    with engine.machines.create(base, memory="128M", network="bridge") as machine:
        start(machine).close()
        before = _address(machine)
        assert before[0][0]
        machine.suspend()
        assert machine.info().state == "suspended"
        with machine.start_attached() as session:
            _echoes(session, b"alive")
            assert _address(machine) == before
        log = b"".join(record.data for record in machine.logs())
        assert log.count(b"disk A runs") == 1
        machine.suspend()
        machine.start(discard=True)
        with machine.attach(stdin=True) as session:
            until(session, b"runs")


def test_it_is_resumed_with_what_it_was_given_while_it_ran(
    machine: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hutch.drivers.vm.resize._PATIENCE_S", 0.2)
    start(machine).close()
    machine.update(cpus=2)
    # Without a driver it does not take the memory, and yet has the device from then on.
    with pytest.raises(Exhausted, match="took 0 of"):
        machine.update(memory="256M")
    machine.suspend()
    with machine.start_attached() as session:
        _echoes(session, b"alive")


def test_a_snapshot_of_a_running_one_is_gone_back_to(machine: Instance, engine: Engine) -> None:
    with start(machine) as session:
        session.send(b"w")
        until(session, b"written")
        machine.snapshot("good")
        _echoes(session, b"on")
        session.send(b"w")
        until(session, b"written")
    with pytest.raises(WrongState, match=r"is running"):
        engine.snapshots.restore(f"{machine.name}/good")
    machine.kill()
    engine.snapshots.restore(f"{machine.name}/good")
    with machine.attach(stdin=True) as session:
        _echoes(session, b"back")
        session.send(b"r")
        until(session, b"disk B runs")
    with pytest.raises(Unsupported, match="memory of a machine without an agent"):
        engine.snapshots.restore(f"{machine.name}/good", name="other")
    engine.snapshots.remove(f"{machine.name}/good")


def test_a_snapshot_of_one_at_rest_becomes_another_machine(
    machine: Instance, engine: Engine
) -> None:
    with start(machine) as session:
        session.send(b"w")
        until(session, b"written")
        live = machine.snapshot(disk_only=True)
        _echoes(session, b"on")
    machine.kill()
    kept = machine.snapshot()
    assert (kept.memory, kept.size > 0, live.memory) == (False, True, False)
    start(machine, "B").close()
    machine.kill()
    for snapshot in (kept, live):
        key = f"{machine.name}/{snapshot.tag}"
        with engine.snapshots.restore(key, name="other") as other:
            start(other, "B").close()
            assert other.info().spec.hostname == other.id[:12]
        engine.snapshots.remove(key)


def test_memory_is_not_kept_without_all_disks(engine: Engine, base: Path, tmp_path: Path) -> None:
    create_disk(str(tmp_path / "data.raw"), SIZE, format="raw")
    with engine.machines.start(
        base, disks=[tmp_path / "data.raw"], memory="128M", network="none"
    ) as machine:
        with pytest.raises(Unsupported, match=r"disk1 .*would not be in it"):
            machine.snapshot()
        with pytest.raises(Unsupported, match="no agent to make a twin"):
            machine.fork()
        machine.kill()
        engine.snapshots.remove(f"{machine.name}/{machine.snapshot().tag}")


def test_one_whose_saver_was_killed_goes_on(machine: Instance, engine: Engine) -> None:
    with start(machine) as session:
        with conversation(Path(machine.info().directory, "run/qmp.sock")) as monitor:
            stop(monitor)
        engine.reconcile()
        _echoes(session, b"on")


# ---- screen --------------------------------------------------------------------------------


def _greeting(sock: socket.socket) -> bytes:
    sock.settimeout(WAIT_S)
    return sock.recv(12)


def test_the_screen_is_reached_by_a_socket_in_its_directory(engine: Engine, base: Path) -> None:
    with engine.machines.start(base, memory="128M", network="none", vnc="unix") as machine:
        directory = os.open(f"{machine.info().directory}/run", os.O_PATH)
        try:
            for _ in range(2):
                with socket.socket(socket.AF_UNIX) as client:
                    # By descriptor: pytest's directories are longer than a socket's path.
                    client.connect(f"/proc/self/fd/{directory}/vnc.sock")
                    assert _greeting(client) == b"RFB 003.008\n"
        finally:
            os.close(directory)


def test_the_screen_is_reached_at_an_address(engine: Engine, base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidArgument, match=r"vnc: .*address already in use"):
            engine.machines.start(base, memory="128M", network="none", vnc=where)
    with (
        engine.machines.start(base, memory="128M", network="none", vnc=where),
        socket.create_connection(("127.0.0.1", int(where[10:]))) as client,
    ):
        assert _greeting(client) == b"RFB 003.008\n"


# ---- what is refused -------------------------------------------------------------------------


def _left(engine: Engine) -> list[str]:
    return os.listdir(engine.root / "instances")


def test_a_disk_that_names_further_files_is_refused(
    engine: Engine, base: Path, tmp_path: Path
) -> None:
    create_disk(str(tmp_path / "o.qcow2"), SIZE, base=str(base))
    before = _left(engine)
    with pytest.raises(InvalidArgument, match=r"disk: .*needs further files"):
        engine.machines.create(tmp_path / "o.qcow2")
    with pytest.raises(InvalidArgument, match=r"disks\[0\]: .*needs further files"):
        engine.machines.create(base, disks=[tmp_path / "o.qcow2"])
    assert _left(engine) == before


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"disk": None}, InvalidArgument, "disk: give a disk"),
        ({"disk": "/nowhere.raw"}, NotFound, "no such file"),
        ({"cdroms": ["/nowhere.iso"]}, NotFound, r"cdroms\[0\]"),
        ({"size": "100"}, InvalidArgument, "size: "),
        ({"vnc": "5901"}, InvalidArgument, "vnc: expected unix or ADDRESS:PORT"),
        ({"env": ["A=b"]}, InvalidArgument, "env: has no meaning"),
        ({"machine": "microvm"}, Unsupported, "microvm starts no disk"),
        ({"user_data": b"hello"}, InvalidArgument, "user_data: does not begin"),
        ({"user_data": "/nowhere"}, InvalidArgument, "user_data: /nowhere: no such file"),
        ({"ssh_keys": ["AAAA"]}, InvalidArgument, r"ssh_key\[0\]"),
        ({"nonsense": 1}, InvalidArgument, "nonsense: has no meaning"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    engine: Engine,
    base: Path,
    options: dict[str, object],
    error: type[HutchError],
    said: str,
) -> None:
    before = _left(engine)
    given = {"disk": base, "memory": "128M", **options}
    with pytest.raises(error, match=said):
        engine.machines.create(**given)  # type: ignore[arg-type]
    assert _left(engine) == before


def test_a_base_that_was_written_to_is_not_started_from(engine: Engine, tmp_path: Path) -> None:
    base = sector_disk(tmp_path / "mine.raw")
    with engine.machines.create(base, memory="128M", network="none") as machine:
        with open(base, "r+b") as file:
            file.seek(1000)
            file.write(b"x")
        os.utime(base, ns=(1, 1))
        with pytest.raises(InvalidArgument, match="was changed since"):
            machine.start()
        base.unlink()
        with pytest.raises(NotFound, match="is gone"):
            machine.start()


def test_an_unreadable_disk_is_told_with_qemu_s_words(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(str(path), SIZE)
    with engine.machines.create(path, memory="128M", network="none") as machine:
        overlay = Path(machine.info().directory) / "disk.qcow2"
        overlay.write_bytes(b"not a disk")
        with pytest.raises(HutchError, match=r"qemu ended with status 1: .*qcow2"):
            machine.start()
        assert machine.info().state == "created"


def test_a_disk_with_nothing_to_start_from_is_told_on_the_console(
    engine: Engine, tmp_path: Path
) -> None:
    create_disk(str(tmp_path / "empty.qcow2"), SIZE)
    with engine.machines.create(tmp_path / "empty.qcow2", memory="128M", network="none") as machine:
        until(machine.start_attached(), b"No bootable device.")
        assert machine.info().state == "running"


def test_removing_it_leaves_nothing_and_not_its_disk(engine: Engine, base: Path) -> None:
    with engine.machines.start(base, memory="128M", network="none") as machine:
        directory = machine.info().directory
        assert disk_info(f"{directory}/disk.qcow2", format="qcow2").size == SIZE
    assert not os.path.exists(directory)
    assert base.exists()


@pytest.mark.parametrize("what", ["diff", "commit", "export"])
def test_its_files_are_its_own(machine: Instance, what: str) -> None:
    with pytest.raises(Unsupported, match="on a disk that only it reads"):
        getattr(machine, what)()


def test_what_is_encrypted_does_not_move(engine: Engine, base: Path) -> None:
    with (
        engine.machines.create(
            base, memory="128M", network="none", disk_key=DiskKey("secret")
        ) as machine,
        pytest.raises(HutchError, match="encrypted"),
    ):
        engine.migrate(machine.name, "exec:true")


def test_its_disk_grows_at_rest_and_while_it_runs(machine: Instance) -> None:
    disk = f"{machine.info().directory}/disk.qcow2"
    machine.update(disk="96M")
    assert disk_info(disk, format="qcow2").size == 96 << 20
    with start(machine):
        machine.update(disk="128M")
        assert disk_info(disk, format="qcow2").size == 128 << 20
        with pytest.raises(InvalidArgument, match="cannot shrink"):
            machine.update(disk="96M")
        machine.pause()
        with pytest.raises(WrongState, match="is paused"):
            machine.update(disk="256M")


# ---- network ---------------------------------------------------------------------------------


@requires("netns", "nftables", "genisoimage")
def test_cloud_init_is_told_the_addresses_of_the_start(engine: Engine, base: Path) -> None:
    with engine.machines.start(
        base, memory="128M", ssh_keys=["ssh-ed25519 AAAA me"], name="addressed"
    ) as machine:
        info = machine.info()
        (endpoint,) = engine._context.networks.endpoints(machine.id)
        seed = f"{info.directory}/seed.iso"
        config = msgspec.json.decode(iso_file(seed, "network-config"))
        user = iso_file(seed, "user-data").decode()
        card = config["ethernets"]["eth0"]
        assert card["match"]["macaddress"] == endpoint.mac
        assert card["addresses"] == [f"{a.address}/{a.prefix}" for a in endpoint.addresses]
        assert card["routes"][0]["via"] == endpoint.addresses[0].gateway
        assert user == '#cloud-config\n{"ssh_authorized_keys":["ssh-ed25519 AAAA me"]}\n'
