"""Two hutches: roots of their own, the target's processes in another network namespace."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.engine.lookup import load
from hutch.engine.migrate_send import Sender
from hutch.linux.namespaces import CLONE_NEWNET
from tests.native.boxes import unread, wait_until

HOLD = f"""
import ctypes, sys
assert ctypes.CDLL(None).unshare({CLONE_NEWNET}) == 0
print(flush=True)
sys.stdin.read()
"""

# Runs `hutch` after it has set one function to end this process the way kill -9 does, before
# or after its real work.
KILLED = """
import os, signal, sys
import hutch.engine.migrate, hutch.engine.migrate_receive, hutch.engine.migrate_settle
import hutch.engine.migrate_send, hutch.engine.migrate_live, hutch.engine.migrate_land
import hutch.engine.migrate_container
import hutch.drivers.vm.landing
where, when = sys.argv[1], sys.argv[2]
sys.argv[1:3] = []
module, _, name = where.rpartition(":")
owner = sys.modules[module]
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
real = getattr(owner, name)
def killed(*args, **kwargs):
    if when == "after":
        real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, killed)
from hutch.cli.main import main
main()
"""


class Other:
    """The target: a hutch that is spoken to by its command line, as an administrator would."""

    def __init__(self, root: Path, holder: int) -> None:
        self.root = root
        self._argv = [
            "nsenter",
            f"--net=/proc/{holder}/ns/net",
            sys.executable,
            "-m",
            "hutch",
            "--root",
            str(root),
        ]

    @property
    def destination(self) -> str:
        return "exec:" + shlex.join([*self._argv, "_migrate_target"])

    def back(self, root: Path) -> str:
        """Return what is a destination for the target: a hutch of the tests' own namespace."""
        argv = ["nsenter", f"--net=/proc/{os.getpid()}/ns/net", sys.executable, "-m", "hutch"]
        return "exec:" + shlex.join([*argv, "--root", str(root), "_migrate_target"])

    def argv(self, *arguments: str) -> list[str]:
        return [*self._argv, *arguments]

    def hutch(self, *arguments: str) -> str:
        done = subprocess.run(
            self.argv(*arguments), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def engine(self) -> Engine:
        """An engine on the target's root, for looking: it starts nothing."""
        return Engine(self.root)


@pytest.fixture(scope="module")
def other_namespace() -> Iterator[int]:
    """The pid of a process that holds the target's network namespace."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        holder.stdout.readline()
        yield holder.pid
        holder.stdin.close()


@pytest.fixture(scope="module")
def source_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("source") / "root") as engine:
        engine.images.bootstrap("busybox")
        yield engine
        engine._context.machines.prune_templates()
        engine._context.networks.teardown()


@pytest.fixture
def source(source_engine: Engine) -> Iterator[Engine]:
    """The source; what a test leaves there fails the test."""
    yield source_engine
    left = [info.name for info in source_engine.list(all=True)]
    for name in left:
        source_engine.get(name).remove(force=True, volumes=True)
    assert left == [], "instances left at the source"
    # The other side of a link that was cut takes its time to see that.
    wait_until(lambda: traces(source_engine) == [], "the end of all traces at the source")


@pytest.fixture(scope="module")
def other_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("target") / "root"


@pytest.fixture
def target(other_root: Path, other_namespace: int) -> Iterator[Other]:
    """The target; what a test leaves there fails the test."""
    other = Other(other_root, other_namespace)
    yield other
    with other.engine() as engine:
        left = [info.name for info in engine.list(all=True)]
        if left:
            other.hutch("rm", "-fv", *left)
        engine._context.machines.prune_templates()
        assert left == [], "instances left at the target"
        wait_until(lambda: traces(engine) == [], "the end of all traces at the target")


def traces(engine: Engine) -> list[str]:
    """What a migration could leave on a root."""
    from hutch.migration.records import MIGRATIONS, MigrationRecord

    with engine._context.store.read() as tx:
        found = [f"{m.role} {m.phase}" for _, m in tx.items(MIGRATIONS, MigrationRecord)]
    found += os.listdir(engine.root / "instances")
    return found + [name for name in os.listdir(engine.root / "locks") if name != "boot"]


def die_migrating(source: Engine, target: Other, where: str, when: str, *options: str) -> None:
    """Migrate `moved` by a process that is killed there."""
    here = [sys.executable, "-m", "hutch", "--root", str(source.root)]
    command = killed([*here, "migrate", *options, "moved", target.destination], where, when)
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, (where, when, done.stderr.decode())


def killed(argv: list[str], where: str, when: str) -> list[str]:
    """Return a command line of ours that is killed there."""
    at = argv.index("-m")
    return [*argv[:at], "-c", KILLED, where, when, *argv[at + 2 :]]


@contextmanager
def behind(
    engine: Engine, identifier: str, monkeypatch: pytest.MonkeyPatch, owner: type, step: str
) -> Iterator[None]:
    """Have the supervisor of a program that talks do nothing from that step of a migration until
    a moment after its log is asked for."""
    record = load(engine._context, identifier)
    real_step, real_tails = getattr(owner, step), Sender.send_tails
    assert record.supervisor and record.pid
    go_on = threading.Timer(1.0, os.kill, (record.supervisor, signal.SIGCONT))

    def stopped_before(self: object) -> object:
        os.kill(record.supervisor, signal.SIGSTOP)
        wait_until(lambda: unread(record.pid) > 0, "more output")
        return real_step(self)

    def tails(self: Sender) -> None:
        go_on.start()
        real_tails(self)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, stopped_before)
        patch.setattr(Sender, "send_tails", tails)
        try:
            yield
        finally:
            if go_on.is_alive():
                go_on.join()
            else:
                with suppress(ProcessLookupError):
                    os.kill(record.supervisor, signal.SIGCONT)
