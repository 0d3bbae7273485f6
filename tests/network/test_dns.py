"""Names of instances, asked with dig from inside them."""

from __future__ import annotations

import os
import select
import signal
import socket
from pathlib import Path

import pytest

from hutch.errors import InvalidArgument, Unavailable
from hutch.ids import new_id, short_id
from hutch.network import resolv
from hutch.spec.model import NetworkAttachment, PortMapping
from tests.network.boxes import TIMEOUT_S, Box, Lab, listener
from tests.requires import requires

pytestmark = [requires("root", "netns", "nftables", "dig"), pytest.mark.integration]


def dig(box: Box, name: str, *more: str) -> list[str]:
    """Ask the server that the instance's own resolv.conf names."""
    conf = resolv.resolv_conf("", box.endpoints).decode()
    server = conf.split()[1]
    answer = box.run("dig", f"@{server}", "+short", "+time=60", "+tries=1", name, *more)
    return sorted(answer.split())


def status(box: Box, name: str, *more: str) -> str:
    server = resolv.resolv_conf("", box.endpoints).decode().split()[1]
    text = box.run("dig", f"@{server}", "+time=60", "+tries=1", name, *more)
    return text.partition("status: ")[2].partition(",")[0]


def servers(root: Path) -> list[int]:
    """Return the process ids of the name servers of a root."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"hutch-dns") and words[2].startswith(bytes(root)):
                found.append(int(entry.name))
    return found


def kill(pid: int) -> None:
    """Kill a process and wait until it has let go of all that it held."""
    fd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([fd], [], [], TIMEOUT_S)[0]
    finally:
        os.close(fd)


@pytest.fixture
def net(lab: Lab) -> str:
    return lab.networks.create("net").name


def test_name_alias_and_short_id_resolve(lab: Lab, net: str) -> None:
    asker = lab.start(net)
    web = lab.start(NetworkAttachment(name=net, aliases=("www", "Db.Local")), name="web")
    for name in ("web", "WEB", "www", "db.local", short_id(web.id)):
        assert dig(asker, name) == [web.ipv4]
    assert dig(asker, "web", "+tcp") == [web.ipv4]


@pytest.mark.parametrize("alias", ["", "a b", "a\nhost 1.2.3.4 bank", "x" * 64, "a..b", "é"])
def test_an_alias_that_is_no_name_is_refused(lab: Lab, net: str, alias: str) -> None:
    with pytest.raises(InvalidArgument, match=r"aliases\[0\]"):
        lab.start(NetworkAttachment(name=net, aliases=(alias,)))


def test_an_instance_whose_name_is_no_name_still_starts(lab: Lab, net: str) -> None:
    asker, box = lab.start(net), lab.start(net, name="x" * 100)
    assert dig(asker, short_id(box.id)) == [box.ipv4]


def test_addresses_resolve_back_to_names(lab: Lab) -> None:
    lab.networks.create("six", ipv6=True)
    asker, web = lab.start("six"), lab.start("six", name="web")
    assert dig(asker, "-x", web.ipv4) == ["web."]
    assert dig(asker, "-x", web.endpoints[0].ipv6) == ["web."]
    assert dig(asker, "web", "AAAA") == [web.endpoints[0].ipv6]


def test_a_name_without_an_address_of_that_kind_is_not_unknown(lab: Lab, net: str) -> None:
    asker = lab.start(net, name="me")
    assert dig(asker, "me", "AAAA") == []
    assert status(asker, "me", "AAAA") == "NOERROR"
    assert status(asker, "me", "MX") == "NOERROR"


def test_instances_that_share_an_alias_take_turns(lab: Lab, net: str) -> None:
    asker = lab.start(net)
    pair = [lab.start(NetworkAttachment(name=net, aliases=("pool",))) for _ in range(2)]
    assert dig(asker, "pool") == sorted(box.ipv4 for box in pair)


@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_a_published_port_53_does_not_take_the_networks_own_queries(
    lab: Lab, net: str, kind: str
) -> None:
    lab.start(ports=[PortMapping(container_port=53, host_port=53, protocol=kind)])
    asker, web = lab.start(net), lab.start(net, name="web")
    assert dig(asker, "web", *(["+tcp"] if kind == "tcp" else [])) == [web.ipv4]


def test_a_name_goes_with_its_instance(lab: Lab, net: str) -> None:
    asker, web = lab.start(net), lab.start(net, name="web")
    assert dig(asker, "web") == [web.ipv4]
    lab.networks.detach(web.id)
    assert dig(asker, "web") == []


def test_a_new_name_resolves_in_place_of_the_old(lab: Lab, net: str) -> None:
    asker, web = lab.start(net), lab.start(net, name="web")
    lab.networks.rename(web.id, "web", "site")
    assert dig(asker, "site") == [web.ipv4]
    assert dig(asker, "web") == []


def test_an_instance_resolves_the_names_of_all_its_networks(lab: Lab, net: str) -> None:
    lab.networks.create("inner", internal=True)
    both = lab.start("inner", net)
    one, two = lab.start(net, name="one"), lab.start("inner", name="two")
    assert dig(both, "one") == [one.ipv4]
    assert dig(both, "two") == [two.ipv4]
    assert dig(one, "two") == []


def test_names_do_not_resolve_across_networks(lab: Lab, net: str) -> None:
    lab.networks.create("other")
    asker, hidden = lab.start(net), lab.start("other", name="hidden")
    gateway = hidden.endpoints[0].addresses[0].gateway
    assert dig(asker, "hidden") == []
    # The other network's server does not hear a query from this one.
    with asker.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.5)
        client.connect((gateway, 53))
        client.send(query("hidden"))
        with pytest.raises(OSError):
            client.recv(512)


def query(name: str, identifier: bytes = b"ab") -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return identifier + b"\x01\0\0\x01\0\0\0\0\0\0" + labels + b"\0\0\x01\0\x01"


def test_other_names_are_asked_of_the_given_server(lab: Lab, net: str) -> None:
    upstream = lab.outside()
    box = lab.start(net, dns=["203.0.113.2"])
    with upstream.listen(53, socket.SOCK_DGRAM) as server:
        with box.inside():
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client:
            client.settimeout(TIMEOUT_S)
            client.connect((box.endpoints[0].addresses[0].gateway, 53))
            client.send(query("example.org"))
            asked, peer = server.recvfrom(512)
            assert asked[2:] == query("example.org")[2:]
            forged = bytearray(asked)
            forged[2] |= 0x80
            forged[0] ^= 0xFF
            server.sendto(forged, peer)  # a wrong id is not an answer
            answer = asked[:2] + b"\x81\x80" + asked[4:]
            server.sendto(answer, peer)
            assert client.recv(512) == b"ab" + answer[2:]


def test_other_names_are_asked_by_tcp_too(lab: Lab, net: str) -> None:
    upstream = lab.outside()
    box = lab.start(net, dns=["203.0.113.2"])
    message = query("example.org")
    with (
        upstream.listen(53) as server,
        box.connect(box.endpoints[0].addresses[0].gateway, 53) as client,
    ):
        client.sendall(len(message).to_bytes(2, "big") + message)
        peer = server.accept()[0]
        with peer:
            asked = peer.recv(512)
            answer = asked[2:4] + b"\x81\x80" + asked[6:]
            big = answer + bytes(30000)
            peer.sendall(len(big).to_bytes(2, "big") + big)
            received = b""
            while len(received) < len(big) + 2:
                received += client.recv(65536)
            assert received[2:] == big


def test_without_a_server_to_ask_the_failure_is_told(lab: Lab, net: str) -> None:
    box = lab.start(net, dns=["203.0.113.2"])
    assert status(box, "example.org") == "SERVFAIL"
    assert status(box, "example.org", "+tcp") == "SERVFAIL"


def test_an_internal_network_knows_only_its_own_names(lab: Lab) -> None:
    lab.networks.create("inner", internal=True)
    box = lab.start("inner", name="me", dns=["203.0.113.2"])
    assert dig(box, "me") == [box.ipv4]
    assert status(box, "example.org") == "NXDOMAIN"


def test_the_server_lives_as_long_as_the_network_has_members(lab: Lab, net: str) -> None:
    assert servers(lab.root) == []
    box, other = lab.start(net), lab.start(net)
    (server,) = servers(lab.root)
    owner = Path(f"/proc/{server}/status").read_text()
    assert "Uid:\t65534\t65534\t65534\t65534" in owner
    assert "CapEff:\t0000000000000000" in owner
    lab.networks.detach(other.id)
    assert servers(lab.root) == [server]
    lab.networks.detach(box.id)
    assert servers(lab.root) == []


def test_a_killed_server_is_started_again_by_the_next_instance(lab: Lab, net: str) -> None:
    box = lab.start(net)
    (server,) = servers(lab.root)
    kill(server)
    web = lab.start(net, name="web")
    assert dig(box, "web") == [web.ipv4]


def test_a_server_of_the_host_on_the_same_port_is_told_of(lab: Lab, net: str) -> None:
    with (
        listener("", 53, socket.SOCK_DGRAM),
        pytest.raises(Unavailable, match="port 53") as caught,
    ):
        lab.start(net)
    assert caught.value.hint is not None


def test_a_network_may_do_without_names(lab: Lab) -> None:
    lab.networks.create("quiet", dns=False)
    lab.start("quiet", name="me")
    assert servers(lab.root) == []


def test_many_queries_at_once_are_answered(lab: Lab, net: str) -> None:
    box = lab.start(net, name="me")
    with box.inside():
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(TIMEOUT_S)
        client.connect((box.endpoints[0].addresses[0].gateway, 53))
        for number in range(200):
            client.send(query("me", number.to_bytes(2, "big")))
        seen = {int.from_bytes(client.recv(512)[:2], "big") for _ in range(200)}
    assert seen == set(range(200))


def test_a_client_cannot_take_all_connections(lab: Lab, net: str) -> None:
    greedy, other = lab.start(net), lab.start(net, name="other")
    gateway = other.endpoints[0].addresses[0].gateway
    held = [greedy.connect(gateway, 53) for _ in range(40)]
    try:
        assert dig(other, "other", "+tcp") == [other.ipv4]
    finally:
        for connection in held:
            connection.close()


def test_an_instance_that_ended_leaves_no_data(lab: Lab, net: str) -> None:
    directory = lab.root / "networks" / lab.networks.get(net).id
    box = lab.start(net)
    assert directory.is_dir()
    lab.networks.detach(box.id)
    assert not directory.exists()
    lab.networks.prepare(new_id(), [NetworkAttachment(name=net)])
