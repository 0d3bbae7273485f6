"""Processes by descriptor: open, signal, wait for the end, take a descriptor of theirs."""

from __future__ import annotations

import os
import signal

from hutch.linux.libc import raise_errno, syscall

__all__ = ["pidfd_getfd", "pidfd_open", "pidfd_send_signal", "wait_pidfd"]


def pidfd_open(pid: int) -> int:
    """pidfd_open(2); close-on-exec, the caller closes it."""
    return os.pidfd_open(pid)


def pidfd_send_signal(pidfd: int, signum: int) -> None:
    """pidfd_send_signal(2)."""
    signal.pidfd_send_signal(pidfd, signum)


def pidfd_getfd(pidfd: int, target_fd: int) -> int:
    """pidfd_getfd(2): a copy of another process's descriptor; the caller closes it."""
    fd = syscall("pidfd_getfd", pidfd, target_fd, 0)
    if fd < 0:
        raise_errno()
    return fd


def wait_pidfd(pidfd: int, timeout_s: float | None) -> bool:
    """Wait until the process has ended; return False when the time is over first."""
    import select

    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000 + 0.999))))
