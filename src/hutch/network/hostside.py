"""The host's side of networks: bridges, veth pairs, the table, under one lock per root."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from hutch.errors import Busy, Denied, Unsupported
from hutch.linux import rtnetlink
from hutch.linux.locks import lock_file
from hutch.linux.rtnetlink import LinkInfo, RouteSocket
from hutch.network import firewall, netns
from hutch.network.addresses import parse_mac
from hutch.network.dns import NameServers
from hutch.network.endpoints import container_messages
from hutch.network.model import (
    ENDPOINTS,
    HOST,
    NETWORKS,
    PORTS,
    Endpoint,
    NetworkRecord,
    PortLease,
    PublishedPort,
    Sysctl,
)
from hutch.network.proxies import PortProxies
from hutch.records import Records

__all__ = ["HostSide", "choosing_subnets"]

_ATTEMPTS = 8
_CHOICE_LOCK = "/run/hutch-networks.lock"
_CHOICE_TIMEOUT_S = 60.0


@contextmanager
def choosing_subnets() -> Iterator[None]:
    """Keep the roots of this host from choosing the same subnet: hold this from looking at
    what is taken until the bridge is there. Without a writable /run it holds nothing."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(_CHOICE_LOCK, timeout_s=_CHOICE_TIMEOUT_S))
        except OSError:
            pass
        yield


class HostSide:
    """What the kernel of the host holds for the networks of one root.

    Bridges and the table are made from the records when first needed and can be made
    again at any time; a lock file keeps the processes that do so apart.
    """

    def __init__(self, root: Path, records: Records) -> None:
        self._root = root
        self._directory = root / "networks"
        self._records = records
        self._names = NameServers(self._directory, records)
        self._proxies = PortProxies(self._directory)
        self._verified = -1
        self.table = firewall.table_name(root)

    def lock(self) -> AbstractContextManager[int]:
        """Keep other threads and processes from changing the host's side of this root."""
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        return lock_file(self._directory / "lock")

    # ---- attach and detach ------------------------------------------------------------

    def attach(
        self, endpoint: Endpoint, pid: int, configuration: Sequence[bytes] | None = None
    ) -> None:
        """Make the pair of interfaces into the namespace of `pid`, ready to carry packets
        on both sides; open the ports, tell the name. `configuration` are the messages that
        set up the far side, in place of the endpoint's addresses."""
        with RouteSocket() as route:
            link = route.link(endpoint.bridge)
            if link is None or not link.is_up or link.kind != "bridge":
                link = self.ensure_bridge(route, endpoint.network)
            index = self._add_pair(route, endpoint, link, pid)
            self.limit(route, endpoint)
            if configuration is None:
                configuration = container_messages(endpoint)
            self._configure(endpoint, pid, configuration)
            # The near side, and a bridge that had no member, carry packets only when a work
            # queue has noticed; a packet before that is lost, and sent again after a second.
            route.request(rtnetlink.get_link(index), rtnetlink.get_link(link.index))
        self._proxies.start(endpoint, pid)
        self.open_ports(endpoint)
        if endpoint.dns:
            self.refresh_names([endpoint.network_id], start=True)

    def limit(self, route: RouteSocket, endpoint: Endpoint, *, changed: bool = False) -> None:
        """Hold an endpoint to its rates; `changed`: it had others before."""
        if changed or endpoint.rx_rate or endpoint.tx_rate:
            from hutch.network import rates, sweep

            rates.limit(route, endpoint, sweep.note_of(self._root))

    def forget_rates(self, endpoints: Iterable[Endpoint]) -> None:
        """Remove what limited endpoints that are no more."""
        limited = [endpoint for endpoint in endpoints if endpoint.tx_rate]
        if limited:
            from hutch.network import rates

            with RouteSocket() as route:
                rates.forget(route, limited)

    def publish(self, endpoint: Endpoint, pid: int) -> None:
        """Open the ports that an endpoint has got after its attachment."""
        if not endpoint.ports:
            return
        with RouteSocket() as route:
            link = route.link(endpoint.host_interface)
            if link is not None:
                route.request(rtnetlink.set_hairpin(link.index))
        self._proxies.start(endpoint, pid)
        self.open_ports(endpoint)

    def refresh_names(self, network_ids: Collection[str], *, start: bool = False) -> None:
        """Tell the name servers who the members of these networks are now."""
        if network_ids:
            with self.lock():
                self._names.refresh(network_ids, start=start)

    def _configure(self, endpoint: Endpoint, pid: int, messages: Sequence[bytes]) -> None:
        try:
            netns.configure(pid, messages)
        except OSError as error:
            from hutch.network import bridge

            subject = f"{endpoint.interface} of network {endpoint.network}"
            raise bridge.route_errors(error, subject) from error

    def _add_pair(self, route: RouteSocket, endpoint: Endpoint, link: LinkInfo, pid: int) -> int:
        """Make the two interfaces; return the index of the near one."""
        for attempt in range(_ATTEMPTS):
            index = (1 << 20) + int.from_bytes(os.urandom(3), "little")
            message = rtnetlink.add_veth(
                endpoint.host_interface,
                endpoint.interface,
                netns_pid=pid,
                master=link.index,
                mtu=endpoint.mtu,
                index=index,
                peer_mac=parse_mac(endpoint.mac, field="mac"),
                peer_index=endpoint.ifindex,
            )
            messages = [message]
            if endpoint.ports:  # an instance may reach itself by its published port
                messages.append(rtnetlink.set_hairpin(index))
            try:
                route.request(*messages)
                return index
            except OSError as error:
                # EBUSY: the index is taken, here or there.
                if error.errno != errno.EBUSY or attempt == _ATTEMPTS - 1:
                    from hutch.network import bridge

                    subject = f"{endpoint.interface} of network {endpoint.network}"
                    raise bridge.route_errors(error, subject) from error
        raise AssertionError("unreachable")

    def open_ports(self, endpoint: Endpoint) -> None:
        """Put the endpoint's ports into the table; repair the table where it was flushed."""
        if not self._is_table_intact():
            with self.lock():
                self.replace_table()
        elif endpoint.ports:
            with self.lock():
                leases = self._leases_of(endpoint)
                if not firewall.add_ports(self.table, leases):
                    self.replace_table()

    def _is_table_intact(self) -> bool:
        """Tell whether the table has its rules; asked in full only when somebody changed
        the ruleset since."""
        now = firewall.generation()
        if now == self._verified:
            return True
        if not firewall.is_intact(self.table):
            return False
        self._verified = now
        return True

    def _leases_of(self, endpoint: Endpoint) -> list[PortLease]:
        with self._records.read() as tx:
            leases = [lease for _, lease in tx.items(PORTS, PortLease)]
        return [lease for lease in leases if lease.endpoint_id == endpoint.id]

    def ports_of_others(self) -> list[PublishedPort]:
        """Return the ports that other roots on this host publish."""
        return firewall.ports_of_others(self.table)

    def close_ports(self, leases: Iterable[PortLease]) -> None:
        """Take ports that the records no longer have out of the table."""
        gone = list(leases)
        if not gone:
            return
        with self.lock():
            if not firewall.remove_ports(self.table, gone) and firewall.is_intact(self.table):
                self.replace_table()

    def release_ports(self, endpoints: Iterable[Endpoint]) -> None:
        """Hold the ports of these endpoints no longer; before the records let others have them."""
        for endpoint in endpoints:
            if endpoint.ports:
                self._proxies.stop(endpoint.id)

    def release_ports_of_others(self, endpoint_ids: Collection[str]) -> None:
        """Hold no ports but those of these endpoints."""
        for endpoint_id in self._proxies.known():
            if endpoint_id not in endpoint_ids:
                self._proxies.stop(endpoint_id)

    # ---- bridges and the table --------------------------------------------------------

    def ensure_bridge(self, route: RouteSocket, name: str) -> LinkInfo:
        """Make a network's bridge if it is missing, the table first: no packet passes a
        bridge that the table does not know."""
        with self.lock():
            with self._records.read() as tx:
                network = tx.get(NETWORKS, name, NetworkRecord)
            if network is None:
                raise Busy(f"network {name} was removed meanwhile")
            self.replace_table()
            # A server that outlived its bridge is bound to the device that was.
            self._names.stop(network.id)
            from hutch.network import bridge, sweep

            link = bridge.create_bridge(
                route, network, self._remember, note=sweep.note_of(self._root)
            )
            self._take_back(route, network, link)
            self._pass_filters([network.bridge])
            return link

    def _take_back(self, route: RouteSocket, network: NetworkRecord, link: LinkInfo) -> None:
        """Put the interfaces of members that live on to the bridge that is new."""
        with self._records.read() as tx:
            members = [e for _, e in tx.items(ENDPOINTS, Endpoint) if e.network_id == network.id]
        for endpoint in members:
            near = route.link(endpoint.host_interface)
            if near is None or near.master == link.index:
                continue
            messages = [rtnetlink.set_link(near.index, master=link.index, up=True)]
            if endpoint.ports:
                messages.append(rtnetlink.set_hairpin(near.index))
            route.request(*messages, ignore=(errno.ENODEV,))

    def _pass_filters(self, bridges: Collection[str]) -> None:
        """Keep the filters of others from dropping what this root's table accepts."""
        from hutch.network import foreign

        try:
            foreign.accept_bridges(bridges)
        except OSError as error:
            raise firewall.translate(error) from error

    def _may_look(self) -> bool:
        """Tell whether there may be rules of ours: who may not look at them has made none."""
        try:
            firewall.has_table(self.table)
        except (Denied, Unsupported):
            return False
        return True

    def _leave_filters(self, bridges: Collection[str]) -> None:
        from hutch.network import foreign

        try:
            foreign.forget_bridges(bridges)
        except OSError as error:
            raise firewall.translate(error) from error

    def _remember(self, key: str, before: str) -> None:
        with self._records.write() as tx:
            if tx.get(HOST, key, Sysctl) is None:
                tx.put(HOST, key, Sysctl(before=before))

    def replace_table(self) -> None:
        """Make the table anew from the records; the caller holds the lock."""
        with self._records.read() as tx:
            networks = [network for _, network in tx.items(NETWORKS, NetworkRecord)]
            ports = [lease for _, lease in tx.items(PORTS, PortLease)]
        firewall.replace_table(self.table, networks, ports)

    def repair(self, endpoints: Sequence[Endpoint]) -> None:
        """Bring the host in line with the records: bridges of the endpoints' networks, the
        table if any bridge is there, no interface of ours that no endpoint has."""
        known_interfaces = {endpoint.host_interface for endpoint in endpoints}
        with self._records.read() as tx:
            networks = [n for _, n in tx.items(NETWORKS, NetworkRecord) if n.bridge]
        names = {endpoint.network for endpoint in endpoints}
        self._stop_orphans({network.id for network in networks})
        with RouteSocket() as route:
            links = {link.name: link for link in route.links()}
            present = [n for n in networks if n.bridge in links]
            for network in networks:
                if network.name in names:
                    self.ensure_bridge(route, network.name)
            if present:
                with self.lock():
                    self.replace_table()
                    self._pass_filters([network.bridge for network in present])
            ours = {links[network.bridge].index for network in present}
            for link in links.values():
                stale = link.name.startswith("hv") and link.name not in known_interfaces
                if link.master in ours and stale:
                    route.request(rtnetlink.delete_link(link.index), ignore=(errno.ENODEV,))
            self._drop_queues(route, list(links.values()), known_interfaces)
            for endpoint in endpoints:
                self.limit(route, endpoint)

    def _drop_queues(
        self, route: RouteSocket, links: Sequence[LinkInfo], known_interfaces: set[str]
    ) -> None:
        if any(link.kind == "ifb" for link in links):
            from hutch.network import rates, sweep

            for link in rates.strays(links, sweep.note_of(self._root), known_interfaces):
                route.request(rtnetlink.delete_link(link.index), ignore=(errno.ENODEV,))

    def _stop_orphans(self, network_ids: set[str]) -> None:
        with self.lock():
            for network_id in self._names.known():
                if network_id not in network_ids:
                    self._names.stop(network_id)

    def remove_link(self, name: str) -> None:
        """Remove an interface of the host; one that is missing is fine."""
        with RouteSocket() as route:
            link = route.link(name)
            if link is not None:
                route.request(rtnetlink.delete_link(link.index), ignore=(errno.ENODEV,))

    def forget(self, network: NetworkRecord) -> None:
        """Remove the bridge of a network that the records no longer have."""
        with self.lock():
            self._names.stop(network.id)
            self.remove_link(network.bridge)
            if not self._may_look():
                return
            self._leave_filters([network.bridge])
            if firewall.is_intact(self.table):
                self.replace_table()

    def remove_all(self) -> None:
        """Remove every bridge of this root, what hangs on it, and its table; the records
        stay."""
        with self._records.read() as tx:
            names = {n.bridge for _, n in tx.items(NETWORKS, NetworkRecord) if n.bridge}
        with self.lock(), RouteSocket() as route:
            for network_id in self._names.known():
                self._names.stop(network_id)
            self.release_ports_of_others(())
            links = route.links()
            ours = {link.index for link in links if link.name in names}
            if not ours and not self._may_look():
                return
            for link in links:
                if link.index in ours or (link.master in ours and link.name.startswith("hv")):
                    route.request(rtnetlink.delete_link(link.index), ignore=(errno.ENODEV,))
            self._drop_queues(route, links, set())
            self._leave_filters(names)
            if firewall.has_table(self.table):
                firewall.remove_table(self.table)
