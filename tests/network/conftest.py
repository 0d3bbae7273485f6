"""A host of the test's own: a network namespace that the test's thread is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hutch.linux.namespaces import CLONE_NEWNET, new_namespace_fd, thread_in_namespace
from tests.network.boxes import Lab


@pytest.fixture
def lab(hutch_root: Path) -> Iterator[Lab]:
    """A host with networks; everything of it goes with the test."""
    fd = new_namespace_fd(CLONE_NEWNET)
    try:
        with thread_in_namespace(fd, CLONE_NEWNET), ExitStack() as stack:
            lab = Lab(hutch_root, stack)
            stack.callback(lab.networks.teardown)
            yield lab
    finally:
        os.close(fd)
