"""The daemon's other doors: TLS, sockets handed down, metrics, a configuration read anew."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.api.docker.conftest import Client, Daemon, until

pytestmark = pytest.mark.requires("root", "overlayfs", "cgroup")

NewDaemon = Callable[..., Daemon]


def _openssl(directory: Path, *args: str) -> None:
    subprocess.run(["openssl", *args], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server's and a client's certificate, and one of somebody else's."""
    made = tmp_path_factory.mktemp("tls")
    (made / "san").write_text("subjectAltName=IP:127.0.0.1")
    for authority in ("ca", "other-ca"):
        _openssl(
            made,
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-keyout", f"{authority}.key", "-out", f"{authority}.pem"),
            *("-subj", f"/CN={authority}"),
        )
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "other-ca")):
        _openssl(
            made,
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"),
        )
        _openssl(
            made,
            *("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey"),
            *(f"{authority}.key", "-CAcreateserial", "-extfile", "san", "-out", f"{name}.pem"),
        )
    return made


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _ping(certificates: Path, port: int, who: str | None) -> bytes:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    if who is not None:
        context.load_cert_chain(certificates / f"{who}.pem", certificates / f"{who}.key")
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
    ):
        sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n")
        seen = b""
        while piece := sock.recv(4096):
            seen += piece
        return seen


def test_tcp_is_for_clients_with_a_certificate(
    tmp_path: Path, new_daemon: NewDaemon, certificates: Path
) -> None:
    port = _free_port()
    new_daemon(
        tmp_path / "root",
        *("--docker", f"tcp://127.0.0.1:{port}", "--tlsverify"),
        *("--tlscacert", str(certificates / "ca.pem")),
        *("--tlscert", str(certificates / "server.pem")),
        *("--tlskey", str(certificates / "server.key")),
    )
    assert _ping(certificates, port, "client").endswith(b"\r\n\r\nOK")
    for who in (None, "stranger"):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            if not _ping(certificates, port, who):
                raise ConnectionError("closed without an answer")


def test_sockets_of_a_service_manager_are_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with (
        socket.socket(socket.AF_UNIX) as listening,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        listening.bind(path)
        listening.listen()
        notified.bind(f"{path}-notify")
        notified.settimeout(60)
        # The environment names the process that is to take them: itself, once it runs.
        script = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
            "os.execv(sys.executable, [sys.executable, '-m', 'hutch', *sys.argv[2:]])"
        )
        argv = [sys.executable, "-c", script, str(listening.fileno())]
        argv += ["--root", str(tmp_path / "root"), "serve", "--docker", "fd://"]
        process = subprocess.Popen(
            argv,
            pass_fds=[listening.fileno()],
            env=os.environ | {"NOTIFY_SOCKET": f"{path}-notify"},
        )
        try:
            assert notified.recv(100) == b"READY=1"
            assert Client(path).ask("GET", "/_ping").status == 200
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert os.path.exists(path)


@pytest.fixture
def configured(tmp_path: Path, new_daemon: NewDaemon) -> Iterator[tuple[Daemon, Path]]:
    config = tmp_path / "daemon.json"
    config.write_text('{"labels": ["first=1"]}')
    yield new_daemon(tmp_path / "root", "--config-file", str(config)), config


def test_the_configuration_is_read_anew_at_a_signal(configured: tuple[Daemon, Path]) -> None:
    daemon, config = configured
    api = Client(daemon.path)
    assert api.ask("GET", "/info").json["Labels"] == ["first=1"]
    config.write_text('{"labels": ["second=2"]}')
    daemon.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 60
    while api.ask("GET", "/info").json["Labels"] != ["second=2"]:
        assert time.monotonic() < deadline
    config.write_text('{"nonsense": 1}')
    daemon.process.send_signal(signal.SIGHUP)
    _until_refused(daemon, 1)
    config.write_text('{"labels": ["third=3"], "log-level": "loud"}')
    daemon.process.send_signal(signal.SIGHUP)
    _until_refused(daemon, 2)
    assert api.ask("GET", "/info").json["Labels"] == ["second=2"]


def _until_refused(daemon: Daemon, times: int) -> None:
    until(lambda: daemon.log.read_text().count("the configuration stays as it was") >= times)


def test_what_has_no_route_is_counted_together(api: Client) -> None:
    for method in ("MADE", "UP"):
        assert api.ask(method, "/nothing").status == 404
    text = api.ask("GET", "/metrics", raw=True).body.decode()
    assert 'method="unknown",path="unknown",code="404"' in text
    assert "MADE" not in text


def test_metrics_count_what_was_answered(api: Client) -> None:
    api.ask("GET", "/version")
    text = api.ask("GET", "/metrics", raw=True).body.decode()
    assert 'hutch_api_requests_total{method="GET",path="/version",code="200"}' in text
    assert "# TYPE hutch_api_request_duration_seconds histogram" in text
    assert 'engine_daemon_container_states_containers{state="running"}' in text


def test_who_reads_metrics_by_tcp_can_do_nothing_else(
    tmp_path: Path, new_daemon: NewDaemon
) -> None:
    port = _free_port()
    new_daemon(tmp_path / "root", "--metrics-addr", f"127.0.0.1:{port}")
    for path, status in (("/metrics", b"200"), ("/info", b"404"), ("/v1.51/info", b"404")):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: d\r\n\r\n".encode())
            assert sock.recv(4096).startswith(b"HTTP/1.1 " + status)


def test_its_pid_is_written_and_taken_away(tmp_path: Path, new_daemon: NewDaemon) -> None:
    path = tmp_path / "pid"
    daemon = new_daemon(tmp_path / "root", "--pidfile", str(path))
    assert path.read_text() == f"{daemon.process.pid}\n"
    assert daemon.stop() == 0
    assert not path.exists()
    assert not os.path.exists(daemon.path)
