"""The daemon's configuration: `daemon.json` with Docker's keys, and what the command line says."""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
import ipaddress
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from hutch.api.docker import FrontOptions
from hutch.daemon.docker_keys import leave_out_idle
from hutch.decoding import decode_json
from hutch.errors import InvalidArgument, NotFound
from hutch.image.registry_config import RegistryConfig
from hutch.network.addresses import parse_address, parse_subnet
from hutch.network.choices import AddressPool, NetworkChoices, check_pools

__all__ = ["KEYS", "DaemonConfig", "load_config", "merge"]

_MAX_FILE = 1 << 20
_CGROUPNS = ("private", "host")
_IPC = ("private", "shareable")
_PROXIES = ("http-proxy", "https-proxy", "no-proxy")
_MIRROR = re.compile(r"https?://[^/\s?#@]+/?")


class DaemonConfig(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What `daemon.json` may say; `docker_keys` has what of Docker's has no effect, or is
    refused."""

    hosts: tuple[str, ...] = ()
    group: str = ""
    data_root: str = ""
    debug: bool = False
    log_level: str = "info"
    labels: tuple[str, ...] = ()
    log_driver: str = "json-file"
    log_opts: dict[str, str] = {}
    default_ulimits: dict[str, dict[str, Any]] = {}
    default_shm_size: str | int = 0
    default_runtime: str = "hutch"
    init: bool = False
    dns: tuple[str, ...] = ()
    dns_opts: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    live_restore: bool = True
    min_api_version: str = ""
    shutdown_timeout: int = 15
    metrics_addr: str = ""
    pidfile: str = ""
    tls: bool = False
    tlsverify: bool = False
    tlscacert: str = ""
    tlscert: str = ""
    tlskey: str = ""
    bip: str = ""
    default_address_pools: tuple[AddressPool, ...] = ()
    default_cgroupns_mode: str = ""
    default_ipc_mode: str = ""
    default_network_opts: dict[str, dict[str, str]] = {}
    fixed_cidr: str = ""
    fixed_cidr_v6: str = ""
    host_gateway_ip: str = ""
    host_gateway_ips: tuple[str, ...] = ()
    ip: str = ""
    ip_masq: bool = True
    ipv6: bool = False
    mtu: int = 0
    insecure_registries: tuple[str, ...] = ()
    registry_mirrors: tuple[str, ...] = ()
    max_concurrent_downloads: int = 0
    max_download_attempts: int = 0
    no_new_privileges: bool = False
    proxies: dict[str, str] = {}
    seccomp_profile: str = ""
    # Keys of the file that nothing depends on; not one of them itself.
    idle: tuple[str, ...] = ()

    def front_options(self) -> FrontOptions:
        """Return what the API has to know of it."""
        from hutch.units import parse_bytes

        ulimits = tuple(
            f"{name}={limit.get('Soft', -1)}:{limit.get('Hard', -1)}"
            for name, limit in self.default_ulimits.items()
        )
        return FrontOptions(
            labels=self.labels,
            min_api_version=_oldest(self.min_api_version),
            log_driver=self.log_driver,
            log_opts=self.log_opts,
            default_ulimits=ulimits,
            default_shm_size=parse_bytes(self.default_shm_size, field="default-shm-size"),
            default_runtime=self.default_runtime,
            init=self.init,
            dns=self.dns,
            dns_options=self.dns_opts,
            dns_search=self.dns_search,
            live_restore=self.live_restore,
            shutdown_timeout_s=float(self.shutdown_timeout),
            host_ip=_host_ip(self.ip),
            host_gateway=_gateway(self),
            cgroupns=_one_of("default-cgroupns-mode", self.default_cgroupns_mode, _CGROUPNS),
            ipc=_one_of("default-ipc-mode", self.default_ipc_mode, _IPC),
            no_new_privileges=self.no_new_privileges,
            seccomp=_seccomp(self.seccomp_profile),
            network_options=_network_options(self.default_network_opts),
        )

    def network_choices(self) -> NetworkChoices:
        """Return what is chosen for networks that do not say it themselves."""
        if self.mtu and not 68 <= self.mtu <= 65535:
            raise InvalidArgument(f"expected 68 to 65535, got {self.mtu}", field="mtu")
        check_pools(self.default_address_pools, field="default-address-pools")
        gateways = []
        subnets = []
        if self.bip:
            gateway, subnet = _bridge_address(self.bip)
            gateways.append(gateway)
            subnets.append(subnet)
        elif self.fixed_cidr:
            subnets.append(_subnet(self.fixed_cidr, "fixed-cidr"))
        if self.fixed_cidr_v6:
            subnets.append(_subnet(self.fixed_cidr_v6, "fixed-cidr-v6"))
        return NetworkChoices(
            pools=self.default_address_pools,
            subnets=tuple(subnets),
            gateways=tuple(gateways),
            ip_ranges=(_range(self.fixed_cidr, subnets[0]),)
            if self.bip and self.fixed_cidr
            else (),
            ipv6=self.ipv6,
            mtu=self.mtu,
            masquerade=self.ip_masq,
        )

    def registry(self, own: RegistryConfig) -> RegistryConfig:
        """Return how registries are reached: hutch's own settings with what is said here."""
        for number, text in enumerate(self.registry_mirrors):
            if not _MIRROR.fullmatch(text):
                raise InvalidArgument(
                    f"expected a URL such as https://mirror.example, got {text[:80]!r}",
                    field=f"registry-mirrors[{number}]",
                )
        mirrors = {"docker.io": self.registry_mirrors} if self.registry_mirrors else {}
        return msgspec.structs.replace(
            own,
            insecure=(*own.insecure, *self.insecure_registries),
            mirrors=own.mirrors | mirrors,
            parallel=_count("max-concurrent-downloads", self.max_concurrent_downloads)
            or own.parallel,
            tries=_count("max-download-attempts", self.max_download_attempts) or own.tries,
        )

    def check(self) -> None:
        """Raise `InvalidArgument` for what cannot be, whatever the state of the host."""
        self.front_options()
        self.network_choices()
        self.registry(RegistryConfig())
        self.environment()

    def environment(self) -> dict[str, str]:
        """Return the variables that say by which proxies the daemon reaches others."""
        found: dict[str, str] = {}
        for key, value in self.proxies.items():
            if key not in _PROXIES:
                raise InvalidArgument(
                    f"expected one of {', '.join(_PROXIES)}, got {key[:40]!r}", field="proxies"
                )
            name = key.replace("-", "_")
            found |= {name: value, name.upper(): value}
        return found


def _oldest(text: str) -> tuple[int, int]:
    """Return the oldest version of the API that is spoken; Docker's variable says it too."""
    from hutch.api.docker.routing import ANCIENT, NEWEST, OLDEST, show

    text = text or os.environ.get("DOCKER_MIN_API_VERSION", "")
    if not text:
        return OLDEST
    major, _, minor = text.partition(".")
    if (
        len(text) < 8
        and text.isascii()
        and major.isdigit()
        and minor.isdigit()
        and ANCIENT <= (found := (int(major), int(minor))) <= NEWEST
    ):
        return found
    raise InvalidArgument(
        f"expected {show(ANCIENT)} to {show(NEWEST)}, got {text[:20]!r}", field="min-api-version"
    )


def _one_of(field: str, given: str, allowed: tuple[str, ...]) -> str:
    if given and given not in allowed:
        raise InvalidArgument(f"expected {' or '.join(allowed)}, got {given[:20]!r}", field=field)
    return given


def _count(field: str, given: int) -> int:
    if given < 0:
        raise InvalidArgument(f"must not be negative, got {given}", field=field)
    return given


def _host_ip(given: str) -> str:
    if given:
        parse_address(given, field="ip")
    return "" if given in ("0.0.0.0", "::") else given


def _gateway(config: DaemonConfig) -> str:
    """Return the IPv4 address that `host-gateway` stands for, else that of IPv6."""
    given = config.host_gateway_ips or ((config.host_gateway_ip,) if config.host_gateway_ip else ())
    for address in given:
        parse_address(address, field="host-gateway-ips")
    return next((one for one in given if ":" not in one), given[0] if given else "")


def _seccomp(path: str) -> str:
    """Return a profile's text; Docker's words for having none or its own are taken too."""
    if path in ("", "builtin", "default"):
        return ""
    if path == "unconfined":
        return path
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
        text = data.decode()
        if len(data) <= _MAX_FILE and isinstance(decode_json(data, Any), dict):
            return text
    except OSError as exc:
        problem = (exc.strerror or str(exc)).lower()
        raise InvalidArgument(f"{path}: {problem}", field="seccomp-profile") from exc
    except (UnicodeDecodeError, msgspec.MsgspecError) as exc:
        raise InvalidArgument(f"{path}: {exc}", field="seccomp-profile") from exc
    raise InvalidArgument(f"{path}: not a profile in JSON", field="seccomp-profile")


def _network_options(given: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the options of new bridge networks; of other drivers there are no networks."""
    others = sorted(given.keys() - {"bridge"})
    if others:
        raise InvalidArgument(
            f"no such driver: {others[0][:40]!r}", field="default-network-opts", hint="bridge"
        )
    return given.get("bridge", {})


def _bridge_address(text: str) -> tuple[str, str]:
    """Return gateway and subnet of `bip`, an address with its prefix length."""
    try:
        found = ipaddress.IPv4Interface(text)
    except ValueError:
        found = None
    if found is None or "/" not in text:
        raise InvalidArgument(f"expected such as 172.26.0.1/16, got {text[:40]!r}", field="bip")
    return str(found.ip), str(found.network)


def _subnet(text: str, field: str) -> str:
    return str(parse_subnet(text, field=field))


def _range(text: str, subnet: str) -> str:
    wanted = parse_subnet(text, field="fixed-cidr")
    if not wanted.is_within(parse_subnet(subnet, field="bip")):
        raise InvalidArgument(
            f"{text} is not within {subnet}, the subnet of bip", field="fixed-cidr"
        )
    return str(wanted)


KEYS: tuple[str, ...] = tuple(
    field.encode_name for field in msgspec.structs.fields(DaemonConfig) if field.name != "idle"
)


def load_config(path: str, *, must_exist: bool) -> DaemonConfig:
    """Return what a file says; one that need not exist and does not says nothing."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as exc:
        if must_exist:
            raise NotFound(f"{path}: no such file") from exc
        return DaemonConfig()
    except OSError as exc:
        raise InvalidArgument(f"{path}: {(exc.strerror or str(exc)).lower()}") from exc
    if len(data) > _MAX_FILE:
        raise InvalidArgument(f"{path}: larger than {_MAX_FILE} bytes")
    try:
        given = decode_json(data, dict[str, Any])
        given, idle = leave_out_idle(given, path)
        unknown = sorted(set(given) - set(KEYS))
        if unknown:
            raise InvalidArgument(
                f"{path}: not a key of the configuration: {', '.join(unknown)[:200]}",
                hint=f"keys are {', '.join(KEYS)}",
            )
        return msgspec.structs.replace(msgspec.convert(given, DaemonConfig), idle=idle)
    except msgspec.MsgspecError as exc:
        raise InvalidArgument(f"{path}: {exc}") from exc


def merge(config: DaemonConfig, **given: Any) -> DaemonConfig:
    """Return the configuration with what the command line gives; refuse what both give,
    as Docker does, but for flags that only switch something on."""
    changes = {name: value for name, value in given.items() if value}
    if "hosts" in changes and config.hosts:
        raise InvalidArgument(
            "is given in the configuration file and on the command line", field="hosts"
        )
    return msgspec.structs.replace(config, **changes)
