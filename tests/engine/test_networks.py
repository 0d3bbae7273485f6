"""Networks as an engine's user meets them: names, what is refused, live changes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.errors import InvalidArgument, NotFound
from hutch.network import Endpoint, Networks
from tests.requires import requires

pytestmark = requires("root", "cgroup", "overlayfs", "seccomp", "busybox", "nftables")


@pytest.fixture
def net(engine: Engine) -> Iterator[str]:
    name = engine.networks.create("net").name
    yield name
    engine.networks.remove(name)


def test_a_network_may_be_given_by_its_identifier(engine: Engine, net: str) -> None:
    box = engine.create("busybox", ["true"], network=engine.networks.get(net).id[:12])
    with box:
        assert box.info().spec.network_mode == net
        assert [a.name for a in box.info().spec.networks] == [net]


def test_a_second_network_that_does_not_exist_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        engine.create("busybox", ["true"], network=["bridge", "nowhere"])


def test_an_instance_whose_network_was_removed_says_so(engine: Engine) -> None:
    engine.networks.create("gone")
    with engine.create("busybox", ["true"], network="gone") as box:
        engine.networks.remove("gone")
        with pytest.raises(NotFound, match="'gone' any more"):
            box.start()


@pytest.mark.parametrize("options", [{"aliases": ["db"]}, {"ip": "172.17.3.4"}, {"ip6": "fd00::4"}])
def test_what_the_default_bridge_cannot_give_is_refused(
    engine: Engine, options: dict[str, str]
) -> None:
    with (
        engine.start("busybox", ["sleep", "1000"], network="none") as box,
        pytest.raises(InvalidArgument, match="user-defined"),
    ):
        engine.networks.connect("bridge", box, **options)


def test_its_own_name_servers_go_with_an_instance_into_a_further_network(
    engine: Engine, net: str
) -> None:
    with engine.start("busybox", ["sleep", "1000"], network="none", dns=["192.0.2.53"]) as box:
        engine.networks.connect(net, box)
        [endpoint] = engine.networks.members(net)
        assert endpoint.upstreams == ("192.0.2.53",)
        engine.networks.disconnect(net, box)


def test_traffic_of_every_interface_of_a_container_is_told(engine: Engine) -> None:
    command = ["sleep", "1000"]
    with engine.start("busybox", command, network="none", cap_add=["NET_ADMIN"]) as box:
        made = box.exec(["ip", "link", "add", "br-own", "type", "bridge"])
        assert made.exit_code == 0, made.stderr
        assert [usage.name for usage in box.network_stats()] == ["br-own"]


def test_a_launch_that_fails_before_its_network_is_there_says_why(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = Networks.attach

    def late(networks: Networks, endpoint: Endpoint, pid: int) -> None:
        deadline = time.monotonic() + 60
        while os.path.exists(f"/proc/{pid}/ns/net") and time.monotonic() < deadline:
            os.sched_yield()
        attach(networks, endpoint, pid)

    monkeypatch.setattr(Networks, "attach", late)
    (file := tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="mount at /etc: invalid argument") as raised:
        engine.run("busybox", ["true"], volumes=[f"{file}:/etc"])
    assert raised.value.hint == "a directory is mounted on a directory, a file on a file"
