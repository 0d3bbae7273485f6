"""Pulling: what is fetched, what is not, and what is left when it goes wrong."""

from __future__ import annotations

import pytest

from hutch.image.pull import pull
from tests.image.registries import FAST, Registry, Root, make_image
from tests.requires import requires

pytestmark = [requires("root", "docker-registry"), pytest.mark.integration]


def test_an_image_is_pulled_and_recorded(registry: Registry, root: Root) -> None:
    image = make_image({"a": b"1"}, {"b": b"2"})
    registry.put_image("first", "v1", image)
    result = pull(f"{registry.host}/first:v1", config=FAST, **root.parts())
    assert result.changed
    assert result.record.id == image.config.digest
    assert root.images.get(f"{registry.host}/first:v1") == result.record
    tree = root.layers.path(result.record.chain_ids[1])
    with open(f"{tree}/b", "rb") as file:
        assert file.read() == b"2"
