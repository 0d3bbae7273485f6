"""One suite for every kind of instance: the fixtures that make a container or a machine.

Each worker has one root with the image `busybox`; machines of all tests share its kernel,
its root disk and a template, and tests that only look into a running instance share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hutch.engine import Completed, Engine, Instance
from tests.engine.behaviours.differences import DIFFERENCES
from tests.engine.behaviours.waiting import until
from tests.leaks import wait_until_clean
from tests.requires import requires

_BOTH = requires("root", "cgroup", "overlayfs", "seccomp", "netns", "nftables", "busybox")
_VM = requires("qemu", "apt-mirror", "mkfs.erofs", "mke2fs")
# Programs take their time on a loaded host, and more so in an emulated guest.
_SMALL: dict[str, dict[str, Any]] = {"container": {}, "vm": {"isolation": "vm", "memory": "128m"}}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot hold for a kind."""
    left_out = []
    for item in items:
        call = getattr(item, "callspec", None)
        kind = call.params.get("kind") if call else None
        if kind and (kind, getattr(item, "originalname", "")) in DIFFERENCES:
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("container", marks=[_BOTH]),
        pytest.param("vm", marks=[_BOTH, _VM, pytest.mark.integration]),
    ],
)
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of instance."""
    found: str = request.param
    return found


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine on a root of this worker's own, with the image `busybox`."""
    root = tmp_path_factory.mktemp("behaviours") / "root"
    with Engine(root) as engine:
        engine.images.bootstrap("busybox")
        yield engine
        engine._context.machines.prune_templates()
        engine._context.networks.teardown()
    # Supervisors whose commands after an exit are still at work have their time.
    assert wait_until_clean(root, None) == set()


class Maker:
    """Makes instances of one kind, small ones without network unless told otherwise."""

    def __init__(self, engine: Engine, kind: str) -> None:
        self.engine = engine
        self.kind = kind

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a new instance."""
        return {"network": "none", **_SMALL[self.kind], **given}

    def start(self, script: str = "sleep 1000", **given: Any) -> Instance:
        """Start a shell script as the program of a new instance."""
        return self.engine.start("busybox", ["sh", "-c", script], **self.options(given))

    def create(self, script: str = "sleep 1000", **given: Any) -> Instance:
        """Create an instance without starting it."""
        return self.engine.create("busybox", ["sh", "-c", script], **self.options(given))

    def run(self, *command: str, **given: Any) -> Completed:
        """Run a program to its end in an instance of its own."""
        return self.engine.run("busybox", list(command) or None, **self.options(given))

    def sh(self, script: str, **given: Any) -> Completed:
        """Run a shell script to its end in an instance of its own."""
        return self.run("sh", "-c", script, **given)


@contextmanager
def _emptied(engine: Engine, *, but: frozenset[str] = frozenset()) -> Iterator[None]:
    yield
    left = [info for info in engine.list(all=True) if info.id not in but]
    for info in left:
        engine.get(info.id).remove(force=True, volumes=True)
    assert [info.name for info in left] == [], "instances left behind"
    directories = engine.root / "instances"
    until(lambda: {path.name for path in directories.iterdir()} == but, "directories left behind")


@pytest.fixture(scope="session")
def shared() -> set[str]:
    """The instances that several tests share now."""
    return set()


@pytest.fixture
def make(home: Engine, kind: str, shared: set[str]) -> Iterator[Maker]:
    """Make instances; what a test leaves of them fails it."""
    with _emptied(home, but=frozenset(shared)):
        yield Maker(home, kind)


@pytest.fixture(scope="module")
def box(home: Engine, kind: str, shared: set[str]) -> Iterator[Instance]:
    """A running instance that the tests of a module share; they leave it as it is."""
    with Maker(home, kind).start(hostname="shared", env=["COLOUR=green"], tmpfs="/scratch") as made:
        shared.add(made.id)
        yield made
        shared.remove(made.id)


Sh = Callable[..., str]


@pytest.fixture
def inside(box: Instance) -> Sh:
    """Run a shell line in the shared instance; return what it wrote, stripped."""

    def run(line: str, **options: Any) -> str:
        done = box.exec(["sh", "-c", line], **options)
        return (done.stdout + done.stderr).decode().strip()

    return run
