"""The engine: one object over one root directory, and the use cases behind it.

The names here are loaded when first used: what only lists or builds needs no instances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_HOME = {
    "Engine": "hutch.engine.facade",
    "Instance": "hutch.engine.instance",
    "Completed": "hutch.engine.results",
    "CommandError": "hutch.engine.results",
    "InstanceInfo": "hutch.engine.results",
    "Event": "hutch.engine.results",
    "Session": "hutch.engine.session",
    "Output": "hutch.process.frames",
    "Gap": "hutch.process.frames",
}


if not TYPE_CHECKING:  # a type checker would take any misspelt name for one of these

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in _HOME:
            raise AttributeError(f"module 'hutch.engine' has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
