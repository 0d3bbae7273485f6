"""Make workloads: Lublin and Feitelson's model of parallel machines, and simple ones.

The same specification and seed give the same jobs, on every machine.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, islice
from typing import Any

import msgspec

from hutch.errors import InvalidArgument
from hutch.sched.parameters import Parameter, read_parameters
from hutch.sched.traces.lublin import Lublin
from hutch.sched.workload import TraceJob

__all__ = ["GENERATORS", "Generated", "generate"]

_COMMON: dict[str, Parameter] = {
    "jobs": Parameter("count", 1000, "how many jobs", low=1),
    "cores": Parameter("count", 128, "of the machine they are for", low=1),
    "seed": Parameter("count", 1, "the same jobs for the same seed", zero=True),
    "users": Parameter("count", 16, "who submit, the first most often (Zipf)", low=1),
    "inflate": Parameter(
        "number", 0, "estimates are the run time times 1 to 1 + this; 0: no estimates", zero=True
    ),
}
_SIMPLE: dict[str, Parameter] = {
    **_COMMON,
    "mean": Parameter("seconds", 100, "of the run times"),
    "load": Parameter("number", 0.7, "core-seconds asked for, per core and second"),
    "width": Parameter("count", 1, "the most cores of a job", low=1),
}
GENERATORS: Mapping[str, tuple[str, Mapping[str, Parameter]]] = {
    "lublin": (
        "parallel jobs by the model of Lublin and Feitelson (2003), with a daily cycle",
        {
            **_COMMON,
            "load": Parameter(
                "number",
                0,
                "core-seconds asked for, per core and second; 0: the model's",
                zero=True,
            ),
        },
    ),
    "poisson": ("arrivals at random, exponential run times", _SIMPLE),
    "uniform": ("gaps and run times between 0 and twice their mean", _SIMPLE),
}
"""Name: what it makes, and its parameters."""


class Generated(msgspec.Struct, frozen=True):
    """A workload that is made anew each time it is asked for."""

    cores: int
    jobs: Callable[[], Iterator[TraceJob]]


def generate(
    text: str, *, seed: int | None = None, cores: int | None = None, jobs: int | None = None
) -> Generated:
    """Return the workload of a specification: `poisson:jobs=500,load=0.9,seed=7`.

    `seed`, `cores` and `jobs` are for where the text gives none. Raises `InvalidArgument`
    naming the parameter.
    """
    name, _, rest = text.strip().partition(":")
    if name not in GENERATORS:
        raise InvalidArgument(
            f"no such generator: {name!r}",
            field="generator",
            hint=f"there are {', '.join(GENERATORS)}",
        )
    known = dict(GENERATORS[name][1])
    given = read_parameters(f"generator {name}", known, rest) if rest else {}
    for key, value in (("seed", seed), ("cores", cores), ("jobs", jobs)):
        if value is not None:
            given.setdefault(key, value)
    values = {key: parameter.default for key, parameter in known.items()} | given
    if values.get("width", 1) > values["cores"]:
        raise InvalidArgument(
            f"is above the cores of the machine, {values['cores']}",
            field=f"generator {name}.width",
            hint="give cores=",
        )
    make = Lublin if name == "lublin" else _simple(name)
    return Generated(cores=int(values["cores"]), jobs=lambda: _jobs(make, values))


def _jobs(make: Callable[..., Iterator[tuple[int, int, int]]], values: Any) -> Iterator[TraceJob]:
    """Yield jobs of what a model makes: (arrival, cores, run time)."""
    # Users and estimates have chances of their own: asking for them changes nothing else.
    chance = random.Random(f"{values['seed']} users")
    shares = list(accumulate(1 / n for n in range(1, values["users"] + 1)))
    names = [f"u{n}" for n in range(1, values["users"] + 1)]
    draw, uniform, inflate = chance.random, chance.uniform, values["inflate"]
    made = islice(make(values), values["jobs"])
    for number, (submit, cores, runtime) in enumerate(made, 1):
        estimate = round(runtime * uniform(1, 1 + inflate)) if inflate else None
        yield TraceJob(
            number,
            submit,
            runtime,
            cores,
            0,
            estimate,
            0,
            names[bisect(shares, draw() * shares[-1])],
        )


def _simple(name: str) -> Callable[[Any], Iterator[tuple[int, int, int]]]:
    def make(values: Any) -> Iterator[tuple[int, int, int]]:
        chance = random.Random(values["seed"])
        mean, width = values["mean"], values["width"]
        gap = mean * (1 + width) / 2 / (values["load"] * values["cores"])
        draw: Callable[[float], float] = (
            (lambda m: chance.expovariate(1 / m))
            if name == "poisson"
            else (lambda m: chance.uniform(0, 2 * m))
        )
        now: float = 0
        while True:
            now += draw(gap)
            cores = chance.randint(1, width) if width > 1 else 1
            yield round(now, 3), cores, round(draw(mean), 3)  # type: ignore[misc]

    return make
