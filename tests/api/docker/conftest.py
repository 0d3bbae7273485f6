"""A daemon on the session's root, and a client that speaks plain HTTP to it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine
from hutch.errors import NotFound
from hutch.testing import ensure_image

_DEADLINE_S = 200.0


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("docker", timeout=_DEADLINE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_DEADLINE_S)
        self.sock.connect(self._path)


class Client:
    """Asks a daemon; `text` and `json` of an answer are read whole."""

    def __init__(self, path: str) -> None:
        self.path = path

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        raw: bool = False,
    ) -> Answer:
        """Send one request and read the answer. `body` is sent as JSON, but for bytes."""
        connection = UnixConnection(self.path)
        sent = dict(headers or {})
        data = body
        if body is not None and not isinstance(body, bytes):
            data = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path if raw else f"/v1.51{path}", data, sent)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def socket(self) -> socket.socket:
        """Return a connection of its own."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(_DEADLINE_S)
        sock.connect(self.path)
        return sock


class Answer:
    """What came back."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """What an error says."""
        return str(self.json["message"])

    def __repr__(self) -> str:
        return f"<{self.status} {self.body[:400]!r}>"


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition with a deadline."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.02)


class Daemon:
    """A daemon as a process of its own."""

    def __init__(self, root: Path, directory: Path, *options: str) -> None:
        self.path = str(directory / "docker.sock")
        self.log = directory / "log"
        self._argv = [sys.executable, "-m", "hutch", "--root", str(root), "serve"]
        self._argv += ["--docker", f"unix://{self.path}", "--debug", *options]
        self.start()

    def start(self) -> None:
        """Start it and wait until it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _DEADLINE_S
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            return Client(self.path).ask("GET", "/_ping").status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """End it without a word."""
        self.process.kill()
        self.process.wait(_DEADLINE_S)

    def stop(self) -> int:
        """End it in order; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_DEADLINE_S)


@pytest.fixture(scope="session")
def daemon(hutch_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon on the root of the test session."""
    made = Daemon(hutch_engine.root, tmp_path_factory.mktemp("docker"))
    yield made
    made.stop()


@pytest.fixture
def api(daemon: Daemon) -> Client:
    """A client of the session's daemon."""
    return Client(daemon.path)


@pytest.fixture
def image(hutch_engine: Engine) -> str:
    """A small image that is there."""
    return ensure_image(hutch_engine, "busybox")


@pytest.fixture
def name(hutch_engine: Engine) -> Iterator[str]:
    """A fresh name; a container that has it at the end, or one made of it, is removed."""
    chosen = f"api-{uuid.uuid4().hex[:12]}"
    yield chosen
    for info in hutch_engine.list(all=True, filters={"name": [chosen]}):
        with suppress(NotFound):
            hutch_engine.get(info.id).remove(force=True, volumes=True)


def command_lines() -> list[str]:
    """Return Docker's own command lines that are here: the newest, and that of the host."""
    newest = Path(__file__).parents[3] / "build/docker/docker"
    found = [shutil.which("docker"), "/usr/bin/docker", str(newest)]
    return sorted({path for path in found if path and os.access(path, os.X_OK)})


@pytest.fixture(params=command_lines() or ["docker"])
def docker(
    request: pytest.FixtureRequest, daemon: Daemon
) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run Docker's own command line, each that is here."""

    def run(*args: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [request.param, "--host", f"unix://{daemon.path}", *args],
            input=input,
            capture_output=True,
            timeout=_DEADLINE_S,
        )

    return run


@pytest.fixture
def new_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons that are ended with the test."""
    made: list[Daemon] = []

    def start(root: Path, *options: str) -> Daemon:
        directory = tmp_path / f"daemon{len(made)}"
        os.mkdir(directory)
        made.append(Daemon(root, directory, *options))
        return made[-1]

    yield start
    for one in made:
        one.stop()
