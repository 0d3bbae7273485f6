"""Networks, ports, names and resolvers: `--network`, `--publish`, `--dns`, `--add-host` …"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hutch.errors import InvalidArgument
from hutch.spec.model import NetworkAttachment, PortMapping
from hutch.spec.parse import integer, ip_address, items, split_csv, strings, text
from hutch.units import parse_rate

__all__ = [
    "change_rates",
    "check_hostname",
    "parse_exposed",
    "parse_extra_hosts",
    "parse_networks",
    "parse_ports",
    "publish_exposed",
]

_PROTOCOLS = ("tcp", "udp", "sctp")
_LONE_MODES = ("none", "host")
_MAX_PORTS = 65_535


# ---- networks ---------------------------------------------------------------------------


def parse_networks(given: Mapping[str, Any]) -> tuple[str, tuple[NetworkAttachment, ...]]:
    """Return the network mode and the attachments; both come from `network` and its friends."""
    wanted = items(given.get("network"), "network") or ["bridge"]
    attachments = [_attachment(v, f"network[{i}]") for i, v in enumerate(wanted)]
    _check_combination(attachments)
    first = _with_single_options(attachments[0], given)
    if _is_lone(first.name):
        return first.name, ()
    return first.name, (first, *attachments[1:])


def _attachment(value: object, field: str) -> NetworkAttachment:
    if isinstance(value, NetworkAttachment):
        check_attachment(value, field)
        return value
    if isinstance(value, Mapping):
        parts = [f"{k}={v}" for k, v in value.items() if not isinstance(v, (list, tuple))]
        for key, many in value.items():
            if isinstance(many, (list, tuple)):
                parts += [f"{key}={entry}" for entry in many]
    else:
        given = text(value, field, empty=False)
        if "=" not in given:
            name = "bridge" if given == "default" else given
            attachment = NetworkAttachment(name=name)
            check_attachment(attachment, field)
            return attachment
        parts = split_csv(given, field)
    return _long_attachment(parts, field)


_KEYS = {
    "name": "name", "ip": "ipv4", "ipv4": "ipv4", "ip6": "ipv6", "ipv6": "ipv6",
    "mac-address": "mac", "mac": "mac", "rx-rate": "rx_rate", "rx_rate": "rx_rate",
    "tx-rate": "tx_rate", "tx_rate": "tx_rate",
}  # fmt: skip


def _long_attachment(parts: Iterable[str], field: str) -> NetworkAttachment:
    single: dict[str, str] = {}
    aliases: list[str] = []
    for part in parts:
        key, equals, entry = part.partition("=")
        if not equals or not entry:
            raise InvalidArgument(f"expected KEY=VALUE, got {part!r}", field=field)
        if key in ("alias", "aliases"):
            aliases.append(entry)
        elif key in _KEYS and _KEYS[key] not in single:
            single[_KEYS[key]] = entry
        else:
            raise InvalidArgument(
                f"unknown or repeated option {key!r}",
                field=field,
                hint="options are name, alias, ip, ip6, mac-address, rx-rate and tx-rate",
            )
    if "name" not in single:
        raise InvalidArgument("is missing", field=f"{field}.name", hint="add name=NETWORK")
    if single["name"] == "default":
        single["name"] = "bridge"
    rates = {key: single.pop(key, "0") for key in ("rx_rate", "tx_rate")}
    attachment = NetworkAttachment(
        aliases=tuple(aliases),
        rx_rate=parse_rate(rates["rx_rate"], field=f"{field}.rx-rate"),
        tx_rate=parse_rate(rates["tx_rate"], field=f"{field}.tx-rate"),
        **single,
    )
    check_attachment(attachment, field)
    return attachment


def change_rates(
    networks: tuple[NetworkAttachment, ...], value: object, field: str = "network"
) -> tuple[NetworkAttachment, ...]:
    """Return the attachments with the rates that `name=NETWORK,rx-rate=…,tx-rate=…` entries
    state; what they do not state stays."""
    from msgspec.structs import replace

    changed = {attachment.name: attachment for attachment in networks}
    for i, entry in enumerate(items(value, field)):
        where = f"{field}[{i}]"
        given = _rates_alone(entry, where)
        name = given.pop("name", "")
        if name not in changed:
            raise InvalidArgument(
                f"the instance is not in network {name!r}" if name else "is missing",
                field=f"{where}.name",
                hint="`hutch network connect` connects it to a further one" if name else None,
            )
        rates = {
            _KEYS[key]: parse_rate(rate, field=f"{where}.{key}") for key, rate in given.items()
        }
        changed[name] = replace(changed[name], **rates)
    return tuple(changed.values())


def _rates_alone(entry: object, field: str) -> dict[str, Any]:
    if isinstance(entry, Mapping):
        given = {str(key).replace("_", "-"): value for key, value in entry.items()}
    else:
        parts = [part.partition("=") for part in split_csv(text(entry, field), field)]
        given = {key: value for key, _, value in parts}
    for key in given:
        if key not in ("name", "rx-rate", "tx-rate"):
            raise InvalidArgument(
                f"{key[:40]!r} cannot be changed",
                field=field,
                hint="write name=NETWORK,rx-rate=RATE,tx-rate=RATE",
            )
    return given


def _is_lone(name: str) -> bool:
    return name in _LONE_MODES or name.startswith("container:")


def _is_user_defined(name: str) -> bool:
    return not _is_lone(name) and name != "bridge"


def check_attachment(attachment: NetworkAttachment, field: str) -> None:
    """Raise `InvalidArgument` where an attachment asks for what its network cannot give."""
    name = text(attachment.name, f"{field}.name", empty=False)
    if name == "container:":
        raise InvalidArgument("names no instance", field=field, hint="write container:NAME")
    plain = name.replace("_", "").replace(".", "").replace("-", "")
    if not name.startswith("container:") and not (name.isascii() and plain.isalnum()):
        raise InvalidArgument(f"bad network name {name!r}", field=f"{field}.name")
    for key, value, version in (("ip", attachment.ipv4, 4), ("ip6", attachment.ipv6, 6)):
        if value:
            ip_address(value, f"{field}.{key}", version=version)
            _needs_user_defined(name, f"{field}.{key}")
    if attachment.mac:
        _check_mac(attachment.mac, f"{field}.mac_address")
    for key, rate in (("rx-rate", attachment.rx_rate), ("tx-rate", attachment.tx_rate)):
        if parse_rate(rate, field=f"{field}.{key}") and _is_lone(name):
            raise InvalidArgument(f"is not possible on {name!r}", field=f"{field}.{key}")
    if attachment.aliases:
        _needs_user_defined(name, f"{field}.alias")
        for alias in attachment.aliases:
            check_hostname(alias, f"{field}.alias")


def _needs_user_defined(name: str, field: str) -> None:
    if not _is_user_defined(name):
        raise InvalidArgument(
            f"is possible on user-defined networks only, not on {name!r}",
            field=field,
            hint="make one with `hutch network create NAME` and use --network NAME",
        )


def _check_combination(attachments: list[NetworkAttachment]) -> None:
    seen: set[str] = set()
    for i, attachment in enumerate(attachments):
        if attachment.name in seen:
            raise InvalidArgument(f"{attachment.name!r} is given twice", field=f"network[{i}]")
        seen.add(attachment.name)
        if _is_lone(attachment.name) and len(attachments) > 1:
            raise InvalidArgument(
                f"{attachment.name!r} cannot be combined with other networks", field=f"network[{i}]"
            )


def _with_single_options(first: NetworkAttachment, given: Mapping[str, Any]) -> NetworkAttachment:
    """Apply --ip, --ip6, --mac-address and --network-alias to the first network."""
    changes: dict[str, Any] = {}
    for option, key, version in (("ip", "ipv4", 4), ("ip6", "ipv6", 6)):
        if given.get(option):
            _needs_user_defined(first.name, option)
            changes[key] = ip_address(given[option], option, version=version)
    if given.get("mac_address"):
        if _is_lone(first.name):
            raise InvalidArgument(f"is not possible on {first.name!r}", field="mac_address")
        changes["mac"] = _check_mac(given["mac_address"], "mac_address")
    aliases = strings(given.get("network_aliases"), "network_aliases")
    if aliases:
        _needs_user_defined(first.name, "network_aliases")
        for i, alias in enumerate(aliases):
            check_hostname(alias, f"network_aliases[{i}]")
        changes["aliases"] = (*first.aliases, *aliases)
    for key in changes:
        if key != "aliases" and getattr(first, key):
            raise InvalidArgument("is given twice", field="network[0]")
    if not changes:
        return first
    from msgspec.structs import replace

    return replace(first, **changes)


def _check_mac(value: object, field: str) -> str:
    given = text(value, field).lower().replace("-", ":")
    octets = given.split(":")
    hexadecimal = all(len(o) == 2 and set(o) <= set("0123456789abcdef") for o in octets)
    if len(octets) != 6 or not hexadecimal:
        raise InvalidArgument(
            f"expected a MAC address such as 02:42:ac:11:00:02, got {given[:40]!r}", field=field
        )
    if int(octets[0], 16) & 1:
        raise InvalidArgument(f"{given} is a multicast address", field=field)
    return given


# ---- names and resolvers ----------------------------------------------------------------


def check_hostname(value: object, field: str) -> str:
    """Return a host name of dotted labels of letters, digits and inner hyphens."""
    name = text(value, field)
    labels = name.removesuffix(".").split(".")
    good = (
        name.isascii()
        and len(name) <= 255
        and all(
            0 < len(label) <= 63
            and label.replace("-", "").replace("_", "").isalnum()
            and not label.startswith("-")
            and not label.endswith("-")
            for label in labels
        )
    )
    if not good:
        raise InvalidArgument(
            f"invalid host name {name[:80]!r}",
            field=field,
            hint="use letters, digits and inner hyphens, at most 63 characters between dots",
        )
    return name


def parse_extra_hosts(value: object, field: str = "add_host") -> tuple[str, ...]:
    """Read `NAME:ADDRESS` or `NAME=ADDRESS` entries; `host-gateway` stands for the host."""
    if isinstance(value, Mapping):
        value = [f"{name}={address}" for name, address in value.items()]
    result = []
    for i, entry in enumerate(strings(value, field)):
        where = f"{field}[{i}]"
        cut = min((entry.find(c) for c in ":=" if c in entry), default=-1)
        if cut <= 0:
            raise InvalidArgument(f"expected NAME:ADDRESS, got {entry!r}", field=where)
        name = check_hostname(entry[:cut], where)
        address = entry[cut + 1 :].removeprefix("[").removesuffix("]")
        if address != "host-gateway":
            address = ip_address(address, where)
        result.append(f"{name}:{address}")
    return tuple(result)


# ---- ports ------------------------------------------------------------------------------


def parse_ports(value: object, field: str = "publish") -> tuple[PortMapping, ...]:
    """Read `[[IP:]HOST:]CONTAINER[/PROTOCOL]` entries, ranges included.

    A mapping is read as container port → host port (None: any), (address, port) or a list.
    """
    result: list[PortMapping] = []
    for i, member in enumerate(_port_members(value, field)):
        result += _port_entry(member, f"{field}[{i}]")
        if len(result) > _MAX_PORTS:
            raise InvalidArgument("too many ports", field=field)
    if len(result) < 2:
        return tuple(result)
    taken: set[tuple[str, int, str]] = set()
    unique = dict.fromkeys(result)
    for port in unique:
        key = (port.host_ip, port.host_port, port.protocol)
        if port.host_port and not port.host_port_end and key in taken:
            raise InvalidArgument(
                f"host port {port.host_port}/{port.protocol} is published twice", field=field
            )
        taken.add(key)
    return tuple(unique)


def _port_members(value: object, field: str) -> list[Any]:
    if not isinstance(value, Mapping):
        return items(value, field)
    members: list[str] = []
    for container, hosts in value.items():
        for host in hosts if isinstance(hosts, list) else [hosts]:
            if host is None:
                members.append(f"{container}")
            elif isinstance(host, tuple) and len(host) == 2:
                address = f"[{host[0]}]" if ":" in str(host[0]) else host[0]
                members.append(f"{address}:{'' if host[1] is None else host[1]}:{container}")
            else:
                members.append(f"{host}:{container}")
    return members


def _port_entry(value: object, field: str) -> list[PortMapping]:
    if isinstance(value, PortMapping):
        integer(value.container_port, f"{field}.container_port", low=1, high=_MAX_PORTS)
        integer(value.host_port, f"{field}.host_port", low=0, high=_MAX_PORTS)
        low = value.host_port if value.host_port_end else 0
        integer(value.host_port_end, f"{field}.host_port_end", low=low, high=_MAX_PORTS)
        _protocol(value.protocol, field)
        if value.host_ip:
            ip_address(value.host_ip, f"{field}.host_ip")
        return [value]
    given = text(value, field, empty=False)
    rest, slash, protocol = given.partition("/")
    protocol = _protocol(protocol if slash else "tcp", field)
    address, host, container = _split_port(rest, given, field)
    host_ip = ip_address(address, field) if address else ""
    inside = _port_range(container, given, field)
    outside = range(0) if host in ("", "0") else _port_range(host, given, field)
    if len(inside) == 1 and len(outside) > 1:
        return [
            PortMapping(
                container_port=inside[0],
                host_port=outside[0],
                host_port_end=outside[-1],
                host_ip=host_ip,
                protocol=protocol,
            )
        ]
    if outside and len(outside) != len(inside):
        raise InvalidArgument(
            f"ranges of different lengths in {given!r}",
            field=field,
            hint="publish as many host ports as container ports, or one container port",
        )
    return [
        PortMapping(
            container_port=port,
            host_port=outside[i] if outside else 0,
            host_ip=host_ip,
            protocol=protocol,
        )
        for i, port in enumerate(inside)
    ]


def _split_port(rest: str, given: str, field: str) -> tuple[str, str, str]:
    address = ""
    if rest.startswith("["):
        address, bracket, rest = rest[1:].partition("]")
        if not bracket or not address or not rest.startswith(":"):
            raise _bad_port(given, field)
        rest = rest[1:]
        parts = ["", *rest.split(":")] if ":" in rest else ["", "", rest]
    else:
        head, _, container = rest.rpartition(":")
        head, _, host = head.rpartition(":")
        parts = [head, host, container]
        address = head
    if len(parts) != 3:
        raise _bad_port(given, field)
    return address, parts[1], parts[2]


def _bad_port(given: str, field: str) -> InvalidArgument:
    return InvalidArgument(
        f"expected [[IP:]HOST:]CONTAINER[/PROTOCOL], got {given[:80]!r}",
        field=field,
        hint="for example 8080:80, 127.0.0.1:5353:53/udp or 8000-8009:8000-8009",
    )


def _protocol(value: str, field: str) -> str:
    protocol = value.lower()
    if protocol not in _PROTOCOLS:
        raise InvalidArgument(f"unknown protocol {value[:20]!r}", field=field, hint="tcp or udp")
    return protocol


def _port_range(value: str, given: str, field: str) -> range:
    first, dash, last = value.partition("-")
    numbers = []
    for digits in (first, last if dash else first):
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 6):
            raise _bad_port(given, field)
        numbers.append(int(digits))
    low, high = numbers
    if low > high or not 1 <= low <= high <= _MAX_PORTS:
        raise InvalidArgument(f"port out of range in {given[:80]!r}", field=field)
    return range(low, high + 1)


def parse_exposed(value: object, field: str = "expose") -> tuple[str, ...]:
    """Read `PORT[-PORT][/PROTOCOL]` entries into `PORT/PROTOCOL` texts."""
    found: list[str] = []
    for i, entry in enumerate(items(value, field, most=_MAX_PORTS)):
        where = f"{field}[{i}]"
        given = text(entry, where, empty=False)
        ports, slash, protocol = given.partition("/")
        protocol = _protocol(protocol if slash else "tcp", where)
        found += [f"{port}/{protocol}" for port in _port_range(ports, given, where)]
        if len(found) > _MAX_PORTS:
            raise InvalidArgument("too many ports", field=field)
    return tuple(dict.fromkeys(found))


def publish_exposed(
    ports: tuple[PortMapping, ...], exposed: tuple[str, ...]
) -> tuple[PortMapping, ...]:
    """Add a mapping to any free host port for every exposed port that has none yet."""
    taken = {(port.container_port, port.protocol) for port in ports}
    added = []
    for entry in exposed:
        port, _, protocol = entry.partition("/")
        if (int(port), protocol) not in taken:
            added.append(PortMapping(container_port=int(port), protocol=protocol))
    return (*ports, *added)
