"""The engine: one object over one root directory, and the use cases behind it."""

from __future__ import annotations

from hutch.engine.facade import Engine
from hutch.engine.instance import Instance
from hutch.engine.results import CommandError, Completed, Event, InstanceInfo
from hutch.engine.session import Session
from hutch.process.frames import Gap, Output

__all__ = [
    "Engine",
    "Instance",
    "Completed",
    "CommandError",
    "InstanceInfo",
    "Event",
    "Session",
    "Output",
    "Gap",
]
