"""The netlink library against the kernel, and its reader against broken answers."""

from __future__ import annotations

import errno
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.linux import netlink, rtnetlink
from hutch.linux.rtnetlink import RouteSocket
from tests.network.boxes import Lab
from tests.requires import requires

real = [requires("root", "netns", "nftables"), pytest.mark.integration]


class TestKernel:
    """Requests that the kernel answers."""

    pytestmark = real

    def test_a_pair_is_made_into_a_namespace_with_chosen_names(self, lab: Lab) -> None:
        box = lab.box()
        mac = bytes.fromhex("020000000001")
        with RouteSocket() as route:
            route.request(rtnetlink.add_bridge("b0", mtu=1400))
            bridge = route.link("b0")
            assert bridge is not None
            message = rtnetlink.add_veth(
                "near",
                "far",
                netns_pid=box.pid,
                master=bridge.index,
                mtu=1400,
                index=5000,
                peer_mac=mac,
                peer_index=77,
            )
            route.request(message)
            near = route.link("near")
        assert near is not None
        assert (near.index, near.master, near.is_up, near.mtu) == (5000, bridge.index, True, 1400)
        with box.inside(), RouteSocket() as route:
            far = route.link("far")
        assert far is not None
        assert (far.index, far.mac, far.mtu, far.kind) == (77, mac, 1400, "veth")

    def test_a_pair_may_be_made_by_descriptor(self, lab: Lab) -> None:
        box = lab.box()
        fd = os.open(f"/proc/{box.pid}/ns/net", os.O_RDONLY)
        try:
            with RouteSocket() as route:
                route.request(rtnetlink.add_veth("near", "far", netns_fd=fd))
        finally:
            os.close(fd)
        assert "far" in box.run("ip", "link")

    def test_links_are_changed_and_removed(self, lab: Lab) -> None:
        with RouteSocket() as route:
            route.request(rtnetlink.add_bridge("b0", up=False))
            link = route.link("b0")
            assert link is not None
            assert not link.is_up
            route.request(
                rtnetlink.set_link(link.index, name="b1", mtu=1300),
                rtnetlink.set_link(link.index, up=True),
            )
            changed = route.link("b1")
            assert changed is not None
            assert (changed.mtu, changed.is_up, changed.kind) == (1300, True, "bridge")
            assert changed in route.links()
            route.request(rtnetlink.delete_link(link.index))
            assert route.link("b1") is None

    @pytest.mark.parametrize(("text", "prefix"), [("10.1.2.3", 24), ("fd00::3", 64)])
    def test_addresses_and_routes_come_and_go(self, lab: Lab, text: str, prefix: int) -> None:
        family = socket.AF_INET6 if ":" in text else socket.AF_INET
        address = socket.inet_pton(family, text)
        far = socket.inet_pton(family, "fd99::" if ":" in text else "10.99.0.0")
        gateway = address[:-1] + b"\x09"
        with RouteSocket() as route:
            route.request(rtnetlink.add_bridge("b0"))
            link = route.link("b0")
            assert link is not None
            route.request(rtnetlink.add_address(link.index, address, prefix))
            found = [(a.address, a.prefix) for a in route.addresses() if a.index == link.index]
            assert (address, prefix) in found
            route.request(
                rtnetlink.add_route(
                    destination=far,
                    prefix=48 if len(far) > 4 else 16,
                    gateway=gateway,
                    index=link.index,
                )
            )
            route.request(rtnetlink.add_route(gateway=gateway))
            known = {(r.destination, r.gateway) for r in route.routes()}
            assert {(far, gateway), (b"", gateway)} <= known
            route.request(rtnetlink.delete_route(gateway=gateway))
            assert (b"", gateway) not in {(r.destination, r.gateway) for r in route.routes()}
            route.request(rtnetlink.delete_address(link.index, address, prefix))
            assert address not in [a.address for a in route.addresses()]

    def test_a_refusal_carries_the_errno_and_the_kernels_words(self, lab: Lab) -> None:
        with RouteSocket() as route:
            route.request(rtnetlink.add_bridge("b0"))
            with pytest.raises(FileExistsError):
                route.request(rtnetlink.add_bridge("b0"))
            route.request(rtnetlink.add_bridge("b0"), ignore=(errno.EEXIST,))
            gateway = socket.inet_aton("198.51.100.1")
            with pytest.raises(OSError, match="gateway") as caught:
                route.request(rtnetlink.add_route(gateway=gateway))
            assert caught.value.errno == errno.ENETUNREACH

    def test_a_batch_goes_on_after_a_refusal(self, lab: Lab) -> None:
        with RouteSocket() as route:
            results = route.try_request(
                rtnetlink.add_bridge("b0"), rtnetlink.add_bridge("b0"), rtnetlink.add_bridge("b1")
            )
            assert [r is None for r in results] == [True, False, True]
            assert route.link("b1") is not None

    def test_many_links_are_listed(self, lab: Lab) -> None:
        with RouteSocket() as route:
            route.request(*(rtnetlink.add_bridge(f"b{n}") for n in range(120)))
            names = {link.name for link in route.links()}
        assert {f"b{n}" for n in range(120)} <= names

    def test_a_neighbour_is_pinned(self, lab: Lab) -> None:
        with RouteSocket() as route:
            route.request(rtnetlink.add_bridge("b0"))
            link = route.link("b0")
            assert link is not None
            mac = bytes.fromhex("020000000009")
            route.request(rtnetlink.add_neighbour(link.index, socket.inet_aton("10.0.0.9"), mac))
        assert lab.box() is not None


@pytest.mark.parametrize("name", ["", "a/b", "x" * 16, ".", ".."])
def test_what_is_no_interface_name_is_not_sent(name: str) -> None:
    with pytest.raises(ValueError, match="interface name"):
        rtnetlink.add_bridge(name)


def test_what_is_no_address_is_not_sent() -> None:
    with pytest.raises(ValueError, match="address"):
        rtnetlink.add_address(1, b"123", 8)


@given(st.binary(max_size=200))
def test_broken_attributes_are_read_without_harm(data: bytes) -> None:
    for payload in netlink.attributes(data).values():
        assert len(payload) <= len(data)


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=20), max_size=8))
def test_attributes_are_read_as_they_were_written(wanted: dict[int, bytes]) -> None:
    data = b"".join(netlink.attribute(kind, payload) for kind, payload in wanted.items())
    assert netlink.attributes(data) == wanted
