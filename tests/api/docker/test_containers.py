"""Containers over the API: their life as clients see it."""

from __future__ import annotations

import json
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from hutch.engine import Engine
from hutch.units import parse_time_ns
from tests.api.docker.conftest import Client, UnixConnection, until

pytestmark = pytest.mark.requires("root", "overlayfs", "cgroup", "netns", "nftables", "busybox")

Docker = Callable[..., subprocess.CompletedProcess[bytes]]


def create(api: Client, name: str, image: str, *command: str, **more: Any) -> str:
    """Make a container without a network; return its identifier."""
    host = {"NetworkMode": "none"} | more.pop("HostConfig", {})
    body = {"Image": image, "Cmd": list(command), "HostConfig": host} | more
    answer = api.ask("POST", f"/containers/create?name={name}", body)
    assert answer.status == 201, answer
    return str(answer.json["Id"])


def start(api: Client, name: str) -> None:
    answer = api.ask("POST", f"/containers/{name}/start")
    assert answer.status == 204, answer


def wait(api: Client, name: str) -> int:
    return int(api.ask("POST", f"/containers/{name}/wait").json["StatusCode"])


def demultiplex(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces of a multiplexed stream."""
    while data:
        stream, length = struct.unpack(">BxxxI", data[:8])
        yield stream, data[8 : 8 + length]
        data = data[8 + length :]


def text_of(data: bytes, stream: int) -> bytes:
    return b"".join(piece for number, piece in demultiplex(data) if number == stream)


# ---- life ---------------------------------------------------------------------------------


def test_a_container_runs_to_its_end_and_tells_its_code(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sh", "-c", "exit 7")
    start(api, name)
    assert wait(api, name) == 7
    state = api.ask("GET", f"/containers/{name}/json").json["State"]
    assert (state["Status"], state["ExitCode"], state["Running"]) == ("exited", 7, False)


def test_a_start_of_what_runs_is_not_modified(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sleep", "1000")
    start(api, name)
    assert api.ask("POST", f"/containers/{name}/start").status == 304
    assert api.ask("POST", f"/containers/{name}/stop?t=0").status == 204
    assert api.ask("POST", f"/containers/{name}/stop").status == 304


def test_what_one_front_end_starts_the_other_sees(
    api: Client, name: str, image: str, hutch_engine: Engine
) -> None:
    with hutch_engine.start(image, ["sleep", "1000"], name=name, network="none") as box:
        seen = api.ask("GET", "/containers/json").json
        assert str(box.id) in [entry["Id"] for entry in seen]
        assert api.ask("POST", f"/containers/{name}/kill").status == 204
        assert wait(api, name) == 137
        assert box.info().state == "exited"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/containers/{}/json"),
        ("POST", "/containers/{}/start"),
        ("POST", "/containers/{}/wait"),
        ("GET", "/containers/{}/logs?stdout=1"),
        ("DELETE", "/containers/{}"),
        ("POST", "/containers/{}/exec"),
        ("GET", "/containers/{}/archive?path=/"),
    ],
)
def test_a_container_that_is_not_there_is_told_in_dockers_words(
    api: Client, method: str, path: str
) -> None:
    answer = api.ask(method, path.format("nowhere"))
    assert (answer.status, answer.message) == (404, "No such container: nowhere")


def test_a_missing_image_is_told_so_that_clients_pull(api: Client) -> None:
    answer = api.ask("POST", "/containers/create", {"Image": "nowhere/never"})
    assert (answer.status, answer.message) == (404, "No such image: nowhere/never:latest")


def test_a_taken_name_is_a_conflict(api: Client, name: str, image: str) -> None:
    create(api, name, image, "true")
    answer = api.ask("POST", f"/containers/create?name={name}", {"Image": image, "Cmd": ["true"]})
    assert answer.status == 409
    assert f'The container name "/{name}" is already in use by container' in answer.message


def test_a_network_that_is_not_there_is_no_missing_image(api: Client, image: str) -> None:
    host = {"NetworkMode": "nowhere"}
    body = {"Image": image, "Cmd": ["true"], "HostConfig": host}
    answer = api.ask("POST", "/containers/create", body)
    assert answer.status == 400
    assert "nowhere" in answer.message


def test_a_port_that_is_taken_is_told_in_dockers_words(api: Client, name: str, image: str) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    host = {"NetworkMode": "bridge", "PortBindings": {"80/tcp": [{"HostPort": port}]}}
    create(api, f"{name}-1", image, "sleep", "1000", HostConfig=host)
    create(api, f"{name}-2", image, "sleep", "1000", HostConfig=host)
    start(api, f"{name}-1")
    answer = api.ask("POST", f"/containers/{name}-2/start")
    assert answer.status == 500
    assert f"Bind for 0.0.0.0:{port} failed: port is already allocated" in answer.message
    ports = api.ask("GET", f"/containers/{name}-1/json").json["NetworkSettings"]["Ports"]
    assert {"HostIp": "0.0.0.0", "HostPort": port} in ports["80/tcp"]


def test_removal_of_what_runs_needs_force(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sleep", "1000")
    start(api, name)
    assert api.ask("DELETE", f"/containers/{name}").status == 409
    assert api.ask("DELETE", f"/containers/{name}?force=1").status == 204
    assert api.ask("GET", f"/containers/{name}/json").status == 404


def test_a_waiter_for_the_removal_gets_the_exit_code(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sh", "-c", "exit 5", HostConfig={"AutoRemove": True})
    codes: list[int | None] = []

    def waiting() -> None:
        answer = api.ask("POST", f"/containers/{name}/wait?condition=removed")
        codes.append(answer.json.get("StatusCode"))

    with api.socket() as sock:
        # The head comes before there is anything to tell.
        sock.sendall(
            f"POST /v1.51/containers/{name}/wait?condition=next-exit HTTP/1.1\r\nHost: d\r\n"
            "Content-Length: 0\r\n\r\n".encode()
        )
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
        thread = threading.Thread(target=waiting)
        thread.start()
        # It is listening once its connection is known to the daemon, which is no later than a
        # request that was sent after it is answered.
        api.ask("GET", f"/containers/{name}/json")
        start(api, name)
        assert b'{"StatusCode":5}' in sock.recv(4096)
    thread.join(60)
    # None for one that came when it had gone already.
    assert codes in ([5], [None])
    assert api.ask("GET", f"/containers/{name}/json").status == 404


def test_paused_is_told_and_undone(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sleep", "1000")
    start(api, name)
    assert api.ask("POST", f"/containers/{name}/pause").status == 204
    assert api.ask("GET", f"/containers/{name}/json").json["State"]["Status"] == "paused"
    assert api.ask("POST", f"/containers/{name}/attach").status == 409
    assert api.ask("POST", f"/containers/{name}/unpause").status == 204
    assert api.ask("POST", f"/containers/{name}/unpause").status == 409


def test_limits_and_name_change(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sleep", "1000")
    start(api, name)
    body = {"Memory": 64 << 20, "MemorySwap": 128 << 20, "RestartPolicy": {"Name": "always"}}
    assert api.ask("POST", f"/containers/{name}/update", body).status == 200
    assert api.ask("POST", f"/containers/{name}/rename?name={name}-new").status == 204
    host = api.ask("GET", f"/containers/{name}-new/json").json["HostConfig"]
    assert host["Memory"] == 64 << 20
    assert host["RestartPolicy"] == {"Name": "always", "MaximumRetryCount": 0}


def test_a_restart_policy_is_followed(api: Client, name: str, image: str) -> None:
    policy = {"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 2}}
    create(api, name, image, "false", HostConfig=policy)
    start(api, name)

    def is_over() -> bool:
        found = api.ask("GET", f"/containers/{name}/json").json
        return bool(found["RestartCount"] == 2 and found["State"]["Status"] == "exited")

    until(is_over)


# ---- what is asked and what is told ---------------------------------------------------------


def test_inspection_tells_what_was_asked(api: Client, name: str, image: str) -> None:
    host = {
        "Memory": 128 << 20,
        "NanoCpus": 500_000_000,
        "Binds": ["/tmp:/host:ro"],
        "Tmpfs": {"/scratch": "size=1048576"},
        "CapAdd": ["NET_ADMIN"],
        "CapDrop": ["MKNOD"],
        "Ulimits": [{"Name": "nofile", "Soft": 100, "Hard": 200}],
        "ExtraHosts": ["other:10.1.2.3"],
        "PidsLimit": 100,
        "ReadonlyRootfs": True,
        "Init": True,
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "2"}},
        "SecurityOpt": ["no-new-privileges"],
        "Sysctls": {"net.ipv4.ip_forward": "1"},
    }
    body = {
        "Labels": {"one": "1"},
        "Env": ["A=b"],
        "User": "1000:1000",
        "WorkingDir": "/tmp",
        "Hostname": "box",
        "StopSignal": "SIGINT",
        "StopTimeout": 3,
        "ExposedPorts": {"80/tcp": {}},
        "Healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": 10**9, "Retries": 2},
    }
    create(api, name, image, "sleep", "5", HostConfig=host, **body)
    found = api.ask("GET", f"/containers/{name}/json").json
    config, told = found["Config"], found["HostConfig"]
    for key in ("Memory", "NanoCpus", "Binds", "Tmpfs", "CapAdd", "CapDrop", "PidsLimit"):
        assert told[key] == host[key], key
    for key in ("ExtraHosts", "ReadonlyRootfs", "Init", "SecurityOpt", "Ulimits"):
        assert told[key] == host[key], key
    assert told["LogConfig"]["Config"] == {"max-size": "1048576", "max-file": "2"}
    for key in ("User", "WorkingDir", "Hostname", "StopSignal", "StopTimeout", "ExposedPorts"):
        assert config[key] == body[key], key
    assert config["Labels"]["one"] == "1"
    assert "A=b" in config["Env"]
    assert config["Healthcheck"]["Test"] == ["CMD-SHELL", "true"]
    assert config["Cmd"] == ["sleep", "5"]
    assert found["Name"] == f"/{name}"


def test_a_group_beneath_docker_s_is_passed_over_with_a_warning(api: Client, image: str) -> None:
    """As buildx asks for one; it has no limits of its own."""
    host = {"CgroupParent": "/docker/buildx", "Privileged": True}
    made = api.ask("POST", "/containers/create", {"Image": image, "HostConfig": host})
    assert made.status == 201
    assert made.json["Warnings"] == ["CgroupParent /docker/buildx: groups are the engine's own"]
    api.ask("DELETE", f"/containers/{made.json['Id']}")


@pytest.mark.parametrize(
    "host",
    [
        {"CgroupParent": "/elsewhere"},
        {"CgroupParent": "/dockers"},
        {"Links": ["a:b"]},
        {"MaskedPaths": ["/proc/kcore"]},
        {"SecurityOpt": ["label=type:x"]},
        {"Mounts": [{"Type": "npipe", "Source": "a", "Target": "/b"}]},
        {"VolumeDriver": "nfs"},
        {"Runtime": "kata"},
        {"CapAdd": ["NOTHING"]},
        {"LogConfig": {"Type": "syslog"}},
    ],
    ids=lambda host: next(iter(host)),
)
def test_what_is_not_possible_is_refused_by_name(
    api: Client, image: str, host: dict[str, Any]
) -> None:
    answer = api.ask("POST", "/containers/create", {"Image": image, "HostConfig": host})
    assert answer.status == 400, answer
    assert answer.message


@pytest.mark.parametrize(
    "mount",
    [
        {"Target": {}},
        {"Target": ["/x"]},
        {"Target": "/x", "Type": "bind", "Source": "/", "BindOptions": ["rslave"]},
        {"Target": "/x", "VolumeOptions": {"DriverConfig": "local"}},
        {"Target": "/x", "VolumeOptions": {"NoSuch": 1}},
    ],
    ids=str,
)
def test_a_mount_of_the_wrong_shape_is_refused(
    api: Client, image: str, mount: dict[str, Any]
) -> None:
    body = {"Image": image, "HostConfig": {"Mounts": [mount]}}
    answer = api.ask("POST", "/containers/create", body)
    assert answer.status == 400, answer
    assert "Mounts[0]" in answer.message


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"Image": 5}', b"", b'{"Env": {"a": 1}}'])
def test_a_body_that_is_no_container_is_refused(api: Client, body: bytes) -> None:
    answer = api.ask("POST", "/containers/create", body, {"Content-Type": "application/json"})
    assert answer.status == 400, answer


def test_a_body_without_bounds_is_refused(api: Client) -> None:
    body = b'{"Image": "' + b"a" * (9 << 20) + b'"}'
    answer = api.ask("POST", "/containers/create", body, {"Content-Type": "application/json"})
    assert answer.status == 413


def test_nulls_are_what_is_not_given(api: Client, name: str, image: str) -> None:
    create(api, name, image, "true", User=None, Env=None, Volumes=None, Healthcheck=None)


def test_lists_are_filtered(api: Client, name: str, image: str) -> None:
    identifier = create(api, name, image, "true", Labels={"of": name})

    def listed(**filters: list[str]) -> list[str]:
        from urllib.parse import quote

        query = quote(json.dumps(filters))
        answer = api.ask("GET", f"/containers/json?all=1&filters={query}")
        assert answer.status == 200, answer
        return [entry["Id"] for entry in answer.json]

    assert listed(name=[f"^/{name}$"]) == [identifier]
    assert listed(label=[f"of={name}"]) == [identifier]
    assert listed(label=[f"of={name}"], status=["created"]) == [identifier]
    assert listed(label=[f"of={name}"], status=["running"]) == []
    assert listed(id=[identifier[:20]]) == [identifier]
    assert identifier in listed(ancestor=[image])
    assert api.ask("GET", '/containers/json?filters={"nothing":["1"]}').status == 400
    assert api.ask("GET", '/containers/json?filters={"status":["x"]}').status == 400


def test_pruning_takes_what_has_the_label_only(api: Client, name: str, image: str) -> None:
    first = create(api, f"{name}-1", image, "true", Labels={"of": name})
    second = create(api, f"{name}-2", image, "true")
    answer = api.ask("POST", f'/containers/prune?filters={{"label":["of={name}"]}}')
    assert answer.json["ContainersDeleted"] == [first]
    assert api.ask("GET", f"/containers/{second}/json").status == 200
    assert api.ask("POST", '/containers/prune?filters={"x":["1"]}').status == 400


# ---- logs -----------------------------------------------------------------------------------


def test_logs_are_framed_by_stream(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sh", "-c", "echo out; echo err >&2; printf partial")
    start(api, name)
    wait(api, name)
    answer = api.ask("GET", f"/containers/{name}/logs?stdout=1&stderr=1")
    assert answer.headers["content-type"] == "application/vnd.docker.multiplexed-stream"
    assert text_of(answer.body, 1) == b"out\npartial"
    assert text_of(answer.body, 2) == b"err\n"
    only = api.ask("GET", f"/containers/{name}/logs?stderr=1")
    assert list(demultiplex(only.body)) == [(2, b"err\n")]


def test_logs_have_tails_times_and_spans(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sh", "-c", "for i in 1 2 3 4; do echo $i; usleep 20000; done")
    start(api, name)
    wait(api, name)
    path = f"/containers/{name}/logs?stdout=1"
    assert text_of(api.ask("GET", f"{path}&tail=2").body, 1) == b"3\n4\n"
    assert text_of(api.ask("GET", f"{path}&tail=0").body, 1) == b""
    assert text_of(api.ask("GET", f"{path}&tail=all").body, 1) == b"1\n2\n3\n4\n"
    assert text_of(api.ask("GET", f"{path}&since=9999999999").body, 1) == b""
    assert text_of(api.ask("GET", f"{path}&until=1").body, 1) == b""
    every = text_of(api.ask("GET", f"{path}&timestamps=1").body, 1).decode().splitlines()
    stamps = [line.partition(" ")[0] for line in every]
    second = stamps[1]
    # Lines that were read at once have one time.
    sooner = b"".join(b"%d\n" % n for n, s in enumerate(stamps, 1) if s <= second)
    later = b"".join(b"%d\n" % n for n, s in enumerate(stamps, 1) if s >= second)
    # Long after: what was written until then is told all the same.
    until(lambda: time.time_ns() - parse_time_ns(second, "until") > 1_100_000_000)
    assert text_of(api.ask("GET", f"{path}&until={second}").body, 1) == sooner
    assert text_of(api.ask("GET", f"{path}&follow=1&until={second}").body, 1) == sooner
    assert text_of(api.ask("GET", f"{path}&since={second}").body, 1) == later
    stamped = text_of(api.ask("GET", f"{path}&timestamps=1&tail=1").body, 1)
    when, _, rest = stamped.partition(b" ")
    assert rest == b"4\n"
    assert len(when) == len("2025-01-01T00:00:00.000000000Z")
    assert api.ask("GET", f"/containers/{name}/logs").status == 400


def test_logs_are_followed_to_the_end(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sh", "-c", "echo one; read x < /go; echo two")
    # A pipe inside holds the program until the first line was seen.
    start_after = api.ask("GET", f"/containers/{name}/json").status
    assert start_after == 200
    api.ask("PUT", f"/containers/{name}/archive?path=/", _tar_with_pipe("go"))
    start(api, name)
    connection = UnixConnection(api.path)
    connection.request("GET", f"/v1.51/containers/{name}/logs?stdout=1&follow=1")
    response = connection.getresponse()
    assert response.read(8 + 4)[8:] == b"one\n"
    made = api.ask("POST", f"/containers/{name}/exec", {"Cmd": ["sh", "-c", "echo > /go"]})
    api.ask("POST", f"/exec/{made.json['Id']}/start", {"Detach": True})
    assert response.read()[8:] == b"two\n"
    connection.close()


def _tar_with_pipe(name: str) -> bytes:
    import io
    import tarfile

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.type = tarfile.FIFOTYPE
        entry.mode = 0o666
        tar.addfile(entry)
    return data.getvalue()


# ---- streams ----------------------------------------------------------------------------------


def hijack(api: Client, path: str, body: bytes = b"", upgrade: bool = True) -> tuple[Any, bytes]:
    """Take a connection over; return it with what came after the head."""
    sock = api.socket()
    more = "Connection: Upgrade\r\nUpgrade: tcp\r\n" if upgrade else ""
    sock.sendall(
        f"POST /v1.51{path} HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\n{more}"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    seen = b""
    while b"\r\n\r\n" not in seen:
        piece = sock.recv(4096)
        assert piece, seen
        seen += piece
    head, _, rest = seen.partition(b"\r\n\r\n")
    expected = b"HTTP/1.1 101 UPGRADED" if upgrade else b"HTTP/1.1 200 OK"
    assert head.startswith(expected), head
    if not upgrade:  # as dockerd has it: frames are announced with an upgrade only
        assert b"application/vnd.docker.raw-stream" in head
    return sock, rest


def read_to_end(sock: Any, seen: bytes = b"") -> bytes:
    while piece := sock.recv(65536):
        seen += piece
    sock.close()
    return seen


@pytest.mark.parametrize("upgrade", [True, False], ids=["101", "200"])
def test_who_attached_before_the_start_misses_nothing(
    api: Client, name: str, image: str, upgrade: bool
) -> None:
    create(api, name, image, "sh", "-c", "echo first; echo bad >&2")
    query = "stream=1&stdout=1&stderr=1"
    one, rest = hijack(api, f"/containers/{name}/attach?{query}", upgrade=upgrade)
    two, rest_of_two = hijack(api, f"/containers/{name}/attach?{query}", upgrade=upgrade)
    start(api, name)
    for sock, begun in ((one, rest), (two, rest_of_two)):
        data = read_to_end(sock, begun)
        assert text_of(data, 1) == b"first\n"
        assert text_of(data, 2) == b"bad\n"


def test_the_end_of_input_is_not_the_end_of_output(api: Client, name: str, image: str) -> None:
    create(api, name, image, "cat", OpenStdin=True, StdinOnce=True)
    sock, rest = hijack(api, f"/containers/{name}/attach?stream=1&stdin=1&stdout=1")
    start(api, name)
    sock.sendall(b"typed\n")
    sock.shutdown(1)
    assert text_of(read_to_end(sock, rest), 1) == b"typed\n"
    assert wait(api, name) == 0


def test_a_terminal_is_raw_and_left_by_the_detach_keys(api: Client, name: str, image: str) -> None:
    create(api, name, image, "cat", OpenStdin=True, Tty=True)
    start(api, name)
    path = f"/containers/{name}/attach?stream=1&stdin=1&stdout=1&detachKeys=ctrl-a,b"
    sock, seen = hijack(api, path)
    assert api.ask("POST", f"/containers/{name}/resize?h=33&w=77").status == 200
    sock.sendall(b"typed\n")
    while b"typed" not in seen:
        seen += sock.recv(4096)
    sock.sendall(b"\x01b")
    assert b"\x01" not in read_to_end(sock)
    assert api.ask("GET", f"/containers/{name}/json").json["State"]["Running"]


def test_detach_keys_that_are_none_are_refused(api: Client, name: str, image: str) -> None:
    create(api, name, image, "cat")
    answer = api.ask("POST", f"/containers/{name}/attach?stream=1&detachKeys=ctrl-1")
    assert answer.status == 400


def test_exec_runs_with_its_streams_and_code(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sleep", "1000")
    start(api, name)
    command = ["sh", "-c", "cat; echo $A; echo bad >&2; exit 3"]
    body = {
        "Cmd": command,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "Env": ["A=b"],
    }
    made = api.ask("POST", f"/containers/{name}/exec", body)
    assert made.status == 201
    identifier = made.json["Id"]
    assert api.ask("GET", f"/exec/{identifier}/json").json["ExitCode"] is None
    sock, rest = hijack(api, f"/exec/{identifier}/start", b'{"Detach":false,"Tty":false}')
    sock.sendall(b"input\n")
    sock.shutdown(1)
    data = read_to_end(sock, rest)
    assert text_of(data, 1) == b"input\nb\n"
    assert text_of(data, 2) == b"bad\n"
    found = api.ask("GET", f"/exec/{identifier}/json").json
    assert (found["ExitCode"], found["Running"]) == (3, False)
    again = api.ask("POST", f"/exec/{identifier}/start", {"Detach": True})
    assert again.status == 409
    assert api.ask("GET", "/exec/nothing/json").status == 404


def test_an_exec_goes_on_when_its_client_has_left(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sleep", "1000")
    start(api, name)
    body = {"Cmd": ["sh", "-c", "read x; echo done > /done"], "AttachStdin": True}
    identifier = api.ask("POST", f"/containers/{name}/exec", body).json["Id"]
    sock, _ = hijack(api, f"/exec/{identifier}/start", b"{}")
    sock.sendall(b"go\n")
    sock.close()
    until(lambda: api.ask("HEAD", f"/containers/{name}/archive?path=/done").status == 200)


def test_what_clients_do_is_in_the_journal(
    api: Client, name: str, image: str, hutch_engine: Engine
) -> None:
    create(api, name, image, "sleep", "1000")
    start(api, name)
    made = api.ask("POST", f"/containers/{name}/exec", {"Cmd": ["true"]}).json["Id"]
    api.ask("POST", f"/exec/{made}/start", {"Detach": True})
    api.ask("GET", f"/containers/{name}/top")
    api.ask("GET", f"/containers/{name}/archive?path=/etc/passwd")

    def told() -> set[str]:
        events = hutch_engine.events(since=0, follow=False)
        return {e.action for e in events if e.attributes.get("name") == name}

    wanted = {"create", "start", "exec_create: true ", "exec_start: true ", "exec_die"}
    until(lambda: told() >= wanted | {"top", "archive-path"})
    api.ask("DELETE", f"/containers/{name}?force=1")
    until(lambda: told() >= {"die", "destroy"})


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("nonesuch", "unable to find user nonesuch: no matching entries in passwd file"),
        ("0:nonesuch", "unable to find group nonesuch: no matching entries in group file"),
    ],
)
def test_exec_as_who_is_not_there_is_refused_when_it_is_made(
    api: Client, name: str, image: str, user: str, message: str
) -> None:
    create(api, name, image, "sleep", "60")
    start(api, name)
    body = {"Cmd": ["true"], "User": user}
    refused = api.ask("POST", f"/containers/{name}/exec", body)
    assert (refused.status, refused.message) == (400, message)
    made = api.ask("POST", f"/containers/{name}/exec", {"Cmd": ["true"], "User": "root:77"})
    assert made.status == 201


def test_exec_in_what_does_not_run_is_a_conflict(api: Client, name: str, image: str) -> None:
    create(api, name, image, "true")
    answer = api.ask("POST", f"/containers/{name}/exec", {"Cmd": ["true"]})
    assert answer.status == 409


def test_a_websocket_carries_the_streams(api: Client, name: str, image: str) -> None:
    from wsproto import ConnectionType, WSConnection
    from wsproto.events import (
        AcceptConnection,
        BytesMessage,
        CloseConnection,
        Message,
        Request,
        TextMessage,
    )

    create(api, name, image, "sh", "-c", "read x; echo got $x", OpenStdin=True)
    plain = api.ask("GET", f"/containers/{name}/attach/ws?stream=1")
    assert plain.status == 400
    protocol = WSConnection(ConnectionType.CLIENT)
    target = f"/v1.51/containers/{name}/attach/ws?stream=1&stdin=1&stdout=1"
    seen = b""
    with api.socket() as sock:
        sock.sendall(protocol.send(Request(host="d", target=target)))
        protocol.receive_data(sock.recv(4096))
        assert [type(event) for event in protocol.events()] == [AcceptConnection]
        start(api, name)
        sock.sendall(protocol.send(TextMessage(data="typed\n")))
        closed = False
        while not closed:
            data = sock.recv(4096)
            protocol.receive_data(data or None)
            for event in protocol.events():
                if isinstance(event, CloseConnection):
                    closed = True
                elif isinstance(event, Message):
                    assert isinstance(event, BytesMessage)
                    seen += event.data
    assert seen == b"got typed\n"


# ---- Docker's own command line -----------------------------------------------------------------


def test_docker_run_gives_output_and_exit_code(docker: Docker, image: str) -> None:
    done = docker(
        "run", "--rm", "--network", "none", image, "sh", "-c", "echo out; echo err >&2; exit 3"
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


def test_docker_run_carries_input(docker: Docker, image: str) -> None:
    done = docker("run", "--rm", "-i", "--network", "none", image, "cat", input=b"x" * 300_000)
    assert done.stdout == b"x" * 300_000


def test_docker_run_of_a_program_that_is_not_there(docker: Docker, image: str) -> None:
    done = docker("run", "--rm", "--network", "none", image, "nothing-here")
    assert done.returncode == 127
    assert b"executable file not found" in done.stderr


def test_a_stop_tells_of_its_signals_and_a_kill_of_no_stop(
    api: Client, name: str, image: str
) -> None:
    body = {"Image": image, "Cmd": ["sleep", "1000"], "HostConfig": {"NetworkMode": "none"}}
    assert api.ask("POST", f"/containers/create?name={name}", body).status == 201
    for end in ("stop?t=0", "kill"):
        assert api.ask("POST", f"/containers/{name}/start").status == 204
        assert api.ask("POST", f"/containers/{name}/{end}").status == 204
    query = f"since=1&until={time.time() + 0.1}&filters={quote(json.dumps({'container': [name]}))}"
    events = [json.loads(line) for line in api.ask("GET", f"/events?{query}").body.splitlines()]
    told = [(one["Action"], one["Actor"]["Attributes"].get("signal")) for one in events]
    assert told == [
        *(("create", None), ("start", None)),
        *(("kill", "15"), ("kill", "9"), ("die", None), ("stop", None)),
        *(("start", None), ("kill", "9"), ("die", None)),
    ]


def test_docker_exec_and_stop(docker: Docker, name: str, image: str) -> None:
    done = docker("run", "-d", "--name", name, "--network", "none", image, "sleep", "1000")
    assert done.returncode == 0, done.stderr
    assert docker("exec", name, "echo", "inside").stdout == b"inside\n"
    assert docker("exec", name, "nothing-here").returncode == 127
    assert docker("stop", "-t", "0", name).returncode == 0
    assert docker("wait", name).stdout == b"137\n"
    assert docker("rm", name).returncode == 0


def test_a_start_that_is_refused_removes_nothing(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sleep", "1000", HostConfig={"AutoRemove": True})
    start(api, name)
    assert api.ask("POST", f"/containers/{name}/pause").status == 204
    answer = api.ask("POST", f"/containers/{name}/start")
    assert (answer.status, "paused" in answer.message) == (409, True), answer
    answer = api.ask("POST", f"/containers/{name}/restart")
    assert (answer.status, "removed when it ends" in answer.message) == (409, True), answer
    assert api.ask("GET", f"/containers/{name}/json").json["State"]["Paused"] is True
    assert api.ask("DELETE", f"/containers/{name}?force=1").status == 204


def test_what_cannot_begin_and_was_to_go_goes(api: Client, name: str, image: str) -> None:
    create(api, name, image, "/nothing", HostConfig={"AutoRemove": True})
    assert api.ask("POST", f"/containers/{name}/start").status == 400
    assert api.ask("GET", f"/containers/{name}/json").status == 404
