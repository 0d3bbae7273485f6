"""The nf_tables table of one root: NAT, published ports, isolation between networks.

One table `inet hutch_HASH` per root, so that several roots on a host do not meet. It is
always rebuilt whole from the records, in one transaction; only published ports come and
go as single map elements. `accept` in it ends no other table's chains: a host whose own
forward policy is drop also needs `hutch.network.foreign`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from hutch.errors import Busy, Denied, HutchError, Unsupported
from hutch.linux import nft
from hutch.network.model import NetworkRecord, PortLease, PublishedPort

__all__ = [
    "add_ports",
    "generation",
    "ports_of_others",
    "has_table",
    "is_intact",
    "port_elements",
    "remove_ports",
    "remove_table",
    "replace_table",
    "ruleset",
    "table_name",
    "translate",
]

_SETS = """\
	map ports4 { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
	map ports4_any { type inet_proto . inet_service : ipv4_addr . inet_service; }
	map ports6 { type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service; }
	map ports6_any { type inet_proto . inet_service : ipv6_addr . inet_service; }
	set bridges { type ifname; }
	set internal { type ifname; }
	set within { type ifname . ifname; }
	set outward4 { type ifname . ipv4_addr; flags interval; }
	set outward6 { type ifname . ipv6_addr; flags interval; }
	set resolver4 { type ifname . ipv4_addr; }
	set resolver6 { type ifname . ipv6_addr; }
	set hairpin4 { type ifname . ipv4_addr; flags interval; }
	set hairpin6 { type ifname . ipv6_addr; flags interval; }
"""

# A packet to 127.0.0.0/8 that comes in by a bridge is forged: route_localnet, which
# publishing on the loopback needs, would otherwise let an instance reach the host's
# loopback services (CVE-2020-8558).
_LOOPBACK = """\
	chain loopback {
		type filter hook prerouting priority raw; policy accept;
		iifname @bridges ip daddr 127.0.0.0/8 drop
	}
"""

_DNAT = """\
		fib daddr type local dnat ip to ip daddr . meta l4proto . th dport map @ports4
		fib daddr type local dnat ip to meta l4proto . th dport map @ports4_any
		fib daddr type local dnat ip6 to ip6 daddr . meta l4proto . th dport map @ports6
		fib daddr type local ip6 daddr != ::1 dnat ip6 to meta l4proto . th dport map @ports6_any
"""

# A network's own queries to its name server are never those for a published port 53.
_NAT = f"""\
	chain inbound {{
		type nat hook prerouting priority dstnat; policy accept;
		th dport 53 iifname . ip daddr @resolver4 meta l4proto {{ tcp, udp }} accept
		th dport 53 iifname . ip6 daddr @resolver6 meta l4proto {{ tcp, udp }} accept
{_DNAT}	}}
	chain local {{
		type nat hook output priority -100; policy accept;
{_DNAT}	}}
	chain outbound {{
		type nat hook postrouting priority srcnat; policy accept;
		oifname . ip saddr @hairpin4 ct status dnat masquerade
		oifname . ip6 saddr @hairpin6 ct status dnat masquerade
		oifname @bridges ip saddr 127.0.0.0/8 ct status dnat masquerade
		oifname != @bridges iifname . ip saddr @outward4 masquerade
		oifname != @bridges iifname . ip6 saddr @outward6 masquerade
	}}
"""

_FORWARD = """\
	chain forwarding {
		type filter hook forward priority filter; policy accept;
		iifname . oifname @within accept
		iifname @internal drop
		oifname @internal drop
		iifname @bridges jump from_bridge
		oifname @bridges jump to_bridge
	}
	chain from_bridge {
		ct state established,related accept
		oifname != @bridges accept
		ct status dnat accept
		drop
	}
	chain to_bridge {
		ct state established,related accept
		ct status dnat accept
		drop
	}
"""

# How many rules the text above makes; `is_intact` compares it with what the kernel has.
_RULES = sum(
    1
    for line in (_LOOPBACK + _NAT + _FORWARD).splitlines()
    if line.startswith("\t\t") and not line.lstrip().startswith("type ")
)


def table_name(root: Path) -> str:
    """Return the name of the table of the engine whose state is under `root`."""
    value = 2166136261  # FNV-1a: hashlib and zlib cost more to import than all of this
    for byte in os.fsencode(os.path.realpath(root)):
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return f"hutch_{value:08x}"


def ruleset(table: str, networks: Iterable[NetworkRecord], ports: Iterable[PortLease]) -> str:
    """Return nft commands that put the whole table in place, whatever was there."""
    bridged = [network for network in networks if network.bridge]
    elements: list[str] = []

    def fill(name: str, values: Sequence[str]) -> None:
        if values:
            elements.append(f"add element inet {table} {name} {{ {', '.join(values)} }}")

    fill("bridges", [_quoted(n) for n in bridged])
    fill("internal", [_quoted(n) for n in bridged if n.internal])
    fill("within", [f"{_quoted(n)} . {_quoted(n)}" for n in bridged])
    for family in (4, 6):
        pairs = [
            (network, f"{_quoted(network)} . {record.subnet}")
            for network in bridged
            for record in network.subnets
            if (":" in record.subnet) == (family == 6)
        ]
        resolvers = [
            f"{_quoted(network)} . {record.gateway}"
            for network in bridged
            for record in network.subnets
            if network.dns and (":" in record.subnet) == (family == 6)
        ]
        fill(f"resolver{family}", resolvers)
        masqueraded = [text for n, text in pairs if not n.internal and is_masqueraded(n)]
        fill(f"hairpin{family}", [text for _, text in pairs])
        fill(f"outward{family}", masqueraded)
    by_map: dict[str, list[str]] = {}
    for lease in ports:
        for name, key, value in port_elements(lease):
            by_map.setdefault(name, []).append(f"{key} : {value}")
    for name, values in sorted(by_map.items()):
        fill(name, values)
    body = _SETS + _LOOPBACK + _NAT + _FORWARD
    head = f"table inet {table}\ndelete table inet {table}\ntable inet {table} {{\n{body}}}\n"
    return head + "\n".join(elements) + "\n"


def is_masqueraded(network: NetworkRecord) -> bool:
    """Tell whether the network's traffic leaves under the host's address."""
    return network.options.get("masquerade", "true") != "false"


def _quoted(network: NetworkRecord) -> str:
    return f'"{network.bridge}"'


def port_elements(lease: PortLease) -> list[tuple[str, str, str]]:
    """Return (map, key, value) of each element that a published port needs."""
    found = []
    service = f"{lease.protocol} . {lease.host_port}"
    for target in lease.targets:
        family = 6 if ":" in target else 4
        value = f"{target} . {lease.target_port}"
        if lease.host_ip in ("", "0.0.0.0", "::"):
            if lease.host_ip == ("0.0.0.0" if family == 6 else "::"):
                continue
            found.append((f"ports{family}_any", service, value))
        elif lease.host_ip == "::1":
            continue  # there is no route_localnet for IPv6: hutch.network.proxies relays it
        elif (":" in lease.host_ip) == (family == 6):
            found.append((f"ports{family}", f"{lease.host_ip} . {service}", value))
    return found


# ---- effects --------------------------------------------------------------------------


def is_intact(table: str) -> bool:
    """Tell whether the table still has all its rules (somebody may have flushed them)."""
    return _count(table) == _RULES


def has_table(table: str) -> bool:
    """Tell whether anything of the table is there."""
    return _count(table) > 0


def _count(table: str) -> int:
    try:
        return nft.count_rules(table)
    except OSError as error:
        raise translate(error) from error


def generation() -> int:
    """Return a number that every change of the host's ruleset raises."""
    try:
        return nft.generation()
    except OSError as error:
        raise translate(error) from error


def ports_of_others(table: str) -> list[PublishedPort]:
    """Return the ports that the tables of other roots on this host publish."""
    try:
        items = nft.query("list maps inet")
    except OSError as error:
        raise translate(error) from error
    found = []
    for item in items:
        entry = item.get("map", {})
        owner, name = str(entry.get("table", "")), str(entry.get("name", ""))
        if owner != table and owner.startswith("hutch_") and name.startswith("ports"):
            found += [_port_of(element[0]["concat"]) for element in entry.get("elem", ())]
    return found


def _port_of(key: list[str | int]) -> PublishedPort:
    """Return the port of a map's key: protocol and port, or address, protocol and port."""
    *address, protocol, port = key
    return PublishedPort(
        container_port=0,
        host_port=int(port),
        host_ip=str(address[0]) if address else "",
        protocol=str(protocol),
    )


def replace_table(
    table: str, networks: Iterable[NetworkRecord], ports: Iterable[PortLease]
) -> None:
    """Put the whole table in place, in one transaction of the kernel."""
    _run(ruleset(table, networks, ports))


def remove_table(table: str) -> None:
    """Remove the table; one that is missing is fine."""
    _run(f"table inet {table}\ndelete table inet {table}\n")


def add_ports(table: str, leases: Iterable[PortLease]) -> bool:
    """Add the elements of published ports; False where they contradict what is there, so
    that the table must be replaced."""
    lines = [
        f"add element inet {table} {name} {{ {key} : {value} }}"
        for lease in leases
        for name, key, value in port_elements(lease)
    ]
    return _try("\n".join(lines))


def remove_ports(table: str, leases: Iterable[PortLease]) -> bool:
    """Remove the elements of published ports; False where one was not there."""
    lines = [
        f"delete element inet {table} {name} {{ {key} : {value} }}"
        for lease in leases
        for name, key, value in port_elements(lease)
    ]
    return _try("\n".join(lines))


def _try(commands: str) -> bool:
    if not commands:
        return True
    try:
        nft.run(commands + "\n")
    except nft.NftError as error:
        if error.errno in (2, 17):  # ENOENT, EEXIST
            return False
        raise translate(error) from error
    except FileNotFoundError as error:
        raise translate(error) from error
    return True


def _run(commands: str) -> None:
    try:
        nft.run(commands)
    except OSError as error:
        raise translate(error) from error


def translate(error: OSError) -> HutchError:
    """Return our error for a refusal of nf_tables, with the cure."""
    if isinstance(error, FileNotFoundError) and not isinstance(error, nft.NftError):
        return Unsupported(str(error.strerror), hint="install the package libnftables1")
    if error.errno in (1, 13):
        return Denied(
            f"nf_tables: {error.strerror}",
            hint="networks with NAT need root (CAP_NET_ADMIN); use --network none or run rootless",
        )
    if error.errno == 16:
        return Busy(f"nf_tables: {error.strerror}")
    return Unsupported(
        f"nf_tables: {error.strerror}",
        hint="the kernel needs nf_tables with nat, masq, fib and ct (hutch doctor tells more)",
    )
