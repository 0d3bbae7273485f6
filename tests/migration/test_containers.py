"""Containers that run go to another hutch with their memory, by a real CRIU on both sides."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.drivers.container.saving import HeldContainer
from hutch.engine import Engine
from hutch.engine.migrate_send import Sender
from hutch.errors import HutchError, IntegrityError, Unsupported
from hutch.migration.layers import SentFiles, take_kept
from tests.migration.conftest import Other, behind, die_migrating, killed, traces
from tests.native.boxes import wait_until
from tests.requires import criu_program, requires

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.serial,
    requires("root", "overlayfs", "cgroup", "netns", "criu"),
]

COUNT = "i=0; while :; do i=$((i+1)); echo $i; echo $i >/root/count; sleep 0.05; done"
PATIENCE_S = 200.0


@pytest.fixture(scope="module", autouse=True)
def _with_bridge(source_engine: Engine) -> None:
    """What the engine keeps from its first container on is there before the first test."""
    with source_engine.create("busybox", ["true"]) as box:
        box.start()
        box.wait()


@pytest.fixture(autouse=True)
def _with_criu(monkeypatch: pytest.MonkeyPatch, other_namespace: int) -> None:
    program = criu_program()
    assert program is not None
    monkeypatch.setenv("HUTCH_CRIU", program)
    subprocess.run(
        ["nsenter", f"--net=/proc/{other_namespace}/ns/net", "ip", "link", "set", "lo", "up"],
        check=True,
    )


@pytest.fixture
def moved(source: Engine, target: Other) -> Iterator[str]:
    """A container that counts, with a file and something in memory file systems."""
    box = source.create(
        "busybox", ["sh", "-c", COUNT], name="moved", volumes=["kept:/kept"], tmpfs=["/memory"]
    )
    box.start()
    box.exec(["sh", "-c", "echo kept | tee /root/file /kept/file /memory/file"], check=True)
    yield box.id
    for info in source.list(all=True):
        source.get(info.name).remove(force=True, volumes=True)
    if json.loads(target.hutch("-o", "json", "ps", "-a")):
        target.hutch("rm", "-fv", "moved")
    with target.engine() as there:
        for engine in (source, there):
            engine._context.volumes.remove("kept", missing_ok=True)


def counts_on(engine: Engine) -> None:
    box = engine.get("moved")

    def counted() -> list[int]:
        return [int(record.data) for record in box.logs()]

    before = len(counted())
    deadline = time.monotonic() + PATIENCE_S
    while len(counted()) < before + 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert counted() == list(range(1, len(counted()) + 1))


def goes_on_here(source: Engine, target: Other) -> None:
    """It runs at the source, counts on without a gap, and the target has nothing."""
    box = source.get("moved")
    assert box.info().state == "running"

    counts_on(source)
    listing = ("-o", "json", "ps", "-a")
    wait_until(lambda: json.loads(target.hutch(*listing)) == [], "it to be gone at the target")


def goes_on_there(source: Engine, target: Other) -> None:
    """It runs at the target, counts on without a gap, with memory and files; nothing is here."""
    with target.engine() as there:
        counts_on(there)
    asked = target.hutch("exec", "moved", "cat", "/root/file", "/kept/file", "/memory/file")
    assert asked.split() == ["kept"] * 3
    assert [info.name for info in source.list(all=True)] == []


def test_a_container_goes_on_at_the_target_without_a_gap(
    source: Engine, target: Other, moved: str
) -> None:
    box = source.get("moved")
    # Old enough that its time tells whether it was changed: it is sent ahead.
    box.exec(["sh", "-c", "echo old >/root/old; touch -d @1000000 /root/old; rm /bin/vi"])
    done = source.migrate("moved", target.destination, with_volumes=True)
    assert done.way == "checkpoint"
    assert done.problem == ""
    assert 0 < done.downtime_s <= done.offline_s <= done.total_s
    goes_on_there(source, target)
    script = "cat /root/old; ls /bin/vi 2>/dev/null || echo none; ip -4 addr show eth0"
    told = target.hutch("exec", "moved", "sh", "-c", script).split()
    assert told[:2] == ["old", "none"]
    assert "inet" in told
    # It is stopped and started there as any other.
    target.hutch("stop", "-t", "0", "moved")
    target.hutch("start", "moved")


def test_what_it_said_last_comes_along_though_it_is_not_logged_yet(
    source: Engine, target: Other, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with behind(source, moved, monkeypatch, Sender, "send_files_ahead"):
        source.migrate("moved", target.destination, with_volumes=True)
    goes_on_there(source, target)


def test_a_restore_that_fails_lets_the_source_run_on(
    source: Engine, target: Other, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = HeldContainer.save_memory

    def spoiled(self: HeldContainer, directory: str) -> None:
        real(self, directory)
        os.unlink(f"{directory}/criu/pstree.img")

    with monkeypatch.context() as patch:
        patch.setattr(HeldContainer, "save_memory", spoiled)
        with pytest.raises(HutchError, match="CRIU cannot restore"):
            source.migrate("moved", target.destination, with_volumes=True)
    goes_on_here(source, target)
    source.migrate("moved", target.destination, with_volumes=True)
    goes_on_there(source, target)


SOURCE = [
    # It is frozen, and the target has brought it back up to where it would run.
    pytest.param(
        "hutch.engine.migrate_container:decide", "before", "source", marks=pytest.mark.soak
    ),
    # The target has not heard of the decision, and lets nothing run without.
    ("hutch.engine.migrate_container:decide", "after", "source"),
    ("hutch.engine.migrate:complete", "before", "target"),
]


@pytest.mark.parametrize(("where", "when", "winner"), SOURCE)
def test_a_source_that_is_killed_leaves_one_container(
    source: Engine, target: Other, moved: str, where: str, when: str, winner: str
) -> None:
    die_migrating(source, target, where, when, "--with-volumes")
    settle(source, target)
    (goes_on_here if winner == "source" else goes_on_there)(source, target)


TARGET = [
    ("hutch.engine.migrate_container:start_here", "before", "source"),
    ("hutch.engine.migrate_container:activate_started", "before", "target"),
]


@pytest.mark.parametrize(("where", "when", "winner"), TARGET)
def test_a_target_that_is_killed_leaves_one_container(
    source: Engine,
    target: Other,
    moved: str,
    tmp_path: Path,
    where: str,
    when: str,
    winner: str,
) -> None:
    mark = tmp_path / "killed"
    once = shlex.join(killed(target.argv("_migrate_target"), where, when))
    again = shlex.join(target.argv("_migrate_target"))
    script = f"if [ -e {mark} ]; then exec {again}; fi; : >{mark}; exec {once}"
    destination = "exec:" + shlex.join(["sh", "-c", script])
    try:
        source.migrate("moved", destination, with_volumes=True)
    except HutchError:
        assert winner == "source"
    settle(source, target)
    (goes_on_here if winner == "source" else goes_on_there)(source, target)


def settle(source: Engine, target: Other) -> None:
    """Let both sides put right what was cut short; a killed side's end may be still under way."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        target.hutch("system", "reconcile")
        source.reconcile()
        with target.engine() as there:
            left = [trace for one in (source, there) for trace in traces(one) if " " in trace]
        if not left:
            return
        assert time.monotonic() < deadline, left


def test_what_stands_in_the_way_is_named(
    source: Engine, target: Other, moved: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match="post-copy"):
        source.migrate("moved", target.destination, post_copy=True)
    program = os.environ["HUTCH_CRIU"]
    without = shlex.join(["env", f"HUTCH_CRIU={tmp_path}/none", *target.argv("_migrate_target")])
    with pytest.raises(HutchError, match="target: CRIU"):
        source.migrate("moved", f"exec:{without}", with_volumes=True)
    monkeypatch.setenv("HUTCH_CRIU", str(tmp_path / "none"))
    with pytest.raises(Unsupported, match="CRIU") as failed:
        source.migrate("moved", target.destination, with_volumes=True)
    assert "stop it first" in (failed.value.hint or "")
    monkeypatch.setenv("HUTCH_CRIU", program)
    goes_on_here(source, target)


def test_files_that_changed_are_not_taken_from_what_was_sent_ahead(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "dir").mkdir(parents=True)
    for name in ("same", "dir/same", "written", "gone", "linked", "touched"):
        (upper / name).write_text(name)
    os.link(upper / "linked", upper / "link")
    sent = SentFiles(str(upper))
    assert sent.unchanged() == []  # too new to be told from what is written next
    for path in upper.rglob("*"):
        os.utime(path, (0, 0))
    # A change of times is one of the inode, which nobody can set back: wait for it to be old.
    deadline = time.monotonic() + PATIENCE_S
    while not (sent := SentFiles(str(upper))).unchanged():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (upper / "written").write_text("more")
    (upper / "gone").unlink()
    os.utime(upper / "touched")
    assert sorted(sent.unchanged()) == [b"dir/same", b"same"]


@pytest.mark.parametrize("name", [b"../out", b"/etc/passwd", b"link/out", b"dir/..", b"none"])
def test_a_name_of_a_kept_file_does_not_lead_out(tmp_path: Path, name: bytes) -> None:
    for tree in ("ahead", "upper"):
        (tmp_path / tree / "dir").mkdir(parents=True)
        (tmp_path / tree / "link").symlink_to("..")
        (tmp_path / tree / "out").write_text(tree)
    with pytest.raises(IntegrityError):
        take_kept([name], str(tmp_path / "ahead"), str(tmp_path / "upper"))
    assert (tmp_path / "upper/out").read_text() == "upper"
    take_kept([b"o", b"ut\0"], str(tmp_path / "ahead"), str(tmp_path / "upper"))
    assert (tmp_path / "upper/out").read_text() == "ahead"
