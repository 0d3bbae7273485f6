"""Side programs: their output, their end, and what happens when they are missing or slow."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hutch.errors import OperationTimeout, Unsupported
from hutch.process import run_command, spawn


def test_a_command_gives_its_status_and_output() -> None:
    done = run_command(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"in")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"in", b"err\n")


def test_a_command_killed_by_a_signal_says_so() -> None:
    assert run_command(["sh", "-c", "kill -9 $$"]).returncode == -signal.SIGKILL


def test_a_missing_program_is_unsupported_with_a_cure() -> None:
    with pytest.raises(Unsupported, match="no-such-program") as failure:
        run_command(["no-such-program"])
    assert failure.value.hint is not None
    with pytest.raises(Unsupported), spawn(["no-such-program"]):
        pass


def test_a_missing_directory_is_not_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run_command(["true"], cwd=str(tmp_path / "none"))


def test_a_slow_command_is_killed() -> None:
    with pytest.raises(OperationTimeout):
        run_command(["sleep", "100"], timeout_s=0.1)


def test_output_may_go_to_a_descriptor(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        done = run_command(["echo", "there"], stdout_fd=file)
    assert (done.stdout, (tmp_path / "out").read_bytes()) == (b"", b"there\n")


def test_input_may_come_from_a_descriptor(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"from a file")
    with (tmp_path / "in").open("rb") as file:
        assert run_command(["cat"], stdin_fd=file).stdout == b"from a file"


def test_descriptors_are_passed_only_when_named(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        script = f"test -e /proc/self/fd/{fd}"
        assert run_command(["sh", "-c", script]).returncode == 1
        assert run_command(["sh", "-c", script], pass_fds=[fd]).returncode == 0
    finally:
        os.close(fd)


def test_the_environment_is_the_one_given() -> None:
    assert run_command(["/usr/bin/env"], env={"A": "b"}).stdout == b"A=b\n"


def test_a_spawned_program_ends_with_the_block() -> None:
    with spawn(["sleep", "100"]) as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGTERM


def test_a_stubborn_program_is_killed() -> None:
    import subprocess

    script = "trap '' TERM; echo ready; while :; do sleep 1; done"
    with spawn(["sh", "-c", script], stdout=subprocess.PIPE, stop_timeout_s=0.1) as process:
        assert process.stdout is not None
        process.stdout.readline()
    assert process.returncode == -signal.SIGKILL


def test_a_failure_in_the_block_ends_the_program_too() -> None:
    with pytest.raises(RuntimeError), spawn(["sleep", "100"]) as process:
        raise RuntimeError
    assert process.returncode is not None
