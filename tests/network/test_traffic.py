"""What may reach what: between instances, networks, the host and the outside."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from hutch.errors import Busy
from hutch.linux import nft
from hutch.spec.model import PortMapping
from tests.network.boxes import TIMEOUT_S, Lab, listener, meets
from tests.requires import requires

pytestmark = [requires("root", "netns", "nftables"), pytest.mark.integration]


def refused(connect: Callable[[], socket.socket]) -> bool:
    """Tell whether a connection does not come about."""
    try:
        connect().close()
    except OSError:
        return True
    return False


def quick(host: str, port: int) -> socket.socket:
    """Try for so long only: nothing answers."""
    return socket.create_connection((host, port), timeout=0.5)


def test_instances_of_one_network_reach_each_other(lab: Lab) -> None:
    one, other = lab.start(), lab.start()
    with other.listen(80) as server:
        assert meets(server, one.connect(other.ipv4, 80)) == one.ipv4


def test_the_host_and_an_instance_reach_each_other(lab: Lab) -> None:
    box = lab.start()
    with box.listen(80) as server:
        meets(server, socket.create_connection((box.ipv4, 80), timeout=TIMEOUT_S))
    gateway = box.endpoints[0].addresses[0].gateway
    with listener("", 81) as server:
        assert meets(server, box.connect(gateway, 81)) == box.ipv4


def test_traffic_to_the_outside_leaves_under_the_hosts_address(lab: Lab) -> None:
    outside, box = lab.outside(), lab.start()
    with outside.listen(80) as server:
        assert meets(server, box.connect("203.0.113.2", 80)) == "203.0.113.1"


def test_a_network_without_masquerading_keeps_its_addresses(lab: Lab) -> None:
    lab.networks.create("routed", options={"masquerade": "false"})
    outside, box = lab.outside(), lab.start("routed")
    with outside.listen(80) as server:
        assert meets(server, box.connect("203.0.113.2", 80)) == box.ipv4


def test_the_outside_reaches_only_published_ports(lab: Lab) -> None:
    outside = lab.outside()
    box = lab.start(ports=[PortMapping(container_port=80, host_port=8080)])
    with box.listen(80) as server, box.listen(81):
        assert meets(server, outside.connect("203.0.113.1", 8080)) == "203.0.113.2"
        with outside.inside():
            assert refused(lambda: quick(box.ipv4, 81))


def test_networks_are_isolated_from_each_other(lab: Lab) -> None:
    lab.networks.create("other")
    one, other = lab.start(), lab.start("other")
    with other.listen(80), one.inside():
        assert refused(lambda: quick(other.ipv4, 80))


def test_a_published_port_is_reached_from_another_network(lab: Lab) -> None:
    lab.networks.create("other")
    one = lab.start()
    other = lab.start("other", ports=[PortMapping(container_port=80, host_port=8080)])
    gateway = one.endpoints[0].addresses[0].gateway
    with other.listen(80) as server:
        meets(server, one.connect(gateway, 8080))


def test_an_instance_on_two_networks_reaches_both(lab: Lab) -> None:
    lab.networks.create("first")
    lab.networks.create("second")
    both, one, two = lab.start("first", "second"), lab.start("first"), lab.start("second")
    for neighbour in (one, two):
        with neighbour.listen(80) as server:
            meets(server, both.connect(neighbour.ipv4, 80))


def test_an_internal_network_has_no_way_out_or_in(lab: Lab) -> None:
    lab.networks.create("inner", internal=True)
    outside, box, neighbour = lab.outside(), lab.start("inner"), lab.start("inner")
    assert "default" not in box.run("ip", "route")
    box.run("ip", "route", "add", "default", "via", box.endpoints[0].addresses[0].gateway)
    with outside.listen(80), box.inside():
        assert refused(lambda: quick("203.0.113.2", 80))
    with neighbour.listen(80) as server:
        meets(server, box.connect(neighbour.ipv4, 80))


def test_ipv6_works_within_and_to_the_outside(lab: Lab) -> None:
    lab.networks.create("six", ipv6=True)
    one = lab.start("six")
    other = lab.start("six", ports=[PortMapping(container_port=80, host_port=8080)])
    address = other.endpoints[0].ipv6
    with other.listen(80, host="::") as server:
        assert meets(server, one.connect(address, 80)) == one.endpoints[0].ipv6
        gateway = one.endpoints[0].addresses[1].gateway
        meets(server, socket.create_connection((gateway, 8080), timeout=TIMEOUT_S))


def test_an_instance_cannot_reach_the_hosts_loopback(lab: Lab) -> None:
    box = lab.start()
    gateway = box.endpoints[0].addresses[0].gateway
    box.run("ip", "route", "add", "127.9.9.9/32", "via", gateway, "src", box.ipv4)
    box.run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    with listener("127.9.9.9", 90) as server:
        with box.inside():
            assert refused(lambda: quick("127.9.9.9", 90))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_flushed_ruleset_heals_at_the_next_start(lab: Lab) -> None:
    outside = lab.outside()
    first = lab.start(ports=[PortMapping(container_port=80, host_port=8080)])
    nft.run("flush ruleset\n")
    lab.start()
    with first.listen(80) as server:
        meets(server, outside.connect("203.0.113.1", 8080))
    with outside.listen(80) as server:
        assert meets(server, first.connect("203.0.113.2", 80)) == "203.0.113.1"


def test_two_roots_on_one_host_do_not_disturb_each_other(lab: Lab) -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        (lab.root / "second").mkdir()
        second = Lab(lab.root / "second", stack)
        stack.callback(second.networks.teardown)
        outside = lab.outside()
        mine = lab.start(ports=[PortMapping(container_port=80, host_port=8080)])
        with pytest.raises(Busy, match="another root"):
            second.start(ports=[PortMapping(container_port=80, host_port=8080)])
        theirs = second.start(ports=[PortMapping(container_port=80, host_port=8081)])
        for box, port in ((mine, 8080), (theirs, 8081)):
            with box.listen(80) as server:
                meets(server, outside.connect("203.0.113.1", port))
        with mine.listen(80), theirs.inside():
            assert refused(lambda: quick(mine.ipv4, 80))


def test_a_hundred_instances_get_addresses_of_their_own(lab: Lab) -> None:
    boxes = [lab.start() for _ in range(100)]
    assert len({box.ipv4 for box in boxes}) == 100
    with boxes[-1].listen(80) as server:
        assert meets(server, boxes[0].connect(boxes[-1].ipv4, 80)) == boxes[0].ipv4
