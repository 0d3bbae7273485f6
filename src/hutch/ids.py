"""Identifiers: their types, how they are made and how people may abbreviate them."""

from __future__ import annotations

import os
from typing import NewType

__all__ = ["InstanceId", "new_id", "new_instance_id", "short_id"]

InstanceId = NewType("InstanceId", str)


def new_id() -> str:
    """Return 64 random lower-case hexadecimal digits, as Docker's identifiers have."""
    return os.urandom(32).hex()


def new_instance_id() -> InstanceId:
    """Return a fresh instance identifier (64 hexadecimal digits)."""
    return InstanceId(new_id())


def short_id(identifier: str) -> str:
    """Return the 12 digits shown to people; a `sha256:` prefix is dropped."""
    return identifier.removeprefix("sha256:")[:12]
