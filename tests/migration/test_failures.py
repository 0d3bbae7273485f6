"""Killed at any phase, on either side, or without the link: one instance can be started."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hutch.engine import Engine
from hutch.engine import migrate as migrating
from hutch.engine import migrate_settle as settling
from hutch.engine.migrate_settle import claim, find, forget, put
from hutch.errors import HutchError, OutcomeUnknown, WrongState
from hutch.migration.records import MigrationRecord, Phase, Role
from hutch.migration.wire import Wire
from tests.migration.conftest import Other, die_migrating, killed, traces
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "netns", "nftables", "busybox"),
    pytest.mark.integration,
    pytest.mark.timeout(600),
]

STARTABLE = ("created", "exited")


def states(engine: Engine, name: str) -> list[str]:
    return [info.state for info in engine.list(all=True) if info.name == name]


def settle(source: Engine, target: Other) -> tuple[list[str], list[str]]:
    """Reconcile the target, then the source, then the target: as the two would by themselves."""
    target.hutch("system", "reconcile")
    source.reconcile()
    with target.engine() as there:
        return states(source, "moved"), states(there, "moved")


def finish(source: Engine, target: Other, here: list[str], there: list[str]) -> None:
    """See that exactly one can be started, start it, and remove it."""
    able = [state for state in (*here, *there) if state in STARTABLE]
    assert len(able) == 1, (here, there)
    assert len(here) + len(there) == 1, (here, there)
    assert traces_of_migration(source) == []
    with target.engine() as engine:
        assert traces_of_migration(engine) == []
    if here:
        box = source.get("moved")
        box.start()
        assert box.wait() == 0
        box.remove()
    else:
        target.hutch("start", "moved")
        assert target.hutch("wait", "moved") == "0"
        target.hutch("rm", "moved")
    with target.engine() as engine:
        assert [volume.name for volume in engine.volumes.list()] == (["kept"] if there else [])


def traces_of_migration(engine: Engine) -> list[str]:
    return [trace for trace in traces(engine) if " " in trace or trace.startswith("migration")]


@pytest.fixture
def moved(source: Engine, target: Other) -> Iterator[str]:
    """An instance with a volume, which is removed on both sides in the end."""
    box = source.create("busybox", ["true"], name="moved", volumes=["kept:/kept"])
    yield box.id
    with target.engine() as there:
        for engine in (source, there):
            engine._context.volumes.remove("kept", missing_ok=True)


SOURCE = [
    ("hutch.engine.migrate:_offer", "after", "source"),
    ("hutch.engine.migrate:_claim", "after", "source"),
    ("hutch.engine.migrate_send:Sender.send_instance", "after", "source"),
    # The target has all and waits; the source has not decided.
    ("hutch.engine.migrate:_decide", "before", "source"),
    ("hutch.engine.migrate:_decide", "after", "target"),
    ("hutch.engine.migrate:complete", "before", "target"),
    ("hutch.engine.migrate_settle:remove_locked", "after", "target"),
]


def some(points: list[tuple[str, str, str]]) -> list[Any]:
    """Every second point from the end; the others with HUTCH_SOAK."""
    later = points[-2::-2]
    return [pytest.param(*p, marks=[pytest.mark.soak] * (p in later)) for p in points]


@pytest.mark.parametrize(("where", "when", "winner"), some(SOURCE))
def test_a_source_that_is_killed_leaves_one_instance(
    source: Engine, target: Other, moved: str, where: str, when: str, winner: str
) -> None:
    die_migrating(source, target, where, when, "--with-volumes")
    here_states, there_states = settle(source, target)
    assert (winner == "source") == bool(here_states)
    finish(source, target, here_states, there_states)


TARGET = [
    ("hutch.engine.migrate_receive:obstacles", "before", "source"),
    ("hutch.engine.migrate_receive:register_image", "before", "source"),
    ("hutch.engine.migrate_receive:_Incoming._prepare", "after", "source"),
    ("hutch.engine.migrate_receive:_Incoming._volumes", "after", "source"),
    ("hutch.engine.migrate_receive:_Incoming._insert", "after", "source"),
    ("hutch.engine.migrate_receive:_commit", "before", "target"),
    ("hutch.engine.migrate_receive:activate", "after", "target"),
    ("hutch.engine.migrate_receive:forget", "before", "target"),
]


@pytest.mark.parametrize(("where", "when", "winner"), some(TARGET))
def test_a_target_that_is_killed_leaves_one_instance(
    source: Engine,
    target: Other,
    moved: str,
    tmp_path: Path,
    where: str,
    when: str,
    winner: str,
) -> None:
    if "register_image" in where:
        with target.engine() as engine:
            for image in engine.images.list():
                engine.images.remove(image.id, force=True)
    destination = once_killed(target, tmp_path, where, when)
    try:
        source.migrate("moved", destination, with_volumes=True)
    except HutchError:
        assert winner == "source"
    else:
        assert winner == "target"
    here_states, there_states = settle(source, target)
    assert (winner == "source") == bool(here_states)
    finish(source, target, here_states, there_states)


def once_killed(target: Other, tmp_path: Path, where: str, when: str) -> str:
    """Return a destination whose first process is killed; the next ones are not."""
    marker = tmp_path / "killed"
    first = shlex.join(killed(target.argv("_migrate_target"), where, when))
    later = shlex.join(target.argv("_migrate_target"))
    script = tmp_path / "target"
    script.write_text(
        f"#!/bin/sh\nif [ ! -e {marker} ]; then : > {marker}; exec {first}; fi\nexec {later}\n"
    )
    script.chmod(0o755)
    return f"exec:{script}"


class Cut(Exception):
    """The test cuts the link here."""


@pytest.mark.parametrize(
    "message",
    [*(pytest.param(m, marks=pytest.mark.soak) for m in ("Offer", "Prepare", "Forget")), "Commit"],
)
def test_a_link_that_is_cut_leaves_one_instance(
    source: Engine, target: Other, moved: str, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """The link dies as the message goes out: nothing tells whether it has arrived."""
    real = Wire.send
    cut: list[str] = []

    def send(self: Wire, sent: object) -> None:
        real(self, sent)  # type: ignore[arg-type]
        if type(sent).__name__ == message and not cut:
            cut.append(message)
            os.close(os.dup(self._read_fd))
            raise HutchError("the link was cut")

    monkeypatch.setattr(Wire, "send", send)
    try:
        source.migrate("moved", target.destination, with_volumes=True)
    except HutchError:
        pass
    assert cut == [message]
    here_states, there_states = settle(source, target)
    assert ("moved" in target.hutch("ps", "-a")) == (message in ("Commit", "Forget"))
    finish(source, target, here_states, there_states)


def test_an_unreachable_target_keeps_the_decision_open_until_it_is_back(
    source: Engine, target: Other, moved: str, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    destination = once_killed(target, tmp_path, "hutch.engine.migrate_receive:_commit", "before")
    script = Path(destination.removeprefix("exec:"))
    script.write_text(script.read_text().replace("exec ", f"[ -e {gone} ] && exit 9\nexec ", 2))
    lines = script.read_text().replace("exec ", f": > {gone}; exec ", 1)
    script.write_text(lines)
    with pytest.raises(OutcomeUnknown, match="has been given to"):
        source.migrate("moved", destination, with_volumes=True)
    source.reconcile()
    assert states(source, "moved") == ["migrating"]
    box = source.get("moved")
    with pytest.raises(WrongState, match="is migrating"):
        box.start()
    with pytest.raises(WrongState, match="is migrating"):
        box.remove(force=True)
    with pytest.raises(WrongState, match="is migrating"):
        box.rename("other")
    with target.engine() as engine:
        assert states(engine, "moved") == ["migrating"]
        with pytest.raises(WrongState, match="is migrating"):
            engine.get("moved").start()
    gone.unlink()
    source.reconcile()
    with target.engine() as engine:
        there = states(engine, "moved")
    finish(source, target, states(source, "moved"), there)


def test_a_lost_source_is_overruled_by_a_claim(source: Engine, target: Other, moved: str) -> None:
    here = [sys.executable, "-m", "hutch", "--root", str(source.root)]
    command = [*here, "migrate", "--with-volumes", "moved", target.destination]
    subprocess.run(
        killed(command, "hutch.engine.migrate:_decide", "before"), capture_output=True, check=False
    )
    with target.engine() as engine:
        assert states(engine, "moved") == ["migrating"]
    assert target.hutch("migrate", "--claim", "moved") == "moved"
    target.hutch("start", "moved")
    assert target.hutch("wait", "moved") == "0"
    target.hutch("rm", "moved")
    source.reconcile()
    source.get("moved").remove()


@pytest.mark.parametrize("name", ["_offer", "_claim", "_decide"])
@pytest.mark.parametrize("failure", [OSError(5, "injected"), KeyboardInterrupt()], ids=type)
def test_a_failure_or_ctrl_c_before_the_decision_leaves_it_here_and_nothing_there(
    source: Engine,
    target: Other,
    moved: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    failure: BaseException,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(migrating, name, fail)
    with pytest.raises(type(failure)):
        source.migrate("moved", target.destination, with_volumes=True)
    monkeypatch.undo()
    with target.engine() as engine:
        there = states(engine, "moved")
        assert [volume.name for volume in engine.volumes.list()] == []
    finish(source, target, states(source, "moved"), there)


def test_ctrl_c_in_the_middle_of_a_stream_leaves_it_here_and_nothing_there(
    source: Engine, target: Other
) -> None:
    script = "head -c 8000000 /dev/urandom > /root/much"
    box = source.create("busybox", ["sh", "-c", script], name="moved")
    box.start()
    assert box.wait() == 0
    here = [sys.executable, "-m", "hutch", "--root", str(source.root)]
    with subprocess.Popen(
        [*here, "migrate", "--bandwidth", "1M", "moved", target.destination],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as command:
        assert command.stderr is not None
        for line in command.stderr:
            if "sending upper" in line:
                # To all of them, as a terminal does: the target's process too.
                os.killpg(command.pid, signal.SIGINT)
                break
        command.stderr.read()
        assert command.wait() == 130
    assert states(source, "moved") == ["exited"]
    with target.engine() as there:
        assert states(there, "moved") == []
        assert traces(there) == []
    box.remove()


def aborted(identifier: str, previous: str) -> MigrationRecord:
    """What a source has noted whose target is yet to be told."""
    return MigrationRecord(
        token="a" * 32,
        role=Role.SOURCE,
        phase=Phase.ABORTED,
        instance=identifier,
        name="moved",
        destination="exec:false",
        previous=previous,
        resume=True,
        isolation="container",
    )


def test_what_was_taken_back_is_started_once_however_often_the_target_is_to_be_told(
    source: Engine,
) -> None:
    box = source.create("busybox", ["true"], name="moved")
    context, migration = source._context, aborted(box.id, "suspended")
    put(context, migration)
    try:
        source.reconcile()
        assert states(source, "moved") == ["created"]
        assert find(context, migration.token) == msgspec.structs.replace(migration, resume=False)
    finally:
        forget(context, migration.token)
    box.remove()
    assert traces(source) == []


def test_what_cannot_be_started_again_keeps_nothing_else_from_being_settled(
    source: Engine,
) -> None:
    box = source.create("busybox", ["/missing"], name="moved")
    context, migration = source._context, aborted(box.id, "created")
    put(context, migration)
    try:
        source.reconcile()
        assert find(context, migration.token) == migration
    finally:
        forget(context, migration.token)
    box.remove()


def test_a_claim_loses_to_whoever_settles_first(
    source: Engine, target: Other, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_migrating(source, target, "hutch.engine.migrate:_claim", "after", "--with-volumes")
    lock = settling.migration_lock

    def settled(context: Any, token: str) -> Any:
        monkeypatch.undo()
        source.reconcile()
        return lock(context, token)

    monkeypatch.setattr(settling, "migration_lock", settled)
    with pytest.raises(WrongState, match="nothing to claim"):
        claim(source._context, "moved")
    here_states, there_states = settle(source, target)
    finish(source, target, here_states, there_states)


RIVAL = """
import os, signal
import hutch.engine.migrate_receive as receive
real = receive.put
def put(context, migration, **options):
    if migration.volumes and migration.phase == "preparing":
        made = context.volumes.create("kept")
        open(f"{made.path}/precious", "w").close()
        real(context, migration, **options)
        #os.kill(os.getpid(), signal.SIGKILL)
    return real(context, migration, **options)
receive.put = put
from hutch.cli.main import main
main()
"""


@pytest.mark.parametrize("is_killed", [False, True], ids=["told", "killed"])
def test_a_volume_that_somebody_makes_meanwhile_is_theirs(
    source: Engine, target: Other, moved: str, is_killed: bool
) -> None:
    argv = target.argv("_migrate_target")
    at = argv.index("-m")
    rival = RIVAL.replace("#", "" if is_killed else "#")
    command = shlex.join([*argv[:at], "-c", rival, *argv[at + 2 :]])
    reason = "closed the link" if is_killed else "kept: was made here meanwhile"
    with pytest.raises(HutchError, match=reason):
        source.migrate("moved", f"exec:{command}", with_volumes=True)
    target.hutch("system", "reconcile")
    with target.engine() as there:
        assert os.listdir(there._context.volumes.get("kept").path) == ["precious"]
        there._context.volumes.remove("kept")
    assert states(source, "moved") == ["created"]
    source.get("moved").remove()
