"""docker-py, aiodocker and Testcontainers."""

from __future__ import annotations

import asyncio
import io
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine
from tests.clients.conftest import load
from tests.requires import requires

pytestmark = requires("root", "overlayfs", "cgroup", "netns", "nftables", "busybox")


@pytest.fixture
def client(host: str) -> Any:
    """A client of docker-py."""
    with_timeout = load("docker").DockerClient(base_url=host, timeout=120)
    yield with_timeout
    with_timeout.close()


def tar_of(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# ---- docker-py ----------------------------------------------------------------------------


def test_docker_py_negotiates_and_describes(client: Any) -> None:
    assert client.api.api_version == "1.51"
    assert client.info()["OSType"] == "linux"
    assert set(client.df()) >= {"LayersSize", "Images", "Containers", "Volumes", "BuildCache"}
    assert client.ping()


def test_docker_py_runs_a_container_with_network_and_volume(client: Any, name: str) -> None:
    network = client.networks.create(name, labels={"a": name})
    volume = client.volumes.create(name)
    box = client.containers.run(
        "busybox",
        ["sh", "-c", "echo begun; exec sleep 600"],
        detach=True,
        name=name,
        network=name,
        volumes={name: {"bind": "/data", "mode": "rw"}},
    )
    box.reload()
    assert box.status == "running"
    network.reload()
    assert [one.id for one in network.containers] == [box.id]
    assert box.exec_run(["sh", "-c", "echo o; echo e >&2; exit 3"], demux=True) == (
        3,
        (b"o\n", b"e\n"),
    )
    assert box.put_archive("/data", tar_of("file", b"content"))
    pieces, found = box.get_archive("/data/file")
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as tar:
        member = tar.extractfile("file")
        assert member is not None
        assert member.read() == b"content"
    assert found["size"] == 7
    assert box.logs() == b"begun\n"
    assert box.stats(stream=False)["name"] == f"/{name}"
    assert "sleep 600" in box.top()["Processes"][0][-1]
    box.stop(timeout=0)
    assert box.wait()["StatusCode"] == 137
    box.remove()
    network.remove()
    volume.remove()


def test_docker_py_builds_saves_and_loads(client: Any, name: str) -> None:
    dockerfile = b"FROM busybox\nRUN echo built\nLABEL a=b\n"
    built, log = client.images.build(fileobj=io.BytesIO(dockerfile), tag=f"{name}:1")
    assert any("built" in line.get("stream", "") for line in log)
    assert built.labels == {"a": "b"}
    data = b"".join(built.save(named=True))
    client.images.remove(f"{name}:1")
    with pytest.raises(load("docker.errors").ImageNotFound):
        client.images.get(f"{name}:1")
    (loaded,) = client.images.load(data)
    assert loaded.id == built.id
    assert loaded.tags == [f"{name}:1"]
    assert loaded.history()[0]["Id"] == built.id


def test_docker_py_sees_events(client: Any, name: str) -> None:
    begun = int(time.time())
    client.containers.run("busybox", "true", name=name, remove=True, network_mode="none")
    told = client.events(
        since=begun, until=int(time.time()) + 1, filters={"container": name}, decode=True
    )
    actions = [event["Action"] for event in told]
    assert [a for a in actions if a in ("create", "start", "die", "destroy")] == [
        "create",
        "start",
        "die",
        "destroy",
    ]


def test_docker_py_gets_errors_that_it_knows(client: Any, name: str) -> None:
    errors = load("docker.errors")
    with pytest.raises(errors.NotFound):
        client.networks.get(name)
    with pytest.raises(errors.NotFound):
        client.volumes.get(name)
    with pytest.raises(errors.ImageNotFound):
        client.images.get(f"{name}:none")
    with pytest.raises(errors.APIError, match="not a swarm manager"):
        client.services.list()


# ---- aiodocker ----------------------------------------------------------------------------


def test_aiodocker_attaches_types_and_listens(host: str, name: str) -> None:
    async def attach(docker: Any) -> None:
        told = docker.events.subscribe()
        script = "echo one; while read line; do echo got $line; done"
        config = {
            "Image": "busybox",
            "Cmd": ["sh", "-c", script],
            "OpenStdin": True,
            "AttachStdin": True,
            "HostConfig": {"NetworkMode": "none"},
        }
        box = await docker.containers.create_or_replace(name, config)
        stream = box.attach(stdin=True, stdout=True, stderr=True)
        async with stream:
            await box.start()
            assert (await stream.read_out()).data == b"one\n"
            await stream.write_in(b"typed\n")
            assert (await stream.read_out()).data == b"got typed\n"
        assert (await told.get())["Actor"]["Attributes"]["name"] == name
        assert await box.log(stdout=True) == ["one\n", "got typed\n"]
        made = await box.exec(["echo", "within"])
        async with made.start(detach=False) as output:
            assert (await output.read_out()).data == b"within\n"
            assert await output.read_out() is None  # it is over: its exit code is known
        assert (await made.inspect())["ExitCode"] == 0
        await box.delete(force=True)

    async def networks_and_volumes(docker: Any) -> None:
        network = await docker.networks.create({"Name": name, "Internal": True})
        assert (await network.show())["Internal"] is True
        await network.delete()
        volume = await docker.volumes.create({"Name": name})
        assert (await volume.show())["Name"] == name
        await volume.delete()

    async def everything() -> None:
        docker = load("aiodocker").Docker(url=host)
        try:
            async with asyncio.timeout(120):
                await attach(docker)
                await networks_and_volumes(docker)
        finally:
            await docker.close()

    asyncio.run(everything())


# ---- Testcontainers -------------------------------------------------------------------------

_ENTRYPOINT = r"""#!/bin/sh
set -eu
bin=$(echo /usr/lib/postgresql/*/bin)
PATH=$bin:$PATH
data=/var/lib/postgresql/test
printf %s "$POSTGRES_PASSWORD" >/tmp/password
initdb -D "$data" -U "$POSTGRES_USER" --pwfile=/tmp/password -A scram-sha-256 >/dev/null
echo "host all all all scram-sha-256" >>"$data/pg_hba.conf"
echo "CREATE DATABASE \"$POSTGRES_DB\"" | postgres --single -D "$data" postgres >/dev/null
exec postgres -D "$data" -c listen_addresses='*' -c unix_socket_directories=/tmp
"""


@pytest.fixture
def containers(host: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Testcontainers, without the helper container that it would pull."""
    monkeypatch.setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
    load("testcontainers.core.config").testcontainers_config.ryuk_disabled = True
    return load("testcontainers.core.container")


def test_testcontainers_start_and_wait_for_a_port(containers: Any, name: str) -> None:
    waiting = load("testcontainers.core.waiting_utils")
    server = "echo serving; exec nc -ll -p 7000 -e echo hello"
    made = containers.DockerContainer("busybox").with_name(name).with_exposed_ports(7000)
    with made.with_command(["sh", "-c", server]) as box:
        waiting.wait_for_logs(box, "serving", timeout=120)
        import socket

        address = ("127.0.0.1", int(box.get_exposed_port(7000)))
        with socket.create_connection(address, 30) as sock:
            assert sock.recv(100) == b"hello\n"
        code, output = box.exec(["echo", "within"])
        assert (code, output) == (0, b"within\n")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_testcontainers_have_a_postgresql_of_debian_s(
    containers: Any, hutch_engine: Engine, name: str, tmp_path: Path
) -> None:
    hutch_engine.images.bootstrap(
        "debian:bookworm", packages=["postgresql"], reference=f"{name}-base:latest"
    )
    (tmp_path / "entrypoint").write_text(_ENTRYPOINT)
    (tmp_path / "Dockerfile").write_text(
        f"FROM {name}-base\nCOPY --chmod=755 entrypoint /entrypoint\nUSER postgres\n"
        'ENTRYPOINT ["/entrypoint"]\n'
    )
    hutch_engine.build(tmp_path, tags=f"{name}-postgres:15")
    postgres = load("testcontainers.community.postgres").PostgresContainer
    with postgres(f"{name}-postgres:15", driver=None).with_name(name) as box:
        connection = load("pg8000.native").Connection(
            box.username,
            password=box.password,
            host="127.0.0.1",
            port=int(box.get_exposed_port(5432)),
            database=box.dbname,
            timeout=60,
        )
        try:
            connection.run("CREATE TABLE t (n int)")
            connection.run("INSERT INTO t SELECT generate_series(1, 1000)")
            assert connection.run("SELECT sum(n) FROM t") == [[500500]]
        finally:
            connection.close()
