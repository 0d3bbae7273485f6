"""Networks of an engine, and connecting running instances to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from hutch.drivers.base import Pluggable
from hutch.engine.context import Context
from hutch.engine.etc import rewrite_files
from hutch.engine.finish import refresh_locked
from hutch.engine.instance import Instance
from hutch.engine.links import add_links, read_links
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import all_records, find_id, load, load_in
from hutch.engine.records import INSTANCES, InstanceRecord
from hutch.engine.start import attachments, uses_networks
from hutch.errors import (
    AlreadyExists,
    Busy,
    InvalidArgument,
    NotFound,
    Unsupported,
    WrongState,
)
from hutch.lifecycle import State
from hutch.spec.model import NetworkAttachment
from hutch.spec.networks import check_attachment
from hutch.units import parse_rate

if TYPE_CHECKING:
    from hutch.network import Endpoint, NetworkRecord

__all__ = ["Networks"]

_LIVE = (State.RUNNING, State.PAUSED)


# A method named `list` hides the type from the annotations after it.
Names = list[str]


class Networks:
    """The networks of one root."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._networks = context.networks

    def create(
        self,
        name: str,
        *,
        driver: str = "bridge",
        subnets: Sequence[str] = (),
        gateways: Sequence[str] = (),
        ip_ranges: Sequence[str] = (),
        reserved: Mapping[str, str] | None = None,
        internal: bool = False,
        ipv6: bool = False,
        attachable: bool = False,
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> NetworkRecord:
        """Create a network; without subnets a free one is chosen. `reserved` are addresses, by
        name, that no instance gets; `attachable` changes nothing here, and is told."""
        if self._context.rootless:
            raise Unsupported(
                f"network {name}: networks of one's own need root",
                hint="use the default network, none or host",
            )
        return self._networks.create(
            name,
            driver=driver,
            subnets=subnets,
            gateways=gateways,
            ip_ranges=ip_ranges,
            reserved=reserved or {},
            internal=internal,
            ipv6=ipv6,
            attachable=attachable,
            labels=labels or {},
            options=options or {},
        )

    def get(self, name_or_id: str) -> NetworkRecord:
        """Return a network by name, identifier or unique prefix of it."""
        return self._networks.get(name_or_id)

    def list(self, filters: Mapping[str, Sequence[str]] | None = None) -> list[NetworkRecord]:
        """Return the networks, by name."""
        return self._networks.list(filters)

    def members(self, name_or_id: str) -> tuple[Endpoint, ...]:
        """Return the endpoints of the running instances in a network."""
        return self._networks.inspect(name_or_id).endpoints

    def remove(self, name_or_id: str) -> None:
        """Remove a network that nobody uses; raise `Busy` otherwise."""
        self._networks.remove(name_or_id)

    def prune(
        self,
        filters: Mapping[str, Sequence[str]] | None = None,
        *,
        spare: Callable[[NetworkRecord], bool] | None = None,
    ) -> Names:
        """Remove the user-defined networks that no instance names, but for those to `spare`;
        return their names."""
        wanted: set[str] = set()
        for record in all_records(self._context):
            wanted.update(attachment.name for attachment in record.spec.networks)
        removed = []
        for network in self._networks.list(filters):
            if network.name in wanted or not network.bridge or network.name == "bridge":
                continue
            if spare is not None and spare(network):
                continue
            try:
                self._networks.remove(network.name)
            except Busy:
                continue
            removed.append(network.name)
        return removed

    def teardown(self) -> None:
        """Take this root's bridges and packet rules off the host; definitions stay, and the
        next start makes what it needs. For a root that is about to be removed."""
        self._networks.teardown()

    def connect(
        self,
        network: str,
        instance: Instance | str,
        *,
        aliases: Sequence[str] = (),
        ip: str = "",
        ip6: str = "",
        mac_address: str = "",
        rx_rate: str | int = 0,
        tx_rate: str | int = 0,
        links: Sequence[str] = (),
    ) -> None:
        """Give an instance an endpoint in a further network, live where it runs.

        `rx_rate` and `tx_rate` limit what it may receive and send: bits per second, or a
        text such as `10mbit`. `links` are `NAME[:ALIAS]`: others there, and what this
        instance calls them.
        """
        attachment = NetworkAttachment(
            name=self._networks.get(network).name,
            aliases=tuple(aliases),
            ipv4=ip,
            ipv6=ip6,
            mac=mac_address,
            rx_rate=parse_rate(rx_rate, field="rx_rate"),
            tx_rate=parse_rate(tx_rate, field="tx_rate"),
        )
        check_attachment(attachment, "network")
        identifier = self._identifier(instance)
        context = self._context
        with instance_lock(context, identifier):
            record = refresh_locked(context, load(context, identifier))
            linked = read_links(context, record.spec, attachment.name, links) if links else ()
            held = attachments(record)
            if not uses_networks(record) and record.spec.network_mode != "none":
                raise InvalidArgument(
                    f"instance {record.name} shares the network of {record.spec.network_mode!r}",
                    field="network",
                )
            if any(item.name == attachment.name for item in held):
                raise AlreadyExists(
                    f"instance {record.name} is in network {attachment.name} already"
                )
            if record.state in _LIVE:
                self._networks.connect(
                    record.id,
                    attachment,
                    pid=record.pid,
                    name=record.name,
                    hostname=record.spec.hostname,
                    ports=record.spec.ports,
                    dns=record.spec.dns,
                    attach=self._plugger(record),
                )
            self._store(record, (*held, attachment))
            if linked:
                add_links(context, record, linked)
            self._rewrite(identifier)

    def disconnect(self, network: str, instance: Instance | str, *, force: bool = False) -> None:
        """Take an instance out of a network, live where it runs."""
        name = self._networks.get(network).name
        identifier = self._identifier(instance)
        context = self._context
        with instance_lock(context, identifier):
            record = refresh_locked(context, load(context, identifier))
            held = attachments(record)
            left = tuple(item for item in held if item.name != name)
            if len(left) == len(held):
                if force:
                    return
                raise NotFound(f"instance {record.name} is not in network {name}")
            if record.state in _LIVE:
                self._disconnect(record, name)
            self._store(record, left)
            self._rewrite(identifier)

    def _plugger(self, record: InstanceRecord) -> Callable[[Endpoint], None] | None:
        """Return what gives a running virtual machine an endpoint, None for a container."""
        driver = self._context.driver(record.spec.isolation)
        if not isinstance(driver, Pluggable):
            return None
        if record.state is State.PAUSED:
            raise WrongState(
                f"instance {record.name} is paused", hint="unpause it to change its networks"
            )

        def attach(endpoint: Endpoint) -> None:
            def join(tap: int, number: int) -> None:
                self._networks.attach_tap(endpoint, record.pid, tap, number)

            driver.plug_network(record.id, record.pid, endpoint, join)

        return attach

    def _disconnect(self, record: InstanceRecord, network: str) -> None:
        driver = self._context.driver(record.spec.isolation)
        if not isinstance(driver, Pluggable):
            self._networks.disconnect(record.id, network, pid=record.pid)
            return
        self._plugger(record)  # it must be able to answer
        endpoint = self._networks.disconnect(record.id, network, record.pid, routed=False)
        successor = None
        if endpoint.default_route:
            left = self._networks.endpoints(record.id)
            successor = next((other for other in left if other.default_route), None)
        driver.unplug_network(record.id, record.pid, endpoint, successor)

    def _rewrite(self, identifier: str) -> None:
        rewrite_files(self._context, load(self._context, identifier))

    def _identifier(self, instance: Instance | str) -> str:
        return instance.id if isinstance(instance, Instance) else find_id(self._context, instance)

    def _store(self, record: InstanceRecord, wanted: tuple[NetworkAttachment, ...]) -> None:
        mode = wanted[0].name if wanted else "none"
        spec = msgspec.structs.replace(record.spec, networks=wanted, network_mode=mode)
        with self._context.store.write(durable=True) as tx:
            present = load_in(tx, record.id)
            changed = msgspec.structs.replace(
                present, spec=spec, endpoints=tuple(item.name for item in wanted)
            )
            tx.put(INSTANCES, record.id, changed)
