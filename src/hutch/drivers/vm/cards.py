"""The network cards of a machine: on taps, or on the network that QEMU makes itself."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hutch.drivers.vm.sandbox import Descriptors
from hutch.network.model import Endpoint, PublishedPort
from hutch.plan.machine.model import HostForward, Nic, Tap, UserNet

__all__ = ["is_user_network", "network_cards", "template_cards"]

# Only until the guest's own address is set: the device is renamed and addressed by the agent.
_MAC = "52:54:00:00:00:{:02x}"


def is_user_network(endpoints: Sequence[Endpoint]) -> bool:
    """Tell whether the network is QEMU's own, not a bridge of the host."""
    return any(not endpoint.bridge for endpoint in endpoints)


def network_cards(
    endpoints: Sequence[Endpoint], taps: Sequence[int], descriptors: Descriptors
) -> tuple[Nic, ...]:
    """Return a card for each endpoint: on the tap of its place, else on QEMU's own network,
    which hands the published ports in."""
    if is_user_network(endpoints):
        return tuple(
            Nic(
                mac=_MAC.format(index),
                backend=UserNet(forwards=tuple(map(_forward, endpoint.ports)), ipv6=False),
            )
            for index, endpoint in enumerate(endpoints)
        )
    return tuple(
        Nic(mac=_MAC.format(index), backend=Tap(fds=(descriptors.add(os.dup(fd)),)))
        for index, fd in enumerate(taps)
    )


def template_cards(count: int, taps: Sequence[int], descriptors: Descriptors) -> tuple[Nic, ...]:
    """Return the cards of a template, which lead nowhere: on taps that nobody reads, or on
    QEMU's own network, closed."""
    if taps:
        return network_cards((), taps, descriptors)
    backend = UserNet(restrict=True, ipv6=False)
    return tuple(Nic(mac=_MAC.format(index), backend=backend) for index in range(count))


def _forward(port: PublishedPort) -> HostForward:
    return HostForward(
        protocol="udp" if port.protocol == "udp" else "tcp",
        address=port.host_ip,
        port=port.host_port,
        guest_port=port.container_port,
    )
