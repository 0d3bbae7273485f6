"""What is counted of jobs: room, frozen memory, choices of many."""

from __future__ import annotations

from typing import Any
from unittest.mock import ANY

import pytest

from hutch.engine.jobs import attempt
from hutch.engine.jobs.book import Book, Entry
from hutch.engine.jobs.dispatcher import Dispatcher
from hutch.engine.jobs.records import JobRecord, JobState, Selection, Slice
from hutch.engine.jobs.relief import Relief
from hutch.engine.jobs.room import fits_in, is_less
from hutch.errors import Unavailable
from hutch.sched import Capacity, Job, Phase, create

pytestmark = pytest.mark.unit


def job(number: int = 1, **values: object) -> Job:
    return Job(number, number, 0, **values)  # type: ignore[arg-type]


def record(**values: Any) -> JobRecord:
    return JobRecord(id=3, name="x", queue="q", image="i", command=(), submitted_ns=0, **values)


def test_a_job_fits_in_what_others_leave_of_everything() -> None:
    left = Capacity(cores=2, memory=100, devices={"gpu": 1, "fpga": 0})
    assert fits_in(job(cores=2, memory=100, devices=(("gpu", 1),)), left)
    assert not fits_in(job(cores=2.5), left)
    assert not fits_in(job(memory=101), left)
    assert not fits_in(job(devices=(("fpga", 1),)), left)
    assert not fits_in(job(devices=(("tpu", 1),)), left)


def test_less_of_anything_is_less() -> None:
    whole = Capacity(cores=2, memory=100, devices={"gpu": 1})
    assert not is_less(whole, whole)
    assert is_less(Capacity(cores=1, memory=200, devices={"gpu": 1}), whole)
    assert is_less(Capacity(cores=4, memory=99, devices={"gpu": 1}), whole)
    assert is_less(Capacity(cores=4, memory=200, devices={"gpu": 0}), whole)


@pytest.mark.parametrize("policy", ["srtf", "rr:quantum=1", "mlfq", "fair", "lottery", "stride"])
def test_a_job_that_finds_no_room_to_go_on_is_paused_as_before(policy: str) -> None:
    from hutch.engine.jobs.policies import QueuePolicy

    queues = object.__new__(QueuePolicy)
    queues._policy = create(policy, Capacity(cores=1))
    queues.running = 0
    paused = job(cores=1, estimate=10, phase=Phase.PAUSED, served=3, began=1)
    queues.adopt(paused, 5, paused=True)
    assert [j.id for j in queues.decide(6).start] == [1]
    queues.put_back(paused, 6)
    assert (paused.phase, paused.served, paused.began) == (Phase.PAUSED, 3, 1)
    assert (queues.running, queues.pending) == (0, 1)
    assert [j.id for j in queues.decide(7).start] == [1]
    assert queues._policy.ledger.cores == 0


@pytest.mark.parametrize("estimator", ["user", "average", "last-two"])
def test_an_estimate_that_was_outlived_is_raised_above_what_the_job_has_run(estimator: str) -> None:
    """Or the dispatcher would look at the job again and again. The policy's clock began a
    little after the record's."""
    from hutch.engine.jobs.policies import QueuePolicy
    from hutch.sched.estimators import create_estimator

    queues = object.__new__(QueuePolicy)
    queues._policy = create("srtf", Capacity(cores=1))
    queues._estimators = {"q": create_estimator(estimator)}
    queues.running = 0
    runs = job(queue="q", estimate=1, limit=1, since=10.001, phase=Phase.RUNNING)
    queues.adopt(runs, 10.001, paused=False)
    assert queues.correct(runs, 11.0, 1.0) > 1.0
    assert runs.estimate > 1.0


def test_equal_jobs_pause_nobody_at_the_times_of_real_clocks() -> None:
    """Where sums of seconds since the epoch and of estimates are rounded."""
    for n in range(200):
        policy = create("srtf", Capacity(cores=1))
        now, estimate = 1795909116.0 + n * 0.37, 0.1 + n * 0.0123
        for number in (1, 2):
            policy.submit(Job(number, number, now, estimate=estimate), now)
        decisions = policy.decide(now)
        assert [j.id for j in decisions.start] == [1] and not decisions.pause


def test_a_suspended_machine_that_finds_no_room_counts_for_no_memory() -> None:
    dispatcher: Any = object.__new__(Dispatcher)
    dispatcher._book, dispatcher._relief = Book(ANY), Relief(ANY, ANY)
    entry = Entry(record(state=JobState.STARTING, memory=100))
    dispatcher._stay_suspended(entry)
    assert entry.record.state == JobState.PREEMPTED
    assert dispatcher._relief._nominal([entry], ()) == 0


def test_whoever_waits_for_memory_hears_of_every_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("what nobody has thought of")

    monkeypatch.setattr(attempt, "load", fail)
    heard: list[attempt.Report] = []

    def hear(report: attempt.Report, *, wake: bool = True) -> None:
        heard.append(report)

    attempt.Attempt(ANY, record(attempt=1), hear).relieve()
    assert heard == [attempt.Relieved(3, 1, "", 0, 0)]
    assert "job 3: its memory stays: what nobody has thought of" in capsys.readouterr().err


def test_a_program_that_cannot_be_stopped_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise Unavailable("nobody answers")

    monkeypatch.setattr(attempt, "load", fail)
    attempt.Attempt(ANY, record(), lambda *_, **__: None).stop()
    assert "job 3 is not stopped: nobody answers" in capsys.readouterr().err


def test_a_choice_is_what_jobs_have_in_common() -> None:
    found = record(owner="ada", array=2)
    assert Selection().has(found) and Selection(queue="q", owner="ada", array=2).has(found)
    assert not Selection(queue="other").has(found)
    assert not Selection(states=(JobState.HELD,)).has(found)


def test_slices_of_an_older_store_are_read() -> None:
    from hutch.decoding import decode_json

    assert decode_json(b'[[1,2],[3,4,"paused",5]]', tuple[Slice, ...]) == (
        Slice(1, 2),
        Slice(3, 4, "paused", 5),
    )
