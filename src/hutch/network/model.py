"""The records of the network layer: networks, endpoints, and who holds which address or port."""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
import msgspec

__all__ = [
    "AddressLease",
    "Cursor",
    "Endpoint",
    "EndpointAddress",
    "NetworkRecord",
    "PortLease",
    "PublishedPort",
    "SubnetRecord",
    "Sysctl",
]

NETWORKS = "networks"
ENDPOINTS = "endpoints"
ADDRESSES = "addresses"
PORTS = "ports"
CURSORS = "ipam"
HOST = "network_host"

DEFAULT_NETWORK = "bridge"
BUILTIN_NETWORKS = ("bridge", "host", "none")


class SubnetRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One subnet of a network; addresses are given out from `ip_range` where it is set.
    `reserved` are addresses, by name, that nobody is given. `chosen`: nobody asked for this one,
    and it may be another while nobody is in it."""

    subnet: str
    gateway: str
    ip_range: str = ""
    chosen: bool = False
    reserved: dict[str, str] = {}


class NetworkRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One network, kept under its name. `mtu` 0 leaves the kernel's; `dns` says whether
    its members' names are resolved; `attachable` is what somebody has said, for who asks."""

    id: str
    name: str
    driver: str
    created_ns: int
    bridge: str = ""
    subnets: tuple[SubnetRecord, ...] = ()
    internal: bool = False
    ipv6: bool = False
    mtu: int = 0
    dns: bool = False
    attachable: bool = False
    labels: dict[str, str] = {}
    options: dict[str, str] = {}


class EndpointAddress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One address of an endpoint. `gateway` is the bridge's own address in that subnet."""

    address: str
    prefix: int
    gateway: str


class PublishedPort(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A port of the host that leads to the instance; `host_ip` "" means every address."""

    container_port: int
    host_port: int
    host_ip: str = ""
    protocol: str = "tcp"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One instance's place in one network: all that `attach` needs, decided beforehand.

    `interface` and `ifindex` are those inside the instance, `host_interface` the other
    end. `names` resolve to the addresses for the other members of the network; `upstreams`
    are the servers that this instance's other queries go to. `rx_rate` and `tx_rate` are
    bits per second that the instance may receive and send, 0 for no limit.
    """

    id: str
    network: str
    network_id: str
    instance_id: str
    bridge: str
    interface: str
    ifindex: int
    host_interface: str
    mac: str
    addresses: tuple[EndpointAddress, ...]
    aliases: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    ports: tuple[PublishedPort, ...] = ()
    upstreams: tuple[str, ...] = ()
    default_route: bool = False
    internal: bool = False
    dns: bool = False
    mtu: int = 0
    rx_rate: int = 0
    tx_rate: int = 0

    @property
    def ipv4(self) -> str:
        """Return the IPv4 address, or ""."""
        return next((a.address for a in self.addresses if ":" not in a.address), "")

    @property
    def ipv6(self) -> str:
        """Return the IPv6 address, or ""."""
        return next((a.address for a in self.addresses if ":" in a.address), "")


class AddressLease(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds an address."""

    instance_id: str
    endpoint_id: str


class PortLease(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a port of the host, and where it leads."""

    instance_id: str
    endpoint_id: str
    protocol: str
    host_ip: str
    host_port: int
    targets: tuple[str, ...]
    target_port: int


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """Where the search for a free address of a subnet goes on."""

    next: int


class Sysctl(msgspec.Struct, frozen=True, kw_only=True):
    """The value that a kernel setting had before hutch changed it."""

    before: str
