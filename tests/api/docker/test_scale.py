"""Many clients and large streams: the daemon's memory does not grow with either."""

from __future__ import annotations

import os
import resource
import socket
import tarfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest

from tests.api.docker.conftest import Client, Daemon, UnixConnection, until
from tests.api.docker.test_containers import create, start, wait

pytestmark = [
    pytest.mark.requires("root", "overlayfs", "cgroup", "busybox"),
    pytest.mark.soak,
    pytest.mark.timeout(1800),
]

ATTACHED = 500
FOLLOWERS = 50
LOG = 10 << 30
COPIED = 2 << 30
_MOST_KB = 64 << 10  # that a large stream may add
_EACH_KB = 100  # that a client may add
_READ = 1 << 20


def peak_kb(daemon: Daemon) -> int:
    """Return the most memory that the daemon has had, since it was last asked."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    found = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    Path(f"/proc/{daemon.process.pid}/clear_refs").write_text("5")
    return int(found.split()[1])


@pytest.fixture(autouse=True)
def _many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _stream(api: Client, method: str, path: str) -> tuple[UnixConnection, IO[bytes]]:
    connection = UnixConnection(api.path)
    connection.request(method, f"/v1.51{path}")
    response = connection.getresponse()
    assert response.status == 200
    return connection, response


def test_idle_attached_clients_cost_little(
    api: Client, daemon: Daemon, name: str, image: str
) -> None:
    create(api, name, image, "sh", "-c", "read x; echo $x", OpenStdin=True)
    start(api, name)
    before = peak_kb(daemon)
    with ExitStack() as stack:
        clients: list[socket.socket] = []
        path = f"/v1.51/containers/{name}/attach?stream=1&stdout=1"
        ask = f"POST {path} HTTP/1.1\r\nHost: d\r\nUpgrade: tcp\r\nConnection: Upgrade\r\n\r\n"
        for _ in range(ATTACHED):
            sock = stack.enter_context(api.socket())
            sock.sendall(ask.encode())
            assert b" 101 " in sock.recv(4096)
            clients.append(sock)
        grown = peak_kb(daemon) - before
        print(f"{ATTACHED} attached clients: {before} kB and {grown} kB more")
        assert grown < ATTACHED * _EACH_KB
        assert api.ask("GET", "/_ping").status == 200
        sock = stack.enter_context(api.socket())
        sock.sendall(ask.replace("stdout=1", "stdin=1").encode())
        assert b" 101 " in sock.recv(4096)
        sock.sendall(b"hello\n")
        for one in clients:
            assert one.recv(4096)[8:] == b"hello\n"
    assert wait(api, name) == 0


def test_followers_of_a_log_all_get_the_whole_of_it(
    api: Client, daemon: Daemon, name: str, image: str
) -> None:
    script = "read x; yes 0123456789abcde | head -c 16000000"
    create(api, name, image, "sh", "-c", script, OpenStdin=True)
    start(api, name)
    before = peak_kb(daemon)
    sizes: list[int] = []

    def follow() -> None:
        connection, response = _stream(api, "GET", f"/containers/{name}/logs?follow=1&stdout=1")
        size = 0
        while head := response.read(8):
            size += len(response.read(int.from_bytes(head[4:], "big")))
        sizes.append(size)
        connection.close()

    threads = [threading.Thread(target=follow) for _ in range(FOLLOWERS)]
    for thread in threads:
        thread.start()
    with api.socket() as sock:
        path = f"/v1.51/containers/{name}/attach?stream=1&stdin=1"
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: d\r\n\r\n".encode())
        assert b" 200 " in sock.recv(4096)
        sock.sendall(b"go\n")
        for thread in threads:
            thread.join()
    grown = peak_kb(daemon) - before
    print(f"{FOLLOWERS} followers: {before} kB and {grown} kB more")
    assert sizes == [16_000_000] * FOLLOWERS
    assert grown < _MOST_KB + FOLLOWERS * 2048


def test_a_log_of_ten_gigabytes_is_read_in_constant_memory(
    api: Client, daemon: Daemon, name: str, image: str
) -> None:
    line = "x" * 8191
    script = f"yes {line} | head -c {LOG}"
    create(api, name, image, "sh", "-c", script)
    start(api, name)
    until_long(lambda: api.ask("GET", f"/containers/{name}/json").json["State"]["Running"] is False)
    before = peak_kb(daemon)
    connection, response = _stream(api, "GET", f"/containers/{name}/logs?stdout=1")
    size = 0
    while head := response.read(8):
        size += len(response.read(int.from_bytes(head[4:], "big")))
    connection.close()
    grown = peak_kb(daemon) - before
    print(f"a log of {LOG} bytes: {before} kB and {grown} kB more")
    assert size == LOG
    assert grown < _MOST_KB


def until_long(condition: object) -> None:
    """Wait for what takes minutes."""
    assert callable(condition)
    for _ in range(20):
        try:
            until(condition)
            return
        except AssertionError:
            continue
    raise AssertionError("did not come true")


def test_two_gigabytes_are_copied_in_and_out_in_constant_memory(
    api: Client, daemon: Daemon, name: str, image: str
) -> None:
    create(api, name, image, "true")
    before = peak_kb(daemon)
    head = tarfile.TarInfo("big")
    head.size = COPIED
    total = 512 + COPIED + 1024
    with api.socket() as sock:
        sock.settimeout(600)
        path = f"/v1.51/containers/{name}/archive?path=/tmp"
        sock.sendall(f"PUT {path} HTTP/1.1\r\nHost: d\r\nContent-Length: {total}\r\n\r\n".encode())
        sock.sendall(head.tobuf())
        block = os.urandom(_READ)
        for _ in range(COPIED // _READ):
            sock.sendall(block)
        sock.sendall(bytes(1024))
        assert b" 200 " in sock.recv(4096)
    into = peak_kb(daemon) - before
    connection, response = _stream(api, "GET", f"/containers/{name}/archive?path=/tmp/big")
    size = 0
    while piece := response.read(_READ):
        size += len(piece)
    connection.close()
    out = peak_kb(daemon) - before
    print(f"{COPIED} bytes: {before} kB, {into} kB more to copy in, {out} kB more out")
    assert size >= COPIED + 512
    assert max(into, out) < _MOST_KB
