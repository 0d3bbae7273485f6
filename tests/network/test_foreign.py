"""Beside other filters and other engines: Docker's forward policy, and what is told of."""

from __future__ import annotations

import pytest

from hutch.host.findings import State
from hutch.linux import nft
from hutch.network import foreign
from hutch.network.probe import examine
from hutch.spec.model import PortMapping
from tests.network.boxes import Lab, meets
from tests.requires import requires

pytestmark = [requires("root", "netns", "nftables"), pytest.mark.integration]
IPTABLES = """
table ip filter {
    chain DOCKER { }
    chain FORWARD {
        type filter hook forward priority filter; policy drop;
        oifname "docker0" jump DOCKER
        ip saddr 203.0.113.66 drop
    }
}
"""


def test_traffic_passes_where_iptables_drops_by_policy(lab: Lab) -> None:
    nft.run(IPTABLES)
    outside = lab.outside()
    box = lab.start(ports=[PortMapping(container_port=80, host_port=8080)])
    with outside.listen(80) as server:
        meets(server, box.connect("203.0.113.2", 80))
    with box.listen(80) as server:
        meets(server, outside.connect("203.0.113.1", 8080))


def test_the_owners_rules_come_first_and_ours_only_once(lab: Lab) -> None:
    nft.run(IPTABLES)
    box = lab.start()
    lab.networks.reconcile(lambda _: True)
    lines = [line.strip() for line in nft.run("list chain ip filter FORWARD\n").splitlines()]
    rules = lines[lines.index("ip saddr 203.0.113.66 drop") + 1 :]
    bridge = box.endpoints[0].bridge
    assert rules[:2] == [f'iifname "{bridge}" accept', f'oifname "{bridge}" accept']
    assert rules[2:] == ["}", "}"]


def test_our_rules_go_with_the_bridge(lab: Lab) -> None:
    nft.run(IPTABLES)
    before = nft.run("list table ip filter\n")
    lab.networks.create("net")
    box = lab.start("net")
    assert nft.run("list table ip filter\n") != before
    lab.networks.detach(box.id)
    lab.networks.remove("net")
    assert nft.run("list table ip filter\n") == before


def test_another_filter_that_drops_is_left_alone_and_told_of(lab: Lab) -> None:
    nft.run("table inet fw { chain f { type filter hook forward priority 5; policy drop; }; }\n")
    lab.start()
    assert foreign.dropping_chains() == [("inet", "fw", "f")]
    assert "hu-" not in nft.run("list table inet fw\n")
    (finding,) = [f for f in examine() if f.name == "forward filter"]
    assert finding.state is State.DEGRADED
    assert "table inet fw" in finding.detail


def test_a_host_that_can_all_is_found_able(lab: Lab) -> None:
    found = {finding.name: finding.state for finding in examine()}
    for name in ("network namespace", "bridge", "veth", "nat", "ip_forward", "name server"):
        assert found[name] is State.OK
    assert nft.run("list ruleset\n") == ""
