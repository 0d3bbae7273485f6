"""Processes: the native launcher and its supervisors, and side programs.

The names are imported when first used: a command that starts nothing pays for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hutch.process.errors import GuestCallFailed, LaunchFailed, MachineFailed
    from hutch.process.frames import ExitStatus, Gap, Health, Output
    from hutch.process.guest import Channel, Guest
    from hutch.process.launcher import Launcher
    from hutch.process.logfile import LogRecord, read_log
    from hutch.process.records import (
        PidRecord,
        is_alive,
        is_supervised,
        read_exit,
        read_health,
        read_pid,
    )
    from hutch.process.run import CompletedCommand, run_command, spawn
    from hutch.process.supervisor import Supervisor, attach_flags
    from hutch.process.vmm import MonitorConfig, MonitorLink, encode_config, vmm_path

__all__ = [
    "Launcher",
    "Supervisor",
    "ExitStatus",
    "LaunchFailed",
    "Output",
    "Gap",
    "Health",
    "attach_flags",
    "PidRecord",
    "is_alive",
    "is_supervised",
    "read_exit",
    "read_health",
    "read_pid",
    "LogRecord",
    "read_log",
    "MonitorConfig",
    "MonitorLink",
    "MachineFailed",
    "encode_config",
    "vmm_path",
    "Guest",
    "Channel",
    "GuestCallFailed",
    "CompletedCommand",
    "run_command",
    "spawn",
]

_HOMES = {
    "Launcher": "launcher",
    "Supervisor": "supervisor",
    "attach_flags": "supervisor",
    "LaunchFailed": "errors",
    "ExitStatus": "frames",
    "Output": "frames",
    "Gap": "frames",
    "Health": "frames",
    "PidRecord": "records",
    "is_alive": "records",
    "is_supervised": "records",
    "read_exit": "records",
    "read_health": "records",
    "read_pid": "records",
    "LogRecord": "logfile",
    "read_log": "logfile",
    "CompletedCommand": "run",
    "run_command": "run",
    "spawn": "run",
    "MonitorConfig": "vmm",
    "MonitorLink": "vmm",
    "encode_config": "vmm",
    "vmm_path": "vmm",
    "MachineFailed": "errors",
    "Guest": "guest",
    "Channel": "guest",
    "GuestCallFailed": "errors",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{home}"), name)
