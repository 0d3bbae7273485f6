"""The port proxy under load and with wrong arguments, built with address and UB sanitizers."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from hutch.linux.locks import lock_holder
from tests.network.boxes import TIMEOUT_S, listener
from tests.requires import requires

pytestmark = [requires("cc"), pytest.mark.integration]
NATIVE = Path(__file__).parents[2] / "native"


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proxy that ends at the first wrong memory access."""
    program = tmp_path_factory.mktemp("asan") / "hutch-proxy"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-fsanitize=address,undefined"]
    sources = [str(NATIVE / "background.c")]
    sources += [str(path) for path in sorted((NATIVE / "proxy").glob("*.c"))]
    subprocess.run(
        ["gcc", *flags, "-fno-sanitize-recover=all", "-o", str(program), *sources], check=True
    )
    return program


def free_port(kind: int) -> int:
    """Return a port that is free on both loopback addresses, most likely."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def relaying(program: Path, lock: Path, mapping: str) -> Iterator[None]:
    """Run the proxy until its owner ends; fail if it did not end well then."""
    with subprocess.Popen(["sleep", "1000"]) as owner:
        pidfd = os.pidfd_open(owner.pid)
        argv = [str(program), "-f", "-l", str(lock), "-o", str(pidfd), mapping]
        proxy = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, pass_fds=[pidfd])
        os.close(pidfd)
        try:
            while not (lock.exists() and is_held(lock)):
                assert proxy.poll() is None
            yield
        finally:
            owner.kill()
            text = proxy.communicate(timeout=TIMEOUT_S)[1]
        assert (proxy.returncode, text) == (0, "")


def is_held(lock: Path) -> bool:
    """Tell whether the proxy has its lock, which comes after its ports."""
    with open(lock, "r+b") as file:
        return lock_holder(file.fileno()) != 0


def connect(port: int) -> socket.socket:
    return socket.create_connection(("::1", port), timeout=TIMEOUT_S)


def test_connections_come_and_go_in_every_way(checked: Path, tmp_path: Path) -> None:
    with listener("127.0.0.1", 0) as server:
        inside, outside = server.getsockname()[1], free_port(socket.SOCK_STREAM)

        def serve() -> None:
            for number in range(59):
                accepted, _ = server.accept()
                with accepted, suppress(OSError):  # a client may leave at any time
                    if number % 3 == 0:  # leave with data unread: a reset
                        continue
                    while data := accepted.recv(4096):
                        accepted.sendall(data)

        thread = threading.Thread(target=serve)
        with relaying(checked, tmp_path / "lock", f"tcp,::1,{outside},127.0.0.1,{inside}"):
            thread.start()
            for number in range(59):
                with connect(outside) as client, suppress(OSError):
                    client.sendall(b"x" * 20000)
                    if number % 2:
                        client.shutdown(socket.SHUT_WR)
                        client.recv(100)
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def test_more_clients_than_there_is_room_for_are_served_by_turns(
    checked: Path, tmp_path: Path
) -> None:
    with (
        listener("127.0.0.1", 0, socket.SOCK_DGRAM) as server,
        ExitStack() as stack,
    ):
        inside, outside = server.getsockname()[1], free_port(socket.SOCK_DGRAM)
        with relaying(checked, tmp_path / "lock", f"udp,::1,{outside},127.0.0.1,{inside}"):
            for _ in range(600):
                client = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
                client.settimeout(TIMEOUT_S)
                client.connect(("::1", outside))
                client.send(b"ping")
                data, peer = server.recvfrom(16)
                server.sendto(data[::-1], peer)
                assert client.recv(16) == b"gnip"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tcp,127.0.0.1,1"],
        ["tcp,127.0.0.1,1,127.0.0.1,2,3"],
        ["sctp,127.0.0.1,1,127.0.0.1,2"],
        ["tcp,127.0.0.1,70000,127.0.0.1,2"],
        ["tcp,127.0.0.1,0,127.0.0.1,2"],
        ["tcp,nonsense,1,127.0.0.1,2"],
        ["tcp,127.0.0.1,1,127.0.0.1," + "9" * 300],
        [",,,,"],
        [""],
    ],
)
def test_wrong_arguments_are_refused(checked: Path, tmp_path: Path, arguments: list[str]) -> None:
    argv = [str(checked), "-f", "-l", str(tmp_path / "lock"), "-o", "0", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (2, "")


def test_a_taken_port_is_named(checked: Path, tmp_path: Path) -> None:
    with listener("127.0.0.1", 0) as taken:
        mapping = f"tcp,127.0.0.1,{taken.getsockname()[1]},127.0.0.1,2"
        argv = [str(checked), "-f", "-l", str(tmp_path / "lock"), "-o", "0", mapping]
        done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 3
    assert mapping in done.stderr
