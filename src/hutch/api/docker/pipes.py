"""What a function writes to a file, as an iterator: through a pipe, so that neither runs ahead."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO

__all__ = ["written"]

_PIECE = 256 << 10


def written(write: Callable[[BinaryIO], None]) -> Iterator[bytes]:
    """Yield what `write` writes, called in a thread of its own; raise what it raises.

    Closing the iterator ends the writer: its next write fails.
    """
    reading, writing = os.pipe()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with os.fdopen(writing, "wb", buffering=_PIECE) as target:
                write(target)
        except BaseException as exc:
            failures.append(exc)

    with os.fdopen(reading, "rb", buffering=0) as source:
        thread = threading.Thread(target=work, name="hutch-written", daemon=True)
        try:
            thread.start()
        except BaseException:
            os.close(writing)
            raise
        try:
            while piece := source.read(_PIECE):
                yield piece
        finally:
            source.close()
            thread.join()
    if failures:
        raise failures[0]
