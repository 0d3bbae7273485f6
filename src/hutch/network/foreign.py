"""Live with the packet filters of others, Docker's first of all.

An `accept` in our table ends no other table's chains: a packet must be accepted by every
base chain of the forward hook. iptables' FORWARD chain (tables `ip filter`, `ip6 filter`),
which Docker and others give the policy drop, gets rules for our bridges at its end, so
that all explicit rules of its owner come first. What else drops is only told of.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hutch.linux import nft

__all__ = ["accept_bridges", "dropping_chains", "forget_bridges"]

_FAMILIES = ("ip", "ip6")


def dropping_chains() -> list[tuple[str, str, str]]:
    """Return (family, table, chain) of the base chains that drop what they do not know."""
    found = []
    for item in nft.query("list chains"):
        chain = item.get("chain", {})
        if chain.get("hook") == "forward" and chain.get("policy") == "drop":
            found.append((str(chain["family"]), str(chain["table"]), str(chain["name"])))
    return found


def _is_iptables(chain: tuple[str, str, str]) -> bool:
    return chain[0] in _FAMILIES and chain[1:] == ("filter", "FORWARD")


def _rules(family: str) -> list[tuple[int, str, str]]:
    """Return (handle, key, interface) of each plain interface rule of the chain."""
    found = []
    for item in nft.query(f"list chain {family} filter FORWARD"):
        rule = item.get("rule", {})
        for part in rule.get("expr", ()):
            match: dict[str, Any] = part.get("match", {}) if isinstance(part, dict) else {}
            left = match.get("left", {})
            key = left.get("meta", {}).get("key", "") if isinstance(left, dict) else ""
            if key in ("iifname", "oifname") and isinstance(match.get("right"), str):
                found.append((int(rule["handle"]), str(key), str(match["right"])))
    return found


def accept_bridges(bridges: Collection[str]) -> None:
    """Let iptables' FORWARD chains pass what our own table judges; idempotent."""
    commands = []
    for chain in dropping_chains():
        if not _is_iptables(chain):
            continue
        present = {(key, name) for _, key, name in _rules(chain[0])}
        for name in sorted(bridges):
            for key in ("iifname", "oifname"):
                if (key, name) not in present:
                    commands.append(f'add rule {chain[0]} filter FORWARD {key} "{name}" accept')
    if commands:
        nft.run("\n".join(commands) + "\n")


def forget_bridges(bridges: Collection[str]) -> None:
    """Take the rules for these bridges out again."""
    commands = []
    for family in _FAMILIES:
        try:
            rules = _rules(family)
        except nft.NftError:
            continue
        for handle, _, name in rules:
            if name in bridges:
                commands.append(f"delete rule {family} filter FORWARD handle {handle}")
    if commands:
        nft.run("\n".join(commands) + "\n")
