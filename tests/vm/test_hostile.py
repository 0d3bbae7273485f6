"""A guest that is silent, floods or lies: every call about it ends, and it is stopped."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hutch.drivers.vm import files as vm_files
from hutch.drivers.vm import inside
from hutch.engine import Engine, Instance
from hutch.errors import HutchError
from hutch.lifecycle import State
from hutch.process import guest
from hutch.qmp import conversation
from hutch.qmp.machine import stop
from tests.vm.machines import NEEDS, machine_root, nothing_left, processes, start, until

pytestmark = list(NEEDS)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with machine_root(tmp_path_factory.mktemp("hostile") / "root") as opened:
        start(opened).remove(force=True)  # what is opened once, and kept, is open now
        yield opened


@pytest.fixture
def box(engine: Engine) -> Iterator[Instance]:
    with nothing_left(engine), start(engine, disk="64m") as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the guest half a second where a minute is usual."""
    monkeypatch.setattr(guest, "SILENCE_S", 0.5)
    monkeypatch.setattr(vm_files, "SILENCE_S", 0.5)
    monkeypatch.setattr(vm_files, "_ASK_S", 0.5)
    monkeypatch.setattr(inside, "_ANSWER_S", 0.5)


def _upload(box: Instance) -> None:
    box.files.write("/x", iter([bytes(1 << 20)] * 16))


def _pack(box: Instance) -> None:
    for _ in box.files.copy_out_tar("/")[1]:
        pass


CALLS: dict[str, Callable[[Instance], object]] = {
    "stats": lambda box: box.stats(),
    "top": lambda box: box.top(),
    "read": lambda box: box.files.read("/etc/passwd", limit=1 << 20),
    "list": lambda box: box.files.list("/"),
    "stat": lambda box: box.files.stat("/etc"),
    "mkdir": lambda box: box.files.mkdir("/made"),
    "write": _upload,
    "cp": _pack,
    "diff": lambda box: box.diff(),
    "update": lambda box: box.update(pids_limit=9),
}


@pytest.fixture
def silent(box: Instance) -> Instance:
    """A machine whose guest does nothing any more, behind hutch's back."""
    with conversation(Path(box.info().directory) / "run/qmp.sock") as monitor:
        stop(monitor)
    return box


@pytest.mark.usefixtures("impatient")
def test_every_question_to_a_silent_guest_ends(silent: Instance) -> None:
    for name, call in CALLS.items():
        with pytest.raises(HutchError):
            call(silent)
            raise AssertionError(f"{name} came back")


@pytest.fixture(params=["qemu", "vmm"])
def frozen(request: pytest.FixtureRequest, engine: Engine, box: Instance) -> Iterator[Instance]:
    """A machine one of whose processes a signal has stopped."""
    process = processes(engine, box)[request.param]
    os.kill(process, signal.SIGSTOP)
    stat = Path(f"/proc/{process}/stat")
    until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "not stopped")
    yield box
    try:
        os.kill(process, signal.SIGCONT)
    except ProcessLookupError:
        pass


def test_a_machine_that_a_signal_has_stopped_is_told_at_once(frozen: Instance) -> None:
    """Waiting would take minutes: no wait is shortened here."""
    more: dict[str, Callable[[Instance], object]] = {
        "exec": lambda box: box.exec(["true"]),
        "pause": lambda box: box.pause(),
        "fork": lambda box: box.fork(),
        "suspend": lambda box: box.suspend(),
    }
    before = frozen.info().spec
    for name, call in {**CALLS, **more}.items():
        with pytest.raises(HutchError, match="was stopped by a signal") as caught:
            call(frozen)
            raise AssertionError(f"{name} came back")
        assert "kill -CONT" in str(caught.value.hint), name
    assert frozen.info().state is State.RUNNING
    assert frozen.info().spec == before


def test_a_silent_guest_is_stopped(frozen: Instance) -> None:
    frozen.stop(timeout=0.3)
    assert (frozen.info().state, frozen.info().exit_code) == (State.EXITED, 137)


def test_a_silent_guest_is_removed_by_force(engine: Engine, frozen: Instance) -> None:
    frozen.remove(force=True)
    assert engine.list(all=True) == []


# ---- in the place of the agent ----


@contextmanager
def _instead(box: Instance, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """Answer at the machine's agent socket in place of its monitor."""
    path = Path(box.info().directory) / "run/agent.sock"
    real = path.with_name("real.sock")
    path.rename(real)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    handle = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    listener.bind(f"/proc/self/fd/{handle}/agent.sock")
    listener.listen(16)

    def serve() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            with link:
                link.settimeout(60)
                try:
                    link.recv(8)
                    answer(link)
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        os.close(handle)
        path.unlink()
        real.rename(path)


def _flood(link: socket.socket) -> None:
    link.settimeout(5)  # nobody reads on, where this was understood as what it is
    while True:
        link.sendall(bytes(1 << 16))


def _lie(link: socket.socket) -> None:
    link.sendall(b"\xff" * 4096)


def _hang_up(_: socket.socket) -> None:
    return


def _promise(link: socket.socket) -> None:
    # No error, and a detail of 4 GiB that never comes.
    link.sendall(bytes(4) + b"\xff\xff\xff\xff" + b"x" * 100)
    link.recv(1)


ANSWERS = [_flood, _lie, _hang_up, _promise]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.__name__.strip("_"))
def test_every_question_to_a_lying_guest_ends(
    box: Instance, monkeypatch: pytest.MonkeyPatch, answer: Callable[[socket.socket], None]
) -> None:
    monkeypatch.setattr(guest, "_ANSWER_MAX", 1 << 20)
    monkeypatch.setattr(vm_files, "_LISTING_MAX", 1 << 20)
    with _instead(box, answer):
        for name, call in CALLS.items():
            # Where the guest's answer is the whole content there is nothing to lie about.
            endless = answer is _flood and name in ("cp", "write", "mkdir", "update")
            if endless:
                continue
            with pytest.raises(HutchError):
                call(box)
                raise AssertionError(f"{name} came back")
        with pytest.raises(HutchError):
            box.exec(["true"], timeout=1)
            raise AssertionError("exec came back")
    assert box.exec(["echo", "fine"]).text == "fine\n"
