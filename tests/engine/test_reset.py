"""A root given up: nothing of it is left, on the disk or on the host, wherever it is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine, reclaim, reset
from hutch.engine.memory import MEASURES
from hutch.errors import Busy, InvalidArgument
from hutch.linux.locks import lock_file
from hutch.network.firewall import has_table, table_name
from hutch.resources.ladder import Measure
from hutch.storage.removal import remove_path
from tests.requires import requires


def hutch(root: Path, *words: str, said: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line on a root."""
    argv = [sys.executable, "-m", "hutch", "--root", str(root), *words]
    return subprocess.run(argv, input=said, capture_output=True, text=True, timeout=240)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Where a root will be."""
    path = tmp_path / "root"
    yield path
    if reset.is_root(path):
        with Engine(path) as engine:
            engine.reset()


def furnish(root: Path) -> None:
    """Make some of everything that a root has."""
    with Engine(root) as engine:
        engine.images.bootstrap("busybox")
        engine.pools.create("pool", "btrfs", size="128M")
        for name, options in (("plain", {}), ("sized", {"size": "64M"}), ("in", {"pool": "pool"})):
            engine.volumes.create(name, options=options)
        engine.volumes.snapshot("in", "then")
        engine.networks.create("own")
        mounts = ["plain:/a", "sized:/b", "in:/c"]
        engine.start("busybox", ["sleep", "1000"], name="one", volumes=mounts, publish=["0:80"])
        engine.start("busybox", ["sleep", "1000"], name="two", network="own", restart="always")
        engine.start("busybox", ["sleep", "1000"], name="three", network="none").pause()
        engine.run("busybox", ["touch", "/x"], name="ended", remove=False, network="none")


pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox", "nftables", "loop", "btrfs"),
    pytest.mark.integration,
    pytest.mark.serial,
]


def test_a_reset_leaves_nothing_and_can_be_stopped_anywhere(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at each of its steps in turn, it goes on the next time."""
    furnish(root)
    table = table_name(root)
    assert has_table(table)
    with Engine(root) as engine:
        bridges = [network.bridge for network in engine.networks.list() if network.bridge]
    assert len(bridges) == 2 and set(bridges) <= set(os.listdir("/sys/class/net"))
    for step in (
        "_remove_storage",
        "_unmount_all",
        "_remove_groups",
        "_remove_files",
        "remove_path",
    ):
        with monkeypatch.context() as patch, Engine(root) as engine:
            original = getattr(reset, step)

            def stop(*given: object, original: object = original) -> None:
                assert callable(original)
                original(*given)
                raise KeyboardInterrupt

            patch.setattr(reset, step, stop)
            with pytest.raises(KeyboardInterrupt):
                engine.reset()
    done = hutch(root, "system", "reset", "--force")
    assert not root.exists(), done.stderr
    assert not has_table(table)
    assert not set(bridges) & set(os.listdir("/sys/class/net"))


def test_the_command_asks_names_what_goes_and_keeps_what_is_not_its_own(root: Path) -> None:
    furnish(root)
    (root / "registries.json").write_text("{}")
    refused = hutch(root, "system", "reset", said="no\n")
    assert refused.returncode == 1 and (root / "hutch.db").exists()
    assert f"everything in {root}: 4 instances (2 running), 1 images, 3 vol" in refused.stderr
    done = hutch(root, "system", "reset", said="y\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Kept: {root}/registries.json\nRemoved: {root}\n"
    assert os.listdir(root) == ["registries.json"]
    again = hutch(root, "system", "reset", "--force")
    assert again.returncode != 0 and "is no root of hutch" in again.stderr
    assert os.listdir(root) == ["registries.json"]


def test_a_home_that_was_opened_as_a_root_is_not_emptied(root: Path) -> None:
    with Engine(root) as engine:
        (root / "cache" / "mine").touch()
        (root / "Letters").mkdir()
        with pytest.raises(InvalidArgument, match="holds what is not hutch's: Letters"):
            engine.reset()
        assert (root / "cache" / "mine").exists()
        (root / "Letters").rmdir()


def test_what_still_had_the_root_open_does_not_make_it_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook of an instance's end runs when the instance has been removed already."""
    late: list[str] = []
    delete = remove_path

    def meanwhile(path: str) -> None:
        delete(path)
        if not late:
            (root / "instances").mkdir(exist_ok=True)
            late.append(path)

    with Engine(root) as engine:
        monkeypatch.setattr(reset, "remove_path", meanwhile)
        assert engine.reset().kept == () and late
    for command in (["_exited", "0" * 64], ["_dispatch"]):
        assert hutch(root, *command).returncode == 0
    assert not root.exists()


def test_what_was_done_for_want_of_memory_is_undone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = tmp_path / "ksm-run"
    switch.write_text("1")
    monkeypatch.setattr(reclaim, "_KSM", switch)
    with Engine(root) as engine:
        with engine._context.store.write() as tx:
            tx.put(MEASURES, "merge/", Measure(rung="merge", id="", name=""))
        engine.reset()
    assert switch.read_text() == "0"


def test_a_root_that_somebody_serves_is_left_alone(root: Path) -> None:
    with Engine(root) as engine:
        for name, who in (("daemon", "daemon"), ("dispatch.lock", "dispatcher")):
            with lock_file(root / "locks" / name), pytest.raises(Busy, match=who):
                engine.reset()
        engine.reset()
    assert not root.exists()
