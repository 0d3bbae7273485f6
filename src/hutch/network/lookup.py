"""Find a network by what a user calls it."""

from __future__ import annotations

from hutch.errors import InvalidArgument, NotFound
from hutch.network.model import NETWORKS, NetworkRecord
from hutch.records import Transaction

__all__ = ["find", "named"]


def find(tx: Transaction, reference: str) -> NetworkRecord:
    """Return the network of that name, id or unambiguous id prefix."""
    by_name = tx.get(NETWORKS, reference, NetworkRecord)
    if by_name is not None:
        return by_name
    found = []
    if reference:
        found = [n for _, n in tx.items(NETWORKS, NetworkRecord) if n.id.startswith(reference)]
    if len(found) > 1:
        raise InvalidArgument(f"network id prefix {reference!r} fits {len(found)} networks")
    if not found:
        raise NotFound(f"no network {reference!r}", hint="hutch network ls shows those there are")
    return found[0]


def named(tx: Transaction, name: str) -> NetworkRecord:
    """Return the network of exactly that name, as an instance remembers it."""
    network = tx.get(NETWORKS, name, NetworkRecord)
    if network is None:
        raise NotFound(
            f"no network {name!r} any more",
            hint=f"hutch network create {name}, or disconnect the instance from it",
        )
    return network
