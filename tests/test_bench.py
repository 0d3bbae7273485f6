"""The bench's arithmetic: turns, minima, ratios, verdicts."""

from __future__ import annotations

import sys

import pytest

from bench import run as bench_run
from bench.chart import chart
from bench.measure import Action, Row, Samples, Skip, measure, render
from hutch.sched.report.drawing import Line, Rect


def row(hutch: list[float], other: list[float], unit: str = "ms", **targets: float) -> Row:
    ways = {"hutch": Samples(seconds=hutch), "peer": Samples(seconds=other)}
    return Row(case="a case", ways=ways, targets=targets, unit=unit)


def test_peers_are_installed_before_the_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """In there, apt reaches no mirror."""
    order: list[str] = []

    class Entered(Exception):
        pass

    def enter() -> None:
        raise Entered

    def install() -> list[str]:
        order.append("installed")
        return []

    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["bench.run"])
    monkeypatch.delenv("HUTCH_BENCH_INSIDE", raising=False)
    monkeypatch.setattr(bench_run, "enter_namespaces", enter)
    monkeypatch.setattr(bench_run, "install_peers", install)
    monkeypatch.setattr(bench_run, "fetch_accasim", lambda: "")
    monkeypatch.setattr(bench_run, "install_slurm", lambda: "")
    with pytest.raises(Entered):
        bench_run.main()
    assert order == ["installed"]


def test_ways_take_turns_and_warm_ups_do_not_count() -> None:
    order: list[str] = []

    def way(name: str) -> Action:
        def act() -> None:
            order.append(name)

        return act

    ways = {name: way(name) for name in ("a", "b")}
    result = measure("case", ways, rounds=2, warm_up=1, gap_s=0)
    assert order == ["a", "b"] * 3
    assert [len(s.seconds) for s in result.ways.values()] == [2, 2]


def test_an_action_may_report_its_own_time() -> None:
    result = measure("case", {"a": lambda: 7.0}, rounds=2, gap_s=0)
    assert result.ways["a"].seconds == [7.0, 7.0]


def test_a_peer_that_is_not_there_is_left_out_with_its_reason() -> None:
    def absent() -> None:
        raise Skip("not installed")

    result = measure("case", {"hutch": lambda: 1.0, "peer": absent}, rounds=2, gap_s=0)
    assert "not measured: not installed" in render([result])
    assert len(result.ways["hutch"].seconds) == 2


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (row([0.004, 0.006], [0.008], peer=0.5), "0.5 of peer (met: <= 0.5)"),
        (row([0.005], [0.008], peer=0.5), "0.625 of peer (MISSED: <= 0.5)"),
        (row([0.005], [0.008], ms=4), "5 ms (MISSED: <= 4)"),
        (row([100, 120], [10], unit="per_s", per_s=90), "100 per_s (met: >= 90)"),
        (row([100], [20], unit="per_s", peer=10), "5 of peer (MISSED: >= 10)"),
        (row([0.005], [], peer=0.5), "peer: not measured"),
    ],
)
def test_a_target_is_judged_by_the_minimum(result: Row, verdict: str) -> None:
    assert result.verdicts() == [verdict]


def test_a_chart_has_a_bar_for_each_way_that_was_measured() -> None:
    done = row([0.010, 0.012], [0.100, 0.300])
    done.ways["absent"] = Samples(skipped="not here")
    picture = chart([done, row([5, 6], [1, 2], unit="per_s")])
    bars = [shape for shape in picture.shapes if isinstance(shape, Rect)]
    assert [bar.label for bar in bars] == [
        "hutch: minimum 10 ms, median 11 ms",
        "peer: minimum 100 ms, median 200 ms",
    ]
    # Logarithmic: ten times as long is a decade more.
    lines = [shape for shape in picture.shapes if isinstance(shape, Line)]
    decades = sorted(line.points[0][0] for line in lines if len({x for x, _ in line.points}) == 1)
    assert [bar.x + bar.width for bar in bars] == pytest.approx(decades[1:])
    assert all(0 <= x <= picture.width for line in lines for x, _ in line.points)


def test_nothing_to_draw_is_told() -> None:
    with pytest.raises(ValueError, match="no case that was measured is a time"):
        chart([row([5], [1], unit="per_s"), row([], [])])
