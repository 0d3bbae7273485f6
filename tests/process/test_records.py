"""Who a process is, read without asking its supervisor."""

from __future__ import annotations

import os
import subprocess

from hutch.process.records import is_child, read_stat


def test_a_running_child_is_known_by_its_parent_and_its_start() -> None:
    with subprocess.Popen(["sleep", "1000"]) as child:
        try:
            stat = read_stat(child.pid)
            assert stat is not None
            assert stat.parent == os.getpid()
            assert is_child(child.pid, stat.start_time, os.getpid())
            assert not is_child(child.pid, stat.start_time, os.getppid())
            assert not is_child(child.pid, stat.start_time + 1, os.getpid())
        finally:
            child.kill()
        # Ended and not reaped yet: a zombie still has its number, and is over.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_child(child.pid, stat.start_time, os.getpid())
        zombie = read_stat(child.pid)
        assert zombie is not None and zombie.ended
    assert read_stat(child.pid) is None


def test_any_command_name_is_read(tmp_path: os.PathLike[str]) -> None:
    program = os.path.join(tmp_path, "a) Z 7 (b")
    os.symlink("/bin/sleep", program)
    with subprocess.Popen([program, "1000"]) as child:
        try:
            stat = read_stat(child.pid)
            assert stat is not None
            assert (stat.parent, stat.ended) == (os.getpid(), False)
        finally:
            child.kill()
