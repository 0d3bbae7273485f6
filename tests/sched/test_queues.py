"""A queue of queues: shares, loans, caps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.errors import InvalidArgument
from hutch.sched import Capacity
from hutch.sched.queues import MultiLevel, QueueSpec, parse_queue
from hutch.sched.simulator import simulate
from hutch.sched.workload import TraceJob
from tests.sched.test_properties import CORES, MEMORY, most_at_once, some, traces
from tests.sched.traces import Recorder, jobs


def play(trace: list[TraceJob], cores: int, *queues: str, memory: int | None = None) -> Recorder:
    recorder = Recorder()
    capacity = Capacity(cores=cores, memory=memory)
    simulate(trace, MultiLevel(capacity, [parse_queue(q) for q in queues]), observer=recorder)
    return recorder


def test_queues_share_by_weight_and_lend_what_is_left() -> None:
    trace = jobs(*[(0, 10)] * 8, queue=["a"] * 4 + ["b"] * 4)
    starts = {who: j.began for who, j in play(trace, 4, "a=fcfs;weight=3", "b=fcfs").jobs.items()}
    assert [starts[n] for n in range(1, 9)] == [0, 0, 0, 10, 0, 10, 10, 10]


def test_a_queue_alone_has_the_whole_machine_and_a_capped_one_its_cap() -> None:
    trace = jobs(*[(0, 10)] * 4, queue=["a"] * 4)
    assert all(j.began == 0 for j in play(trace, 4, "a=fcfs", "b=fcfs").jobs.values())
    capped = play(trace, 4, "a=fcfs;cap=2", "b=fcfs").jobs
    assert [capped[n].began for n in range(1, 5)] == [0, 0, 10, 10]


def test_a_job_without_a_queue_goes_to_the_first_and_to_an_unknown_one_nowhere() -> None:
    assert play(jobs((0, 1)), 1, "a=fcfs").jobs[1].finish == 1
    with pytest.raises(InvalidArgument, match=r"job 1: queue: no such queue: 'z'"):
        play(jobs((0, 1), queue=["z"]), 1, "a=fcfs")


def test_turns_go_on_in_a_queue_that_may_not_grow() -> None:
    trace = jobs((0, 9), (0, 2), (0, 2), queue=["b", "a", "a"])
    slices = play(trace, 2, "a=rr:quantum=1", "b=fcfs").slices
    assert [(who, began) for who, began, *_ in slices if who != 1] == [
        (2, 0),
        (3, 1),
        (2, 2),
        (3, 3),
    ]


@some
@given(traces(), st.sampled_from(["rr:quantum=2", "easy", "srtf", "mlfq:quantum=2", "fair"]))
def test_whatever_the_queues_do_the_machine_is_not_overfull(
    trace: list[TraceJob], policy: str
) -> None:
    queues = [f"a={policy};weight=2", "b=fcfs", "c=stride:quantum=1"]
    named = [
        TraceJob(
            id=j.id, submit=j.submit, runtime=j.runtime, cores=j.cores, memory=j.memory,
            estimate=j.estimate, queue=j.user,
        )
        for j in trace
    ]  # fmt: skip
    recorder = play(named, CORES, *queues, memory=MEMORY)
    assert set(recorder.jobs) == {job.id for job in trace}
    assert most_at_once(recorder, {job.id: job.cores for job in trace}) <= CORES
    assert most_at_once(recorder, {job.id: job.memory for job in trace}) <= MEMORY


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rr", "expected NAME=POLICY"),
        ("a=rr;wait=3", "no such setting"),
        ("a=rr;weight=heavy", "queue a.weight: expected a number"),
        ("a=rr;weight=0", "queue a.weight: must be above 0"),
        ("a=rr;cap=0", "queue a.cap: must be above 0"),
    ],
)
def test_a_wrong_queue_is_named(text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parse_queue(text)


def test_a_policy_that_plans_the_whole_machine_is_no_queue() -> None:
    with pytest.raises(InvalidArgument, match="plans the whole machine"):
        MultiLevel(Capacity(cores=2), [QueueSpec(name="a", policy="conservative")])
