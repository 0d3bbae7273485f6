"""Contents of an instance's /etc/hosts, /etc/resolv.conf and /etc/hostname, as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hutch.errors import InvalidArgument
from hutch.network.addresses import format_address, parse_address
from hutch.network.model import Endpoint

__all__ = [
    "HOST_GATEWAY",
    "hostname_file",
    "hosts_file",
    "parse_extra_host",
    "read_host_resolv_conf",
    "resolv_conf",
]

HOST_GATEWAY = "host-gateway"
_RESOLV_MAX = 1 << 16
_LOCAL = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::\tip6-localnet
ff00::\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


def hostname_file(hostname: str) -> bytes:
    """Return the content of /etc/hostname."""
    return f"{hostname}\n".encode()


def parse_extra_host(text: str, *, field: str = "extra_hosts") -> tuple[str, str]:
    """Return (name, address) of `name:address` or `name=address`.

    The address may stand in brackets, or be `host-gateway`.
    """
    name, separator, address = text.partition("=")
    if not separator:
        name, separator, address = text.partition(":")
    address = address.strip("[]") if address.startswith("[") else address
    _check_word(name, field)
    if not separator:
        raise InvalidArgument(f"expected name:address, got {text!r}", field=field)
    if address != HOST_GATEWAY:
        address = format_address(parse_address(address, field=field))
    return name, address


def _check_word(word: str, field: str) -> None:
    if not word or any(char.isspace() or not char.isprintable() for char in word):
        raise InvalidArgument(f"not a host name: {word!r}", field=field)


def hosts_file(
    hostname: str,
    endpoints: Sequence[Endpoint],
    *,
    domainname: str = "",
    extra_hosts: Sequence[str] = (),
    host_gateway: str = "",
    links: Sequence[tuple[str, str]] = (),
) -> bytes:
    """Return the content of /etc/hosts: the loopback, the extra hosts, links (address and
    names), the instance itself.

    `host_gateway` is what the word `host-gateway` stands for; empty: the gateway of the
    endpoint that gives the default route.
    """
    gateway = host_gateway or _default_gateway(endpoints)
    lines = [_LOCAL]
    for number, text in enumerate(extra_hosts):
        field = f"extra_hosts[{number}]"
        name, address = parse_extra_host(text, field=field)
        if address == HOST_GATEWAY and not gateway:
            raise InvalidArgument("host-gateway needs a network with a gateway", field=field)
        lines.append(f"{gateway if address == HOST_GATEWAY else address}\t{name}\n")
    lines.extend(f"{address}\t{names}\n" for address, names in links)
    own = f"{hostname}.{domainname} {hostname}" if domainname else hostname
    for endpoint in endpoints:
        lines.extend(f"{entry.address}\t{own}\n" for entry in endpoint.addresses)
    return "".join(lines).encode()


def _default_gateway(endpoints: Sequence[Endpoint]) -> str:
    ordered = sorted(endpoints, key=lambda endpoint: not endpoint.default_route)
    return next((e.addresses[0].gateway for e in ordered if e.addresses), "")


def read_host_resolv_conf(root: Path = Path("/")) -> str:
    """Return the host's resolv.conf; where it names only systemd's stub, the one that
    names the servers behind it."""
    text = _read(root / "etc/resolv.conf")
    servers = [words[1] for words in _entries(text) if words[0] == "nameserver"]
    if servers and all(server.startswith("127.0.0.5") for server in servers):
        return _read(root / "run/systemd/resolve/resolv.conf") or text
    return text


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_RESOLV_MAX).decode(errors="replace")
    except OSError:
        return ""


def _entries(text: str) -> list[list[str]]:
    lines = (line.split("#")[0].split(";")[0].split() for line in text.splitlines())
    return [words for words in lines if len(words) >= 2]


def resolv_conf(
    host: str,
    endpoints: Sequence[Endpoint] = (),
    *,
    dns: Sequence[str] = (),
    search: Sequence[str] = (),
    options: Sequence[str] = (),
    host_network: bool = False,
) -> bytes:
    """Return the content of /etc/resolv.conf.

    `host` is the host's file. On a network that resolves names, the server is the
    network's gateway, and `dns` are the servers it asks (see `Networks.prepare`).
    Elsewhere they are `dns`, or the host's without those on its loopback, which an
    instance cannot reach (on the host's own network it can). A `search` of "." is none.
    """
    entries = _entries(host)
    resolving = [e for e in endpoints if e.dns]
    resolving.sort(key=lambda endpoint: not endpoint.default_route)
    chosen = list(options)
    if resolving:
        servers = [entry.gateway for entry in resolving[0].addresses][:1]
        if not any(option.startswith("ndots:") for option in chosen):
            chosen.append("ndots:0")
    elif dns:
        servers = [
            format_address(parse_address(text, field=f"dns[{number}]"))
            for number, text in enumerate(dns)
        ]
    else:
        servers = [words[1] for words in entries if words[0] == "nameserver"]
        if not host_network:
            servers = [server for server in servers if not _is_loopback(server)]
    domains = _domains(entries, search)
    if not options:
        named = {option.partition(":")[0] for option in chosen}
        for words in entries:
            if words[0] == "options":
                chosen += [w for w in words[1:] if w.partition(":")[0] not in named]
    return _render(servers, domains, chosen)


def _is_loopback(server: str) -> bool:
    return server.startswith("127.") or server == "::1"


def _domains(entries: list[list[str]], search: Sequence[str]) -> list[str]:
    for number, domain in enumerate(search):
        _check_word(domain, f"dns_search[{number}]")
    if search:
        return [] if "." in search else list(search)
    found: list[str] = []
    for words in entries:
        if words[0] in ("search", "domain"):
            found = words[1:]
    return found


def _render(servers: list[str], domains: list[str], options: list[str]) -> bytes:
    for number, option in enumerate(options):
        _check_word(option, f"dns_options[{number}]")
    lines = [f"nameserver {server}\n" for server in servers]
    if domains:
        lines.append(f"search {' '.join(domains)}\n")
    if options:
        lines.append(f"options {' '.join(options)}\n")
    return "".join(lines).encode()
