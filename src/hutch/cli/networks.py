"""`network …`."""

from __future__ import annotations

from hutch.cli.command import FILTER, FORMAT, NO_TRUNC, QUIET, Command
from hutch.cli.options import UsageError
from hutch.cli.output import print_json, show_result, show_rows, stamp
from hutch.cli.prompt import confirm
from hutch.cli.run_options import accept_only
from hutch.cli.session import Invocation
from hutch.ids import short_id

__all__ = ["COMMANDS"]

_COLUMNS = (("NETWORK ID", "ID"), ("NAME", "Name"), ("DRIVER", "Driver"), ("SCOPE", "Scope"))


def pairs(entries: list[str], option: str) -> dict[str, str]:
    """Read `KEY=VALUE` options."""
    result = {}
    for entry in entries:
        key, _, value = entry.partition("=")
        if not key:
            raise UsageError(f"--{option}: expected KEY=VALUE, got {entry!r}")
        result[key] = value
    return result


def _create(invocation: Invocation) -> int:
    values = invocation.options
    accept_only(values, "ipam_driver", "default")
    accept_only(values, "scope", "local")
    if values.get("ipv4") is False:
        raise UsageError("--ipv4=false: every network has IPv4", hint="add --ipv6 for both")
    network = invocation.engine.networks.create(
        invocation.arguments[0],
        driver=values.get("driver", "bridge"),
        subnets=values.get("subnet", ()),
        gateways=values.get("gateway", ()),
        ip_ranges=values.get("ip_range", ()),
        reserved=pairs(values.get("aux_address", []), "aux-address"),
        attachable=invocation.flag("attachable"),
        internal=invocation.flag("internal"),
        ipv6=invocation.flag("ipv6"),
        labels=pairs(values.get("label", []), "label"),
        options=pairs(values.get("opt", []), "opt"),
    )
    return show_result(invocation, network.id, Id=network.id, Name=network.name)


def _ls(invocation: Invocation) -> int:
    full = invocation.flag("no_trunc")
    rows = [
        {
            "ID": network.id if full else short_id(network.id),
            "Name": network.name,
            "Driver": network.driver,
            "Scope": "local",
            "IPv6": str(network.ipv6).lower(),
            "Internal": str(network.internal).lower(),
            "Labels": ",".join(f"{k}={v}" for k, v in sorted(network.labels.items())),
            "CreatedAt": stamp(network.created_ns),
        }
        for network in invocation.engine.networks.list(invocation.filters() or None)
    ]
    return show_rows(invocation, rows, _COLUMNS, identifier="ID")


def _rm(invocation: Invocation) -> int:
    return invocation.each(invocation.arguments, invocation.engine.networks.remove)


def _prune(invocation: Invocation) -> int:
    if not confirm(invocation, "This removes all networks that no instance uses."):
        return 1
    removed = invocation.engine.networks.prune(invocation.filters() or None)
    if invocation.json:
        print_json({"NetworksDeleted": removed})
        return 0
    for name in removed:
        print(name)
    return 0


def _connect(invocation: Invocation) -> int:
    values = invocation.options
    network, instance = invocation.arguments
    invocation.engine.networks.connect(
        network,
        instance,
        aliases=values.get("alias", ()),
        ip=values.get("ip", ""),
        ip6=values.get("ip6", ""),
        mac_address=values.get("mac_address", ""),
        rx_rate=values.get("rx_rate", 0),
        tx_rate=values.get("tx_rate", 0),
        links=values.get("link", ()),
    )
    return show_result(invocation, "", Network=network, Name=instance)


def _disconnect(invocation: Invocation) -> int:
    network, instance = invocation.arguments
    invocation.engine.networks.disconnect(network, instance, force=invocation.flag("force"))
    return show_result(invocation, "", Network=network, Name=instance)


COMMANDS = {
    "network create": Command(
        handler=_create,
        summary="Create a network; print its identifier.",
        arguments="NAME",
        low=1,
        high=1,
        options=(
            ("attachable", "", "flag", "", "Noted for who asks: any network can be joined"),
            ("aux-address", "", "list", "NAME=ADDRESS", "Give this address to nobody"),
            ("driver", "d", "text", "NAME", "bridge"),
            ("gateway", "", "list", "ADDRESS", "Gateway of a subnet"),
            ("internal", "", "flag", "", "No way out"),
            ("ip-range", "", "list", "SUBNET", "Give addresses out of this part only"),
            ("ipam-driver", "", "text", "NAME", "default"),
            ("ipv4", "", "flag", "", "Accepted: every network has IPv4 (true)"),
            ("ipv6", "", "flag", "", "IPv6 as well"),
            ("label", "", "list", "KEY=VALUE", "Set a label"),
            ("opt", "o", "list", "KEY=VALUE", "mtu=…, bridge=…, masquerade=… or host_ip=…"),
            ("scope", "", "text", "NAME", "local"),
            ("subnet", "", "list", "SUBNET", "Addresses of the network"),
        ),
        examples=(
            "hutch network create back",
            "hutch network create --internal --subnet 10.9.0.0/24 quiet",
        ),
    ),
    "network ls": Command(
        handler=_ls,
        summary="List networks.",
        options=(FILTER, FORMAT, NO_TRUNC, QUIET),
        examples=("hutch network ls",),
    ),
    "network rm": Command(
        handler=_rm,
        summary="Remove networks that no instance uses.",
        arguments="NETWORK [NETWORK...]",
        low=1,
        high=-1,
        options=(("force", "f", "flag", "", "Accepted, without effect"),),
        examples=("hutch network rm back",),
    ),
    "network prune": Command(
        handler=_prune,
        summary="Remove all networks that no instance uses.",
        options=(
            ("filter", "", "list", "KEY=VALUE", "Remove what matches only"),
            ("force", "f", "flag", "", "Do not ask"),
        ),
        examples=("hutch network prune -f",),
    ),
    "network connect": Command(
        handler=_connect,
        summary="Connect an instance to a network, also while it runs.",
        arguments="NETWORK INSTANCE",
        low=2,
        high=2,
        options=(
            ("alias", "", "list", "NAME", "Further name on this network"),
            ("ip", "", "text", "ADDRESS", "IPv4 address"),
            ("ip6", "", "text", "ADDRESS", "IPv6 address"),
            ("link", "", "list", "INSTANCE[:ALIAS]", "A name for another that is in it"),
            ("mac-address", "", "text", "ADDRESS", "MAC address"),
            ("rx-rate", "", "text", "RATE", "What it may receive, such as 10mbit (a second)"),
            ("tx-rate", "", "text", "RATE", "What it may send"),
        ),
        examples=("hutch network connect --alias db back postgres",),
    ),
    "network disconnect": Command(
        handler=_disconnect,
        summary="Disconnect an instance from a network, also while it runs.",
        arguments="NETWORK INSTANCE",
        low=2,
        high=2,
        options=(("force", "f", "flag", "", "Do not fail if it is not connected"),),
        examples=("hutch network disconnect back postgres",),
    ),
}
