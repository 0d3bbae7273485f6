"""How to reach registries: mirrors, plain HTTP, certificates, credentials, patience.

A `RegistryConfig` is given by the caller; `load_registry_config` reads one from a JSON file
(`<root>/registries.json`, `/etc/hutch/registries.json`) with the same field names:

    {"insecure": ["registry.lan:5000", "10.0.0.0/8"],
     "mirrors": {"docker.io": ["mirror.lan:5000", "https://cache.lan/hub"]}}
"""

from __future__ import annotations

import ipaddress
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.errors import InvalidArgument

__all__ = [
    "Credentials",
    "Endpoint",
    "RegistryConfig",
    "endpoints",
    "bare_host",
    "is_loopback",
    "load_registry_config",
    "trust",
]

_API_HOST = {"docker.io": "registry-1.docker.io"}
_MAX_CONFIG = 1 << 20


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What proves who asks. Its text form never shows a secret."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r}, …)"


class RegistryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the registry client.

    `insecure`: hosts, `host:port` or networks for which plain HTTP and unverified TLS are
    taken (loopback may always speak plain HTTP). `mirrors`: per registry, tried in order
    before it, each `host[:port][/prefix]` or a URL. `ca_dirs`: directories of
    `<host[:port]>/*.crt`, `*.cert` and `*.key`. `credentials` by host go before those of
    `auth_files`; None there means the places Docker and Podman use. `max_image_bytes`
    counts an image as it comes, `max_unpacked_bytes` what its layers unpack to.
    """

    insecure: tuple[str, ...] = ()
    mirrors: dict[str, tuple[str, ...]] = {}
    ca_dirs: tuple[str, ...] = ("/etc/docker/certs.d", "/etc/containers/certs.d")
    credentials: dict[str, Credentials] = {}
    auth_files: tuple[str, ...] | None = None
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    tries: int = 6
    max_wait_s: float = 60.0
    parallel: int = 4
    max_image_bytes: int = 128 << 30
    max_unpacked_bytes: int = 256 << 30


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One server that may hold a repository.

    `schemes` are tried in order; `verify` is whether its certificate must be good;
    `prefix` goes before the repository's path.
    """

    host: str
    registry: str
    schemes: tuple[str, ...] = ("https",)
    verify: bool = True
    prefix: str = ""
    mirror: bool = False


def endpoints(domain: str, config: RegistryConfig, *, mirrors: bool = True) -> list[Endpoint]:
    """Return the servers for a reference's domain: its mirrors, then itself."""
    found = [
        _mirror(text, domain, config)
        for text in (config.mirrors.get(domain, ()) if mirrors else ())
    ]
    host = _API_HOST.get(domain, domain)
    schemes, verify = trust(host, config)
    found.append(Endpoint(host=host, registry=domain, schemes=schemes, verify=verify))
    return found


def load_registry_config(*paths: Path) -> RegistryConfig:
    """Return the settings of the first file that exists, else the defaults."""
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if len(data) > _MAX_CONFIG:
            raise InvalidArgument(f"{path}: larger than {_MAX_CONFIG} bytes")
        try:
            return decode_json(data, RegistryConfig)
        except msgspec.DecodeError as exc:
            raise InvalidArgument(f"{path}: {exc}") from exc
    return RegistryConfig()


def _mirror(text: str, domain: str, config: RegistryConfig) -> Endpoint:
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "", text
    host, _, prefix = rest.strip("/").partition("/")
    if not host or scheme not in ("", "http", "https"):
        raise InvalidArgument(f"expected host or URL, got {text!r}", field=f"mirrors.{domain}")
    schemes, verify = trust(host, config)
    return Endpoint(
        host=host,
        registry=domain,
        schemes=(scheme,) if scheme else schemes,
        verify=verify,
        prefix=prefix.strip("/"),
        mirror=True,
    )


def trust(host: str, config: RegistryConfig) -> tuple[tuple[str, ...], bool]:
    """Return which schemes to try and whether to verify certificates."""
    if any(_covers(rule, host) for rule in config.insecure):
        return ("https", "http"), False
    if is_loopback(host):
        return ("https", "http"), True
    return ("https",), True


def bare_host(host: str) -> str:
    """Return a host without its port and without the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Tell whether a host (with or without port) is this machine by its very name."""
    name = bare_host(host)
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _covers(rule: str, host: str) -> bool:
    if rule in (host, bare_host(host)):
        return True
    try:
        return ipaddress.ip_address(bare_host(host)) in ipaddress.ip_network(rule)
    except ValueError:
        return False
