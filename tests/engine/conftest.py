"""One engine with a busybox image per worker; every test must leave it empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from tests.engine.behaviours.waiting import until
from tests.leaks import wait_until_clean


@pytest.fixture(scope="session")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine on a root of this worker's own, with the image `busybox`."""
    root = tmp_path_factory.mktemp("engine") / "root"
    with Engine(root) as engine:
        engine.images.bootstrap("busybox")
        yield engine
        engine._context.networks.teardown()


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The engine; what a test leaves on its root fails the test."""
    yield shared_engine
    left = [info.name for info in shared_engine.list(all=True)]
    for name in left:
        shared_engine.get(name).remove(force=True, volumes=True)
    assert left == [], "instances left behind"
    instances = shared_engine.root / "instances"
    # What a supervisor does after an exit takes its time.
    assert wait_until_clean(instances, None) == set()
    until(lambda: not list(instances.iterdir()), "directories left behind")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A directory for the host's side of a test."""
    return tmp_path
