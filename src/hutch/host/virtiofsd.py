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
# Since 1.13 it hands the files that a guest has open over to another (its --migration-mode).
_MOVING = b"migration-mode"


class Virtiofsd(msgspec.Struct, frozen=True, kw_only=True):
    """A server of directories: its path, which of the two it is, and whether what a guest has
    open can go from one such server to another."""

    path: str
    flavor: Literal["c", "rust"]
    moves: bool = False


def find_virtiofsd() -> Virtiofsd:
    """Return the virtiofsd to be used, HUTCH_VIRTIOFSD or else the host's; raise `Unsupported`
    with the cure where there is none.

    It is told by its content: to run it for its help would cost more than the search.
    """
    path = os.environ.get("HUTCH_VIRTIOFSD") or _found()
    if path is None or not os.access(path, os.X_OK):
        raise Unsupported(
            "mounts: a virtual machine needs virtiofsd for directories and files of the host",
            hint="apt-get install virtiofsd (Debian bookworm: qemu-system-common)",
        )
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return Virtiofsd(
            path=path,
            flavor="rust" if text.find(_MARK) >= 0 else "c",
            moves=text.find(_MOVING) >= 0,
        )


def _found() -> str | None:
    places = [place for place in _PLACES if os.access(place, os.X_OK)]
    return places[0] if places else find_program("virtiofsd")
