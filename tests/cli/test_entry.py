"""What a process is started with and into: signals before it is loaded, streams, locales."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.requires import requires

# An import hook is the only place that is surely in the middle of loading.
_SCRIPT = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.{sent})
        return None

signal.signal(signal.SIGINT, {handler})
sys.meta_path.insert(0, Interrupts())
from hutch.cli.entry import main
sys.argv = ["hutch", "--root", {root!r}, *{words!r}]
main()
"""


def _run(
    root: Path, module: str, handler: str, *words: str, sent: str = "SIGINT"
) -> subprocess.CompletedProcess[str]:
    script = _SCRIPT.format(
        module=module, handler=handler, root=str(root), words=words or ("ps",), sent=sent
    )
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


@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@requires("root", "cgroup", "overlayfs", "seccomp", "busybox")
def test_a_run_that_is_ended_before_its_start_leaves_nothing(
    busybox_root: Path, sent: str, code: int
) -> None:
    words = ("run", "--rm", "--network", "none", "busybox", "true")
    handler = "signal.default_int_handler"
    done = _run(busybox_root, "hutch.engine.start", handler, *words, sent=sent)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert _run(busybox_root, "none", handler, "ps", "-aq").stdout == ""


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
@requires("root", "cgroup", "overlayfs", "seccomp", "busybox")
def test_closed_streams_become_the_null_device(busybox_root: Path, closed: list[int]) -> None:
    # What hutch opens would otherwise get these numbers and be written to by the program.
    command = f"exec {sys.executable} -m hutch --root {busybox_root} run --rm --network none"
    command += " busybox sh -c 'echo out; echo err >&2' " + " ".join(f"{n}>&-" for n in closed)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == ("" if 1 in closed else "out\n")
    assert done.stderr == ("" if 2 in closed else "err\n")
    assert _run(busybox_root, "none", "signal.SIG_IGN", "ps", "-aq").stdout == ""


def test_it_writes_utf8_in_any_locale() -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = subprocess.run(
        [sys.executable, "-m", "hutch", "run", "--help"],
        capture_output=True,
        env={**os.environ, **plain, "PYTHONIOENCODING": "ascii"},
    )
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert "\N{HORIZONTAL ELLIPSIS}" in shown.stdout.decode()


@requires("root", "cgroup", "overlayfs", "seccomp", "busybox")
def test_arguments_and_paths_are_utf8_in_any_locale(busybox_root: Path, tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "GIVEN": "\u00e4"}
    source = tmp_path / "\u00f6"
    source.mkdir()
    (source / "file").write_text("of \u00f6 ")
    command = [sys.executable, "-m", "hutch", "--root", str(busybox_root), "run", "--rm"]
    command += ["--network", "none", "-e", "X=\u00fc", "-e", "GIVEN", "-v", f"{source}:/\u00e9"]
    command += ["busybox", "sh", "-c", "cat /\u00e9/*; echo $X $GIVEN \u00df"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **plain})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "of \u00f6 \u00fc \u00e4 \u00df\n"
