"""prctl(2) options that hutch uses on its own process."""

from __future__ import annotations

import ctypes

from hutch.linux.libc import libc, raise_errno

__all__ = ["get_no_new_privs", "prctl", "set_child_subreaper", "set_no_new_privs"]

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2) with integer arguments; return its result."""
    arguments = [ctypes.c_ulong(value) for value in (arg2, arg3, arg4, arg5)]
    result = int(libc.prctl(option, *arguments))
    if result < 0:
        raise_errno()
    return result


def set_child_subreaper(on: bool = True) -> None:
    """Become, or stop being, the reaper of orphaned descendants."""
    prctl(PR_SET_CHILD_SUBREAPER, int(on))


def set_no_new_privs() -> None:
    """Give up, for good, gaining privileges by execve(2)."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def get_no_new_privs() -> bool:
    """Return whether no_new_privs is set."""
    return prctl(PR_GET_NO_NEW_PRIVS) == 1
