"""The network of a virtual machine: a namespace with a tap for each of its devices.

QEMU's processes live in a network namespace of their own. The endpoint's interface is made
in it as for a container, but has no address there: a bridge inside joins it to the tap, and
address and MAC are the guest's. So networks, addresses, names and published ports need not
know what kind of instance an endpoint belongs to, and everything goes with the namespace.
"""

from __future__ import annotations

import _thread
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from hutch.errors import Exhausted, Unsupported
from hutch.linux import rtnetlink
from hutch.linux.rtnetlink import RouteSocket
from hutch.network.model import Endpoint
from hutch.network.netns import netns_path, open_inside

__all__ = ["Taps", "add_tap", "create_taps", "join_messages", "remove_tap"]

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
    from hutch.linux.namespaces import CLONE_NEWNET, unshare

    def enter() -> None:
        unshare(CLONE_NEWNET)
        _without_addresses()

    return _in_namespace(enter, lambda: _open_taps(range(count)))


def _without_addresses() -> None:
    """Have no interface of this thread's namespace take an address of IPv6 by itself: each would
    announce it to the machine, and answer there."""
    # There is no such file where the host's kernel does not speak IPv6.
    with suppress(OSError), open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "wb") as file:
        file.write(b"1")


def add_tap(pid: int, number: int) -> Taps:
    """Make the tap device of that number in the namespace of a machine's process."""
    from hutch.linux.namespaces import CLONE_NEWNET, setns

    def enter() -> None:
        fd = os.open(netns_path(pid), os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(fd, CLONE_NEWNET)
        finally:
            os.close(fd)

    return _in_namespace(enter, lambda: _open_taps([number]))


def remove_tap(pid: int, number: int) -> None:
    """Remove a tap that `add_tap` made, with the bridge that it is joined to."""
    with open_inside(pid) as route:
        for name in (f"tap{number}", f"br{number}"):
            link = route.link(name)
            if link is not None:
                route.request(rtnetlink.delete_link(link.index))


def _open_taps(numbers: Sequence[int]) -> Taps:
    from hutch.linux.tun import open_tap

    opened: list[int] = []
    try:
        for number in numbers:
            opened.append(open_tap(f"tap{number}", persist=True))
        with RouteSocket() as route:
            links = [route.link(f"tap{number}") for number in numbers]
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    return Taps(namespace, tuple(opened), tuple(link.index for link in links if link is not None))


def _in_namespace(enter: Callable[[], None], action: Callable[[], Taps]) -> Taps:
    """Run `action` in a thread that enters a network namespace and then ends: no thread
    of the embedding process is ever in another namespace, whatever fails."""
    made: list[Taps] = []
    failures: list[BaseException] = []
    done = _thread.allocate_lock()

    def work() -> None:
        try:
            enter()
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
    the addresses of its own ports to itself. The bridge just passes on: an endpoint with
    published ports gets its own broadcasts back (hairpin), and a bridge that learned from
    them would keep what is for the machine. All in one request, in the machine's namespace.
    """
    bridge = _bridge_index(number)
    return (
        rtnetlink.set_link(endpoint.ifindex, mac=_LOCAL + os.urandom(5)),
        rtnetlink.add_bridge(f"br{number}", mtu=endpoint.mtu, index=bridge),
        *(
            part
            for index in (endpoint.ifindex, tap)
            for part in (
                rtnetlink.set_link(index, master=bridge, mtu=endpoint.mtu),
                rtnetlink.set_learning(index, False),
                rtnetlink.set_link(index, up=True),
            )
        ),
    )


def _bridge_index(number: int) -> int:
    return (1 << 16) + number
