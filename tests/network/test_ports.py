"""Published ports: where they are reached from, conflicts, ranges, free choice."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from hutch.errors import Busy, Exhausted, InvalidArgument, NotFound, Unsupported
from hutch.ids import new_id, short_id
from hutch.linux import nft
from hutch.network.proxies import PortProxies
from hutch.spec.model import NetworkAttachment, PortMapping
from tests.network.boxes import TIMEOUT_S, Lab, listener, meets
from tests.requires import requires

pytestmark = [requires("root", "netns", "nftables"), pytest.mark.integration]
BRIDGE = [NetworkAttachment(name="bridge")]


def web(**options: object) -> list[PortMapping]:
    return [PortMapping(**{"container_port": 80, "host_port": 8080} | options)]  # type: ignore[arg-type]


def test_a_port_is_reached_from_the_loopback(lab: Lab) -> None:
    box = lab.start(ports=web())
    with box.listen(80) as server:
        meets(server, socket.create_connection(("127.0.0.1", 8080), timeout=TIMEOUT_S))


def test_a_port_on_the_loopback_is_not_reached_from_outside(lab: Lab) -> None:
    outside = lab.outside()
    box = lab.start(ports=web(host_ip="127.0.0.1"))
    with box.listen(80) as server:
        meets(server, socket.create_connection(("127.0.0.1", 8080), timeout=TIMEOUT_S))
        with pytest.raises(OSError), outside.inside():
            socket.create_connection(("203.0.113.1", 8080), timeout=0.5)


def test_a_port_on_one_address_is_reached_by_that_address_only(lab: Lab) -> None:
    outside = lab.outside()
    box = lab.start(ports=web(host_ip="203.0.113.1"))
    with box.listen(80) as server:
        meets(server, outside.connect("203.0.113.1", 8080))
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", 8080), timeout=0.5)


def test_a_neighbour_and_the_instance_itself_reach_the_port_of_the_host(lab: Lab) -> None:
    box, neighbour = lab.start(ports=web()), lab.start()
    gateway = box.endpoints[0].addresses[0].gateway
    with box.listen(80) as server:
        meets(server, neighbour.connect(gateway, 8080))
        meets(server, box.connect(gateway, 8080))


def test_udp_goes_there_and_back(lab: Lab) -> None:
    outside = lab.outside()
    box = lab.start(ports=web(protocol="udp"))
    with box.listen(80, socket.SOCK_DGRAM) as server:
        with outside.inside():
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for name, address in (("outside", "203.0.113.1"), ("host", "127.0.0.1")):
            if name == "host":
                client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with client:
                client.settimeout(TIMEOUT_S)
                client.sendto(b"ping", (address, 8080))
                data, peer = server.recvfrom(16)
                server.sendto(data[::-1], peer)
                assert client.recvfrom(16) == (b"gnip", (address, 8080))


def test_tcp_and_udp_have_ports_of_their_own(lab: Lab) -> None:
    lab.start(ports=web())
    box = lab.start(ports=web(protocol="udp"))
    assert box.endpoints[0].ports[0].host_port == 8080


def test_a_range_of_ports_leads_to_the_same_range_inside(lab: Lab) -> None:
    mappings = [PortMapping(container_port=80 + n, host_port=9000 + n) for n in range(20)]
    box = lab.start(ports=mappings)
    for number in (0, 19):
        with box.listen(80 + number) as server:
            meets(server, socket.create_connection(("127.0.0.1", 9000 + number), timeout=TIMEOUT_S))


def test_a_port_of_another_instance_is_refused_and_the_holder_named(lab: Lab) -> None:
    holder = lab.start(ports=web())
    for taken in (web(), web(host_ip="127.0.0.1")):
        with pytest.raises(Busy, match=short_id(holder.id)):
            lab.networks.prepare(new_id(), BRIDGE, ports=taken)
    assert len(lab.networks.inspect("bridge").endpoints) == 1


def test_one_port_on_two_addresses_goes_to_two_instances(lab: Lab) -> None:
    outside = lab.outside()
    one = lab.start(ports=web(host_ip="127.0.0.1"))
    other = lab.start(ports=web(host_ip="203.0.113.1"))
    with one.listen(80) as local, other.listen(80) as public:
        meets(local, socket.create_connection(("127.0.0.1", 8080), timeout=TIMEOUT_S))
        meets(public, outside.connect("203.0.113.1", 8080))


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_of_a_process_of_the_host_is_refused(lab: Lab, protocol: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with listener("127.0.0.1", 8080, kind), pytest.raises(Busy, match="process of this host"):
        lab.networks.prepare(new_id(), BRIDGE, ports=web(protocol=protocol))


def test_a_free_port_is_chosen_and_recorded(lab: Lab) -> None:
    box = lab.start(ports=web(host_port=0))
    chosen = lab.networks.endpoints(box.id)[0].ports[0].host_port
    assert 32768 <= chosen <= 60999
    with box.listen(80) as server:
        meets(server, socket.create_connection(("127.0.0.1", chosen), timeout=TIMEOUT_S))


def test_a_port_is_free_again_after_the_end(lab: Lab) -> None:
    box = lab.start(ports=web())
    lab.networks.detach(box.id)
    lab.networks.detach(box.id)
    assert "8080" not in nft.run("list ruleset\n")
    other = lab.start(ports=web())
    with other.listen(80) as server:
        meets(server, socket.create_connection(("127.0.0.1", 8080), timeout=TIMEOUT_S))


@pytest.mark.parametrize("host_ip", ["", "::", "::1"])
def test_a_port_is_reached_from_the_ipv6_loopback(lab: Lab, host_ip: str) -> None:
    box = lab.start(ports=web(host_ip=host_ip))
    with box.listen(80) as server:
        meets(server, socket.create_connection(("::1", 8080), timeout=TIMEOUT_S))


def test_an_ipv6_instance_is_reached_from_the_ipv6_loopback(lab: Lab) -> None:
    lab.networks.create("six", ipv6=True)
    box = lab.start("six", ports=web(host_ip="::1"))
    with box.listen(80, host="::") as server:
        meets(server, socket.create_connection(("::1", 8080), timeout=TIMEOUT_S))


def test_udp_is_relayed_from_the_ipv6_loopback(lab: Lab) -> None:
    box = lab.start(ports=web(protocol="udp"))
    with box.listen(80, socket.SOCK_DGRAM) as server:
        for number in (b"1", b"2"):
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
                client.settimeout(TIMEOUT_S)
                for word in (b"ping", b"again"):
                    client.sendto(word + number, ("::1", 8080))
                    data, peer = server.recvfrom(16)
                    server.sendto(data[::-1], peer)
                    answer, where = client.recvfrom(16)
                    assert answer == (word + number)[::-1]
                    assert where[:2] == ("::1", 8080)


def test_a_relayed_connection_ends_one_way_at_a_time(lab: Lab) -> None:
    box = lab.start(ports=web())
    sent = os.urandom(1 << 20)
    with (
        box.listen(80) as server,
        socket.create_connection(("::1", 8080), timeout=TIMEOUT_S) as client,
    ):
        accepted, _ = server.accept()

        def echo() -> None:
            with accepted, accepted.makefile("rwb") as stream:
                stream.write(stream.read())  # only now that the other side has ended

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(echo)
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as stream:
                assert stream.read() == sent
            done.result(TIMEOUT_S)


def test_a_relayed_connection_is_refused_where_nobody_listens_inside(lab: Lab) -> None:
    lab.start(ports=web())
    with (
        socket.create_connection(("::1", 8080), timeout=TIMEOUT_S) as client,
        pytest.raises(ConnectionResetError),
    ):
        if client.recv(1) == b"":
            raise ConnectionResetError


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_published_port_is_held(lab: Lab, protocol: str, host: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    box = lab.start(ports=web(protocol=protocol))
    with pytest.raises(OSError, match="in use"):
        listener(host, 8080, kind)
    lab.networks.detach(box.id)
    listener(host, 8080, kind).close()


def test_ports_are_given_back_when_the_instance_dies(lab: Lab) -> None:
    box = lab.start(ports=web())
    os.kill(box.pid, signal.SIGKILL)
    [held] = PortProxies(lab.root / "networks").known()
    with open(lab.root / "networks" / f"proxy-{held}", "r+b") as file:
        # The proxy goes by itself; nobody of ours has to be there to see the end.
        fcntl.lockf(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_UN)
    listener("127.0.0.1", 8080).close()
    assert lab.networks.reconcile(lambda _: False) == [box.id]
    assert PortProxies(lab.root / "networks").known() == []


def test_a_port_taken_between_check_and_start_is_told(lab: Lab) -> None:
    box = lab.box()
    [endpoint] = lab.networks.prepare(box.id, BRIDGE, ports=web())
    with listener("127.0.0.1", 8080), pytest.raises(Busy, match="8080/tcp"):
        lab.networks.attach(endpoint, box.pid)
    assert PortProxies(lab.root / "networks").known() == []


def test_port_53_leaves_room_for_the_name_servers(lab: Lab) -> None:
    lab.start(ports=web(host_port=53, protocol="udp"))
    net = lab.networks.create("net").name
    assert lab.start(net).endpoints[0].dns


@pytest.mark.parametrize(
    ("mapping", "error", "text"),
    [
        (PortMapping(container_port=0), InvalidArgument, r"ports\[0\]\.container_port"),
        (PortMapping(container_port=80, host_port=70000), InvalidArgument, "host_port"),
        (PortMapping(container_port=80, host_ip="x"), InvalidArgument, "host_ip"),
        (
            PortMapping(container_port=80, host_ip="203.0.113.77", host_port=1),
            InvalidArgument,
            "77",
        ),
        (PortMapping(container_port=80, protocol="sctp"), Unsupported, "sctp"),
    ],
)
def test_a_wrong_mapping_is_refused_and_leaves_nothing(
    lab: Lab, mapping: PortMapping, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        lab.networks.prepare(new_id(), BRIDGE, ports=[mapping])
    assert lab.networks.inspect("bridge").endpoints == ()


def test_nothing_is_published_from_an_internal_network(lab: Lab) -> None:
    lab.networks.create("inner", internal=True)
    with pytest.raises(InvalidArgument, match="internal"):
        lab.networks.prepare(new_id(), [NetworkAttachment(name="inner")], ports=web())


def test_the_first_free_port_of_a_range_is_taken(lab: Lab) -> None:
    wanted = [PortMapping(container_port=80, host_port=8080, host_port_end=8082)]
    with listener("127.0.0.1", 8080):
        boxes = [lab.start(ports=wanted) for _ in range(2)]
        assert [b.endpoints[0].ports[0].host_port for b in boxes] == [8081, 8082]
        with pytest.raises(Exhausted, match="8080 to 8082"):
            lab.start(ports=wanted)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ports_move_to_the_network_that_is_left(lab: Lab, host: str) -> None:
    first, second = lab.networks.create("first").name, lab.networks.create("second").name
    box = lab.start(first, second, ports=web())
    lab.networks.disconnect(box.id, first, box.pid)
    [left] = lab.networks.endpoints(box.id)
    assert (left.network, [port.host_port for port in left.ports]) == (second, [8080])
    with box.listen(80) as server:
        meets(server, socket.create_connection((host, 8080), timeout=TIMEOUT_S))
        if host == "127.0.0.1":
            gateway = left.addresses[0].gateway
            meets(server, box.connect(gateway, 8080))


def test_an_instance_without_a_way_out_publishes_once_it_has_one(lab: Lab) -> None:
    first, second = lab.networks.create("first").name, lab.networks.create("second").name
    box = lab.start(first, ports=web())
    lab.networks.disconnect(box.id, first, box.pid)
    assert lab.networks.endpoints(box.id) == []
    lab.networks.connect(box.id, NetworkAttachment(name=second), box.pid, ports=web())
    with box.listen(80) as server:
        meets(server, socket.create_connection(("127.0.0.1", 8080), timeout=TIMEOUT_S))


def test_an_instance_of_a_removed_network_names_it(lab: Lab) -> None:
    none = lab.networks.get("none").id[:1]
    with pytest.raises(NotFound, match="any more"):
        lab.networks.prepare(new_id(), [NetworkAttachment(name=none)])
