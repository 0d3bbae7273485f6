"""Measure several ways of doing one thing, side by side.

The ways take turns, so that whatever else the machine does hits all of them alike, and an
idle gap comes before each turn: some costs (joining a cgroup, synchronising a file system)
show only after one. The minimum says what a thing costs, the median what to expect.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import msgspec

__all__ = ["GAP_S", "Action", "Row", "Samples", "Skip", "measure", "render"]

GAP_S = 0.15

Action = Callable[[], float | None]
"""Does the thing once; returns the seconds it took, or None to be timed from outside."""


class Skip(Exception):
    """Raised by an action that cannot be done on this machine; says why."""


class Samples(msgspec.Struct, kw_only=True):
    """Seconds of each turn of one way, or why there are none."""

    seconds: list[float] = []
    skipped: str = ""

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Row(msgspec.Struct, kw_only=True):
    """One line of the result: a case and the samples of each way, hutch first.

    `targets` are what hutch is to reach: a peer's name with the ratio of minima, or `ms`
    with milliseconds (`median ms`: not of the minimum but of the median). `unit` is `ms`,
    `per_s` (more is better) or `kB`.
    """

    case: str
    ways: dict[str, Samples]
    targets: dict[str, float] = {}
    unit: str = "ms"

    def verdicts(self) -> list[str]:
        """Return each target with what was reached."""
        return [v for name, target in self.targets.items() if (v := self._verdict(name, target))]

    def _verdict(self, name: str, target: float) -> str:
        hutch = self.ways.get("hutch")
        if hutch is None or not hutch.seconds:
            return ""
        factor = 1000 if self.unit == "ms" else 1
        if name == f"median {self.unit}":
            value = hutch.median * factor
            text = f"{value:.4g} {name}"
        elif name == self.unit:
            value, text = hutch.minimum * factor, f"{hutch.minimum * factor:.4g} {self.unit}"
        else:
            peer = self.ways.get(name)
            if peer is None or not peer.seconds:
                return f"{name}: not measured"
            value = hutch.minimum / peer.minimum
            text = f"{value:.3g} of {name}"
        met = value >= target if self.unit == "per_s" else value <= target
        wanted = f"{'>=' if self.unit == 'per_s' else '<='} {target:.3g}"
        return f"{text} ({'met' if met else 'MISSED'}: {wanted})"


def _turn(action: Action) -> float:
    began = time.perf_counter()
    reported = action()
    elapsed = time.perf_counter() - began
    return elapsed if reported is None else reported


def measure(
    case: str,
    ways: Mapping[str, Action],
    *,
    rounds: int,
    targets: Mapping[str, float] | None = None,
    unit: str = "ms",
    warm_up: int = 1,
    gap_s: float = GAP_S,
) -> Row:
    """Let each way take `rounds` turns after `warm_up` that do not count."""
    samples = {name: Samples() for name in ways}
    for number in range(-warm_up, rounds):
        for name, action in ways.items():
            if samples[name].skipped:
                continue
            time.sleep(gap_s)
            try:
                seconds = _turn(action)
            except Skip as exc:
                samples[name].skipped = str(exc)
                continue
            except Exception as exc:  # the bench goes on with the other ways and says so
                samples[name].skipped = f"{type(exc).__name__}: {exc}"[:300]
                print(f"{case}: {name}: {samples[name].skipped}", file=sys.stderr)
                continue
            if number >= 0:
                samples[name].seconds.append(seconds)
    return Row(case=case, ways=samples, targets=dict(targets or {}), unit=unit)


def render(rows: list[Row]) -> str:
    """Return the results as text: minimum, median, the ratio to hutch, targets beneath."""
    lines = []
    for row in rows:
        lines.append(row.case)
        hutch = row.ways.get("hutch")
        factor = 1000 if row.unit == "ms" else 1
        for name, samples in row.ways.items():
            if not samples.seconds:
                lines.append(f"  {name:24} not measured: {samples.skipped}")
                continue
            ratio = ""
            if hutch is not None and hutch.seconds and name != "hutch":
                ratio = f"hutch is {hutch.minimum / samples.minimum:.3g} of it"
            lines.append(
                f"  {name:24} min {samples.minimum * factor:9.2f} {row.unit:6}"
                f" median {samples.median * factor:9.2f} {row.unit:6} {ratio}".rstrip()
            )
        lines += [f"  -> {verdict}" for verdict in row.verdicts()]
    return "\n".join(lines) + "\n"
