"""What a registry says without anything being pulled: descriptors, platforms, logins, names."""

from __future__ import annotations

import msgspec

from hutch.decoding import decode_json
from hutch.errors import Denied, NotFound, Unavailable
from hutch.image.answers import check_status, read_bounded
from hutch.image.registry import Repository, catalog
from hutch.image.registry_config import Credentials, Endpoint, RegistryConfig, endpoints, trust
from hutch.image.transport import Transport
from hutch.oci.platform import WantedPlatform, normalize
from hutch.oci.reference import DEFAULT_DOMAIN, check_registry, parse
from hutch.oci.types import (
    INDEX_TYPES,
    MAX_CONFIG_BYTES,
    decode_config,
    decode_index,
    decode_manifest,
)

__all__ = ["FoundImage", "RemoteImage", "check_login", "look_up", "search"]

_HUB_SEARCH = "index.docker.io"
_MAX_SEARCH = 4 << 20


class RemoteImage(msgspec.Struct, frozen=True, kw_only=True):
    """What a reference stands for in its registry: a manifest, or an index of several."""

    media_type: str
    digest: str
    size: int
    platforms: tuple[WantedPlatform, ...]


class FoundImage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """A repository that a search has found."""

    name: str
    description: str = ""
    is_official: bool = False
    is_automated: bool = False
    star_count: int = 0


class _Results(msgspec.Struct):
    results: list[FoundImage] = []


def look_up(reference: str, config: RegistryConfig) -> RemoteImage:
    """Describe what a registry has under a reference."""
    wanted = parse(reference)
    name = wanted.familiar()
    with Repository(wanted, config) as repository:
        top = repository.manifest(wanted.target)
        if top.media_type in INDEX_TYPES:
            index = decode_index(top.data, top.media_type, what=f"index of {name}")
            platforms = [
                normalize(entry.platform.os, entry.platform.architecture, entry.platform.variant)
                for entry in index.manifests
                if entry.platform is not None
            ]
        else:
            manifest = decode_manifest(top.data, top.media_type, what=f"manifest of {name}")
            data = read_bounded(
                repository.blob(manifest.config), MAX_CONFIG_BYTES, f"config of {name}"
            )
            config_of = decode_config(data, what=f"config of {name}")
            platforms = [
                normalize(config_of.os or "", config_of.architecture or "", config_of.variant)
            ]
    return RemoteImage(
        media_type=top.media_type,
        digest=top.digest,
        size=len(top.data),
        platforms=tuple(platforms),
    )


def check_login(registry: str, credentials: Credentials, config: RegistryConfig) -> None:
    """See that a registry takes credentials; raise `Denied` where it does not."""
    check_registry(registry)
    known = config.credentials | {registry: credentials}
    config = msgspec.structs.replace(config, credentials=known)
    transport = Transport(endpoints(registry, config, mirrors=False)[0], config)
    try:
        with transport.request("GET", "/v2/") as response:
            if response.status == 401:
                raise Denied(f"registry {registry}: incorrect username or password")
            check_status(response, (200,), f"login to {registry}")
    finally:
        transport.close()


def search(term: str, config: RegistryConfig, *, limit: int = 25) -> tuple[FoundImage, ...]:
    """Search a registry (`host/TERM`), or Docker Hub, for repositories.

    Where a registry has no search, the names that it lists are looked through.
    """
    first, slash, rest = term.partition("/")
    elsewhere = slash and ("." in first or ":" in first or first == "localhost")
    host = first if elsewhere else DEFAULT_DOMAIN
    wanted = rest if elsewhere else term
    found = _search_api(host, wanted, config, limit)
    if found is None:
        names = [name for name in catalog(host, config) if wanted in name]
        found = tuple(FoundImage(name=name) for name in names)
    if elsewhere:
        found = tuple(msgspec.structs.replace(one, name=f"{host}/{one.name}") for one in found)
    return found[:limit]


def _search_api(
    host: str, term: str, config: RegistryConfig, limit: int
) -> tuple[FoundImage, ...] | None:
    """Ask a registry that can search; None for one that cannot."""
    from urllib.parse import urlencode

    address = _HUB_SEARCH if host == DEFAULT_DOMAIN else host
    schemes, verify = trust(address, config)
    endpoint = Endpoint(host=address, registry=host, schemes=schemes, verify=verify)
    patience = msgspec.structs.replace(config, tries=1)
    transport = Transport(endpoint, patience)
    try:
        path = "/v1/search?" + urlencode({"q": term, "n": limit})
        with transport.request("GET", path, retry=False) as response:
            if response.status in (404, 405):
                return None
            check_status(response, (200,), f"search in {host}")
            data = response.read(_MAX_SEARCH)
    except NotFound:
        return None
    finally:
        transport.close()
    try:
        return tuple(decode_json(data, _Results).results)
    except msgspec.DecodeError:
        raise Unavailable(f"search in {host}: gave an answer that cannot be read") from None
