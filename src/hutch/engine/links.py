"""Links, as Docker has them: names of this instance's own for others, in its /etc/hosts, and on
the default network what they expose, in its environment.

Whoever is linked to keeps, in a file of its directory, who has to be told of its new address.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from hutch.engine.context import Context
from hutch.engine.finish import refresh_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import find_id, load, load_in
from hutch.engine.records import INSTANCES, InstanceRecord
from hutch.errors import InvalidArgument, NotFound, WrongState
from hutch.lifecycle import State
from hutch.spec.links import Link, parse_links, split_link

if TYPE_CHECKING:
    from hutch.network import Endpoint
    from hutch.spec.model import InstanceSpec

__all__ = ["add_links", "link_environment", "link_hosts", "linked_from", "note_links"]
__all__ += ["read_links", "remove_link", "require_links", "resolve_links", "with_links"]

_DEFAULT = "bridge"
_FILE = "linked"
_MAX_FILE = 1 << 20
_LIVE = (State.RUNNING, State.PAUSED)
_NOT_PASSED = ("PATH", "HOME", "HOSTNAME")


def resolve_links(context: Context, spec: InstanceSpec) -> InstanceSpec:
    """Put identifiers for the names in the links of a new instance; raise `InvalidArgument`
    for one that is not there, or that shares no network."""
    found = []
    for index, text in enumerate(spec.links):
        field = f"links[{index}]"
        link = split_link(text)
        try:
            other = load(context, find_id(context, link.name))
        except NotFound:
            raise InvalidArgument(f"no such instance: {link.name}", field=field) from None
        if spec.network_mode == _DEFAULT and _DEFAULT not in _networks(other.spec):
            raise InvalidArgument(
                f"{link.name} does not belong to the default network",
                field=field,
                hint="put both in a network of your own: there, names are resolved",
            )
        found.append(f"{other.id}:{link.alias}")
    return msgspec.structs.replace(spec, links=tuple(found))


def _networks(spec: InstanceSpec) -> set[str]:
    return {attachment.name for attachment in spec.networks} or {spec.network_mode}


def require_links(context: Context, record: InstanceRecord) -> None:
    """Raise `WrongState` where what is linked to on the default network does not run."""
    if record.spec.network_mode != _DEFAULT:
        return
    for link, other in _linked(context, record):
        if other is None or other.state not in _LIVE:
            name = other.name if other is not None else link.name[:12]
            raise WrongState(
                f"cannot link to {name} as {link.alias}: it is not running", hint="start it first"
            )


def _linked(
    context: Context, record: InstanceRecord
) -> Iterator[tuple[Link, InstanceRecord | None]]:
    for text in record.spec.links:
        link = split_link(text)
        try:
            yield link, load(context, link.name)
        except NotFound:
            yield link, None


def note_links(context: Context, record: InstanceRecord) -> None:
    """Have those that an instance links to know of it."""
    for _, other in _linked(context, record):
        if other is None or record.id in linked_from(context, other.id):
            continue
        try:
            with open(context.directory(other.id) / _FILE, "a", encoding="ascii") as file:
                file.write(f"{record.id}\n")
        except FileNotFoundError:
            continue  # it was removed this moment


def read_links(
    context: Context, spec: InstanceSpec, network: str, given: Sequence[str]
) -> tuple[str, ...]:
    """Return further links of an instance that joins a network, with identifiers for names.
    Raises as `resolve_links`."""
    asked = msgspec.structs.replace(spec, links=parse_links(list(given)), network_mode=network)
    return resolve_links(context, asked).links


def add_links(context: Context, record: InstanceRecord, links: Sequence[str]) -> None:
    """Give an instance further links, under its lock; one that has the same alias goes."""
    aliases = {split_link(text).alias for text in links}
    kept = [text for text in record.spec.links if split_link(text).alias not in aliases]
    note_links(context, _store_links(context, record, (*kept, *links)))


def remove_link(context: Context, identifier: str, alias: str) -> None:
    """Take from an instance the name that it has for another; its programs have what they were
    started with. Raises `NotFound`."""
    from hutch.engine.etc import rewrite_files

    with instance_lock(context, identifier):
        record = refresh_locked(context, load(context, identifier))
        left = tuple(text for text in record.spec.links if split_link(text).alias != alias)
        if len(left) == len(record.spec.links):
            raise NotFound(f"instance {record.name} has no link {alias}")
        rewrite_files(context, _store_links(context, record, left))


def _store_links(
    context: Context, record: InstanceRecord, links: tuple[str, ...]
) -> InstanceRecord:
    with context.store.write(durable=True) as tx:
        present = load_in(tx, record.id)
        spec = msgspec.structs.replace(present.spec, links=links)
        changed = msgspec.structs.replace(present, spec=spec)
        tx.put(INSTANCES, record.id, changed)
    return changed


def linked_from(context: Context, identifier: str) -> list[str]:
    """Return the identifiers of those that link to an instance; some may be gone."""
    try:
        with open(context.directory(identifier) / _FILE, encoding="ascii") as file:
            return list(dict.fromkeys(file.read(_MAX_FILE).split()))
    except FileNotFoundError:
        return []


# ---- what they are told ----------------------------------------------------------------------


def link_hosts(
    context: Context, record: InstanceRecord, endpoints: Sequence[Endpoint]
) -> list[tuple[str, str]]:
    """Return address and names of each that is linked to and shares a network."""
    found = []
    for link, other in _linked(context, record):
        if other is None or other.state not in _LIVE:
            continue
        names = dict.fromkeys((link.alias, other.spec.hostname, other.name))
        text = " ".join(name for name in names if name)
        found += [(address, text) for address in _addresses(context, other, endpoints)]
    return found


def _addresses(context: Context, other: InstanceRecord, endpoints: Sequence[Endpoint]) -> list[str]:
    shared = {endpoint.network for endpoint in endpoints}
    return [
        entry.address
        for endpoint in context.networks.endpoints(other.id)
        if endpoint.network in shared
        for entry in endpoint.addresses
    ]


def link_environment(context: Context, record: InstanceRecord) -> tuple[str, ...]:
    """Return what the environment tells of those linked to on the default network: the names
    are Docker's."""
    if record.spec.network_mode != _DEFAULT or not record.spec.links:
        return ()
    endpoints = [e for e in context.networks.endpoints(record.id) if e.network == _DEFAULT]
    found: list[str] = []
    for link, other in _linked(context, record):
        if other is None or other.state not in _LIVE:
            continue
        address = next(iter(_addresses(context, other, endpoints)), "")
        prefix = link.alias.replace("-", "_").replace(".", "_").upper()
        if address:
            found += _ports(prefix, address, other.spec)
        found.append(f"{prefix}_NAME=/{record.name}/{link.alias}")
        for entry in other.spec.process.env:
            name, _, value = entry.partition("=")
            if name not in _NOT_PASSED:
                found.append(f"{prefix}_ENV_{name}={value}")
    return tuple(found)


def _ports(prefix: str, address: str, spec: InstanceSpec) -> Iterator[str]:
    published = (f"{port.container_port}/{port.protocol}" for port in spec.ports)
    exposed = {tuple(text.split("/", 1)) for text in (*spec.exposed, *published)}
    ports = sorted((protocol != "tcp", int(port), protocol) for port, protocol in exposed)
    for place, (_, port, protocol) in enumerate(ports):
        url = f"{protocol}://{address}:{port}"
        if not place:
            yield f"{prefix}_PORT={url}"
        name = f"{prefix}_PORT_{port}_{protocol.upper()}"
        yield f"{name}={url}"
        yield f"{name}_ADDR={address}"
        yield f"{name}_PORT={port}"
        yield f"{name}_PROTO={protocol}"


def with_links(context: Context, record: InstanceRecord) -> InstanceSpec:
    """Return the specification with what links add to the environment of its programs; what
    was given goes before."""
    spec = record.spec
    added = link_environment(context, record)
    if not added:
        return spec
    given = {entry.partition("=")[0] for entry in spec.process.env}
    env = tuple(entry for entry in added if entry.partition("=")[0] not in given)
    process = msgspec.structs.replace(spec.process, env=(*env, *spec.process.env))
    return msgspec.structs.replace(spec, process=process)
