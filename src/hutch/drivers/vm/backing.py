"""What QEMU maps as a machine's memory, and what shares it."""

from __future__ import annotations

import os

from hutch.drivers.vm.sandbox import Descriptors
from hutch.drivers.vm.shares import TAG, ShareServer, copy_memory
from hutch.drivers.vm.templates import Template
from hutch.plan.machine.model import Descriptor, Memory, Shape, Share

__all__ = ["pooled_memory", "private_memory", "resumed_memory", "share_devices"]


def resumed_memory(
    template: Template, shape: Shape, shares: ShareServer | None, descriptors: Descriptors
) -> Memory:
    """Return a template's memory: mapped privately, or a copy that a server can share."""
    if shares is None:
        return private_memory(template.memory, descriptors)
    number = descriptors.add(copy_memory(template.memory, shape.memory))
    return Memory(kind="file", path=f"/proc/self/fd/{number}", share=True)


def pooled_memory(file: int, descriptors: Descriptors) -> Memory:
    """Return memory that was made ahead, which a server can share as it is."""
    number = descriptors.add(os.dup(file))
    return Memory(kind="file", path=f"/proc/self/fd/{number}", share=True)


def private_memory(file: int, descriptors: Descriptors) -> Memory:
    """Return a memory file mapped privately: what is written to it stays the machine's own."""
    number = descriptors.add(os.dup(file))
    return Memory(kind="file", path=f"/proc/self/fd/{number}", sealed=True)


def share_devices(
    server: ShareServer | None, descriptors: Descriptors, *, port: str = ""
) -> tuple[Share, ...]:
    """Return the device of the shared directories, for a machine that has it from the start: at
    the `port` that it was plugged in at another host."""
    if server is None:
        return ()
    number = descriptors.add(os.dup(server.socket))
    return (Share(tag=TAG, socket=Descriptor(number), port=port),)
