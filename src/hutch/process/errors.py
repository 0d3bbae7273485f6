"""How a launch, a machine or a call into it that did not come about is told."""

from __future__ import annotations

import os

from hutch.errors import HutchError

__all__ = ["SECTIONS", "STAGES", "GuestCallFailed", "LaunchFailed", "MachineFailed", "reason"]

SECTIONS = ("plan", "prepare", "clone", "child", "exec", "supervise")
STAGES = ("configuration", "qemu", "agent", "setup", "launch")
# As MAX_ERRNO of the kernel.
_ERRNOS = 4096


def reason(number: int) -> str:
    """Return what an error number says. A guest's may be any number, and no errno at all."""
    return os.strerror(number).lower() if 0 <= number < _ERRNOS else f"unknown error {number}"


class LaunchFailed(HutchError):
    """An operation of a launch plan failed; nothing of the launch is left.

    `section` is one of `SECTIONS`, `index` the operation's place in it, `errno` the
    kernel's answer and `detail` the path or name at hand. In section `exec` the image's
    program itself could not be run.
    """

    def __init__(self, section: str, index: int, errno: int, detail: str) -> None:
        super().__init__(f"launch: {section}[{index}]: {detail or 'failed'}: {reason(errno)}")
        self.section = section
        self.index = index
        self.errno = errno
        self.detail = detail


class MachineFailed(HutchError):
    """A virtual machine did not come to run its process; nothing of it is left.

    `stage` is one of `STAGES`; in stage `setup`, `index` is the place of the operation that
    failed in the guest. `errno` and `text` say why.
    """

    def __init__(self, stage: str, index: int, errno: int, text: str) -> None:
        place = f"{stage}[{index}]" if stage == "setup" else stage
        super().__init__(f"machine: {place}: {text or 'failed'}: {reason(errno)}")
        self.stage = stage
        self.index = index
        self.errno = errno
        self.text = text


class GuestCallFailed(HutchError):
    """The agent in a virtual machine refused a call.

    `op` is the call's number, `index` the place of the operation in a setup, `errno` the
    guest kernel's answer and `detail` the path or name at hand.
    """

    def __init__(self, op: int, index: int, errno: int, detail: str) -> None:
        super().__init__(f"guest: call {op}: {detail or 'failed'}: {reason(errno)}")
        self.op = op
        self.index = index
        self.errno = errno
        self.detail = detail
