"""Containers with their memory: forked, saved, suspended and brought back by a real CRIU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.engine.instance import Instance
from hutch.errors import HutchError, Unsupported
from hutch.lifecycle import State
from hutch.process.supervisor import Supervisor
from tests.requires import criu_program, requires

pytestmark = [pytest.mark.integration, requires("root", "overlayfs", "cgroup", "netns", "criu")]

COUNT = "i=0; while :; do i=$((i+1)); echo $i; echo $i >/last; sleep 0.05; done"
SYSTEM = [f"{path}:{path}:ro" for path in ("/usr", "/lib", "/lib64") if os.path.isdir(path)]
PATIENCE_S = 200.0

PROGRAM = """
import os, select, socket, threading, time
counts = [0, 0, 0]
def count(i):
    while True:
        counts[i] += 1
        time.sleep(0.01)
for i in range(3):
    threading.Thread(target=count, args=(i,), daemon=True).start()
listener = socket.socket()
listener.bind(("0.0.0.0", 8000))
listener.listen()
local = socket.socket(socket.AF_UNIX)
local.bind("/tmp/local")
one, other = socket.socketpair()
one.send(b"in the pair")
file = open("/tmp/gone", "w+")
file.write("of a deleted file")
file.flush()
os.unlink("/tmp/gone")
poll = select.epoll()
poll.register(listener.fileno(), select.EPOLLIN)
begun = time.monotonic()
print("up", flush=True)
while True:
    for _ in poll.poll(0.1):
        peer, _ = listener.accept()
        file.seek(0)
        told = [min(counts) > 0, threading.active_count(), file.read(), time.monotonic() > begun]
        peer.sendall((repr(told) + other.recv(99).decode()).encode())
        peer.close()
"""


@pytest.fixture(autouse=True)
def _with_criu(monkeypatch: pytest.MonkeyPatch) -> None:
    program = criu_program()
    assert program is not None
    monkeypatch.setenv("HUTCH_CRIU", program)


@pytest.fixture
def counter(engine: Engine) -> Iterator[Instance]:
    with engine.start("busybox", ["sh", "-c", COUNT]) as box:
        until(lambda: len(numbers(box)) > 5)
        yield box


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


def numbers(box: Instance) -> list[int]:
    return [int(entry.data) for entry in box.logs()]


def goes_on(box: Instance) -> None:
    """See that it counts, and that nothing of what it said is missing."""
    before = len(numbers(box))
    until(lambda: len(numbers(box)) > before + 3)
    counted = numbers(box)
    assert counted == list(range(counted[0], counted[0] + len(counted)))


def shell(box: Instance, script: str) -> str:
    return box.exec(["sh", "-c", script], check=True).text.strip()


def no_states(engine: Engine) -> bool:
    directory = engine.root / "snapshots"
    return not directory.exists() or not [
        entry for entry in directory.iterdir() if not entry.name.startswith(".")
    ]


def test_twins_go_on_counting_each_as_itself(engine: Engine, counter: Instance) -> None:
    reached = numbers(counter)[-1]
    twins = counter.fork(3, name="twin")
    assert isinstance(twins, list)
    try:
        for twin in twins:
            goes_on(twin)
            assert numbers(twin)[0] > reached
            assert shell(twin, "hostname; cat /etc/hostname").split() == [twin.id[:12]] * 2
            # The program writes it anew all the time: at some moments it is empty.
            assert int(shell(twin, "while ! grep . /last; do :; done")) > reached
        addresses = [shell(box, "ip -4 -o addr show eth0") for box in (counter, *twins)]
        assert len({text.split()[3] for text in addresses}) == 4
        shell(twins[0], "echo mine >/last-words")
        assert shell(twins[1], "ls /") == shell(counter, "ls /")
        goes_on(counter)
    finally:
        for twin in twins:
            twin.remove(force=True)
    assert no_states(engine)


def test_threads_sockets_and_deleted_files_are_in_a_twin(engine: Engine) -> None:
    mounts = [*SYSTEM]
    with engine.start("busybox", ["/usr/bin/python3", "-c", PROGRAM], volumes=mounts) as box:
        until(lambda: any(entry.data == b"up\n" for entry in box.logs()))
        twin = box.fork()
        assert isinstance(twin, Instance)
        with twin:
            for one in (box, twin):
                told = shell(one, "/bin/busybox nc 127.0.0.1 8000 </dev/null")
                assert told == "[True, 4, 'of a deleted file', True]in the pair"


def test_a_twin_has_limits_mounts_and_rights_of_its_source(engine: Engine, scratch: Path) -> None:
    (scratch / "here").write_text("of the host")
    with engine.start(
        "busybox",
        ["sh", "-c", COUNT.replace(">/last", ">/tmp/last")],
        memory="64M",
        pids_limit=50,
        read_only=True,
        tmpfs=["/tmp"],
        volumes=[f"{scratch}:/host", "kept:/data"],
        cap_add=["NET_ADMIN"],
    ) as box:
        until(lambda: len(numbers(box)) > 3)
        shell(box, "echo kept >/tmp/file; echo shared >/data/file")
        asked = "cat /tmp/file /data/file /host/here; grep -E 'Cap|NoNew|Seccomp:' /proc/1/status"
        before = shell(box, asked)
        twin = box.fork()
        assert isinstance(twin, Instance)
        with twin:
            assert shell(twin, asked) == before
            assert shell(twin, "cat /sys/fs/cgroup/memory/memory.limit_in_bytes "
                               "|| cat /sys/fs/cgroup/memory.max") == str(64 << 20)  # fmt: skip
            assert twin.exec(["sh", "-c", "echo >/nowhere"]).exit_code != 0
            shell(twin, "echo other >/tmp/file")
            assert shell(box, "cat /tmp/file") == "kept"
    engine.volumes.remove("kept")


def test_a_program_of_another_user_keeps_its_limits(engine: Engine) -> None:
    with engine.start(
        "busybox", ["sleep", "1000"], user="1000:1000", ulimits=["nofile=500:1000", "core=0:0"]
    ) as box:
        twin = box.fork()
        assert isinstance(twin, Instance)
        with twin:
            asked = "cat /proc/1/limits; grep -E '[UG]id' /proc/1/status"
            assert shell(twin, asked) == shell(box, asked)
            assert "500" in shell(twin, "grep files /proc/1/limits").split()


def test_a_terminal_session_is_in_a_twin(engine: Engine) -> None:
    with engine.start("busybox", ["sh"], tty=True, interactive=True) as box:
        with Supervisor.connect(f"{box.info().directory}/run") as link:
            link.attach(stdin=True)
            link.send_stdin(b"NAME=kept; echo set-$NAME\n")
            _hear(link, b"set-kept")
        twin = box.fork()
        assert isinstance(twin, Instance)
        with twin, Supervisor.connect(f"{twin.info().directory}/run") as link:
            link.attach(stdin=True)
            link.resize(33, 99)
            link.send_stdin(b"echo has-$NAME; stty size; tty; echo to-$((1+1)) >/dev/tty\n")
            said = _hear(link, b"to-2")
            assert b"has-kept" in said
            assert b"33 99" in said
            assert b"/dev/pts/0" in said


def _hear(link: Supervisor, word: bytes) -> bytes:
    said = b""
    for piece in link.output(PATIENCE_S):
        said += getattr(piece, "data", b"")
        if word in said:
            return said
    raise AssertionError(f"{word!r} was not said: {said!r}")


def test_input_reaches_a_twin(engine: Engine) -> None:
    script = "while read line; do echo got $line; done"
    with engine.start("busybox", ["sh", "-c", script], interactive=True) as box:
        twin = box.fork()
        assert isinstance(twin, Instance)
        with twin, Supervisor.connect(f"{twin.info().directory}/run") as link:
            link.attach(stdin=True)
            link.send_stdin(b"a word\n")
            _hear(link, b"got a word")
            link.close_stdin()
            assert link.wait(PATIENCE_S).code == 0


def test_what_exec_started_is_not_in_a_twin(engine: Engine, counter: Instance) -> None:
    with counter.exec_stream(["sleep", "1000"]) as beside:
        twin = counter.fork()
        assert isinstance(twin, Instance)
        with twin:
            assert "sleep 1000" not in shell(twin, "ps -o args")
        assert "sleep 1000" in shell(counter, "ps -o args")
        beside.signal(9)
    goes_on(counter)


@pytest.mark.parametrize("auto_remove", [False, True])
def test_a_suspended_container_goes_on_where_it_was(engine: Engine, auto_remove: bool) -> None:
    with engine.start("busybox", ["sh", "-c", COUNT], remove=auto_remove) as box:
        until(lambda: len(numbers(box)) > 5)
        address = shell(box, "ip -4 -o addr show eth0").split()[3]
        box.suspend()
        assert box.info().state == State.SUSPENDED
        reached = numbers(box)[-1]
        box.resume()
        goes_on(box)
        assert numbers(box)[-1] > reached
        assert shell(box, "ip -4 -o addr show eth0").split()[3] == address
        assert not (Path(box.info().directory) / "suspended").exists()
        # Its exit is told as ever, and the supervisor of the second run tells it.
        box.stop(timeout=0)
        if not auto_remove:
            assert box.info().exit_code == 137


def test_a_snapshot_brings_memory_and_files_back(engine: Engine, counter: Instance) -> None:
    shell(counter, "echo then >/file")
    snapshot = counter.snapshot("then")
    assert snapshot.memory
    reached = numbers(counter)[-1]
    shell(counter, "echo now >/file; touch /later")
    counter.stop(timeout=0)
    engine.snapshots.restore(f"{counter.name}/then")
    assert shell(counter, "cat /file; ls /later 2>/dev/null || echo none").split() == [
        "then",
        "none",
    ]
    assert numbers(counter)[0] <= reached + 20
    with engine.snapshots.restore(f"{counter.name}/then", name="another") as another:
        goes_on(another)
        assert shell(another, "hostname") == another.id[:12]
        with pytest.raises(Unsupported, match="trusted"):
            list(engine.snapshots.export(f"{counter.name}/then"))
    engine.snapshots.remove(f"{counter.name}/then")
    assert no_states(engine)


def test_a_snapshot_of_a_stopped_container_is_its_files(engine: Engine) -> None:
    box = engine.create("busybox", ["sh", "-c", "cat /file; echo more >>/file"])
    try:
        assert not box.snapshot("empty").memory
        box.start()
        box.wait()
        engine.snapshots.restore(f"{box.name}/empty")
        box.start()
        box.wait()
        assert b"more" not in b"".join(e.data for e in box.logs())[-6:]
        engine.snapshots.remove(f"{box.name}/empty")
    finally:
        box.remove(force=True)


def test_what_criu_cannot_save_is_named_and_goes_on(engine: Engine, counter: Instance) -> None:
    program = (
        "import ctypes, time; made = ctypes.CDLL(None).syscall(425, 4, bytes(200))\n"
        "print('up' if made >= 0 else 'no io_uring here', flush=True)\n"
    )
    with engine.start(
        "busybox",
        ["/usr/bin/python3", "-c", program + "while True: time.sleep(0.1)"],
        volumes=[*SYSTEM],
        privileged=True,
    ) as box:
        until(lambda: any(entry.data == b"up\n" for entry in box.logs()))
        for act in (box.fork, box.snapshot, box.suspend):
            with pytest.raises(Unsupported, match="io_uring") as failed:
                act()
            assert failed.value.hint
            assert box.info().state == State.RUNNING
        assert shell(box, "echo alive") == "alive"
    assert no_states(engine)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"init": True}, "--init"), ({"pid": "host"}, "--pid"), ({"userns": "remap"}, "--userns")],
)
def test_what_criu_never_can_is_said_before(
    engine: Engine, options: dict[str, object], word: str
) -> None:
    with (
        engine.start("busybox", ["sleep", "1000"], **options) as box,  # type: ignore[arg-type]
        pytest.raises(Unsupported, match=word),
    ):
        box.fork()


def test_a_fork_that_fails_leaves_no_twin(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hutch.process.criu import restore_request as real

    calls: list[str] = []

    def spoiled(**wish: object) -> bytes:
        calls.append("")
        if len(calls) == 2:
            wish["externals"] = []
        return real(**wish)  # type: ignore[arg-type]

    monkeypatch.setattr("hutch.drivers.container.restoring.restore_request", spoiled)
    with pytest.raises(Unsupported, match="CRIU cannot restore"):
        counter.fork(2, name="twin")
    assert [info.name for info in engine.list(all=True)] == [counter.name]
    goes_on(counter)
    assert no_states(engine)


VICTIM = """
import importlib, sys, time
from hutch.engine import Engine

def stop(*_, **__):
    print("here", flush=True)
    time.sleep(1000)

setattr(importlib.import_module("hutch.drivers.container.saving"), sys.argv[4], stop)
with Engine(sys.argv[1]) as engine:
    getattr(engine.get(sys.argv[2]), sys.argv[3])()
"""


@pytest.mark.parametrize(
    ("what", "step"), [("fork", "dump"), ("snapshot", "copy_tree"), ("suspend", "_sync_tree")]
)
def test_a_caller_that_is_killed_leaves_a_container_that_goes_on(
    engine: Engine, counter: Instance, what: str, step: str
) -> None:
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(engine.root), counter.id, what, step],
        stdout=subprocess.PIPE,
    )
    assert victim.stdout is not None
    with victim.stdout:
        assert victim.stdout.readline() == b"here\n"
        victim.kill()
        victim.wait()
    engine.reconcile()
    assert counter.info().state == State.RUNNING
    goes_on(counter)
    assert no_states(engine)
    counter.suspend()
    counter.resume()
    goes_on(counter)


def test_killed_after_the_commit_a_container_is_suspended_or_runs(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved is forgotten where its container was not ended."""
    from hutch.linux.cgroup.hybrid import HybridGroup

    directory = Path(counter.info().directory)

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(HybridGroup, "kill_all", killed)
        patch.setattr(HybridGroup, "thaw", killed)
        patch.setattr("hutch.drivers.container.saving.os.unlink", killed)
        counter.suspend()
    assert (directory / "suspended").exists()
    engine.reconcile()
    assert not (directory / "suspended").exists()
    goes_on(counter)
    counter.kill()
    assert counter.wait() == 137
    assert counter.info().state == State.EXITED


def test_without_criu_the_error_names_it(
    engine: Engine, counter: Instance, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    monkeypatch.setenv("HUTCH_CRIU", str(scratch / "none"))
    with pytest.raises(HutchError, match="CRIU") as failed:
        counter.fork()
    assert failed.value.hint is not None
    assert "HUTCH_CRIU" in failed.value.hint
