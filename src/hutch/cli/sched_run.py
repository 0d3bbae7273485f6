"""What is to be simulated, read from options, and done: here or in processes side by side."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.errors import HutchError, InternalError, InvalidArgument
from hutch.sched import Capacity, create
from hutch.sched.estimators import create_estimator
from hutch.sched.queues import MultiLevel, parse_queue
from hutch.sched.report.gantt import SliceRecorder
from hutch.sched.report.result import Result, result_of
from hutch.sched.simulator import Observer, SimJob, simulate
from hutch.sched.traces import Trace, open_trace
from hutch.units import parse_bytes, parse_duration

if TYPE_CHECKING:
    from hutch.cli.sched_show import Wanted
    from hutch.cli.session import Invocation

__all__ = ["Request", "open_named", "read_request", "run_all", "serve"]

# Below so many jobs in all, starting processes takes longer than they save.
_WORTH_IT = 100_000
_QUEUES = "queues"
_COLLECT_EVERY = 100_000


class Request(msgspec.Struct):
    """One simulation or several of one trace. `policies` are names with parameters; the name
    `queues` stands for the queue of `queues`."""

    trace: str
    options: dict[str, Any]
    policies: list[str]
    queues: list[str]
    cores: int | float
    memory: int | None = None
    estimator: str | None = None
    preemption_cost: int | float = 0
    tau: int | float = 10
    curves: bool = False
    slices: tuple[float, float] | None = None
    most_slices: int = 20_000
    parallel: int = 1
    skipped: int = 0


def open_named(name: str, options: dict[str, Any]) -> Trace:
    """Open the trace of a command line, with what its options change."""
    flops = options.get("flops")
    trace = open_trace(
        _spooled(name, options),
        kind=options.get("format"),
        flops=None if flops is None else _number(flops, "flops"),
        seed=options.get("seed"),
        cores=_whole(options.get("cores")),
        jobs=options.get("jobs"),
    )
    if options.get("sort"):
        trace.sorted()
    if options.get("high_priority_first"):
        trace.high_priority_first()
    if options.get("kill_at_estimate"):
        trace.killed_at_estimate()
    return trace


def _spooled(name: str, options: dict[str, Any]) -> str:
    """Return a name that can be opened again and again: stdin goes through a file."""
    if name != "-":
        return name
    if not options.get("format"):
        raise InvalidArgument(
            "needs --format where the trace is stdin", field="trace", hint="--format swf"
        )
    import shutil
    import tempfile

    spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
    shutil.copyfileobj(sys.stdin.buffer, spool)
    spool.flush()
    options["_spool"] = spool
    return f"/proc/{os.getpid()}/fd/{spool.fileno()}"


def _number(text: str, field: str, low: float = 0) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidArgument(f"expected a number, got {text!r}", field=field) from None
    if not low < value < float("inf"):
        raise InvalidArgument(f"must be above {low:g}, got {text!r}", field=field)
    return int(value) if value.is_integer() else value


def _whole(cores: Any) -> int | None:
    """Return the cores that a generator may take for its machine's."""
    if cores is None:
        return None
    value = _number(str(cores), "cores")
    return value if isinstance(value, int) else None


def _split(texts: list[str]) -> list[str]:
    """Return the policies in `fcfs,rr:quantum=4,easy`: a comma before a `name=value` without
    a policy's name belongs to the parameters."""
    found: list[str] = []
    for text in texts:
        fresh = True
        for part in text.split(","):
            if not fresh and "=" in part and ":" not in part and found:
                found[-1] += f",{part}"
            else:
                found.append(part.strip())
            fresh = False
    return [policy for policy in found if policy]


def read_request(
    invocation: Invocation,
    default: list[str],
    *,
    curves: bool,
    slices: tuple[float, float] | None,
    most_slices: int,
) -> Request:
    """Return what a command line asks for. Everything that can be wrong is said here."""
    options = invocation.options
    (name,) = invocation.arguments
    trace = open_named(name, options)
    queues = options.get("queue", [])
    policies = _split(options.get("policy", [])) or ([] if queues else default)
    if queues:
        policies = [*policies, _QUEUES]
    if not policies:
        raise InvalidArgument(
            "name at least one", field="policy", hint="--policy fcfs; `hutch sched policies`"
        )
    memory = options.get("memory")
    kept = ("cores", "flops", "format", "seed", "sort", "high_priority_first", "kill_at_estimate")
    request = Request(
        trace=_spooled_name(name, options),
        options={key: options[key] for key in kept if key in options},
        policies=policies,
        queues=queues,
        cores=_cores(options.get("cores"), trace),
        memory=None if memory is None else parse_bytes(memory, field="memory"),
        estimator=options.get("estimator"),
        preemption_cost=_seconds(options.get("preemption_cost", "0"), "preemption-cost"),
        tau=_seconds(options.get("tau", "10"), "tau"),
        curves=curves,
        slices=slices,
        most_slices=most_slices,
    )
    for policy in policies:
        _policy(request, policy)
    if request.estimator is not None:
        create_estimator(request.estimator)
    request.parallel = _parallel(options.get("parallel"), trace, len(policies))
    return request


def _spooled_name(name: str, options: dict[str, Any]) -> str:
    spool = options.get("_spool")
    return name if spool is None else f"/proc/{os.getpid()}/fd/{spool.fileno()}"


def _seconds(text: str, field: str) -> float:
    value = parse_duration(text, field=field)
    return int(value) if value.is_integer() else value


def _cores(text: str | None, trace: Trace) -> float:
    if text is not None:
        return _number(text, "cores")
    if trace.cores is None:
        raise InvalidArgument(
            "the trace does not say how many there are", field="cores", hint="give --cores"
        )
    return trace.cores


def _parallel(asked: int | None, trace: Trace, policies: int) -> int:
    if asked is not None:
        if asked < 1:
            raise InvalidArgument(f"must be above 0, got {asked}", field="parallel")
        return min(asked, policies)
    if policies == 1:
        return 1
    few = sum(1 for _ in islice(trace, _WORTH_IT // policies + 1))
    if few * policies <= _WORTH_IT:
        return 1
    return min(len(os.sched_getaffinity(0)), policies)


def _policy(request: Request, text: str) -> Any:
    capacity = Capacity(cores=request.cores, memory=request.memory)
    seed = request.options.get("seed")
    if text == _QUEUES:
        return MultiLevel(capacity, [parse_queue(queue) for queue in request.queues], seed=seed)
    return create(text, capacity, seed=seed)


class _Several(msgspec.Struct):
    """Several observers as one."""

    observers: list[Observer]

    def slice(self, job: SimJob, began: float, ended: float) -> None:
        for observer in self.observers:
            observer.slice(job, began, ended)

    def done(self, jobs: list[SimJob]) -> None:
        for observer in self.observers:
            observer.done(jobs)


@contextmanager
def _rarely_collecting() -> Iterator[None]:
    """Look for cycles less often: a simulation makes none, and looking took an eighth of it."""
    before = gc.get_threshold()
    gc.set_threshold(_COLLECT_EVERY)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _run_one(request: Request, trace: Trace, text: str, more: Sequence[Observer]) -> Result:
    recorder = (
        SliceRecorder(request.slices, request.most_slices) if request.slices is not None else None
    )
    observers = [*more, recorder] if recorder is not None else [*more]
    with _rarely_collecting():
        summary = simulate(
            trace,
            _policy(request, text),
            estimator=None if request.estimator is None else create_estimator(request.estimator),
            preemption_cost=request.preemption_cost,
            tau=request.tau,
            observer=_Several(observers) if observers else None,
        )
    summary.policy = text
    result = result_of(summary, curves=request.curves)
    request.skipped = trace.skipped
    if recorder is not None:
        result.slices, result.dropped = recorder.slices, recorder.dropped
    return result


def run_all(request: Request, wanted: Wanted) -> list[Result]:
    """Simulate every policy; return the results in the order asked for."""
    if request.parallel > 1 and wanted.per_job is None:
        return _run_beside(request)
    trace = open_named(request.trace, dict(request.options))
    results = []
    with wanted.job_writer(request.tau) as writer:
        for policy in request.policies:
            more = [writer.of(policy)] if writer is not None else []
            results.append(_run_one(request, trace, policy, more))
    return results


def _run_beside(request: Request) -> list[Result]:
    """Simulate in so many processes of their own, each with its part of the policies."""
    from concurrent.futures import ThreadPoolExecutor

    parts = [request.policies[n :: request.parallel] for n in range(request.parallel)]
    with ThreadPoolExecutor(len(parts)) as pool:
        pending = [
            pool.submit(_ask, msgspec.structs.replace(request, policies=part)) for part in parts
        ]
        answers = [future.result() for future in pending]
    request.skipped = answers[0].skipped
    found = {result.policy: result for answer in answers for result in answer.results}
    return [found[policy] for policy in request.policies]


class _Answer(msgspec.Struct):
    results: list[Result] = []
    skipped: int = 0
    error: str | None = None
    hint: str | None = None


def _ask(request: Request) -> _Answer:
    from hutch.process import run_command

    done = run_command(
        [sys.executable, "-m", "hutch", "_sched_worker"], input=msgspec.msgpack.encode(request)
    )
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise InternalError(f"simulating {', '.join(request.policies)} failed: {''.join(last)}")
    answer = msgspec.msgpack.decode(done.stdout, type=_Answer)
    if answer.error is not None:
        raise InvalidArgument(answer.error, hint=answer.hint)
    return answer


def serve() -> int:
    """Simulate what stdin asks for; write the answer to stdout."""
    request = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Request)
    try:
        trace = open_named(request.trace, dict(request.options))
        results = [_run_one(request, trace, policy, []) for policy in request.policies]
        answer = _Answer(results=results, skipped=request.skipped)
    except HutchError as exc:
        answer = _Answer(error=exc.message, hint=exc.hint)
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))
    sys.stdout.buffer.flush()
    return 0
