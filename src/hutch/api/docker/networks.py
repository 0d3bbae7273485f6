"""Networks: listed, inspected, made, joined and left, removed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.api.docker.creating import attachment_options
from hutch.api.docker.errors import ApiError
from hutch.api.docker.naming import find_container
from hutch.api.docker.pruning import Spared, note_prune
from hutch.api.docker.replies import Answer, empty, json_reply
from hutch.api.docker.routing import Route
from hutch.api.docker.times import timestamp
from hutch.api.docker.wire import EndpointBody, Wire
from hutch.errors import (
    AlreadyExists,
    Busy,
    InvalidArgument,
    NotFound,
    Unsupported,
    WrongState,
)
from hutch.network.model import BUILTIN_NETWORKS

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.api.docker.requests import Request
    from hutch.network import Endpoint, NetworkRecord

__all__ = ["ROUTES"]

_FILTERS = ("dangling", "driver", "id", "label", "name", "scope", "type")
# Docker's names for what the engine has, and options that ask for what is so anyway.
_OPTIONS = {
    "mtu": "com.docker.network.driver.mtu",
    "bridge": "com.docker.network.bridge.name",
    "masquerade": "com.docker.network.bridge.enable_ip_masquerade",
    "host_ip": "com.docker.network.bridge.host_binding_ipv4",
}
_GIVEN_ANYWAY = {
    "com.docker.network.bridge.enable_icc": ("true", "1"),
    "com.docker.network.bridge.gateway_mode_ipv4": ("nat", ""),
    "com.docker.network.bridge.gateway_mode_ipv6": ("nat", ""),
}


class IpamConfigBody(Wire, frozen=True, kw_only=True):
    """A subnet that is asked for."""

    subnet: str = ""
    ip_range: str = msgspec.field(default="", name="IPRange")
    gateway: str = ""
    auxiliary_addresses: dict[str, str] | None = msgspec.field(
        default=None, name="AuxiliaryAddresses"
    )


class IpamBody(Wire, frozen=True, kw_only=True):
    """How addresses are given out."""

    driver: str = ""
    options: dict[str, str] | None = None
    config: list[IpamConfigBody] | None = None


class NetworkBody(Wire, frozen=True, kw_only=True):
    """A network to be made."""

    name: str = ""
    driver: str = ""
    scope: str = ""
    internal: bool = False
    attachable: bool = False
    ingress: bool = False
    config_only: bool = False
    config_from: dict[str, str] | None = None
    ipam: IpamBody | None = msgspec.field(default=None, name="IPAM")
    enable_ipv4: bool | None = msgspec.field(default=None, name="EnableIPv4")
    enable_ipv6: bool = msgspec.field(default=False, name="EnableIPv6")
    options: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class ConnectBody(Wire, frozen=True, kw_only=True):
    """A container that is to join."""

    container: str = ""
    endpoint_config: EndpointBody | None = None


class DisconnectBody(Wire, frozen=True, kw_only=True):
    """A container that is to leave."""

    container: str = ""
    force: bool = False


def find_network(front: Front, name: str) -> NetworkRecord:
    """Return the network that a request names."""
    try:
        return front.engine.networks.get(name)
    except NotFound:
        raise ApiError(404, f"network {name} not found") from None
    except InvalidArgument as exc:
        raise ApiError(400, str(exc)) from None


# ---- list and inspect ---------------------------------------------------------------------


async def _list(request: Request) -> Answer:
    return json_reply(await request.front.call(_listed, request.front, request.query.filters()))


def _listed(front: Front, filters: dict[str, list[str]]) -> list[dict[str, Any]]:
    for key in filters:
        if key not in _FILTERS:
            raise ApiError(400, f"invalid filter '{key}'")
    for value in filters.get("type", ()):
        if value not in ("builtin", "custom"):
            raise ApiError(400, f"invalid filter 'type={value[:80]}'")
    wanted = {key: values for key, values in filters.items() if values}
    return [network_json(network, {}) for network in front.engine.networks.list(wanted)]


async def _inspect(request: Request) -> Answer:
    return json_reply(await request.front.call(_described, request.front, request.params["id"]))


def _described(front: Front, name: str) -> dict[str, Any]:
    network = find_network(front, name)
    members = front.engine.networks.members(network.name)
    return network_json(network, {e.instance_id: _member(front, e) for e in members})


def _member(front: Front, endpoint: Endpoint) -> dict[str, str]:
    try:
        name = front.engine.get(endpoint.instance_id).name
    except NotFound:
        name = ""
    with_prefix = {
        ":" in address.address: f"{address.address}/{address.prefix}"
        for address in endpoint.addresses
    }
    return {
        "Name": name,
        "EndpointID": endpoint.id,
        "MacAddress": endpoint.mac,
        "IPv4Address": with_prefix.get(False, ""),
        "IPv6Address": with_prefix.get(True, ""),
    }


def network_json(network: NetworkRecord, members: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return all that Docker tells of a network."""
    subnets = []
    for subnet in network.subnets:
        entry: dict[str, Any] = {"Subnet": subnet.subnet}
        if subnet.ip_range:
            entry["IPRange"] = subnet.ip_range
        entry["Gateway"] = subnet.gateway
        if subnet.reserved:
            entry["AuxiliaryAddresses"] = subnet.reserved
        subnets.append(entry)
    return {
        "Name": network.name,
        "Id": network.id,
        "Created": timestamp(network.created_ns),
        "Scope": "local",
        "Driver": network.driver,
        "EnableIPv4": True,
        "EnableIPv6": network.ipv6,
        "IPAM": {"Driver": "default", "Options": None, "Config": subnets},
        "Internal": network.internal,
        "Attachable": network.attachable,
        "Ingress": False,
        "ConfigFrom": {"Network": ""},
        "ConfigOnly": False,
        "Containers": members,
        "Options": _told_options(network),
        "Labels": network.labels,
    }


def _told_options(network: NetworkRecord) -> dict[str, str]:
    if network.name == "bridge":
        return {
            "com.docker.network.bridge.default_bridge": "true",
            "com.docker.network.bridge.enable_icc": "true",
            "com.docker.network.bridge.enable_ip_masquerade": "true",
            "com.docker.network.bridge.host_binding_ipv4": "0.0.0.0",
            "com.docker.network.bridge.name": network.bridge,
            "com.docker.network.driver.mtu": str(network.mtu or 1500),
        }
    return {_OPTIONS.get(name, name): value for name, value in network.options.items()}


# ---- create and remove --------------------------------------------------------------------


async def _create(request: Request) -> Answer:
    body = await request.json(NetworkBody)
    front = request.front
    _check(body)
    ipam = body.ipam or IpamBody()
    subnets = ipam.config or []
    call = functools.partial(
        front.engine.networks.create,
        body.name,
        subnets=[one.subnet for one in subnets if one.subnet],
        gateways=[one.gateway for one in subnets if one.gateway],
        ip_ranges=[one.ip_range for one in subnets if one.ip_range],
        reserved={n: a for one in subnets for n, a in (one.auxiliary_addresses or {}).items()},
        internal=body.internal,
        ipv6=body.enable_ipv6,
        attachable=body.attachable,
        labels=body.labels or {},
        options=_engine_options(front.options.network_options | (body.options or {})),
    )
    try:
        network = await front.call_undoing(call, lambda made: _discard(front, made))
    except AlreadyExists as exc:
        if "bridge" in exc.message and body.name not in exc.message:
            raise
        raise ApiError(409, f"network with name {body.name} already exists") from None
    front.journal.poke()
    return json_reply({"Id": network.id, "Warning": ""}, 201)


def _discard(front: Front, made: NetworkRecord) -> None:
    try:
        front.engine.networks.remove(made.id)
    except (NotFound, Busy):
        return


def _check(body: NetworkBody) -> None:
    """Raise for what cannot be made here, in Docker's words where it has some."""
    if not body.name.strip():
        raise ApiError(400, "invalid network name: name is empty")
    if body.name in BUILTIN_NETWORKS:
        raise ApiError(403, f"operation is not permitted on predefined {body.name} network")
    driver = body.driver or "bridge"
    if driver == "overlay" or body.scope == "swarm" or body.ingress:
        raise ApiError(
            403,
            'This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" '
            "to connect this node to swarm and try again.",
        )
    if driver in ("host", "null", "none"):
        raise ApiError(403, f'only one instance of "{driver}" network is allowed')
    if driver != "bridge":
        raise ApiError(
            404, f"could not find plugin {driver} in v1 plugin registry: plugin not found"
        )
    refused = (
        ("ConfigOnly", body.config_only),
        ("ConfigFrom", any((body.config_from or {}).values())),
        ("EnableIPv4", body.enable_ipv4 is False),
        ("IPAM.Driver", body.ipam is not None and body.ipam.driver not in ("", "default")),
        ("IPAM.Options", body.ipam is not None and body.ipam.options),
    )
    for field, given in refused:
        if given:
            raise Unsupported(f"{field}: is not supported")


def _engine_options(given: dict[str, str]) -> dict[str, str]:
    found = {}
    for name, value in given.items():
        if name in _GIVEN_ANYWAY:
            if value not in _GIVEN_ANYWAY[name]:
                raise Unsupported(f"Options.{name}: {value!r} is not supported")
            continue
        found[name] = value
    return found


async def _remove(request: Request) -> Answer:
    await request.front.call_slow(_removed, request.front, request.params["id"])
    request.front.journal.poke()
    return empty(204)


def _removed(front: Front, name: str) -> None:
    network = find_network(front, name)
    try:
        front.engine.networks.remove(network.id)
    except WrongState:
        raise ApiError(
            403, f"{network.name} is a pre-defined network and cannot be removed"
        ) from None
    except Busy:
        members = front.engine.networks.members(network.name)
        who = ", ".join(f'name:"{_member(front, e)["Name"]}" id:"{e.id[:12]}"' for e in members)
        raise ApiError(
            403,
            f"error while removing network: network {network.name} has active endpoints ({who})",
        ) from None
    except NotFound:
        raise ApiError(404, f"network {name} not found") from None


async def _prune(request: Request) -> Answer:
    filters = request.query.filters()
    removed = await request.front.call_slow(_pruned, request.front, filters)
    return json_reply({"NetworksDeleted": removed or None})


def _pruned(front: Front, filters: dict[str, list[str]]) -> list[str]:
    spared = Spared(filters)
    wanted = {"label": filters["label"]} if filters.get("label") else None
    gone = front.engine.networks.prune(
        wanted, spare=lambda network: spared(network.labels, network.created_ns / 1e9)
    )
    note_prune(front, "network", 0)
    return gone


# ---- join and leave -----------------------------------------------------------------------


async def _connect(request: Request) -> Answer:
    body = await request.json(ConnectBody)
    front = request.front
    network = await front.call(find_network, front, request.params["id"])
    if network.driver != "bridge":
        raise ApiError(403, f"container cannot be connected to {network.name} network")
    instance = await find_container(request, body.container)
    given = body.endpoint_config
    options = attachment_options(network.name, given)
    call = functools.partial(
        front.engine.networks.connect,
        network.name,
        instance,
        aliases=options.get("alias") or (),
        ip=options.get("ip", ""),
        ip6=options.get("ip6", ""),
        mac_address=options.get("mac-address", ""),
        links=(given.links if given is not None else None) or (),
    )
    try:
        await front.call_slow(call)
    except AlreadyExists:
        raise ApiError(
            403,
            f"endpoint with name {instance.name} already exists in network {network.name}",
        ) from None
    front.journal.poke()
    return empty(200)


async def _disconnect(request: Request) -> Answer:
    body = await request.json(DisconnectBody)
    front = request.front
    network = await front.call(find_network, front, request.params["id"])
    try:
        instance = await find_container(request, body.container)
    except ApiError:
        if body.force:
            return empty(200)
        raise
    if network.driver == "host":
        raise ApiError(
            403, "container cannot be disconnected from host network or connected to host network"
        )
    call = functools.partial(
        front.engine.networks.disconnect, network.name, instance, force=body.force
    )
    try:
        await front.call_slow(call)
    except NotFound:
        raise ApiError(
            403, f"container {instance.id} is not connected to network {network.name}"
        ) from None
    front.journal.poke()
    return empty(200)


ROUTES = (
    Route(
        method="GET",
        path="/networks",
        handler=_list,
        summary="List networks",
        options={"filters": "works: dangling, driver, id, label, name, scope, type"},
    ),
    Route(
        method="GET",
        path="/networks/{id}",
        handler=_inspect,
        summary="Describe a network and who is in it",
        options={
            "verbose": "ignored: it is about swarms",
            "scope": "ignored: all networks are local",
        },
    ),
    Route(
        method="POST",
        path="/networks/create",
        handler=_create,
        summary="Make a network",
        options={
            "Name": "works; unique whatever `CheckDuplicate` says",
            "Driver": "works for bridge; refused: all others",
            "IPAM.Config": "works: Subnet, Gateway, IPRange, AuxiliaryAddresses",
            "IPAM.Driver": "refused, but for default",
            "Internal": "works",
            "EnableIPv6": "works",
            "EnableIPv4": "refused when false",
            "Options": "works: com.docker.network.driver.mtu, com.docker.network.bridge.name, "
            ".enable_ip_masquerade and .host_binding_ipv4; refused: others that ask for what is "
            "not so anyway",
            "Labels": "works",
            "Attachable": "works: it is told; networks of one host can be joined always",
            "Ingress": "refused, as by a Docker node that is no swarm manager",
            "ConfigOnly": "refused",
            "ConfigFrom": "refused",
        },
    ),
    Route(
        method="POST",
        path="/networks/{id}/connect",
        handler=_connect,
        summary="Have a container join, also while it runs",
        options={
            "EndpointConfig.IPAMConfig": "works: IPv4Address, IPv6Address",
            "EndpointConfig.Aliases": "works",
            "EndpointConfig.MacAddress": "works",
            "EndpointConfig.Links": "works: lines of `/etc/hosts`, which follow a restart of the "
            "other",
            "EndpointConfig.DriverOpts": "ignored",
            "EndpointConfig.GwPriority": "ignored: the first network that is not internal leads "
            "out",
        },
    ),
    Route(
        method="POST",
        path="/networks/{id}/disconnect",
        handler=_disconnect,
        summary="Have a container leave, also while it runs",
        options={"Force": "works"},
    ),
    Route(
        method="DELETE",
        path="/networks/{id}",
        handler=_remove,
        summary="Remove a network that nobody is in",
    ),
    Route(
        method="POST",
        path="/networks/prune",
        handler=_prune,
        summary="Remove networks that no container uses",
        options={"filters": "works: label, label!, until"},
        since=(1, 25),
    ),
)
