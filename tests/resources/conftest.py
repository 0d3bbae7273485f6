"""An engine on a root of the test's own, with the image `busybox`: settings differ by test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine


@pytest.fixture(scope="session")
def prepared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the image, to be copied."""
    root = tmp_path_factory.mktemp("resources") / "root"
    with Engine(root) as engine:
        engine.images.bootstrap("busybox")
    return root


@pytest.fixture
def engine(prepared_root: Path, tmp_path: Path) -> Iterator[Engine]:
    """An engine; what a test leaves on its root is removed, and fails it."""
    root = tmp_path / "root"
    shutil.copytree(prepared_root, root, symlinks=True)
    with Engine(root) as engine:
        yield engine
        left = [info.name for info in engine.list(all=True)]
        for name in left:
            engine.get(name).remove(force=True, volumes=True)
        assert left == [], "instances left behind"
        assert engine.resources.use().holdings == (), "something is held still"
        assert not (root / "shared-cpus").exists()
