"""What stands in the way of an instance that another hutch offers: everything at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address, ip_network

from hutch.engine.context import Context
from hutch.engine.records import NAMES, InstanceRecord, NameRecord
from hutch.errors import HutchError, NotFound
from hutch.migration.messages import Offer
from hutch.network.model import PublishedPort
from hutch.network.ports import check_port_free
from hutch.oci.platform import host_platform
from hutch.spec.build import check_name
from hutch.spec.model import NetworkAttachment

__all__ = ["obstacles"]

# What is asked for beside what is allocated at the source, which goes on growing while it is
# copied: so much, and a sixteenth.
_SPARE = 64 << 20
_SPARE_PART = 16


def obstacles(context: Context, offer: Offer, record: InstanceRecord) -> list[str]:
    """Return why the instance cannot come here, one line each; nothing if it can."""
    found: list[str] = []
    _note(found, lambda: check_name(record.name))
    with context.store.read() as tx:
        taken = tx.get(NAMES, record.name, NameRecord)
    if taken is not None:
        found.append(f"name {record.name!r} is taken by instance {taken.id[:12]} at the target")
    here = host_platform()
    image = offer.image
    if image is not None and image.architecture not in ("", here.architecture):
        found.append(f"its image is for {image.platform}, the target is {here}")
    _note(found, lambda: context.driver(record.spec.isolation).check(record.spec))
    _note(found, lambda: _check_devices(context, record))
    if record.spec.isolation == "vm":
        from hutch.engine.migrate_disks import obstacles_there
        from hutch.engine.migrate_machines import machine_obstacles

        found += obstacles_there(record)
        found += machine_obstacles(context, offer, record)
    for network in record.spec.networks:
        _check_network(context, network, found)
    if offer.criu is not None:
        from hutch.engine.migrate_container import criu_obstacles

        found += criu_obstacles(context, offer.criu, record)
    if offer.live is not None or offer.criu is not None:
        _check_ports(record, found)
    _check_mounts(context, offer, record, found)
    _check_room(context, offer, record.spec.isolation == "vm", found)
    return found


def _note(found: list[str], check: Callable[[], object]) -> None:
    try:
        check()
    except HutchError as exc:
        found.append(f"target: {exc.message}")


def _check_devices(context: Context, record: InstanceRecord) -> None:
    if record.spec.device_names or record.spec.gpus:
        from hutch.engine.devices import check_devices

        check_devices(context, record.spec)


def _check_network(context: Context, asked: NetworkAttachment, found: list[str]) -> None:
    try:
        network = context.networks.get(asked.name)
    except NotFound:
        found.append(
            f"network {asked.name} is not at the target (make it there: hutch network create)"
        )
        return
    nets = [ip_network(subnet.subnet) for subnet in network.subnets]
    for address in filter(None, (asked.ipv4, asked.ipv6)):
        if not any(ip_address(address) in net for net in nets):
            found.append(f"address {address} is not one of network {asked.name} at the target")


def _check_ports(record: InstanceRecord, found: list[str]) -> None:
    """A machine at rest is not in the way of whoever has its ports now."""
    for mapping in record.spec.ports:
        if mapping.host_port and not mapping.host_port_end:
            port = PublishedPort(
                container_port=mapping.container_port,
                host_port=mapping.host_port,
                host_ip=mapping.host_ip,
                protocol=mapping.protocol,
            )
            _note(found, partial(check_port_free, port, field="publish"))


def _check_mounts(context: Context, offer: Offer, record: InstanceRecord, found: list[str]) -> None:
    for mount in record.mounts:
        if mount.type == "bind" and not os.path.exists(mount.source):
            found.append(f"directory {mount.source} of the host is not at the target")
    for volume in offer.volumes:
        try:
            context.volumes.get(volume.name)
        except NotFound:
            if not volume.sent:
                found.append(f"volume {volume.name} is not at the target (--with-volumes sends it)")
        else:
            if volume.sent:
                found.append(f"volume {volume.name} is at the target already")


def _check_room(context: Context, offer: Offer, is_machine: bool, found: list[str]) -> None:
    image = offer.image
    needed = offer.size + sum(volume.size for volume in offer.volumes if volume.sent)
    if image is not None and context.images.by_id(image.id) is None:
        needed += image.compressed_size + image.size
    if image is not None and is_machine and not context.rootdisks.has(image.chain_ids):
        needed += image.size
    if offer.kernel is not None:
        needed += offer.kernel.size
    status = os.statvfs(context.root)
    free = status.f_bavail * status.f_frsize
    needed += needed // _SPARE_PART + _SPARE
    if needed > free:
        found.append(f"it needs {needed} bytes of disk, the target has {free} free")
