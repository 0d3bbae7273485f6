"""User-mode networking: an instance reached and reaching out without a bridge."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.errors import Busy, Unsupported
from hutch.network import user
from hutch.spec.model import PortMapping
from tests.network.boxes import TIMEOUT_S, Box, Lab, listener, meets
from tests.requires import requires

pytestmark = [requires("root", "netns", "nftables", "slirp4netns"), pytest.mark.integration]


@pytest.fixture
def box(lab: Lab, tmp_path: Path) -> Iterator[Box]:
    yield lab.box()
    user.stop(tmp_path)


def test_an_instance_reaches_out_under_the_hosts_address(
    lab: Lab, box: Box, tmp_path: Path
) -> None:
    outside = lab.outside()
    user.start(box.pid, tmp_path)
    with outside.listen(80) as server:
        assert meets(server, box.connect("203.0.113.2", 80)) == "203.0.113.1"


def test_a_published_port_leads_to_the_instance(lab: Lab, box: Box, tmp_path: Path) -> None:
    mapping = PortMapping(container_port=80, host_port=8080)
    assert user.start(box.pid, tmp_path, [mapping])[0].host_port == 8080
    with box.listen(80) as server:
        meets(server, socket.create_connection(("127.0.0.1", 8080), timeout=TIMEOUT_S))


def test_a_free_port_is_chosen(lab: Lab, box: Box, tmp_path: Path) -> None:
    (port,) = user.start(box.pid, tmp_path, [PortMapping(container_port=80)])
    with box.listen(80) as server:
        meets(server, socket.create_connection(("127.0.0.1", port.host_port), timeout=TIMEOUT_S))


def test_the_end_frees_the_port_and_may_come_twice(lab: Lab, box: Box, tmp_path: Path) -> None:
    user.start(box.pid, tmp_path, [PortMapping(container_port=80, host_port=8080)])
    user.stop(tmp_path)
    user.stop(tmp_path)
    listener("127.0.0.1", 8080).close()
    assert list(tmp_path.glob("slirp*")) == []


def test_a_taken_port_is_refused_and_nothing_runs_on(lab: Lab, box: Box, tmp_path: Path) -> None:
    with listener("127.0.0.1", 8080), pytest.raises(Busy, match="8080"):
        user.start(box.pid, tmp_path, [PortMapping(container_port=80, host_port=8080)])
    assert list(tmp_path.glob("slirp*")) == []


def test_a_process_that_is_gone_is_told_of(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="slirp4netns did not start"):
        user.start(2**22 - 1, tmp_path)


def test_the_hosts_loopback_is_out_of_reach(lab: Lab, box: Box, tmp_path: Path) -> None:
    user.start(box.pid, tmp_path)
    with listener("127.0.0.1", 80), pytest.raises(OSError):
        box.connect(user.GATEWAY, 80).close()
