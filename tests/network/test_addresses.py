"""Addresses, subnets and the pure parts of the table, against the standard library."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.errors import InvalidArgument
from hutch.network.addresses import (
    Subnet,
    format_address,
    format_mac,
    parse_address,
    parse_mac,
    parse_subnet,
)
from hutch.network.firewall import port_elements
from hutch.network.ipam import choose_subnet
from hutch.network.model import PortLease

networks = st.one_of(
    st.builds(
        lambda a, p: ipaddress.ip_network((a, p), strict=False),
        st.ip_addresses(v=4),
        st.integers(0, 32),
    ),
    st.builds(
        lambda a, p: ipaddress.ip_network((a, p), strict=False),
        st.ip_addresses(v=6),
        st.integers(0, 128),
    ),
)


def read(text: str) -> Subnet:
    return parse_subnet(text, field="f")


@given(st.ip_addresses())
def test_addresses_are_read_as_the_library_reads_them(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    packed = parse_address(str(address), field="f")
    assert packed == address.packed
    assert ipaddress.ip_address(format_address(packed)) == address


@given(st.text(max_size=40))
def test_anything_else_is_refused_naming_the_field(text: str) -> None:
    for parse in (parse_address, parse_subnet, parse_mac):
        try:
            parse(text, field="the.field")
        except InvalidArgument as error:
            assert error.field == "the.field"


@given(networks, networks)
def test_subnets_relate_as_the_library_says(
    one: ipaddress.IPv4Network | ipaddress.IPv6Network,
    other: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> None:
    left, right = read(str(one)), read(str(other))
    assert left.size == one.num_addresses
    assert left.overlaps(right) == one.overlaps(other)
    if one.version == other.version:
        assert left.is_within(right) == one.subnet_of(other)  # type: ignore[arg-type]
    assert (other.network_address.packed in left) == (other.network_address in one)


@given(st.lists(networks, max_size=6))
def test_a_chosen_subnet_meets_none_of_the_taken(
    taken: list[ipaddress.IPv4Network | ipaddress.IPv6Network],
) -> None:
    busy = [read(str(network)) for network in taken if network.prefixlen > 8]
    chosen = choose_subnet(busy)
    assert not any(chosen.overlaps(other) for other in busy)


def test_a_mac_address_is_read_and_printed() -> None:
    assert format_mac(parse_mac("02-42-AC-11-00-02", field="f")) == "02:42:ac:11:00:02"


@pytest.mark.parametrize("text", ["ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "2:42:ac:11:0:2"])
def test_what_is_no_host_address_is_no_mac(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_mac(text, field="f")


@pytest.mark.parametrize(
    ("host_ip", "expected"),
    [
        ("", ["ports4_any", "ports6_any"]),
        ("0.0.0.0", ["ports4_any"]),
        ("::", ["ports6_any"]),
        ("192.0.2.1", ["ports4"]),
        ("2001:db8::1", ["ports6"]),
    ],
)
def test_a_port_becomes_an_element_of_each_family(host_ip: str, expected: list[str]) -> None:
    lease = PortLease(
        instance_id="i",
        endpoint_id="e",
        protocol="tcp",
        host_ip=host_ip,
        host_port=8080,
        targets=("172.17.0.2", "fd00::2"),
        target_port=80,
    )
    assert [name for name, _, _ in port_elements(lease)] == expected
