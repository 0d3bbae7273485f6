"""Decide an instance's endpoints: names of interfaces, addresses, ports, default route.

Everything is decided in one transaction before the instance starts; what is left for the
moment of the start are the netlink messages, which `container_messages` builds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from hutch.errors import InvalidArgument, NotFound
from hutch.ids import new_id, short_id
from hutch.linux import rtnetlink
from hutch.network import ipam
from hutch.network.addresses import format_address, format_mac, parse_address, parse_mac
from hutch.network.model import (
    ENDPOINTS,
    PORTS,
    AddressLease,
    Endpoint,
    NetworkRecord,
    PortLease,
    PublishedPort,
)
from hutch.network.ports import move_port, port_key, reserve_ports
from hutch.records import Transaction
from hutch.spec.model import NetworkAttachment, PortMapping

__all__ = [
    "container_messages",
    "create_endpoint",
    "endpoints_of",
    "members_of",
    "promote",
    "release_endpoint",
    "route_messages",
]

_FIRST_IFINDEX = 64


def endpoint_key(instance_id: str, network_id: str) -> str:
    """Return the key under which an endpoint is kept."""
    return f"{instance_id}/{network_id}"


def endpoints_of(tx: Transaction, instance_id: str) -> list[Endpoint]:
    """Return an instance's endpoints in the order of their interfaces."""
    found = [e for _, e in tx.items(ENDPOINTS, Endpoint, f"{instance_id}/")]
    return sorted(found, key=lambda endpoint: endpoint.ifindex)


def members_of(tx: Transaction, network_id: str) -> list[Endpoint]:
    """Return the endpoints of a network."""
    return [e for _, e in tx.items(ENDPOINTS, Endpoint) if e.network_id == network_id]


def create_endpoint(
    tx: Transaction,
    network: NetworkRecord,
    attachment: NetworkAttachment,
    *,
    instance_id: str,
    name: str,
    hostname: str,
    number: int,
    default_route: bool,
    ports: Sequence[PortMapping] = (),
    elsewhere: Sequence[PublishedPort] = (),
    dns: Sequence[str] = (),
) -> Endpoint:
    """Take an address (and ports) and store the endpoint; the transaction is the caller's.

    `number` counts the instance's interfaces from 0; `elsewhere` are the ports that other
    roots on this host publish.
    """
    endpoint_id = new_id()
    lease = AddressLease(instance_id=instance_id, endpoint_id=endpoint_id)
    addresses = ipam.allocate(tx, network, lease, ipv4=attachment.ipv4, ipv6=attachment.ipv6)
    mac = parse_mac(attachment.mac, field="mac") if attachment.mac else ipam.mac_of(addresses)
    endpoint = Endpoint(
        id=endpoint_id,
        network=network.name,
        network_id=network.id,
        instance_id=instance_id,
        bridge=network.bridge,
        interface=f"eth{number}",
        ifindex=_FIRST_IFINDEX + number,
        host_interface=f"hv{os.urandom(6).hex()}",
        mac=format_mac(mac),
        addresses=addresses,
        aliases=attachment.aliases,
        names=_names(name, attachment.aliases, instance_id, hostname),
        upstreams=_upstreams(dns),
        default_route=default_route,
        internal=network.internal,
        dns=network.dns,
        mtu=network.mtu,
        rx_rate=attachment.rx_rate,
        tx_rate=attachment.tx_rate,
    )
    if ports:
        if network.internal:
            raise InvalidArgument(
                f"network {network.name} is internal: nothing can be published from it",
                field="ports",
            )
        endpoint = msgspec.structs.replace(
            endpoint, ports=reserve_ports(tx, endpoint, _bound(network, ports), elsewhere)
        )
    tx.put(ENDPOINTS, endpoint_key(instance_id, network.id), endpoint)
    return endpoint


def _bound(network: NetworkRecord, ports: Sequence[PortMapping]) -> Sequence[PortMapping]:
    """Return the ports, with the network's own address of the host where they name none."""
    host_ip = network.options.get("host_ip", "")
    if host_ip in ("", "0.0.0.0"):
        return ports
    return [
        port if port.host_ip else msgspec.structs.replace(port, host_ip=host_ip) for port in ports
    ]


def _upstreams(dns: Sequence[str]) -> tuple[str, ...]:
    parsed = (parse_address(text, field=f"dns[{number}]") for number, text in enumerate(dns))
    return tuple(format_address(address) for address in parsed)


def _names(name: str, aliases: Sequence[str], instance_id: str, hostname: str) -> tuple[str, ...]:
    """Return the names that resolve to the endpoint, each once, lower case.

    An alias that cannot be a name in the DNS is refused; a name or host name that cannot
    just does not resolve.
    """
    for number, alias in enumerate(aliases):
        if not _is_dns_name(alias):
            raise InvalidArgument(f"not a host name: {alias!r}", field=f"aliases[{number}]")
    wanted = (name, *aliases, hostname, short_id(instance_id))
    usable = (text.lower().rstrip(".") for text in wanted if _is_dns_name(text))
    return tuple(dict.fromkeys(usable))


def _is_dns_name(text: str) -> bool:
    labels = text.rstrip(".").split(".")
    is_plain = text.isascii() and text.isprintable() and " " not in text
    return is_plain and len(text) <= 253 and all(0 < len(label) <= 63 for label in labels)


def release_endpoint(tx: Transaction, endpoint: Endpoint) -> list[PortLease]:
    """Forget an endpoint and give back what it held; return the ports that it held."""
    key = endpoint_key(endpoint.instance_id, endpoint.network_id)
    stored = tx.get(ENDPOINTS, key, Endpoint)
    if stored is None or stored.id != endpoint.id:
        return []
    tx.delete(ENDPOINTS, key)
    ipam.release(tx, endpoint.network_id, endpoint.id, [a.address for a in endpoint.addresses])
    freed = []
    for port in stored.ports:
        key = port_key(port)
        lease = tx.get(PORTS, key, PortLease)
        if lease is not None and lease.endpoint_id == endpoint.id:
            tx.delete(PORTS, key)
            freed.append(lease)
    return freed


def find_endpoint(tx: Transaction, instance_id: str, network: NetworkRecord) -> Endpoint:
    """Return the instance's endpoint in a network; `NotFound` where it has none."""
    endpoint = tx.get(ENDPOINTS, endpoint_key(instance_id, network.id), Endpoint)
    if endpoint is None:
        raise NotFound(
            f"instance {short_id(instance_id)} is not connected to network {network.name}"
        )
    return endpoint


def container_messages(endpoint: Endpoint) -> tuple[bytes, ...]:
    """Return the netlink messages that configure the interface from inside: addresses,
    up, and the default route where this endpoint gives it."""
    messages = [
        rtnetlink.add_address(endpoint.ifindex, parse_address(a.address, field="address"), a.prefix)
        for a in endpoint.addresses
    ]
    messages.append(rtnetlink.set_link(endpoint.ifindex, up=True))
    if endpoint.default_route:
        messages.extend(route_messages(endpoint))
    return tuple(messages)


def route_messages(endpoint: Endpoint) -> tuple[bytes, ...]:
    """Return the messages that make the endpoint's gateways the default routes."""
    seen: set[int] = set()
    messages = []
    for entry in endpoint.addresses:
        gateway = parse_address(entry.gateway, field="gateway")
        if len(gateway) not in seen:
            seen.add(len(gateway))
            messages.append(rtnetlink.add_route(gateway=gateway, index=endpoint.ifindex))
    return tuple(messages)


def promote(tx: Transaction, instance_id: str, ports: Sequence[PortLease] = ()) -> Endpoint | None:
    """Let the instance's next endpoint that leads outside give the default route, and let
    these ports, which another one has given back, lead to it."""
    for endpoint in endpoints_of(tx, instance_id):
        if not endpoint.internal:
            published = tuple(move_port(tx, lease, endpoint) for lease in ports)
            successor = msgspec.structs.replace(endpoint, default_route=True, ports=published)
            tx.put(ENDPOINTS, endpoint_key(instance_id, endpoint.network_id), successor)
            return successor
    return None


def set_rates(tx: Transaction, endpoint: Endpoint, rx_rate: int, tx_rate: int) -> Endpoint:
    """Let an endpoint receive and send so many bits per second; return it."""
    changed = msgspec.structs.replace(endpoint, rx_rate=rx_rate, tx_rate=tx_rate)
    tx.put(ENDPOINTS, endpoint_key(endpoint.instance_id, endpoint.network_id), changed)
    return changed


def rename(tx: Transaction, endpoint: Endpoint, old: str, new: str) -> None:
    """Replace one of an endpoint's names."""
    kept = [name for name in endpoint.names if name != old.lower()]
    names = tuple(dict.fromkeys((new.lower(), *kept) if _is_dns_name(new) else kept))
    key = endpoint_key(endpoint.instance_id, endpoint.network_id)
    tx.put(ENDPOINTS, key, msgspec.structs.replace(endpoint, names=names))
