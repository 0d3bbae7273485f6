"""Digests of content (`sha256:…`, `sha512:…`): checking their form, computing, verifying.

The hash functions are imported when the first one is made: OpenSSL is not for the path of
a start.
"""

from __future__ import annotations

from typing import Protocol

from hutch.errors import IntegrityError, InvalidArgument
from hutch.oci.reference import is_hex

__all__ = ["Hash", "Verifier", "chain_ids", "check_digest", "digest_of", "is_digest", "new_hash"]

_HEX_LENGTH = {"sha256": 64, "sha512": 128}


class Hash(Protocol):
    """What is used of a hashlib object."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take more data."""
        ...

    def hexdigest(self) -> str:
        """Return the digits so far."""
        ...


def is_digest(text: str) -> bool:
    """Tell whether `text` is a digest of an algorithm that is known."""
    algorithm, _, digits = text.partition(":")
    return len(digits) == _HEX_LENGTH.get(algorithm) and is_hex(digits)


def check_digest(text: str, field: str = "digest") -> str:
    """Return `text` if it is a digest, else raise `InvalidArgument` naming the field."""
    if not is_digest(text):
        raise InvalidArgument(f"expected sha256:… or sha512:…, got {text[:160]!r}", field=field)
    return text


def new_hash(algorithm: str) -> Hash:
    """Return a fresh hash for the algorithm of a digest (`sha256`, `sha512`)."""
    import hashlib

    if algorithm not in _HEX_LENGTH:
        raise InvalidArgument(f"unknown digest algorithm {algorithm!r}")
    return hashlib.new(algorithm, usedforsecurity=True)


def digest_of(data: bytes | memoryview, algorithm: str = "sha256") -> str:
    """Return the digest of `data`."""
    hashed = new_hash(algorithm)
    hashed.update(data)
    return f"{algorithm}:{hashed.hexdigest()}"


def chain_ids(diff_ids: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Return the chain id of each layer, lowest first (OCI image spec, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)


class Verifier:
    """Check a stream against its digest and size as it passes.

    `size` may be None where it is not known beforehand. `what` names it in errors.
    """

    def __init__(self, digest: str, size: int | None = None, *, what: str = "content") -> None:
        self.digest = check_digest(digest)
        self.size = size
        self.seen = 0
        self._what = what
        self._hash = new_hash(digest.partition(":")[0])

    def update(self, data: bytes | memoryview) -> None:
        """Take more data; raise `IntegrityError` as soon as it is longer than promised."""
        self.seen += len(data)
        if self.size is not None and self.seen > self.size:
            raise IntegrityError(f"{self._what}: longer than the {self.size} bytes stated")
        self._hash.update(data)

    def finish(self) -> None:
        """Raise `IntegrityError` unless exactly the promised content went by."""
        if self.size is not None and self.seen != self.size:
            raise IntegrityError(f"{self._what}: {self.seen} bytes where {self.size} were stated")
        found = f"{self.digest.partition(':')[0]}:{self._hash.hexdigest()}"
        if found != self.digest:
            raise IntegrityError(f"{self._what}: digest is {found}, expected {self.digest}")
