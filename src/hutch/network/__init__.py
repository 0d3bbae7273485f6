"""Networks: bridges, addresses, published ports, names; user-mode networking when rootless."""

from hutch.network.model import Endpoint, EndpointAddress, NetworkRecord, PublishedPort
from hutch.network.netns import netns_path
from hutch.network.networks import Networks, NetworkView

__all__ = [
    "Networks",
    "NetworkView",
    "NetworkRecord",
    "Endpoint",
    "EndpointAddress",
    "PublishedPort",
    "netns_path",
]
