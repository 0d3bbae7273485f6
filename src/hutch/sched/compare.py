"""Several policies on one workload, one after another or wherever a `map` takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from hutch.sched.estimators import create_estimator
from hutch.sched.ledger import Capacity
from hutch.sched.metrics import Summary
from hutch.sched.registry import create
from hutch.sched.simulator import simulate
from hutch.sched.traces import open_trace
from hutch.sched.workload import TraceJob

__all__ = ["compare"]


def compare(
    trace: str | Iterable[TraceJob],
    policies: Iterable[str],
    capacity: Capacity,
    *,
    estimator: str | None = None,
    preemption_cost: float = 0,
    tau: float = 10,
    seed: int | None = None,
    map: Callable[..., Iterable[Any]] = map,
) -> list[Summary]:
    """Return what each policy, by name with parameters, would have made of the trace.

    The trace is a name for `open_trace`, or jobs that can be gone through repeatedly. To
    use every core give the `map` of a `concurrent.futures.ProcessPoolExecutor`, and the
    trace as a name or a list.
    """
    run = partial(_one, trace, capacity, estimator, preemption_cost, tau, seed)
    return list(map(run, policies))


def _one(
    trace: str | Iterable[TraceJob],
    capacity: Capacity,
    estimator: str | None,
    preemption_cost: float,
    tau: float,
    seed: int | None,
    policy: str,
) -> Summary:
    summary = simulate(
        open_trace(trace, seed=seed) if isinstance(trace, str) else trace,
        create(policy, capacity, seed=seed),
        estimator=None if estimator is None else create_estimator(estimator),
        preemption_cost=preemption_cost,
        tau=tau,
    )
    summary.policy = policy
    return summary
