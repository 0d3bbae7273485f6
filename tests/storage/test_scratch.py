"""Directories for work under way: gone with the work, and with the process that did it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hutch.storage.scratch import clean_scratch, scratch_directory
from hutch.storage.trash import Trash

HELD = """
import os, sys, signal
from hutch.storage.scratch import scratch_directory
from hutch.storage.trash import Trash
with scratch_directory(sys.argv[1], Trash(sys.argv[1]), purpose="test") as path:
    open(f"{path}/large", "w").close()
    print(path, flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_is_gone_at_the_end_of_the_block(hutch_root: Path) -> None:
    trash = Trash(hutch_root)
    with (
        pytest.raises(KeyboardInterrupt),
        scratch_directory(hutch_root, trash, purpose="test") as path,
    ):
        Path(path, "file").touch()
        assert os.stat(path).st_mode & 0o777 == 0o700
        raise KeyboardInterrupt
    assert os.listdir(hutch_root / "tmp") == []


def test_only_what_a_dead_process_left_is_cleaned(hutch_root: Path) -> None:
    trash = Trash(hutch_root)
    with subprocess.Popen(
        [sys.executable, "-c", HELD, str(hutch_root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        path = other.stdout.readline().strip()
        assert clean_scratch(hutch_root, trash) == 0
        assert os.listdir(path) == ["large"]
        other.stdin.close()
        other.wait()
    assert os.path.exists(path)
    assert clean_scratch(hutch_root, trash) == 1
    assert trash.drain(30)
    assert os.listdir(hutch_root / "tmp") == os.listdir(hutch_root / "trash") == []
