"""Containers and virtual machines for people who work in Python.

    import hutch

    with hutch.Engine() as engine:
        print(engine.run("busybox", ["uname", "-a"]).text)

The names here are loaded when first used, so that importing `hutch` costs next to nothing.
"""

from __future__ import annotations

# Type checkers take the name for true; `typing` would be most of what importing this costs.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from hutch import aio as aio
    from hutch import errors
    from hutch import testing as testing
    from hutch.engine import (
        CommandError,
        Completed,
        Engine,
        Event,
        Gap,
        Instance,
        InstanceInfo,
        Output,
        Session,
    )
    from hutch.errors import HutchError
    from hutch.image.registry_config import RegistryConfig

__all__ = [
    "Engine",
    "Instance",
    "Completed",
    "Session",
    "Output",
    "Gap",
    "InstanceInfo",
    "Event",
    "RegistryConfig",
    "HutchError",
    "CommandError",
    "errors",
    "__version__",
]

__version__ = "0.1.0"

_HOME = {
    "Engine": "hutch.engine",
    "Instance": "hutch.engine",
    "Completed": "hutch.engine",
    "Session": "hutch.engine",
    "Output": "hutch.engine",
    "Gap": "hutch.engine",
    "InstanceInfo": "hutch.engine",
    "Event": "hutch.engine",
    "CommandError": "hutch.engine",
    "RegistryConfig": "hutch.image.registry_config",
    "HutchError": "hutch.errors",
}


if not TYPE_CHECKING:  # a type checker would take any misspelt name for one of these

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in ("errors", "aio", "testing"):
            return import_module(f"hutch.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'hutch' has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "aio", "testing"})
