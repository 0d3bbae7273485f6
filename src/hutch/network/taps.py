"""The network of a virtual machine: a namespace with a tap for each of its devices.

QEMU's processes live in a network namespace of their own. The endpoint's interface is made
in it as for a container, but has no address there: a bridge inside joins it to the tap, and
address and MAC are the guest's. So networks, addresses, names and published ports need not
know what kind of instance an endpoint belongs to, and everything goes with the namespace.
"""

from __future__ import annotations

import _thread
import os
from collections.abc import Callable
from typing import NamedTuple

from hutch.errors import Exhausted, Unsupported
from hutch.linux import rtnetlink
from hutch.linux.rtnetlink import RouteSocket
from hutch.network.model import Endpoint

__all__ = ["Taps", "create_taps", "join_messages"]

_LOCAL = b"\x06"  # locally administered, no multicast


class Taps(NamedTuple):
    """A network namespace and the taps in it; the caller closes all descriptors.

    `taps[n]` is the device `tap<n>` with interface index `indexes[n]`."""

    namespace: int
    taps: tuple[int, ...]
    indexes: tuple[int, ...]


def create_taps(count: int) -> Taps:
    """Make a network namespace with `count` persistent tap devices.

    Raises `Unsupported` where the host has no tun device or refuses to open it.
    """
    return _in_new_namespace(lambda: _open_taps(count))


def _open_taps(count: int) -> Taps:
    from hutch.linux.tun import open_tap

    opened: list[int] = []
    try:
        for number in range(count):
            opened.append(open_tap(f"tap{number}", persist=True))
        with RouteSocket() as route:
            links = [route.link(f"tap{number}") for number in range(count)]
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    return Taps(namespace, tuple(opened), tuple(link.index for link in links if link is not None))


def _in_new_namespace(action: Callable[[], Taps]) -> Taps:
    """Run `action` in a thread that enters a new network namespace and then ends: no thread
    of the embedding process is ever in another namespace, whatever fails."""
    from hutch.linux.namespaces import CLONE_NEWNET, unshare

    made: list[Taps] = []
    failures: list[BaseException] = []
    done = _thread.allocate_lock()

    def work() -> None:
        try:
            unshare(CLONE_NEWNET)
            made.append(action())
        except BaseException as error:  # handed to the caller's thread, below
            failures.append(error)
        finally:
            done.release()

    done.acquire()
    try:
        _thread.start_new_thread(work, ())
    except RuntimeError as error:
        raise Exhausted(f"no thread can be started: {error}") from error
    done.acquire()
    if failures:
        raise _translate(failures[0])
    return made[0]


def _translate(error: BaseException) -> BaseException:
    if isinstance(error, OSError) and error.filename == "/dev/net/tun":
        return Unsupported(
            f"a virtual machine's network: /dev/net/tun: {error.strerror}",
            hint="load the module tun, or use --network none",
        )
    return error


def join_messages(endpoint: Endpoint, tap: int, number: int) -> tuple[bytes, ...]:
    """Return the messages that join the endpoint's interface to the tap of that index.

    The interface gives up its MAC address, which is the guest's: a bridge keeps frames for
    the addresses of its own ports to itself. All in one request, in the machine's namespace.
    """
    bridge = _bridge_index(number)
    return (
        rtnetlink.set_link(endpoint.ifindex, mac=_LOCAL + os.urandom(5)),
        rtnetlink.add_bridge(f"br{number}", mtu=endpoint.mtu, index=bridge),
        *(
            rtnetlink.set_link(index, master=bridge, mtu=endpoint.mtu, up=True)
            for index in (endpoint.ifindex, tap)
        ),
    )


def _bridge_index(number: int) -> int:
    return (1 << 16) + number
