"""Networks and volumes over Docker's API."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.api.docker.conftest import Client, until
from tests.requires import requires

pytestmark = requires("root", "overlayfs", "cgroup", "netns", "nftables", "busybox")


def filters(**given: list[str]) -> str:
    return f"filters={quote(json.dumps(given))}"


@pytest.fixture
def net(api: Client) -> Iterator[str]:
    """The name of a network that is removed at the end."""
    chosen = f"net-{uuid.uuid4().hex[:10]}"
    yield chosen
    api.ask("DELETE", f"/networks/{chosen}")


@pytest.fixture
def volume(api: Client) -> Iterator[str]:
    """The name of a volume that is removed at the end."""
    chosen = f"vol-{uuid.uuid4().hex[:10]}"
    yield chosen
    api.ask("DELETE", f"/volumes/{chosen}?force=1")


def make_network(api: Client, name: str, **more: Any) -> str:
    answer = api.ask("POST", "/networks/create", {"Name": name} | more)
    assert answer.status == 201, answer
    return str(answer.json["Id"])


# ---- networks -----------------------------------------------------------------------------


def test_the_networks_that_docker_has_are_there(api: Client) -> None:
    found = {one["Name"]: one["Driver"] for one in api.ask("GET", "/networks").json}
    assert found["bridge"] == "bridge"
    assert found["host"] == "host"
    assert found["none"] == "null"
    assert api.ask("DELETE", "/networks/bridge").status == 403


def test_a_network_is_as_it_was_asked_for(api: Client, net: str) -> None:
    asked = {
        "Internal": True,
        "Labels": {"a": "b"},
        "Options": {"com.docker.network.driver.mtu": "1300"},
        "IPAM": {"Config": [{"Subnet": "10.213.7.0/24", "Gateway": "10.213.7.9"}]},
    }
    identifier = make_network(api, net, **asked)
    found = api.ask("GET", f"/networks/{identifier[:12]}").json
    assert found["IPAM"]["Config"] == [{"Subnet": "10.213.7.0/24", "Gateway": "10.213.7.9"}]
    assert {key: found[key] for key in ("Internal", "Labels", "Options")} == {
        key: asked[key] for key in ("Internal", "Labels", "Options")
    }
    listed = api.ask("GET", f"/networks?{filters(label=['a=b'], name=[net])}").json
    assert [one["Id"] for one in listed] == [identifier]
    again = api.ask("POST", "/networks/create", {"Name": net})
    assert again.status == 409
    assert again.message == f"network with name {net} already exists"


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"Name": "host"}, 403),
        ({"Name": ""}, 400),
        ({"Name": "x", "Driver": "overlay"}, 403),
        ({"Name": "x", "Driver": "weave"}, 404),
        ({"Name": "x", "ConfigOnly": True}, 501),
        ({"Name": "x", "IPAM": {"Config": [{"Subnet": "nonsense"}]}}, 400),
        ({"Name": "x", "Options": {"com.docker.network.bridge.enable_icc": "false"}}, 501),
    ],
)
def test_a_network_that_cannot_be_is_refused(
    api: Client, asked: dict[str, Any], status: int
) -> None:
    answer = api.ask("POST", "/networks/create", asked)
    assert answer.status == status, answer
    assert answer.message


def test_a_container_joins_and_leaves_while_it_runs(
    api: Client, image: str, name: str, net: str
) -> None:
    make_network(api, net, IPAM={"Config": [{"Subnet": "10.213.8.0/24"}]})
    body = {"Image": image, "Cmd": ["sleep", "60"], "HostConfig": {"NetworkMode": "none"}}
    made = api.ask("POST", f"/containers/create?name={name}", body)
    identifier = made.json["Id"]
    assert api.ask("POST", f"/containers/{name}/start").status == 204
    asked = {
        "Container": name,
        "EndpointConfig": {"Aliases": ["db"], "IPAMConfig": {"IPv4Address": "10.213.8.77"}},
    }
    # `none` is a network of its own, as in Docker: it is left first.
    api.ask("POST", "/networks/none/disconnect", {"Container": name})
    joined = api.ask("POST", f"/networks/{net}/connect", asked)
    assert joined.status == 200, joined
    members = api.ask("GET", f"/networks/{net}").json["Containers"]
    assert members[identifier]["Name"] == name
    assert members[identifier]["IPv4Address"] == "10.213.8.77/24"
    twice = api.ask("POST", f"/networks/{net}/connect", {"Container": name})
    assert twice.status == 403
    used = api.ask("DELETE", f"/networks/{net}")
    assert used.status == 403
    assert "has active endpoints" in used.message
    left = api.ask("POST", f"/networks/{net}/disconnect", {"Container": name})
    assert left.status == 200, left
    again = api.ask("POST", f"/networks/{net}/disconnect", {"Container": name})
    assert again.status == 403
    assert "is not connected to network" in again.message


def test_a_link_names_another_on_a_network_of_ones_own(
    api: Client, image: str, name: str, net: str
) -> None:
    api.ask("POST", "/networks/create", {"Name": net})
    host = {"NetworkMode": net}
    try:
        assert _bridged(api, f"{name}-db", image, "sleep", "1000", HostConfig=host).status == 201
        more = {"EndpointsConfig": {net: {"Links": [f"{name}-db:other"]}}}
        body = {"HostConfig": host, "NetworkingConfig": more}
        assert _bridged(api, name, image, "sleep", "1000", **body).status == 201
        api.ask("POST", f"/containers/{name}/start")
        assert "other" not in _run(api, name, "cat", "/etc/hosts")
        api.ask("POST", f"/containers/{name}-db/start")
        assert f"{_address(api, f'{name}-db')}\tother " in _run(api, name, "cat", "/etc/hosts")
        shown = api.ask("GET", f"/containers/{name}/json").json["NetworkSettings"]["Networks"]
        assert shown[net]["Links"] == [f"{name}-db:other"]
    finally:
        for one in (name, f"{name}-db"):
            api.ask("DELETE", f"/containers/{one}?force=1")


def test_networks_that_nobody_names_are_pruned(api: Client, net: str) -> None:
    make_network(api, net, Labels={"prune": net})
    kept = api.ask("POST", f"/networks/prune?{filters(label=[f'prune={net}'], until=['1h'])}").json
    assert kept == {"NetworksDeleted": None}
    gone = api.ask("POST", f"/networks/prune?{filters(label=[f'prune={net}'])}").json
    assert gone == {"NetworksDeleted": [net]}


# ---- volumes ------------------------------------------------------------------------------


def test_a_volume_without_a_name_is_labelled_so(api: Client) -> None:
    made = api.ask("POST", "/volumes/create", {"Labels": {"a": "b"}}).json
    try:
        assert made["Labels"] == {"a": "b", "com.docker.volume.anonymous": ""}
        wanted = json.dumps({"label": ["com.docker.volume.anonymous"]}).replace(" ", "")
        found = api.ask("GET", f"/volumes?filters={wanted}").json["Volumes"]
        assert made["Name"] in [one["Name"] for one in found]
    finally:
        assert api.ask("DELETE", f"/volumes/{made['Name']}").status == 204


def test_a_volume_is_made_once(api: Client, volume: str) -> None:
    body = {"Name": volume, "Labels": {"a": "b"}}
    made = api.ask("POST", "/volumes/create", body)
    assert made.status == 201
    assert made.json["Labels"] == {"a": "b"}
    assert made.json["Scope"] == "local"
    assert api.ask("POST", "/volumes/create", body).json == made.json
    listed = api.ask("GET", f"/volumes?{filters(label=['a=b'], name=[volume])}").json
    assert [one["Name"] for one in listed["Volumes"]] == [volume]
    assert api.ask("GET", f"/volumes/{volume}").json == made.json


def test_a_volume_in_use_is_not_removed(api: Client, image: str, name: str, volume: str) -> None:
    host = {"NetworkMode": "none", "Binds": [f"{volume}:/data"]}
    made = api.ask("POST", f"/containers/create?name={name}", {"Image": image, "HostConfig": host})
    identifier = made.json["Id"]
    answer = api.ask("DELETE", f"/volumes/{volume}")
    assert answer.status == 409
    assert answer.message == f"remove {volume}: volume is in use - [{identifier}]"
    usage = api.ask("GET", "/system/df?type=volume").json
    found = next(one for one in usage["Volumes"] if one["Name"] == volume)
    assert found["UsageData"]["RefCount"] == 1
    assert set(usage) == {"Volumes"}


def test_what_is_no_volume_is_refused(api: Client, volume: str) -> None:
    assert api.ask("GET", f"/volumes/{volume}").message == f"get {volume}: no such volume"
    assert api.ask("DELETE", f"/volumes/{volume}").status == 404
    assert api.ask("DELETE", f"/volumes/{volume}?force=1").status == 204
    assert api.ask("POST", "/volumes/create", {"Name": "a/b"}).status == 400
    foreign = api.ask("POST", "/volumes/create", {"Name": volume, "Driver": "nfs-driver"})
    assert foreign.status == 404
    cluster = api.ask("POST", "/volumes/create", {"Name": volume, "ClusterVolumeSpec": {}})
    assert cluster.status == 503


def test_prune_takes_named_volumes_only_when_all_are_meant(api: Client, volume: str) -> None:
    api.ask("POST", "/volumes/create", {"Name": volume, "Labels": {"prune": volume}})
    label = [f"prune={volume}"]
    some = api.ask("POST", f"/volumes/prune?{filters(label=label)}").json
    assert some["VolumesDeleted"] is None
    every = api.ask("POST", f"/volumes/prune?{filters(label=label, all=['true'])}").json
    assert every["VolumesDeleted"] == [volume]


def test_prune_counts_no_bytes_of_what_is_the_hosts(
    api: Client, volume: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    options = {"type": "none", "o": "bind", "device": str(tmp_path)}
    body = {"Name": volume, "Labels": {"prune": volume}, "DriverOpts": options}
    assert api.ask("POST", "/volumes/create", body).status == 201
    chosen = {"label": [f"prune={volume}"], "all": ["true"]}
    kept = api.ask("POST", f"/volumes/prune?{filters(**chosen, **{'label!': ['prune']})}").json
    assert kept == {"VolumesDeleted": None, "SpaceReclaimed": 0}
    gone = api.ask("POST", f"/volumes/prune?{filters(**chosen, **{'label!': ['other']})}").json
    assert gone == {"VolumesDeleted": [volume], "SpaceReclaimed": 0}
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("kind", ["containers", "networks", "volumes"])
def test_a_prune_is_refused_before_it_looks(api: Client, kind: str) -> None:
    for wrong in ({"until": ["nonsense"]}, {"nonsense": ["x"]}):
        query = filters(label=["of-nobody"], **wrong)
        assert api.ask("POST", f"/{kind}/prune?{query}").status == 400, wrong


# ---- events -------------------------------------------------------------------------------


def test_events_come_while_they_happen(api: Client, net: str) -> None:
    with api.socket() as sock:
        path = f"/v1.51/events?{filters(type=['network'])}"
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: d\r\n\r\n".encode())
        received = b""
        while b"\r\n\r\n" not in received:
            received += sock.recv(65536)
        identifier = make_network(api, net)
        while identifier.encode() not in received:
            piece = sock.recv(65536)
            assert piece, received
            received += piece
    event = json.loads(next(line for line in received.split(b"\n") if identifier.encode() in line))
    assert (event["Type"], event["Action"]) == ("network", "create")
    assert event["Actor"]["Attributes"] == {"name": net, "type": "bridge"}


def test_past_events_have_docker_s_form(api: Client, image: str, name: str) -> None:
    begun = time.time() - 1
    body = {"Image": image, "Labels": {"colour": name}, "HostConfig": {"NetworkMode": "none"}}
    identifier = api.ask("POST", f"/containers/create?name={name}", body).json["Id"]
    chosen = filters(container=[name], event=["create"], label=[f"colour={name}"])
    answer = api.ask("GET", f"/events?since={begun}&until={time.time() + 0.5}&{chosen}")
    (line,) = answer.body.splitlines()
    event = json.loads(line)
    assert event["id"] == event["Actor"]["ID"] == identifier
    assert event["status"] == event["Action"] == "create"
    assert event["from"] == event["Actor"]["Attributes"]["image"] == image
    assert event["scope"] == "local"
    assert event["timeNano"] // 10**9 == event["time"]
    other = filters(container=["another"])
    assert api.ask("GET", f"/events?since={begun}&until={time.time()}&{other}").body == b""
    assert api.ask("GET", f"/events?{filters(nonsense=['x'])}").status == 400


# ---- what one host has not ------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs"]
)
def test_one_host_is_no_swarm_manager(api: Client, path: str) -> None:
    answer = api.ask("GET", path)
    assert answer.status == 503
    assert answer.message.startswith("This node is not a swarm manager.")


def test_there_are_no_plugins(api: Client) -> None:
    assert api.ask("GET", "/plugins").json == []
    assert api.ask("GET", "/plugins/x/y/json").status == 404


# ---- links --------------------------------------------------------------------------------


def _bridged(api: Client, name: str, image: str, *command: str, **more: Any) -> Any:
    host = {"NetworkMode": "bridge"} | more.pop("HostConfig", {})
    body = {"Image": image, "Cmd": list(command), "HostConfig": host} | more
    return api.ask("POST", f"/containers/create?name={name}", body)


def _run(api: Client, name: str, *command: str) -> str:
    body = {"Cmd": list(command), "AttachStdout": True, "Tty": True}
    made = api.ask("POST", f"/containers/{name}/exec", body).json["Id"]
    return api.ask("POST", f"/exec/{made}/start", {"Tty": True}).body.decode()


def _address(api: Client, name: str) -> str:
    networks = api.ask("GET", f"/containers/{name}/json").json["NetworkSettings"]["Networks"]
    return str(next(iter(networks.values()))["IPAddress"])


def test_links_of_the_default_network_are_names_and_environment(
    api: Client, name: str, image: str
) -> None:
    child, parent = f"{name}-db", f"{name}-app"
    more = {"Env": ["MODE=fast"], "ExposedPorts": {"5432/tcp": {}, "53/udp": {}}}
    assert _bridged(api, child, image, "sleep", "1000", **more).status == 201
    links = [f"{child}:the-db", child]
    made = _bridged(api, parent, image, "sleep", "1000", HostConfig={"Links": links})
    assert made.status == 201
    refused = api.ask("POST", f"/containers/{parent}/start")
    assert refused.status >= 400 and "cannot link to" in refused.message
    for one in (child, parent):
        assert api.ask("POST", f"/containers/{one}/start").status == 204
    address = _address(api, child)
    told = dict(line.split("=", 1) for line in _run(api, parent, "env").splitlines())
    assert told["THE_DB_PORT"] == told["THE_DB_PORT_5432_TCP"] == f"tcp://{address}:5432"
    assert told["THE_DB_PORT_5432_TCP_ADDR"] == address
    assert told["THE_DB_PORT_53_UDP_PROTO"] == "udp"
    assert told["THE_DB_NAME"] == f"/{parent}/the-db" and told["THE_DB_ENV_MODE"] == "fast"
    hosts = _run(api, parent, "cat", "/etc/hosts")
    hostname = api.ask("GET", f"/containers/{child}/json").json["Config"]["Hostname"]
    assert f"{address}\tthe-db {hostname} {child}" in hosts
    shown = api.ask("GET", f"/containers/{parent}/json").json["HostConfig"]["Links"]
    assert shown == [f"/{child}:/{parent}/the-db", f"/{child}:/{parent}/{child}"]

    # Another takes its address meanwhile: the line follows.
    api.ask("POST", f"/containers/{child}/stop?t=0")
    taker: dict[str, Any] = {"NetworkingConfig": {"EndpointsConfig": {"bridge": {}}}}
    _bridged(api, f"{name}-taker", image, "sleep", "1000", **taker)
    api.ask("POST", f"/containers/{name}-taker/start")
    api.ask("POST", f"/containers/{child}/start")
    until(lambda: f"{_address(api, child)}\tthe-db " in _run(api, parent, "cat", "/etc/hosts"))


def test_a_link_comes_with_a_network_and_goes(api: Client, name: str, net: str, image: str) -> None:
    make_network(api, net)
    app, database = f"{name}-app", f"{name}-db"
    for one, mode in ((app, "none"), (database, net)):
        host = {"NetworkMode": mode}
        assert _bridged(api, one, image, "sleep", "1000", HostConfig=host).status == 201
        assert api.ask("POST", f"/containers/{one}/start").status == 204
    join = {"Container": app, "EndpointConfig": {"Links": [f"{name}-no:x"]}}
    assert api.ask("POST", f"/networks/{net}/connect", join).status == 400
    assert "x" not in _run(api, app, "cat", "/etc/hosts").split()
    join["EndpointConfig"] = {"Links": [f"{database}:the-db"]}
    assert api.ask("POST", f"/networks/{net}/connect", join).status == 200
    line = f"{_address(api, database)}\tthe-db "
    assert line in _run(api, app, "cat", "/etc/hosts")
    told = api.ask("GET", f"/containers/{app}/json").json
    assert told["NetworkSettings"]["Networks"][net]["Links"] == [f"{database}:the-db"]

    assert api.ask("DELETE", f"/containers/{app}/other?link=1").status == 404
    assert api.ask("DELETE", f"/containers/{name}-no/the-db?link=1").status == 404
    assert api.ask("DELETE", f"/containers/{app}?link=1").message.startswith("Conflict")
    assert api.ask("DELETE", f"/containers/{app}/the-db?link=1").status == 204
    assert line not in _run(api, app, "cat", "/etc/hosts")
    told = api.ask("GET", f"/containers/{app}/json").json
    assert not told["NetworkSettings"]["Networks"][net]["Links"] and told["State"]["Running"]


def test_links_that_cannot_be_are_refused(api: Client, name: str, image: str) -> None:
    for links, mode, status in (
        ([f"{name}-nonesuch:x"], "bridge", 400),
        ([":x"], "bridge", 400),
        (["a:b c"], "bridge", 400),
        ([f"{name}-nonesuch:x"], "host", 400),
    ):
        host = {"Links": links, "NetworkMode": mode}
        assert _bridged(api, name, image, "true", HostConfig=host).status == status
    other = _bridged(api, f"{name}-lone", image, "true", HostConfig={"NetworkMode": "none"})
    assert other.status == 201
    refused = _bridged(api, name, image, "true", HostConfig={"Links": [f"{name}-lone:x"]})
    assert refused.status == 400 and "default network" in refused.message
