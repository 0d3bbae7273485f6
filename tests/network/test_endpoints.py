"""Addresses and life of endpoints: requested, exhausted, freed once, live, after crashes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from hutch.errors import (
    Busy,
    Exhausted,
    HutchError,
    InvalidArgument,
    NotFound,
    WrongState,
)
from hutch.ids import new_id, short_id
from hutch.linux import rtnetlink
from hutch.linux.rtnetlink import RouteSocket
from hutch.network import firewall, netns, sweep
from hutch.network.hostside import HostSide
from hutch.network.model import ADDRESSES, PORTS, AddressLease, PortLease
from hutch.spec.model import NetworkAttachment, PortMapping
from tests.network.boxes import Box, Lab, meets
from tests.requires import requires

pytestmark = [requires("root", "netns", "nftables"), pytest.mark.integration]


def leases(lab: Lab) -> tuple[int, int]:
    """Return how many addresses and ports are held."""
    with lab.store.read() as tx:
        return len(tx.items(ADDRESSES, AddressLease)), len(tx.items(PORTS, PortLease))


def test_a_requested_address_and_mac_are_given(lab: Lab) -> None:
    lab.networks.create("net", subnets=["10.9.0.0/24"], ipv6=True)
    wanted = NetworkAttachment(name="net", ipv4="10.9.0.77", mac="02:00:00:00:00:77")
    box = lab.start(wanted)
    assert box.ipv4 == "10.9.0.77"
    assert "02:00:00:00:00:77" in box.run("ip", "link", "show", "eth0")
    with pytest.raises(Busy, match=short_id(box.id)):
        lab.start(wanted)


@pytest.mark.parametrize(
    ("attachment", "field"),
    [
        ({"ipv4": "10.8.0.1"}, "ipv4"),
        ({"ipv4": "10.9.0.1"}, "ipv4.*gateway"),
        ({"ipv4": "10.9.0.0"}, "ipv4"),
        ({"ipv4": "10.9.0.255"}, "ipv4"),
        ({"ipv4": "ten"}, "ipv4"),
        ({"ipv6": "fd00::1"}, "ipv6"),
        ({"mac": "01:00:00:00:00:00"}, "mac"),
        ({"mac": "x"}, "mac"),
    ],
)
def test_a_wrong_request_changes_nothing(lab: Lab, attachment: dict[str, str], field: str) -> None:
    lab.networks.create("net", subnets=["10.9.0.0/24"])
    with pytest.raises(InvalidArgument, match=field):
        lab.networks.prepare(
            new_id(), [msgspec.convert({"name": "net"} | attachment, NetworkAttachment)]
        )
    assert leases(lab) == (0, 0)


def test_a_full_subnet_is_told_and_a_freed_address_given_again(lab: Lab) -> None:
    lab.networks.create("small", subnets=["10.9.0.0/28"])
    wanted = [NetworkAttachment(name="small")]
    ids = [new_id() for _ in range(13)]
    given = {lab.networks.prepare(i, wanted)[0].ipv4 for i in ids}
    assert given == {f"10.9.0.{n}" for n in range(2, 15)}
    with pytest.raises(Exhausted, match="small"):
        lab.networks.prepare(new_id(), wanted)
    lab.networks.detach(ids[4])
    assert lab.networks.prepare(new_id(), wanted)[0].ipv4 == "10.9.0.6"


def test_an_address_that_is_kept_free_is_given_to_nobody(lab: Lab) -> None:
    kept = {"router": "10.9.0.3", "printer": "10.9.0.5"}
    lab.networks.create("small", subnets=["10.9.0.0/29"], reserved=kept)
    wanted = [NetworkAttachment(name="small")]
    given = [lab.networks.prepare(new_id(), wanted)[0].ipv4 for _ in range(3)]
    assert given == ["10.9.0.2", "10.9.0.4", "10.9.0.6"]
    with pytest.raises(Exhausted):
        lab.networks.prepare(new_id(), wanted)
    with pytest.raises(Busy, match="router"):
        lab.networks.prepare(new_id(), [NetworkAttachment(name="small", ipv4="10.9.0.3")])
    with pytest.raises(InvalidArgument, match=r"reserved\[far\]"):
        lab.networks.create("other", subnets=["10.10.0.0/29"], reserved={"far": "10.9.0.3"})


def test_ports_are_at_the_network_s_address_of_the_host(lab: Lab) -> None:
    lab.networks.create("near", options={"host_ip": "127.0.0.1"})
    ports = [
        PortMapping(container_port=80),
        PortMapping(container_port=81, host_ip="127.0.0.2"),
    ]
    (endpoint,) = lab.networks.prepare(new_id(), [NetworkAttachment(name="near")], ports=ports)
    assert [port.host_ip for port in endpoint.ports] == ["127.0.0.1", "127.0.0.2"]
    with pytest.raises(InvalidArgument, match="host_ip"):
        lab.networks.create("wrong", options={"host_ip": "nonsense"})


def test_a_freed_address_is_not_the_next_one_given(lab: Lab) -> None:
    first = new_id()
    freed = lab.networks.prepare(first, [NetworkAttachment(name="bridge")])[0].ipv4
    lab.networks.detach(first)
    again = lab.networks.prepare(new_id(), [NetworkAttachment(name="bridge")])[0].ipv4
    assert again != freed


def test_addresses_taken_at_once_are_all_different(lab: Lab) -> None:
    lab.networks.ensure_default()
    found: list[str] = []

    def work() -> None:
        for _ in range(10):
            endpoints = lab.networks.prepare(new_id(), [NetworkAttachment(name="bridge")])
            found.append(endpoints[0].ipv4)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(set(found)) == 80


def test_a_second_prepare_gives_back_what_the_first_took(lab: Lab) -> None:
    ports = [PortMapping(container_port=80, host_port=8080)]
    box = lab.start(ports=ports)
    again = lab.networks.prepare(box.id, [NetworkAttachment(name="bridge")], ports=ports)
    assert leases(lab) == (1, 1)
    assert again[0].ports[0].host_port == 8080


def test_detach_frees_exactly_once(lab: Lab) -> None:
    box = lab.start(ports=[PortMapping(container_port=80, host_port=8080)])
    lab.networks.detach(box.id)
    assert leases(lab) == (0, 0)
    lab.networks.detach(box.id)
    lab.networks.detach(new_id())
    assert leases(lab) == (0, 0)


def test_an_instance_is_connected_and_disconnected_while_it_runs(lab: Lab) -> None:
    lab.networks.create("more")
    box, neighbour = lab.start(), lab.start("more")
    endpoint = lab.networks.connect(box.id, NetworkAttachment(name="more"), box.pid)
    assert endpoint.interface == "eth1"
    with neighbour.listen(80) as server:
        assert meets(server, box.connect(neighbour.ipv4, 80)) == endpoint.ipv4
    with pytest.raises(WrongState):
        lab.networks.connect(box.id, NetworkAttachment(name="more"), box.pid)
    lab.networks.disconnect(box.id, "more", box.pid)
    assert "eth1" not in box.run("ip", "link")
    with pytest.raises(NotFound):
        lab.networks.disconnect(box.id, "more", box.pid)


def test_the_default_route_moves_to_the_network_that_is_left(lab: Lab) -> None:
    lab.networks.create("more")
    box = lab.start("bridge", "more")
    assert "dev eth0" in box.run("ip", "route", "show", "default")
    lab.networks.disconnect(box.id, "bridge", box.pid)
    assert "dev eth1" in box.run("ip", "route", "show", "default")
    again = lab.networks.connect(box.id, NetworkAttachment(name="bridge"), box.pid)
    assert again.interface == "eth0"
    assert not again.default_route


def test_no_thread_stays_in_another_namespace(lab: Lab) -> None:
    box = lab.start()
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="on purpose"), netns.open_inside(box.pid) as inside:
        assert inside.link("eth0") is not None
        raise RuntimeError("on purpose")
    with pytest.raises(NotFound):
        netns.open_inside(2**22 - 1)
    assert threading.active_count() == threads
    with RouteSocket() as route:
        assert route.link(box.endpoints[0].bridge) is not None


def test_the_interface_outside_dies_with_the_namespace(lab: Lab) -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        box = Box(stack)
        lab.start(box=box)
        name = box.endpoints[0].host_interface
        with RouteSocket() as route:
            assert route.link(name) is not None
    lab.networks.reconcile(lambda _: False)
    with RouteSocket() as route:
        assert route.link(name) is None


def test_reconcile_drops_the_dead_and_keeps_the_living(lab: Lab) -> None:
    ports = [PortMapping(container_port=80, host_port=8080)]
    dead, living = lab.start(ports=ports), lab.start()
    assert lab.networks.reconcile(lambda i: i == living.id) == [dead.id]
    assert leases(lab) == (1, 0)
    with RouteSocket() as route:
        assert route.link(dead.endpoints[0].host_interface) is None
        assert route.link(living.endpoints[0].host_interface) is not None


@pytest.mark.parametrize("by", ["reconcile", "start"])
def test_who_lives_on_is_in_the_bridge_that_replaces_one_taken_away(lab: Lab, by: str) -> None:
    box = lab.start(ports=[PortMapping(container_port=80, host_port=8080)])
    with RouteSocket() as route:
        link = route.link(box.endpoints[0].bridge)
        assert link is not None
        route.request(rtnetlink.delete_link(link.index))
    if by == "reconcile":
        lab.networks.reconcile(lambda _: True)
    neighbour = lab.start()
    with box.listen(80) as server:
        meets(server, neighbour.connect(box.ipv4, 80))
        meets(server, box.connect(box.endpoints[0].addresses[0].gateway, 8080))


def test_reconcile_after_a_reboot_of_the_host_makes_all_anew(lab: Lab) -> None:
    lab.networks.create("net", ipv6=True)
    box = lab.start("net", ports=[PortMapping(container_port=80, host_port=8080)])
    lab.networks.teardown()
    lab.networks.reconcile(lambda _: True)
    with RouteSocket() as route:
        link = route.link(box.endpoints[0].bridge)
        assert link is not None
        assert len([a for a in route.addresses() if a.index == link.index]) >= 2
    assert firewall.is_intact(firewall.table_name(lab.root))


def test_teardown_leaves_nothing_on_the_host(lab: Lab) -> None:
    lab.networks.create("net")
    lab.start("net", "bridge")
    lab.networks.teardown()
    with RouteSocket() as route:
        assert [link.name for link in route.links() if link.name.startswith("h")] == []
    assert not firewall.has_table(firewall.table_name(lab.root))
    lab.networks.teardown()


def test_what_a_removed_root_left_is_swept_away(lab: Lab, tmp_path: Path) -> None:
    from contextlib import ExitStack

    root = tmp_path / "gone"
    root.mkdir()
    with ExitStack() as stack:
        other = Lab(root, stack)
        name = other.start().endpoints[0].host_interface
        kept = lab.start()
        shutil.rmtree(root)
        assert sweep.remove_vanished() == []
        with RouteSocket() as route:
            link = route.link(name)
            assert link is not None
            route.request(rtnetlink.delete_link(link.index))
        assert sweep.remove_vanished() == [str(root)]
    with RouteSocket() as route:
        bridges = [link.name for link in route.links() if link.kind == "bridge"]
    assert bridges == [kept.endpoints[0].bridge]
    assert not firewall.has_table(firewall.table_name(root))
    assert firewall.is_intact(firewall.table_name(lab.root))


STEPS: list[tuple[type | object, str]] = [
    (HostSide, "ensure_bridge"),
    (HostSide, "replace_table"),
    (HostSide, "_add_pair"),
    (HostSide, "_configure"),
    (HostSide, "open_ports"),
    (HostSide, "refresh_names"),
]


@pytest.mark.parametrize(("owner", "step"), STEPS, ids=[name for _, name in STEPS])
def test_a_failing_step_of_connect_leaves_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, owner: object, step: str
) -> None:
    """The step fails before it does anything, as it does when the kernel refuses."""
    lab.networks.create("more")
    box = lab.start()
    before = leases(lab)
    failing: Callable[..., None] = _refuse
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, failing)
        with pytest.raises(HutchError, match="refused"):
            lab.networks.connect(box.id, NetworkAttachment(name="more"), box.pid)
    assert leases(lab) == before
    assert "eth1" not in box.run("ip", "link")
    lab.networks.connect(box.id, NetworkAttachment(name="more"), box.pid)


def _refuse(*_: object, **__: object) -> None:
    raise Busy("refused")


def test_attach_to_a_process_that_is_gone_is_refused(lab: Lab) -> None:
    endpoints = lab.networks.prepare(new_id(), [NetworkAttachment(name="bridge")])
    with pytest.raises(HutchError):
        lab.networks.attach(endpoints[0], 2**22 - 1)
    with RouteSocket() as route:
        assert route.link(endpoints[0].host_interface) is None


IFF_RUNNING = 0x40


def test_packets_pass_as_soon_as_attach_returns(lab: Lab) -> None:
    """A listing, unlike a question for one interface, does not make the kernel catch up."""
    for _ in range(10):
        box = lab.start()
        with RouteSocket() as route:
            links = {link.name: link for link in route.links()}
        for name in (box.endpoints[0].bridge, box.endpoints[0].host_interface):
            assert links[name].flags & IFF_RUNNING
        lab.networks.detach(box.id)
        lab.networks.reconcile(lambda _: False)
