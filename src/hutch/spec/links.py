"""Links: another instance, and the name that it has for this one."""

from __future__ import annotations

from typing import NamedTuple

from hutch.errors import InvalidArgument
from hutch.spec.networks import check_hostname
from hutch.spec.parse import strings

__all__ = ["Link", "parse_links", "split_link"]

_MAX_LINKS = 256


class Link(NamedTuple):
    """A link: the name or identifier of an instance, and what it is called."""

    name: str
    alias: str


def parse_links(value: object, field: str = "links") -> tuple[str, ...]:
    """Read `NAME[:ALIAS]` entries; without an alias it is called by its name."""
    found = []
    for index, text in enumerate(strings(value, field)):
        where = f"{field}[{index}]"
        name, colon, alias = text.partition(":")
        name = name.removeprefix("/")
        alias = alias.rpartition("/")[2] if colon else name
        if not name or not alias:
            raise InvalidArgument(f"expected NAME[:ALIAS], got {text[:80]!r}", field=where)
        found.append(f"{name}:{_alias(alias, where)}")
    if len(found) > _MAX_LINKS:
        raise InvalidArgument(f"more than {_MAX_LINKS} links", field=field)
    return tuple(dict.fromkeys(found))


def _alias(alias: str, field: str) -> str:
    check_hostname(alias.replace("_", "-"), field)
    return alias


def split_link(text: str) -> Link:
    """Return a link as `parse_links` writes it."""
    name, _, alias = text.partition(":")
    return Link(name, alias)
