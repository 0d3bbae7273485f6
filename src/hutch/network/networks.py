"""Networks of one root: define them, connect instances, name and publish what is in them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from hutch.errors import Busy, Exhausted, InvalidArgument, WrongState
from hutch.ids import short_id
from hutch.linux.rtnetlink import RouteSocket
from hutch.network import endpoints, netns
from hutch.network.addresses import Subnet
from hutch.network.choices import NetworkChoices
from hutch.network.hostside import HostSide, choosing_subnets
from hutch.network.lookup import find, named
from hutch.network.model import (
    ADDRESSES,
    BUILTIN_NETWORKS,
    CURSORS,
    DEFAULT_NETWORK,
    ENDPOINTS,
    NETWORKS,
    PORTS,
    AddressLease,
    Cursor,
    Endpoint,
    NetworkRecord,
    PortLease,
    PublishedPort,
)
from hutch.records import Records, Transaction
from hutch.spec.model import NetworkAttachment, PortMapping

__all__ = ["NetworkView", "Networks"]


# The class below has a method `list`, which hides the type's name from its annotations.
Endpoints = list[Endpoint]
NetworkRecords = list[NetworkRecord]
Names = list[str]
PortLeases = list[PortLease]
HostSubnets = list[tuple[str, Subnet]]


class NetworkView(msgspec.Struct, frozen=True, kw_only=True):
    """A network and the endpoints in it."""

    network: NetworkRecord
    endpoints: tuple[Endpoint, ...]


class Networks:
    """The networks of one root. Thread-safe; several processes may use one root."""

    def __init__(self, root: Path, records: Records) -> None:
        self._records = records
        self._host = HostSide(root, records)
        self._settled: set[str] = set()
        self.choices = NetworkChoices()

    def configure(self, choices: NetworkChoices) -> bool:
        """Choose by these from now on. A default network that does not fit is made anew; return
        whether it fits, which it does not while somebody is in it.

        Raises `InvalidArgument` for a default network that cannot be; all stays as it was.
        """
        from hutch.network import bridge, definitions

        with self._records.read() as tx:
            network = tx.get(NETWORKS, DEFAULT_NETWORK, NetworkRecord)
        if network is None or definitions.fits(network, choices):
            self.choices = choices
            return True
        with RouteSocket() as route:
            taken = bridge.host_subnets(route, but=network.bridge)
            mtu = bridge.uplink_mtu(route)
        with self._records.write() as tx:
            if endpoints.members_of(tx, network.id):
                self.choices = choices
                return False
            tx.delete(NETWORKS, DEFAULT_NETWORK)
            definitions.define_builtin(tx, taken, mtu, choices=choices, identity=network)
            for key, _ in tx.items(CURSORS, Cursor, f"{network.id}/"):
                tx.delete(CURSORS, key)
        self.choices = choices
        self._settled.discard(network.id)
        self._host.forget(network)
        return True

    # ---- networks ---------------------------------------------------------------------

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
        dns: bool = True,
    ) -> NetworkRecord:
        """Define a network; its bridge is made when the first instance is attached.

        Without subnets a free private one is chosen. Raises `AlreadyExists`,
        `InvalidArgument` naming the field, `Unsupported` for another driver.
        """
        from hutch.network import bridge, definitions

        request = definitions.NetworkRequest(
            name=name,
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
            dns=dns,
        )
        self.ensure_default()
        with RouteSocket() as route:
            taken = bridge.host_subnets(route)
        with self._records.write() as tx:
            network = definitions.define(tx, request, taken, self.choices.pools)
            tx.event("network", "create", network.name, id=network.id, driver=driver)
        return network

    def _settle(self, name: str) -> None:
        """See that a network has its bridge before its first use by this process.

        Until then a subnet that was chosen is only a proposal: where another root or the
        host has taken it meanwhile, and nobody is in the network, it is chosen anew.
        """
        if name == DEFAULT_NETWORK:
            self.ensure_default()
        with self._records.read() as tx:
            network = named(tx, name)
        if network.id in self._settled or not network.bridge:
            return
        from hutch.network import bridge

        with RouteSocket() as route:
            if route.link(network.bridge) is None:
                with choosing_subnets():
                    taken = bridge.host_subnets(route)
                    with self._records.write() as tx:
                        self._choose_again(tx, route, name, taken)
                    self._host.ensure_bridge(route, name)
        self._settled.add(network.id)

    def _choose_again(
        self, tx: Transaction, route: RouteSocket, name: str, taken: HostSubnets
    ) -> None:
        from hutch.network import bridge, definitions

        network = named(tx, name)
        if endpoints.members_of(tx, network.id):
            return
        if name != DEFAULT_NETWORK:
            definitions.choose_again(tx, network, taken, self.choices.pools)
            return
        tx.delete(NETWORKS, DEFAULT_NETWORK)
        mtu = bridge.uplink_mtu(route)
        definitions.define_builtin(tx, taken, mtu, choices=self.choices, identity=network)

    def ensure_default(self) -> NetworkRecord:
        """Return the network `bridge`, defined on first use with a free private subnet."""
        with self._records.read() as tx:
            network = tx.get(NETWORKS, DEFAULT_NETWORK, NetworkRecord)
        if network is not None:
            return network
        from hutch.network import bridge, definitions

        with RouteSocket() as route:
            taken, mtu = bridge.host_subnets(route), bridge.uplink_mtu(route)
        with self._records.write() as tx:
            return definitions.define_builtin(tx, taken, mtu, choices=self.choices)

    def get(self, reference: str) -> NetworkRecord:
        """Return a network by name, id or unambiguous id prefix; raise `NotFound`."""
        if reference in BUILTIN_NETWORKS:
            self.ensure_default()
        with self._records.read() as tx:
            return find(tx, reference)

    def list(self, filters: Mapping[str, Sequence[str]] | None = None) -> NetworkRecords:
        """Return the networks that pass Docker's filters, by name."""
        from hutch.network import definitions

        with suppress(Exhausted):  # a full disk: what there is can be told all the same
            self.ensure_default()
        with self._records.read() as tx:
            networks = [network for _, network in tx.items(NETWORKS, NetworkRecord)]
            used = {e.network_id for _, e in tx.items(ENDPOINTS, Endpoint)}
        return [n for n in networks if definitions.matches(n, filters or {}, n.id in used)]

    def inspect(self, reference: str) -> NetworkView:
        """Return a network with its endpoints."""
        network = self.get(reference)
        with self._records.read() as tx:
            members = endpoints.members_of(tx, network.id)
        return NetworkView(network=network, endpoints=tuple(members))

    def remove(self, reference: str) -> NetworkRecord:
        """Remove a network; `Busy` naming its instances while it has any."""
        network = self.get(reference)
        if network.name in BUILTIN_NETWORKS:
            raise WrongState(f"network {network.name} is built in and cannot be removed")
        with self._records.write() as tx:
            self._drop(tx, network)
        self._host.forget(network)
        return network

    def _drop(self, tx: Transaction, network: NetworkRecord) -> None:
        members = endpoints.members_of(tx, network.id)
        if members:
            who = ", ".join(sorted(short_id(e.instance_id) for e in members)[:5])
            raise Busy(
                f"network {network.name} has {len(members)} endpoint(s): instances {who}",
                hint="disconnect or remove them first",
            )
        tx.delete(NETWORKS, network.name)
        for key, _ in tx.items(CURSORS, Cursor, f"{network.id}/"):
            tx.delete(CURSORS, key)
        tx.event("network", "destroy", network.name, id=network.id, driver=network.driver)

    def prune(self, filters: Mapping[str, Sequence[str]] | None = None) -> Names:
        """Remove every network that nobody uses, the built-in ones left; return the names."""
        removed = []
        for network in self.list(filters):
            if network.name in BUILTIN_NETWORKS:
                continue
            try:
                self.remove(network.id)
            except Busy:
                continue
            removed.append(network.name)
        return removed

    # ---- instances --------------------------------------------------------------------

    def prepare(
        self,
        instance_id: str,
        attachments: Sequence[NetworkAttachment],
        *,
        name: str = "",
        hostname: str = "",
        ports: Sequence[PortMapping] = (),
        dns: Sequence[str] = (),
    ) -> Endpoints:
        """Decide an instance's endpoints before its start: all of them or none.

        `name`, `hostname`, the aliases and the short id resolve for the other members of
        a user-defined network; `dns` are the servers asked for names from outside.

        The first network that is not internal gives the default route and the published
        ports. What an earlier start of the same instance left is given back first.
        """
        for attachment in attachments:
            self._settle(attachment.name)
        elsewhere = self._host.ports_of_others() if ports else []
        if ports:
            self._host.release_ports(self.endpoints(instance_id))
        with self._records.write() as tx:
            stale = endpoints.endpoints_of(tx, instance_id)
            freed = self._release_all(tx, instance_id)
            networks = [named(tx, attachment.name) for attachment in attachments]
            made = self._create_all(
                tx,
                networks,
                attachments,
                ports,
                instance_id=instance_id,
                name=name,
                hostname=hostname,
                elsewhere=elsewhere,
                dns=dns,
            )
        self._host.forget_rates(stale)
        self._host.close_ports(freed)
        return made

    def _create_all(
        self,
        tx: Transaction,
        networks: Sequence[NetworkRecord],
        attachments: Sequence[NetworkAttachment],
        ports: Sequence[PortMapping],
        *,
        instance_id: str,
        name: str,
        hostname: str,
        elsewhere: Sequence[PublishedPort],
        dns: Sequence[str],
    ) -> Endpoints:
        self._check_attachable(networks)
        outward = next((n for n in networks if not n.internal), None)
        made = []
        for number, (network, attachment) in enumerate(zip(networks, attachments, strict=True)):
            is_outward = network is outward
            publishes = is_outward or (outward is None and number == 0)
            made.append(
                endpoints.create_endpoint(
                    tx,
                    network,
                    attachment,
                    instance_id=instance_id,
                    name=name,
                    hostname=hostname,
                    number=number,
                    default_route=is_outward,
                    ports=ports if publishes else (),
                    elsewhere=elsewhere,
                    dns=dns,
                )
            )
        return made

    def _check_attachable(self, networks: Sequence[NetworkRecord]) -> None:
        seen: set[str] = set()
        for number, network in enumerate(networks):
            field = f"networks[{number}].name"
            if not network.bridge:
                raise InvalidArgument(
                    f"{network.name} cannot be combined with other networks", field=field
                )
            if network.id in seen:
                raise InvalidArgument(f"{network.name} is named twice", field=field)
            seen.add(network.id)

    def _release_all(self, tx: Transaction, instance_id: str) -> PortLeases:
        freed = []
        for endpoint in endpoints.endpoints_of(tx, instance_id):
            freed.extend(endpoints.release_endpoint(tx, endpoint))
        return freed

    def attach(self, endpoint: Endpoint, pid: int) -> None:
        """Give process `pid`'s network namespace the endpoint's interface, addressed, up and
        routed; open its ports and let its names resolve.

        When it returns, packets pass: nothing is left to do inside. On failure the records keep
        the endpoint until `detach`; the interfaces die with the namespace.
        """
        self._host.attach(endpoint, pid)

    def attach_tap(self, endpoint: Endpoint, pid: int, tap: int, number: int) -> None:
        """The same for a virtual machine: the interface leads to the tap device of index
        `tap`, the machine's device `number`, in the namespace of process `pid`. Addresses
        and routes are the guest's own to set."""
        from hutch.network.taps import join_messages

        self._host.attach(endpoint, pid, join_messages(endpoint, tap, number))

    def detach(self, instance_id: str) -> None:
        """Give back all that an instance that has ended held; idempotent."""
        with self._records.read() as tx:
            held = endpoints.endpoints_of(tx, instance_id)
        if not held:
            return
        self._host.release_ports(held)
        self._host.forget_rates(held)
        with self._records.write() as tx:
            freed = self._release_all(tx, instance_id)
        self._host.close_ports(freed)
        self._host.refresh_names({endpoint.network_id for endpoint in held if endpoint.dns})

    def endpoints(self, instance_id: str) -> Endpoints:
        """Return an instance's endpoints in the order of their interfaces."""
        with self._records.read() as tx:
            return endpoints.endpoints_of(tx, instance_id)

    def connect(
        self,
        instance_id: str,
        attachment: NetworkAttachment,
        pid: int,
        *,
        name: str = "",
        hostname: str = "",
        ports: Sequence[PortMapping] = (),
        dns: Sequence[str] = (),
        attach: Callable[[Endpoint], None] | None = None,
    ) -> Endpoint:
        """Connect a running instance (its process `pid`) to one more network.

        Where it leads outside and no other one does, it gives the default route and publishes
        the `ports`.
        `attach` is what does so for a virtual machine, with `attach_tap` among it.
        """
        self._settle(self.get(attachment.name).name)
        network = self.get(attachment.name)
        self._check_attachable([network])
        elsewhere = self._host.ports_of_others() if ports else []
        with self._records.write() as tx:
            held = endpoints.endpoints_of(tx, instance_id)
            if any(e.network_id == network.id for e in held):
                raise WrongState(
                    f"instance {short_id(instance_id)} is connected to {network.name} already"
                )
            numbers = {int(e.interface.removeprefix("eth")) for e in held}
            number = next(n for n in range(len(numbers) + 1) if n not in numbers)
            is_outward = not network.internal and not any(e.default_route for e in held)
            endpoint = endpoints.create_endpoint(
                tx,
                network,
                attachment,
                instance_id=instance_id,
                name=name,
                hostname=hostname,
                number=number,
                default_route=is_outward,
                ports=ports if is_outward and not any(e.ports for e in held) else (),
                elsewhere=elsewhere,
                dns=dns,
            )
            tx.event(
                "network",
                "connect",
                network.name,
                instance=instance_id,
                id=network.id,
                driver=network.driver,
            )
        try:
            if attach is None:
                self.attach(endpoint, pid)
            else:
                attach(endpoint)
        except BaseException:
            self._host.remove_link(endpoint.host_interface)
            self._host.forget_rates([endpoint])
            self._host.release_ports([endpoint])
            with self._records.write() as tx:
                freed = endpoints.release_endpoint(tx, endpoint)
            self._host.close_ports(freed)
            raise
        if not endpoint.dns:  # its names are told to the networks it was in before
            self._host.refresh_names({e.network_id for e in held if e.dns})
        return endpoint

    def disconnect(
        self, instance_id: str, reference: str, pid: int | None, *, routed: bool = True
    ) -> Endpoint:
        """Disconnect an instance from a network, live where `pid` names its process.

        The default route and the published ports move to another network that leads outside,
        if there is one. Without `routed` the route is for the caller to set, as in a guest.
        """
        network = self.get(reference)
        successor: Endpoint | None = None
        self._host.release_ports(
            e for e in self.endpoints(instance_id) if e.network_id == network.id
        )
        with self._records.write() as tx:
            endpoint = endpoints.find_endpoint(tx, instance_id, network)
            freed = endpoints.release_endpoint(tx, endpoint)
            if endpoint.default_route:
                successor = endpoints.promote(tx, instance_id, freed)
            tx.event(
                "network",
                "disconnect",
                network.name,
                instance=instance_id,
                id=network.id,
                driver=network.driver,
            )
        self._host.close_ports(freed)
        self._host.remove_link(endpoint.host_interface)
        self._host.forget_rates([endpoint])
        left = {e.network_id for e in self.endpoints(instance_id) if e.dns}
        self._host.refresh_names(left | ({network.id} if network.dns else set()))
        if successor is not None and pid is not None:
            if routed:
                routes = endpoints.route_messages(successor)
                netns.configure(pid, routes, ignore=(errno.EEXIST,))
            self._host.publish(successor, pid)
        return endpoint

    def set_rates(
        self, instance_id: str, reference: str, *, rx_rate: int, tx_rate: int
    ) -> Endpoint:
        """Change what a running instance may receive and send in a network, in bits per
        second; 0 is no limit. On a refusal the records keep what was."""
        network = self.get(reference)
        with self._records.read() as tx:
            before = endpoints.find_endpoint(tx, instance_id, network)
        wanted = msgspec.structs.replace(before, rx_rate=rx_rate, tx_rate=tx_rate)
        with RouteSocket() as route:
            self._host.limit(route, wanted, changed=True)
        with self._records.write() as tx:
            present = endpoints.find_endpoint(tx, instance_id, network)
            return endpoints.set_rates(tx, present, rx_rate, tx_rate)

    # ---- after crashes ----------------------------------------------------------------

    def rename(self, instance_id: str, old: str, new: str) -> None:
        """Let an instance's new name resolve in place of the old one."""
        with self._records.write() as tx:
            held = [e for e in endpoints.endpoints_of(tx, instance_id) if e.dns]
            for endpoint in held:
                endpoints.rename(tx, endpoint, old, new)
        self._host.refresh_names({endpoint.network_id for endpoint in held})

    def reconcile(self, is_live: Callable[[str], bool]) -> Names:
        """Put records and host right; return the instances whose leftovers were dropped.

        `is_live(instance_id)` is asked inside the write transaction, so that an instance
        that is just being started cannot be lost. Bridges of networks with members and a
        flushed table are made again, as after a reboot of the host.
        """
        dropped: set[str] = set()
        with self._records.write() as tx:
            for _, endpoint in tx.items(ENDPOINTS, Endpoint):
                if not is_live(endpoint.instance_id):
                    endpoints.release_endpoint(tx, endpoint)
                    dropped.add(endpoint.instance_id)
            remaining = [endpoint for _, endpoint in tx.items(ENDPOINTS, Endpoint)]
            _drop_orphans(tx, {endpoint.id for endpoint in remaining})
        self._host.release_ports_of_others({endpoint.id for endpoint in remaining})
        self._host.repair(remaining)
        with self._records.read() as tx:
            networks = {n.id for _, n in tx.items(NETWORKS, NetworkRecord) if n.dns}
        self._host.refresh_names(networks, start=True)
        return sorted(dropped)

    def teardown(self) -> None:
        """Take this root's bridges and its table off the host; definitions stay, and what
        is needed is made again. For the removal of a root, and for tests."""
        self._host.remove_all()


def _drop_orphans(tx: Transaction, endpoint_ids: set[str]) -> None:
    """Remove leases of endpoints that are no more."""
    for key, address in tx.items(ADDRESSES, AddressLease):
        if address.endpoint_id not in endpoint_ids:
            tx.delete(ADDRESSES, key)
    for key, port in tx.items(PORTS, PortLease):
        if port.endpoint_id not in endpoint_ids:
            tx.delete(PORTS, key)
