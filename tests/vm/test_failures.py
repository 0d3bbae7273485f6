"""A machine's start that fails or is killed at any step: a clear error, and nothing left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hutch.drivers.failures import machine_failures
from hutch.drivers.vm import arguments, assets, boot, driver, launching, sandbox, templates
from hutch.drivers.vm.driver import VmDriver
from hutch.drivers.vm.host import find_host
from hutch.drivers.vm.launching import MachineLauncher
from hutch.drivers.vm.setup import machine_setup
from hutch.engine import Engine, create, machines, start
from hutch.errors import (
    Exhausted,
    HutchError,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from hutch.network.networks import Networks
from hutch.process.errors import MachineFailed
from hutch.process.launcher import Launcher
from hutch.process.records import read_pid
from hutch.process.supervisor import Supervisor
from hutch.process.vmm import MonitorLink
from hutch.storage.disks import Disks
from hutch.storage.snapshots import Snapshots
from tests.vm.machines import NEEDS, SMALL, is_gone, machine_root, nothing_left, until

pytestmark = list(NEEDS)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with machine_root(tmp_path_factory.mktemp("failing") / "root") as opened:
        # The kernel, the root disk and the template, which the failures below do without.
        assert opened.run("busybox", ["true"], **SMALL).exit_code == 0
        yield opened


def _works(engine: Engine) -> None:
    assert engine.run("busybox", ["echo", "fine"], name="again", **SMALL).text == "fine\n"


# ---- an operation fails ----

STEPS: list[tuple[object, str]] = [
    (machines, "prepare_machine"),
    (Snapshots, "make"),
    (Disks, "create"),
    (create, "insert_record"),
    (start, "_prepare_network"),
    (start, "write_files"),
    (start, "_root_disk"),
    (driver, "resolve_user"),
    (driver, "compile_guest"),
    (launching, "find_host"),
    (launching, "ensure_initramfs"),
    (templates.Templates, "ensure"),
    (launching, "save_record"),
    (assets, "setup_request"),
    (boot, "listen_at"),
    (boot, "make_skeleton"),
    (arguments, "machine_argv"),
    (boot, "encode_config"),
    (boot, "compile_sandbox"),
    (Launcher, "start"),
    (Supervisor, "wait_pid"),
    (Supervisor, "wait_started"),
    (MonitorLink, "wait_qemu"),
    (MachineLauncher, "resume"),
    (MonitorLink, "go"),
    (MonitorLink, "wait_ready"),
    (MonitorLink, "wait_started"),
    (driver, "read_pid"),
]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize("failure", [OSError(28, "injected"), KeyboardInterrupt()], ids=type)
def test_a_failure_at_any_step_leaves_nothing(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    failure: BaseException,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    with nothing_left(engine), monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises((HutchError, OSError, KeyboardInterrupt)):
            engine.run("busybox", ["sleep", "100"], name="again", **SMALL)


def test_after_all_these_failures_it_still_works(engine: Engine) -> None:
    with nothing_left(engine):
        _works(engine)


def test_a_tap_that_is_refused_is_told_and_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise Unsupported("network: /dev/net/tun: permission denied", hint="use --network none")

    monkeypatch.setattr(assets, "create_taps", refused)
    options = {**SMALL, "network": "bridge"}
    with nothing_left(engine), pytest.raises(Unsupported, match="/dev/net/tun"):
        engine.run("busybox", ["true"], **options)


@pytest.mark.parametrize("template", [True, False])  # QEMU runs already, or not yet
def test_a_network_that_cannot_be_attached_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, template: bool
) -> None:
    def refused(*_: object) -> None:
        raise Exhausted("network bridge: no more ports")

    monkeypatch.setattr(Networks, "attach_tap", refused)
    options = {**SMALL, "network": "bridge", "template": template}
    with nothing_left(engine), pytest.raises(Exhausted, match="no more ports"):
        engine.run("busybox", ["sleep", "100"], **options)


# ---- what it needs is not there, or not whole ----


def _with_qemu(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(
        launching,
        "find_host",
        lambda *given: msgspec.structs.replace(find_host(*given), qemu=path),
    )


def test_a_qemu_that_fails_is_told_with_its_last_words(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `cat` refuses QEMU's options in the way of a QEMU that does not know one.
    _with_qemu(monkeypatch, "/bin/cat")
    with (
        nothing_left(engine),
        pytest.raises(Unavailable, match=r"qemu: qemu ended with status 1: .*cat"),
    ):
        engine.run("busybox", ["true"], template=False, **SMALL)


def test_a_qemu_that_has_gone_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_qemu(monkeypatch, "/usr/bin/qemu-that-was")
    with nothing_left(engine), pytest.raises(HutchError, match="qemu-that-was"):
        engine.run("busybox", ["true"], template=False, **SMALL)


def test_a_template_that_does_not_boot_leaves_none(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(os.listdir(engine.root / "templates"))
    _with_qemu(monkeypatch, "/bin/cat")
    with nothing_left(engine), pytest.raises(HutchError, match="cat"):
        engine.run("busybox", ["true"], **{**SMALL, "memory": "132m"})
    left = {name for name in os.listdir(engine.root / "templates") if not name.startswith(".")}
    assert left <= before


def test_a_kernel_whose_files_have_gone_is_told(engine: Engine) -> None:
    directory = engine.root / "kernels"
    away = engine.root / "kernels-away"
    directory.rename(away)
    try:
        with nothing_left(engine), pytest.raises(HutchError, match="kernel"):
            engine.run("busybox", ["true"], template=False, **SMALL)
    finally:
        away.rename(directory)
    _works(engine)


def test_an_agent_that_does_not_answer_in_time_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_BRING_UP_S", 0.3)  # less than any emulated boot takes
    with (
        nothing_left(engine),
        pytest.raises(HutchError, match="does not tell: the end of the setup"),
    ):
        engine.run("busybox", ["true"], template=False, **SMALL)


@pytest.mark.parametrize("damage", ["truncated", "garbled"])
def test_a_damaged_template_is_told_once_and_made_anew(engine: Engine, damage: str) -> None:
    for directory in (engine.root / "templates").iterdir():
        state = directory / "state"
        if state.exists():
            content = state.read_bytes()
            half = len(content) // 2
            state.write_bytes(content[:half] + (b"" if damage == "truncated" else b"\xff" * half))
    with nothing_left(engine):
        with pytest.raises(Unavailable, match=r"template.*cannot be resumed") as failure:
            _works(engine)
        assert "start again" in (failure.value.hint or "")
        _works(engine)


# ---- kill -9 ----


def _kill_qemu(engine: Engine, box: str) -> None:
    for pid in engine._context.machines.processes(box):
        with suppress(FileNotFoundError):  # another, which has ended meanwhile
            if Path(f"/proc/{pid}/comm").read_text().startswith("qemu"):
                os.kill(pid, signal.SIGKILL)


def _kill_monitor(engine: Engine, box: str) -> None:
    known = read_pid(f"{engine.root}/instances/{box}/run")
    assert known is not None
    os.kill(known.pid, signal.SIGKILL)


def _kill_supervisor(engine: Engine, box: str) -> None:
    known = read_pid(f"{engine.root}/instances/{box}/run")
    assert known is not None
    os.kill(known.supervisor, signal.SIGKILL)


KILLS: list[Callable[[Engine, str], None]] = [_kill_qemu, _kill_monitor, _kill_supervisor]
MOMENTS: list[tuple[type, str]] = [
    (MachineLauncher, "resume"),
    (MonitorLink, "go"),
    (MonitorLink, "wait_ready"),
    (MonitorLink, "wait_started"),
]


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__[6:])
@pytest.mark.parametrize(("owner", "name"), MOMENTS, ids=[name for _, name in MOMENTS])
def test_a_kill_at_any_stage_of_a_start_is_told_and_leaves_nothing(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    kill: Callable[[Engine, str], None],
    owner: type,
    name: str,
) -> None:
    real = getattr(owner, name)

    def killed(*given: object, **named: object) -> object:
        (directory,) = (engine.root / "instances").iterdir()
        kill(engine, directory.name)
        return real(*given, **named)

    with nothing_left(engine), monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(HutchError):
            engine.run("busybox", ["sleep", "100"], **SMALL)


def test_of_a_qemu_that_ended_before_its_resume_the_reason_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MachineLauncher.resume

    def killed(*given: Any, **named: Any) -> None:
        (directory,) = (engine.root / "instances").iterdir()
        _kill_qemu(engine, directory.name)
        real(*given, **named)

    with nothing_left(engine), monkeypatch.context() as patch:
        patch.setattr(MachineLauncher, "resume", killed)
        with pytest.raises(Unavailable, match=r"start of .*qemu was killed by signal 9"):
            engine.run("busybox", ["true"], **SMALL)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cpu_model": "NoSuch"}, InvalidArgument, "cpu_model: this QEMU has no model 'NoSuch'"),
        ({"cpu_model": "max,+nosuch"}, InvalidArgument, "cpu_model: .* no feature 'nosuch'"),
        ({"memory": "5T"}, InvalidArgument, "memory: must be at most 4T"),
    ],
)
def test_what_qemu_does_not_have_is_named_as_the_option_it_is(
    engine: Engine, options: dict[str, Any], error: type[HutchError], words: str
) -> None:
    with nothing_left(engine), pytest.raises(error, match=words):
        engine.run("busybox", ["true"], **{**SMALL, **options})


@pytest.mark.parametrize(
    "said",
    [
        "Z qemu-system-x86_64: unable to map backing store for guest RAM: Cannot allocate memory",
        "Z qemu-system-x86_64: cannot set up guest memory 'ram': Cannot allocate memory",
    ],
)
def test_memory_that_the_host_does_not_give_is_told(tmp_path: Path, said: str) -> None:
    (tmp_path / "qemu.log").write_text(f"before\n2026-11-29T02:03:04.5{said}\n")
    with (
        pytest.raises(Exhausted, match="start of x: this host does not give"),
        machine_failures("start of x", str(tmp_path)),
    ):
        raise MachineFailed("qemu", 0, 0, "qemu ended with status 1")


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__[6:])
def test_a_kill_of_a_running_machine_is_booked_and_it_starts_again(
    engine: Engine, kill: Callable[[Engine, str], None]
) -> None:
    with nothing_left(engine), engine.start("busybox", ["sleep", "100"], **SMALL) as box:
        everybody = list(engine._context.machines.processes(box.id))
        kill(engine, box.id)
        until(lambda: box.info().exit_code != 0, "not booked")
        until(lambda: all(is_gone(pid) for pid in everybody), "processes stay")
        box.start()
        assert box.exec(["echo", "here"]).text == "here\n"


def test_a_template_whose_holder_was_killed_is_made_anew(engine: Engine) -> None:
    for directory in (engine.root / "templates").iterdir():
        known = read_pid(str(directory / "run")) if not directory.name.startswith(".") else None
        if known is not None:
            os.kill(known.pid, signal.SIGKILL)
            until(lambda pid=known.pid: is_gone(pid), "the holder stays")  # type: ignore[misc]
    with nothing_left(engine):
        _works(engine)


def test_an_error_in_the_guests_set_up_names_what_failed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hutch.plan import guest

    extra = guest.Mount(source="/dev/nothing", target="/hutch/no", fstype="ext4", flags=0, data="")
    monkeypatch.setattr(assets, "machine_setup", lambda *a, **k: [*machine_setup(*a, **k), extra])
    with nothing_left(engine), pytest.raises(HutchError, match=r"/dev/nothing|/hutch/no"):
        engine.run("busybox", ["true"], **SMALL)


def test_the_user_of_a_machine_is_looked_for_before_anything_is_made(engine: Engine) -> None:
    with nothing_left(engine), pytest.raises((NotFound, HutchError), match="nosuch"):
        engine.run("busybox", ["true"], user="nosuch", **SMALL)


def test_what_the_driver_holds_is_the_same_after_many_failures(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "injected")

    with nothing_left(engine), monkeypatch.context() as patch:
        patch.setattr(VmDriver, "_bring_up", fail)
        for _ in range(10):
            with pytest.raises(HutchError):
                engine.run("busybox", ["true"], **SMALL)
    assert sandbox.make_skeleton(engine.root / "cache/machine-root").is_dir()
