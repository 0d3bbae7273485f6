"""Networks of virtual machines: the containers' own, from the start and while they run."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import Exhausted, WrongState
from tests.requires import requires

pytestmark = [
    pytest.mark.integration,
    requires("root", "qemu", "busybox", "apt-mirror", "tun"),
]
MAC = "02:00:5e:10:00:07"
NAMES = ("first", "second", "third", "fourth", "fifth")


class Lab(NamedTuple):
    """A machine and a container on network `first`; the machine on `second` too."""

    engine: Engine
    machine: Instance
    container: Instance
    address: str


@pytest.fixture(scope="module")
def lab(machines: Engine) -> Iterator[Lab]:
    for name in NAMES:
        machines.networks.create(name, ipv6=name == "first")
    subnet = machines.networks.get("first").subnets[0].subnet
    address = subnet.rpartition(".")[0] + ".77"
    container = machines.start("busybox", ["sleep", "1000"], name="box", network="first")
    machine = machines.start(
        "busybox",
        ["sleep", "1000"],
        name="machine",
        isolation="vm",
        memory="160M",
        network=["first", "second"],
        network_aliases=["also"],
        ip=address,
        mac_address=MAC,
        publish=["127.0.0.1::5000/udp"],
    )
    yield Lab(machines, machine, container, address)
    machine.remove(force=True)
    container.remove(force=True)
    for name in NAMES:
        machines.networks.remove(name)


def _sh(box: Instance, script: str) -> str:
    return box.exec(["sh", "-c", script]).text


def _reaches(box: Instance, name: str, *options: str) -> bool:
    return box.exec(["ping", "-c1", "-W3", *options, name]).exit_code == 0


def test_a_card_for_each_network_with_the_address_and_mac_that_were_asked(lab: Lab) -> None:
    shown = _sh(lab.machine, "ip -o -4 a; cat /sys/class/net/eth0/address")
    assert f"eth0    inet {lab.address}/" in shown
    assert "eth1    inet " in shown
    assert shown.rstrip().endswith(MAC)


@pytest.mark.versions
def test_machine_and_container_know_each_other_by_name(lab: Lab) -> None:
    assert _reaches(lab.machine, "box")
    for name in ("machine", "also"):
        assert _reaches(lab.container, name)


def test_they_reach_each_other_by_ipv6(lab: Lab) -> None:
    assert _reaches(lab.machine, "box", "-6")
    assert _reaches(lab.container, "machine", "-6")


def test_a_published_udp_port_leads_into_the_machine(lab: Lab) -> None:
    (port,) = [p for e in lab.engine.networks.members("first") for p in e.ports]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(60)
        client.connect(("127.0.0.1", port.host_port))
        client.send(b"is anybody there?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(1)
    # Its kernel says so: nobody listens, and the host's own does not count in here.
    assert _sh(lab.machine, "grep Udp: /proc/net/snmp").splitlines()[1].split()[2] != "0"


def test_traffic_is_counted_as_the_machine_sees_it(lab: Lab) -> None:
    before = {usage.name: usage for usage in lab.machine.network_stats()}
    assert set(before) >= {"eth0", "eth1"}
    assert _reaches(lab.machine, "box", "-s", "1000")
    after = {usage.name: usage for usage in lab.machine.network_stats()}
    assert after["eth0"].sent_bytes - before["eth0"].sent_bytes >= 1000
    assert after["eth0"].received_bytes - before["eth0"].received_bytes >= 1000


@pytest.mark.versions
def test_a_card_comes_and_goes_while_the_machine_runs(lab: Lab) -> None:
    networks = lab.engine.networks
    networks.connect("third", lab.machine, aliases=["late"])
    networks.connect("third", lab.container)
    assert _reaches(lab.container, "late")
    assert "eth2" in _sh(lab.machine, "ls /sys/class/net")
    networks.disconnect("third", lab.machine)
    networks.disconnect("third", lab.container)
    assert "eth2" not in _sh(lab.machine, "ls /sys/class/net")


def test_a_card_from_the_start_is_put_aside_and_its_name_is_free(lab: Lab) -> None:
    networks = lab.engine.networks
    networks.disconnect("second", lab.machine)
    assert "eth1" not in _sh(lab.machine, "ls /sys/class/net")
    networks.connect("second", lab.machine)
    networks.connect("second", lab.container, aliases=["seen"])
    assert _reaches(lab.machine, "seen")
    networks.disconnect("second", lab.container)
    networks.disconnect("second", lab.machine)


def test_no_more_cards_than_there_are_ports_for(lab: Lab) -> None:
    networks = lab.engine.networks
    for name in ("second", "third", "fourth"):
        networks.connect(name, lab.machine)
    with pytest.raises(Exhausted, match="room for 3"):
        networks.connect("fifth", lab.machine)
    assert networks.members("fifth") == ()
    for name in ("second", "third", "fourth"):
        networks.disconnect(name, lab.machine)


def test_a_paused_machine_is_not_given_a_card(lab: Lab) -> None:
    lab.machine.pause()
    try:
        with pytest.raises(WrongState, match="paused"):
            lab.engine.networks.connect("third", lab.machine)
    finally:
        lab.machine.unpause()


def test_the_default_route_moves_to_a_network_that_is_left(lab: Lab) -> None:
    networks = lab.engine.networks
    networks.connect("third", lab.machine)
    networks.disconnect("first", lab.machine)
    assert "eth0" not in _sh(lab.machine, "ip route show default")
    networks.disconnect("third", lab.machine)
    networks.connect("first", lab.machine)
    assert "dev eth" in _sh(lab.machine, "ip route show default")
    assert _reaches(lab.machine, "box")


def test_a_machine_without_a_network_can_be_connected(machines: Engine, lab: Lab) -> None:
    box = machines.start(
        "busybox", ["sleep", "1000"], isolation="vm", memory="160M", network="none"
    )
    try:
        assert _sh(box, "ls /sys/class/net").split() == ["lo"]
        machines.networks.connect("first", box)
        assert _reaches(box, "box")
    finally:
        box.remove(force=True)
