"""Machines that go to another hutch while they run: by pre-copy, by post-copy, and not at all."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.drivers.vm.departing import Departing
from hutch.engine import Engine, migrate_live
from hutch.engine.context import Context
from hutch.errors import HutchError, InvalidArgument, OperationTimeout, Unavailable
from hutch.migration.records import MigrationRecord
from hutch.migration.wire import Wire
from hutch.qmp.machine import stop
from hutch.qmp.migration import set_parameters
from hutch.records import ProgressEvent
from tests.migration.conftest import Other, behind, die_migrating
from tests.migration.test_failures import once_killed
from tests.migration.test_machines import until_more
from tests.native.boxes import wait_until
from tests.requires import live_qemu, requires
from tests.vm.confined import assert_confined

pytestmark = [
    requires("root", "qemu", "live-qemu", "apt-mirror", "busybox", "cgroup", "netns", "erofs"),
    requires("mke2fs", "nftables", "seccomp"),
    pytest.mark.integration,
    pytest.mark.timeout(600),
]

_STANDS_S = 0.5

# Counts aloud, and writes 20 MB/s to its memory and now and then to its disk.
COUNT = """
(while :; do dd if=/dev/urandom of=/dev/shm/dirty bs=1M count=2 conv=notrunc 2>/dev/null
 usleep 50000; done) &
i=0; while :; do i=$((i+1)); echo $i; echo $i > /root/count; usleep 20000; done
"""


@pytest.fixture(autouse=True)
def newer_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUTCH_QEMU", str(live_qemu()))


@pytest.fixture(scope="module")
def network(source_engine: Engine, other_root: Path, other_namespace: int) -> Iterator[str]:
    """A network with the same addresses on both sides, which no other process takes: one that
    is found taken when its bridge is made gets others."""
    other = Other(other_root, other_namespace)
    subnet = f"10.{96 + os.getpid() // 250 % 100}.{os.getpid() % 250}.0/24"
    source_engine.networks.create("both", subnets=[subnet])
    other.hutch("network", "create", "--subnet", subnet, "both")
    yield "both"
    source_engine.networks.remove("both")
    other.hutch("network", "rm", "both")


@pytest.fixture
def moved(source: Engine, network: str) -> str:
    """A machine that counts; it is the tests' to remove."""
    box = source.start(
        "busybox",
        ["sh", "-c", COUNT],
        name="moved",
        isolation="vm",
        memory="128M",
        disk="256M",
        network=network,
    )
    box.exec(["sh", "-c", "echo kept > /root/file; sync; echo 7 > /dev/shm/ram"], check=True)
    return box.id


def said(source: Engine) -> list[int]:
    return [int(line) for record in source.get("moved").logs() for line in record.data.split()]


def is_whole(counted: list[int]) -> bool:
    return counted == list(range(1, len(counted) + 1))


def goes_on_here(source: Engine, target: Other) -> None:
    """It runs at the source, counts on without a gap, and the target has nothing."""
    box = source.get("moved")
    assert box.info().state == "running"
    before = len(said(source))
    deadline = time.monotonic() + 200
    while len(said(source)) < before + 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert is_whole(said(source))
    assert box.exec(["cat", "/root/file"]).stdout.split() == [b"kept"]
    listing = ("-o", "json", "ps", "-a")
    wait_until(lambda: json.loads(target.hutch(*listing)) == [], "it to be gone at the target")


def goes_on_there(source: Engine, target: Other, before: int) -> None:
    """It runs at the target, counts on without a gap, with memory and disk; nothing is here."""
    counted = until_more(target, before + 5)
    assert is_whole(counted)
    assert target.hutch("exec", "moved", "cat", "/root/file", "/dev/shm/ram").split() == [
        "kept",
        "7",
    ]
    # The program writes it anew all the time: at some moments it is empty.
    shown = ""
    while not shown.strip():
        shown = target.hutch("exec", "moved", "cat", "/root/count")
    assert int(shown) >= before
    assert [info.name for info in source.list(all=True)] == []


def is_used_there(target: Other) -> None:
    """The processor that it was plugged at the source it has; it is forked, and suspended with
    a disk that has become a chain by that."""
    assert target.hutch("exec", "moved", "nproc") == "2"
    target.hutch("exec", "moved", "dd", "if=/dev/urandom", "of=/root/big", "bs=1M", "count=24")
    target.hutch("fork", "moved", "twin")
    target.hutch("rm", "-f", "twin")
    target.hutch("suspend", "moved")
    target.hutch("start", "moved")
    assert target.hutch("exec", "moved", "cat", "/root/file", "/dev/shm/ram").split() == [
        "kept",
        "7",
    ]


def end(target: Other) -> None:
    """Stop it, start it from the disk that came along, and remove it."""
    target.hutch("stop", "-t", "1", "moved")
    target.hutch("start", "moved")
    assert target.hutch("exec", "moved", "cat", "/root/file") == "kept"
    target.hutch("rm", "-f", "moved")


@pytest.mark.versions
@pytest.mark.parametrize("post_copy", [False, True], ids=["pre-copy", "post-copy"])
def test_a_machine_goes_on_at_the_target_without_a_gap(
    source: Engine, target: Other, moved: str, post_copy: bool
) -> None:
    told: list[ProgressEvent] = []
    bandwidth = 0
    if not post_copy:
        # Counted with all that it does not hold, such a disk takes ten minutes at this pace.
        source.get("moved").update(cpus=2, disk="20G")
        bandwidth = 32 << 20
    before = len(said(source))
    address = source._context.networks.endpoints(moved)[0].ipv4
    done = source.migrate(
        "moved",
        target.destination,
        post_copy=post_copy,
        bandwidth=bandwidth,
        timeout_s=400,
        progress=told.append,
    )
    assert done.problem == ""
    assert done.way in ("pre-copy", "post-copy" if post_copy else "pre-copy")
    assert 0 < done.downtime_s <= done.offline_s < done.total_s
    assert any(event.phase.startswith("copying memory") for event in told)
    goes_on_there(source, target, before)
    with target.engine() as there:
        assert_confined(there, there.get("moved"))
    assert address in target.hutch("exec", "moved", "ip", "-4", "-o", "addr", "show", "eth0")
    if not post_copy:
        is_used_there(target)
    end(target)


def test_memory_goes_by_several_streams_compressed(
    source: Engine, target: Other, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it has said comes along, though it is not logged yet when it stands still; from
    then on its downtime counts, though much of its memory is sent after that."""
    before = len(said(source))
    real = Departing.allow

    def stopped_early(self: Departing) -> None:
        stop(self._monitor)
        time.sleep(_STANDS_S)
        real(self)

    with behind(source, moved, monkeypatch, migrate_live._Journey, "copy_disk"):
        monkeypatch.setattr(Departing, "allow", stopped_early)
        done = source.migrate("moved", target.destination, parallel=2, compress=True)
    monkeypatch.setattr(Departing, "allow", real)
    assert (done.way, done.problem) == ("pre-copy", "")
    assert _STANDS_S < done.downtime_s <= done.offline_s
    goes_on_there(source, target, before)
    end(target)


# Where this process may be killed while the source still has it, and who comes out of it.
AT_THE_SOURCE = [
    [("_Journey.copy_memory", "after"), ("decide", "after")],
    [
        ("_Journey.prepare", "before"),
        ("_Journey.prepare", "after"),
        ("_Journey.copy_disk", "after"),
        ("_Journey.switch", "after"),
        ("decide", "before"),
        ("_Journey.commit", "before"),
    ],
]
PARTS = [pytest.param(0, id="some"), pytest.param(1, id="others", marks=pytest.mark.soak)]


@pytest.mark.parametrize("part", PARTS)
def test_a_source_that_is_killed_before_the_target_may_run_it_goes_on(
    source: Engine, target: Other, moved: str, part: int
) -> None:
    for name, when in AT_THE_SOURCE[part]:
        die_migrating(source, target, f"hutch.engine.migrate_live:{name}", when)
        target.hutch("system", "reconcile")
        source.reconcile()
        goes_on_here(source, target)
    source.get("moved").remove(force=True)


def test_a_source_that_is_killed_when_the_target_runs_it_has_nothing(
    source: Engine, target: Other, moved: str
) -> None:
    before = len(said(source))
    die_migrating(source, target, "hutch.engine.migrate:complete", "before")
    assert source.get("moved").info().state == "migrating"
    source.reconcile()
    goes_on_there(source, target, before)
    end(target)


AT_THE_TARGET = [
    [
        ("hutch.drivers.vm.landing:QemuLanding.end_disk", "after"),
        ("hutch.drivers.vm.landing:QemuLanding.go", "before"),
    ],
    [
        ("hutch.engine.migrate_receive:land", "before"),
        ("hutch.engine.migrate_land:take_tail", "before"),
        ("hutch.drivers.vm.landing:QemuLanding.begin", "after"),
        ("hutch.drivers.vm.landing:QemuLanding.wait_loaded", "after"),
        ("hutch.drivers.vm.landing:QemuLanding.go", "after"),
    ],
]


@pytest.mark.parametrize("part", PARTS)
def test_a_target_that_is_killed_before_it_is_up_leaves_it_here(
    source: Engine, target: Other, moved: str, tmp_path: Path, part: int
) -> None:
    for number, (where, when) in enumerate(AT_THE_TARGET[part]):
        (directory := tmp_path / str(number)).mkdir()
        with pytest.raises(HutchError):
            source.migrate("moved", once_killed(target, directory, where, when))
        source.reconcile()
        target.hutch("system", "reconcile")
        goes_on_here(source, target)
    source.get("moved").remove(force=True)


@pytest.mark.soak
def test_a_target_that_is_killed_when_it_is_up_has_it(
    source: Engine, target: Other, moved: str, tmp_path: Path
) -> None:
    """Its starter dies before it has written down that the machine runs there."""
    before = len(said(source))
    where = "hutch.engine.migrate_land:activate_started"
    source.migrate("moved", once_killed(target, tmp_path, where, "before"))
    goes_on_there(source, target, before)
    end(target)


@pytest.mark.parametrize(
    "message", [*(pytest.param(m, marks=pytest.mark.soak) for m in ("Begin", "Commit")), "Switch"]
)
def test_a_link_that_is_cut_leaves_one_that_runs(
    source: Engine, target: Other, moved: str, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    real = Wire.send
    cut: list[str] = []
    before = len(said(source))

    def send(self: Wire, sent: object) -> None:
        real(self, sent)  # type: ignore[arg-type]
        if type(sent).__name__ == message and not cut:
            cut.append(message)
            raise HutchError("the link was cut")

    monkeypatch.setattr(Wire, "send", send)
    try:
        source.migrate("moved", target.destination)
    except HutchError:
        pass
    assert cut == [message]
    source.reconcile()
    if message == "Commit" and json.loads(target.hutch("-o", "json", "ps", "-a")):
        goes_on_there(source, target, before)
        end(target)
        return
    goes_on_here(source, target)
    source.get("moved").remove(force=True)


@pytest.mark.soak
def test_a_qemu_that_is_killed_leaves_the_other(
    source: Engine, target: Other, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's while it is copied to: it goes on here. The source's when all is there: it
    goes on at the target."""
    real = migrate_live._Journey.copy_disk

    def kill_target(self: migrate_live._Journey) -> None:
        real(self)
        with target.engine() as there:
            (record,) = there.list(all=True)
            there._context.driver("vm").kill_all(record.id)

    with monkeypatch.context() as patch:
        patch.setattr(migrate_live._Journey, "copy_disk", kill_target)
        with pytest.raises(HutchError):
            source.migrate("moved", target.destination)
    goes_on_here(source, target)
    before = len(said(source))
    decide = migrate_live.decide

    def kill_source(context: Context, migration: MigrationRecord) -> MigrationRecord:
        decided = decide(context, migration)
        context.driver("vm").kill_all(moved)
        return decided

    with monkeypatch.context() as patch:
        patch.setattr(migrate_live, "decide", kill_source)
        source.migrate("moved", target.destination)
    goes_on_there(source, target, before)
    end(target)


def test_ctrl_c_a_failure_and_a_time_limit_leave_it_here(
    source: Engine, target: Other, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for phase in ("copying disk", "copying memory", "switching over"):

        def interrupt(event: ProgressEvent, phase: str = phase) -> None:
            if event.phase.startswith(phase):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            source.migrate("moved", target.destination, progress=interrupt)
        goes_on_here(source, target)
    for mirrored, problem in (((1, 2), "the disk of moved is not"), ((1, 1), "changes faster")):
        with monkeypatch.context() as patch:
            # How long a disk takes at this speed depends on what has been written to it.
            patch.setattr(Departing, "mirrored", lambda _, mirrored=mirrored: mirrored)
            with pytest.raises(OperationTimeout, match=f"{problem}.* 0.5 s"):
                source.migrate("moved", target.destination, bandwidth="1M", timeout_s=0.5)
        goes_on_here(source, target)

    def fail(*_: object) -> None:
        raise OSError(28, "injected")

    monkeypatch.setattr(migrate_live, "decide", fail)
    with pytest.raises(OSError, match="injected"):
        source.migrate("moved", target.destination)
    goes_on_here(source, target)
    source.get("moved").remove(force=True)


def test_a_link_that_breaks_in_post_copy_loses_the_machine_and_keeps_its_disk(
    source: Engine, target: Other, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is on both sides then: it ends at the target, where its disk is."""
    real = Departing.finish

    def slowly(self: Departing) -> bool:
        set_parameters(self._monitor, max_postcopy_bandwidth=100_000)
        return real(self)

    def wait(self: Departing, timeout_s: float) -> None:
        raise Unavailable("the link was cut")

    # Most of it is still here when the link is cut.
    monkeypatch.setattr(migrate_live._Journey, "_is_near", lambda *_: True)
    monkeypatch.setattr(Departing, "finish", slowly)
    monkeypatch.setattr(Departing, "wait_complete", wait)
    done = source.migrate("moved", target.destination, post_copy=True)
    assert done.way == "post-copy"
    assert "as by a power failure" in done.problem
    assert [info.name for info in source.list(all=True)] == []
    target.hutch("start", "moved")
    assert target.hutch("exec", "moved", "cat", "/root/file") == "kept"
    target.hutch("rm", "-f", "moved")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"post_copy": True, "parallel": 2}, "parallel"),
        ({"parallel": 99}, "parallel"),
        ({"downtime_s": 0}, "downtime"),
        ({"timeout_s": -1}, "timeout"),
        ({"timeout_s": math.nan}, "timeout"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    source: Engine, options: dict[str, object], field: str
) -> None:
    box = source.create("busybox", ["true"], name="moved", isolation="vm")
    with pytest.raises(InvalidArgument) as caught:
        source.migrate("moved", "unix:///nowhere", **options)  # type: ignore[arg-type]
    assert caught.value.field == field
    box.remove()
