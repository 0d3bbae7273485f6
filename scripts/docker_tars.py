"""Archives that are sent to both daemons."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping

__all__ = ["tar_of"]


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """Return files as a tar archive."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1_700_000_000
            archive.addfile(entry, io.BytesIO(content))
    return made.getvalue()
