"""What QEMU is given so that it discards memory of a sealed file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hutch.process.vmm import discard_path

# In a process of its own: the library is to come before the C library.
SCRIPT = """
import ctypes, fcntl, os, sys
name, sealed = sys.argv[1], sys.argv[2] == "True"
fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
os.write(fd, b"x" * 8192)
if sealed:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
libc = ctypes.CDLL(None, use_errno=True)
off = ctypes.c_long
result = getattr(libc, name)(fd, int(sys.argv[3]), off(0), off(4096))
print(result, ctypes.get_errno() if result else 0, os.pread(fd, 1, 0), os.pread(fd, 1, 4096))
"""
PUNCH, KEEP_SIZE = 2, 1


def call(name: str, *, sealed: bool, mode: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, str(sealed), str(mode)],
        env={"LD_PRELOAD": discard_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["fallocate", "fallocate64"])
def test_a_hole_in_a_sealed_file_is_taken_for_made(name: str) -> None:
    assert call(name, sealed=True, mode=PUNCH | KEEP_SIZE) == "0 0 b'x' b'x'"


@pytest.mark.parametrize("name", ["fallocate", "fallocate64"])
def test_other_files_are_the_kernels_affair(name: str) -> None:
    assert call(name, sealed=False, mode=PUNCH | KEEP_SIZE) == r"0 0 b'\x00' b'x'"
    # EPERM: memory that is sealed is not given more blocks either.
    assert call(name, sealed=False, mode=0) == "0 0 b'x' b'x'"
    assert call(name, sealed=True, mode=64) == "-1 95 b'x' b'x'"


def test_a_process_that_has_it_takes_no_huge_pages() -> None:
    script = "print(*(line for line in open('/proc/self/status') if line.startswith('THP')))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"LD_PRELOAD": discard_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() in (["THP_enabled:", "0"], [])  # told of since Linux 5.0


def test_it_needs_no_library() -> None:
    assert b"libc.so" not in Path(discard_path()).read_bytes()
