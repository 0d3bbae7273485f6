"""The files of an instance: read, write, list, copy in and out, running or not.

A running instance is reached through its own root, so its volumes and tmpfs are seen; a
stopped one through its layers, mounted for the moment and attached nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.engine.finish import refresh
from hutch.engine.lookup import load
from hutch.lifecycle import State

if TYPE_CHECKING:
    pass

__all__ = ["Files", "open_root"]


@contextmanager
def open_root(context: Context, identifier: str, *, read_only: bool) -> Iterator[int]:
    """Hold a descriptor of the instance's root directory."""
    from hutch.drivers.container.processes import open_process
    from hutch.drivers.container.processes import open_root as open_process_root

    record = refresh(context, load(context, identifier))
    if record.state in (State.RUNNING, State.PAUSED):
        with open_process(record.pid, record.start_time):
            fd = open_process_root(record.pid)
    else:
        from hutch.storage.snapshots import open_merged

        fd = open_merged(context.snapshots.load(identifier, record.chain_ids), read_only=read_only)
    try:
        yield fd
    finally:
        os.close(fd)


class Files:
    """The files of one instance; paths are absolute inside it."""

    def __init__(self, context: Context, identifier: str) -> None:
        self._context = context
        self._id = identifier

    def _open(self, *, read_only: bool = True) -> contextmanager[int]:  # type: ignore[valid-type]
        return open_root(self._context, self._id, read_only=read_only)
