"""The files of /etc that tell an instance who it is and whom to ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from hutch.errors import InvalidArgument
from hutch.network import Endpoint, EndpointAddress
from hutch.network.resolv import (
    hostname_file,
    hosts_file,
    parse_extra_host,
    read_host_resolv_conf,
    resolv_conf,
)

HOST = """\
# made by somebody
nameserver 127.0.0.1
nameserver 192.0.2.53   ; the real one
nameserver ::1
search example.org example.net
options timeout:1 ndots:3
"""


def endpoint(network: int = 17, *, dns: bool = False, default: bool = True) -> Endpoint:
    return Endpoint(
        id="e",
        network="net",
        network_id="n",
        instance_id="i",
        bridge="b",
        interface="eth0",
        ifindex=64,
        host_interface="h",
        mac="02:42:ac:11:00:02",
        addresses=(
            EndpointAddress(address=f"172.{network}.0.2", prefix=16, gateway=f"172.{network}.0.1"),
        ),
        default_route=default,
        dns=dns,
    )


def test_hosts_names_the_loopback_the_extras_and_the_instance() -> None:
    text = hosts_file(
        "web",
        [endpoint()],
        domainname="example.org",
        extra_hosts=["db:10.0.0.1", "six=[fd00::1]", "host:host-gateway"],
    ).decode()
    assert "127.0.0.1\tlocalhost\n" in text
    assert "10.0.0.1\tdb\n" in text
    assert "fd00::1\tsix\n" in text
    assert "172.17.0.1\thost\n" in text
    assert text.endswith("172.17.0.2\tweb.example.org web\n")


def test_the_host_gateway_is_that_of_the_default_route() -> None:
    pair = [endpoint(18, default=False), endpoint(17)]
    assert b"172.17.0.1\tgw\n" in hosts_file("x", pair, extra_hosts=["gw:host-gateway"])
    named = hosts_file("x", pair, extra_hosts=["gw:host-gateway"], host_gateway="10.1.1.1")
    assert b"10.1.1.1\tgw\n" in named


@pytest.mark.parametrize(
    "text", ["", "db", "db:", ":1.2.3.4", "a b:1.2.3.4", "db:x", "a\n:1.1.1.1"]
)
def test_a_wrong_extra_host_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"extra_hosts\[0\]"):
        hosts_file("x", [], extra_hosts=[text])


def test_host_gateway_without_a_network_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="host-gateway"):
        hosts_file("x", [], extra_hosts=["gw:host-gateway"])


def test_an_ipv6_address_may_stand_without_brackets() -> None:
    assert parse_extra_host("six:fd00::1") == ("six", "fd00::1")


def test_servers_on_the_hosts_loopback_are_left_out() -> None:
    text = resolv_conf(HOST, [endpoint()]).decode()
    assert text.splitlines() == [
        "nameserver 192.0.2.53",
        "search example.org example.net",
        "options timeout:1 ndots:3",
    ]


def test_on_the_hosts_own_network_they_are_kept() -> None:
    assert b"nameserver 127.0.0.1\n" in resolv_conf(HOST, host_network=True)


def test_what_is_asked_for_replaces_the_hosts() -> None:
    text = resolv_conf(
        HOST, [endpoint()], dns=["9.9.9.9", "fd00::9"], search=["a.test"], options=["rotate"]
    ).decode()
    assert text == "nameserver 9.9.9.9\nnameserver fd00::9\nsearch a.test\noptions rotate\n"


def test_a_dot_is_no_search_domain() -> None:
    assert b"search" not in resolv_conf(HOST, search=["."])


def test_on_a_network_with_names_the_gateway_is_asked() -> None:
    pair = [endpoint(18, dns=True, default=False), endpoint(17, dns=True)]
    text = resolv_conf(HOST, pair, dns=["9.9.9.9"]).decode()
    assert text.startswith("nameserver 172.17.0.1\nsearch")
    assert "ndots:0" in text
    assert "ndots:3" not in text
    assert "9.9.9.9" not in text


@pytest.mark.parametrize(
    "options", [{"dns": ["x"]}, {"search": ["a b"]}, {"search": ["a\nb"]}, {"options": ["a\nb"]}]
)
def test_what_would_break_the_file_is_refused(options: dict[str, list[str]]) -> None:
    with pytest.raises(InvalidArgument, match=r"\[0\]"):
        resolv_conf(HOST, **options)  # type: ignore[arg-type]


def test_the_servers_behind_systemds_stub_are_used(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").write_text("nameserver 127.0.0.53\n")
    assert "127.0.0.53" in read_host_resolv_conf(tmp_path)
    (tmp_path / "run/systemd/resolve").mkdir(parents=True)
    (tmp_path / "run/systemd/resolve/resolv.conf").write_text("nameserver 192.0.2.1\n")
    assert "192.0.2.1" in read_host_resolv_conf(tmp_path)


def test_a_missing_resolv_conf_is_an_empty_one(tmp_path: Path) -> None:
    assert read_host_resolv_conf(tmp_path) == ""
    assert resolv_conf("") == b""


def test_hostname_is_a_line() -> None:
    assert hostname_file("web") == b"web\n"
