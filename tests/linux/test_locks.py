"""Locks hold between threads and processes, and survive the removal of their file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hutch.errors import Busy
from hutch.linux import locks
from hutch.linux.locks import is_locked, lock_file
from tests.leaks import open_files

SOURCE = str(Path(locks.__file__).parents[2])


def test_a_second_holder_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with lock_file(tmp_path / "lock"):
        with pytest.raises(Busy, match="lock"), lock_file(tmp_path / "lock", timeout_s=0):
            pass
        with pytest.raises(Busy), lock_file(tmp_path / "lock", exclusive=False, timeout_s=0.01):
            pass
    with lock_file(tmp_path / "lock", timeout_s=0):
        pass


def test_readers_share(tmp_path: Path) -> None:
    with (
        lock_file(tmp_path / "lock", exclusive=False),
        lock_file(tmp_path / "lock", exclusive=False, timeout_s=0),
        pytest.raises(Busy),
        lock_file(tmp_path / "lock", timeout_s=0),
    ):
        pass


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    inside = 0
    most = 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with lock_file(tmp_path / "lock", timeout_s=30):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {SOURCE!r})\n"
        "from hutch.linux.locks import lock_file\n"
        "with lock_file(sys.argv[1]):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(Busy), lock_file(tmp_path / "lock", timeout_s=0):
            pass
        child.kill()
        with lock_file(tmp_path / "lock", timeout_s=60):
            pass


def test_who_waited_for_a_removed_file_locks_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    got: list[bool] = []
    with lock_file(path) as fd:

        def wait() -> None:
            with lock_file(path, timeout_s=30) as own:
                got.append(os.path.samestat(os.fstat(own), os.stat(path)))

        waiter = threading.Thread(target=wait)
        waiter.start()
        before = os.fstat(fd)
        path.unlink()
        path.touch()
        assert not os.path.samestat(before, os.stat(path))
    waiter.join(60)
    assert got == [True]


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with lock_file(path):
        before = open_files().count(path)
        for _ in range(3):
            with pytest.raises(Busy), lock_file(tmp_path / "lock", timeout_s=0):
                pass
        assert open_files().count(path) == before == 1


def test_a_link_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(OSError), lock_file(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_is_seen_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    with lock_file(path):
        assert is_locked(path)
        (tmp_path / "link").symlink_to("lock")
        assert not is_locked(tmp_path / "link")
    assert not is_locked(path)
    assert not is_locked(path / "below")
    assert not is_locked(tmp_path / ("n" * 300))


def test_what_cannot_be_looked_at_is_not_called_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("hutch.linux.locks.os.open", refuse)
    with pytest.raises(OSError, match="too many"):
        is_locked(tmp_path)
