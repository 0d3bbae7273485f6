"""Copy what the layers of an image show at a path into an empty directory (copy-up)."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

import msgspec

from hutch.errors import NotFound
from hutch.storage.extract import Extractor, UnpackLimits
from hutch.storage.overlay import Merged
from hutch.storage.pack import pack_merged
from hutch.storage.tarstream import TarReader
from hutch.storage.unpack import default_options

__all__ = ["copy_up"]

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_up(lower: Sequence[str], target: str, destination: str) -> bool:
    """Copy the merged directory `target` of `lower` (topmost first) into `destination`,
    with its own mode and owner.

    Works without mounting anything. Returns whether the image has such a directory.
    """
    path = os.fsencode(target)
    with Merged(lower) as merged:
        try:
            _, found = merged.resolve(path)
        except NotFound:
            return False
        if not stat.S_ISDIR(found.status.st_mode):
            return False
        fd = os.open(destination, _OPEN)
        try:
            Extractor(
                fd,
                TarReader(pack_merged(merged, path)),
                limits=UnpackLimits(),
                options=msgspec.structs.replace(default_options(), whiteouts=False),
                label=f"copy of {target}",
            ).run()
        finally:
            os.close(fd)
    return True
