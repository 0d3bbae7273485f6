"""Two hosts, each a network namespace with a root of its own, and what connects them: TLS with
certificates on both sides, and a real sshd."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.errors import Denied, InvalidArgument, NotFound, Unavailable
from hutch.migration.links import open_wire, parse_destination
from hutch.migration.tls import accept_tls, load_certificates, relay
from hutch.migration.wire import Wire
from tests.requires import requires

WAIT_S = 200.0


# ---- certificates ---------------------------------------------------------------------------


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


class Authority:
    """An authority that gives out certificates for hosts."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        openssl(
            directory,
            *"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2".split(),
            *"-keyout ca.key -out ca.pem -subj /CN=hutch".split(),
        )

    def issue(self, target: Path, *names: str, days: int = 2) -> Path:
        """Make a directory as a side has it, its certificate for these names."""
        target.mkdir(parents=True)
        openssl(
            target,
            *"req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes".split(),
            *f"-keyout key.pem -out csr -subj /CN={names[0]}".split(),
        )
        kinds = ",".join(f"{'IP' if name[0].isdigit() else 'DNS'}:{name}" for name in names)
        (target / "ext").write_text(f"subjectAltName={kinds}\n")
        openssl(
            target,
            *f"x509 -req -in csr -CA {self.directory}/ca.pem".split(),
            *f"-CAkey {self.directory}/ca.key -CAcreateserial".split(),
            *f"-days {days} -extfile ext -out cert.pem".split(),
        )
        (target / "ca.pem").write_bytes((self.directory / "ca.pem").read_bytes())
        (target / "key.pem").chmod(0o600)
        return target


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@contextlib.contextmanager
def echoing(certificates: Path) -> Iterator[int]:
    """A target on the loopback that greets, and then sends back what it gets; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with (
            connection,
            contextlib.suppress(Denied, Unavailable),
            accept_tls(
                connection, load_certificates(str(certificates), server=True), timeout_s=WAIT_S
            ) as tls,
        ):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                threading.Thread(target=relay, args=(tls, theirs), daemon=True).start()
                Wire(ours.fileno(), ours.fileno(), peer="echo", timeout_s=WAIT_S).greet()
                ours.setblocking(True)
                while data := ours.recv(1 << 16):
                    ours.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener:
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def destination(port: int, certificates: Path, host: str = "127.0.0.1") -> str:
    return f"tls://{host}:{port}?certificates={certificates}"


def attempt(port: int, certificates: Path, host: str = "127.0.0.1") -> bytes:
    """Open a link and see what comes back of a megabyte, both ways at once."""
    there = parse_destination(destination(port, certificates, host))
    sent = os.urandom(1 << 20)
    with open_wire(there, timeout_s=WAIT_S) as wire:
        read_fd, write_fd = wire.descriptors
        assert wire._take(8) == b"HUTCHMG1"  # our own greeting, echoed
        writer = threading.Thread(target=wire._write, args=(sent,))
        writer.start()
        found = wire._take(len(sent))
        writer.join()
        assert read_fd == write_fd
    assert found == sent
    return found


def test_a_link_carries_bytes_both_ways(authority: Authority, tmp_path: Path) -> None:
    with echoing(authority.issue(tmp_path / "there", "127.0.0.1")) as port:
        attempt(port, authority.issue(tmp_path / "here", "source"))


def test_a_target_of_another_authority_is_not_believed(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "ca").issue(tmp_path / "there", "127.0.0.1")
    with echoing(stranger) as port, pytest.raises(Denied, match="certificate is not believed"):
        attempt(port, authority.issue(tmp_path / "here", "source"))


def test_a_target_with_another_name_is_not_believed(authority: Authority, tmp_path: Path) -> None:
    with (
        echoing(authority.issue(tmp_path / "there", "other.example")) as port,
        pytest.raises(Denied, match="not believed: ip address mismatch"),
    ):
        attempt(port, authority.issue(tmp_path / "here", "source"))


def test_a_source_of_another_authority_is_refused(authority: Authority, tmp_path: Path) -> None:
    here = Authority(tmp_path / "ca").issue(tmp_path / "here", "source")
    there = authority.issue(tmp_path / "there", "127.0.0.1")
    # It believes the target, which does not believe it.
    (here / "ca.pem").write_bytes((authority.directory / "ca.pem").read_bytes())
    with echoing(there) as port, pytest.raises(Denied, match="refused this side's certificate"):
        attempt(port, here)


def test_what_is_no_target_says_so(authority: Authority, tmp_path: Path) -> None:
    here = authority.issue(tmp_path / "here", "source")
    with socket.create_server(("127.0.0.1", 0)) as plain:
        port = plain.getsockname()[1]

        def answer() -> None:
            connection, _ = plain.accept()
            with connection:
                connection.recv(10)
                connection.sendall(b"HTTP/1.0 400\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Unavailable, match="no TLS"):
            attempt(port, here)
        thread.join()
    with pytest.raises(Unavailable, match="refused"):
        attempt(port, here)


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
def test_a_file_that_is_missing_or_garbled_is_named(
    authority: Authority, tmp_path: Path, name: str
) -> None:
    here = authority.issue(tmp_path / "here", "source")
    (here / name).write_text("garbled")
    (here / "key.pem").chmod(0o600)
    with pytest.raises(InvalidArgument, match="not usable"):
        load_certificates(str(here), server=False)
    (here / name).unlink()
    with pytest.raises(NotFound, match=name):
        load_certificates(str(here), server=False)


def test_a_key_that_others_may_read_or_of_another_certificate_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    here = authority.issue(tmp_path / "here", "source")
    other = authority.issue(tmp_path / "other", "source")
    (here / "key.pem").chmod(0o644)
    with pytest.raises(Denied, match="others may read it"):
        load_certificates(str(here), server=False)
    (here / "key.pem").write_bytes((other / "key.pem").read_bytes())
    (here / "key.pem").chmod(0o600)
    with pytest.raises(InvalidArgument, match="do not belong together"):
        load_certificates(str(here), server=False)


def test_an_option_that_there_is_not_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="unknown option 'tls'"):
        parse_destination("tls://host?tls=1")


# ---- hosts ----------------------------------------------------------------------------------


class Host:
    """A network namespace with one end of a cable, and a root."""

    def __init__(self, name: str, address: str, root: Path) -> None:
        self.name, self.address, self.root = name, address, root

    def argv(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *arguments]

    def hutch_argv(self, *arguments: str) -> list[str]:
        return self.argv(sys.executable, "-m", "hutch", "--root", str(self.root), *arguments)

    def hutch(self, *arguments: str, fails: bool = False) -> str:
        done = subprocess.run(
            self.hutch_argv(*arguments), capture_output=True, text=True, timeout=300, check=False
        )
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout.strip()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them."""
    base = tmp_path_factory.mktemp("hosts")
    made = [
        Host(f"hutch-{os.getpid()}-{side}", f"10.231.7.{number}", base / side)
        for number, side in enumerate("ab", 1)
    ]
    try:
        for host in made:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
        first, second = made
        cable = f"link add cable type veth peer cable netns {second.name}"
        subprocess.run(["ip", "-n", first.name, *cable.split()], check=True)
        for host in made:
            for command in (
                f"addr add {host.address}/24 dev cable",
                "link set cable up",
                "link set lo up",
            ):
                subprocess.run(["ip", "-n", host.name, *command.split()], check=True)
        first.hutch("image", "bootstrap", "busybox")
        yield first, second
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host.name], check=False)


@pytest.fixture
def instance(hosts: tuple[Host, Host]) -> Iterator[str]:
    """A stopped instance at the first host; it is removed wherever it is."""
    hosts[0].hutch("create", "--name", "moved", "busybox", "echo", "hello")
    yield "moved"
    for host in hosts:
        if "moved" in host.hutch("ps", "-a"):
            host.hutch("rm", "-f", "moved")


def listens(host: Host, port: int) -> None:
    """Wait until somebody listens there."""
    deadline = time.monotonic() + WAIT_S
    script = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5).close()"
    while subprocess.run(host.argv(sys.executable, "-c", script), capture_output=True).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.05)


needs_hosts = [
    requires("root", "cgroup", "overlayfs", "seccomp", "netns", "nftables", "busybox"),
    pytest.mark.integration,
]


@pytest.fixture
def served(hosts: tuple[Host, Host], authority: Authority) -> Iterator[list[str]]:
    """`hutch serve migrations` at the second host; the lines that it has said."""
    here, there = hosts
    for host in hosts:
        if not (host.root / "tls").exists():
            authority.issue(host.root / "tls", host.address)
    said: list[str] = []
    with subprocess.Popen(
        there.hutch_argv("serve", "migrations", "--listen", f"{there.address}:7443"),
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr is not None
        said.append(server.stderr.readline())
        reader = threading.Thread(target=lambda: said.extend(server.stderr or ()))
        reader.start()
        yield said
        server.terminate()
        server.wait(WAIT_S)
        reader.join()
    del here


class TestTls:
    pytestmark = needs_hosts

    def test_an_instance_goes_over_tls(
        self, hosts: tuple[Host, Host], served: list[str], instance: str
    ) -> None:
        here, there = hosts
        assert f"listening at {there.address}:7443" in served[0]
        assert here.hutch("migrate", "-q", instance, f"tls://{there.address}")
        there.hutch("start", instance)
        assert there.hutch("wait", instance) == "0"
        assert there.hutch("logs", instance) == "hello"

    def test_a_stranger_is_refused_and_named_by_the_target(
        self, hosts: tuple[Host, Host], served: list[str], instance: str, tmp_path: Path
    ) -> None:
        here, there = hosts
        stranger = Authority(tmp_path / "ca").issue(tmp_path / "stranger", "source")
        (stranger / "ca.pem").write_bytes((here.root / "tls/ca.pem").read_bytes())
        target = f"tls://{there.address}?certificates={stranger}"
        said = here.hutch("migrate", instance, target, fails=True)
        assert "refused this side's certificate" in said
        deadline = time.monotonic() + WAIT_S
        while not any(here.address in line and "refused" in line for line in served):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def sshd(hosts: tuple[Host, Host], tmp_path: Path) -> Iterator[int]:
    """An sshd of our own at the second host, with keys of its own; its port."""
    there = hosts[1]
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True
        )
    (tmp_path / "authorized").write_bytes((tmp_path / "user.pub").read_bytes())
    tmp_path.chmod(0o700)
    os.makedirs("/run/sshd", exist_ok=True)
    (tmp_path / "sshd_config").write_text(
        f"Port 2222\nListenAddress 0.0.0.0\nHostKey {tmp_path}/host\nPidFile none\n"
        f"AuthorizedKeysFile {tmp_path}/authorized\nPasswordAuthentication no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nStrictModes no\n"
        f"SetEnv PATH={tmp_path}/bin:/usr/bin:/bin\n"
    )
    hutch = tmp_path / "bin" / "hutch"
    hutch.parent.mkdir()
    hutch.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hutch "$@"\n')
    hutch.chmod(0o755)
    with subprocess.Popen(
        there.argv("/usr/sbin/sshd", "-D", "-e", "-f", str(tmp_path / "sshd_config")),
        stderr=subprocess.DEVNULL,
    ) as server:
        listens(there, 2222)
        yield 2222
        server.terminate()
        server.wait(WAIT_S)


@requires("sshd")
class TestSsh:
    pytestmark = needs_hosts

    def test_an_instance_goes_over_ssh(
        self, hosts: tuple[Host, Host], sshd: int, instance: str, tmp_path: Path
    ) -> None:
        here, there = hosts
        # ssh(1) takes its key and what it knows of hosts from its own configuration.
        wrapper = tmp_path / "ssh" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(
            f"#!/bin/sh\nexec /usr/bin/ssh -F none -i {tmp_path}/user -oIdentitiesOnly=yes "
            f'-oStrictHostKeyChecking=no -oUserKnownHostsFile={tmp_path}/known "$@"\n'
        )
        wrapper.chmod(0o755)
        os.environ["PATH"] = f"{wrapper.parent}:{os.environ['PATH']}"
        try:
            target = f"ssh://root@{there.address}:{sshd}{there.root}"
            here.hutch("migrate", "-q", instance, target)
        finally:
            os.environ["PATH"] = os.environ["PATH"].partition(":")[2]
        there.hutch("start", instance)
        assert there.hutch("logs", instance) == "hello"
