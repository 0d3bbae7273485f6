"""Give out addresses and subnets, inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from hutch.errors import Busy, Exhausted, InvalidArgument
from hutch.ids import short_id
from hutch.network.addresses import Subnet, format_address, parse_address, parse_subnet
from hutch.network.choices import AddressPool, free_subnet, own_pools
from hutch.network.model import (
    ADDRESSES,
    CURSORS,
    AddressLease,
    Cursor,
    EndpointAddress,
    NetworkRecord,
    SubnetRecord,
)
from hutch.records import Transaction

__all__ = ["allocate", "choose_subnet", "mac_of", "release"]

_PROBES = 16


def _key(network_id: str, address: bytes) -> str:
    return f"{network_id}/{address.hex()}"


def allocate(
    tx: Transaction,
    network: NetworkRecord,
    lease: AddressLease,
    *,
    ipv4: str = "",
    ipv6: str = "",
) -> tuple[EndpointAddress, ...]:
    """Take one address of each family that the network has.

    A requested address that is not free raises `Busy`, one outside the subnets
    `InvalidArgument`, a full subnet `Exhausted`; the transaction then rolls back.
    """
    asked = {32: ipv4, 128: ipv6}
    taken: list[EndpointAddress] = []
    for number, record in enumerate(network.subnets):
        subnet = parse_subnet(record.subnet, field="subnet")
        gateway = parse_address(record.gateway, field="gateway")
        wanted = asked[subnet.bits]
        if wanted:
            address = parse_address(wanted, field=_field(subnet))
            if address not in subnet:
                continue
            _check_usable(subnet, gateway, address)
            _check_unreserved(network, record, address)
        elif any(_bits(done.address) == subnet.bits for done in taken):
            continue
        else:
            address = _next_free(tx, network, number, record, subnet, gateway)
        _take(tx, network, address, lease)
        asked[subnet.bits] = ""
        taken.append(
            EndpointAddress(
                address=format_address(address), prefix=subnet.prefix, gateway=record.gateway
            )
        )
    for bits, wanted in asked.items():
        if wanted:
            field = "ipv4" if bits == 32 else "ipv6"
            held = ", ".join(record.subnet for record in network.subnets) or "none"
            raise InvalidArgument(
                f"{wanted} is not in a subnet of network {network.name} ({held})", field=field
            )
    return tuple(taken)


def _field(subnet: Subnet) -> str:
    return "ipv4" if subnet.bits == 32 else "ipv6"


def _bits(address: str) -> int:
    return 128 if ":" in address else 32


def _check_usable(subnet: Subnet, gateway: bytes, address: bytes) -> None:
    number = int.from_bytes(address, "big")
    edge = number == subnet.base or (subnet.bits == 32 and number == subnet.last)
    if edge or address == gateway:
        what = "the gateway" if address == gateway else "not a host's address"
        text = f"{format_address(address)} is {what} of {subnet}"
        raise InvalidArgument(text, field=_field(subnet))


def _check_unreserved(network: NetworkRecord, record: SubnetRecord, address: bytes) -> None:
    text = format_address(address)
    for name, kept in record.reserved.items():
        if kept == text:
            raise Busy(f"address {text} of network {network.name} is kept free for {name}")


def _take(tx: Transaction, network: NetworkRecord, address: bytes, lease: AddressLease) -> None:
    key = _key(network.id, address)
    holder = tx.get(ADDRESSES, key, AddressLease)
    if holder is not None:
        raise Busy(
            f"address {format_address(address)} of network {network.name} is used by "
            f"instance {short_id(holder.instance_id)}"
        )
    tx.put(ADDRESSES, key, lease)


def _next_free(
    tx: Transaction,
    network: NetworkRecord,
    number: int,
    record: SubnetRecord,
    subnet: Subnet,
    gateway: bytes,
) -> bytes:
    """Return the next free address behind the last one given out, as DHCP servers do: an
    address just freed may still live in somebody's neighbour cache."""
    pool = parse_subnet(record.ip_range, field="ip_range") if record.ip_range else subnet
    cursor_key = f"{network.id}/{number}"
    cursor = tx.get(CURSORS, cursor_key, Cursor)
    start = cursor.next if cursor is not None else 0
    reserved = {parse_address(text, field="reserved") for text in record.reserved.values()}
    used: set[str] | None = None
    for probe, address in enumerate(_candidates(subnet, pool, gateway, start)):
        if probe == _PROBES:
            used = {key for key, _ in tx.items(ADDRESSES, AddressLease, f"{network.id}/")}
        if address in reserved:
            continue
        key = _key(network.id, address)
        if used is not None:
            if key in used:
                continue
        elif tx.get(ADDRESSES, key, AddressLease) is not None:
            continue
        offset = int.from_bytes(address, "big") - pool.base
        tx.put(CURSORS, cursor_key, Cursor(next=offset + 1))
        return address
    raise Exhausted(
        f"network {network.name} has no free address left in {pool}",
        hint="remove instances that no longer need one, or create a network with a larger subnet",
    )


def _candidates(subnet: Subnet, pool: Subnet, gateway: bytes, start: int) -> Iterator[bytes]:
    """Yield the usable addresses of `pool` once each, from offset `start` around."""
    size = min(pool.size, 1 << 32)
    last = None if subnet.bits == 128 else subnet.last
    for step in range(size):
        offset = (start + step) % size
        number = pool.base + offset
        if number == subnet.base or number == last:
            continue
        address = pool.address(offset)
        if address != gateway:
            yield address


def release(tx: Transaction, network_id: str, endpoint_id: str, addresses: Iterable[str]) -> None:
    """Give addresses back; one that belongs to another endpoint by now stays taken."""
    for text in addresses:
        key = _key(network_id, parse_address(text, field="address"))
        lease = tx.get(ADDRESSES, key, AddressLease)
        if lease is not None and lease.endpoint_id == endpoint_id:
            tx.delete(ADDRESSES, key)


def mac_of(addresses: Iterable[EndpointAddress]) -> bytes:
    """Return a locally administered MAC made of the first address's last four bytes: an
    address that moves to another instance keeps its MAC, so no neighbour cache is wrong."""
    for address in addresses:
        return b"\x02\x42" + parse_address(address.address, field="address")[-4:]
    raise InvalidArgument("network without a subnet")


def choose_subnet(
    taken: Iterable[Subnet], *, bits: int = 32, pools: Sequence[AddressPool] = ()
) -> Subnet:
    """Return a private subnet that overlaps none of `taken`.

    It comes from the pools of that family. Without any, IPv4 comes from Docker's own pools and
    then from 10/8; IPv6 is a random /64 of a random /48 of fd00::/8, as RFC 4193 asks.
    """
    busy = list(taken)
    own = [pool for pool in pools if _bits(pool.base) == bits]
    for pool in own:
        if (found := free_subnet(pool, busy)) is not None:
            return found
    if own:
        raise Exhausted(
            "no subnet of the address pools is left that overlaps neither a route nor a network",
            hint="remove unused networks, name a subnet, or give more pools",
        )
    if bits == 128:
        import os

        base = int.from_bytes(b"\xfd" + os.urandom(7) + bytes(8), "big")
        return Subnet(base=base, prefix=64, bits=128)
    for subnet in own_pools():
        if not any(subnet.overlaps(other) for other in busy):
            return subnet
    raise Exhausted(
        "no private IPv4 subnet is left that overlaps neither a route nor a network",
        hint="remove unused networks, or name a subnet",
    )
