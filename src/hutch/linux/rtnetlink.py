"""NETLINK_ROUTE: links, addresses, routes and neighbours.

The builders are pure and return complete messages (with NLM_F_REQUEST | NLM_F_ACK), so
that the same bytes can be sent from the host by `RouteSocket` or from inside a container
by the launch plan's `Netlink` operation. See rtnetlink(7), linux/rtnetlink.h and
linux/if_link.h.
"""

from __future__ import annotations

import _socket
import os
import struct

import msgspec

from hutch.linux.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NetlinkSocket,
    attribute,
    attributes,
    message,
    nested,
)

__all__ = [
    "AddressInfo",
    "LinkInfo",
    "RouteInfo",
    "RouteSocket",
    "add_address",
    "add_bridge",
    "add_ifb",
    "add_neighbour",
    "add_route",
    "add_veth",
    "delete_address",
    "delete_link",
    "delete_route",
    "get_link",
    "set_hairpin",
    "set_link",
]

NETLINK_ROUTE = 0

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_SETLINK = 19
RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22
RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_GETROUTE = 26
RTM_NEWNEIGH = 28

IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_MASTER = 10
IFLA_PROTINFO = 12
IFLA_LINKINFO = 18
IFLA_IFALIAS = 20
IFLA_NET_NS_PID = 19
IFLA_NET_NS_FD = 28
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
VETH_INFO_PEER = 1
IFLA_BRPORT_MODE = 4
IFLA_BRPORT_LEARNING = 8
AF_BRIDGE = 7
IFF_UP = 0x1
IFNAMSIZ = 16

IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_BROADCAST = 4
IFA_F_NODAD = 0x02

RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5
RTA_PRIORITY = 6
RTA_TABLE = 15
RT_TABLE_MAIN = 254
RTPROT_BOOT = 3
RTN_UNICAST = 1
RT_SCOPE_UNIVERSE = 0
RT_SCOPE_LINK = 253

NDA_DST = 1
NDA_LLADDR = 2
NUD_PERMANENT = 0x80

_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_NDMSG = struct.Struct("=BxxxiHBB")


class LinkInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One network interface."""

    index: int
    name: str
    flags: int
    mtu: int
    master: int
    mac: bytes
    kind: str
    alias: str = ""

    @property
    def is_up(self) -> bool:
        """Tell whether the interface is administratively up."""
        return bool(self.flags & IFF_UP)


class AddressInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One address of an interface; `address` is 4 or 16 bytes."""

    index: int
    address: bytes
    prefix: int


class RouteInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One route of the main table; a default route has an empty destination."""

    family: int
    destination: bytes
    prefix: int
    gateway: bytes
    index: int


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def _name(name: str) -> bytes:
    raw = name.encode()
    if not 0 < len(raw) < IFNAMSIZ or b"/" in raw or raw in (b".", b".."):
        raise ValueError(f"not an interface name: {name!r}")
    return attribute(IFLA_IFNAME, raw + b"\0")


def _family(address: bytes) -> int:
    if len(address) == 4:
        return _socket.AF_INET
    if len(address) == 16:
        return _socket.AF_INET6
    raise ValueError(f"not an address: {address!r}")


def add_bridge(
    name: str, *, mtu: int = 0, mac: bytes = b"", index: int = 0, up: bool = True
) -> bytes:
    """Create a bridge; EEXIST where the name is taken, EBUSY where the index is."""
    flags = IFF_UP if up else 0
    body = [_IFINFO.pack(0, 0, index, flags, flags), _name(name)]
    if mtu:
        body.append(_u32(IFLA_MTU, mtu))
    if mac:
        body.append(attribute(IFLA_ADDRESS, mac))
    body.append(nested(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"bridge")))
    return message(RTM_NEWLINK, b"".join(body), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)


def add_ifb(name: str, *, index: int = 0) -> bytes:
    """Create an intermediate functional block, up: a device for nothing but its queue."""
    body = [_IFINFO.pack(0, 0, index, IFF_UP, IFF_UP), _name(name)]
    body.append(nested(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"ifb")))
    return message(RTM_NEWLINK, b"".join(body), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)


def add_veth(
    name: str,
    peer: str,
    *,
    netns_pid: int = 0,
    netns_fd: int = -1,
    master: int = 0,
    mtu: int = 0,
    index: int = 0,
    peer_mac: bytes = b"",
    peer_index: int = 0,
    up: bool = True,
) -> bytes:
    """Create a pair of interfaces whose peer is born in another network namespace.

    One message makes both ends, enslaves the near one to `master` and sets it up; the
    peer cannot be opened before it has its partner (ENOTCONN), so it is set up apart.
    The kernel honours `peer_index` only where `index` is chosen too (veth_newlink).
    """
    flags = IFF_UP if up else 0
    far = [_IFINFO.pack(0, 0, peer_index, 0, 0), _name(peer)]
    if peer_mac:
        far.append(attribute(IFLA_ADDRESS, peer_mac))
    if mtu:
        far.append(_u32(IFLA_MTU, mtu))
    if netns_pid:
        far.append(_u32(IFLA_NET_NS_PID, netns_pid))
    elif netns_fd >= 0:
        far.append(_u32(IFLA_NET_NS_FD, netns_fd))
    near = [_IFINFO.pack(0, 0, index, flags, flags), _name(name)]
    if mtu:
        near.append(_u32(IFLA_MTU, mtu))
    if master:
        near.append(_u32(IFLA_MASTER, master))
    peer_data = nested(IFLA_INFO_DATA, nested(VETH_INFO_PEER, *far))
    near.append(nested(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"veth"), peer_data))
    return message(RTM_NEWLINK, b"".join(near), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)


def set_link(
    index: int,
    *,
    up: bool | None = None,
    name: str = "",
    mtu: int = 0,
    master: int | None = None,
    mac: bytes = b"",
    netns_pid: int = 0,
    alias: str = "",
) -> bytes:
    """Change an interface; what is not given stays as it is (`master=0` releases it).

    `netns_pid` moves it into that process's namespace; `alias` is a note for people.
    """
    flags, change = (0, 0) if up is None else (IFF_UP if up else 0, IFF_UP)
    body = [_IFINFO.pack(0, 0, index, flags, change)]
    if name:
        body.append(_name(name))
    if mtu:
        body.append(_u32(IFLA_MTU, mtu))
    if master is not None:
        body.append(_u32(IFLA_MASTER, master))
    if mac:
        body.append(attribute(IFLA_ADDRESS, mac))
    if netns_pid:
        body.append(_u32(IFLA_NET_NS_PID, netns_pid))
    if alias:
        body.append(attribute(IFLA_IFALIAS, os.fsencode(alias)))
    return message(RTM_NEWLINK, b"".join(body))


def get_link(index: int) -> bytes:
    """Ask for an interface. The kernel first acts on a carrier that has just come up (on
    which it would act a moment later by itself): see linkwatch_sync_dev in rtnl_getlink."""
    return message(RTM_GETLINK, _IFINFO.pack(0, 0, index, 0, 0))


def set_hairpin(index: int) -> bytes:
    """Let a bridge port send a frame back where it came from."""
    mode = attribute(IFLA_BRPORT_MODE, b"\x01")
    body = _IFINFO.pack(AF_BRIDGE, 0, index, 0, 0) + nested(IFLA_PROTINFO, mode)
    return message(RTM_SETLINK, body)


def set_learning(index: int, on: bool) -> bytes:
    """Let a bridge port note which addresses are behind it, or not."""
    learning = attribute(IFLA_BRPORT_LEARNING, b"\x01" if on else b"\x00")
    body = _IFINFO.pack(AF_BRIDGE, 0, index, 0, 0) + nested(IFLA_PROTINFO, learning)
    return message(RTM_SETLINK, body)


def delete_link(index: int) -> bytes:
    """Remove an interface (slow, 10–78 ms: closing its namespace is the fast way)."""
    return message(RTM_DELLINK, _IFINFO.pack(0, 0, index, 0, 0))


def add_address(index: int, address: bytes, prefix: int) -> bytes:
    """Give an interface an address (IPv6 without duplicate detection: usable at once)."""
    family = _family(address)
    flags = IFA_F_NODAD if family == _socket.AF_INET6 else 0
    body = [_IFADDR.pack(family, prefix, flags, RT_SCOPE_UNIVERSE, index)]
    body += [attribute(IFA_LOCAL, address), attribute(IFA_ADDRESS, address)]
    if family == _socket.AF_INET and prefix < 31:
        mask = (1 << (32 - prefix)) - 1
        broadcast = int.from_bytes(address, "big") | mask
        body.append(attribute(IFA_BROADCAST, broadcast.to_bytes(4, "big")))
    return message(RTM_NEWADDR, b"".join(body), NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE)


def delete_address(index: int, address: bytes, prefix: int) -> bytes:
    """Take an address away from an interface."""
    body = _IFADDR.pack(_family(address), prefix, 0, 0, index)
    return message(RTM_DELADDR, body + attribute(IFA_LOCAL, address))


def _route(
    kind: int,
    flags: int,
    destination: bytes,
    prefix: int,
    gateway: bytes,
    index: int,
    metric: int,
) -> bytes:
    family = _family(destination or gateway)
    scope = RT_SCOPE_UNIVERSE if gateway or family == _socket.AF_INET6 else RT_SCOPE_LINK
    head = (family, prefix, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST, 0)
    body = [_RTMSG.pack(*head)]
    if prefix:
        body.append(attribute(RTA_DST, destination))
    if gateway:
        body.append(attribute(RTA_GATEWAY, gateway))
    if index:
        body.append(_u32(RTA_OIF, index))
    if metric:
        body.append(_u32(RTA_PRIORITY, metric))
    return message(kind, b"".join(body), flags)


def add_route(
    *,
    destination: bytes = b"",
    prefix: int = 0,
    gateway: bytes = b"",
    index: int = 0,
    metric: int = 0,
) -> bytes:
    """Add a route; without a destination it is the default route by `gateway`."""
    flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    return _route(RTM_NEWROUTE, flags, destination, prefix, gateway, index, metric)


def delete_route(
    *,
    destination: bytes = b"",
    prefix: int = 0,
    gateway: bytes = b"",
    index: int = 0,
    metric: int = 0,
) -> bytes:
    """Remove the route that `add_route` with the same arguments added."""
    return _route(RTM_DELROUTE, NLM_F_ACK, destination, prefix, gateway, index, metric)


def add_neighbour(index: int, address: bytes, mac: bytes) -> bytes:
    """Pin the link-layer address of a neighbour."""
    body = _NDMSG.pack(_family(address), index, NUD_PERMANENT, 0, 0)
    body += attribute(NDA_DST, address) + attribute(NDA_LLADDR, mac)
    return message(RTM_NEWNEIGH, body, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE)


def _link_info(body: bytes) -> LinkInfo:
    _, _, index, flags, _ = _IFINFO.unpack_from(body)
    found = attributes(body[16:])
    kind = attributes(found.get(IFLA_LINKINFO, b"")).get(IFLA_INFO_KIND, b"")
    return LinkInfo(
        index=index,
        name=found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        flags=flags,
        mtu=int.from_bytes(found.get(IFLA_MTU, b""), "little"),
        master=int.from_bytes(found.get(IFLA_MASTER, b""), "little"),
        mac=found.get(IFLA_ADDRESS, b""),
        kind=kind.rstrip(b"\0").decode(errors="replace"),
        alias=os.fsdecode(found.get(IFLA_IFALIAS, b"").rstrip(b"\0")),
    )


class RouteSocket(NetlinkSocket):
    """A NETLINK_ROUTE socket of the network namespace the calling thread is in."""

    def __init__(self) -> None:
        super().__init__(NETLINK_ROUTE)

    def __enter__(self) -> RouteSocket:
        return self

    def link(self, name: str) -> LinkInfo | None:
        """Return the interface of that name, or None."""
        body = _IFINFO.pack(0, 0, 0, 0, 0) + _name(name)
        try:
            return _link_info(self.ask(message(RTM_GETLINK, body, 0)))
        except OSError as error:
            if error.errno == 19:  # ENODEV
                return None
            raise

    def links(self) -> list[LinkInfo]:
        """Return every interface."""
        return [_link_info(body) for body in self.dump(RTM_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0))]

    def addresses(self) -> list[AddressInfo]:
        """Return every address of every interface."""
        found = []
        for body in self.dump(RTM_GETADDR, _IFADDR.pack(0, 0, 0, 0, 0)):
            _, prefix, _, _, index = _IFADDR.unpack_from(body)
            parts = attributes(body[8:])
            address = parts.get(IFA_LOCAL) or parts.get(IFA_ADDRESS, b"")
            found.append(AddressInfo(index=index, address=address, prefix=prefix))
        return found

    def routes(self) -> list[RouteInfo]:
        """Return the routes of the main table, IPv4 and IPv6."""
        found = []
        for body in self.dump(RTM_GETROUTE, _RTMSG.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)):
            family, prefix, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(body)
            parts = attributes(body[12:])
            table = int.from_bytes(parts.get(RTA_TABLE, bytes([table])), "little")
            if table != RT_TABLE_MAIN or kind != RTN_UNICAST:
                continue
            found.append(
                RouteInfo(
                    family=family,
                    destination=parts.get(RTA_DST, b""),
                    prefix=prefix,
                    gateway=parts.get(RTA_GATEWAY, b""),
                    index=int.from_bytes(parts.get(RTA_OIF, b""), "little"),
                )
            )
        return found
