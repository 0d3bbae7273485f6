"""Policies that divide the machine: by user, by draws, by count."""

from __future__ import annotations

from collections import Counter

import pytest

from hutch.sched import Capacity, Job, create
from hutch.sched.policies.drum import Drum
from tests.sched.traces import jobs, record


def served_until(policy: str, end: float, weights: tuple[float, ...]) -> list[float]:
    """Return how long each of some endless jobs ran on one core until a time."""
    trace = jobs(*[(0, 100_000.0)] * len(weights), weight=weights)
    slices = record(policy, trace).slices
    got: Counter[str | int] = Counter()
    for who, began, ended, _ in slices:
        got[who] += max(0, min(ended, end) - began)  # type: ignore[assignment]
    return [got[n + 1] for n in range(len(weights))]


def test_stride_gives_shares_by_weight_in_every_stretch() -> None:
    for end in (600, 6000):
        first, second, third = served_until("stride:quantum=10", end, (3, 2, 1))
        assert first == pytest.approx(end / 2, abs=20)
        assert second == pytest.approx(end / 3, abs=20)
        assert third == pytest.approx(end / 6, abs=20)


def test_a_lottery_gives_shares_by_weight_in_the_long_run() -> None:
    first, second = served_until("lottery:quantum=10,seed=3", 60_000, (3, 1))
    assert first / (first + second) == pytest.approx(0.75, abs=0.03)


def test_another_seed_draws_other_lots() -> None:
    trace = jobs(*[(0, 100)] * 5)
    runs = [record(f"lottery:quantum=10,seed={seed}", trace).slices for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_drum_draws_by_weight() -> None:
    drum: Drum[str] = Drum()
    slots = {name: drum.put(name, weight) for name, weight in (("a", 1), ("b", 3), ("c", 6))}
    drawn = Counter(drum.draw((n + 0.5) / 1000)[1] for n in range(1000))
    assert drawn == {"a": 100, "b": 300, "c": 600}
    drum.remove(slots["b"])
    assert len(drum) == 2
    assert {drum.draw(n / 100)[1] for n in range(100)} == {"a", "c"}


def test_a_drum_grows() -> None:
    drum: Drum[int] = Drum()
    for n in range(100):
        drum.put(n, 1)
    assert {drum.draw((n + 0.5) / 100)[1] for n in range(100)} == set(range(100))


def test_fair_share_lets_the_user_who_had_less_go_first() -> None:
    trace = jobs(*[(0, 10)] * 4, (1, 10), user=["a", "a", "a", "a", "b"])
    order = [who for who, *_ in record("fair", trace).slices]
    assert order == [1, 5, 2, 3, 4]


def test_a_heavier_user_is_due_more() -> None:
    users = ["a", "b"] * 12
    trace = jobs(*[(0, 10)] * 24, user=users, weight=[3, 1] * 12)
    first = [users[int(who) - 1] for who, *_ in record("fair:half_life=inf", trace).slices[:12]]
    assert first.count("a") == 9


def test_a_user_does_not_take_every_core_at_once() -> None:
    trace = jobs(*[(0, 10)] * 6, user=["a", "a", "a", "a", "b", "b"])
    began = {who: job.began for who, job in record("fair", trace, cores=4).jobs.items()}
    assert [began[n] for n in (1, 2, 5, 6)] == [0, 0, 0, 0]


def job(seq: int, user: str, arrival: float) -> Job:
    return Job(id=seq, seq=seq, arrival=arrival, user=user)


def test_use_is_forgotten_by_half_and_survives_a_restart() -> None:
    start = 1.7e9  # seconds since 1970, as a dispatcher would have them
    policy = create("fair:half_life=100", Capacity())
    first = job(1, "a", start)
    policy.submit(first, start)
    policy.decide(start)
    policy.finish(first, start + 50)
    saved = policy.save()
    assert saved["used"]["a"] == pytest.approx(50, rel=0.2)
    policy = create("fair:half_life=100", Capacity())
    policy.load(saved)
    mine, other = job(2, "a", start + 60), job(3, "b", start + 61)
    policy.submit(mine, start + 60)
    policy.submit(other, start + 61)
    assert list(policy.decide(start + 61).start) == [other]


def test_a_year_of_half_lives_does_not_overflow() -> None:
    policy = create("fair:half_life=1", Capacity())
    for n in range(1, 5):
        now = n * 1e4
        each = job(n, "a", now)
        policy.submit(each, now)
        assert list(policy.decide(now).start) == [each]
        policy.finish(each, now + 3)
    assert policy.save()["used"]["a"] < 10
