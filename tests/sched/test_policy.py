"""How a policy is driven: what it is told, what it answers, and what its books say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hutch.errors import InvalidArgument, WrongState
from hutch.sched import NOTHING, Capacity, Job, Phase, create


def job(seq: int, arrival: float = 0, **facts: Any) -> Job:
    return Job(id=f"j{seq}", seq=seq, arrival=arrival, **facts)


def test_fcfs_starts_what_fits_in_order_and_keeps_the_rest_waiting() -> None:
    policy = create("fcfs", Capacity(cores=2))
    first, wide, last = job(1), job(2, cores=2), job(3)
    for each in (first, wide, last):
        policy.submit(each, 0)
    assert list(policy.decide(0).start) == [first]
    assert policy.decide(0) is NOTHING
    policy.finish(first, 5)
    assert list(policy.decide(5).start) == [wide]
    assert policy.pending == 1 and policy.ledger.cores == 0


def test_sjf_takes_the_shortest_estimate_and_the_unknown_last() -> None:
    policy = create("sjf", Capacity(cores=1))
    jobs = [job(1), job(2, estimate=9), job(3, estimate=2)]
    for each in jobs:
        policy.submit(each, 0)
    order = []
    for now in range(3):
        (started,) = policy.decide(now).start
        order.append(started.seq)
        policy.finish(started, now + 1)
    assert order == [3, 2, 1]


def test_round_robin_pauses_at_the_end_of_a_quantum_and_resumes() -> None:
    policy = create("rr:quantum=4", Capacity(cores=1))
    first, second = job(1), job(2)
    policy.submit(first, 0)
    policy.submit(second, 0)
    assert list(policy.decide(0).start) == [first]
    assert policy.wake == 4
    decisions = policy.decide(4)
    assert (list(decisions.pause), list(decisions.start)) == ([first], [second])
    assert first.phase == Phase.PAUSED and first.served == 4
    decisions = policy.decide(8)
    assert (list(decisions.pause), list(decisions.start)) == ([second], [first])
    policy.finish(first, 9)
    assert list(policy.decide(9).start) == [second]
    assert policy.wake == math.inf and policy.pending == 0


def test_a_quantum_counts_from_when_the_driver_says_the_job_really_ran() -> None:
    policy = create("rr:quantum=1", Capacity(cores=1))
    slow, other = job(1), job(2)
    policy.submit(slow, 0)
    policy.submit(other, 0)
    policy.decide(0)
    slow.since = 0.75  # a machine took that long to boot
    assert policy.decide(1) is NOTHING
    assert policy.wake == 1.75
    assert list(policy.decide(1.75).pause) == [slow]


def test_quanta_that_end_while_nobody_waits_need_no_waking() -> None:
    policy = create("rr:quantum=2", Capacity(cores=1))
    first, second = job(1), job(2, arrival=7)
    policy.submit(first, 0)
    policy.decide(0)
    assert policy.wake == math.inf
    policy.submit(second, 7)
    assert policy.decide(7) is NOTHING
    assert policy.wake == 8


def test_a_withdrawn_job_does_not_start_and_can_be_submitted_again() -> None:
    policy = create("fcfs", Capacity(cores=1))
    held, other = job(1), job(2)
    policy.submit(held, 0)
    policy.submit(other, 0)
    policy.withdraw(held, 0)
    assert list(policy.decide(0).start) == [other]
    policy.submit(held, 1)
    policy.finish(other, 2)
    assert list(policy.decide(2).start) == [held]


def test_a_job_that_is_released_has_its_old_place_in_the_order_of_arrival() -> None:
    policy = create("fcfs", Capacity(cores=1))
    jobs = [job(n, arrival=n) for n in range(5)]
    for each in jobs:
        policy.submit(each, 4)
    policy.withdraw(jobs[1], 5)
    policy.submit(jobs[1], 6)
    order = []
    for now in range(7, 12):
        (started,) = policy.decide(now).start
        order.append(started.seq)
        policy.finish(started, now + 1)
    assert order == [0, 1, 2, 3, 4]


def test_a_paused_job_keeps_its_devices_and_gives_back_cores_and_memory() -> None:
    capacity = Capacity(cores=1, memory=8, devices={"gpu": 1})
    policy = create("rr:quantum=1", capacity)
    first = job(1, memory=6, devices=(("gpu", 1),))
    second = job(2, memory=6)
    policy.submit(first, 0)
    policy.submit(second, 0)
    policy.decide(0)
    policy.decide(1)
    ledger = policy.ledger
    assert (ledger.cores, ledger.memory, ledger.devices) == (0, 2, {"gpu": 0})
    policy.withdraw(first, 1)
    assert ledger.devices == {"gpu": 1}


def test_tenths_of_cores_add_up() -> None:
    policy = create("fcfs", Capacity(cores=1))
    parts = [job(n, cores=0.1) for n in range(10)]
    for each in parts:
        policy.submit(each, 0)
    assert len(policy.decide(0).start) == 10
    for each in parts:
        policy.finish(each, 1)
    policy.submit(job(10, cores=1), 1)
    assert len(policy.decide(1).start) == 1


def test_running_jobs_found_after_a_restart_are_adopted() -> None:
    policy = create("rr:quantum=4", Capacity(cores=1))
    running = job(1, served=2, phase=Phase.RUNNING, since=10, began=3)
    paused = job(2, served=1, phase=Phase.PAUSED, began=4)
    policy.adopt(running, 11)
    policy.adopt(paused, 11)
    assert policy.decide(11) is NOTHING
    decisions = policy.decide(policy.wake)
    assert (list(decisions.pause), list(decisions.start)) == ([running], [paused])


def test_resizing_lets_more_run_or_fewer_start() -> None:
    policy = create("fcfs", Capacity(cores=1))
    jobs = [job(n) for n in range(3)]
    for each in jobs:
        policy.submit(each, 0)
    policy.decide(0)
    policy.resize(Capacity(cores=2), 1)
    assert list(policy.decide(1).start) == [jobs[1]]
    policy.resize(Capacity(cores=1), 2)
    policy.finish(jobs[0], 3)
    assert policy.decide(3) is NOTHING
    policy.finish(jobs[1], 4)
    assert list(policy.decide(4).start) == [jobs[2]]


@pytest.mark.parametrize(
    ("facts", "field"),
    [({"cores": 3}, "cores"), ({"memory": 9}, "memory"), ({"devices": (("tpu", 1),)}, "tpu")],
)
def test_a_job_that_never_fits_is_refused(facts: dict[str, Any], field: str) -> None:
    policy = create("fcfs", Capacity(cores=2, memory=8))
    with pytest.raises(InvalidArgument, match=field):
        policy.submit(job(1, **facts), 0)
    assert policy.pending == 0


def test_what_makes_no_sense_is_refused() -> None:
    policy = create("fcfs", Capacity(cores=1))
    waiting = job(1)
    policy.submit(waiting, 0)
    with pytest.raises(WrongState):
        policy.submit(waiting, 0)
    with pytest.raises(WrongState):
        policy.finish(waiting, 0)
    policy.decide(0)
    with pytest.raises(WrongState):
        policy.withdraw(waiting, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fcsf", "no such policy"),
        ("rr:quantom=4", "no such parameter"),
        ("rr:quantum=0", "quantum: must be at least 0.001"),
        ("stride:quantum=1us", "quantum: must be at least 0.001"),
        ("mlfq:boost=0", "boost: must be at least 0.001"),
        ("mlfq:levels=65", "levels: must be at most 64"),
        ("mlfq:factor=1e9", "factor: must be at most 1000"),
        ("rr:quantum=soon", "quantum: expected a duration"),
    ],
)
def test_a_wrong_policy_is_named_with_its_cure(text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as raised:
        create(text, Capacity(cores=1))
    assert raised.value.hint or ": " in words
