"""The name server against hostile packets and data, built with address and UB sanitizers."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.native.boxes import sleeps, wait_until
from tests.network.boxes import TIMEOUT_S
from tests.network.test_dns import query
from tests.requires import requires

pytestmark = [requires("cc"), pytest.mark.integration]
NATIVE = Path(__file__).parents[2] / "native"


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A name server that ends at the first wrong memory access."""
    program = tmp_path_factory.mktemp("asan") / "hutch-dns"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-fsanitize=address,undefined"]
    sources = [str(NATIVE / "background.c")]
    sources += [str(path) for path in sorted((NATIVE / "dns").glob("*.c"))]
    subprocess.run(
        ["gcc", *flags, "-fno-sanitize-recover=all", "-o", str(program), *sources], check=True
    )
    return program


def free_port() -> int:
    """Return a port of the loopback that is free for TCP and, most likely, UDP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    program: Path, directory: Path, hosts: str, *, descriptors: int = 256
) -> Iterator[tuple[int, tuple[str, int]]]:
    """Run the server in the foreground; fail if it did not live to the end of the block."""
    directory.chmod(0o711)
    (directory / "hosts").write_text(hosts)
    (directory / "hosts").chmod(0o644)
    (directory / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    port = free_port()
    argv = [
        "sh",
        "-c",
        f'ulimit -n {descriptors}; exec "$0" "$@"',
        str(program),
        "-f",
        "-d",
        str(directory),
        "-l",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    argv += ["-r", str(directory / "resolv.conf")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        try:
            while True:
                assert process.poll() is None
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S).close()
                    break
                except ConnectionRefusedError:
                    continue
            yield process.pid, ("127.0.0.1", port)
            assert process.poll() is None, process.stderr and process.stderr.read()
        finally:
            process.kill()


def alive(address: tuple[str, int]) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(address)
        client.send(query("web"))
        return b"\xac\x12\x00\x02" in client.recv(512)


HOSTS = (
    "version 1\nforward no\nhost 172.18.0.2 web www a.b.c\nhost fd00::2 web\n"
    + "".join(f"host 172.18.1.{n} many\n" for n in range(200))
    + "from 127.0.0.2\nforward yes\nupstream 127.0.0.3\nhost 172.18.9.9 secret\n"
)


def mutations(count: int) -> Iterator[bytes]:
    """Yield packets that are nearly queries."""
    chance = random.Random(7)
    seeds = [query("web"), query("many"), query("a.b.c"), query("1.0.18.172.in-addr.arpa")]
    seeds += [query(".".join("2000" * 8) + ".ip6.arpa"), query("x" * 63), b"", bytes(12)]
    seeds.append(query("web")[:12] + b"\xc0\x0c\0\x01\0\x01")
    for _ in range(count):
        packet = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(4)):
            if packet:
                packet[chance.randrange(len(packet))] = chance.choice((0, 1, 63, 64, 192, 255))
        if chance.random() < 0.3:
            packet = packet[: chance.randrange(len(packet) + 1)]
        if chance.random() < 0.3:
            packet += chance.randbytes(chance.choice((1, 40, 600, 5000)))
        yield bytes(packet)


def test_broken_packets_do_no_harm(checked: Path, tmp_path: Path) -> None:
    with serving(checked, tmp_path, HOSTS) as (_, address):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for number, packet in enumerate(mutations(4000)):
                client.sendto(packet, address)
                if number % 20 == 0:
                    assert alive(address)
        assert alive(address)


def test_broken_streams_do_no_harm(checked: Path, tmp_path: Path) -> None:
    with serving(checked, tmp_path, HOSTS) as (_, address):
        for number, packet in enumerate(mutations(400)):
            with socket.create_connection(address, timeout=TIMEOUT_S) as client:
                length = len(packet) if number % 3 else (number * 977) % 65536
                try:
                    client.sendall(length.to_bytes(2, "big") + packet)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(4096):
                        pass
                except (ConnectionResetError, BrokenPipeError, OSError):
                    pass
        assert alive(address)


def test_a_long_answer_is_cut_for_udp_and_whole_by_tcp(checked: Path, tmp_path: Path) -> None:
    message = query("many")
    with serving(checked, tmp_path, HOSTS) as (_, address):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(TIMEOUT_S)
            client.connect(address)
            client.send(message)
            answer = client.recv(4096)
            assert len(answer) <= 512
            assert answer[2] & 0x02
        with socket.create_connection(address, timeout=TIMEOUT_S) as stream:
            stream.sendall(len(message).to_bytes(2, "big") + message)
            answer = stream.recv(65536)
            assert int.from_bytes(answer[8:10], "big") == 64


@pytest.mark.parametrize(
    "hosts",
    [
        "nonsense\n",
        "version 2\n",
        "host\n",
        "host 1.2.3 a\n",
        "from x\n",
        "forward maybe\n",
        "version 1 2\n",
        "host 1.2.3.4 " + "x" * 300,
        "\0version 1\n",
    ],
)
def test_broken_data_leaves_the_old_in_force(checked: Path, tmp_path: Path, hosts: str) -> None:
    with serving(checked, tmp_path, HOSTS) as (_, address):
        (tmp_path / "hosts.tmp").write_text(hosts)
        (tmp_path / "hosts.tmp").chmod(0o644)
        (tmp_path / "hosts.tmp").rename(tmp_path / "hosts")
        assert alive(address)


def test_large_data_is_read_whole(checked: Path, tmp_path: Path) -> None:
    lines = "".join(f"host 10.{n >> 8}.{n & 255}.1 h{n}\n" for n in range(20000))
    with serving(checked, tmp_path, HOSTS + "from 127.0.0.9\n" + lines) as (_, address):
        assert alive(address)


def test_the_server_leaves_when_its_data_does(checked: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(HOSTS)
    (tmp_path / "hosts").chmod(0o644)
    tmp_path.chmod(0o711)
    argv = [str(checked), "-f", "-d", str(tmp_path), "-l", "127.0.0.1", "-p", str(free_port())]
    with subprocess.Popen(argv) as process:
        try:
            while not (tmp_path / "lock").exists():
                assert process.poll() is None
            (tmp_path / "hosts").unlink()
            assert process.wait(TIMEOUT_S) in (0, 1)  # 1: gone before it was read
        finally:
            process.kill()


def test_a_stream_waits_while_there_is_no_descriptor_for_it(checked: Path, tmp_path: Path) -> None:
    message = query("web")
    framed = len(message).to_bytes(2, "big") + message
    with serving(checked, tmp_path, HOSTS) as (pid, address):
        assert alive(address)
        used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    room = next(number for number in range(len(used) + 1) if number not in used) + 1
    with ExitStack() as stack:
        pid, address = stack.enter_context(serving(checked, tmp_path, HOSTS, descriptors=room))
        first, second = (
            stack.enter_context(socket.create_connection(address, timeout=TIMEOUT_S))
            for _ in range(2)
        )
        first.sendall(framed)
        assert b"\xac\x12\x00\x02" in first.recv(512)
        before = sleeps(pid)
        # It sleeps after the answer, after others, and when it has tried again in vain.
        wait_until(lambda: sleeps(pid) > before + 2, "the server to sleep")
        first.close()
        second.sendall(framed)
        assert b"\xac\x12\x00\x02" in second.recv(512)
