"""Workloads: recorded ones read and written as SWF, Batsim JSON and CSV, and generated ones."""

from __future__ import annotations

from hutch.sched.traces.generate import GENERATORS, generate
from hutch.sched.traces.source import Trace, open_trace
from hutch.sched.traces.write import write_trace

__all__ = ["open_trace", "Trace", "generate", "GENERATORS", "write_trace"]
