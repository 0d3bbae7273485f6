"""The QEMU Machine Protocol, synchronous: a client, and one function per thing that is asked.

`monitor` connects and commands; `machine`, `migration`, `devices` and `blocks` are what the
drivers need, each its own function. Import the modules; a start pays for what it uses.
"""

from __future__ import annotations

from hutch.qmp.errors import CommandFailed
from hutch.qmp.messages import Event
from hutch.qmp.monitor import Monitor, conversation

__all__ = ["Monitor", "conversation", "CommandFailed", "Event"]
