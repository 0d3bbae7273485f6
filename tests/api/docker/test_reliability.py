"""What survives: a daemon that is killed, clients that vanish, streams without end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hutch.engine import Engine
from tests.api.docker.conftest import Client, Daemon, UnixConnection, until
from tests.api.docker.test_containers import create, hijack, start, text_of, wait

pytestmark = pytest.mark.requires("root", "overlayfs", "cgroup", "netns", "nftables", "busybox")

NewDaemon = Callable[..., Daemon]


@pytest.fixture
def root(tmp_path: Path, image: str, hutch_engine: Engine) -> Iterator[Path]:
    """A root of the test's own, with an image; nothing runs in it at the end."""
    archive = str(tmp_path / "image.tar")
    hutch_engine.images.save([image], archive)
    with Engine(tmp_path / "root") as engine:
        engine.images.load(archive)
    yield tmp_path / "root"
    with Engine(tmp_path / "root") as engine:
        for info in engine.list(all=True):
            engine.get(info.id).remove(force=True, volumes=True)
        engine.networks.teardown()


@pytest.fixture
def small_root(tmp_path: Path, image: str, hutch_engine: Engine) -> Iterator[Path]:
    """A root on a small file system of its own, with an image; nothing is left of it."""
    archive = str(tmp_path / "image.tar")
    hutch_engine.images.save([image], archive)
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)], check=True)
    try:
        with Engine(place / "root") as engine:
            engine.images.load(archive)
        yield place / "root"
        (place / "filler").unlink(missing_ok=True)
        with Engine(place / "root") as engine:
            for info in engine.list(all=True):
                engine.get(info.id).remove(force=True, volumes=True)
            engine.networks.teardown()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _fill(path: Path) -> None:
    """Leave no room beside a file."""
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_room_can_be_made_on_a_full_disk(
    small_root: Path, new_daemon: NewDaemon, image: str
) -> None:
    api = Client(new_daemon(small_root).path)
    create(api, "full", image, "sleep", "1000", HostConfig={"NetworkMode": "none"})
    start(api, "full")
    for _ in range(3):  # what is kept for the end is used up too
        _fill(small_root.parent / "filler")
        (listed,) = api.ask("GET", "/containers/json").json
        assert listed["State"] == "running"
        body = {"Cmd": ["echo", "inside"], "AttachStdout": True}
        made = api.ask("POST", "/containers/full/exec", body)
        assert made.status == 201, made
        told = api.ask("POST", f"/exec/{made.json['Id']}/start", {})
        assert text_of(told.body, 1) == b"inside\n"
    (small_root.parent / "filler").unlink()
    create(api, "other", image, "true", HostConfig={"NetworkMode": "none"})
    start(api, "other")
    assert wait(api, "other") == 0


def test_containers_go_on_while_the_daemon_is_away(
    root: Path, new_daemon: NewDaemon, image: str
) -> None:
    daemon = new_daemon(root)
    api = Client(daemon.path)
    script = "echo before; until [ -e /go ]; do sleep 0.05; done; echo after; exit 4"
    create(api, "lasting", image, "sh", "-c", script)
    create(api, "again", image, "sleep", "1000", HostConfig={"RestartPolicy": {"Name": "always"}})
    start(api, "lasting")
    start(api, "again")
    daemon.kill()
    with Engine(root) as engine:
        assert engine.get("lasting").info().state == "running"
    daemon.start()
    sock, seen = hijack(api, "/containers/lasting/attach?stream=1&stdout=1&logs=1")
    with Engine(root) as engine:
        engine.get("lasting").files.write("/go", b"")
    while piece := sock.recv(4096):
        seen += piece
    assert text_of(seen, 1) == b"before\nafter\n"
    assert wait(api, "lasting") == 4
    assert text_of(api.ask("GET", "/containers/lasting/logs?stdout=1").body, 1) == (
        b"before\nafter\n"
    )
    assert api.ask("GET", "/containers/again/json").json["State"]["Running"]


def test_without_live_restore_what_runs_is_stopped_and_started_again(
    root: Path, new_daemon: NewDaemon, image: str, tmp_path: Path
) -> None:
    config = tmp_path / "daemon.json"
    config.write_text('{"live-restore": false, "shutdown-timeout": 1}')
    daemon = new_daemon(root, "--config-file", str(config))
    api = Client(daemon.path)
    create(api, "plain", image, "sleep", "1000")
    create(api, "again", image, "sleep", "1000", HostConfig={"RestartPolicy": {"Name": "always"}})
    start(api, "plain")
    start(api, "again")
    assert daemon.stop() == 0
    with Engine(root) as engine:
        assert {info.state for info in engine.list(all=True)} == {"exited"}
    daemon.start()
    until(lambda: api.ask("GET", "/containers/again/json").json["State"]["Running"] is True)
    assert api.ask("GET", "/containers/plain/json").json["State"]["Running"] is False


def test_what_a_killed_daemon_was_at_is_put_right(
    root: Path, new_daemon: NewDaemon, image: str
) -> None:
    daemon = new_daemon(root)
    api = Client(daemon.path)
    made: list[str] = []
    for round_ in range(4):
        sock = api.socket()
        for i in range(3):
            identifier = create(api, f"c{round_}-{i}", image, "sleep", "1000")
            made.append(identifier)
        sock.sendall(
            f"POST /v1.51/containers/{made[-1]}/start HTTP/1.1\r\nHost: d\r\n"
            "Content-Length: 0\r\n\r\n".encode()
        )
        if round_ % 2:
            sock.recv(1)
        daemon.kill()
        sock.close()
        daemon.start()
    with Engine(root) as engine:
        engine.reconcile()
        states = {str(info.id): info.state for info in engine.list(all=True)}
    assert set(states) == set(made)
    assert set(states.values()) <= {"created", "running", "exited"}


def _descriptors(daemon: Daemon) -> list[str]:
    """Return what the daemon holds open, but for the database, which each thread keeps open."""
    found = []
    directory = f"/proc/{daemon.process.pid}/fd"
    for name in os.listdir(directory):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"{directory}/{name}"))
    return [target for target in found if "/hutch.db" not in target]


def _connections(daemon: Daemon) -> int:
    """Count the daemon's ends of connections to its socket."""
    connected, taken = "03", set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, _, _, state, inode, *path = line.split()
        # An end of a connection has the path that the socket which took it was bound to.
        if state == connected and path and path[0].startswith(daemon.path):
            taken.add(f"socket:[{inode}]")
    return sum(target in taken for target in _descriptors(daemon))


def test_clients_that_vanish_leave_nothing_behind(
    root: Path, new_daemon: NewDaemon, image: str
) -> None:
    # A daemon of its own: whatever it holds open is of this test.
    daemon = new_daemon(root)
    api, name = Client(daemon.path), "lasting"
    create(api, name, image, "sleep", "1000", OpenStdin=True)
    start(api, name)
    create(api, f"{name}-later", image, "true")
    api.ask("GET", f"/containers/{name}/stats?stream=0&one-shot=1")
    until(lambda: _connections(daemon) == 0)
    before = len(_descriptors(daemon))
    socks = []
    for _ in range(10):
        socks.append(hijack(api, f"/containers/{name}/attach?stream=1&stdin=1&stdout=1")[0])
        socks.append(hijack(api, f"/containers/{name}-later/attach?stream=1&stdout=1")[0])
        for path in (
            f"/containers/{name}/logs?follow=1&stdout=1",
            f"/containers/{name}/stats",
        ):
            connection = UnixConnection(api.path)
            connection.request("GET", f"/v1.51{path}")
            socks.append(connection.sock)
        sock = api.socket()
        sock.sendall(
            f"POST /v1.51/containers/{name}/wait HTTP/1.1\r\nHost: d\r\n"
            "Content-Length: 0\r\n\r\n".encode()
        )
        socks.append(sock)
    until(lambda: _connections(daemon) == len(socks))
    for sock in socks:
        sock.close()
    until(lambda: _connections(daemon) == 0 and len(_descriptors(daemon)) <= before)
    assert api.ask("GET", f"/containers/{name}/json").json["State"]["Running"]


def test_health_is_told(api: Client, name: str, image: str, hutch_engine: Engine) -> None:
    check = {"Test": ["CMD", "true"], "Interval": 10**8}
    create(api, name, image, "sleep", "1000", Healthcheck=check)
    start(api, name)

    def status() -> str:
        found = api.ask("GET", f"/containers/{name}/json").json["State"]["Health"]
        return str(found["Status"])

    until(lambda: status() == "healthy")
    until(
        lambda: (
            "health_status: healthy"
            in [
                event.action
                for event in hutch_engine.events(since=0, follow=False)
                if event.attributes.get("name") == name
            ]
        )
    )


def _resident_kb(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


_ROOM_KB = 24 << 10


def test_a_client_that_does_not_read_holds_up_the_program_and_nothing_else(
    api: Client, daemon: Daemon, name: str, image: str
) -> None:
    size = 100_000_000
    script = f"yes 0123456789 | head -c {size}; echo > /written"
    create(api, name, image, "sh", "-c", script)
    sock, seen = hijack(api, f"/containers/{name}/attach?stream=1&stdout=1")
    before = _resident_kb(daemon)
    start(api, name)
    until(lambda: _is_idle(api, name))
    assert _resident_kb(daemon) < before + _ROOM_KB
    assert api.ask("HEAD", f"/containers/{name}/archive?path=/written").status == 404
    # Its exit is heard all the same.
    assert api.ask("POST", f"/containers/{name}/kill").status == 204
    assert api.ask("GET", f"/containers/{name}/json").json["State"]["Running"] is False
    sock.close()
    assert len(seen) < size


def _is_idle(api: Client, name: str) -> bool:
    """Tell whether a container does nothing: two readings of its processor time are alike."""

    def used() -> int:
        path = f"/containers/{name}/stats?stream=0&one-shot=1"
        return int(api.ask("GET", path).json["cpu_stats"]["cpu_usage"]["total_usage"])

    first = used()
    time.sleep(0.2)
    return used() == first > 0


def test_long_logs_and_large_files_take_no_memory(
    api: Client, daemon: Daemon, name: str, image: str
) -> None:
    size = 60_000_000
    script = f"yes 0123456789abcdef0123456789abcdef | head -c {size // 3}"
    script += f"; head -c {size} /dev/zero > /large"
    create(api, name, image, "sh", "-c", script)
    start(api, name)
    assert wait(api, name) == 0
    before = _resident_kb(daemon)
    for path in ("logs?stdout=1", "archive?path=/large"):
        connection = UnixConnection(api.path)
        connection.request("GET", f"/v1.51/containers/{name}/{path}")
        response = connection.getresponse()
        read = 0
        while piece := response.read(1 << 20):
            read += len(piece)
        connection.close()
        assert read >= size // 3
    assert _resident_kb(daemon) < before + _ROOM_KB
