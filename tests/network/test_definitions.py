"""What may be defined as a network, and what is chosen where nothing is asked."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hutch.errors import (
    AlreadyExists,
    Busy,
    Exhausted,
    HutchError,
    InvalidArgument,
    NotFound,
    Unsupported,
    WrongState,
)
from hutch.ids import new_id, short_id
from hutch.linux import rtnetlink
from hutch.linux.rtnetlink import RouteSocket
from hutch.network import Networks
from hutch.network.addresses import parse_subnet
from hutch.network.choices import AddressPool, NetworkChoices, free_subnet
from hutch.spec.model import NetworkAttachment
from hutch.store.database import Store
from tests.network.boxes import Lab
from tests.requires import requires

pytestmark = [requires("root", "netns", "nftables"), pytest.mark.integration]


def test_the_built_in_networks_are_there(lab: Lab) -> None:
    assert [n.name for n in lab.networks.list()] == ["bridge", "host", "none"]
    assert lab.networks.get("bridge").subnets[0].subnet == "172.17.0.0/16"
    assert not lab.networks.get("bridge").dns
    for name in ("bridge", "host", "none"):
        with pytest.raises(WrongState):
            lab.networks.remove(name)
        with pytest.raises(AlreadyExists):
            lab.networks.create(name)


def test_networks_are_listed_where_nothing_can_be_written(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise Exhausted("the disk is full")

    monkeypatch.setattr(lab.store, "write", full)  # a full disk needs a file system of its own
    assert lab.networks.list() == []
    monkeypatch.undo()
    assert [n.name for n in lab.networks.list()] == ["bridge", "host", "none"]


def test_defining_makes_nothing_on_the_host(lab: Lab) -> None:
    with RouteSocket() as route:
        before = route.links()
        lab.networks.create("net")
        assert route.links() == before


def test_subnets_are_chosen_from_the_pools(lab: Lab) -> None:
    lab.networks.configure(
        NetworkChoices(
            pools=(
                AddressPool(base="10.9.0.0/30", size=30),
                AddressPool(base="10.10.0.0/23", size=24),
                AddressPool(base="fd00:7::/32", size=64),
            )
        )
    )
    assert lab.networks.get("bridge").subnets[0].subnet == "10.9.0.0/30"
    lab.networks.create("asked", subnets=["10.10.0.16/28"])
    made = lab.networks.create("six", ipv6=True)
    assert [one.subnet for one in made.subnets] == ["10.10.1.0/24", "fd00:7::/64"]
    with pytest.raises(Exhausted, match="address pools"):
        lab.networks.create("more")


def test_a_large_pool_with_its_begin_taken_has_a_subnet_at_once() -> None:
    taken = [parse_subnet("fd00::/16", field="x"), parse_subnet("10.0.0.0/9", field="x")]
    six = free_subnet(AddressPool(base="fd00::/8", size=64), taken)
    assert str(six) == "fd01::/64"
    four = free_subnet(AddressPool(base="10.0.0.0/8", size=30), taken)
    assert str(four) == "10.128.0.0/30"
    assert free_subnet(AddressPool(base="10.1.0.0/16", size=24), taken) is None


def test_the_default_network_is_made_as_asked_while_nobody_is_in_it(lab: Lab) -> None:
    before = lab.networks.get("bridge")
    asked = NetworkChoices(
        subnets=("172.26.0.0/24",),
        gateways=("172.26.0.9",),
        ip_ranges=("172.26.0.128/25",),
        mtu=1400,
        masquerade=False,
    )
    assert lab.networks.configure(asked)
    after = lab.networks.get("bridge")
    assert (after.id, after.bridge) == (before.id, before.bridge)
    assert after.subnets[0].gateway == "172.26.0.9"
    assert (after.mtu, after.options) == (1400, {"masquerade": "false"})
    box = lab.box()
    (endpoint,) = lab.networks.prepare(box.id, [NetworkAttachment(name="bridge")])
    assert endpoint.ipv4 == "172.26.0.128"
    assert lab.networks.configure(asked)
    assert not lab.networks.configure(NetworkChoices(subnets=("172.27.0.0/24",)))
    assert lab.networks.get("bridge").subnets[0].subnet == "172.26.0.0/24"
    lab.networks.detach(box.id)
    with pytest.raises(InvalidArgument, match="overlaps"):
        lab.networks.create("other", subnets=["172.28.0.0/16"])
        lab.networks.configure(NetworkChoices(subnets=("172.28.0.0/24",)))
    assert lab.networks.get("bridge").subnets[0].subnet == "172.26.0.0/24"
    assert lab.networks.configure(NetworkChoices(subnets=("172.27.0.0/24",)))


def test_a_chosen_subnet_overlaps_no_route_of_the_host(lab: Lab) -> None:
    with RouteSocket() as route:
        for number, address in enumerate(("172.17.5.1", "172.18.0.1"), 500):
            route.request(rtnetlink.add_bridge(f"other{number}"))
            link = route.link(f"other{number}")
            assert link is not None
            route.request(rtnetlink.add_address(link.index, socket.inet_aton(address), 24))
    assert lab.networks.create("net").subnets[0].subnet == "172.20.0.0/16"
    assert lab.networks.get("bridge").subnets[0].subnet == "172.19.0.0/16"


def test_all_that_is_asked_for_is_kept(lab: Lab) -> None:
    made = lab.networks.create(
        "net",
        subnets=["10.9.0.0/24", "fd00:9::/64"],
        gateways=["fd00:9::fe", "10.9.0.254"],
        ip_ranges=["10.9.0.128/26"],
        labels={"a": "1"},
        options={"com.docker.network.driver.mtu": "1400", "bridge": "mine0"},
    )
    assert [s.gateway for s in made.subnets] == ["10.9.0.254", "fd00:9::fe"]
    assert (made.mtu, made.bridge, made.ipv6) == (1400, "mine0", True)
    box = lab.start("net")
    assert box.ipv4 == "10.9.0.128"
    assert "mtu 1400" in box.run("ip", "link", "show", "eth0")
    with RouteSocket() as route:
        link = route.link("mine0")
    assert link is not None
    assert link.mtu == 1400


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "-x"}, "name"),
        ({"name": "x" * 200}, "name"),
        ({"subnets": ["10.0.0.0"]}, r"subnets\[0\]"),
        ({"subnets": ["10.0.0.1/24"]}, r"subnets\[0\]"),
        ({"subnets": ["10.0.0.0/31"]}, r"subnets\[0\]"),
        ({"subnets": ["10.0.0.0/٣"]}, r"subnets\[0\]"),
        ({"subnets": ["127.0.0.0/16"]}, r"subnets\[0\]"),
        ({"subnets": ["224.0.0.0/16"]}, r"subnets\[0\]"),
        ({"subnets": ["x/8"]}, r"subnets\[0\]"),
        ({"subnets": ["10.9.0.0/24", "10.9.0.0/25"]}, r"subnets\[1\].*same network"),
        ({"subnets": ["172.17.0.0/24"]}, r"subnets\[0\].*network bridge"),
        ({"subnets": ["10.9.0.0/24"], "gateways": ["10.8.0.1"]}, r"gateways\[0\]"),
        ({"subnets": ["10.9.0.0/24"], "gateways": ["10.9.0.255"]}, r"gateways\[0\]"),
        ({"subnets": ["10.9.0.0/24"], "ip_ranges": ["10.9.0.0/16"]}, r"ip_ranges\[0\]"),
        ({"options": {"mtu": "10"}}, "mtu"),
        ({"options": {"mtu": "x"}}, "mtu"),
        ({"options": {"bridge": "a b"}}, "bridge"),
        ({"options": {"bridge": "x" * 16}}, "bridge"),
        ({"options": {"speed": "9"}}, "options"),
        ({"options": {"masquerade": "perhaps"}}, "options"),
    ],
)
def test_a_wrong_definition_names_the_field(
    lab: Lab, options: dict[str, object], field: str
) -> None:
    arguments = {"name": "net"} | options
    with pytest.raises(InvalidArgument, match=field):
        lab.networks.create(**arguments)  # type: ignore[arg-type]
    assert len(lab.networks.list()) == 3


def test_an_overlap_is_told_by_the_name_of_the_network(lab: Lab) -> None:
    lab.networks.create("front", subnets=["10.9.0.0/24"])
    lab.start("front")  # now its bridge has an address of the host in that subnet
    with pytest.raises(InvalidArgument, match="network front"):
        lab.networks.create("back", subnets=["10.9.0.0/16"])


def test_another_driver_is_refused(lab: Lab) -> None:
    with pytest.raises(Unsupported, match="overlay"):
        lab.networks.create("net", driver="overlay")


def test_a_name_and_a_bridge_belong_to_one_network(lab: Lab) -> None:
    lab.networks.create("net", options={"bridge": "mine0"})
    with pytest.raises(AlreadyExists):
        lab.networks.create("net")
    with pytest.raises(AlreadyExists, match="mine0"):
        lab.networks.create("more", options={"bridge": "mine0"})


def test_a_network_is_found_by_name_id_and_prefix(lab: Lab) -> None:
    made = lab.networks.create("net")
    assert lab.networks.get("net") == made
    assert lab.networks.get(made.id) == made
    assert lab.networks.get(made.id[:10]) == made
    for wrong in ("nothing", "", "zz"):
        with pytest.raises(NotFound):
            lab.networks.get(wrong)


def test_filters_are_those_of_docker(lab: Lab) -> None:
    made = lab.networks.create("net", labels={"tier": "web"})

    def names(**filters: str) -> list[str]:
        return [n.name for n in lab.networks.list({k: [v] for k, v in filters.items()})]

    assert names(name="et") == ["net"]
    assert names(id=made.id[:8]) == ["net"]
    assert names(label="tier") == names(label="tier=web") == ["net"]
    assert names(label="tier=db") == []
    assert names(driver="null") == ["none"]
    assert names(type="custom") == names(dangling="true") == ["net"]
    with pytest.raises(InvalidArgument, match="colour"):
        names(colour="red")


def test_a_network_in_use_is_not_removed(lab: Lab) -> None:
    lab.networks.create("net")
    box = lab.start("net")
    with pytest.raises(Busy, match=short_id(box.id)):
        lab.networks.remove("net")
    assert lab.networks.prune() == []
    lab.networks.detach(box.id)
    lab.networks.remove("net")
    with pytest.raises(NotFound):
        lab.networks.get("net")


def test_removal_takes_the_bridge_away(lab: Lab) -> None:
    made = lab.networks.create("net")
    box = lab.start("net")
    lab.networks.detach(box.id)
    assert lab.networks.prune() == ["net"]
    with RouteSocket() as route:
        assert route.link(made.bridge) is None


def test_a_name_of_a_foreign_interface_is_left_alone(lab: Lab) -> None:
    with RouteSocket() as route:
        route.request(rtnetlink.add_veth("mine0", "mine1"))
    lab.networks.create("net", options={"bridge": "mine0"})
    with pytest.raises(Busy, match="veth"):
        lab.start("net")


def test_a_route_that_came_later_is_told_of(lab: Lab) -> None:
    lab.networks.create("net", subnets=["10.9.0.0/24"])
    with RouteSocket() as route:
        route.request(rtnetlink.add_bridge("other"))
        link = route.link("other")
        assert link is not None
        route.request(rtnetlink.add_address(link.index, socket.inet_aton("10.9.0.1"), 16))
    with pytest.raises(Busy, match=r"10\.9\.0\.0/16 on interface other"):
        lab.start("net")


def test_an_ipv6_subnet_is_chosen_at_random(lab: Lab) -> None:
    one = lab.networks.create("one", ipv6=True).subnets[1].subnet
    other = lab.networks.create("other", ipv6=True).subnets[1].subnet
    assert one != other
    assert parse_subnet(one, field="").is_within(parse_subnet("fd00::/8", field=""))


def test_the_hosts_forwarding_is_turned_on_and_its_value_remembered(lab: Lab) -> None:
    from hutch.network.model import HOST, Sysctl

    forwarding = Path("/proc/sys/net/ipv4/ip_forward")
    forwarding.write_text("0")
    lab.start()
    assert forwarding.read_text().strip() == "1"
    with lab.store.read() as tx:
        assert tx.get(HOST, "net/ipv4/ip_forward", Sysctl) == Sysctl(before="0")


def test_ipv6_forwarding_keeps_the_hosts_learnt_routes(lab: Lab) -> None:
    lab.outside()
    accept = Path("/proc/sys/net/ipv6/conf/uplink/accept_ra")
    accept.write_text("1")
    lab.networks.create("six", ipv6=True)
    lab.start("six")
    assert accept.read_text().strip() == "2"
    assert Path("/proc/sys/net/ipv6/conf/all/forwarding").read_text().strip() == "1"


def test_definitions_are_shared_between_processes(lab: Lab) -> None:
    lab.networks.create("net")
    second = Store.open(lab.root / "hutch.db")
    try:
        others = Networks(lab.root, second)
        assert others.get("net") == lab.networks.get("net")
        with pytest.raises(HutchError):
            others.create("net")
    finally:
        second.close()


def test_the_same_network_twice_is_refused(lab: Lab) -> None:
    wanted = [NetworkAttachment(name="bridge")] * 2
    with pytest.raises(InvalidArgument, match=r"networks\[1\]"):
        lab.networks.prepare(new_id(), wanted)
    with pytest.raises(InvalidArgument, match="host"):
        lab.networks.prepare(new_id(), [NetworkAttachment(name="host")])


def test_two_roots_that_chose_the_same_subnet_both_get_one(lab: Lab, tmp_path: Path) -> None:
    """Between its definition and its first use a chosen subnet is held by nothing."""
    store = Store.open(tmp_path / "other.db")
    other = Networks(tmp_path, store)
    try:
        mine, theirs = lab.networks.create("net", ipv6=True), other.create("net")
        assert mine.subnets[0].subnet == theirs.subnets[0].subnet
        fixed = other.create("fixed", subnets=["10.9.0.0/24"])
        attach = [NetworkAttachment(name="net"), NetworkAttachment(name="fixed")]
        first = other.prepare(new_id(), attach)
        assert first[0].ipv4 == "172.18.0.2"
        box = lab.start("net")  # it is connected there: the way of a start, with a new subnet
        assert box.ipv4 == "172.19.0.2"
        assert lab.networks.get("net").subnets[1] == mine.subnets[1]
        assert other.get("fixed") == fixed
        lab.networks.create("taken", subnets=["10.9.1.0/24"])
        other.create("late", subnets=["10.9.1.0/24"])
        lab.start("taken")
        with pytest.raises(Busy, match=r"network late: 10\.9\.1\.0/24 overlaps"):
            other.prepare(new_id(), [NetworkAttachment(name="late")])
    finally:
        other.teardown()
        store.close()
