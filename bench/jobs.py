"""Jobs on live containers: how many a second beside Slurm and beside plain runs, what a decision
costs with 100,000 of them pending, and whether they end when the simulator said."""

from __future__ import annotations

import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from bench.measure import Row, Samples, Skip, measure
from bench.slurm import Slurm
from bench.stage import IMAGE

if TYPE_CHECKING:
    from bench.cases import Peers
    from bench.stage import Stage

__all__ = ["JOB_CASES"]

_AT_ONCE = 16
_COUNT = 320
_PENDING = 100_000
_MIXED = 40


@contextmanager
def _engine(stage: Stage, policy: str) -> Iterator[Any]:
    """An engine with a queue of that policy; nothing is left in it at the end."""
    with stage.engine() as engine:
        with engine.jobs.dispatching():
            if any(queue.name == "default" for queue in engine.queues.list()):
                engine.queues.update("default", policy=policy)
            else:
                engine.queues.create("default", policy=policy)
        try:
            yield engine
        finally:
            with engine.jobs.dispatching():
                engine.jobs.cancel()
                while engine.jobs.list(last=1) or engine.list(all=True):
                    time.sleep(0.05)
            engine.jobs.prune()


def throughput(stage: Stage, _peers: Peers, rounds: int) -> Row:
    """No-op jobs a second: through the queue, as plain runs, and by Slurm; 16 at once."""
    with _engine(stage, "fcfs") as engine, ExitStack() as stack:
        node: list[Slurm] = []

        def slurm() -> float:
            if not node:
                node.append(stack.enter_context(Slurm(stage.directory / "slurm", _AT_ONCE)))
            try:
                return _COUNT / node[0].run(_COUNT)
            except (OSError, RuntimeError) as exc:
                raise Skip(str(exc)) from exc

        return measure(
            f"no-op container jobs a second, {_AT_ONCE} at once",
            {
                "hutch": lambda: _queued(engine),
                "plain runs": lambda: _plain(engine),
                "slurm": slurm,
            },
            rounds=max(2, rounds // 5),
            targets={"per_s": 60, "slurm": 5},
            unit="per_s",
        )


def _queued(engine: Any) -> float:
    with engine.jobs.dispatching(cores=_AT_ONCE):
        began = time.perf_counter()
        jobs = engine.jobs.submit_array(IMAGE, ["true"], array=_COUNT, network="none")
        for job in jobs:
            if job.wait().exit_code:
                raise RuntimeError(f"job {job.id} failed")
        return _COUNT / (time.perf_counter() - began)


def _plain(engine: Any) -> float:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        began = time.perf_counter()
        runs = [pool.submit(engine.run, IMAGE, ["true"], network="none") for _ in range(_COUNT)]
        for run in runs:
            run.result()
        return _COUNT / (time.perf_counter() - began)


def pending(stage: Stage, _peers: Peers, rounds: int) -> list[Row]:
    """100,000 jobs pending in a live dispatcher: a decision, a list, the end of all of them."""
    from hutch.engine.jobs.policies import QueuePolicy

    real = QueuePolicy.decide
    took: list[float] = []

    def timed(self: QueuePolicy, now: float) -> Any:
        began = time.perf_counter()
        decisions = real(self, now)
        if decisions.start:
            took.append(time.perf_counter() - began)
        return decisions

    with _engine(stage, "sjf") as engine:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        QueuePolicy.decide = timed  # type: ignore[method-assign]
        try:
            with engine.jobs.dispatching(cores=2):
                times = _pending_times(engine, took, max(20, rounds))
        finally:
            QueuePolicy.decide = real  # type: ignore[method-assign]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"with {_PENDING} jobs pending dispatcher and client grew by {grown:.0f} MB")
    rows = [_row("decision of a live dispatcher, 100,000 pending", took, {"median ms": 2})]
    return rows + [_row(f"{name}, 100,000 pending", [taken], {}) for name, taken in times.items()]


def _pending_times(engine: Any, took: list[float], decisions: int) -> dict[str, float]:
    times: dict[str, float] = {}

    def timed(name: str, act: Callable[[], object]) -> None:
        began = time.perf_counter()
        act()
        times[name] = time.perf_counter() - began

    options = {"network": "none", "array": _PENDING, "estimate": 1}
    timed("submit", lambda: engine.jobs.submit_array(IMAGE, ["true"], **options))
    while len(took) < decisions:
        time.sleep(0.05)
    timed("job ls -n 5", lambda: engine.jobs.list(last=5))
    timed("job ls", engine.jobs.list)
    timed("queue ls", engine.jobs.counts)
    timed("cancel of all", engine.jobs.cancel)
    return times


def _row(case: str, seconds: list[float], targets: dict[str, float]) -> Row:
    return Row(case=case, ways={"hutch": Samples(seconds=seconds)}, targets=targets)


def foretold(stage: Stage, _peers: Peers, rounds: int) -> list[Row]:
    """40 mixed jobs on 2 cores by SRTF and by FCFS: the mean turnaround of the live queue, and
    what the simulator makes of the same jobs (`queue export`, `sched simulate`)."""
    rows = []
    live: dict[str, float] = {}
    for policy in ("fcfs", "srtf"):
        samples: dict[str, list[float]] = {"hutch": [], "simulator": []}
        for _ in range(max(1, rounds // 20)):
            real, simulated = _mixed(stage, policy)
            samples["hutch"].append(real)
            samples["simulator"].append(simulated)
            print(f"{policy}: mean turnaround {real:.3f} s live, {simulated:.3f} s foretold: "
                  f"{real / simulated:.3f} of it")  # fmt: skip
        live[policy] = statistics.median(samples["hutch"])
        rows.append(
            Row(
                case=f"mean turnaround of {_MIXED} mixed jobs on 2 cores, {policy}",
                ways={name: Samples(seconds=values) for name, values in samples.items()},
                targets={"simulator": 1.1},
            )
        )
    print(f"srtf against fcfs, live: {live['srtf'] / live['fcfs']:.3f} of its mean turnaround")
    return rows


def _mixed(stage: Stage, policy: str) -> tuple[float, float]:
    """Run loops of many lengths, as they come; return mean turnarounds, live and simulated."""
    from hutch.sched import Capacity, create, simulate
    from hutch.sched.estimators import create_estimator

    chance = random.Random(5)
    loops = [int(chance.lognormvariate(12.0, 0.9)) for _ in range(_MIXED)]
    with _engine(stage, policy) as engine:
        a_second = _loops_a_second(engine)
        with engine.jobs.dispatching(cores=2):
            jobs = []
            for count in loops:
                jobs.append(
                    engine.jobs.submit(
                        IMAGE, ["sh", "-c", _loop(count)], network="none",
                        estimate=max(0.05, count / a_second),
                    )
                )  # fmt: skip
                time.sleep(chance.expovariate(8))
            ended = [job.wait() for job in jobs]
        trace = list(engine.jobs.history())
    summary = simulate(
        iter(trace), create(policy, Capacity(cores=2)), estimator=create_estimator("user")
    )
    turnarounds = [(record.finished_ns - record.eligible_ns) / 1e9 for record in ended]
    return statistics.fmean(turnarounds), summary.turnaround.mean


def _loop(count: int) -> str:
    return f"i=0; while [ $i -lt {count} ]; do i=$((i+1)); done"


def _loops_a_second(engine: Any) -> float:
    count = 300_000
    began = time.perf_counter()
    engine.run(IMAGE, ["sh", "-c", _loop(count)], network="none")
    return count / (time.perf_counter() - began)


_Case = Callable[..., "Row | list[Row]"]
JOB_CASES: dict[str, _Case] = {
    "jobs": throughput,
    "jobs-pending": pending,
    "jobs-foretold": foretold,
}
