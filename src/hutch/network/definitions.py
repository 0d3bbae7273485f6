"""Define networks: validate what is asked, choose what is not, keep it in the records."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from hutch.errors import AlreadyExists, InvalidArgument, Unsupported
from hutch.ids import new_id, short_id
from hutch.network import ipam
from hutch.network.addresses import Subnet, format_address, parse_address, parse_subnet
from hutch.network.choices import AddressPool, NetworkChoices
from hutch.network.model import (
    BUILTIN_NETWORKS,
    CURSORS,
    DEFAULT_NETWORK,
    NETWORKS,
    Cursor,
    NetworkRecord,
    SubnetRecord,
)
from hutch.records import Transaction

__all__ = ["NetworkRequest", "choose_again", "define", "define_builtin", "fits", "matches"]

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
_INTERFACE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,14}")
_OPTIONS = {
    "mtu": "mtu",
    "bridge": "bridge",
    "masquerade": "masquerade",
    "host_ip": "host_ip",
    "com.docker.network.driver.mtu": "mtu",
    "com.docker.network.bridge.name": "bridge",
    "com.docker.network.bridge.enable_ip_masquerade": "masquerade",
    "com.docker.network.bridge.host_binding_ipv4": "host_ip",
}
_NO_CHOICES = NetworkChoices()
_LONGEST_PREFIX = {32: 30, 128: 126}


class NetworkRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks of a new network. `gateways`, `ip_ranges` and the addresses that are
    `reserved` go with the subnet that contains them; options are `mtu`, `bridge`, `masquerade`,
    `host_ip` or Docker's names."""

    name: str
    driver: str = "bridge"
    subnets: Sequence[str] = ()
    gateways: Sequence[str] = ()
    ip_ranges: Sequence[str] = ()
    reserved: Mapping[str, str] = {}
    internal: bool = False
    ipv6: bool = False
    attachable: bool = False
    labels: Mapping[str, str] = {}
    options: Mapping[str, str] = {}
    dns: bool = True


def define(
    tx: Transaction,
    request: NetworkRequest,
    host: Iterable[tuple[str, Subnet]],
    pools: Sequence[AddressPool] = (),
) -> NetworkRecord:
    """Validate a request and store the network; `host` are the host's own subnets."""
    if not _NAME.fullmatch(request.name):
        raise InvalidArgument(
            f"not a network name: {request.name!r}",
            field="name",
            hint="letters, digits, '_', '.' and '-', at most 128, a letter or digit first",
        )
    if request.name in BUILTIN_NETWORKS or tx.get(NETWORKS, request.name, NetworkRecord):
        raise AlreadyExists(f"network {request.name} exists already")
    if request.driver != "bridge":
        raise Unsupported(f"driver: {request.driver!r} is not known", hint="use the driver bridge")
    network_id = new_id()
    options = _read_options(request.options)
    subnets = _subnets(tx, request, list(host), pools)
    network = NetworkRecord(
        id=network_id,
        name=request.name,
        driver="bridge",
        created_ns=time.time_ns(),
        bridge=_bridge_name(tx, options, network_id),
        subnets=subnets,
        internal=request.internal,
        ipv6=any(":" in record.subnet for record in subnets),
        mtu=_mtu(options),
        dns=request.dns,
        attachable=request.attachable,
        labels=dict(request.labels),
        options=options,
    )
    tx.insert(NETWORKS, network.name, network)
    return network


def define_builtin(
    tx: Transaction,
    host: Iterable[tuple[str, Subnet]],
    mtu: int,
    *,
    choices: NetworkChoices = _NO_CHOICES,
    identity: NetworkRecord | None = None,
) -> NetworkRecord:
    """Store the networks `bridge`, `host` and `none`; return the first.

    With `identity` the default network keeps that one's identifier and bridge name. Raises
    `InvalidArgument` where `choices` ask for what is taken or cannot be.
    """
    existing = tx.get(NETWORKS, DEFAULT_NETWORK, NetworkRecord)
    if existing is not None:
        return existing
    now = time.time_ns()
    for name, driver in (("host", "host"), ("none", "null")) if identity is None else ():
        record = NetworkRecord(id=new_id(), name=name, driver=driver, created_ns=now)
        tx.put(NETWORKS, name, record)
    network_id = new_id() if identity is None else identity.id
    request = NetworkRequest(
        name=DEFAULT_NETWORK,
        subnets=choices.subnets,
        gateways=choices.gateways,
        ip_ranges=choices.ip_ranges,
        ipv6=choices.ipv6,
    )
    subnets = _subnets(tx, request, list(host), choices.pools)
    network = NetworkRecord(
        id=network_id,
        name=DEFAULT_NETWORK,
        driver="bridge",
        created_ns=now,
        bridge=_bridge_name(tx, {}, network_id) if identity is None else identity.bridge,
        subnets=subnets,
        ipv6=any(":" in record.subnet for record in subnets),
        mtu=choices.mtu or mtu,
        options={} if choices.masquerade else {"masquerade": "false"},
    )
    tx.insert(NETWORKS, network.name, network)
    return network


def choose_again(
    tx: Transaction,
    network: NetworkRecord,
    host: Iterable[tuple[str, Subnet]],
    pools: Sequence[AddressPool] = (),
) -> NetworkRecord:
    """Return a network that nobody is in yet with other subnets in the place of chosen ones
    that the host has had a route to since, and store it; those asked for stay."""
    taken = [subnet for _, subnet in host]
    if not any(record.chosen and _is_taken(record, taken) for record in network.subnets):
        return network
    for _, other in tx.items(NETWORKS, NetworkRecord):
        if other.id != network.id:
            taken += [parse_subnet(record.subnet, field="subnet") for record in other.subnets]
    changed = []
    for record in network.subnets:
        if record.chosen and _is_taken(record, taken):
            old = parse_subnet(record.subnet, field="subnet")
            subnet = ipam.choose_subnet(taken, bits=old.bits, pools=pools)
            gateway = format_address(subnet.address(1))
            record = SubnetRecord(subnet=str(subnet), gateway=gateway, chosen=True)
        changed.append(record)
    network = msgspec.structs.replace(network, subnets=tuple(changed))
    tx.put(NETWORKS, network.name, network)
    for key, _ in tx.items(CURSORS, Cursor, f"{network.id}/"):
        tx.delete(CURSORS, key)
    return network


def fits(network: NetworkRecord, choices: NetworkChoices) -> bool:
    """Tell whether the default network is as `choices` ask. What they leave open fits, but for
    a subnet that was chosen outside of their pools."""
    subnets = [parse_subnet(record.subnet, field="subnet") for record in network.subnets]
    pools = [parse_subnet(pool.base, field="pools") for pool in choices.pools]
    for record, subnet in zip(network.subnets, subnets, strict=True):
        of_family = [pool for pool in pools if pool.bits == subnet.bits]
        if record.chosen and of_family and not any(subnet.is_within(pool) for pool in of_family):
            return False
    return (
        {record.subnet for record in network.subnets} >= set(choices.subnets)
        and {record.gateway for record in network.subnets} >= set(choices.gateways)
        and {record.ip_range for record in network.subnets} >= set(choices.ip_ranges)
        and (network.ipv6 or not choices.ipv6)
        and choices.mtu in (0, network.mtu)
        and choices.masquerade == (network.options.get("masquerade") != "false")
    )


def _is_taken(record: SubnetRecord, taken: Iterable[Subnet]) -> bool:
    subnet = parse_subnet(record.subnet, field="subnet")
    return any(subnet.overlaps(other) for other in taken)


def _read_options(given: Mapping[str, str]) -> dict[str, str]:
    options = {}
    for key, value in given.items():
        name = _OPTIONS.get(key)
        if name is None:
            raise InvalidArgument(
                f"unknown option {key!r}",
                field="options",
                hint=f"known are {', '.join(sorted(_OPTIONS))}",
            )
        options[name] = str(value)
    if options.get("masquerade", "true") not in ("true", "false"):
        raise InvalidArgument("masquerade must be true or false", field="options")
    if options.get("host_ip"):
        parse_address(options["host_ip"], field="options.host_ip")
    return options


def _mtu(options: Mapping[str, str]) -> int:
    text = options.get("mtu", "0")
    if not (text.isascii() and text.isdigit()) or not (text == "0" or 68 <= int(text) <= 65535):
        raise InvalidArgument(f"expected 68 to 65535, got {text!r}", field="options.mtu")
    return int(text)


def _bridge_name(tx: Transaction, options: Mapping[str, str], network_id: str) -> str:
    name = options.get("bridge", f"hu-{short_id(network_id)}")
    if not _INTERFACE.fullmatch(name):
        raise InvalidArgument(f"not an interface name: {name!r}", field="options.bridge")
    for _, other in tx.items(NETWORKS, NetworkRecord):
        if other.bridge == name:
            raise AlreadyExists(f"bridge {name} belongs to network {other.name}")
    return name


def _subnets(
    tx: Transaction,
    request: NetworkRequest,
    host: list[tuple[str, Subnet]],
    pools: Sequence[AddressPool],
) -> tuple[SubnetRecord, ...]:
    """Return the network's subnets, those asked for and those chosen, in that order."""
    taken: list[tuple[str, Subnet]] = []
    for _, network in tx.items(NETWORKS, NetworkRecord):
        for record in network.subnets:
            subnet = parse_subnet(record.subnet, field="subnet")
            taken.append((f"network {network.name}", subnet))
    taken += host  # after them: a network's name says more than that of its bridge
    wanted: list[Subnet] = []
    asked: set[Subnet] = set()
    for number, text in enumerate(request.subnets):
        subnet = _asked_subnet(text, f"subnets[{number}]", taken)
        wanted.append(subnet)
        asked.add(subnet)
        taken.append(("the same network", subnet))
    if not any(subnet.bits == 32 for subnet in wanted):
        wanted.insert(0, ipam.choose_subnet((one for _, one in taken), pools=pools))
    if request.ipv6 and not any(subnet.bits == 128 for subnet in wanted):
        wanted.append(ipam.choose_subnet((one for _, one in taken), bits=128, pools=pools))
    gateways = _assigned(request.gateways, wanted, "gateways")
    ranges = _ranges(request.ip_ranges, wanted)
    reserved = _reserved(request.reserved, wanted)
    return tuple(
        SubnetRecord(
            subnet=str(subnet),
            gateway=gateways.get(number) or format_address(subnet.address(1)),
            ip_range=ranges.get(number, ""),
            chosen=subnet not in asked
            and number not in gateways
            and number not in ranges
            and number not in reserved,
            reserved=reserved.get(number, {}),
        )
        for number, subnet in enumerate(wanted)
    )


def _asked_subnet(text: str, field: str, taken: Iterable[tuple[str, Subnet]]) -> Subnet:
    subnet = parse_subnet(text, field=field)
    if not 8 <= subnet.prefix <= _LONGEST_PREFIX[subnet.bits]:
        allowed = f"/8 to /{_LONGEST_PREFIX[subnet.bits]}"
        raise InvalidArgument(f"{subnet}: the prefix must be {allowed}", field=field)
    first = subnet.base >> (subnet.bits - 8)
    if first in (0, 127, 255) or (subnet.bits == 32 and first >= 224):
        raise InvalidArgument(f"{subnet} cannot be given to hosts", field=field)
    for owner, other in taken:
        if subnet.overlaps(other):
            raise InvalidArgument(f"{subnet} overlaps {other} of {owner}", field=field)
    return subnet


def _assigned(texts: Sequence[str], subnets: Sequence[Subnet], field: str) -> dict[int, str]:
    """Return the gateways by the number of the subnet that contains them."""
    found: dict[int, str] = {}
    for position, text in enumerate(texts):
        where = f"{field}[{position}]"
        address = parse_address(text, field=where)
        number = next((n for n, subnet in enumerate(subnets) if address in subnet), None)
        if number is None or number in found:
            raise InvalidArgument(f"{text} fits no subnet that lacks one", field=where)
        subnet = subnets[number]
        value = int.from_bytes(address, "big")
        if value == subnet.base or (subnet.bits == 32 and value == subnet.last):
            raise InvalidArgument(f"{text} is not a host's address of {subnet}", field=where)
        found[number] = format_address(address)
    return found


def _ranges(texts: Sequence[str], subnets: Sequence[Subnet]) -> dict[int, str]:
    """Return the address ranges by the number of the subnet that contains them."""
    found: dict[int, str] = {}
    for position, text in enumerate(texts):
        where = f"ip_ranges[{position}]"
        wanted = parse_subnet(text, field=where)
        number = next((n for n, subnet in enumerate(subnets) if wanted.is_within(subnet)), None)
        if number is None or number in found:
            raise InvalidArgument(f"{text} fits no subnet that lacks one", field=where)
        found[number] = str(wanted)
    return found


def _reserved(given: Mapping[str, str], subnets: Sequence[Subnet]) -> dict[int, dict[str, str]]:
    """Return the addresses to be kept free, by the number of the subnet that contains them."""
    found: dict[int, dict[str, str]] = {}
    for name, text in given.items():
        field = f"reserved[{name[:40]}]"
        address = parse_address(text, field=field)
        number = next((n for n, subnet in enumerate(subnets) if address in subnet), None)
        if number is None:
            raise InvalidArgument(f"{text} is in no subnet of the network", field=field)
        found.setdefault(number, {})[name] = format_address(address)
    return found


def matches(network: NetworkRecord, filters: Mapping[str, Sequence[str]], used: bool) -> bool:
    """Tell whether a network passes Docker's list filters (values of one key are "or")."""
    builtin = network.name in BUILTIN_NETWORKS
    tests: dict[str, Callable[[str], bool]] = {
        "name": lambda value: value in network.name,
        "id": lambda value: network.id.startswith(value),
        "driver": lambda value: network.driver == value,
        "scope": lambda value: value == "local",
        "type": lambda value: value == ("builtin" if builtin else "custom"),
        "dangling": lambda value: (value in ("true", "1")) == (not used and not builtin),
        "label": lambda value: _has_label(network, value),
    }
    for key, values in filters.items():
        test = tests.get(key)
        if test is None:
            raise InvalidArgument(
                f"unknown filter {key!r}", field="filters", hint=f"known are {', '.join(tests)}"
            )
        combine = all if key == "label" else any
        if not combine(test(value) for value in values):
            return False
    return True


def _has_label(network: NetworkRecord, text: str) -> bool:
    key, equals, value = text.partition("=")
    if key not in network.labels:
        return False
    return not equals or network.labels[key] == value
