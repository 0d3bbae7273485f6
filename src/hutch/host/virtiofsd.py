"""The host's virtiofsd: there are two programs of that name, with other command lines."""

from __future__ import annotations

import mmap
import os
from typing import Literal

import msgspec

from hutch.errors import Unsupported
from hutch.host.programs import find_program

__all__ = ["Virtiofsd", "find_virtiofsd"]

# Distributions keep it out of PATH: Debian from trixie on and Fedora, Arch, QEMU before 8.
_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
# Options that only the one in Rust has; the C one has but `-o` for the same.
_MARK = b"shared-dir"


class Virtiofsd(msgspec.Struct, frozen=True, kw_only=True):
    """A server of directories: its path, and which of the two it is."""

    path: str
    flavor: Literal["c", "rust"]


def find_virtiofsd() -> Virtiofsd:
    """Return the host's virtiofsd; raise `Unsupported` with the cure where there is none.

    It is told by its content: to run it for its help would cost more than the search.
    """
    found = [place for place in _PLACES if os.access(place, os.X_OK)]
    path = found[0] if found else find_program("virtiofsd")
    if path is None:
        raise Unsupported(
            "mounts: a virtual machine needs virtiofsd for directories and files of the host",
            hint="apt-get install virtiofsd (Debian bookworm: qemu-system-common)",
        )
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return Virtiofsd(path=path, flavor="rust" if text.find(_MARK) >= 0 else "c")
