"""The processor's time stamp counter: how fast it counts.

The kernel knows and tells nobody: there is no file for it, and `cpu MHz` in /proc/cpuinfo
is the speed of the moment wherever frequencies are scaled.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable

__all__ = ["measure_tsc_khz"]

# rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes([0x0F, 0x31, 0x48, 0xC1, 0xE2, 0x20, 0x48, 0x09, 0xD0, 0xC3])
_TRIES = 16


def measure_tsc_khz(interval_s: float = 0.1) -> int | None:
    """Return the counter's speed in kHz, measured over this long; None where it cannot be.

    Exact to about one part in 100,000 for a tenth of a second, which a guest's own
    calibration at boot does not reach. None on other processors than x86-64, and where
    the kernel's policy allows no code in anonymous memory.
    """
    if os.uname().machine != "x86_64":
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    try:
        page.write(_RDTSC)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
        first_ns, first = _sample(read)
        time.sleep(interval_s)
        last_ns, last = _sample(read)
        del read
    finally:
        _close(page)
    return round((last - first) * 1_000_000 / (last_ns - first_ns)) if last > first else None


def _sample(read: Callable[[], int]) -> tuple[int, int]:
    """Return clock and counter of one moment: the try between which least time passed."""
    best: tuple[int, int, int] | None = None
    for _ in range(_TRIES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        counter = read()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, counter)
    assert best is not None
    return best[1], best[2]


def _close(page: mmap.mmap) -> None:
    try:
        page.close()
    except BufferError:
        pass  # ctypes still refers to it; it goes with the last reference
