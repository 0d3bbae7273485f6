"""Failures at every step, kills at any moment, many at once: nothing is left, nothing lies."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from hutch.drivers.container import driver as container_driver
from hutch.drivers.container.assets import AssetBuilder
from hutch.engine import Engine, Instance, create, start
from hutch.engine.context import Context
from hutch.engine.locking import instance_lock
from hutch.errors import Busy, Exhausted, HutchError, InternalError, InvalidArgument
from hutch.ids import InstanceId, new_instance_id
from hutch.lifecycle import State
from hutch.linux.cgroup import detect
from hutch.process.launcher import Launcher
from hutch.process.records import is_alive, read_pid
from hutch.process.supervisor import Supervisor
from hutch.storage.snapshots import Snapshots
from tests.leaks import open_files
from tests.requires import requires

pytestmark = requires("root", "cgroup", "overlayfs", "seccomp", "netns", "nftables", "busybox")

DEADLINE_S = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def groups() -> set[str]:
    return set(detect().list_groups())


@contextmanager
def nothing_left(engine: Engine) -> Iterator[None]:
    """Check that the block leaves no instance, directory, group, endpoint or volume user."""
    made: list[InstanceId] = []

    def remember() -> InstanceId:
        made.append(new_instance_id())
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(create, "new_instance_id", remember)
        yield
    assert engine.list(all=True) == []
    assert list((engine.root / "instances").iterdir()) == []
    assert groups() & set(made) == set()
    assert engine.networks.members("bridge") == ()
    for volume in engine.volumes.list():
        assert engine.volumes.users(volume.name) == ()


# ---- a failure at each step ----

STEPS = [
    (Snapshots, "make"),
    (create, "resolve_mounts"),
    (create, "insert_record"),
    (start, "_prepare_network"),
    (start, "write_files"),
    (start, "_launch"),
    (container_driver.ContainerDriver, "_create_group"),
    (AssetBuilder, "prepare"),
    (container_driver, "compile_container"),
    (Launcher, "spawn"),
    (Supervisor, "launch"),
    (Supervisor, "wait_pid"),
    (Supervisor, "wait_sync"),
    (Supervisor, "go"),
    (Supervisor, "wait_started"),
    (container_driver, "process_start_time"),
]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize("failure", [OSError(5, "injected"), KeyboardInterrupt()], ids=type)
def test_a_failure_at_any_step_of_a_run_leaves_nothing(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    failure: BaseException,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    with nothing_left(engine):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises((HutchError, OSError, KeyboardInterrupt)):
                engine.run("busybox", ["sleep", "100"], name="again", volumes="kept:/v")
        # The name is free, and everything works again.
        assert engine.run("busybox", ["true"], name="again", volumes="kept:/v").exit_code == 0
    engine.volumes.remove("kept")


@pytest.mark.parametrize(
    "options",
    [
        {"volumes": "/:/m:bad"},
        {"mounts": "type=bind,source=/nonexistent,target=/m"},
        {"devices": "/dev/nonexistent"},
        {"devices": "/dev/null:/etc/passwd"},
        {"workdir": "/etc/passwd"},
        {"user": "nosuch"},
        {"sysctls": {"net.ipv4.nonexistent": "1"}},
        {"network": "nonexistent"},
        {"cpuset_cpus": "4000"},
        {"security_opt": "seccomp={}"},
        {"ulimits": "nofile=99999999"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_cannot_be_given_is_refused_and_leaves_nothing(
    engine: Engine, options: dict[str, object]
) -> None:
    with nothing_left(engine), pytest.raises(HutchError) as failure:
        engine.run("busybox", ["true"], **options)  # type: ignore[arg-type]
    assert not isinstance(failure.value, InternalError), "told as a bug of ours"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"input": 5}, "input"),
        ({"timeout": "1"}, "timeout"),
        ({"timeout": math.nan}, "timeout"),
    ],
    ids=repr,
)
def test_input_and_timeout_of_a_wrong_kind_are_named(
    engine: Engine, arguments: dict[str, object], field: str
) -> None:
    with nothing_left(engine), pytest.raises(InvalidArgument, match=f"^{field}: expected"):
        engine.run("busybox", ["true"], network="none", **arguments)  # type: ignore[arg-type]


def test_an_infinite_timeout_is_none(engine: Engine) -> None:
    assert engine.run("busybox", ["true"], network="none", timeout=math.inf).exit_code == 0


def test_a_taken_port_is_named_and_the_loser_leaves_nothing(engine: Engine) -> None:
    with engine.start("busybox", ["sleep", "100"], publish="127.0.0.1:29871:80") as first:
        with pytest.raises(Busy, match="29871"):
            engine.run("busybox", ["true"], publish="127.0.0.1:29871:80")
        assert [info.id for info in engine.list(all=True)] == [first.id]


def test_a_failed_start_can_be_repeated(engine: Engine, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with engine.create("busybox", ["true"], volumes=f"{source}:/m", network="none") as box:
        source.rmdir()
        with pytest.raises(InvalidArgument):
            box.start()
        assert box.info().state == State.CREATED
        source.mkdir()
        box.start()
        assert box.wait(timeout=DEADLINE_S) == 0


# ---- kill -9 ----


def pids(engine: Engine, box: Instance) -> tuple[int, int]:
    record = read_pid(f"{engine.root}/instances/{box.id}/run")
    assert record is not None
    return record.pid, record.supervisor


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def test_a_killed_supervisor_takes_its_program_along(engine: Engine) -> None:
    with engine.start("busybox", ["sleep", "100"]) as box:
        program, supervisor = pids(engine, box)
        os.kill(supervisor, signal.SIGKILL)
        until(lambda: is_gone(program), "the program lives")
        info = box.info()
        assert info.state == State.EXITED and info.exit_code == 137
        assert "supervisor" in info.error
        box.start()
        assert box.info().state == State.RUNNING


def test_a_killed_program_is_booked(engine: Engine) -> None:
    with engine.start("busybox", ["sleep", "100"], network="none") as box:
        os.kill(pids(engine, box)[0], signal.SIGKILL)
        assert box.wait(timeout=DEADLINE_S) == 137
        until(lambda: box.info().state == State.EXITED, "not booked")


STARTER = """
import sys
from hutch.engine import Engine
engine = Engine(sys.argv[1])
command = ["sh", "-c", sys.argv[2]]
box = engine.start("busybox", command, name=sys.argv[3], remove=sys.argv[4] == "rm")
print("up", flush=True)
sys.stdin.read()
"""


@contextmanager
def starter(engine: Engine, script: str, name: str, keep: str) -> Iterator[None]:
    """Start an instance from a process that is killed with SIGKILL at the block's start."""
    argv = [sys.executable, "-c", STARTER, str(engine.root), script, name, keep]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
    yield


def test_an_instance_outlives_its_killed_starter(engine: Engine) -> None:
    with starter(engine, "echo one; sleep 1000", "orphan", "keep"):
        box = engine.get("orphan")
        assert box.info().state == State.RUNNING
        assert box.exec(["echo", "still"]).text == "still\n"
        assert [record.data for record in box.logs()] == [b"one\n"]
        box.stop(timeout=0)
        box.remove()


def test_an_orphan_is_removed_at_its_exit_when_it_asked_for_that(engine: Engine) -> None:
    with starter(engine, "until test -e /go; do sleep 0.02; done", "orphan", "rm"):
        box = engine.get("orphan")
        box.exec(["touch", "/go"])
        until(lambda: not (engine.root / "instances" / box.id).exists(), "not removed")
        until(lambda: engine.list(all=True) == [], "the record stays")
        assert box.id not in groups()


def test_a_starter_killed_at_any_moment_leaves_nothing_after_reconcile(engine: Engine) -> None:
    code = (
        "import sys\nfrom hutch.engine import Engine\nengine = Engine(sys.argv[1])\n"
        "print('go', flush=True)\nengine.run('busybox', ['sleep', '1000'])\n"
    )
    with nothing_left(engine):
        for step in range(8):
            argv = [sys.executable, "-c", code, str(engine.root)]
            with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(step * 0.003)  # a moment of the start, not a wait for anything
                process.kill()
        until(lambda: _reconciled(engine), "instances stay")


CUT_OFF = """
import os, sys
from hutch.engine import Engine, start
engine = Engine(sys.argv[1])
write = start._write

def die_instead(*arguments, event="", **changes):
    if event == "start":
        os.kill(os.getpid(), 9)
    return write(*arguments, event=event, **changes)

start._write = die_instead
engine.start("busybox", ["sleep", "1000"], name="cut")
"""


def test_a_start_cut_off_before_its_record_is_booked_by_the_next_to_look(engine: Engine) -> None:
    argv = [sys.executable, "-c", CUT_OFF, str(engine.root)]
    assert subprocess.run(argv).returncode == -signal.SIGKILL
    with nothing_left(engine):
        box = engine.get("cut")
        program, _ = pids(engine, box)
        info = box.info()
        assert info.state == State.RUNNING and info.pid == program
        assert box.exec(["echo", "here"]).text == "here\n"
        box.stop(timeout=0)
        assert is_gone(program)
        box.remove()


def test_a_directory_that_a_reconcile_takes_before_it_is_locked_is_made_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a directory and its lock a maker looks as one that was killed there."""
    swept: list[str] = []

    @contextmanager
    def reconcile_first(context: Context, identifier: str) -> Iterator[None]:
        if not swept:
            swept.extend(engine.reconcile().directories)
        with instance_lock(context, identifier):
            yield

    monkeypatch.setattr(create, "instance_lock", reconcile_first)
    with nothing_left(engine):
        box = engine.create("busybox", ["true"], network="none")
        assert swept == [box.id]
        box.remove()


def _reconciled(engine: Engine) -> bool:
    engine.reconcile()
    for info in engine.list(all=True):
        engine.get(info.id).remove(force=True)
    return engine.list(all=True) == [] and not list((engine.root / "instances").iterdir())


def test_a_reboot_is_noticed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine.start("busybox", ["sleep", "1000"], network="none") as box:
        program, supervisor = pids(engine, box)
        os.kill(supervisor, signal.SIGKILL)
        until(lambda: is_gone(program), "the program lives")
        context = engine._context
        monkeypatch.setitem(context.__dict__, "boot_id", "another boot")
        report = engine.reconcile()
        assert report.booked == (box.id,)
        assert box.info().state == State.EXITED
        assert "restarted" in box.info().error


def test_layers_that_a_power_cut_took_are_there_at_the_next_start(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was unpacked and may not have reached the disk is thrown away after a reboot; the
    blobs were there before the image had its name."""
    with engine.start("busybox", ["sh", "-c", "echo mine > /kept"], network="none") as box:
        box.wait()
        layers = engine._context.layers
        image = engine._context.images.get("busybox")
        for chain_id in image.chain_ids:
            synced = Path(layers.path(chain_id)).parent / "synced"
            synced.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr("hutch.storage.layers.boot_id", lambda: "another boot")
            assert set(layers.reconcile()) >= set(image.chain_ids)
        assert not any(layers.has(chain_id) for chain_id in image.chain_ids)
        box.start()
        assert box.wait() == 0
        assert box.files.read("/kept") == b"mine\n"


# ---- many ----


def test_two_hundred_at_once(engine: Engine) -> None:
    with nothing_left(engine), ThreadPoolExecutor(16) as pool:
        boxes = list(
            pool.map(
                lambda _: engine.start("busybox", ["sleep", "1000"], network="none"),
                range(200),
            )
        )
        assert len(engine.list()) == 200
        done = list(pool.map(lambda box: box.exec(["echo", "x"]).text, boxes))
        assert done == ["x\n"] * 200
        list(pool.map(lambda box: box.remove(force=True), boxes))


def test_many_runs_do_not_grow_the_process(engine: Engine) -> None:
    rounds = 2000 if os.environ.get("HUTCH_SOAK") else 60

    def measure() -> tuple[int, int, int]:
        engine._context.trash.drain(DEADLINE_S)
        gc.collect()  # what earlier tests left open would be closed at any time
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        mounts = Path("/proc/self/mountinfo").read_text().count(str(engine.root))
        # A thread keeps its connection to the store for the next one.
        files = [name for name in open_files() if "/hutch.db" not in name]
        return pages * 4, len(files), mounts

    for _ in range(10):
        engine.run("busybox", ["true"])
    before = measure()
    for _ in range(rounds):
        assert engine.run("busybox", ["true"]).exit_code == 0
    after = measure()
    assert after[1] <= before[1] and after[2] <= before[2]
    assert after[0] - before[0] < 4096, "resident memory grew by more than 4 MiB"


RACER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from hutch.engine import Engine
from hutch.errors import HutchError, InternalError
engine = Engine(sys.argv[1])

def work(number):
    name = f"race{number % 3}"
    for turn in range(6):
        for step in ("create", "start", "stop", "remove"):
            try:
                if step == "create":
                    engine.create("busybox", ["sleep", "100"], name=name, network="none")
                elif step == "stop":
                    engine.get(name).stop(timeout=0)
                elif step == "remove":
                    engine.get(name).remove(force=True)
                else:
                    engine.get(name).start()
            except InternalError:
                raise
            except HutchError:
                pass

with ThreadPoolExecutor(4) as pool:
    list(pool.map(work, range(4)))
"""


def test_two_processes_race_for_the_same_names(engine: Engine) -> None:
    with nothing_left(engine):
        racers = [
            subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-c", RACER, str(engine.root)],
                stderr=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        for racer in racers:
            _, errors = racer.communicate(timeout=100)
            assert racer.returncode == 0, errors.decode()
        for info in engine.list(all=True):
            engine.get(info.id).remove(force=True)


# ---- disks ----


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", path], check=True)
    try:
        yield path
    finally:
        # A supervisor lets go of its overlay a moment after it has told the exit.
        until(lambda: subprocess.run(["umount", path]).returncode == 0, "the disk stays busy")


def test_a_full_disk_is_told_and_got_over(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "9m") as disk, Engine(disk / "root") as engine:
        engine.images.bootstrap("busybox")
        hog = disk / "hog"
        with open(hog, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
                file.flush()
        with pytest.raises(Exhausted):
            engine.images.bootstrap("busybox", reference="second")
            for _ in range(50):
                engine.create("busybox", ["true"], network="none")
        hog.unlink()
        for info in engine.list(all=True):
            engine.get(info.id).remove(force=True)
        assert engine.run("busybox", ["true"], network="none").exit_code == 0


def test_a_disk_filled_by_the_program_is_its_own_trouble(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk, Engine(disk / "root") as engine:
        engine.images.bootstrap("busybox")
        done = engine.run(
            "busybox",
            ["sh", "-c", "read go; dd if=/dev/zero of=/big bs=1M count=30; exit 5"],
            network="none",
            input=b"go\n",
        )
        assert done.exit_code == 5 and b"No space" in done.stderr
        # The space comes back when the supervisor has let go of the overlay.
        until(lambda: os.statvfs(disk).f_bavail * 4096 > 4 << 20, "the disk stays full")
        assert engine.run("busybox", ["echo", "fine"], network="none").text == "fine\n"


def test_an_instance_that_filled_the_disk_can_be_removed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk:
        with Engine(disk / "root") as engine:
            engine.images.bootstrap("busybox")
            box = engine.create("busybox", ["sleep", "1000"], network="none")
            box.start()
            box.exec(["dd", "if=/dev/zero", "of=/big", "bs=4k"])
        with Engine(disk / "root") as engine:
            with pytest.raises(Exhausted):
                engine.create("busybox", ["true"], network="none")
            engine.get(box.id).remove(force=True)
            assert engine.list(all=True) == []
            assert engine.run("busybox", ["echo", "fine"], network="none").text == "fine\n"


def test_a_read_only_root_is_refused(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(HutchError, match=r"[Rr]ead-only") as failure:
            Engine(disk / "root")
        assert failure.value.hint is not None
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def test_an_end_that_the_supervisor_has_yet_to_tell_is_not_taken_for_its_own(
    engine: Engine,
) -> None:
    with engine.start("busybox", ["sleep", "1000"]) as box:
        known = read_pid(str(engine.root / "instances" / box.id / "run"))
        assert known is not None
        os.kill(known.supervisor, signal.SIGSTOP)
        try:
            os.kill(known.pid, signal.SIGKILL)
            until(lambda: not is_alive(str(engine.root / "instances" / box.id / "run")), "its end")
            assert box.info().state == State.RUNNING
        finally:
            os.kill(known.supervisor, signal.SIGCONT)
        assert box.wait() == 137
        assert box.info().error == ""
