"""An image of the host's own system, for programs that the tests' images do not have."""

from __future__ import annotations

import io
import tarfile

__all__ = ["host_tree"]


def host_tree() -> bytes:
    """Return an image with nothing but the places where the host's system is shown: mount the
    host's /usr at /usr."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("usr", "etc", "tmp", "var", "proc", "sys", "dev"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name in ("bin", "sbin", "lib", "lib64"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
            archive.addfile(entry)
    return buffer.getvalue()
