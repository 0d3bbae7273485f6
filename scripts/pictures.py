"""The charts of docs/explanation/scheduling.md, drawn by the simulator they explain."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from hutch.sched import Capacity, TraceJob, create, generate, simulate
from hutch.sched.report.curves import cdf_picture
from hutch.sched.report.drawing import to_svg
from hutch.sched.report.gantt import SliceRecorder, gantt_picture

__all__ = ["pictures"]

_FIVE = [
    TraceJob("A", 0, 10, priority=3),
    TraceJob("B", 1, 2, priority=1),
    TraceJob("C", 2, 6, priority=4),
    TraceJob("D", 4, 1, priority=5),
    TraceJob("E", 5, 4, priority=2),
]
_ONE_CORE = (
    "fcfs",
    "sjf",
    "srtf",
    "priority",
    "priority-preemptive",
    "rr:quantum=2",
    "mlfq:quantum=2",
    "hrrn",
)
_WIDE = [
    TraceJob("A", 0, 10, 3),
    TraceJob("B", 1, 2, 3),
    TraceJob("C", 1, 3, 4),
    TraceJob("D", 2, 12, 1),
    TraceJob("E", 3, 6, 1),
]
_FOUR_CORES = ("fcfs", "easy", "conservative")
_CURVES = ("fcfs", "sjf", "easy", "conservative", "fair", "rr:quantum=60", "srtf")


def pictures() -> dict[str, str]:
    """Return each file's name and text."""
    found = {}
    for policy in _ONE_CORE:
        found[_name("one", policy)] = _gantt(_FIVE, policy, 1)
    for policy in _FOUR_CORES:
        found[_name("wide", policy)] = _gantt(_WIDE, policy, 4)
    made = generate("lublin:jobs=1500,cores=64,load=0.8,seed=5")
    jobs = list(islice(made.jobs(), 1500))
    curves = {
        policy: simulate(jobs, create(policy, Capacity(cores=64))).bounded_slowdown.curve(100)
        for policy in _CURVES
    }
    found["slowdown.svg"] = to_svg(cdf_picture(curves, "bounded_slowdown"))
    return found


def _name(group: str, policy: str) -> str:
    return f"{group}-{policy.partition(':')[0]}.svg"


def _gantt(jobs: Sequence[TraceJob], policy: str, cores: int) -> str:
    recorder = SliceRecorder()
    summary = simulate(jobs, create(policy, Capacity(cores=cores)), observer=recorder)
    title = (
        f"{policy}: mean waiting {summary.waiting.mean:.3g} s, "
        f"mean response {summary.response.mean:.3g} s"
    )
    return to_svg(gantt_picture(recorder.slices, cores, title=title, width=720))
