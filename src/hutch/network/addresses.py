"""Addresses and subnets as integers: parsing, printing, containment.

The standard library's ipaddress costs 5 ms to import, half of what a whole container
start may take, so the few operations that a start needs are here.
"""

from __future__ import annotations

import _socket

import msgspec

from hutch.errors import InvalidArgument

__all__ = ["Subnet", "format_address", "format_mac", "parse_address", "parse_mac", "parse_subnet"]


class Subnet(msgspec.Struct, frozen=True, kw_only=True):
    """A range of addresses: the lowest as an integer, the prefix length, 32 or 128 bits."""

    base: int
    prefix: int
    bits: int

    @property
    def size(self) -> int:
        """Return the number of addresses, the unusable ones included."""
        return 1 << (self.bits - self.prefix)

    @property
    def last(self) -> int:
        """Return the highest address (the broadcast address in IPv4)."""
        return self.base + self.size - 1

    def __contains__(self, address: bytes) -> bool:
        if len(address) * 8 != self.bits:
            return False
        return self.base <= int.from_bytes(address, "big") <= self.last

    def overlaps(self, other: Subnet) -> bool:
        """Tell whether the two share an address."""
        return self.bits == other.bits and self.base <= other.last and other.base <= self.last

    def is_within(self, other: Subnet) -> bool:
        """Tell whether all addresses of this one belong to the other."""
        return self.bits == other.bits and other.base <= self.base and self.last <= other.last

    def address(self, offset: int) -> bytes:
        """Return the address `offset` above the lowest."""
        return (self.base + offset).to_bytes(self.bits // 8, "big")

    def __str__(self) -> str:
        return f"{format_address(self.address(0))}/{self.prefix}"


def parse_address(text: str, *, field: str) -> bytes:
    """Return an IPv4 or IPv6 address as 4 or 16 bytes."""
    family = _socket.AF_INET6 if ":" in text else _socket.AF_INET
    try:
        return _socket.inet_pton(family, text)
    except (OSError, ValueError):
        raise InvalidArgument(f"not an IP address: {text!r}", field=field) from None


def format_address(address: bytes) -> str:
    """Return the usual text of an address of 4 or 16 bytes."""
    return _socket.inet_ntop(_socket.AF_INET if len(address) == 4 else _socket.AF_INET6, address)


def parse_subnet(text: str, *, field: str) -> Subnet:
    """Return a subnet from `address/prefix`; the bits behind the prefix must be zero."""
    head, slash, tail = text.partition("/")
    address = parse_address(head, field=field)
    bits = len(address) * 8
    if not slash or not tail.isascii() or not tail.isdigit() or int(tail) > bits:
        raise InvalidArgument(f"expected a subnet such as 172.28.0.0/16, got {text!r}", field=field)
    prefix = int(tail)
    base = int.from_bytes(address, "big")
    if base & ((1 << (bits - prefix)) - 1):
        proper = base >> (bits - prefix) << (bits - prefix)
        raise InvalidArgument(
            f"{text!r} has bits behind its prefix",
            field=field,
            hint=f"write {format_address(proper.to_bytes(bits // 8, 'big'))}/{prefix}",
        )
    return Subnet(base=base, prefix=prefix, bits=bits)


def parse_mac(text: str, *, field: str) -> bytes:
    """Return a unicast MAC address from six hexadecimal pairs."""
    parts = text.replace("-", ":").split(":")
    if len(parts) != 6 or not all(len(p) == 2 and _is_hex(p) for p in parts):
        raise InvalidArgument(f"not a MAC address: {text!r}", field=field)
    mac = bytes(int(part, 16) for part in parts)
    if mac[0] & 1 or not any(mac):
        raise InvalidArgument(f"not a unicast MAC address: {text!r}", field=field)
    return mac


def _is_hex(text: str) -> bool:
    return all(char in "0123456789abcdefABCDEF" for char in text)


def format_mac(mac: bytes) -> str:
    """Return a MAC address as six pairs with colons."""
    return mac.hex(":")
