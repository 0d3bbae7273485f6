"""Rates: what an instance may receive and send in a network, and what enforces them."""

from __future__ import annotations

import socket

import pytest

from hutch.errors import NotFound
from hutch.linux import rtnetlink, tc
from hutch.linux.rtnetlink import RouteSocket
from hutch.network import Endpoint, rates
from hutch.spec.model import NetworkAttachment
from tests.network.boxes import Box, Lab
from tests.requires import requires

pytestmark = [requires("root", "netns", "nftables"), pytest.mark.integration]

# asm-generic/socket.h; the module has no names for them.
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
SLOW = 80_000  # bits per second: a datagram each tenth of a second
DATAGRAM = 1000
SENT = 300


def received(sender: Box, receiver: Box) -> int:
    """Return how many of the datagrams sent at once arrive, before half a second of silence."""
    with receiver.listen(5000, socket.SOCK_DGRAM) as server, sender.inside():
        # Room for all, so that it is not the receiver that loses them.
        server.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        server.settimeout(0.5)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 << 20)
            for _ in range(SENT):
                client.sendto(bytes(DATAGRAM), (receiver.ipv4, 5000))
        count = 0
        try:
            while count < SENT:
                server.recv(2 * DATAGRAM)
                count += 1
        except TimeoutError:
            pass
        return count


def buckets(endpoint: Endpoint) -> tuple[int, int]:
    """Return the rates that the kernel holds an endpoint to, bits received and sent."""
    with RouteSocket() as route:
        found = []
        for name in (endpoint.host_interface, rates.queue_name(endpoint)):
            link = route.link(name)
            bucket = tc.token_bucket(route, link.index) if link is not None else None
            found.append(bucket.rate * 8 if bucket is not None else 0)
    return found[0], found[1]


def queues() -> list[str]:
    with RouteSocket() as route:
        return [link.name for link in route.links() if link.kind == "ifb"]


@pytest.mark.parametrize(("rx", "tx"), [(SLOW, 0), (0, SLOW)])
def test_what_comes_faster_than_the_rate_is_lost(lab: Lab, rx: int, tx: int) -> None:
    free = lab.start()
    held = lab.start(NetworkAttachment(name="bridge", rx_rate=rx, tx_rate=tx))
    there, back = received(free, held), received(held, free)
    slow, quick = (there, back) if rx else (back, there)
    assert quick == SENT
    assert 0 < slow < SENT / 2


def test_a_limited_connection_loses_nothing(lab: Lab) -> None:
    free = lab.start()
    held = lab.start(NetworkAttachment(name="bridge", rx_rate=20_000_000, tx_rate=20_000_000))
    data = bytes(range(256)) * 1000
    for sender, receiver in ((free, held), (held, free)):
        with receiver.listen(80) as server:
            client = sender.connect(receiver.ipv4, 80)
            with client, server.accept()[0] as accepted:
                accepted.settimeout(30)
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                got = b"".join(iter(lambda: accepted.recv(1 << 16), b""))
                assert got == data


@pytest.mark.parametrize("rate", [8_000, 10_000_000, 100_000_000_000])
def test_the_kernel_has_the_rate_that_was_asked(lab: Lab, rate: int) -> None:
    box = lab.start(NetworkAttachment(name="bridge", rx_rate=rate, tx_rate=rate))
    assert buckets(box.endpoints[0]) == (rate, rate)


def test_rates_change_and_end_while_the_instance_runs(lab: Lab) -> None:
    free, box = lab.start(), lab.start()
    for rx, tx in ((SLOW, 0), (2 * SLOW, SLOW), (0, 3 * SLOW), (0, 0)):
        changed = lab.networks.set_rates(box.id, "bridge", rx_rate=rx, tx_rate=tx)
        assert (changed.rx_rate, changed.tx_rate) == (rx, tx)
        assert buckets(box.endpoints[0]) == (rx, tx)
    assert queues() == []
    assert received(free, box) == received(box, free) == SENT


def test_rates_of_a_network_it_is_not_in_are_refused(lab: Lab) -> None:
    lab.networks.create("other")
    box = lab.start()
    with pytest.raises(NotFound, match="not connected to network other"):
        lab.networks.set_rates(box.id, "other", rx_rate=SLOW, tx_rate=0)


def test_nothing_is_left_of_an_instance_that_has_ended(lab: Lab) -> None:
    lab.networks.create("other")
    box = lab.start(NetworkAttachment(name="bridge", tx_rate=SLOW))
    other = NetworkAttachment(name="other", tx_rate=SLOW)
    lab.networks.connect(box.id, other, box.pid)
    assert len(queues()) == 2
    lab.networks.disconnect(box.id, "other", box.pid)
    assert len(queues()) == 1
    lab.networks.detach(box.id)
    assert queues() == []


def test_reconciliation_removes_strays_and_makes_again_what_is_missing(lab: Lab) -> None:
    box = lab.start(NetworkAttachment(name="bridge", rx_rate=SLOW, tx_rate=SLOW))
    gone = lab.start(NetworkAttachment(name="bridge", tx_rate=SLOW))
    with RouteSocket() as route:
        link = route.link(rates.queue_name(box.endpoints[0]))
        assert link is not None
        route.request(rtnetlink.delete_link(link.index), rtnetlink.add_ifb("hifromsomebody"))
    lab.networks.reconcile(lambda instance: instance != gone.id)
    assert sorted(queues()) == sorted([rates.queue_name(box.endpoints[0]), "hifromsomebody"])
    assert buckets(box.endpoints[0]) == (SLOW, SLOW)
    assert 0 < received(box, lab.start()) < SENT / 2


def test_a_refusal_leaves_no_limit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    box = lab.start()
    # A message that the kernel refuses: there is no device of that index.
    monkeypatch.setattr(tc, "redirect_incoming", lambda *_: rtnetlink.get_link(987654))
    with pytest.raises(Exception, match="rates of eth0 in network bridge"):
        lab.networks.set_rates(box.id, "bridge", rx_rate=SLOW, tx_rate=SLOW)
    assert queues() == []
    assert buckets(box.endpoints[0]) == (0, 0)
    assert lab.networks.endpoints(box.id)[0].tx_rate == 0
