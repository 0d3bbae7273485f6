"""Builds and registries: base images pulled, caches kept there, results pushed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine
from tests.engine.building import Builder, kinds
from tests.image.registries import running_registry
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox", "docker-registry"),
    pytest.mark.integration,
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Engine]:
    """An engine that has nothing."""
    with Engine(tmp_path / "other") as opened:
        yield opened
        opened._context.networks.teardown()


@pytest.fixture
def unique() -> str:
    return os.urandom(6).hex()


def _text(registry: str, unique: str) -> str:
    return (
        f"FROM {registry}/base:{unique} AS one\nRUN echo {unique} > /f\n"
        f"FROM {registry}/base:{unique}\nCOPY --from=one /f /g\nRUN echo more >> /g\n"
    )


@pytest.fixture
def text(engine: Engine, registry: str, unique: str) -> str:
    """A Dockerfile upon an image that only the registry has."""
    name = f"{registry}/base:{unique}"
    engine.images.tag("busybox", name)
    engine.images.push(name)
    engine.images.remove(name)
    return _text(registry, unique)


def test_a_cache_in_a_registry_saves_another_host_the_steps(
    engine: Engine, other: Engine, registry: str, unique: str, text: str
) -> None:
    cache = f"type=registry,ref={registry}/cache:{unique}"
    first, second = Builder(engine), Builder(other)
    image = first(text, cache_to=[cache], network="none")
    assert kinds(first, "RUN") == ["done", "done"]
    assert second(text, cache_from=[cache], network="none") == image
    assert kinds(second, "RUN") + kinds(second, "COPY") == ["cached"] * 3
    assert other.run(image, ["cat", "/g"], network="none").text == f"{unique}\nmore\n"
    engine.images.remove(image, force=True)


def test_an_image_tells_of_its_own_steps(
    engine: Engine, other: Engine, registry: str, unique: str, text: str
) -> None:
    name = f"{registry}/inline:{unique}"
    first, second = Builder(engine), Builder(other)
    image = first(
        text, cache_to=["type=inline"], outputs=["type=registry"], tags=[name], network="none"
    )
    second(text, cache_from=[name], network="none")
    assert kinds(second, "COPY") == ["cached"] and kinds(second, "RUN")[-1] == "cached"
    engine.images.remove(image, force=True)


def test_a_cache_that_is_not_there_is_told_and_done_without(
    engine: Engine, registry: str, unique: str
) -> None:
    build = Builder(engine)
    build(
        f"FROM busybox\nRUN : {unique}\n",
        cache_from=[f"{registry}/nothing:{unique}", "busybox"],
        network="none",
    )
    assert kinds(build, "RUN") == ["done"]
    assert any("cache" in event.text for event in build.events if event.kind == "warning")


def test_a_cache_that_lies_is_not_believed(
    engine: Engine,
    other: Engine,
    registry: str,
    unique: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer whose content has another digest than the cache says is made again."""
    cache = f"type=registry,ref={registry}/lies:{unique}"
    image = Builder(engine)(text, cache_to=[cache], network="none")
    content = other._context.content
    writer = content.writer
    told = {layer.digest for layer in engine.images.get(image).layers[1:]}

    def damaged(digest: str, *args: Any, **kwargs: Any) -> Any:
        made: Any = writer(digest, *args, **kwargs)
        if digest in told:
            write = made.write
            made.write = lambda data: write(bytes(len(data)))
        return made

    monkeypatch.setattr(content, "writer", damaged)
    build = Builder(other)
    build(text, cache_from=[cache], network="none")
    assert "done" in kinds(build, "RUN") + kinds(build, "COPY")
    engine.images.remove(image, force=True)
