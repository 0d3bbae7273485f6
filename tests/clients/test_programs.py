"""Compose, skopeo, podman and Docker's command line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.api.docker.conftest import Client, Daemon
from tests.clients.conftest import Run
from tests.requires import requires

pytestmark = requires("root", "overlayfs", "cgroup", "netns", "nftables", "busybox")

_COMPOSE = """
version: "2.4"
services:
  db:
    image: busybox
    command: ["sh", "-c", "echo ready >/data/state; exec nc -ll -p 5000 -e cat /data/state"]
    volumes: ["data:/data"]
    healthcheck: {test: ["CMD", "cat", "/data/state"], interval: 1s, timeout: 30s, retries: 60}
    networks: {back: {aliases: [database]}}
  web:
    image: busybox
    command: ["sh", "-c", "nc database 5000; echo served; exec sleep 600"]
    depends_on: {db: {condition: service_healthy}}
    networks: [back]
    environment: {COLOUR: green}
networks: {back: {ipam: {config: [{subnet: 10.214.3.0/24}]}}}
volumes: {data: {}}
"""


_NEWER_COMPOSE = str(Path(__file__).parents[2] / "build/compose/docker-compose")


@pytest.mark.parametrize(
    "program", ["docker-compose", pytest.param(_NEWER_COMPOSE, marks=requires("compose"))]
)
def test_compose_brings_a_project_up_and_down(
    run: Run, api: Client, name: str, tmp_path: Path, program: str
) -> None:
    (tmp_path / "docker-compose.yml").write_text(_COMPOSE)

    def compose(*args: str) -> str:
        return run(program, "--ansi", "never", "-p", name, *args)

    compose("up", "-d")
    listed = compose("ps")
    assert listed.count("Up") == 2, listed
    assert listed.count("(healthy)") == 1, listed
    assert compose("exec", "-T", "web", "sh", "-c", "echo $COLOUR; nc db 5000") == "green\nready\n"
    logs = compose("logs", "--no-color", "web")
    assert "ready" in logs
    assert "served" in logs
    compose("up", "-d", "--scale", "web=3")
    assert len(compose("ps", "-q", "web").split()) == 3
    assert compose("run", "--rm", "-T", "web", "echo", "once") == "once\n"
    compose("restart", "-t", "0", "web")
    compose("stop", "-t", "0")
    assert "Up" not in compose("ps")
    compose("start")
    assert compose("ps").count("Up") == 4
    network = api.ask("GET", f"/networks/{name}_back").json
    assert network["IPAM"]["Config"][0]["Subnet"] == "10.214.3.0/24"
    assert network["Labels"]["com.docker.compose.network"] == "back"
    compose("down", "-v", "-t", "0")
    assert api.ask("GET", f"/networks/{name}_back").status == 404
    assert api.ask("GET", f"/volumes/{name}_data").status == 404
    assert compose("ps", "-q") == ""


def test_skopeo_copies_from_the_daemon_and_to_it(run: Run, host: str, name: str) -> None:
    run(
        *("skopeo", "copy", "--src-daemon-host", host),
        *("docker-daemon:busybox:latest", "oci:layout:busybox"),
    )
    run(
        *("skopeo", "copy", "--dest-daemon-host", host),
        *("oci:layout:busybox", f"docker-daemon:{name}:1"),
    )
    found = json.loads(run("skopeo", "inspect", "--daemon-host", host, f"docker-daemon:{name}:1"))
    assert found["Os"] == "linux"
    assert run("docker", "run", "--rm", "--network", "none", f"{name}:1", "echo", "hi") == "hi\n"


def test_podman_pulls_from_the_daemon(run: Run, daemon: Daemon, tmp_path: Path) -> None:
    # It knows the daemon by its well-known path only: here, that of a mount namespace.
    storage = f"--root {tmp_path}/storage --runroot /run/podman --storage-driver vfs"
    script = (
        f"mount -t tmpfs tmpfs /run && ln -s {daemon.path} /run/docker.sock && "
        f"podman {storage} pull -q docker-daemon:busybox:latest && "
        f"podman {storage} images --format '{{{{.Repository}}}}'"
    )
    assert "busybox" in run("unshare", "--mount", "sh", "-c", script)


def test_docker_s_command_line_knows_what_there_is(run: Run, name: str) -> None:
    run("docker", "network", "create", "--subnet", "10.214.4.0/24", name)
    run("docker", "volume", "create", "--label", f"a={name}", name)
    run("docker", "run", "-d", "--name", name, "--network", name, "busybox", "sleep", "600")
    run("docker", "network", "connect", "--alias", "other", "bridge", name)
    assert name in run("docker", "network", "inspect", "-f", "{{json .Containers}}", name)
    run("docker", "network", "disconnect", "bridge", name)
    assert run("docker", "volume", "ls", "-q", "--filter", f"label=a={name}") == f"{name}\n"
    run("docker", "tag", "busybox", f"{name}:1")
    run("docker", "save", "-o", "saved.tar", f"{name}:1", "busybox")
    run("docker", "rmi", f"{name}:1")
    assert f"Loaded image: {name}:1" in run("docker", "load", "-i", "saved.tar")
    assert "Untagged" in run("docker", "rmi", f"{name}:1")
    assert "bootstrapped" in run("docker", "image", "history", "busybox")
    assert "Build Cache" in run("docker", "system", "df")
    # The command line asks in whole seconds: `0s` would leave out what this one has seen.
    ends = str(int(time.time()) + 1)
    events = run(
        "docker", "events", "--since", "10m", "--until", ends, "--filter", f"container={name}"
    )
    assert "container start" in events
    run("docker", "rm", "-f", name)
    run("docker", "network", "rm", name)
    run("docker", "volume", "rm", name)
