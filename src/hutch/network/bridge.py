"""Bridges on the host: made when first needed, and the kernel settings they rely on."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from hutch.errors import Busy, Denied, HutchError, Unsupported
from hutch.linux import rtnetlink
from hutch.linux.rtnetlink import LinkInfo, RouteSocket
from hutch.network.addresses import Subnet, parse_address, parse_subnet
from hutch.network.model import NetworkRecord

__all__ = ["create_bridge", "host_subnets", "route_errors", "uplink_mtu", "write_sysctl"]

_PROC_SYS = Path("/proc/sys")
Remember = Callable[[str, str], None]


def host_subnets(route: RouteSocket, *, but: str = "") -> list[tuple[str, Subnet]]:
    """Return the host's routed subnets with the name of the interface they lie behind,
    default routes and those of the interface `but` left out."""
    names = {link.index: link.name for link in route.links()}
    found = []
    for entry in route.routes():
        name = names.get(entry.index, "")
        if entry.prefix == 0 or name == but:
            continue
        base = int.from_bytes(entry.destination, "big")
        bits = len(entry.destination) * 8
        if entry.destination[:2] != b"\xfe\x80":
            found.append((name, Subnet(base=base, prefix=entry.prefix, bits=bits)))
    return found


def uplink_mtu(route: RouteSocket) -> int:
    """Return the MTU of the interface of the default route if it is under 1500, else 0."""
    links = {link.index: link for link in route.links()}
    for entry in route.routes():
        if entry.prefix == 0 and len(entry.gateway) == 4 and entry.index in links:
            mtu = links[entry.index].mtu
            return mtu if mtu < 1500 else 0
    return 0


def create_bridge(
    route: RouteSocket, network: NetworkRecord, remember: Remember, *, note: str = ""
) -> LinkInfo:
    """Make the network's bridge, or complete one that is there; return it, up.

    `note` becomes its alias. `remember(key, value)` is told what a kernel setting was
    before it is changed. Raises `Busy` where the name or a subnet is taken by somebody else
    by now.
    """
    link = route.link(network.bridge)
    if link is not None and link.kind != "bridge":
        raise Busy(f"interface {network.bridge} exists and is a {link.kind or 'device'}")
    if link is None:
        _check_routes(route, network)
        mac = b"\x02\x42" + parse_address(network.subnets[0].gateway, field="gateway")[-4:]
        message = rtnetlink.add_bridge(network.bridge, mtu=network.mtu, mac=mac)
        try:
            route.request(message, ignore=(errno.EEXIST,))
        except OSError as error:
            raise route_errors(error, f"bridge {network.bridge}") from error
        link = route.link(network.bridge)
        if link is None:
            raise Busy(f"bridge {network.bridge} vanished while it was set up")
    messages = [rtnetlink.set_link(link.index, up=True, alias=note)]
    for record in network.subnets:
        subnet = parse_subnet(record.subnet, field="subnet")
        gateway = parse_address(record.gateway, field="gateway")
        messages.append(rtnetlink.add_address(link.index, gateway, subnet.prefix))
    try:
        route.request(*messages, ignore=(errno.EEXIST,))
    except OSError as error:
        raise route_errors(error, f"bridge {network.bridge}") from error
    _configure(network, remember)
    return link


def _check_routes(route: RouteSocket, network: NetworkRecord) -> None:
    subnets = [parse_subnet(record.subnet, field="subnet") for record in network.subnets]
    for name, taken in host_subnets(route, but=network.bridge):
        for subnet in subnets:
            if subnet.overlaps(taken):
                raise Busy(
                    f"network {network.name}: {subnet} overlaps {taken} on interface {name}",
                    hint="remove the network and create it with another subnet",
                )


def _configure(network: NetworkRecord, remember: Remember) -> None:
    """Set what forwarding and publishing on the loopback address need."""
    write_sysctl(f"net/ipv4/conf/{network.bridge}/route_localnet", "1", None)
    if network.internal:
        return
    write_sysctl("net/ipv4/ip_forward", "1", remember)
    if network.ipv6:
        _forward_ipv6(remember)


def _forward_ipv6(remember: Remember) -> None:
    """Turn IPv6 forwarding on without losing routes learnt from router advertisements:
    a forwarding host ignores them unless accept_ra is 2 (ip-sysctl)."""
    key = "net/ipv6/conf/all/forwarding"
    path = _PROC_SYS / key
    if not path.exists() or path.read_text().strip() == "1":
        return
    for setting in (_PROC_SYS / "net/ipv6/conf").glob("*/accept_ra"):
        if setting.read_text().strip() == "1" and setting.parent.name not in ("all", "default"):
            write_sysctl(str(setting.relative_to(_PROC_SYS)), "2", remember)
    write_sysctl(key, "1", remember)


def write_sysctl(key: str, value: str, remember: Remember | None) -> None:
    """Set a kernel setting unless it has the value already; `Unsupported` on a refusal."""
    path = _PROC_SYS / key
    try:
        before = path.read_text().strip()
        if before == value:
            return
        path.write_text(value)
    except OSError as error:
        dotted = key.replace("/", ".")
        raise Unsupported(
            f"{dotted}: cannot be set to {value} ({error.strerror})",
            hint=f"make /proc/sys writable, or set it beforehand: sysctl -w {dotted}={value}",
        ) from error
    if remember is not None:
        remember(key, before)


def route_errors(error: OSError, subject: str) -> HutchError:
    """Return our error for a refusal of the kernel's routing side."""
    text = f"{subject}: {error.strerror}"
    if error.errno in (errno.EPERM, errno.EACCES):
        return Denied(text, hint="bridges need root (CAP_NET_ADMIN)")
    if error.errno == errno.EOPNOTSUPP:
        return Unsupported(text, hint="the kernel lacks the device type (bridge, veth)")
    return Busy(text)
