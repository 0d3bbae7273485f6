"""Decode JSON into msgspec types, from any thread.

msgspec 0.22 works out a type's fields when it is first decoded, and two threads that do so
at once crash the interpreter (seen as a segmentation fault in `get_class_annotations`). So
each type's decoder is made once, under a lock; using it afterwards needs none.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

__all__ = ["decode_json", "prepare"]

T = TypeVar("T")

_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_lock = threading.Lock()


def prepare(kind: Any) -> msgspec.json.Decoder[Any]:
    """Return the decoder of a type, made on first use."""
    decoder = _decoders.get(kind)
    if decoder is None:
        with _lock:
            decoder = _decoders.get(kind)
            if decoder is None:
                decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    return decoder


def decode_json(data: bytes | str, kind: type[T]) -> T:
    """Return `data` as `kind`; raise `msgspec.DecodeError` as `msgspec.json.decode` does."""
    found: T = prepare(kind).decode(data)
    return found
