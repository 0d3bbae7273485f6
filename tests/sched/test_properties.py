"""What holds for every policy and every workload, found out by trying to break it."""

from __future__ import annotations

import math
import os
import random
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hutch.sched import POLICIES, Capacity, Decisions, Job, create
from hutch.sched.estimators import create_estimator
from hutch.sched.policies.conservative import Conservative
from hutch.sched.policies.easy import EASY
from hutch.sched.simulator import simulate
from hutch.sched.workload import TraceJob
from tests.sched.traces import Recorder, jobs, record

CORES, MEMORY = 4, 16
VARIANTS = [
    *POLICIES,
    "rr:quantum=3",
    "mlfq:quantum=2,levels=4",
    "mlfq:quantum=2,boost=7",
    "lottery:quantum=2",
    "stride:quantum=2",
    "priority:ageing=0.5",
    "priority-preemptive:ageing=0.5",
    "edf:slack=3",
    "fair:half_life=10,ahead=1",
    "fair:half_life=inf",
    "conservative:depth=2",
]
# HUTCH_EXAMPLES=500 tries harder than there is time for in every run of the suite.
_EXAMPLES = int(os.environ.get("HUTCH_EXAMPLES", "16"))
some = settings(
    max_examples=_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)


few = settings(some, max_examples=max(4, _EXAMPLES // 4))


@st.composite
def traces(
    draw: st.DrawFn,
    *,
    serial: bool = False,
    bounded: bool = False,
    memory: bool = True,
    most: int = 14,
) -> list[TraceJob]:
    """Small workloads; `bounded`: no run time is above its estimate."""
    count = draw(st.integers(1, most))
    now = 0
    found = []
    for n in range(count):
        now += draw(st.integers(0, 5))
        runtime = draw(st.integers(0, 9))
        low = runtime if bounded else 0
        found.append(
            TraceJob(
                id=n,
                submit=now,
                runtime=runtime,
                cores=1 if serial else draw(st.integers(1, CORES)),
                memory=draw(st.integers(0, MEMORY)) if memory and not serial else 0,
                estimate=draw(st.one_of(st.none(), st.integers(low, 12))),
                priority=draw(st.integers(0, 3)),
                user=draw(st.sampled_from("abc")),
                weight=draw(st.integers(1, 3)),
                deadline=draw(st.one_of(st.just(math.inf), st.integers(0, 40))),
            )
        )
    return found


def most_at_once(recorder: Recorder, of: dict[Any, float]) -> float:
    changes = []
    for who, began, ended, _ in recorder.slices:
        if ended > began:
            changes += [(began, of[who]), (ended, -of[who])]
    level = highest = 0.0
    for _, change in sorted(changes):
        level += change
        highest = max(highest, level)
    return highest


@pytest.mark.parametrize("policy", VARIANTS)
@some
@given(data=st.data())
def test_every_job_gets_its_run_time_after_its_arrival_and_no_more_than_there_is(
    policy: str, data: st.DataObject
) -> None:
    trace = data.draw(traces())
    recorder = record(policy, trace, CORES, memory=MEMORY)
    assert set(recorder.jobs) == {job.id for job in trace}
    assert most_at_once(recorder, {job.id: job.cores for job in trace}) <= CORES
    assert most_at_once(recorder, {job.id: job.memory for job in trace}) <= MEMORY
    for job in trace:
        slices = [(b, e) for who, b, e, _ in recorder.slices if who == job.id]
        assert slices[0][0] >= job.submit
        assert all(end <= began for (_, end), (began, _) in pairwise(slices))
        assert sum(end - began for began, end in slices) == pytest.approx(job.runtime)
        done = recorder.jobs[job.id]
        assert done.served == pytest.approx(job.runtime)
        assert done.finish == slices[-1][1] and done.began == slices[0][0]
        assert done.pauses == len(slices) - 1
        if not create(policy, Capacity()).preemptive:
            assert done.pauses == 0


@pytest.mark.parametrize("policy", VARIANTS)
@some
@given(data=st.data())
def test_no_core_idles_while_a_job_of_one_core_waits(policy: str, data: st.DataObject) -> None:
    trace = data.draw(traces(serial=True))
    recorder = record(policy, trace, 2)
    marks = sorted(
        {m for who, b, e, _ in recorder.slices for m in (b, e)} | {j.submit for j in trace}
    )
    for low, high in pairwise(marks):
        middle = (low + high) / 2
        running = sum(b <= middle < e for _, b, e, _ in recorder.slices)
        there = sum(j.submit <= middle < recorder.jobs[j.id].finish for j in trace)
        assert running == min(2, there)


@pytest.mark.parametrize("policy", VARIANTS)
@few
@given(data=st.data())
def test_the_same_trace_gives_the_same_schedule(policy: str, data: st.DataObject) -> None:
    trace = data.draw(traces())
    first, second = (record(policy, trace, CORES, memory=MEMORY).slices for _ in "12")
    assert first == second


@cache
def least_total_turnaround(now: int, left: tuple[tuple[int, int], ...]) -> float:
    """Return the least sum of end − arrival on one core, trying every order, pauses included."""
    if not left:
        return 0
    ready = [job for job in left if job[0] <= now]
    if not ready:
        return least_total_turnaround(min(a for a, _ in left), left)
    best = math.inf
    for job in set(ready):
        rest = list(left)
        rest.remove(job)
        if job[1] == 1:
            total = now + 1 - job[0] + least_total_turnaround(now + 1, tuple(sorted(rest)))
        else:
            rest.append((job[0], job[1] - 1))
            total = least_total_turnaround(now + 1, tuple(sorted(rest)))
        best = min(best, total)
    return best


@some
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=4).map(sorted)
)
def test_srtf_has_the_least_mean_turnaround_of_all_schedules(
    pairs: list[tuple[int, int]],
) -> None:
    recorder = record("srtf", jobs(*pairs))
    total = sum(job.finish - job.arrival for job in recorder.jobs.values())
    assert total == least_total_turnaround(0, tuple(sorted(pairs)))


class WatchedEASY(EASY):
    """Checks at each decision that no reservation moves back."""

    def decide(self, now: float) -> Decisions:
        before = self.reservation()
        decisions = super().decide(now)
        after = self.reservation()
        if before and after and before[0] is after[0]:
            assert after[1] <= before[1]
        if before and before[0] in decisions.start:
            assert now <= before[1]
        return decisions


@some
@given(traces(bounded=True))
def test_easy_never_delays_the_reservation_of_the_first(trace: list[TraceJob]) -> None:
    simulate(trace, WatchedEASY(Capacity(cores=CORES, memory=MEMORY)))


class WatchedConservative(Conservative):
    """Checks at each decision that no reservation moves back."""

    promised: dict[str | int, float]

    def decide(self, now: float) -> Decisions:
        decisions = super().decide(now)
        if not hasattr(self, "promised"):
            self.promised = {}
        for job in decisions.start:
            assert now <= self.promised.get(job.id, math.inf)
        for who, start in self.reservations().items():
            assert start <= self.promised.get(who, math.inf)
            self.promised[who] = start
        return decisions


@some
@given(traces(bounded=True))
def test_conservative_never_moves_a_reservation_back(trace: list[TraceJob]) -> None:
    simulate(trace, WatchedConservative(Capacity(cores=CORES, memory=MEMORY)))


class PlainEASY:
    """EASY as the papers write it down, looking at every job each time."""

    def __init__(self, trace: list[TraceJob]) -> None:
        self.coming = list(trace)
        self.waiting: list[TraceJob] = []
        self.running: list[tuple[float, float, TraceJob]] = []
        self.starts: dict[str | int, float] = {}

    def free(self) -> tuple[float, int]:
        cores = CORES - sum(job.cores for *_, job in self.running)
        return cores, MEMORY - sum(job.memory for *_, job in self.running)

    def start(self, job: TraceJob, now: float) -> None:
        self.waiting.remove(job)
        estimate = job.runtime if job.estimate is None else job.estimate
        self.running.append((now + job.runtime, now + estimate, job))
        self.starts[job.id] = now

    def decide(self, now: float) -> None:
        while self.waiting and fits(self.waiting[0], self.free()):
            self.start(self.waiting[0], now)
        if not self.waiting:
            return
        head = self.waiting[0]
        cores, memory = self.free()
        shadow = math.inf
        for _, end, job in sorted(self.running, key=lambda entry: entry[1]):
            if end > shadow:
                break
            cores, memory = cores + job.cores, memory + job.memory
            if shadow == math.inf and fits(head, (cores, memory)):
                shadow = max(end, now)
        spare = cores - head.cores, memory - head.memory
        for job in self.waiting[1:]:
            if not fits(job, self.free()):
                continue
            estimate = job.runtime if job.estimate is None else job.estimate
            if estimate <= shadow - now:
                self.start(job, now)
            elif fits(job, spare):
                spare = spare[0] - job.cores, spare[1] - job.memory
                self.start(job, now)

    def play(self) -> dict[str | int, float]:
        while self.coming or self.running:
            times = [end for end, *_ in self.running] + [j.submit for j in self.coming[:1]]
            now = min(times)
            self.running = [entry for entry in self.running if entry[0] > now]
            while self.coming and self.coming[0].submit <= now:
                self.waiting.append(self.coming.pop(0))
            self.decide(now)
        return self.starts


def fits(job: TraceJob, free: tuple[float, int]) -> bool:
    return job.cores <= free[0] and job.memory <= free[1]


def test_easy_lets_a_job_of_no_length_pass_while_another_outlives_its_estimate() -> None:
    # (submit, runtime, cores, estimate): at 2 the reservation of the third stands at 1.
    rows = [(0, 3, 2, None), (1, 3, 1, 0), (1, 1, 2, None), (2, 0, 1, None)]
    trace = [
        TraceJob(id=number, submit=submit, runtime=runtime, cores=cores, estimate=estimate)
        for number, (submit, runtime, cores, estimate) in enumerate(rows)
    ]
    recorder = record("easy", trace, CORES, memory=MEMORY)
    assert {who: job.began for who, job in recorder.jobs.items()} == PlainEASY(trace).play()
    assert recorder.jobs[3].began == 2


@pytest.mark.timeout(600)
@some
@given(traces(most=40))
def test_easy_starts_the_same_jobs_as_looking_at_all_of_them(trace: list[TraceJob]) -> None:
    recorder = record("easy", trace, CORES, memory=MEMORY)
    assert {who: job.began for who, job in recorder.jobs.items()} == PlainEASY(trace).play()


@pytest.mark.parametrize("seed", range(4))
def test_easy_starts_the_same_jobs_when_hundreds_come_at_once(seed: int) -> None:
    chance = random.Random(seed)
    trace = [
        TraceJob(
            n, n // 100, (runtime := chance.randint(0, 30)), chance.randint(1, CORES),
            chance.randint(0, MEMORY), runtime + chance.randint(0, 9),
        )
        for n in range(300)
    ]  # fmt: skip
    recorder = record("easy", trace, CORES, memory=MEMORY)
    assert {who: job.began for who, job in recorder.jobs.items()} == PlainEASY(trace).play()


@some
@given(traces(most=25, memory=False))
def test_hrrn_starts_the_one_with_the_highest_ratio(trace: list[TraceJob]) -> None:
    recorder = record("hrrn", trace, 1 * CORES)
    started = sorted(recorder.jobs.values(), key=lambda job: job.began)
    for job in started:

        def ratio(other: Job, now: float = job.began) -> float:
            waited = now - other.arrival
            return (waited / other.estimate if other.estimate else math.inf) if waited else 0

        others = [o for o in started if o.began > job.began and o.arrival < job.began]
        assert all(ratio(o) <= ratio(job) for o in others)


@pytest.mark.parametrize("estimator", ["user", "exact", "average", "last-two"])
@pytest.mark.parametrize("policy", ["easy", "conservative", "srtf", "sjf", "hrrn"])
@few
@given(data=st.data())
def test_any_prediction_gives_every_job_its_run_time(
    policy: str, estimator: str, data: st.DataObject
) -> None:
    trace = data.draw(traces())
    recorder = record(policy, trace, CORES, memory=MEMORY, estimator=create_estimator(estimator))
    assert all(job.served == pytest.approx(job.runtime) for job in recorder.jobs.values())


@pytest.mark.parametrize("policy", ["rr:quantum=2", "srtf", "mlfq:quantum=2", "stride:quantum=1"])
@some
@given(data=st.data())
def test_the_cost_of_pausing_is_paid_by_time_on_the_cores(policy: str, data: st.DataObject) -> None:
    trace = data.draw(traces())
    free = create(policy, Capacity(cores=CORES, memory=MEMORY))
    summary = simulate(trace, free, preemption_cost=0.5)
    useful = sum(job.cores * job.runtime for job in trace)
    assert summary.busy >= useful
    assert summary.busy - useful <= summary.preemptions * 0.5 * CORES + 1e-9
