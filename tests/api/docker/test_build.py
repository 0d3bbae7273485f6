"""`/build` as clients see it: the classic builder's stream, by hand, docker-py and the command."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import subprocess
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest

from hutch.api.docker import builds
from hutch.engine import Engine
from hutch.engine.builder.events import BuildEvent, BuildProgress
from hutch.image.registry_config import Credentials
from hutch.testing import ensure_image
from tests.api.docker.conftest import Client, Daemon
from tests.engine.building import context
from tests.image.registries import HTPASSWD, PASSWORD, USER, running_registry
from tests.requires import requires

docker: Any = import_module("docker")

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox"),
    pytest.mark.integration,
]


@pytest.fixture
def unique() -> str:
    return os.urandom(6).hex()


@pytest.fixture(autouse=True)
def image(hutch_engine: Engine) -> None:
    ensure_image(hutch_engine, "busybox")


def ask(client: Client, body: bytes, **query: str) -> tuple[int, list[dict[str, Any]]]:
    """Build; return the status and the lines of the stream."""
    answer = client.ask(
        "POST", f"/build?{urlencode(query)}", body, {"Content-Type": "application/x-tar"}
    )
    return answer.status, [json.loads(line) for line in answer.body.splitlines()]


def test_a_build_is_told_as_docker_tells_it(api: Client, unique: str) -> None:
    files = {"Dockerfile": f"FROM busybox\nARG A\nRUN echo {unique}-$A\nLABEL x=y\n"}
    given = {"buildargs": '{"A":"1"}', "networkmode": "none", "t": f"{unique}:1"}
    status, lines = ask(api, context(files), **given)
    said = "".join(line.get("stream", "") for line in lines)
    assert status == 200
    assert said.startswith("Step 1/4 : FROM busybox\n ---> ")
    assert f"Step 3/4 : RUN echo {unique}-$A\n{unique}-1\n ---> " in said
    (image,) = [line["aux"]["ID"] for line in lines if "aux" in line]
    assert said.endswith(f"Successfully built {image[7:19]}\nSuccessfully tagged {unique}:1\n")
    _, again = ask(api, context(files), **given)
    assert " ---> Using cache\n" in "".join(line.get("stream", "") for line in again)
    assert ask(api, context(files), q="1", **given)[1][-1] == {"stream": f"{image}\n"}


def test_failures_are_told_in_the_stream(api: Client, unique: str) -> None:
    text = f"FROM busybox\nRUN echo {unique}; exit 3\n"
    status, lines = ask(api, context({"Dockerfile": text}), networkmode="none")
    message = f"The command '/bin/sh -c echo {unique}; exit 3' returned a non-zero code: 3"
    assert status == 200
    assert lines[-1] == {"errorDetail": {"code": 3, "message": message}, "error": message}


def test_failures_before_the_first_step_are_answered_with_a_status(api: Client) -> None:
    for files, expected, message in (
        ({"Dockerfile": "FROM busybox\nBAD x\n"}, 400, "unknown instruction 'BAD'"),
        ({"Dockerfile": "FROM busybox\n", "../x": "y"}, 500, "leaves the root"),
        ({"other": ""}, 400, "no Dockerfile"),
    ):
        status, lines = ask(api, context(files))
        assert status == expected and message in lines[0]["message"], lines


def test_what_is_no_build_is_refused_before_it_begins(api: Client) -> None:
    for path, body, kind, status in (
        ("/build", b"", "application/x-tar", 400),
        ("/build?version=2", b"x", "application/x-tar", 400),
        ("/build?buildargs=nonsense", b"x", "application/x-tar", 400),
        ("/build?memory=x", b"x", "application/x-tar", 400),
        ('/build?outputs=[{"Type":"local"}]', b"x", "application/x-tar", 400),
        ('/build?outputs=[{"Type":"image","Attrs":{"push":"true"}}]', b"x", "", 400),
        ("/build?remote=/etc", b"", "application/x-tar", 400),
        ("/build?remote=file:///etc", b"", "application/x-tar", 400),
        ("/build", b"x", "text/html", 400),
        ("/session", b"", "application/x-tar", 501),
    ):
        assert api.ask("POST", path, body, {"Content-Type": kind}).status == status, path


def test_a_client_that_leaves_ends_its_build(
    api: Client, hutch_engine: Engine, unique: str
) -> None:
    data = context({"Dockerfile": f"FROM busybox\nRUN echo {unique}; sleep 1000\n"})
    with api.socket() as sock:
        head = (
            "POST /v1.51/build?networkmode=none HTTP/1.1\r\nHost: docker\r\n"
            f"Content-Type: application/x-tar\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        sock.sendall(head.encode() + data)
        seen = b""
        while f'"{unique}'.encode() not in seen:
            seen += sock.recv(65536)
        assert [i for i in hutch_engine.list(all=True) if i.labels.get("hutch.build")]
    deadline = 600
    while [i for i in hutch_engine.list(all=True) if i.labels.get("hutch.build")]:
        deadline -= 1
        assert deadline, "the command outlived its client"
        hutch_engine.list(all=True)
        _pause()


def test_a_build_waits_for_a_client_that_reads_slowly() -> None:
    told = 0

    class Builder:
        """Writes without an end in sight."""

        def build(self, source: object, *, progress: BuildProgress, **options: object) -> Any:
            nonlocal told
            progress(BuildEvent(kind="start", step=1, text="RUN yes"))
            for _ in range(5000):
                progress(BuildEvent(kind="output", step=1, data=b"y\n"))
                told += 1
            return SimpleNamespace(id="sha256:0")

    async def read() -> int:
        front = SimpleNamespace(engine=Builder(), call_slow=asyncio.to_thread)
        request: Any = SimpleNamespace(front=front)
        most = lines = 0
        async for _ in builds._narrated(request, "", None, {}, False):
            lines += 1
            most = max(most, told - lines)
        assert lines > 5000
        return most

    assert asyncio.run(read()) < 100


def _pause() -> None:
    import time

    time.sleep(0.1)


def test_docker_py_builds_and_prunes(daemon: Daemon, unique: str) -> None:
    client = docker.DockerClient(base_url=f"unix://{daemon.path}", version="1.43", timeout=120)
    try:
        text = f"FROM busybox\nRUN echo {unique} > /f\n".encode()
        lines = list(
            client.api.build(
                fileobj=io.BytesIO(text), tag=f"{unique}:py", network_mode="none", decode=True
            )
        )
        assert any("Successfully built" in line.get("stream", "") for line in lines)
        bad = io.BytesIO(b"FROM busybox\nRUN exit 4\n")
        last = list(client.api.build(fileobj=bad, network_mode="none", decode=True))[-1]
        assert last["errorDetail"]["code"] == 4
        assert "SpaceReclaimed" in client.api.prune_builds()
    finally:
        client.close()


@requires("docker")
def test_the_docker_command_builds(daemon: Daemon, tmp_path: Path, unique: str) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM busybox AS one\nRUN echo {unique} > /f\n"
        "FROM scratch\nCOPY --from=one /f /f\nCOPY g /\n"
    )
    (tmp_path / "g").write_text("g")
    (tmp_path / "hidden").write_text("h")
    (tmp_path / ".dockerignore").write_text("hidden\n")
    done = subprocess.run(
        ["docker", "--host", f"unix://{daemon.path}", "build", "--network=none", "-t",
         f"{unique}:cli", str(tmp_path)],
        env={**os.environ, "DOCKER_BUILDKIT": "0"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # Stages run side by side: either may be the first to begin.
    assert "Successfully tagged" in done.stdout
    assert re.search(r"Step \d/5 : FROM busybox AS one\n", done.stdout), done.stdout


@requires("docker-registry")
def test_a_base_image_is_pulled_with_what_the_client_has(
    api: Client, daemon: Daemon, hutch_engine: Engine, unique: str, tmp_path: Path
) -> None:
    htpasswd = tmp_path / "htpasswd"
    htpasswd.write_text(HTPASSWD)
    auth = f"auth:\n  htpasswd: {{realm: test, path: {htpasswd}}}\n"
    with running_registry(tmp_path / "registry", auth=auth) as host:
        base = f"{host}/base:{unique}"
        hutch_engine.images.tag("busybox", base)
        hutch_engine.images.push(base, credentials=Credentials(username=USER, password=PASSWORD))
        hutch_engine.images.remove(base)
        body = context({"Dockerfile": f"FROM {base}\nLABEL a={unique}\n"})
        headers = {"Content-Type": "application/x-tar"}
        assert b"authentication" in api.ask("POST", "/build", body, headers).body
        given = {f"https://{host}/v1/": {"username": USER, "password": PASSWORD}, "other": {}}
        config = base64.urlsafe_b64encode(json.dumps(given).encode()).decode()
        done = api.ask("POST", "/build", body, {**headers, "X-Registry-Config": config})
        assert b"Successfully built" in done.body, done.body
        hutch_engine.images.remove(base, force=True)
        bad = api.ask("POST", "/build", body, {**headers, "X-Registry-Config": "?"})
        assert bad.status == 400
    log = daemon.log.read_text()
    assert PASSWORD not in log and config not in log
