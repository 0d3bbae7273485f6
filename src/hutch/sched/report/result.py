"""A policy's figures as plain values, from a summary or from another process's JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from hutch.sched.metrics import METRICS, Summary
from hutch.sched.report.curves import Curve
from hutch.sched.report.gantt import Slice

__all__ = ["CSV_COLUMNS", "Result", "csv_cells", "result_of"]


class Result(msgspec.Struct, kw_only=True):
    """What a report shows of one policy: its figures, and points and slices for pictures."""

    figures: dict[str, Any]
    curves: dict[str, list[tuple[float, float]]] = {}
    slices: list[Slice] = []
    dropped: int = 0

    @property
    def policy(self) -> str:
        return str(self.figures["policy"])

    def curve(self, metric: str) -> Curve:
        return self.curves.get(metric, [])

    def value(self, path: str) -> float | None:
        """Return a figure by its path: `utilisation`, `waiting.p95`."""
        found: Any = self.figures
        for key in path.split("."):
            found = found[key]
        return None if found is None else float(found)


def result_of(summary: Summary, *, curves: bool = False) -> Result:
    """Return a summary's figures, with points of its distributions if asked for."""
    points = {name: getattr(summary, name).curve() for name in METRICS} if curves else {}
    return Result(figures=summary.as_dict(), curves=points)


CSV_COLUMNS = (
    "policy",
    "jobs",
    "makespan",
    "utilisation",
    *(f"{metric}.{part}" for metric in METRICS for part in ("mean", "median", "p95", "p99")),
    "jain",
    "preemptions",
    "mean_execution",
    "weighted_response",
    "missed_deadlines",
    "estimates.mean_absolute_error",
    "estimates.accuracy",
)


def csv_cells(result: Result) -> list[str | float | None]:
    """Return the cells of `CSV_COLUMNS`; empty where there is no value."""
    cells: list[str | float | None] = [result.policy]
    for path in CSV_COLUMNS[1:]:
        value = result.value(path)
        cells.append(int(value) if value is not None and value.is_integer() else value)
    return cells
