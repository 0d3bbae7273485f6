"""Which boot of the host this is."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os

__all__ = ["boot_id"]


def boot_id(proc: str | os.PathLike[str] = "/proc") -> str:
    """Return the identifier that the kernel drew when it started."""
    with open(f"{proc}/sys/kernel/random/boot_id") as file:
        return file.read().strip()
