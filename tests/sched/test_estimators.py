"""Predictions of run times: what is foretold, how it is corrected, how far off it was."""

from __future__ import annotations

import math

import msgspec
import pytest

from hutch.errors import InvalidArgument
from hutch.sched import Job
from hutch.sched.estimators import create_estimator, doubled, raised
from hutch.sched.workload import TraceJob
from tests.sched.traces import jobs, record, run


def ran(user: str = "u", key: str = "") -> Job:
    return Job(id=1, seq=1, arrival=0, user=user, key=key)


def asked(estimate: float | None = None, user: str = "u", key: str = "") -> TraceJob:
    return TraceJob(1, 0, 50, estimate=estimate, user=user, key=key)


def test_the_exponential_average_is_that_of_the_textbook() -> None:
    # Silberschatz, figure 5.6: α = 1/2, first guess 10.
    average = create_estimator("average:initial=10")
    foretold = []
    for burst in (6, 4, 6, 4, 13, 13, 13):
        foretold.append(average.predict(asked()))
        average.learn(ran(), burst)
    assert [*foretold, average.predict(asked())] == [10, 8, 6, 6, 5, 9, 11, 12]


def test_the_average_is_kept_by_key_and_below_the_users_word() -> None:
    average = create_estimator("average")
    assert average.predict(asked(key="a")) == math.inf
    assert average.predict(asked(estimate=30, key="a")) == 30
    average.learn(ran(key="a"), 100)
    assert average.predict(asked(key="a")) == 100
    assert average.predict(asked(estimate=30, key="a")) == 30
    assert average.predict(asked(key="b")) == math.inf


def test_last_two_is_the_mean_of_the_users_last_two_run_times() -> None:
    last = create_estimator("last-two")
    assert last.predict(asked(estimate=500)) == 500
    for runtime, foretold in ((10, 10), (20, 15), (60, 40)):
        last.learn(ran(), runtime)
        assert last.predict(asked(estimate=500)) == foretold
    assert last.predict(asked(estimate=500, user="v")) == 500
    assert last.predict(asked(estimate=25)) == 25


def test_a_prediction_that_was_too_short_is_raised_step_by_step() -> None:
    job = ran()
    job.limit = 3000
    steps = []
    now = 100.0
    for _ in range(4):
        now = raised(job, now)
        steps.append(now)
        job.corrections += 1
    assert steps == [160, 460, 1360, 3000]
    assert raised(job, 3000) == 3000 + 3600


def test_an_estimate_that_was_too_short_is_doubled() -> None:
    job = ran()
    job.limit = 1000
    assert [doubled(job, now) for now in (0, 0.02, 5, 300, 600, 1000)] == [
        0.1, pytest.approx(0.12), 10, 600, 1000, 2000,
    ]  # fmt: skip


def test_no_correction_is_lost_to_rounding() -> None:
    trace = [
        msgspec.structs.replace(job, submit=job.submit / 7, runtime=0.4, estimate=0.3)
        for job in jobs(*((n, 1) for n in range(1, 400)))
    ]
    ended = record("fcfs", trace, cores=400, estimator=create_estimator("user")).jobs
    assert {job.corrections for job in ended.values()} == {1}


def test_a_job_a_little_longer_than_foretold_does_not_end_last() -> None:
    trace = jobs((0, 1.1), *((0.5, 2) for _ in range(20)), estimate=(1.0,) + 20 * (2.0,))
    seen = record("srtf", trace, estimator=create_estimator("user")).jobs
    assert seen[1].finish == pytest.approx(1.1)


def test_the_simulator_corrects_while_a_job_runs() -> None:
    # The user's jobs took 10 s; the third takes 100 and is corrected at 10 and at 70.
    trace = jobs((0, 10), (20, 10), (40, 100), user=["u"] * 3)
    third = record("easy", trace, estimator=create_estimator("last-two:initial=10")).jobs[3]
    assert third.foretold == 10
    assert third.corrections == 2 and third.estimate == 70 + 300


def test_the_error_of_predictions_is_measured() -> None:
    trace = jobs((0, 10), (0, 10), (0, 10), estimate=(20, 5, None))
    found = run("fcfs", trace, estimator=create_estimator("user")).estimates.as_dict()
    assert found == {
        "mean_absolute_error": 7.5,
        "accuracy": 0.5,
        "too_short": 0.5,
        "unknown": 1,
    }


def test_better_estimates_make_a_better_schedule() -> None:
    trace = jobs((0, 9), (0, 3), (0, 1), estimate=(1, 5, 9))
    exact = run("sjf", trace, estimator=create_estimator("exact")).waiting.mean
    assert exact < run("sjf", trace, estimator=create_estimator("user")).waiting.mean


@pytest.mark.parametrize(
    ("text", "words"),
    [("oracle", "no such estimator"), ("average:alpha=2", "alpha: must be at most 1")],
)
def test_a_wrong_estimator_is_named(text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        create_estimator(text)
