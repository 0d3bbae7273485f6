"""Published ports: conflicts, free ports, and the check that nobody on the host listens."""

from __future__ import annotations

import _socket
import errno
import os
from collections.abc import Callable, Sequence

import msgspec

from hutch.errors import Busy, Denied, Exhausted, HutchError, InvalidArgument, Unsupported
from hutch.ids import short_id
from hutch.network.addresses import parse_address
from hutch.network.model import PORTS, Endpoint, PortLease, PublishedPort
from hutch.network.proxies import bindings
from hutch.records import Transaction
from hutch.spec.model import PortMapping

__all__ = ["candidates", "check_port_free", "choose_port", "move_port", "port_key", "reserve_ports"]

_EPHEMERAL = range(32768, 61000)
_TYPES = {"tcp": _socket.SOCK_STREAM, "udp": _socket.SOCK_DGRAM}
_EVERY = ("", "0.0.0.0", "::")


def port_key(port: PublishedPort) -> str:
    """Return the key under which a port of the host is kept."""
    return f"{port.protocol}/{port.host_port}/{port.host_ip}"


def reserve_ports(
    tx: Transaction,
    endpoint: Endpoint,
    ports: Sequence[PortMapping],
    elsewhere: Sequence[PublishedPort] = (),
) -> tuple[PublishedPort, ...]:
    """Take the ports of the host that `ports` ask for, choosing where the port is 0.

    `elsewhere` are the ports that other roots on this host publish. Raises
    `Busy` naming the holder, be it an instance or somebody else on the host.
    """
    taken = []
    for number, mapping in enumerate(ports):
        field = f"ports[{number}]"
        _check(mapping, endpoint, field)
        port = PublishedPort(
            container_port=mapping.container_port,
            host_port=mapping.host_port,
            host_ip=mapping.host_ip,
            protocol=mapping.protocol,
        )
        port = (
            _fixed(tx, port, elsewhere, field)
            if mapping.host_port and not mapping.host_port_end
            else _chosen(tx, port, elsewhere, candidates(mapping))
        )
        lease = PortLease(
            instance_id=endpoint.instance_id,
            endpoint_id=endpoint.id,
            protocol=port.protocol,
            host_ip=port.host_ip,
            host_port=port.host_port,
            targets=tuple(address.address for address in endpoint.addresses),
            target_port=port.container_port,
        )
        tx.put(PORTS, port_key(port), lease)
        taken.append(port)
    return tuple(taken)


def move_port(tx: Transaction, lease: PortLease, endpoint: Endpoint) -> PublishedPort:
    """Let a port that was just given back lead to another endpoint of the same instance."""
    port = PublishedPort(
        container_port=lease.target_port,
        host_port=lease.host_port,
        host_ip=lease.host_ip,
        protocol=lease.protocol,
    )
    targets = tuple(address.address for address in endpoint.addresses)
    moved = msgspec.structs.replace(lease, endpoint_id=endpoint.id, targets=targets)
    tx.put(PORTS, port_key(port), moved)
    return port


def _check(mapping: PortMapping, endpoint: Endpoint, field: str) -> None:
    if mapping.protocol not in _TYPES:
        raise Unsupported(
            f"{field}.protocol: {mapping.protocol!r} cannot be published",
            hint="tcp and udp can; others need --network host",
        )
    for name, value, lowest in (
        ("container_port", mapping.container_port, 1),
        ("host_port", mapping.host_port, 0),
    ):
        if not lowest <= value <= 65535:
            raise InvalidArgument(f"out of range: {value}", field=f"{field}.{name}")
    if mapping.host_ip:
        parse_address(mapping.host_ip, field=f"{field}.host_ip")


def _overlaps(one: str, other: str) -> bool:
    """Tell whether two host addresses of published ports can meet."""
    if one == other or one == "" or other == "":
        return True
    return (":" in one) == (":" in other) and (one in _EVERY or other in _EVERY)


def _conflict(tx: Transaction, port: PublishedPort) -> PortLease | None:
    for _, lease in tx.items(PORTS, PortLease, f"{port.protocol}/{port.host_port}/"):
        if _overlaps(lease.host_ip, port.host_ip):
            return lease
    return None


def _is_elsewhere(port: PublishedPort, elsewhere: Sequence[PublishedPort]) -> bool:
    return any(
        other.protocol == port.protocol
        and other.host_port == port.host_port
        and _overlaps(other.host_ip, port.host_ip)
        for other in elsewhere
    )


def _fixed(
    tx: Transaction, port: PublishedPort, elsewhere: Sequence[PublishedPort], field: str
) -> PublishedPort:
    holder = _conflict(tx, port)
    if holder is not None:
        raise Busy(
            f"{field}: {_shown(port)} is already published by instance "
            f"{short_id(holder.instance_id)}"
        )
    if _is_elsewhere(port, elsewhere):
        raise Busy(f"{field}: {_shown(port)} is already published from another root of hutch")
    check_port_free(port, field=field)
    return port


def _chosen(
    tx: Transaction, port: PublishedPort, elsewhere: Sequence[PublishedPort], among: Sequence[int]
) -> PublishedPort:
    return choose_port(
        port,
        among,
        lambda candidate: (
            _conflict(tx, candidate) is not None or _is_elsewhere(candidate, elsewhere)
        ),
    )


def candidates(mapping: PortMapping) -> Sequence[int]:
    """Return the ports of the host among which one may be chosen, in order of preference:
    those that were asked for, else the ephemeral ones from a random one upwards."""
    if mapping.host_port:
        return range(mapping.host_port, mapping.host_port_end + 1)
    start = int.from_bytes(os.urandom(2), "little") % len(_EPHEMERAL)
    return [*_EPHEMERAL[start:], *_EPHEMERAL[:start]]


def choose_port(
    port: PublishedPort,
    among: Sequence[int],
    is_taken: Callable[[PublishedPort], bool] = lambda _: False,
) -> PublishedPort:
    """Return the port with the first host port of these that is free."""
    for number in among:
        candidate = PublishedPort(
            container_port=port.container_port,
            host_port=number,
            host_ip=port.host_ip,
            protocol=port.protocol,
        )
        if is_taken(candidate):
            continue
        try:
            check_port_free(candidate, field="ports")
        except Busy:
            continue
        return candidate
    raise Exhausted(f"no {port.protocol} port from {min(among)} to {max(among)} is free")


def check_port_free(port: PublishedPort, *, field: str) -> None:
    """Raise `Busy` where a process of the host holds the port.

    It is held from the moment the instance is attached; see `hutch.network.proxies`.
    """
    for address in bindings(port) or ("0.0.0.0",):
        _try_bind(address, port, field)


def _try_bind(address: str, port: PublishedPort, field: str) -> None:
    family = _socket.AF_INET6 if ":" in address else _socket.AF_INET
    probe = _socket.socket(family, _TYPES[port.protocol] | _socket.SOCK_CLOEXEC)
    try:
        if port.protocol == "tcp":  # connections in TIME_WAIT do not matter
            probe.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        if family == _socket.AF_INET6:
            probe.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)
        probe.bind((address, port.host_port))
    except OSError as error:
        raise _refused(error, port, field) from error
    finally:
        probe.close()


def _refused(error: OSError, port: PublishedPort, field: str) -> HutchError:
    if error.errno == errno.EADDRINUSE:
        return Busy(
            f"{field}: {_shown(port)} is in use by a process of this host",
            hint=f"ss -lnp 'sport = {port.host_port}' shows which",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return InvalidArgument(
            f"{port.host_ip} is not an address of this host", field=f"{field}.host_ip"
        )
    if error.errno == errno.EACCES:
        return Denied(
            f"{field}: {_shown(port)} cannot be bound: {error.strerror}",
            hint="ports under net.ipv4.ip_unprivileged_port_start (1024) need root",
        )
    return Busy(f"{field}: {_shown(port)} cannot be bound: {error.strerror}")


def _shown(port: PublishedPort) -> str:
    address = f"[{port.host_ip}]" if ":" in port.host_ip else port.host_ip or "*"
    return f"{address}:{port.host_port}/{port.protocol}"
