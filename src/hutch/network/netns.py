"""Act inside another process's network namespace without ever moving the caller's thread."""

from __future__ import annotations

import _thread
import os
from collections.abc import Sequence

from hutch.errors import Exhausted, NotFound
from hutch.linux.rtnetlink import RouteSocket

__all__ = ["configure", "netns_path", "open_inside"]


def netns_path(pid: int) -> str:
    """Return the path of a process's network namespace, for `network=container:ID`."""
    return f"/proc/{pid}/ns/net"


def open_inside(pid: int) -> RouteSocket:
    """Return a netlink socket of the network namespace of process `pid`; the caller closes it.

    A socket stays in the namespace it was made in, so a thread of its own enters, makes it
    and ends: no thread of the embedding process is ever in another namespace, whatever
    fails. Raises `NotFound` where the process is gone.
    """
    try:
        fd = os.open(netns_path(pid), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"network namespace of process {pid}: {error.strerror}") from error
    from hutch.linux.namespaces import CLONE_NEWNET, setns

    made: list[RouteSocket] = []
    failures: list[BaseException] = []
    done = _thread.allocate_lock()

    def work() -> None:
        try:
            setns(fd, CLONE_NEWNET)
            made.append(RouteSocket())
        except BaseException as error:  # handed to the caller's thread, below
            failures.append(error)
        finally:
            os.close(fd)
            done.release()

    done.acquire()
    try:
        # Not by `threading`, whose import costs more than all of this.
        _thread.start_new_thread(work, ())
    except RuntimeError as error:
        os.close(fd)
        raise Exhausted(f"no thread can be started: {error}") from error
    done.acquire()
    if failures:
        raise failures[0]
    return made[0]


def configure(pid: int, messages: Sequence[bytes], *, ignore: Sequence[int] = ()) -> None:
    """Send netlink messages inside the namespace of process `pid`."""
    with open_inside(pid) as route:
        route.request(*messages, ignore=ignore)
