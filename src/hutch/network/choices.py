"""What is chosen for networks that do not say it themselves: subnets, and the default network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from hutch.errors import InvalidArgument
from hutch.network.addresses import Subnet, parse_subnet

__all__ = ["AddressPool", "NetworkChoices", "check_pools", "free_subnet", "own_pools"]

# The longest prefix of a subnet that is given out: two addresses beside the edges.
_LONGEST = {32: 30, 128: 126}


class AddressPool(msgspec.Struct, frozen=True, kw_only=True):
    """A range that subnets of prefix length `size` are chosen from."""

    base: str
    size: int


class NetworkChoices(msgspec.Struct, frozen=True, kw_only=True):
    """Where subnets are chosen from (none: private ranges as Docker's, then 10/8), and what the
    default network is to have instead of what would be chosen for it; `mtu` 0 is the uplink's."""

    pools: tuple[AddressPool, ...] = ()
    subnets: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    ip_ranges: tuple[str, ...] = ()
    ipv6: bool = False
    mtu: int = 0
    masquerade: bool = True


def check_pools(pools: Sequence[AddressPool], *, field: str) -> None:
    """Raise `InvalidArgument` naming the pool that no subnet can be chosen from."""
    for number, pool in enumerate(pools):
        where = f"{field}[{number}]"
        base = parse_subnet(pool.base, field=f"{where}.base")
        if not base.prefix <= pool.size <= _LONGEST[base.bits]:
            raise InvalidArgument(
                f"expected {base.prefix} to {_LONGEST[base.bits]} for {base}, got {pool.size}",
                field=f"{where}.size",
            )


def own_pools() -> Iterator[Subnet]:
    """Yield the private IPv4 subnets that are chosen from where nothing else is said."""
    for second in range(17, 32):
        yield parse_subnet(f"172.{second}.0.0/16", field="subnet")
    for third in range(0, 256, 16):
        yield parse_subnet(f"192.168.{third}.0/20", field="subnet")
    for second in range(64, 255):
        yield parse_subnet(f"10.{second}.0.0/20", field="subnet")


def free_subnet(pool: AddressPool, busy: Iterable[Subnet]) -> Subnet | None:
    """Return the first subnet of a pool that overlaps none of `busy`."""
    base = parse_subnet(pool.base, field="base")
    taken = [subnet for subnet in busy if subnet.overlaps(base)]
    step = 1 << (base.bits - pool.size)
    number = base.base
    while number <= base.last:
        found = Subnet(base=number, prefix=pool.size, bits=base.bits)
        ends = [subnet.last for subnet in taken if subnet.overlaps(found)]
        if not ends:
            return found
        # Past the whole of what is in the way: a pool may have more subnets than can be tried.
        number = max(number, max(ends) // step * step) + step
    return None
