"""One daemon for tests with real clients; `make docker-clients` runs them (nightly)."""

from __future__ import annotations

import importlib
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine
from hutch.errors import HutchError
from hutch.testing import ensure_image
from tests.api.docker.conftest import Client, Daemon

collect_ignore_glob = [] if os.environ.get("HUTCH_CLIENTS") else ["test_*.py"]

TIMEOUT_S = 300.0

Run = Callable[..., str]


@pytest.fixture(scope="session")
def daemon(hutch_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon on the root of the test session, which old clients may speak to as well."""
    ensure_image(hutch_engine, "busybox")
    directory = tmp_path_factory.mktemp("docker")
    config = directory / "daemon.json"
    config.write_text('{"min-api-version": "1.12"}')
    made = Daemon(hutch_engine.root, directory, "--config-file", str(config))
    yield made
    made.stop()


@pytest.fixture
def api(daemon: Daemon) -> Client:
    """A plain client, for what other clients do not show."""
    return Client(daemon.path)


@pytest.fixture
def host(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> str:
    """The daemon's address, which is in the environment too."""
    address = f"unix://{daemon.path}"
    monkeypatch.setenv("DOCKER_HOST", address)
    return address


@pytest.fixture
def name(hutch_engine: Engine) -> Iterator[str]:
    """A fresh name; containers, networks, volumes and images that begin with it are removed."""
    chosen = f"c{uuid.uuid4().hex[:10]}"
    yield chosen
    for info in hutch_engine.list(all=True, filters={"name": [chosen]}):
        with suppress(HutchError):
            hutch_engine.get(info.id).remove(force=True, volumes=True)
    for network in hutch_engine.networks.list({"name": [chosen]}):
        with suppress(HutchError):
            hutch_engine.networks.remove(network.name)
    for volume in hutch_engine.volumes.list({"name": [chosen]}):
        with suppress(HutchError):
            hutch_engine.volumes.remove(volume.name)
    for image in hutch_engine.images.list({"reference": [f"{chosen}*"]}):
        with suppress(HutchError):
            hutch_engine.images.remove(image.id, force=True)


@pytest.fixture
def run(host: str, tmp_path: Path) -> Run:
    """Run a program and return what it wrote; it must succeed."""

    # Compose is a Python program too, with libraries of its own.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(*argv: str) -> str:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            cwd=tmp_path,
            env=variables,
        )
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}\n{done.stderr}"
        return done.stdout

    return call


def load(module: str) -> Any:
    """Return a client's library, which has types of its own or none."""
    return importlib.import_module(module)
