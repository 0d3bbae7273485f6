"""Worked examples of textbooks, met exactly: Silberschatz, Galvin and Gagne, "Operating
System Concepts", chapter 5; Arpaci-Dusseau, "Operating Systems: Three Easy Pieces",
chapters 7 to 9; Mu'alem and Feitelson for backfilling."""

from __future__ import annotations

import pytest

from hutch.sched.workload import TraceJob
from tests.sched.traces import jobs, record, run

CONVOY = jobs((0, 24), (0, 3), (0, 3))
FOUR = jobs((0, 6), (0, 8), (0, 7), (0, 3))
ARRIVING = jobs((0, 8), (1, 4), (2, 9), (3, 5))
URGENT = jobs((0, 10), (0, 1), (0, 2), (0, 1), (0, 5), priority=(3, 1, 4, 5, 2))


@pytest.mark.parametrize(
    ("policy", "trace", "waiting"),
    [
        ("fcfs", CONVOY, 17),
        ("fcfs", jobs((0, 3), (0, 3), (0, 24)), 3),
        ("rr:quantum=4", CONVOY, 17 / 3),
        ("sjf", FOUR, 7),
        ("fcfs", FOUR, 10.25),
        ("srtf", ARRIVING, 6.5),
        ("sjf", ARRIVING, 7.75),
        ("priority", URGENT, 8.2),
        ("priority-preemptive", URGENT, 8.2),
    ],
)
def test_mean_waiting_of_silberschatz(policy: str, trace: list[TraceJob], waiting: float) -> None:
    assert run(policy, trace).waiting.mean == waiting


@pytest.mark.parametrize(
    ("policy", "trace", "turnaround"),
    [
        ("fcfs", jobs((0, 100), (0, 10), (0, 10)), 110),
        ("sjf", jobs((0, 100), (0, 10), (0, 10)), 50),
        ("sjf", jobs((0, 100), (10, 10), (10, 10)), 310 / 3),
        ("srtf", jobs((0, 100), (10, 10), (10, 10)), 50),
        ("rr:quantum=1", jobs((0, 5), (0, 5), (0, 5)), 14),
    ],
)
def test_mean_turnaround_of_three_easy_pieces(
    policy: str, trace: list[TraceJob], turnaround: float
) -> None:
    assert run(policy, trace).turnaround.mean == turnaround


def test_mean_response_of_three_easy_pieces() -> None:
    assert run("rr:quantum=1", jobs((0, 5), (0, 5), (0, 5))).response.mean == 1


def test_a_job_that_arrives_as_a_quantum_ends_is_before_the_one_that_was_running() -> None:
    slices = record("rr:quantum=2", jobs((0, 4), (2, 2))).slices
    assert [(who, began) for who, began, *_ in slices] == [(1, 0), (2, 2), (1, 4)]


def test_stride_chooses_in_the_order_of_three_easy_pieces() -> None:
    # Tickets 100, 50, 250: A B C C C A C C until all passes are 200 (chapter 9, figure 9.3).
    trace = jobs((0, 2), (0, 1), (0, 5), weight=(100, 50, 250))
    slices = record("stride:quantum=1", trace).slices
    turns = "".join("ABC"[int(who) - 1] * int(end - began) for who, began, end, _ in slices)
    assert turns == "ABCCCACC"


def test_hrrn_prefers_a_long_wait_to_a_short_job() -> None:
    # At 9: job 2 (1+… waited 8 of 4): ratio 3; job 3 (waited 1 of 2): 1.5.
    trace = jobs((0, 9), (1, 4), (8, 2))
    order = [who for who, *_ in record("hrrn", trace).slices]
    assert order == [1, 2, 3]
    assert [who for who, *_ in record("sjf", trace).slices] == [1, 3, 2]


def test_feedback_queues_let_short_jobs_overtake_a_long_one() -> None:
    # Three Easy Pieces, figure 8.3: a long job has sunk when a short one comes.
    trace = jobs((0, 200), (100, 20))
    slices = record("mlfq:levels=3,quantum=10,factor=1", trace).slices
    assert [(who, began, end) for who, began, end, _ in slices] == [
        (1, 0, 100),
        (2, 100, 120),
        (1, 120, 220),
    ]


def test_a_boost_lets_a_starved_job_run() -> None:
    short = [(t, 10.0) for t in range(20, 220, 10)]
    starved = record("mlfq:levels=2,quantum=10", jobs((0, 50), *short))
    boosted = record("mlfq:levels=2,quantum=10,boost=50", jobs((0, 50), *short))
    assert starved.jobs[1].finish == 250
    assert boosted.jobs[1].finish < 250


def test_earliest_deadline_first_meets_what_order_of_arrival_misses() -> None:
    trace = jobs((0, 4), (1, 2), (2, 3), deadline=(12, 4, 8))
    assert run("edf", trace).missed_deadlines == 0
    assert run("fcfs", trace).missed_deadlines == 2


def test_easy_fills_the_gap_without_delaying_the_first() -> None:
    # 1 runs on 2 of 3 cores until 10; 2 needs all and is reserved at 10; 3 ends by then,
    # 4 would not and is not spare.
    trace = jobs((0, 10), (1, 5), (2, 8), (3, 8), cores=(2, 3, 1, 1))
    starts = {who: job.began for who, job in record("easy", trace, cores=3).jobs.items()}
    assert starts == {1: 0, 2: 10, 3: 2, 4: 15}


def test_easy_lets_a_long_job_use_what_is_spare() -> None:
    # 2 needs 2 of 4 cores at 10, so one core of the two that are free now is spare.
    trace = jobs((0, 10), (1, 5), (2, 90), (3, 90), cores=(3, 3, 1, 1))
    starts = {who: job.began for who, job in record("easy", trace, cores=4).jobs.items()}
    assert starts == {1: 0, 2: 10, 3: 2, 4: 15}


def test_easy_may_delay_the_second_where_conservative_does_not() -> None:
    # Waiting: 2 (reserved at 10), 3 (all cores, at 12 after it), 4 (one core, long).
    trace = jobs((0, 10), (1, 2), (1, 3), (2, 12), cores=(2, 2, 3, 1))
    easy = record("easy", trace, cores=3).jobs
    conservative = record("conservative", trace, cores=3).jobs
    assert (easy[4].began, easy[3].began) == (2, 14)
    assert (conservative[4].began, conservative[3].began) == (15, 12)


def test_conservative_moves_up_when_a_job_ends_early() -> None:
    trace = jobs((0, 4), (1, 5), cores=(2, 2), estimate=(10, 5))
    assert record("conservative", trace, cores=2).jobs[2].began == 4
