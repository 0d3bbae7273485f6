"""The agent as process 1 of a real machine: QEMU, Debian's kernel, our initramfs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.drivers.vm.initramfs import Programs, build_initramfs
from hutch.drivers.vm.kernels import Kernels
from hutch.plan import guest, guest_answers, ops
from hutch.process import frames
from hutch.store.database import Store
from tests.native import guests
from tests.native.conftest import _built
from tests.native.guests import ATTACH_ALL, Peer, Remote
from tests.requires import requires

pytestmark = [
    requires("root", "apt-mirror", "busybox", "cc", "qemu"),
    pytest.mark.integration,
    pytest.mark.serial,
]

CMDLINE = (
    "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check random.trust_cpu=on "
    "cryptomgr.notests rcupdate.rcu_expedited=1 audit=0 mitigations=off init_on_alloc=0 apparmor=0"
)
BOX = "hutch/box"
MAC = bytes.fromhex("0242ac110002")
OTHER_MAC = bytes([0x52, 0x54, 0, 0, 0, 9])


def _files(directory: Path) -> tuple[Path, Path, tuple[str, ...]]:
    """Return a kernel, its initramfs, and the modules that are loaded later."""
    store = Store.open(directory / "hutch.db")
    kernels = Kernels(directory, store)
    record = kernels.add_package()
    modules = {n: kernels.module(record, n).read_bytes() for n in (*record.boot, *record.late)}
    found = shutil.which("busybox")
    assert found is not None
    programs = Programs.load(
        Path(_built("build/hutch-agent", "hutch-agent")),
        Path(_built("build/hutch-launcher", "hutch-launcher")),
    )
    image = directory / "initramfs"
    image.write_bytes(build_initramfs(programs, modules, record.boot))
    store.close()
    return kernels.vmlinux(record), image, record.late


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Peer, tuple[str, ...]]]:
    """A booted machine after HELLO."""
    directory = tmp_path_factory.mktemp("machine")
    kernel, initramfs, late = _files(directory)
    disk = directory / "disk"
    disk.write_bytes(bytes(1 << 20))
    ours, theirs = socket.socketpair()
    argv = ["qemu-system-x86_64", "-M", "pc-q35-7.2", "-nodefaults", "-no-user-config"]
    argv += ["-accel", "tcg,thread=single", "-cpu", "max", "-m", "256", "-no-reboot"]
    argv += ["-display", "none", "-serial", f"file:{directory}/console"]
    argv += ["-kernel", str(kernel), "-initrd", str(initramfs), "-append", CMDLINE]
    argv += ["-device", "virtio-serial-pci"]
    argv += ["-chardev", f"socket,id=agent,fd={theirs.fileno()}"]
    argv += ["-device", "virtserialport,chardev=agent,name=org.hutch.agent"]
    argv += ["-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-pci,netdev=n0"]
    argv += ["-drive", f"file={disk},format=raw,if=none,id=d0"]
    argv += ["-device", "virtio-blk-pci,drive=d0,serial=hutch-data"]
    qemu = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    try:
        with ours:
            peer = Peer(ours)
            peer.wait_s = 120.0
            peer.hello()
            yield peer, late
    finally:
        qemu.kill()
        qemu.wait()


def test_a_machine_boots_is_set_up_runs_and_ends(machine: tuple[Peer, tuple[str, ...]]) -> None:
    """One boot takes seconds, so one test goes all the way."""
    peer, late = machine
    assert peer.call(guest.Call.PING).errno == 0
    set_up(peer, late)
    bring_busybox(peer)
    look_around(peer)
    run_main(peer)
    beside(peer)
    look_at_figures(peer)
    assert peer.hello() == (1, 512)  # a new host: the main process lingers
    end(peer)


def set_up(peer: Peer, late: tuple[str, ...]) -> None:
    answer = peer.setup(
        guest.Entropy(data=os.urandom(64)),
        guest.Clock(seconds=int(time.time())),
        guest.Hostname(name="box"),
        *(guest.Insmod(path=f"/lib/modules/{name}.ko") for name in late),
        guest.Disk(serial="hutch-data", link="/dev/hutch/data"),
        # As in a clone of a template, where it is up: one that is renamed goes down for that.
        guest.Interface(index=0, name="before", mac=OTHER_MAC),
        guest.LinkUp(interface="before"),
        guest.Interface(index=0, name="net0", mtu=1400),
        guest.Address(interface="net0", address=bytes([10, 0, 2, 15]), prefix=24),
        guest.Address(interface="net0", address=bytes([0xFD, *bytes(14), 15]), prefix=64),
        guest.LinkUp(interface="lo"),
        guest.LinkUp(interface="net0"),
        guest.Route(interface="net0", gateway=bytes([10, 0, 2, 2])),
        guest.Route(interface="net0", gateway=bytes([0xFD, *bytes(14), 1])),
        guest.Interface(index=0, name="net0", mac=MAC),  # and up it stays, with its routes
        guest.Mount(source="tmpfs", target="/hutch/rw", fstype="tmpfs"),
        guest.Mkdir(path="/hutch/rw/upper"),
        guest.Mkdir(path="/hutch/rw/work"),
        guest.Mkdir(path="/hutch/root"),
        guest.Sysctl(key="kernel/pid_max", value="40000"),
        guest.Cgroup(path=BOX, lines="pids.max=100\nmemory.max=104857600\n"),
        guest.Online(),
    )
    assert answer.errno == 0, answer


def bring_busybox(peer: Peer) -> None:
    found = shutil.which("busybox")
    assert found is not None
    request = guest.WriteContent(path="/busybox", mode=0o755)
    head, _ = peer.files(request, Path(found).read_bytes())
    assert head.errno == 0, head


def run(peer: Peer, *argv: str, kind: int = guests.SPAWN) -> bytes:
    child = (ops.Exec(argv=("/hutch/root/busybox", *argv), env=("PATH=/",)),)
    slots = 1 if kind == guests.EXEC else 0
    done = Remote(peer, kind, ops.Plan(child=child, slots=slots), ATTACH_ALL).wait()
    assert done.code == 0, done
    return done.stdout


def look_around(peer: Peer) -> None:
    assert run(peer, "hostname") == b"box\n"
    assert run(peer, "cat", "/proc/sys/kernel/pid_max") == b"40000\n"
    assert run(peer, "cat", f"/sys/fs/cgroup/{BOX}/memory.max") == b"104857600\n"
    assert run(peer, "readlink", "/dev/hutch/data") == b"/dev/vda\n"
    assert run(peer, "cat", "/sys/class/net/net0/address") == b"02:42:ac:11:00:02\n"
    addresses = run(peer, "ip", "addr", "show", "net0")
    assert b"mtu 1400" in addresses
    assert b"10.0.2.15/24" in addresses and b"fd00::f/64" in addresses
    assert b"default via 10.0.2.2" in run(peer, "ip", "route")
    assert b"default via fd00::1" in run(peer, "ip", "-6", "route")
    assert abs(int(run(peer, "date", "+%s")) - time.time()) < 600


def run_main(peer: Peer) -> None:
    """Start a main process in a root of its own: pivot_root works where the agent has put us."""
    child = (
        ops.CgroupJoin(files=(f"/sys/fs/cgroup/{BOX}/cgroup.procs",)),
        ops.Unshare(flags=0x00020000),
        ops.RootDir(path="/hutch/root"),
        ops.PivotRoot(),
        ops.Exec(argv=("/busybox", "sleep", "10000"), env=()),
    )
    main = Remote(peer, guests.SPAWN, ops.Plan(child=child))
    main.until(frames.STARTED)


def beside(peer: Peer) -> None:
    assert run(peer, "echo", "beside", kind=guests.EXEC) == b"beside\n"
    # The root of the files is the main process's now.
    head, body = peer.files(guest.ListFiles(path="/"))
    assert head.errno == 0
    assert [file.name for file in guest_answers.decode_listing(body)] == ["busybox"]


def look_at_figures(peer: Peer) -> None:
    body = peer.call(guest.Call.STATS, guest.group_argument()).body
    figures = guest_answers.decode_stats(body)
    assert 100 << 20 < figures.memory_total < 256 << 20
    assert figures.pids == 1
    assert 0 < figures.memory_current < 104857600
    assert [block.name for block in figures.blocks] == ["vda"]
    body = peer.call(guest.Call.PROCESSES, guest.group_argument(BOX)).body
    (process,) = guest_answers.decode_processes(body)
    assert process.command == "/busybox sleep 10000"
    body = peer.call(guest.Call.PROCESSES, guest.group_argument()).body
    assert 1 in {process.pid for process in guest_answers.decode_processes(body)}


def end(peer: Peer) -> None:
    answer = peer.call(guest.Call.SHUTDOWN, guest.shutdown_argument())
    assert answer.errno == 0, answer
    body = peer.call(guest.Call.PROCESSES, guest.group_argument()).body
    assert [process.pid for process in guest_answers.decode_processes(body)] == [1]
