"""Fixtures of the tests of virtual machines: Debian's kernel and an engine, once a session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.drivers.vm.kernels import KernelRecord, Kernels
from hutch.engine import Engine
from hutch.store.database import Store


class Fetched:
    """A root with Debian's kernel in it, which tests only read."""

    def __init__(self, root: Path) -> None:
        self.store = Store.open(root / "hutch.db")
        self.kernels = Kernels(root, self.store)
        self.record: KernelRecord = self.kernels.add_package()


@pytest.fixture(scope="session")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fetched]:
    """Debian's kernel; ask for `apt-mirror` beside it."""
    root = tmp_path_factory.mktemp("kernels")
    found = Fetched(root)
    yield found
    found.store.close()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def kernels(hutch_root: Path) -> Iterator[Kernels]:
    """The kernels of an empty root."""
    store = Store.open(hutch_root / "hutch.db")
    yield Kernels(hutch_root, store)
    store.close()


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with the image `busybox`; kernel and templates stay for the session."""
    root = tmp_path_factory.mktemp("machines") / "root"
    with Engine(root) as engine:
        engine.images.bootstrap("busybox")
        yield engine
        engine._context.driver("vm").prune_templates()  # type: ignore[attr-defined]
        engine._context.networks.teardown()
