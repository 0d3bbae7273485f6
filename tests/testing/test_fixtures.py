"""The fixtures that users import, in a test session of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.testing import ensure_image
from tests.requires import requires

pytestmark = [requires("root", "overlayfs", "cgroup", "busybox"), pytest.mark.integration]

USERS_TEST = """
def test_run(hutch_run):
    assert hutch_run("busybox", ["echo", "hi"], network="none").stdout == b"hi\\n"

def test_box_and_volume(hutch_box, hutch_volume, hutch_engine):
    volume = hutch_volume()
    box = hutch_box("busybox", ["sleep", "100"], network="none", volumes=[f"{volume}:/d"])
    assert box.exec(["touch", "/d/f"]).exit_code == 0
    assert len(hutch_engine.list(filters={"volume": [volume]})) == 1

def test_everything_is_gone(hutch_engine):
    assert not [i for i in hutch_engine.list(all=True) if "sleep" in i.command]
    assert not [v for v in hutch_engine.volumes.list() if v.name.startswith("test-")]

def test_failing(hutch_box):
    hutch_box("busybox", ["sleep", "100"], network="none")
    assert False
"""


def test_fixtures_work_by_themselves_and_clean_up(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(USERS_TEST)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HUTCH_", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "--rootdir", str(tmp_path), "--basetemp", str(tmp_path / "base"), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert "1 failed" in done.stdout
    assert not list((tmp_path / "base").glob("hutch*/hutch.db"))


def test_an_image_that_is_there_is_left_alone(hutch_engine: Engine) -> None:
    ensure_image(hutch_engine, "busybox")
    before = hutch_engine.images.get("busybox").id
    assert ensure_image(hutch_engine, "busybox") == "busybox"
    assert hutch_engine.images.get("busybox").id == before
