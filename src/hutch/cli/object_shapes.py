"""Images, networks and volumes in the JSON shapes that `docker inspect` has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hutch.cli.output import stamp

if TYPE_CHECKING:
    from hutch.image.records import ImageRecord
    from hutch.network.model import Endpoint, NetworkRecord
    from hutch.storage.volumes import Volume

__all__ = ["familiar", "image_shape", "network_shape", "volume_shape"]


def familiar(canonical: str) -> str:
    """Return a reference as people write it: `debian:bookworm`, `me/tool:1`."""
    from hutch.oci.reference import parse

    return parse(canonical).familiar()


def image_shape(record: ImageRecord) -> dict[str, Any]:
    """Return an image as `docker image inspect` shows it."""
    config = record.config
    return {
        "Id": record.id,
        "RepoTags": [familiar(name) for name in record.names],
        "RepoDigests": [familiar(name) for name in record.repo_digests],
        "Created": record.created or "0001-01-01T00:00:00Z",
        "Author": record.author,
        "Comment": record.comment,
        "Architecture": record.architecture,
        "Variant": record.variant,
        "Os": record.os,
        "Size": image_size(record),
        "Config": {
            "User": config.user,
            "ExposedPorts": {port: {} for port in config.exposed_ports},
            "Env": list(config.env),
            "Cmd": list(config.cmd),
            "Entrypoint": list(config.entrypoint) or None,
            "Volumes": {path: {} for path in config.volumes} or None,
            "WorkingDir": config.workdir,
            "Labels": config.labels,
            "StopSignal": config.stop_signal,
            "Shell": list(config.shell) or None,
            **_healthcheck(record),
        },
        "RootFS": {"Type": "layers", "Layers": [layer.diff_id for layer in record.layers]},
        "Metadata": {"LastTagTime": stamp(int(record.tagged_at * 1e9))},
    }


def image_size(record: ImageRecord) -> int:
    """Return the bytes of an image's files, or of its blobs where those are not known."""
    return sum(layer.unpacked_size or layer.size for layer in record.layers)


def _healthcheck(record: ImageRecord) -> dict[str, Any]:
    check = record.config.healthcheck
    if check is None:
        return {}
    return {
        "Healthcheck": {
            "Test": list(check.test),
            "Interval": int(check.interval_s * 1e9),
            "Timeout": int(check.timeout_s * 1e9),
            "StartPeriod": int(check.start_period_s * 1e9),
            "Retries": check.retries,
        }
    }


def network_shape(network: NetworkRecord, endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """Return a network as `docker network inspect` shows it."""
    return {
        "Name": network.name,
        "Id": network.id,
        "Created": stamp(network.created_ns),
        "Scope": "local",
        "Driver": network.driver,
        "EnableIPv6": network.ipv6,
        "IPAM": {
            "Driver": "default",
            "Config": [
                {
                    "Subnet": subnet.subnet,
                    "Gateway": subnet.gateway,
                    **({"IPRange": subnet.ip_range} if subnet.ip_range else {}),
                    **({"AuxiliaryAddresses": subnet.reserved} if subnet.reserved else {}),
                }
                for subnet in network.subnets
            ],
        },
        "Internal": network.internal,
        "Attachable": network.attachable,
        "Containers": {
            endpoint.instance_id: {
                "Name": endpoint.names[0] if endpoint.names else "",
                "EndpointID": endpoint.id,
                "MacAddress": endpoint.mac,
                "IPv4Address": _with_prefix(endpoint, six=False),
                "IPv6Address": _with_prefix(endpoint, six=True),
            }
            for endpoint in endpoints
        },
        "Options": network.options,
        "Labels": network.labels,
        "Bridge": network.bridge,
    }


def _with_prefix(endpoint: Endpoint, *, six: bool) -> str:
    for address in endpoint.addresses:
        if (":" in address.address) == six:
            return f"{address.address}/{address.prefix}"
    return ""


def volume_shape(volume: Volume) -> dict[str, Any]:
    """Return a volume as `docker volume inspect` shows it."""
    return {
        "CreatedAt": stamp(int(volume.created_at * 1e9)),
        "Driver": volume.driver,
        "Labels": volume.labels,
        "Mountpoint": volume.path,
        "Name": volume.name,
        "Options": volume.options or None,
        "Scope": "local",
    }
