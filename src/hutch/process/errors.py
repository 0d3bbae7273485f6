"""How a launch that did not come about is told."""

from __future__ import annotations

import os

from hutch.errors import HutchError

__all__ = ["SECTIONS", "LaunchFailed"]

SECTIONS = ("plan", "prepare", "clone", "child", "exec", "supervise")


class LaunchFailed(HutchError):
    """An operation of a launch plan failed; nothing of the launch is left.

    `section` is one of `SECTIONS`, `index` the operation's place in it, `errno` the
    kernel's answer and `detail` the path or name at hand. In section `exec` the image's
    program itself could not be run.
    """

    def __init__(self, section: str, index: int, errno: int, detail: str) -> None:
        reason = os.strerror(errno).lower()
        super().__init__(f"launch: {section}[{index}]: {detail or 'failed'}: {reason}")
        self.section = section
        self.index = index
        self.errno = errno
        self.detail = detail
