"""Instances on networks: addresses, names, published ports."""

from __future__ import annotations

import os
import urllib.request

import pytest

from hutch.engine import Engine, Instance
from hutch.linux.rtnetlink import RouteSocket
from hutch.linux.tc import token_bucket
from hutch.network import Endpoint
from hutch.network.rates import queue_name
from tests.engine.behaviours.conftest import Maker
from tests.engine.behaviours.waiting import until

HTTPD = "echo hello > /tmp/index.html; httpd -f -p 80 -h /tmp"


def _subnet() -> str:
    """A subnet that no other worker on this host uses."""
    number = os.getpid() % 60000
    return f"10.{240 + number % 8}.{number // 8 % 250}.0/28"


@pytest.fixture
def network(home: Engine, kind: str) -> str:
    """The name of a network of the test's own."""
    return f"net-{kind}"


def test_without_network_there_is_only_loopback(make: Maker) -> None:
    assert make.sh("ls /sys/class/net; ip addr show lo | grep -c 127.0.0.1").text.split() == [
        "lo",
        "1",
    ]


def test_instances_on_one_network_find_each_other_by_name(make: Maker, network: str) -> None:
    make.engine.networks.create(network, subnets=[_subnet()])
    try:
        with make.start(HTTPD, name=f"site-{network}", network=network) as site:
            address = site.info().endpoints[0].addresses[0].address  # type: ignore[attr-defined]
            assert address in site.exec(["ip", "addr", "show", "eth0"]).text
            with make.start(network=network) as client:
                # Not by wget: the C library of a static busybox has no resolver to load.
                found = client.exec(["nslookup", f"site-{network}"]).text
                assert f"Address: {address}" in found
                ask = ["sh", "-c", f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 60 {address} 80"]
                until(lambda: client.exec(ask).text.endswith("hello\n"), "not reached")
    finally:
        make.engine.networks.remove(network)


def test_a_published_port_leads_to_the_program(make: Maker, free_port: int) -> None:
    with make.start(HTTPD, network="bridge", publish=[f"127.0.0.1:{free_port}:80"]):

        def answers() -> bool:
            try:
                url = f"http://127.0.0.1:{free_port}/"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return bool(answer.read() == b"hello\n")
            except OSError:
                return False

        until(answers, "the port does not answer")


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rates(box: Instance) -> tuple[int, int]:
    """What the kernel lets the instance receive and send, in bits per second."""
    [endpoint] = box.info().endpoints
    assert isinstance(endpoint, Endpoint)
    found = []
    with RouteSocket() as route:
        for name in (endpoint.host_interface, queue_name(endpoint)):
            link = route.link(name)
            bucket = token_bucket(route, link.index) if link is not None else None
            found.append(8 * bucket.rate if bucket is not None else 0)
    return found[0], found[1]


def test_rates_hold_from_the_start_and_change_live(make: Maker) -> None:
    wanted = {"name": "bridge", "rx_rate": "10mbit", "tx_rate": "5mbit"}
    with make.start(network=wanted) as box:
        assert _rates(box) == (10_000_000, 5_000_000)
        box.update(network={"name": "bridge", "rx_rate": 0, "tx_rate": "2mbit"})
        assert _rates(box) == (0, 2_000_000)
        box.stop(timeout=0)
        box.update(network={"name": "bridge", "rx_rate": "1mbit"})
        box.start()
        assert _rates(box) == (1_000_000, 2_000_000)
        [attachment] = box.info().spec.networks
        assert (attachment.rx_rate, attachment.tx_rate) == (1_000_000, 2_000_000)
