"""What schedules are measured by, and quantiles of long streams."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from hutch.sched.metrics import mean_execution, weighted_response
from hutch.sched.quantiles import Quantiles
from tests.sched.traces import jobs, run


def test_the_two_estimates_of_the_specification() -> None:
    assert mean_execution([6, 8, 7, 3]) == 6
    # (w + w r / s): 4 + 4·2/2, 6 + 6·6/3
    assert weighted_response([(4, 2, 2), (6, 6, 3)]) == (8 + 18) / 2
    assert math.isnan(mean_execution([]))


def test_figures_of_a_schedule_by_hand() -> None:
    # On one core: 1 from 0 to 4, 2 from 4 to 24.
    summary = run("fcfs", jobs((0, 4), (1, 20), priority=(0, 2)))
    found = summary.as_dict()
    assert found["makespan"] == 24 and found["utilisation"] == 1
    assert found["turnaround"]["mean"] == (4 + 23) / 2
    assert found["waiting"] == pytest.approx({"mean": 1.5, "median": 1.5, "p95": 2.85, "p99": 2.97})
    assert found["slowdown"]["mean"] == pytest.approx((1 + 23 / 20) / 2)
    assert found["bounded_slowdown"]["mean"] == pytest.approx((1 + 23 / 20) / 2)
    assert found["jain"] == pytest.approx(2.15**2 / (2 * (1 + 1.15**2)))
    assert found["mean_execution"] == 12
    # At submission all remains; a priority of 0 counts as 1.
    assert found["weighted_response"] == (4 + 4 * 4 + 20 + 20 * 20 / 2) / 2


def test_the_bound_of_the_slowdown_is_for_short_jobs() -> None:
    trace = jobs((0, 30), (0, 1))
    assert run("fcfs", trace).bounded_slowdown.mean == (1 + 31 / 10) / 2
    assert run("fcfs", trace, tau=1).bounded_slowdown.mean == (1 + 31) / 2
    assert run("fcfs", trace).slowdown.mean == 16


def test_a_job_without_run_time_has_no_slowdown() -> None:
    summary = run("fcfs", jobs((0, 5), (0, 0)))
    assert summary.slowdown.count == 1
    assert summary.as_dict()["jobs"] == 2


def test_makespan_begins_with_the_first_arrival() -> None:
    summary = run("fcfs", jobs((100, 5), (105, 5)))
    assert (summary.makespan, summary.utilisation) == (10, 1)


def test_nothing_has_no_figures() -> None:
    found = run("fcfs", []).as_dict()
    assert found["jobs"] == 0 and found["waiting"]["mean"] is None


def test_quantiles_of_a_long_stream_are_within_a_tenth_of_a_per_cent() -> None:
    chance = random.Random(3)
    values = [chance.lognormvariate(4, 3) if chance.random() > 0.3 else 0.0 for _ in range(60_000)]
    quantiles = Quantiles()
    for start in range(0, len(values), 4096):
        quantiles.add(values[start : start + 4096])
    assert not quantiles.exact
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (20, 50, 95, 99):
        assert quantiles.at(percent / 100)[0] == pytest.approx(cuts[percent - 1], rel=1e-3)
    assert quantiles.at(1) == [max(values)]


def test_quantiles_of_a_short_stream_are_exact() -> None:
    quantiles = Quantiles()
    quantiles.add([4, 1, 3, 2])
    assert quantiles.at(0, 0.5, 1) == [1, 2.5, 4]
