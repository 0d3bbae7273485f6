"""A machine's network: its frames go through a tap, a bridge inside, and the endpoint."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hutch.ids import new_id
from hutch.linux.namespaces import CLONE_NEWNET, thread_in_namespace
from hutch.linux.rtnetlink import RouteSocket
from hutch.network import Endpoint
from hutch.network.taps import Taps, create_taps
from hutch.spec.model import NetworkAttachment, PortMapping
from tests.network.boxes import Lab
from tests.requires import requires

pytestmark = [requires("root", "netns", "nftables", "tun"), pytest.mark.integration]

VNET_HEADER = bytes(10)  # struct virtio_net_hdr: no offload asked for
ARP = 0x0806
_ARP = struct.Struct("!HHBBH6s4s6s4s")


@pytest.fixture
def taps() -> Iterator[Taps]:
    made = create_taps(2)
    yield made
    for fd in (made.namespace, *made.taps):
        os.close(fd)


@contextmanager
def process_in(taps: Taps) -> Iterator[int]:
    """Yield the id of a process in the namespace, as hutch-vmm is."""
    with thread_in_namespace(taps.namespace, CLONE_NEWNET):
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    with process:
        yield process.pid
        process.kill()


def mac_of(endpoint: Endpoint) -> bytes:
    return bytes.fromhex(endpoint.mac.replace(":", ""))


def ask_who_has(tap: int, endpoint: Endpoint, address: str) -> bytes:
    """Send an ARP request as the guest would and return the MAC that answers."""
    own = mac_of(endpoint)
    source, target = socket.inet_aton(endpoint.ipv4), socket.inet_aton(address)
    request = _ARP.pack(1, 0x0800, 6, 4, 1, own, source, bytes(6), target)
    os.write(tap, VNET_HEADER + b"\xff" * 6 + own + struct.pack("!H", ARP) + request)
    while select.select([tap], [], [], 10)[0]:
        frame = os.read(tap, 2048)[len(VNET_HEADER) :]
        if frame[:6] == own and frame[12:14] == struct.pack("!H", ARP):
            _, _, _, _, operation, mac, sender, _, _ = _ARP.unpack_from(frame, 14)
            if operation == 2 and sender == target:
                return bytes(mac)
    raise AssertionError("nobody answers")


def test_a_machines_frames_reach_the_gateway_and_come_back(lab: Lab, taps: Taps) -> None:
    machine = new_id()
    endpoints = lab.networks.prepare(machine, [NetworkAttachment(name="bridge")])
    with process_in(taps) as pid:
        lab.networks.attach_tap(endpoints[0], pid, taps.indexes[0], 0)
        gateway = endpoints[0].addresses[0].gateway
        with RouteSocket() as route:
            bridge = route.link(endpoints[0].bridge)
        assert bridge is not None
        assert ask_who_has(taps.taps[0], endpoints[0], gateway) == bridge.mac


def test_a_machine_and_a_container_hear_each_other_on_one_network(lab: Lab, taps: Taps) -> None:
    lab.networks.create("net")
    box = lab.start("net")
    machine = new_id()
    endpoints = lab.networks.prepare(machine, [NetworkAttachment(name="net")])
    with process_in(taps) as pid:
        lab.networks.attach_tap(endpoints[0], pid, taps.indexes[0], 0)
        found = ask_who_has(taps.taps[0], endpoints[0], box.ipv4)
    assert found == mac_of(box.endpoints[0])


def test_a_machine_in_two_networks_has_a_tap_for_each(lab: Lab, taps: Taps) -> None:
    lab.networks.create("one")
    lab.networks.create("two")
    wanted = [NetworkAttachment(name="one"), NetworkAttachment(name="two")]
    endpoints = lab.networks.prepare(new_id(), wanted)
    with process_in(taps) as pid:
        for number, endpoint in enumerate(endpoints):
            lab.networks.attach_tap(endpoint, pid, taps.indexes[number], number)
        for tap, endpoint in zip(taps.taps, endpoints, strict=True):
            assert ask_who_has(tap, endpoint, endpoint.addresses[0].gateway)


def test_a_machine_with_a_published_port_is_not_cut_off_by_its_own_broadcasts(
    lab: Lab, taps: Taps
) -> None:
    endpoints = lab.networks.prepare(
        new_id(),
        [NetworkAttachment(name="bridge")],
        ports=[PortMapping(container_port=80, host_ip="127.0.0.1")],
    )
    with process_in(taps) as pid:
        lab.networks.attach_tap(endpoints[0], pid, taps.indexes[0], 0)
        for _ in range(3):
            assert ask_who_has(taps.taps[0], endpoints[0], endpoints[0].addresses[0].gateway)


def test_the_namespace_answers_for_none_of_the_machines_addresses(lab: Lab, taps: Taps) -> None:
    endpoints = lab.networks.prepare(new_id(), [NetworkAttachment(name="bridge")])
    with process_in(taps) as pid:
        lab.networks.attach_tap(endpoints[0], pid, taps.indexes[0], 0)
        with thread_in_namespace(taps.namespace, CLONE_NEWNET), RouteSocket() as route:
            held = [address.address for address in route.addresses()]
            macs = [link.mac for link in route.links()]
    assert held == []
    assert mac_of(endpoints[0]) not in macs
