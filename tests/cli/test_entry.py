"""Ctrl-C before a command is loaded: the process leaves with 130 and says nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# An import hook is the only place that is surely in the middle of loading.
_SCRIPT = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
        return None

signal.signal(signal.SIGINT, {handler})
sys.meta_path.insert(0, Interrupts())
from hutch.cli.entry import main
sys.argv = ["hutch", "--root", {root!r}, "ps"]
main()
"""


def _run(root: Path, module: str, handler: str) -> subprocess.CompletedProcess[str]:
    script = _SCRIPT.format(module=module, handler=handler, root=str(root))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


# The last is what msgspec does without where it cannot be loaded.
@pytest.mark.parametrize("module", ["hutch.cli.main", "hutch.cli.table", "msgspec._core"])
def test_an_interrupt_while_it_loads_ends_it_quietly(hutch_root: Path, module: str) -> None:
    done = _run(hutch_root, module, "signal.default_int_handler")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("module", ["hutch.cli.table", "msgspec._core"])
def test_who_was_started_to_ignore_it_goes_on(hutch_root: Path, module: str) -> None:
    done = _run(hutch_root, module, "signal.SIG_IGN")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("CONTAINER ID")
