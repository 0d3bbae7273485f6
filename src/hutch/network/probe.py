"""Find out what networks need and this host lacks, by trying it in a namespace thrown away."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from hutch.host.findings import Finding, State
from hutch.linux import nft, rtnetlink
from hutch.linux.rtnetlink import RouteSocket
from hutch.network import firewall, foreign, user
from hutch.network.dns import dns_path
from hutch.network.model import NetworkRecord, PortLease, SubnetRecord
from hutch.network.proxies import proxy_path

__all__ = ["examine"]

_SAMPLE = NetworkRecord(
    id="probe",
    name="probe",
    driver="bridge",
    created_ns=0,
    bridge="hu-probe",
    subnets=(
        SubnetRecord(subnet="192.0.2.0/24", gateway="192.0.2.1"),
        SubnetRecord(subnet="2001:db8::/64", gateway="2001:db8::1"),
    ),
)
_SAMPLE_PORT = PortLease(
    instance_id="probe",
    endpoint_id="probe",
    protocol="tcp",
    host_ip="",
    host_port=80,
    targets=("192.0.2.2", "2001:db8::2"),
    target_port=80,
)


def examine() -> list[Finding]:
    """Return findings about bridges, NAT, forwarding, names, ports, user-mode networking."""
    programs = (_names(), _proxy(), _user_mode())
    return [*_in_a_new_namespace(), _forwarding(), *_filters(), *programs]


def _finding(
    name: str, failure: str | None, cure: str, *, state: State = State.MISSING, needed: bool = False
) -> Finding:
    if failure is None:
        return Finding(area="network", name=name, state=State.OK, needed=needed)
    return Finding(area="network", name=name, state=state, detail=failure, cure=cure, needed=needed)


def _in_a_new_namespace() -> Iterator[Finding]:
    """Make a bridge, a pair of interfaces and the whole table, on a thread of its own."""
    import threading

    results: list[Finding] = []
    thread = threading.Thread(target=lambda: results.extend(_try_devices()), daemon=True)
    thread.start()
    thread.join()
    yield from results


def _try_devices() -> list[Finding]:
    from hutch.linux.namespaces import CLONE_NEWNET, unshare

    root = "run as root (CAP_NET_ADMIN), or use user-mode networking"
    failure = _failure(lambda: unshare(CLONE_NEWNET))
    found = [_finding("network namespace", failure, root)]
    if failure is not None:  # never try the rest on the host itself
        return found
    with RouteSocket() as route:
        steps: tuple[tuple[str, Callable[[], object], str], ...] = (
            (
                "bridge",
                lambda: route.request(rtnetlink.add_bridge("hu-probe")),
                "build the kernel with CONFIG_BRIDGE, or load the module bridge",
            ),
            (
                "veth",
                lambda: route.request(rtnetlink.add_veth("probe0", "probe1")),
                "build the kernel with CONFIG_VETH, or load the module veth",
            ),
            (
                "nat",
                lambda: nft.run(firewall.ruleset("hutch_probe", [_SAMPLE], [_SAMPLE_PORT])),
                "install libnftables1; the kernel needs nf_tables with nat, masq, fib and ct",
            ),
        )
        found += [_finding(name, _failure(step), cure) for name, step, cure in steps]
    return found


def _failure(step: Callable[[], object]) -> str | None:
    try:
        step()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _forwarding() -> Finding:
    path = "/proc/sys/net/ipv4/ip_forward"
    try:
        with open(path) as file:
            is_on = file.read().strip() == "1"
    except OSError as error:
        return _finding("ip_forward", str(error), "mount /proc")
    if is_on or (os.access(path, os.W_OK) and not os.statvfs(path).f_flag & os.ST_RDONLY):
        return _finding("ip_forward", None, "")
    cure = "set it beforehand: sysctl -w net.ipv4.ip_forward=1"
    return _finding("ip_forward", "off, and /proc/sys cannot be written", cure)


def _filters() -> Iterator[Finding]:
    """Tell of filters that drop forwarded packets and are not iptables' own chain, which
    is taken care of."""
    try:
        chains = foreign.dropping_chains()
    except OSError:
        return
    for family, table, chain in chains:
        if (table, chain) == ("filter", "FORWARD") and family in ("ip", "ip6"):
            continue
        yield _finding(
            "forward filter",
            f"chain {chain} of table {family} {table} drops what it does not know",
            f"let it accept interfaces hu-*: nft insert rule {family} {table} {chain} "
            'iifname "hu-*" accept, and the same with oifname',
            state=State.DEGRADED,
        )


def _names() -> Finding:
    failure = None if os.access(dns_path(), os.X_OK) else f"{dns_path()} is missing"
    return _finding("name server", failure, "build it with `make -C native install`")


def _proxy() -> Finding:
    failure = None if os.access(proxy_path(), os.X_OK) else f"{proxy_path()} is missing"
    return _finding("port proxy", failure, "build it with `make -C native install`")


def _user_mode() -> Finding:
    missing = user.unavailable()
    if missing is None:
        return _finding("user-mode network", None, "")
    return _finding("user-mode network", missing[0], missing[1])
