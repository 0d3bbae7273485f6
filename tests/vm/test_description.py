"""What can be seen of a machine from outside: what its start decided, its console, its plan."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import Busy, Unavailable, Unsupported, WrongState
from tests.vm.machines import DEADLINE_S, NEEDS, SMALL, machine_root, start, until

pytestmark = list(NEEDS)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with machine_root(tmp_path_factory.mktemp("seen") / "root") as opened:
        yield opened


@pytest.fixture(scope="module")
def box(engine: Engine) -> Iterator[Instance]:
    with start(engine, name="seen") as made:
        yield made


def _hutch(engine: Engine, *arguments: str) -> bytes:
    argv = [sys.executable, "-m", "hutch", "--root", str(engine.root), *arguments]
    return subprocess.run(argv, capture_output=True, check=True, timeout=DEADLINE_S).stdout


def test_a_description_says_what_the_start_decided(engine: Engine, box: Instance) -> None:
    machine = box.info().machine
    assert machine is not None
    assert machine.accelerator in ("kvm", "tcg") and machine.accelerator_reason
    assert os.path.basename(machine.qemu).startswith("qemu-system-")
    assert (machine.memory, machine.vcpus) == (128 << 20, 1)
    assert machine.memory_max > machine.memory and machine.vcpus_max >= 8
    assert machine.kernel in box.exec(["uname", "-r"]).text
    assert machine.template
    shown = json.loads(_hutch(engine, "inspect", "seen"))[0]["Machine"]
    assert shown["Kernel"] == machine.kernel and shown["Accelerator"] == machine.accelerator


def test_a_machine_that_never_started_has_decided_nothing(engine: Engine) -> None:
    with engine.create("busybox", ["true"], **SMALL) as one:
        assert one.info().machine is None


def test_a_console_is_joined_and_its_log_read(engine: Engine, box: Instance) -> None:
    with box.console() as console:
        console.send(b"\n")
        with pytest.raises(Busy, match="somebody else has joined"):
            box.console()
    box.console().close()
    box.exec(["sh", "-c", "echo '<0>said to the console' > /dev/kmsg"], privileged=True)
    assert isinstance(_hutch(engine, "console", "--log", "seen"), bytes)
    assert box.exec(["echo", "unharmed"]).text == "unharmed\n"


def test_a_container_has_no_console(engine: Engine) -> None:
    with engine.create("busybox", ["true"], network="none") as one:
        with pytest.raises(Unsupported, match="no console"):
            one.console_log()
        with pytest.raises(Unsupported, match="no console"):
            one.console()


def test_the_console_of_a_stopped_machine_is_its_log(engine: Engine) -> None:
    with engine.create("busybox", ["true"], **SMALL) as one:
        assert one.console_log() == b""
        with pytest.raises((WrongState, Unavailable), match="not running"):
            one.console()


def test_a_dry_run_shows_the_guests_plan_and_qemus_arguments(engine: Engine) -> None:
    told = json.loads(_hutch(engine, "run", "--dry-run", "--vm", "-m", "160m", "busybox", "id"))
    assert told["Guest"]["child"]
    assert os.path.basename(told["Qemu"][0]).startswith("qemu-system-")
    assert "size=160M" in " ".join(told["Qemu"])
    assert [info.name for info in engine.list(all=True) if info.name != "seen"] == []


def test_the_files_of_a_paused_machine_are_refused_with_the_cure(engine: Engine) -> None:
    with start(engine) as one:
        one.pause()
        for call in (one.diff, lambda: one.files.read("/etc/passwd"), one.commit):
            with pytest.raises(WrongState, match="paused") as failure:
                call()
            assert "unpause" in (failure.value.hint or "")
        one.unpause()
        assert one.files.read("/etc/passwd")


def test_programs_go_on_after_a_commit(engine: Engine) -> None:
    with start(engine, "while :; do date +%N > /now; done") as one:
        until(lambda: one.files.exists("/now"), "does not run")
        one.commit("went-on:1")
        before = one.files.read("/now")
        until(lambda: one.files.read("/now") != before, "does not go on")
        engine.images.remove("went-on:1")


def test_a_stopped_machine_is_exported_and_committed(engine: Engine) -> None:
    with start(engine, "echo kept > /kept") as one:
        one.wait(timeout=DEADLINE_S)
        with tarfile.open(fileobj=io.BytesIO(b"".join(one.export()))) as tar:
            assert "kept" in {name.removeprefix("./") for name in tar.getnames()}
        one.commit("stopped:1")
        done = engine.run("stopped:1", ["cat", "/kept"], network="none")
        assert done.text == "kept\n"
        engine.images.remove("stopped:1")
