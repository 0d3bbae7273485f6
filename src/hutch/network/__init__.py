"""Networks: bridges, addresses, published ports, names; user-mode networking when rootless."""

from hutch.network.endpoints import container_messages
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
    "container_messages",
    "netns_path",
]
