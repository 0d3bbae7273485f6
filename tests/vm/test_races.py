"""Many machines at once, starters that are killed, and the first start cut short."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.errors import AlreadyExists, HutchError
from tests.vm.machines import DEADLINE_S, NEEDS, SMALL, machine_root, nothing_left, start, until

pytestmark = list(NEEDS)

RUN = """
import sys
from hutch.engine import Engine
with Engine(sys.argv[1]) as engine:
    print("go", flush=True)
    done = engine.run("busybox", ["echo", "up"], isolation="vm", memory=sys.argv[2], network="none")
    sys.exit(done.exit_code if done.text == "up\\n" else 99)
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with machine_root(tmp_path_factory.mktemp("races") / "root") as opened:
        start(opened).remove(force=True)  # what is opened once, and kept, is open now
        yield opened


def _runner(engine: Engine, memory: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", RUN, str(engine.root), memory]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _templates(engine: Engine) -> set[Path]:
    return {d for d in (engine.root / "templates").iterdir() if not d.name.startswith(".")}


@pytest.mark.timeout(900)  # on a host with nothing else to do it takes seconds
def test_twenty_machines_at_once_all_answer(engine: Engine) -> None:
    with nothing_left(engine), ThreadPoolExecutor(20) as pool:
        boxes = list(pool.map(lambda _: start(engine), range(20)))
        try:
            said = list(pool.map(lambda box: box.exec(["hostname"]).text.strip(), boxes))
            assert said == [box.id[:12] for box in boxes]
            seeds = list(
                pool.map(lambda box: box.exec(["cat", "/proc/sys/kernel/random/uuid"]).text, boxes)
            )
            assert len(set(seeds)) == 20, "two clones have the same entropy"
        finally:
            list(pool.map(lambda box: box.remove(force=True), boxes))
    assert len(_templates(engine)) == 1


@pytest.mark.timeout(900)
def test_processes_that_want_one_template_make_one(engine: Engine) -> None:
    before = _templates(engine)
    with nothing_left(engine):
        runners = [_runner(engine, "136m") for _ in range(3)]
        for runner in runners:
            _, errors = runner.communicate(timeout=240)
            assert runner.returncode == 0, errors
    assert len(_templates(engine) - before) == 1


def test_a_name_that_two_want_is_given_to_one(engine: Engine) -> None:
    def one(_: int) -> bool:
        try:
            start(engine, name="wanted")
        except AlreadyExists:
            return False
        return True

    with nothing_left(engine):
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(one, range(4))) == 1
        engine.get("wanted").remove(force=True)


def _cut_short(engine: Engine, memory: str, number: int) -> None:
    """Start the first machine of a shape; signal its starter while the template boots."""
    before = _templates(engine)
    runner = _runner(engine, memory)
    try:
        until(lambda: bool(_booting(engine, before)), "no template under way")
        runner.send_signal(number)
        runner.communicate(timeout=DEADLINE_S)
        assert runner.returncode not in (0, 99)
    finally:
        runner.kill()
        runner.communicate()


def _booting(engine: Engine, before: set[Path]) -> set[Path]:
    return {d for d in _templates(engine) - before if (d / "run/qmp.sock").exists()}


def _works(engine: Engine, memory: str) -> None:
    options = {**SMALL, "memory": memory}
    assert engine.run("busybox", ["echo", "up"], **options).text == "up\n"


def test_an_interrupted_first_start_leaves_nothing(engine: Engine) -> None:
    before = _templates(engine)
    with nothing_left(engine):
        _cut_short(engine, "140m", signal.SIGINT)
        assert _templates(engine) == before
        _works(engine, "140m")


def test_a_killed_first_start_is_put_right(engine: Engine) -> None:
    with nothing_left(engine):
        _cut_short(engine, "144m", signal.SIGKILL)
        # The machine that was to become the template ends with its starter.
        until(lambda: not _qemus(engine, "templates"), "the template's machine goes on")
        engine.reconcile()
        until(lambda: _cleared(engine), "instances stay")
        _works(engine, "144m")


def _qemus(engine: Engine, below: str) -> list[str]:
    """Return the processes of machines that hold something open below a directory."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if not (process / "comm").read_text().startswith("qemu"):
                continue
            targets = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(target.startswith(str(engine.root / below)) for target in targets):
            found.append(process.name)
    return found


def _cleared(engine: Engine) -> bool:
    engine.reconcile()
    for info in engine.list(all=True):
        try:
            engine.get(info.id).remove(force=True)
        except HutchError:
            continue
    return engine.list(all=True) == []


MOMENTS = [
    ("hutch.engine.create", "insert_record"),
    ("hutch.drivers.vm.launching", "machine_record"),
    ("hutch.process.supervisor.Supervisor", "wait_pid"),
    ("hutch.process.vmm.MonitorLink", "wait_qemu"),
    ("hutch.drivers.vm.launching.MachineLauncher", "resume"),
    ("hutch.process.vmm.MonitorLink", "wait_ready"),
    ("hutch.process.vmm.MonitorLink", "wait_started"),
    ("hutch.engine.finish", "finish"),
]

DIES = """
import importlib, os, sys
from hutch.engine import Engine
module, _, rest = sys.argv[2].rpartition(".")
owner = importlib.import_module(sys.argv[2]) if rest.islower() else getattr(
    importlib.import_module(module), rest)
getattr(owner, sys.argv[3])  # one that is not there would never be reached
setattr(owner, sys.argv[3], lambda *a, **k: os.kill(os.getpid(), 9))
if sys.argv[3] == "finish":
    importlib.import_module("hutch.engine.run").finish = owner.finish
with Engine(sys.argv[1]) as engine:
    engine.run("busybox", ["sleep", sys.argv[4]], isolation="vm", memory="128m", network="none")
"""


@pytest.mark.parametrize(("owner", "name"), MOMENTS, ids=[name for _, name in MOMENTS])
def test_a_starter_killed_at_any_moment_leaves_nothing_after_reconcile(
    engine: Engine, owner: str, name: str
) -> None:
    with nothing_left(engine):
        seconds = "0" if name == "finish" else "1000"
        argv = [sys.executable, "-c", DIES, str(engine.root), owner, name, seconds]
        assert subprocess.run(argv, timeout=240).returncode == -signal.SIGKILL
        until(lambda: _cleared(engine), "instances stay")
        assert _qemus(engine, "instances") == []
    _works(engine, "128m")
