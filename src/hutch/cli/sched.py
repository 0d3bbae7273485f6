"""`sched …`: play a workload against policies, compare them, make workloads."""

from __future__ import annotations

import sys

from hutch.cli.command import Command
from hutch.cli.options import Option
from hutch.cli.output import print_json, table_lines
from hutch.cli.session import Invocation, warn
from hutch.errors import InvalidArgument

__all__ = ["COMMANDS"]


def _simulate(invocation: Invocation) -> int:
    return _run(invocation, [])


def _compare(invocation: Invocation) -> int:
    from hutch.sched import POLICIES

    return _run(invocation, list(POLICIES))


def _run(invocation: Invocation, default: list[str]) -> int:
    from hutch.cli.sched_run import read_request, run_all
    from hutch.cli.sched_show import Wanted, check, show

    wanted = Wanted.of(invocation)
    request = read_request(
        invocation,
        default,
        curves=wanted.curves,
        slices=wanted.slices,
        most_slices=wanted.most_slices,
    )
    check(wanted, len(request.policies))
    results = run_all(request, wanted)
    if request.skipped:
        were = "jobs" if request.skipped > 1 else "job"
        warn(f"left out {request.skipped} {were} of {request.trace} that never ran")
    show(wanted, request, results)
    return 0


def _worker(_invocation: Invocation) -> int:
    from hutch.cli.sched_run import serve

    return serve()


def _generate(invocation: Invocation) -> int:
    from hutch.cli.sched_run import open_named
    from hutch.cli.sched_show import replacing
    from hutch.sched.traces import write_trace
    from hutch.sched.traces.source import FORMATS, kind_of

    options = invocation.options
    name, *rest = invocation.arguments
    where = rest[0] if rest else "-"
    trace = open_named(name, options)
    kind = options.get("to") or ("swf" if where == "-" else kind_of(where))
    if kind not in FORMATS:
        raise InvalidArgument(
            f"unknown format: {kind!r}", field="to", hint=f"there are {', '.join(FORMATS)}"
        )
    if where == "-":
        write_trace(trace, sys.stdout, kind, cores=trace.cores)
        return 0
    with replacing(where) as file:
        count = write_trace(trace, file, kind, cores=trace.cores)
    if invocation.json:
        print_json({"File": where, "Format": kind, "Jobs": count})
    else:
        print(f"{where}: {count} jobs")
    return 0


def _policies(invocation: Invocation) -> int:
    from hutch.sched.estimators import ESTIMATORS
    from hutch.sched.registry import POLICIES, describe, theirs
    from hutch.sched.traces import GENERATORS

    rows = [("policy", name, *describe(name)) for name in (*POLICIES, *theirs())]
    rows += [
        ("estimator", name, (cls.__doc__ or "").partition("\n")[0].rstrip("."), cls.parameters)
        for name, cls in ESTIMATORS.items()
    ]
    rows += [("generator", name, text, known) for name, (text, known) in GENERATORS.items()]
    if invocation.json:
        print_json(
            [
                {
                    "Kind": kind,
                    "Name": name,
                    "Summary": summary,
                    "Parameters": {
                        key: {"Default": str(p.default), "Summary": p.summary}
                        for key, p in parameters.items()
                    },
                }
                for kind, name, summary, parameters in rows
            ]
        )
        return 0
    lines = []
    for kind, name, summary, parameters in rows:
        lines.append((kind, name, summary))
        lines += [
            ("", f"  {key}={p.default!s}".replace("=False", ""), f"  {p.summary}")
            for key, p in parameters.items()
        ]
    for line in table_lines(["KIND", "NAME", "WHAT"], lines):
        print(line)
    return 0


_OUTPUT: Option = ("output", "o", "text", "FORMAT", "Write `table`, `json` or `csv`")
_TRACE_OPTIONS: tuple[Option, ...] = (
    ("flops", "", "text", "NUMBER", "Speed of a core, for Batsim profiles that compute"),
    ("format", "", "text", "FORMAT", "Of the trace: swf, csv or batsim (told by its name)"),
    ("high-priority-first", "", "flag", "", "Higher numbers are more urgent (lower)"),
    ("kill-at-estimate", "", "flag", "", "Jobs end when the user's estimate is over"),
    ("seed", "", "int", "NUMBER", "Of generators and lotteries, where they name none (1)"),
    ("sort", "", "flag", "", "Put the jobs in order of submission first, in memory"),
)
_RUN_OPTIONS: tuple[Option, ...] = (
    *_TRACE_OPTIONS,
    _OUTPUT,
    ("policy", "p", "list", "POLICY", "rr:quantum=4; several by repeating or with commas"),
    ("queue", "", "list", "QUEUE", "NAME=POLICY;weight=2;cap=64: queues as one more policy"),
    ("cores", "", "text", "NUMBER", "Of the machine (what the trace says), and a generator's"),
    ("memory", "", "text", "BYTES", "Of the machine; without it memory does not count"),
    ("estimator", "", "text", "ESTIMATOR", "user, exact, average or last-two (see epilog)"),
    ("preemption-cost", "", "text", "SECONDS", "What going on after a pause takes (0)"),
    ("tau", "", "text", "SECONDS", "Run time that bounds the bounded slowdown (10)"),
    ("parallel", "", "int", "NUMBER", "How many policies at once (as many as CPUs)"),
    ("per-job", "", "text", "FILE", "Write every job's figures: .csv or .jsonl"),
    (
        "gantt",
        "",
        "text",
        "FILE",
        "Draw who ran when: .svg or .png; of several policies NAME-POLICY.svg",
    ),
    ("window", "", "text", "FROM:TO", "Seconds of the schedule that --gantt shows"),
    ("cdf", "", "text", "FILE", "Draw how --metric is distributed: .svg or .png"),
    ("metric", "", "text", "NAME", "For --cdf and --show cdf (waiting)"),
    ("html", "", "text", "FILE", "Write a page with figures, curves and charts"),
    ("show", "", "list", "WHAT", "`gantt` or `cdf`: draw in the terminal"),
)
_EPILOG = (
    "TRACE is a file (.swf, .csv, .json for Batsim; also .gz; `-` with --format for stdin) or a "
    "generator: lublin, poisson, uniform, with parameters as lublin:jobs=1000,load=0.8. "
    "`hutch sched policies` lists policies, estimators and generators with their parameters. "
    "Without --estimator policies know the trace's estimate, or where there is none the true "
    "run time. Quantiles of more than 50,000 jobs are within 0.1 %. Times are in seconds."
)

COMMANDS = {
    "sched simulate": Command(
        handler=_simulate,
        summary="Tell what policies would have made of a workload.",
        arguments="TRACE",
        low=1,
        high=1,
        options=_RUN_OPTIONS,
        examples=(
            "hutch sched simulate log.swf.gz --policy easy",
            "hutch sched simulate jobs.csv --policy rr:quantum=4 --cores 1 --show gantt",
            "hutch sched simulate lublin:jobs=100000,cores=256 -p fcfs -p sjf -o json",
            "hutch sched simulate log.swf --queue '0=rr;weight=2' --queue '1=easy;cap=96'",
        ),
        epilog=_EPILOG,
    ),
    "sched compare": Command(
        handler=_compare,
        summary="Compare policies on a workload; all of them, if none is named.",
        arguments="TRACE",
        low=1,
        high=1,
        options=_RUN_OPTIONS,
        examples=(
            "hutch sched compare log.swf.gz --html report.html",
            "hutch sched compare jobs.csv --cores 16 --policy fcfs,easy,srtf --cdf waiting.svg",
        ),
        epilog=_EPILOG,
    ),
    "sched generate": Command(
        handler=_generate,
        summary="Write a generated workload, or a trace in another format.",
        arguments="TRACE [FILE]",
        low=1,
        high=2,
        options=(
            *_TRACE_OPTIONS,
            ("cores", "", "text", "NUMBER", "Of a generator's machine, where TRACE names none"),
            ("jobs", "", "int", "NUMBER", "How many to generate, where TRACE does not say"),
            ("to", "", "text", "FORMAT", "Write swf, csv or batsim (told by the name of FILE)"),
        ),
        examples=(
            "hutch sched generate lublin:jobs=5000,cores=128,load=0.9 load.swf",
            "hutch sched generate log.swf.gz log.csv",
        ),
        epilog="The same generator, parameters and seed make the same jobs everywhere.",
    ),
    "sched policies": Command(
        handler=_policies,
        summary="List policies, estimators and generators with their parameters.",
        examples=("hutch sched policies",),
    ),
    "_sched_worker": Command(handler=_worker, summary="Simulate for another process."),
}
