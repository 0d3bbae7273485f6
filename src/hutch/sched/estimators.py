"""How long will it run? Predictions from the user's word or from what ran before.

Used by the simulator and the live dispatcher alike: `predict` at submission, `correct` when
a job outlives its prediction, `learn` when it has ended. The user's estimate stays the
limit: no prediction is above it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Protocol

from hutch.errors import InvalidArgument
from hutch.sched.job import Job
from hutch.sched.parameters import Parameter, read_parameters

__all__ = [
    "ESTIMATORS",
    "Average",
    "Estimator",
    "Exact",
    "LastTwo",
    "Question",
    "UserEstimate",
    "create_estimator",
    "doubled",
    "raised",
]

_LEAST_STEP_S = 0.1
_MINUTES = (1, 5, 15, 30, 60, 120, 300, 600, 1200, 3000, 6000)
"""Steps of Tsafrir, Etsion and Feitelson, "Backfilling using system-generated predictions
rather than user runtime estimates", IEEE TPDS 18(6), 2007: 1 minute up to 100 hours."""


class Question(Protocol):
    """What is known of a job before it has run."""

    @property
    def estimate(self) -> float | None:
        """The user's estimate in seconds, or None."""

    @property
    def user(self) -> str: ...

    @property
    def key(self) -> str: ...


class Estimator(Protocol):
    """Foretells run times, in seconds."""

    name: ClassVar[str]

    def predict(self, job: Question) -> float:
        """Return the run time expected; infinite where nothing is known."""

    def correct(self, job: Job, ran: float) -> float:
        """Return a new estimate for a job that has run for `ran` and has not ended."""

    def learn(self, job: Job, runtime: float) -> None:
        """Note how long a job did run."""


def raised(job: Job, ran: float) -> float:
    """Return the next estimate of a job that outlived the last: a step more than it has run.

    The steps grow with each correction. While the job is below its limit, the estimate is
    never above it.
    """
    step = _MINUTES[min(job.corrections, len(_MINUTES) - 1)] * 60
    return min(ran + step, job.limit) if ran < job.limit else ran + step


def doubled(job: Job, ran: float) -> float:
    """Return the next estimate of a job that outlived the last: twice what it has run, so that
    it is expected to take as long again. While the job is below its limit, the estimate is
    never above it.

    A step of a minute would put a job behind all others that was to take a second and took
    longer by a tenth.
    """
    estimate = ran + max(ran, _LEAST_STEP_S)
    return min(estimate, job.limit) if ran < job.limit else estimate


class _Doubling:
    """Corrections that are of the size of the job; learns nothing."""

    def correct(self, job: Job, ran: float) -> float:
        return doubled(job, ran)

    def learn(self, job: Job, runtime: float) -> None:
        pass


class UserEstimate(_Doubling):
    """The user's word, unknown where there is none."""

    name: ClassVar[str] = "user"
    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def predict(self, job: Question) -> float:
        return math.inf if job.estimate is None else job.estimate


class Exact(_Doubling):
    """The true run time, which only a trace knows: what no prediction can beat."""

    name: ClassVar[str] = "exact"
    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def predict(self, job: Question) -> float:
        runtime: float = getattr(job, "runtime", math.inf)
        return runtime


class Average(_Doubling):
    """Exponential average of what jobs with the same key ran: τ' = α t + (1 − α) τ.

    Before the first, the user's estimate or `initial`. The key is the job's own, or else its
    user.
    """

    name: ClassVar[str] = "average"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "alpha": Parameter("number", 0.5, "the weight of the latest run", high=1),
        "initial": Parameter("seconds", math.inf, "what is foretold when nothing is known"),
    }

    def __init__(self, alpha: float = 0.5, initial: float = math.inf) -> None:
        self.alpha = alpha
        self.initial = initial
        self._averages: dict[str, float] = {}

    def predict(self, job: Question) -> float:
        average = self._averages.get(job.key or job.user)
        if average is None:
            return self.initial if job.estimate is None else job.estimate
        return average if job.estimate is None else min(average, job.estimate)

    def learn(self, job: Job, runtime: float) -> None:
        key = job.key or job.user
        before = self._averages.get(key, self.initial)
        if before == math.inf:
            self._averages[key] = runtime
        else:
            self._averages[key] = self.alpha * runtime + (1 - self.alpha) * before


class LastTwo:
    """The mean of the last two run times of the same user, or of the same key (`by_key`).

    Before there are any, the user's estimate or `initial`. Source: see the steps above.
    """

    name: ClassVar[str] = "last-two"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "by_key": Parameter("flag", False, "by image and command instead of by user"),
        "initial": Parameter("seconds", math.inf, "what is foretold when nothing is known"),
    }

    def __init__(self, by_key: bool = False, initial: float = math.inf) -> None:
        self.by_key = by_key
        self.initial = initial
        self._last: dict[str, tuple[float, ...]] = {}

    def predict(self, job: Question) -> float:
        last = self._last.get(job.key if self.by_key else job.user)
        limit = math.inf if job.estimate is None else job.estimate
        if last:
            return min(sum(last) / len(last), limit)
        return self.initial if job.estimate is None else limit

    def correct(self, job: Job, ran: float) -> float:
        return raised(job, ran)

    def learn(self, job: Job, runtime: float) -> None:
        key = job.key if self.by_key else job.user
        self._last[key] = (*self._last.get(key, ())[-1:], runtime)


ESTIMATORS: Mapping[str, type[UserEstimate | Exact | Average | LastTwo]] = {
    cls.name: cls for cls in (UserEstimate, Exact, Average, LastTwo)
}


def create_estimator(text: str) -> Estimator:
    """Make an estimator from `name` or `name:parameter=value,…`."""
    name, _, rest = text.strip().partition(":")
    cls = ESTIMATORS.get(name)
    if cls is None:
        raise InvalidArgument(
            f"no such estimator: {name!r}",
            field="estimator",
            hint=f"there are {', '.join(ESTIMATORS)}",
        )
    values = read_parameters(f"estimator {name}", dict(cls.parameters), rest) if rest else {}
    return cls(**values)  # type: ignore[arg-type]
