"""Namespaces: unshare(2), setns(2) and what ioctl_ns(2) tells of a namespace descriptor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.linux.libc import libc, raise_errno

__all__ = ["namespace_type", "new_namespace_fd", "setns", "thread_in_namespace", "unshare"]

CLONE_VM = 0x00000100
CLONE_FS = 0x00000200
CLONE_FILES = 0x00000400
CLONE_NEWTIME = 0x00000080
CLONE_PIDFD = 0x00001000
CLONE_VFORK = 0x00004000
CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000

NS_GET_USERNS = 0xB701
NS_GET_PARENT = 0xB702
NS_GET_NSTYPE = 0xB703

_FILE = {
    CLONE_NEWNS: "mnt",
    CLONE_NEWCGROUP: "cgroup",
    CLONE_NEWUTS: "uts",
    CLONE_NEWIPC: "ipc",
    CLONE_NEWNET: "net",
}


def unshare(flags: int) -> None:
    """unshare(2), for the calling thread."""
    if libc.unshare(flags) < 0:
        raise_errno()


def setns(fd: int, nstype: int) -> None:
    """setns(2), for the calling thread: `fd` is a namespace, or a pidfd with several flags."""
    if libc.setns(fd, nstype) < 0:
        raise_errno()


def namespace_type(fd: int) -> int:
    """Return the CLONE_NEW* constant of a namespace descriptor."""
    import fcntl

    return fcntl.ioctl(fd, NS_GET_NSTYPE)


@contextmanager
def thread_in_namespace(fd: int, nstype: int) -> Iterator[None]:
    """Move the calling thread into a namespace for the length of the block.

    For network, UTS, IPC and cgroup namespaces. A mount namespace is refused by the
    kernel (EINVAL) while threads share a root and working directory.
    """
    own = os.open(f"/proc/thread-self/ns/{_FILE[nstype]}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, nstype)
        try:
            yield
        finally:
            setns(own, nstype)
    finally:
        os.close(own)


def new_namespace_fd(nstype: int) -> int:
    """Make a namespace (network, UTS, IPC or cgroup) and return a descriptor that holds it.

    The calling thread is in it only for a moment, and back when the call returns or
    raises. The namespace lives as long as the descriptor or a process in it.
    """
    path = f"/proc/thread-self/ns/{_FILE[nstype]}"
    own = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(nstype)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            setns(own, nstype)
    finally:
        os.close(own)
