"""The workload model of Lublin and Feitelson.

Source: U. Lublin and D. G. Feitelson, "The workload on parallel supercomputers: modeling
the characteristics of rigid jobs", Journal of Parallel and Distributed Computing 63(11),
2003. Interactive and batch jobs have parameters of their own:

- Size: serial with some probability, else 2^x with x from a two-stage uniform distribution,
  rounded to a power of two with another probability.
- Run time: e^x seconds with x from a mixture of two gamma distributions; the larger a job,
  the more often from the second, longer one.
- Arrivals: gaps of e^x seconds of the busiest hours, x from a gamma distribution; each half
  hour of the day takes its share of them, which a gamma distribution over the day gives.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import msgspec

__all__ = ["Lublin"]

_SLOTS = 48
_SLOT = 86400 / _SLOTS
# The day of the model begins at the slot where fewest jobs arrive.
_FIRST_SLOT = 11
# Longer run times (45 h) and gaps (5 days) are drawn anew.
_LONGEST, _WIDEST_GAP = 12, 13
_SAMPLE = 20_000


class _Kind(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of one kind of job, as published for a machine of 128 processors.

    `top` and `middle` are distances of the two-stage uniform's bounds from the logarithm
    of the machine's size. Pairs are shape and scale of gamma distributions.
    """

    serial: float
    power_of_two: float
    lowest: float
    middle: float
    top: float
    lower_stage: float
    short: tuple[float, float]
    long: tuple[float, float]
    short_share: tuple[float, float]
    gap: tuple[float, float]
    gap_all_day: float
    day: tuple[float, float]


_BATCH = _Kind(
    serial=0.2927,
    power_of_two=0.6686,
    lowest=1.2,
    middle=2,
    top=0,
    lower_stage=0.875,
    short=(6.57, 0.823),
    long=(639.1, 0.0156),
    short_share=(-0.003, 0.6986),
    gap=(6.0415, 0.8531),
    gap_all_day=1.0519,
    day=(6.1271, 5.2740),
)
_INTERACTIVE = _Kind(
    serial=0.1541,
    power_of_two=0.625,
    lowest=1,
    middle=4,
    top=1.5,
    lower_stage=0.705,
    short=(3.8351, 0.6605),
    long=(7.073, 0.6856),
    short_share=(-0.0118, 0.9156),
    gap=(6.5510, 0.6621),
    gap_all_day=0.9797,
    day=(8.9186, 3.6680),
)


def Lublin(values: Any) -> Iterator[tuple[int, int, int]]:
    """Yield (arrival, cores, run time) without end, in whole seconds.

    With a `load` above 0 gaps are stretched, within the daily cycle, so that the jobs ask
    for so many core-seconds in the mean; the first of them, up to 20,000, say by how much.
    """
    cores, load, seed = values["cores"], values["load"], values["seed"]
    stretch = 1.0
    if load:
        stretch = _natural_load(seed, cores, min(values["jobs"], _SAMPLE)) / load
    return _jobs(seed, cores, stretch)


def _natural_load(seed: int, cores: int, count: int) -> float:
    sample = list(islice(_jobs(seed, cores, 1), count))
    work = sum(wide * long for _, wide, long in sample)
    return work / (cores * max(sample[-1][0], 1))


def _jobs(seed: int, cores: int, stretch: float) -> Iterator[tuple[int, int, int]]:
    # Each stream has chances of its own: stretching gaps changes no job.
    kinds = ((_INTERACTIVE, "interactive"), (_BATCH, "batch"))
    arrivals = [_arrivals(random.Random(f"{seed} {n} gaps"), k, stretch) for k, n in kinds]
    draws = [_sizes_and_times(random.Random(f"{seed} {n} jobs"), k, cores) for k, n in kinds]
    upcoming = [next(a) for a in arrivals]
    while True:
        which = 1 if upcoming[1] < upcoming[0] else 0
        arrival = upcoming[which]
        upcoming[which] = next(arrivals[which])
        size, time = next(draws[which])
        yield int(arrival), size, time


def _sizes_and_times(chance: random.Random, kind: _Kind, cores: int) -> Iterator[tuple[int, int]]:
    draw, exp = chance.random, math.exp
    whole = math.log2(cores)
    high = max(whole - kind.top, 0)
    low = min(kind.lowest, high)
    middle = min(max(whole - kind.middle, low), high)
    slope, base = kind.short_share
    serial, power_of_two = kind.serial, kind.serial + kind.power_of_two
    short, long = _gamma(chance, *kind.short), _gamma(chance, *kind.long)
    while True:
        luck = draw()
        if luck <= serial:
            size = 1
        else:
            if draw() <= kind.lower_stage:
                exponent = low + (middle - low) * draw()
            else:
                exponent = middle + (high - middle) * draw()
            if luck <= power_of_two:
                exponent = int(exponent + 0.5)
            size = int(2**exponent + 0.5)
            if size > cores:
                size = cores
        log_time = short() if draw() <= slope * size + base else long()
        while log_time > _LONGEST:
            log_time = short() if draw() <= slope * size + base else long()
        yield size, int(exp(log_time))


def _arrivals(chance: random.Random, kind: _Kind, stretch: float) -> Iterator[float]:
    """Yield the times when jobs of a kind come, from midnight on."""
    exp = math.exp
    gap = _gamma(chance, kind.gap[0] * kind.gap_all_day, kind.gap[1])
    weights = _day(*kind.day)
    slot, began, points = 0, 0.0, 0.0
    while True:
        log_gap = gap()
        while log_gap > _WIDEST_GAP:
            log_gap = gap()
        # A gap of the busy hours is worth points; a slot takes as many as it is busy.
        points += exp(log_gap) * stretch / _SLOT
        while points > weights[slot]:
            points -= weights[slot]
            slot = (slot + 1) % _SLOTS
            began += _SLOT
        yield began + _SLOT * points / weights[slot]


def _gamma(chance: random.Random, shape: float, scale: float) -> Callable[[], float]:
    """Return a function that draws from a gamma distribution of a shape above 1.

    Source: Marsaglia and Tsang, "A simple method for generating gamma variables", ACM TOMS
    26(3), 2000. What depends on the shape alone is worked out once, unlike in `random`.
    """
    gauss, draw, log = chance.gauss, chance.random, math.log
    d = shape - 1 / 3
    c = 1 / math.sqrt(9 * d)

    def sample() -> float:
        while True:
            x = gauss(0, 1)
            v = 1 + c * x
            if v <= 0:
                continue
            v = v * v * v
            u = draw()
            if u < 1 - 0.0331 * x * x * x * x or log(u) < x * x / 2 + d * (1 - v + log(v)):
                return d * v * scale

    return sample


def _day(shape: float, scale: float) -> list[float]:
    """Return how busy each half hour from midnight is, 1 in the mean."""
    weights = [0.0] * _SLOTS
    for slot in range(_FIRST_SLOT, _FIRST_SLOT + _SLOTS):
        weights[(slot - 1) % _SLOTS] = _gamma_between(slot - 0.5, slot + 0.5, shape, scale)
    mean = sum(weights) / _SLOTS
    return [weight / mean for weight in weights]


def _gamma_between(low: float, high: float, shape: float, scale: float) -> float:
    """Return the probability between two bounds, by Simpson's rule; it is smooth there."""
    steps = 16
    width = (high - low) / steps
    normal = math.lgamma(shape) + shape * math.log(scale)
    total = 0.0
    for n in range(steps + 1):
        x = low + n * width
        weight = 1 if n in (0, steps) else 4 if n % 2 else 2
        total += weight * math.exp((shape - 1) * math.log(x) - x / scale - normal)
    return total * width / 3
