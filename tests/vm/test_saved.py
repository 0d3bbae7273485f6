"""Machines that go on from a saved state: twins, snapshots, suspended ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hutch.drivers.vm import capture, diskfork, state
from hutch.engine import Engine, Instance, context
from hutch.engine import fork as forking
from hutch.errors import (
    AlreadyExists,
    Busy,
    HutchError,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
    WrongState,
)
from hutch.lifecycle import State
from hutch.storage import diskchain, layers, rootdisk
from tests.native.boxes import unread, wait_until
from tests.requires import requires
from tests.vm.confined import assert_confined

pytestmark = [
    requires("root", "qemu", "apt-mirror", "busybox", "cgroup", "netns", "erofs", "mke2fs"),
    pytest.mark.integration,
    pytest.mark.timeout(600),
]

COUNT = "i=0; while :; do i=$((i+1)); echo $i; usleep 5000; done"
WAIT_S = 300.0


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("saved") / "root") as engine:
        engine.images.bootstrap("busybox")
        yield engine
        engine._context.machines.prune_templates()
        engine._context.networks.teardown()


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The engine; what a test leaves on its root fails the test."""
    yield shared_engine
    left = [info.name for info in shared_engine.list(all=True)]
    for name in left:
        shared_engine.get(name).remove(force=True)
    for snapshot in shared_engine.snapshots.list():
        shared_engine.snapshots.remove(f"{snapshot.source_name}/{snapshot.tag}")
    assert left == [], "instances left behind"
    assert leftovers(shared_engine) == []


def leftovers(engine: Engine) -> list[str]:
    directory = engine.root / "snapshots"
    return os.listdir(directory) if directory.exists() else []


@pytest.fixture
def counter(engine: Engine) -> Iterator[Instance]:
    """A machine whose main process counts, with some numbers told already."""
    with engine.start("busybox", ["sh", "-c", COUNT], isolation="vm", memory="128M") as box:
        until(box, lambda: len(numbers(box)) >= 20)
        yield box


def numbers(box: Instance) -> list[int]:
    return [int(line) for record in box.logs() for line in record.data.split()]


def until(box: Instance, condition: Callable[[], object]) -> None:
    """Follow a box's output until a condition holds, which every line may make true."""
    deadline = time.monotonic() + WAIT_S
    for _ in box.logs(follow=True):
        assert time.monotonic() < deadline
        if condition():
            return


def goes_on(box: Instance) -> None:
    """See that it counts, and that nothing of what it said is missing."""
    before = len(numbers(box))
    until(box, lambda: len(numbers(box)) > before + 5)
    counted = numbers(box)
    assert counted == list(range(counted[0], counted[0] + len(counted)))


def shell(box: Instance, script: str) -> str:
    return box.exec(["sh", "-c", script], check=True).text.strip()


def has_the_time(box: Instance) -> bool:
    """Tell whether its clock is right; it may take long to answer."""
    asked = time.time()
    told = int(shell(box, "date +%s"))
    return asked - 5 < told < time.time() + 5


IDENTITY = {
    "host name": "hostname",
    "hostname file": "cat /etc/hostname",
    "mac": "cat /sys/class/net/eth0/address",
    "address": "ip -4 -o addr show eth0 | awk '{print $4}'",
    "random": "cat /proc/sys/kernel/random/uuid",
}


@pytest.mark.versions
def test_twins_are_other_machines_that_count_on_from_the_same_number(
    engine: Engine, counter: Instance
) -> None:
    shell(counter, "echo kept >/root/file")
    until(counter, lambda: len(numbers(counter)) >= 30)
    twins = counter.fork(3, name="twin")
    assert isinstance(twins, list)
    boxes = [counter, *twins]
    try:
        assert [twin.name for twin in twins] == ["twin-1", "twin-2", "twin-3"]
        asked = "; ".join(IDENTITY.values())
        seen = [shell(box, asked).splitlines() for box in boxes]
        for name, values in zip(IDENTITY, zip(*seen, strict=True), strict=True):
            assert len(set(values)) == 4, (name, values)
        assert [values[0] for values in seen] == [box.id[:12] for box in boxes]
        for box in boxes:
            assert_confined(engine, box)
        for twin in twins:
            assert shell(twin, "cat /root/file") == "kept"
            goes_on(twin)
        first = {numbers(twin)[0] for twin in twins}
        assert len(first) == 1 and 20 < first.pop() <= len(numbers(counter)) + 1
        goes_on(counter)
        assert numbers(counter)[0] == 1
        assert has_the_time(twins[0])
        shell(twins[0], "rm /root/file")
        assert shell(twins[1], "cat /root/file") == "kept"
    finally:
        for twin in twins:
            twin.remove(force=True)
    goes_on(counter)


def test_a_machine_whose_output_nobody_takes_is_forked(engine: Engine) -> None:
    """Its client holds the program back, up to the pipe that its machine's monitor writes to."""
    box = engine.create("busybox", ["yes"], isolation="vm", memory="128M", network="none")
    with box, box.start_attached():
        pid = box.info().pid
        assert pid
        wait_until(lambda: unread(pid) > 60_000, "the pipe to be full")
        twin = box.fork()
        assert isinstance(twin, Instance)
        with twin:
            assert shell(twin, "echo fine") == "fine"


def test_twins_and_source_talk_to_each_other(engine: Engine, counter: Instance) -> None:
    twin = counter.fork()
    assert isinstance(twin, Instance)
    with twin:
        address = shell(twin, IDENTITY["address"]).split("/")[0]
        shell(counter, f"ping -c 1 -w 60 {address}")
        own = shell(counter, IDENTITY["address"]).split("/")[0]
        shell(twin, f"ping -c 1 -w 60 {own}")


def test_a_twin_of_a_twin(engine: Engine, counter: Instance) -> None:
    first = counter.fork(name="first")
    assert isinstance(first, Instance)
    with first:
        second = first.fork(name="second")
        assert isinstance(second, Instance)
        with second:
            goes_on(second)
            assert shell(second, "hostname") == second.id[:12]
        goes_on(first)


@pytest.mark.versions
def test_a_snapshot_outlives_its_machine(engine: Engine, counter: Instance, tmp_path: Path) -> None:
    shell(counter, "echo kept >/root/file")
    made = counter.snapshot("one")
    assert (made.source_name, made.tag, made.memory) == (counter.name, "one", True)
    key = f"{counter.name}/one"
    shell(counter, "rm /root/file")
    goes_on(counter)
    at = numbers(counter)
    counter.remove(force=True)
    with pytest.raises(NotFound, match="gone"):
        engine.snapshots.restore(key)
    engine.reconcile()
    with pytest.raises(HutchError):
        engine.images.remove("busybox")
    with pytest.raises(Busy):
        engine.kernels.remove(made.spec.machine.kernel)
    with engine.snapshots.restore(key, name="again") as again:
        assert shell(again, "cat /root/file; hostname") == f"kept\n{again.id[:12]}"
        goes_on(again)
        assert 20 <= numbers(again)[0] <= at[-1]
    with open(tmp_path / "export.tar", "wb") as file:
        for piece in engine.snapshots.export(key):
            file.write(piece)
    with tarfile.open(tmp_path / "export.tar") as archive:
        sizes = {member.name: member.size for member in archive}
    assert sizes["disk.raw"] == made.spec.machine.disk or sizes["disk.raw"] >= 1 << 30
    assert {"snapshot.json", "state", "saved.json"} < set(sizes)
    with open(tmp_path / "export.tar", "rb") as file, pytest.raises(AlreadyExists, match=key):
        engine.snapshots.import_([file.read()])
    engine.snapshots.remove(key)
    assert engine.snapshots.list() == []
    with open(tmp_path / "export.tar", "rb") as file:
        taken_in = engine.snapshots.import_(iter(lambda: file.read(1 << 20), b""), "far/away")
    assert (taken_in.source_name, taken_in.tag, taken_in.memory) == ("far", "away", True)
    with pytest.raises(NotFound, match="far is not here"):
        engine.snapshots.restore("far/away")
    with engine.snapshots.restore("far/away", name="back") as back:
        assert shell(back, "cat /root/file; hostname") == f"kept\n{back.id[:12]}"
        goes_on(back)
    engine.snapshots.remove("far/away")


@pytest.mark.versions
def test_a_machine_goes_back_to_its_snapshot(engine: Engine, counter: Instance) -> None:
    key = f"{counter.name}/snap0"
    shell(counter, "echo then >/root/file")
    assert counter.snapshot().tag == "snap0"
    taken_at = len(numbers(counter))
    shell(counter, "echo now >/root/file; sync")
    until(counter, lambda: len(numbers(counter)) > taken_at + 50)
    with pytest.raises(WrongState, match="running"):
        engine.snapshots.restore(key)
    counter.stop(timeout=0)
    back = engine.snapshots.restore(key)
    assert back.id == counter.id
    assert shell(back, "cat /root/file") == "then"
    # By now it may have counted to where it had been.
    until(back, lambda: any(later < sooner for sooner, later in pairwise(numbers(back))))
    engine.snapshots.remove(key)


def test_a_machine_at_rest_is_kept_by_its_disk(engine: Engine, counter: Instance) -> None:
    shell(counter, "echo then >/root/file")
    assert not counter.snapshot("live", disk_only=True).memory
    goes_on(counter)
    shell(counter, "echo now >/root/file; sync")
    counter.stop(timeout=0)
    engine.snapshots.restore(f"{counter.name}/live")
    assert counter.info().state == State.EXITED
    made = counter.snapshot("still")
    assert not made.memory
    with engine.snapshots.restore(f"{counter.name}/still", name="copy") as copy:
        assert copy.info().state == State.CREATED
        copy.start()
        assert shell(copy, "cat /root/file") == "then"
        until(copy, lambda: numbers(copy))
        assert numbers(copy)[0] == 1
    with pytest.raises(AlreadyExists, match="already"):
        counter.snapshot("still")
    with pytest.raises(InvalidArgument, match="tag"):
        counter.snapshot("a/b")
    for tag in ("live", "still"):
        engine.snapshots.remove(f"{counter.name}/{tag}")


@pytest.mark.versions
def test_a_suspended_machine_goes_on_where_it_was(engine: Engine, counter: Instance) -> None:
    address = shell(counter, IDENTITY["address"])
    shell(counter, "echo $$ >/run/mark 2>/dev/null || echo x >/tmp/mark")
    counter.suspend()
    info = counter.info()
    assert (info.state, info.pid) == (State.SUSPENDED, 0)
    assert info.status.startswith("Suspended")
    said = numbers(counter)
    with pytest.raises(WrongState):
        counter.exec(["true"])
    with pytest.raises(WrongState):
        counter.suspend()
    with pytest.raises(WrongState):
        engine._context.machines.processes(counter.id)
    engine.prune()  # which takes what has ended, and this has not
    counter.resume()
    assert numbers(counter)[: len(said)] == said
    goes_on(counter)
    assert numbers(counter)[0] == 1
    assert shell(counter, IDENTITY["address"]) == address
    assert not (Path(counter.info().directory) / "suspended").exists()
    assert has_the_time(counter)
    counter.suspend()
    counter.start(discard=True)
    until(counter, lambda: numbers(counter).count(1) == 2)


def test_saved_machines_outlive_a_reboot_of_the_host(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell(counter, "echo kept >/root/file; echo kept >/dev/shm/file")
    counter.snapshot("before")
    counter.suspend()
    run = Path(counter.info().directory, "run")
    for entry in run.iterdir():
        entry.unlink()
    for module in (layers, rootdisk):
        monkeypatch.setattr(module, "boot_id", lambda: "another boot")
    monkeypatch.setattr(context, "boot_id", lambda: "another boot")
    with Engine(engine.root) as again:
        again.reconcile()
        with again.snapshots.restore(f"{counter.name}/before", name="restored") as restored:
            assert shell(restored, "cat /root/file /dev/shm/file") == "kept\nkept"
            goes_on(restored)
        box = again.get(counter.id)
        box.start()
        assert shell(box, "cat /root/file /dev/shm/file") == "kept\nkept"
        goes_on(box)
        box.stop(timeout=0)
    engine.snapshots.remove(f"{counter.name}/before")


def test_a_suspended_machine_is_kept_by_a_snapshot(engine: Engine, counter: Instance) -> None:
    counter.suspend()
    assert counter.snapshot("deep").memory
    with engine.snapshots.restore(f"{counter.name}/deep", name="woken") as woken:
        goes_on(woken)
    assert counter.info().state == State.SUSPENDED
    engine.snapshots.remove(f"{counter.name}/deep")


WAYS: dict[str, dict[str, Any]] = {
    "few pages of its own": {},
    "many pages of its own": {"_OWN_FEW": 0},
    "memory out of reach": {"_is_whole": lambda *_: False},
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.soak] * ("few" in way)) for way in WAYS]
)
def test_memory_and_files_are_in_every_twin(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(state, name, value)
    digest = "md5sum /dev/shm/random /root/random"
    made = shell(
        counter,
        "for place in /dev/shm /root; do head -c 3000000 /dev/urandom >$place/random; done; "
        + digest,
    )
    with ExitStack() as removed:
        first = counter.fork()
        assert isinstance(first, Instance)
        removed.callback(first.remove, force=True)
        shell(first, "echo more >>/dev/shm/random")
        twins = first.fork(2)
        assert isinstance(twins, list)
        for twin in twins:
            removed.callback(twin.remove, force=True)
        for twin in twins:
            assert shell(twin, "tail -c 5 /dev/shm/random") == "more"
            assert shell(twin, "head -c 3000000 /dev/shm/random | md5sum") in made.replace(
                "/dev/shm/random", "-"
            )
            goes_on(twin)
    assert shell(counter, digest) == made
    goes_on(counter)


def test_a_machine_that_was_booted_or_restored_is_forked_as_others_are(engine: Engine) -> None:
    with engine.start(
        "busybox", ["sh", "-c", COUNT], isolation="vm", memory="128M", template=False
    ) as box:
        until(box, lambda: len(numbers(box)) >= 5)
        made = shell(box, "head -c 3000000 /dev/urandom >/dev/shm/random; md5sum /dev/shm/random")
        box.snapshot("booted")
        with engine.snapshots.restore(f"{box.name}/booted", name="restored") as restored:
            twin = restored.fork()
            assert isinstance(twin, Instance)
            for one in (box, restored):
                assert_confined(engine, one)
            with twin:
                assert shell(twin, "md5sum /dev/shm/random") == made
                goes_on(twin)
        engine.snapshots.remove(f"{box.name}/booted")


def test_twins_share_the_memory_that_they_do_not_write_to(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell(counter, "head -c 20000000 /dev/urandom >/dev/shm/random")
    twins = counter.fork(2)
    assert isinstance(twins, list)
    try:
        for twin in twins:
            with capture.find_memory(f"{twin.info().directory}/run", 128 << 20) as source:
                assert source is not None and source.base >= 0
                assert source.own_size() < 20_000_000
    finally:
        for twin in twins:
            twin.remove(force=True)


FILL = "head -c 20000000 /dev/urandom >/root/large; sync"


def disk_files(box: Instance) -> list[tuple[str, int]]:
    """Return the files of a machine's disk, and how many have them."""
    files = diskchain.chain(box.info().directory)
    return [(os.path.basename(path), os.stat(path).st_nlink) for path in files]


@pytest.mark.soak
def test_a_large_disk_is_shared_with_twins_and_snapshots(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diskfork, "_DEPTH_MAX", 3)
    digest = "md5sum /root/large"
    made = shell(counter, f"{FILL}; {digest}")
    twins = counter.fork(2)
    assert isinstance(twins, list)
    try:
        for number, box in enumerate((counter, *twins)):
            (raw, sharers), top = disk_files(box)
            assert (raw, top) == ("disk.raw", ("disk.1.qcow2", 1)) and sharers >= 3
            shell(box, f"echo {number} >/root/who; sync")
        # Nobody can write to what others have, not even a QEMU that was taken over.
        for box in (counter, *twins):
            modes = writable(engine, box)
            assert modes == {"disk.raw": False, "disk.1.qcow2": True}
        for round_ in range(4):
            third = twins[0].fork()
            assert isinstance(third, Instance)
            with third:
                assert shell(third, f"cat /root/who; {digest}") == f"1\n{made}"
            shell(twins[0], f"echo {round_} >>/root/rounds; sync")
        assert len(disk_files(twins[0])) <= 3
        assert shell(twins[0], "cat /root/rounds") == "0\n1\n2\n3"
        counter.snapshot("large")
        shell(counter, "rm /root/large; sync")
        counter.remove(force=True)
        with engine.snapshots.restore(f"{counter.name}/large", name="again") as again:
            assert shell(again, f"cat /root/who; {digest}") == f"0\n{made}"
            goes_on(again)
        engine.snapshots.remove(f"{counter.name}/large")
        twins[0].stop(timeout=0)
        twins[0].update(disk="11G")
        assert disk_files(twins[0]) == [("disk.raw", 1)]
        twins[0].start()
        assert shell(twins[0], f"cat /root/who; {digest}") == f"1\n{made}"
        twins[1].update(disk="11G")
        shell(twins[1], "test $(df -k / | awk 'END {print $2}') -gt 10900000")
        twins[1].stop(timeout=0)
        twins[1].start()
        assert shell(twins[1], f"cat /root/who; {digest}") == f"2\n{made}"
    finally:
        for twin in twins:
            twin.remove(force=True)


def writable(engine: Engine, box: Instance) -> dict[str, bool]:
    """Return the files of a disk that QEMU has open, and whether it may write to them."""
    found: dict[str, bool] = {}
    for pid in engine._context.machines.processes(box.id):
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith(f"{engine.root}/") and "/disk." in target:
                flags = Path(f"/proc/{pid}/fdinfo/{name}").read_text().split()[3]
                file = os.path.basename(target)
                found[file] = found.get(file, False) or bool(int(flags, 8) & os.O_ACCMODE)
    found.pop("disk.erofs", None)
    return found


@pytest.mark.soak
def test_a_disk_at_rest_goes_back_to_a_large_snapshot(engine: Engine, counter: Instance) -> None:
    shell(counter, f"{FILL}; echo then >/root/file; sync")
    counter.stop(timeout=0)
    counter.snapshot("still")
    counter.start()
    shell(counter, "echo now >/root/file; sync")
    counter.stop(timeout=0)
    with engine.snapshots.restore(f"{counter.name}/still", name="copy") as copy:
        copy.start()
        assert shell(copy, "cat /root/file") == "then"
        counter.start()
        assert shell(counter, "cat /root/file") == "now"
        counter.stop(timeout=0)
    engine.snapshots.restore(f"{counter.name}/still")
    assert disk_files(counter) == [("disk.raw", 1)]
    counter.start()
    assert shell(counter, "cat /root/file") == "then"
    engine.snapshots.remove(f"{counter.name}/still")


@pytest.mark.parametrize(
    "step", ["DiskFork.take", pytest.param("blockdev_add", marks=pytest.mark.soak)]
)
def test_a_fork_of_a_large_disk_that_is_killed_leaves_it_whole(
    engine: Engine, counter: Instance, step: str
) -> None:
    made = shell(counter, f"{FILL}; md5sum /root/large")
    killed_at(engine, counter, "fork", f"drivers.vm.diskfork.{step}")
    goes_on(counter)
    engine.reconcile()
    twin = counter.fork()
    assert isinstance(twin, Instance)
    with twin:
        assert shell(twin, "md5sum /root/large") == made
    counter.stop(timeout=0)
    counter.start()
    assert shell(counter, "md5sum /root/large") == made


STEPS: list[tuple[Any, str]] = [
    (state, "check_movable"),
    (state, "_stand_still"),
    (state, "_write_memory"),
    (diskfork.DiskFork, "prepare"),
    (diskfork.DiskFork, "take"),
    (diskfork.DiskFork, "finish"),
    (forking, "create_from_spec"),
    (forking, "start"),
]


@pytest.mark.parametrize(("module", "step"), STEPS, ids=[name for _, name in STEPS])
def test_a_fork_that_fails_leaves_the_source_running_and_nothing_behind(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch, module: Any, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Unavailable(f"{step} fails")

    with monkeypatch.context() as patch:
        patch.setattr(module, step, fail)
        with pytest.raises(Unavailable, match=step):
            counter.fork()
    goes_on(counter)
    assert [info.id for info in engine.list(all=True)] == [counter.id]
    assert leftovers(engine) == []


def test_a_later_twin_that_fails_takes_the_earlier_ones_with_it(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    start = vars(forking)["start"]

    def fail_second(*args: Any, **options: Any) -> Any:
        started.append(args)
        if len(started) == 2:
            raise Unavailable("the second fails")
        return start(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(forking, "start", fail_second)
        with pytest.raises(Unavailable, match="second"):
            counter.fork(3)
    assert [info.id for info in engine.list(all=True)] == [counter.id]
    goes_on(counter)


@pytest.mark.parametrize("step", ["_stand_still", "_write_memory", "write_record", "cut"])
def test_a_suspend_that_fails_leaves_the_machine_running(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Unavailable(f"{step} fails")

    with monkeypatch.context() as patch:
        if step == "cut":
            patch.setattr("hutch.qmp.machine.quit", fail)
        else:
            patch.setattr(state, step, fail)
        with pytest.raises(Unavailable, match=step):
            counter.suspend()
    assert counter.info().state == State.RUNNING
    goes_on(counter)
    counter.stop(timeout=0)
    assert counter.info().state == State.EXITED
    assert not (Path(counter.info().directory) / "suspended").exists()


VICTIM = """
import importlib, sys, time
from hutch.engine import Engine

def stop(*_, **__):
    print("here", flush=True)
    time.sleep(1000)

module, _, name = sys.argv[4].rpartition(".")
holder, _, kind = module.rpartition(".")
if kind[0].isupper():
    setattr(getattr(importlib.import_module("hutch." + holder), kind), name, stop)
else:
    setattr(importlib.import_module("hutch." + module), name, stop)
with Engine(sys.argv[1]) as engine:
    box = engine.get(sys.argv[2])
    getattr(box, sys.argv[3])()
"""


KILLED = [
    ("fork", "drivers.vm.state._stand_still"),
    ("fork", "qmp.memory.save_devices"),
    ("fork", "drivers.vm.diskfork.DiskFork.take"),
    ("fork", "drivers.vm.state._write_memory"),
    ("snapshot", "drivers.vm.state.write_record"),
    ("suspend", "drivers.vm.state._write_memory"),
    ("suspend", "qmp.machine.quit"),
]


@pytest.mark.parametrize(("what", "step"), KILLED)
def test_a_caller_that_is_killed_leaves_a_machine_that_goes_on(
    engine: Engine, counter: Instance, what: str, step: str
) -> None:
    killed_at(engine, counter, what, step)
    goes_on(counter)
    engine.reconcile()
    assert leftovers(engine) == []
    assert counter.info().state == State.RUNNING
    twin = counter.fork()  # nothing stands in its way
    assert isinstance(twin, Instance)
    with twin:
        goes_on(twin)
    counter.stop(timeout=0)
    assert counter.info().state == State.EXITED


def killed_at(engine: Engine, counter: Instance, what: str, step: str) -> None:
    """Have another process do something with a machine, and kill it when it gets to a step."""
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(engine.root), counter.id, what, step],
        stdout=subprocess.PIPE,
    )
    assert victim.stdout is not None
    with victim.stdout:
        assert victim.stdout.readline() == b"here\n"
        victim.send_signal(signal.SIGKILL)
        victim.wait()


def test_what_cannot_be_forked_says_so(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUTCH_CRIU", "/nonexistent/criu")
    with pytest.raises(AlreadyExists, match="taken"):
        counter.fork(name=counter.name)
    with pytest.raises(InvalidArgument, match="count"):
        counter.fork(0)
    counter.pause()
    with pytest.raises(WrongState, match="paused"):
        counter.fork()
    counter.unpause()
    goes_on(counter)
    with engine.start("busybox", ["sleep", "1000"]) as container:
        for act in (container.fork, container.suspend, container.snapshot):
            with pytest.raises(Unsupported, match="CRIU"):
                act()


def test_a_published_port_is_not_taken_twice(engine: Engine) -> None:
    with engine.start(
        "busybox",
        ["sh", "-c", "echo up; exec sleep 1000"],
        isolation="vm",
        memory="128M",
        publish=["127.0.0.1:18765:80"],
    ) as box:
        with pytest.raises(InvalidArgument, match="18765"):
            box.fork()
        twin = box.fork(publish=False)
        assert isinstance(twin, Instance)
        with twin:
            assert twin.info().spec.ports == ()


def test_a_machine_with_a_directory_of_the_host_stays_where_it_is(
    engine: Engine, tmp_path: Path
) -> None:
    with engine.start(
        "busybox",
        ["sleep", "1000"],
        isolation="vm",
        memory="128M",
        volumes=[f"{tmp_path}:/host"],
    ) as box:
        with pytest.raises(Unsupported, match="directories"):
            box.fork()
        assert shell(box, "ls -d /host") == "/host"


def test_a_machine_whose_networks_changed_is_started_again_first(
    engine: Engine, counter: Instance
) -> None:
    engine.networks.create("other")
    try:
        engine.networks.connect("other", counter.name)
        with pytest.raises(Unsupported, match="networks"):
            counter.fork()
        goes_on(counter)
        engine.networks.disconnect("other", counter.name)
        twin = counter.fork()
        assert isinstance(twin, Instance)
        with twin:
            goes_on(twin)
    finally:
        engine.networks.disconnect("other", counter.name, force=True)
        engine.networks.remove("other")
