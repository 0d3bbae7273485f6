"""What QEMU answers when it refuses a command."""

from __future__ import annotations

from hutch.errors import HutchError

__all__ = ["CommandFailed"]


class CommandFailed(HutchError):
    """QEMU refused a command, and nothing of it happened.

    `command` is its name, `kind` QEMU's error class (`GenericError`, `DeviceNotFound`,
    `CommandNotFound`, `DeviceNotActive`, `KVMMissingCap`), `description` QEMU's own words.
    """

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"qemu: {command}: {description}")
        self.command = command
        self.kind = kind
        self.description = description
