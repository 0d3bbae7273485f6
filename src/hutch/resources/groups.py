"""The control groups of a root's instances, under the parent that its settings name."""

from __future__ import annotations

import os
from pathlib import Path

from hutch.linux.cgroup import Hierarchy, detect

__all__ = ["InstanceGroups"]

_FILE = "resources.json"


class InstanceGroups:
    """Finds the hierarchy, and again when the settings have changed."""

    def __init__(self, root: Path) -> None:
        self._path = f"{root}/{_FILE}"
        self._root = root
        self._found: tuple[int, Hierarchy] | None = None

    @property
    def hierarchy(self) -> Hierarchy:
        """Where instances have their groups."""
        try:
            stamp = os.stat(self._path).st_mtime_ns
        except FileNotFoundError:
            stamp = 0
        if self._found is None or self._found[0] != stamp:
            self._found = stamp, detect(parent=self._parent()) if stamp else detect()
        return self._found[1]

    def _parent(self) -> str:
        from hutch.resources.settings import load_settings

        return load_settings(self._root).parent
