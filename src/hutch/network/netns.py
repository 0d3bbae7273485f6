"""Act inside another process's network namespace without ever moving the caller's thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from hutch.errors import NotFound
from hutch.linux.rtnetlink import RouteSocket

__all__ = ["configure", "netns_path", "run_inside"]

T = TypeVar("T")


def netns_path(pid: int) -> str:
    """Return the path of a process's network namespace, for `network=container:ID`."""
    return f"/proc/{pid}/ns/net"


def run_inside(pid: int, action: Callable[[RouteSocket], T]) -> T:
    """Call `action` with a netlink socket of the namespace of process `pid`.

    It runs on a thread of its own that ends with the call: no thread of the embedding
    process is ever in another namespace, whatever fails. Raises `NotFound` where the
    process is gone.
    """
    import threading

    from hutch.linux.namespaces import CLONE_NEWNET, setns

    try:
        fd = os.open(netns_path(pid), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"network namespace of process {pid}: {error.strerror}") from error
    results: list[T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            setns(fd, CLONE_NEWNET)
            with RouteSocket() as route:
                results.append(action(route))
        except BaseException as error:  # handed to the caller's thread, below
            failures.append(error)

    try:
        thread = threading.Thread(target=work, name="hutch-netns", daemon=True)
        thread.start()
        thread.join()
    finally:
        os.close(fd)
    if failures:
        raise failures[0]
    return results[0]


def configure(pid: int, messages: Sequence[bytes], *, ignore: Sequence[int] = ()) -> None:
    """Send netlink messages inside the namespace of process `pid`."""
    run_inside(pid, lambda route: route.request(*messages, ignore=ignore))
