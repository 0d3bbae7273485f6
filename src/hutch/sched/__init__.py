"""Policies that say which job runs next, and a simulator that tells what they would do.

    from hutch.sched import Capacity, create, open_trace, simulate

    trace = open_trace("log.swf.gz")
    summary = simulate(trace, create("easy", Capacity(cores=128)))
    print(summary.waiting.mean, summary.bounded_slowdown.quantiles(0.95))

Pure: no engine, no root, no effects. `hutch.sched.policy` explains how policies are driven.
What a dispatcher does not need is loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.sched.job import Job, Phase
from hutch.sched.ledger import Capacity, Ledger
from hutch.sched.parameters import Parameter
from hutch.sched.policy import NOTHING, Base, Decisions, Policy
from hutch.sched.registry import POLICIES, create, describe

if TYPE_CHECKING:
    from hutch.sched.compare import compare
    from hutch.sched.estimators import Estimator, create_estimator
    from hutch.sched.metrics import Summary, mean_execution, weighted_response
    from hutch.sched.queues import MultiLevel, QueueSpec, parse_queue
    from hutch.sched.simulator import Observer, SimJob, simulate
    from hutch.sched.traces import Trace, generate, open_trace, write_trace
    from hutch.sched.workload import TraceJob

__all__ = [
    "simulate",
    "compare",
    "create",
    "Capacity",
    "open_trace",
    "generate",
    "write_trace",
    "Trace",
    "TraceJob",
    "Summary",
    "mean_execution",
    "weighted_response",
    "Observer",
    "SimJob",
    "Policy",
    "Decisions",
    "NOTHING",
    "Job",
    "Phase",
    "Ledger",
    "Base",
    "Parameter",
    "POLICIES",
    "describe",
    "MultiLevel",
    "QueueSpec",
    "parse_queue",
    "Estimator",
    "create_estimator",
]

_HOME = {
    "compare": "compare",
    "Estimator": "estimators",
    "create_estimator": "estimators",
    "Summary": "metrics",
    "mean_execution": "metrics",
    "weighted_response": "metrics",
    "MultiLevel": "queues",
    "QueueSpec": "queues",
    "parse_queue": "queues",
    "Observer": "simulator",
    "SimJob": "simulator",
    "simulate": "simulator",
    "Trace": "traces",
    "generate": "traces",
    "open_trace": "traces",
    "write_trace": "traces",
    "TraceJob": "workload",
}

if not TYPE_CHECKING:  # a type checker would take any misspelt name for one of these

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in _HOME:
            raise AttributeError(f"module 'hutch.sched' has no attribute {name!r}")
        value = getattr(import_module(f"hutch.sched.{_HOME[name]}"), name)
        globals()[name] = value
        return value
