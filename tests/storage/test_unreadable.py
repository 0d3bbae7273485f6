"""What a user may not read is never missing from a layer without a word."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hutch.errors import Denied
from hutch.storage.pack import pack_diff, pack_directory
from tests.requires import requires

pytestmark = requires("root")

UID = 54321


@contextmanager
def ordinary_user() -> Iterator[None]:
    os.seteuid(UID)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def upper() -> Iterator[Path]:
    """A tree of the user's, in a place that the user may look at."""
    directory = Path(tempfile.mkdtemp(prefix="hutch-unreadable-"))
    os.chown(directory, UID, UID)
    yield directory
    shutil.rmtree(directory)


def foreign_directory(upper: Path) -> None:
    (upper / "d").mkdir()
    (upper / "d" / "f").write_text("kept")
    (upper / "d").chmod(0o700)


def foreign_file(upper: Path) -> None:
    (upper / "f").write_text("kept")
    (upper / "f").chmod(0o600)


@pytest.mark.parametrize("make", [foreign_directory, foreign_file])
def test_a_layer_with_something_unreadable_is_refused(
    upper: Path, make: Callable[[Path], None]
) -> None:
    make(upper)
    with ordinary_user(), pytest.raises(Denied, match="permission denied"):
        b"".join(pack_diff(str(upper)))


def test_a_copy_with_something_unreadable_is_refused(upper: Path) -> None:
    foreign_directory(upper)
    parent = os.open(upper.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with ordinary_user(), pytest.raises(Denied, match="permission denied"):
            b"".join(pack_directory(parent, os.fsencode(upper.name), upper.name.encode()))
    finally:
        os.close(parent)
