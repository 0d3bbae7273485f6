"""Fixtures of the image tests: one registry per module, a fresh root per test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.registries import Proxy, Registry, Root, running_proxy, running_registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A docker-registry of this module's own; tests use repositories of unique names."""
    with running_registry(tmp_path_factory.mktemp("registry")) as host:
        yield Registry(host)


@pytest.fixture
def proxy(registry: Registry) -> Iterator[Proxy]:
    """A proxy before the registry that misbehaves by `rule`."""
    with running_proxy(registry.host) as running:
        yield running


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    """An empty root with everything open on it."""
    opened = Root(tmp_path / "root")
    yield opened
    opened.close()
