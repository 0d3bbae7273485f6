"""Answers that a comparison with a real dockerd has shown to matter (`make compare-docker`)."""

from __future__ import annotations

import functools
import json
import select
import socket
import time
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import pytest

from tests.api.docker.conftest import Client, until
from tests.api.docker.test_containers import create, start, wait

pytestmark = pytest.mark.requires("root", "overlayfs", "cgroup", "busybox")


def filters(**chosen: list[str]) -> str:
    return f"filters={quote(json.dumps(chosen))}"


def events(api: Client, since: float, **chosen: list[str]) -> list[dict[str, Any]]:
    path = f"/events?since={since}&until={time.time()}&{filters(**chosen)}"
    return [json.loads(line) for line in api.ask("GET", path).body.splitlines()]


def test_events_of_what_is_gone_have_its_labels(api: Client, name: str, image: str) -> None:
    begun = time.time()
    create(api, name, image, "true", Labels={"colour": "red", "kind": "x", "action": "y"})
    api.ask("DELETE", f"/containers/{name}")
    told = events(api, begun, container=[name], label=["colour=red"])
    assert [event["Action"] for event in told] == ["create", "destroy"]
    for event in told:
        attributes = event["Actor"]["Attributes"]
        assert (attributes["kind"], attributes["action"]) == ("x", "y")
        assert attributes["name"] == name


def test_volumes_are_told_to_be_mounted_and_prunes_to_have_been(
    api: Client, name: str, image: str
) -> None:
    begun = time.time()
    host = {"Binds": [f"{name}:/data:ro"], "NetworkMode": "none"}
    create(api, name, image, "true", HostConfig=host)
    start(api, name)
    api.ask("POST", f"/containers/{name}/wait")
    told = events(api, begun, volume=[name], event=["mount", "unmount"])
    assert [event["Action"] for event in told] == ["mount", "unmount"]
    container = api.ask("GET", f"/containers/{name}/json").json["Id"]
    assert told[0]["Actor"]["Attributes"] == {
        "container": container,
        "destination": "/data",
        "driver": "local",
        "propagation": "",
        "read/write": "false",
    }
    api.ask("DELETE", f"/containers/{name}")
    api.ask("DELETE", f"/volumes/{name}")
    chosen = filters(label=[f"of-nobody={name}"])
    for kind in ("container", "image", "network", "volume"):
        assert api.ask("POST", f"/{kind}s/prune?{chosen}").status == 200
        pruned = events(api, begun, type=[kind], event=["prune"])
        assert pruned and list(pruned[-1]["Actor"]["Attributes"]) == ["reclaimed"]
        # With images goes content that no image has any more, be it of another test.
        reclaimed = pruned[-1]["Actor"]["Attributes"]["reclaimed"]
        assert reclaimed.isdecimal() if kind == "image" else reclaimed == "0"


def test_top_shows_processes_of_any_user_in_the_columns_asked_for(
    api: Client, name: str, image: str
) -> None:
    create(api, name, image, "sleep", "1000", User="1234", HostConfig={"NetworkMode": "none"})
    start(api, name)
    told = api.ask("GET", f"/containers/{name}/top?ps_args=-o+pid,uid,args").json
    assert told["Titles"] == ["PID", "UID", "COMMAND"]
    assert [row[1:] for row in told["Processes"]] == [["1234", "sleep 1000"]]


def test_inspect_has_what_was_asked_for_and_nothing_that_is_empty(
    api: Client, name: str, image: str
) -> None:
    create(
        api,
        name,
        image,
        "sleep",
        "1000",
        Volumes={"/anonymous": {}},
        ExposedPorts={"80/tcp": {}},
        Healthcheck={"Test": ["CMD", "true"], "Interval": 10**11},
        HostConfig={"NetworkMode": "none"},
    )
    made = api.ask("GET", f"/containers/{name}/json").json
    assert made["Config"]["Volumes"] == {"/anonymous": {}}
    assert {"StartPeriod", "StartInterval"}.isdisjoint(made["Config"]["Healthcheck"])
    assert "Health" not in made["State"]
    assert {"Annotations", "Init", "Mounts", "StorageOpt", "Sysctls", "Tmpfs"}.isdisjoint(
        made["HostConfig"]
    )
    start(api, name)
    runs = api.ask("GET", f"/containers/{name}/json").json
    assert runs["State"]["Health"]["Status"] in ("starting", "healthy")
    assert runs["NetworkSettings"]["Ports"] == {}
    (entry,) = api.ask("GET", f"/containers/json?{filters(name=[name])}").json
    assert entry["Ports"] == []
    api.ask("POST", f"/containers/{name}/stop?t=0")
    ended = api.ask("GET", f"/containers/{name}/json").json
    assert ended["State"]["Health"]["Status"] == "unhealthy"


@pytest.mark.parametrize(
    "path",
    [
        f"/containers/json?{filters(exited=['x'])}",
        f"/containers/json?{filters(health=['x'])}",
        f"/networks?{filters(type=['x'])}",
        f"/networks?{filters(dangling=['x'], nonsense=['x'])}",
    ],
)
def test_values_of_filters_that_mean_nothing_are_refused(api: Client, path: str) -> None:
    answer = api.ask("GET", path)
    assert answer.status == 400 and answer.message.startswith("invalid filter '")


def test_errors_have_docker_s_words_where_clients_look_for_them(
    api: Client, name: str, image: str
) -> None:
    assert api.ask("GET", "/exec/nonesuch/json").message == "No such exec instance: nonesuch"
    create(api, name, image, "sleep", "1000", HostConfig={"NetworkMode": "none"})
    start(api, name)
    refused = api.ask("DELETE", f"/images/{image}")
    assert refused.status == 409
    assert refused.message.startswith(
        f'conflict: unable to remove repository reference "{image}" (must force)'
    )
    api.ask("POST", f"/containers/{name}/pause")
    refused = api.ask("DELETE", f"/containers/{name}")
    assert refused.message.endswith("container is paused and must be unpaused first")
    refused = api.ask("POST", f"/containers/{name}/exec", {"Cmd": ["true"]})
    assert refused.message == f"Container {name} is paused, unpause the container before exec"


def test_the_end_of_a_container_tells_how_long_it_ran(api: Client, name: str, image: str) -> None:
    begun = time.time()
    create(api, name, image, "true")
    start(api, name)
    wait(api, name)
    (event,) = events(api, begun, event=["die"], container=[name])
    attributes = event["Actor"]["Attributes"]
    assert attributes["exitCode"] == "0" and int(attributes["execDuration"]) >= 0


def test_an_image_tells_what_its_last_step_was_for(api: Client, name: str, image: str) -> None:
    begun = time.time()
    create(api, name, image, "true")
    made = api.ask("POST", f"/commit?container={name}&comment=what+for").json["Id"]
    told = api.ask("GET", f"/images/{made}/json").json
    (event,) = events(api, begun, type=["image"], event=["create"], image=[made])
    assert event["Actor"] == {"ID": made, "Attributes": {"name": made}}
    api.ask("DELETE", f"/images/{made}")
    assert told["Comment"] == "what for"
    assert told["Config"]["WorkingDir"] == ""


def test_more_clients_attach_than_a_supervisor_has_room_for(
    api: Client, name: str, image: str
) -> None:
    create(api, name, image, "cat", OpenStdin=True)
    start(api, name)
    query = "stream=1&stdin=1&stdout=1"
    path = f"/v1.51/containers/{name}/attach?{query}"
    ask = f"POST {path} HTTP/1.1\r\nHost: d\r\nUpgrade: tcp\r\nConnection: Upgrade\r\n\r\n"
    with ExitStack() as stack:
        clients = [stack.enter_context(api.socket()) for _ in range(80)]
        for sock in clients:
            sock.sendall(ask.encode())
        for sock in clients:
            assert b" 101 " in sock.recv(4096)
        clients[0].close()

        def hears(sock: socket.socket) -> bool:
            # It takes part a moment after the head of its answer.
            clients[-1].sendall(b"hello\n")
            return bool(select.select([sock], [], [], 0.05)[0])

        for sock in clients[1:]:
            until(functools.partial(hears, sock))
            assert sock.recv(14)[8:] == b"hello\n"
