"""Name resolution in user-defined networks: the name server's data, its start and stop.

One `hutch-dns` per network listens on the gateway's port 53. It reads `hosts` in the
network's directory, written here whole and renamed into place, and leaves when the file
does. It holds a lock in that directory while it lives, so no process id is ever trusted.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from hutch.errors import Busy, InternalError, Unavailable, Unsupported
from hutch.network.model import ENDPOINTS, NETWORKS, Endpoint, NetworkRecord
from hutch.records import Records

__all__ = ["NameServers", "affected_networks", "dns_path", "hosts_data"]

_TAKEN = 3
_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
ByNetwork = dict[str, list[Endpoint]]


def dns_path() -> str:
    """Return where the package keeps the name server's binary."""
    return os.path.join(os.path.dirname(os.path.dirname(__file__)), "_native", "hutch-dns")


def affected_networks(endpoints: Iterable[Endpoint], changed: Collection[str]) -> set[str]:
    """Return the ids of the networks whose data a change of membership of those in
    `changed` touches: themselves, and those that share an instance with them, because an
    instance resolves the names of all its networks by any of their servers."""
    by_instance: dict[str, list[Endpoint]] = {}
    for endpoint in endpoints:
        by_instance.setdefault(endpoint.instance_id, []).append(endpoint)
    found = set(changed)
    for held in by_instance.values():
        if any(endpoint.network_id in changed for endpoint in held):
            found.update(endpoint.network_id for endpoint in held)
    return found


def hosts_data(network_id: str, internal: bool, endpoints: Collection[Endpoint]) -> bytes:
    """Return the content of a network's `hosts` file (the format is in native/dns/names.c)."""
    members = [e for e in endpoints if e.network_id == network_id]
    present = {e.instance_id for e in members}
    by_network: ByNetwork = {}
    by_instance: dict[str, list[Endpoint]] = {}
    for endpoint in endpoints:
        if endpoint.dns:
            by_network.setdefault(endpoint.network_id, []).append(endpoint)
        if endpoint.instance_id in present:
            by_instance.setdefault(endpoint.instance_id, []).append(endpoint)
    lines = ["version 1", f"forward {'no' if internal else 'yes'}"]
    lines.extend(line for member in members for line in _host_lines(member))
    for member in members:
        lines.extend(_scope_lines(member, by_instance[member.instance_id], by_network))
    return ("\n".join(lines) + "\n").encode()


def _host_lines(endpoint: Endpoint) -> Iterator[str]:
    for entry in endpoint.addresses:
        if endpoint.names:
            yield f"host {entry.address} {' '.join(endpoint.names)}"


def _scope_lines(member: Endpoint, held: list[Endpoint], by_network: ByNetwork) -> Iterator[str]:
    """Yield what holds for this member's queries alone: its servers, its other networks."""
    others = [e for e in held if e.network_id != member.network_id]
    if not others and not member.upstreams:
        return
    for entry in member.addresses:
        yield f"from {entry.address}"
        yield f"forward {'no' if all(e.internal for e in held) else 'yes'}"
        yield from (f"upstream {server}" for server in member.upstreams)
        for other in others:
            for neighbour in by_network.get(other.network_id, ()):
                yield from _host_lines(neighbour)


class NameServers:
    """The name servers of one root; every method is called under the root's network lock."""

    def __init__(self, directory: Path, records: Records) -> None:
        self._directory = directory
        self._records = records

    def refresh(self, changed: Collection[str], *, start: bool) -> None:
        """Bring the data of the networks with these ids, and of those that share an
        instance with them, in line with the records.

        With `start` the servers of `changed` are running afterwards: their bridges exist.
        """
        with self._records.read() as tx:
            endpoints = [endpoint for _, endpoint in tx.items(ENDPOINTS, Endpoint)]
            networks = [network for _, network in tx.items(NETWORKS, NetworkRecord)]
        wanted = affected_networks(endpoints, changed)
        occupied = {endpoint.network_id for endpoint in endpoints}
        for network in networks:
            if network.id not in wanted or not network.dns:
                continue
            if network.id in occupied:
                self._write(network.id, hosts_data(network.id, network.internal, endpoints))
                if start and network.id in changed:
                    self._ensure_running(network)
            else:
                self.stop(network.id)

    def _write(self, network_id: str, data: bytes) -> None:
        directory = self._directory / network_id
        temporary = directory / "hosts.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(temporary, flags, 0o644)
        except FileNotFoundError:
            directory.mkdir(mode=0o711, exist_ok=True)
            directory.chmod(0o711)
            fd = os.open(temporary, flags, 0o644)
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o644)  # the server has no privilege to read more
            file.write(data)
        temporary.rename(directory / "hosts")

    def _ensure_running(self, network: NetworkRecord) -> None:
        directory = self._directory / network.id
        from hutch.linux.locks import is_locked

        if is_locked(directory / "lock"):
            return
        from hutch.process.run import run_command

        program = dns_path()
        if not os.path.exists(program):
            raise Unsupported(
                f"the name server is missing: {program}",
                hint="build it with `make -C native install`, or install the package",
            )
        argv = [program, "-d", str(directory), "-i", network.bridge]
        for record in network.subnets:
            argv += ["-l", record.gateway]
        done = run_command(argv, timeout_s=_START_TIMEOUT_S)
        if done.returncode == 0:
            return
        text = done.stderr.decode(errors="replace").strip() or f"status {done.returncode}"
        if done.returncode == _TAKEN:
            raise Unavailable(
                f"network {network.name}: port 53 of its gateway is taken by a server of this host",
                hint="keep that server to its own addresses (bind-interfaces in dnsmasq), or "
                "create the network without name resolution",
            )
        raise InternalError(f"network {network.name}: the name server did not start: {text}")

    def stop(self, network_id: str) -> None:
        """End a network's server and remove its directory; none is fine."""
        from hutch.linux.locks import lock_file

        directory = self._directory / network_id
        if not directory.is_dir():
            return
        (directory / "hosts").unlink(missing_ok=True)
        try:
            with lock_file(directory / "lock", timeout_s=_STOP_TIMEOUT_S):
                pass
        except Busy as error:
            raise Busy(f"the name server of network {network_id[:12]} does not end") from error
        for name in ("hosts.tmp", "lock"):
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()

    def known(self) -> list[str]:
        """Return the ids of the networks that have a directory."""
        try:
            return [entry.name for entry in os.scandir(self._directory) if entry.is_dir()]
        except FileNotFoundError:
            return []
