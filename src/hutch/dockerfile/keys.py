"""Keys of the build cache: digests over what decides a step's outcome.

A key is made of the content that a step starts from, not of how that came to be: a COPY that
gives the same files leads to the same keys after it. Secrets are in no key, only their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256

__all__ = ["content_key", "step_key"]

_VERSION = b"hutch-build-1"


def step_key(kind: str, parent: str, parts: Iterable[tuple[str, str]]) -> str:
    """Return the key of a step of a kind upon a tree (`parent`, a chainID or ""); `parts` are
    names with values, in an order of the caller's."""
    digest = sha256(_VERSION)
    for name, value in (("kind", kind), ("parent", parent), *parts):
        for text in (name, value):
            data = text.encode("utf-8", "surrogateescape")
            digest.update(b"%d:" % len(data))
            digest.update(data)
    return digest.hexdigest()


def content_key(parts: Mapping[str, str]) -> str:
    """Return one digest over digests by path."""
    return step_key("content", "", sorted(parts.items()))
