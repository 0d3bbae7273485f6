"""What the supervisor of an instance's program does, whichever way it is isolated."""

from __future__ import annotations

from hutch.drivers.base import Launch
from hutch.plan.ops import HealthProbe, Supervision

__all__ = ["instance_supervision"]


def instance_supervision(launch: Launch, health: HealthProbe | None = None) -> Supervision:
    """Return where it keeps its record and its log, what it holds open, what follows the exit."""
    spec = launch.spec
    return Supervision(
        directory=f"{launch.directory}/run",
        log_path="" if spec.logs.driver == "none" else f"{launch.directory}/log",
        log_max_bytes=spec.logs.max_bytes,
        log_max_files=spec.logs.max_files,
        stdin_open=spec.process.stdin,
        stdin_once=spec.process.stdin_once,
        tty=spec.process.tty,
        linger=launch.linger,
        exit_command=launch.exit_command,
        exit_command_always=launch.exit_command_always,
        health=health,
        name="hutch-supervisor",
    )
