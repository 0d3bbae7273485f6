"""Fixtures for tests that need real containers; pytest finds them by itself.

    def test_my_tool(hutch_box):
        box = hutch_box("busybox", ["sleep", "60"], network="none")
        assert box.exec(["id", "-u"]).stdout == b"0\\n"

`hutch_engine` is an engine on one root for the whole test session: `--hutch-root`, else
`HUTCH_TEST_ROOT`, else a temporary directory that is removed at the end, whatever still
runs in it first. An image that is missing is bootstrapped when it is `busybox` or a Debian
or Ubuntu suite, and pulled otherwise. `hutch_box` starts instances, `hutch_volume` and
`hutch_network` make volumes and networks; all are gone after the test. `hutch_run` runs
a program to its end.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from hutch.engine import Completed, Engine, Instance

__all__ = [
    "Box",
    "Run",
    "ensure_image",
    "hutch_box",
    "hutch_engine",
    "hutch_network",
    "hutch_run",
    "hutch_volume",
]

_BOOTSTRAPPED = ("busybox", "debian:", "ubuntu:")


class Box(Protocol):
    """Start an instance that lives as long as the test."""

    def __call__(
        self, image: str, command: Sequence[str] | str | None = None, **options: Any
    ) -> Instance:
        """Return the running instance; the options are those of `Engine.start`."""
        ...


class Run(Protocol):
    """Run a program in an instance of its own."""

    def __call__(
        self, image: str, command: Sequence[str] | str | None = None, **options: Any
    ) -> Completed:
        """Return its output; the options are those of `Engine.run`."""
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command line option."""
    parser.addoption(
        "--hutch-root",
        metavar="DIRECTORY",
        help="keep images and instances here (default: HUTCH_TEST_ROOT or a temporary directory)",
    )


def ensure_image(engine: Engine, name: str) -> str:
    """Return `name` after making sure that the image is there."""
    from hutch.errors import NotFound

    try:
        engine.images.get(name)
    except NotFound:
        if name.startswith(_BOOTSTRAPPED):
            engine.images.bootstrap(name)
        else:
            engine.images.pull(name)
    return name


@pytest.fixture(scope="session")
def hutch_engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An engine for the whole test session."""
    from hutch.engine import Engine

    given = request.config.getoption("--hutch-root") or os.environ.get("HUTCH_TEST_ROOT")
    root = Path(given) if given else tmp_path_factory.mktemp("hutch")
    with Engine(root) as engine:
        try:
            yield engine
        finally:
            if not given:
                _clear(engine)
    if not given:
        shutil.rmtree(root, ignore_errors=True)


def _clear(engine: Engine) -> None:
    """Remove all instances and networks of a root that is about to go."""
    from hutch.errors import NotFound

    for info in engine.list(all=True):
        try:
            engine.get(info.id).remove(force=True, volumes=True)
        except NotFound:
            continue
    engine.networks.prune()
    engine.networks.teardown()
    if (engine.root / "templates").is_dir():
        engine.context.machines.prune_templates()


@pytest.fixture
def _hutch_stack() -> Iterator[ExitStack]:
    """What a test made, in order: removed last first, so that nothing in use is removed."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def hutch_box(hutch_engine: Engine, _hutch_stack: ExitStack) -> Box:
    """Start instances: `hutch_box(image, command, **options)`; removed after the test."""

    def start(image: str, command: Sequence[str] | str | None = None, **options: Any) -> Instance:
        ensure_image(hutch_engine, image)
        return _hutch_stack.enter_context(hutch_engine.start(image, command, **options))

    return start


@pytest.fixture
def hutch_run(hutch_engine: Engine) -> Run:
    """Run programs: `hutch_run(image, command, **options).stdout`."""

    def run(image: str, command: Sequence[str] | str | None = None, **options: Any) -> Completed:
        return hutch_engine.run(ensure_image(hutch_engine, image), command, **options)

    return run


@pytest.fixture
def hutch_volume(hutch_engine: Engine, _hutch_stack: ExitStack) -> Callable[[], str]:
    """Make volumes: each call returns a new one's name; removed after the test."""

    def create() -> str:
        volume = hutch_engine.volumes.create(f"test-{uuid.uuid4().hex[:12]}")
        _hutch_stack.callback(hutch_engine.volumes.remove, volume.name, force=True)
        return volume.name

    return create


@pytest.fixture
def hutch_network(hutch_engine: Engine, _hutch_stack: ExitStack) -> Callable[..., str]:
    """Make networks: each call returns a new one's name; removed after the test."""

    def create(**options: Any) -> str:
        network = hutch_engine.networks.create(f"test-{uuid.uuid4().hex[:12]}", **options)
        _hutch_stack.callback(hutch_engine.networks.remove, network.name)
        return network.name

    return create
