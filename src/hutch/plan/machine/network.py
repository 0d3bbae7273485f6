"""Network cards and what they are plugged into."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hutch.errors import InvalidArgument
from hutch.plan.machine.model import Descriptor, Nic, Tap, UserNet
from hutch.plan.machine.quoting import options
from hutch.plan.machine.slots import Places

__all__ = ["nic_arguments"]

_MAC = re.compile(r"^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$")


def nic_arguments(nics: tuple[Nic, ...], places: Places) -> Iterator[str]:
    """Yield back ends (`net0`, …) and cards (`nic0`, …), in order."""
    for index, nic in enumerate(nics):
        if not _MAC.match(nic.mac):
            raise InvalidArgument(
                f"a unicast address such as 52:54:00:12:34:56, got {nic.mac!r}",
                field=f"machine.nics[{index}].mac",
            )
        where = places.many("nics", index, len(nics))
        yield from ("-netdev", _backend(nic, f"net{index}", index))
        queues = len(nic.backend.fds) if isinstance(nic.backend, Tap) else 1
        yield from ("-device", _card(nic, index, queues, places, where))


def _card(
    nic: Nic,
    index: int,
    queues: int,
    places: Places,
    where: dict[str, str | int | bool | None],
) -> str:
    several = queues > 1
    return options(
        places.virtio("virtio-net"),
        *([f"host_mtu={nic.mtu}"] if nic.mtu else []),
        id=f"nic{index}",
        **where,
        netdev=f"net{index}",
        mac=nic.mac,
        mq=True if several else None,
        # One interrupt for each direction of each queue, one for changes, one for control.
        vectors=2 * queues + 2 if several and not places.micro else None,
        # No boot ROM: it is of another package, and its size is a part of migration.
        romfile=None if places.micro else "",
        bootindex=nic.boot_index if nic.boot_index >= 0 else None,
    )


def _backend(nic: Nic, name: str, index: int) -> str:
    backend = nic.backend
    if backend is None:
        return options("hubport", id=name, hubid=index)
    if isinstance(backend, Tap):
        return _tap(backend, name)
    if isinstance(backend, UserNet):
        return _user(backend, name)
    return _stream(backend, name)


def _tap(tap: Tap, name: str) -> str:
    if not tap.fds:
        raise InvalidArgument("at least one descriptor", field="nic.backend.fds")
    if tap.vhost_fds and len(tap.vhost_fds) != len(tap.fds):
        raise InvalidArgument("one for each tap descriptor", field="nic.backend.vhost_fds")
    several = len(tap.fds) > 1
    taps, vhosts = (":".join(map(str, fds)) or None for fds in (tap.fds, tap.vhost_fds))
    return options(
        "tap",
        id=name,
        fd=None if several else taps,
        fds=taps if several else None,
        vhost=bool(tap.vhost_fds),
        vhostfd=None if several else vhosts,
        vhostfds=vhosts if several else None,
    )


def _user(user: UserNet, name: str) -> str:
    text = options(
        "user",
        id=name,
        net=user.network or None,
        restrict=True if user.restrict else None,
        # Naming one family switches the other off.
        ipv4=True,
        ipv6=user.ipv6,
    )
    for forward in user.forwards:
        for port in (forward.port, forward.guest_port):
            if not 0 < port < 65536:
                raise InvalidArgument(f"a port, got {port}", field="nic.backend.forwards")
        if ":" in forward.address:
            raise InvalidArgument(
                f"QEMU forwards IPv4 only, got {forward.address}", field="nic.backend.forwards"
            )
        rule = f"{forward.protocol}:{forward.address}:{forward.port}-:{forward.guest_port}"
        text += "," + options(hostfwd=rule)
    return text


def _stream(socket: Descriptor, name: str) -> str:
    return f"stream,id={name},server=off,addr.type=fd,addr.str={socket.fd}"
