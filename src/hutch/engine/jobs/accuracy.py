"""How good the run times were that a queue foretold: measured on the jobs that were completed."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from hutch.engine.context import Context
from hutch.engine.jobs.records import DONE, JobRecord, JobState

__all__ = ["Accuracy", "KeyAccuracy", "error_of", "measure"]


class KeyAccuracy(msgspec.Struct, frozen=True, kw_only=True):
    """The same for jobs of one user, image and command."""

    owner: str
    image: str
    command: tuple[str, ...]
    jobs: int
    mean_ran_s: float
    mean_absolute_s: float
    bias_s: float


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Errors of what was foretold, in seconds: the mean of their amounts, and their mean (above
    0: foretold too long). `accuracy` is the mean of min(p/r, r/p), 1 at best; None where nothing
    was foretold. `unknown` counts completed jobs of which nothing was known; `keys` has the
    commonest first."""

    jobs: int = 0
    unknown: int = 0
    mean_absolute_s: float | None = None
    bias_s: float | None = None
    accuracy: float | None = None
    keys: tuple[KeyAccuracy, ...] = ()


def error_of(record: JobRecord) -> float | None:
    """Return by how many seconds too much was foretold of a completed job; None where nothing
    was."""
    if record.state != JobState.COMPLETED or not record.predicted_s or not record.ran_ns:
        return None
    return record.predicted_s - record.ran_ns / 1e9


def measure(context: Context, queue: str, *, most_keys: int = 20) -> Accuracy:
    """Measure what a queue foretold, on all its jobs that are not forgotten yet."""
    with context.store.read() as tx:
        ended = [record for _, record in tx.items(DONE, JobRecord)]
    return _measured((r for r in ended if r.queue == queue), most_keys)


def _measured(records: Iterable[JobRecord], most_keys: int) -> Accuracy:
    errors: list[float] = []
    ratios = 0.0
    unknown = 0
    by_key: dict[str, list[JobRecord]] = {}
    for record in records:
        error = error_of(record)
        if error is None:
            unknown += record.state == JobState.COMPLETED
            continue
        errors.append(error)
        ran = record.ran_ns / 1e9
        ratios += min(record.predicted_s / ran, ran / record.predicted_s)
        by_key.setdefault(record.key, []).append(record)
    count = len(errors)
    if not count:
        return Accuracy(unknown=unknown)
    commonest = sorted(by_key.values(), key=lambda like: (-len(like), like[0].id))
    return Accuracy(
        jobs=count,
        unknown=unknown,
        mean_absolute_s=sum(map(abs, errors)) / count,
        bias_s=sum(errors) / count,
        accuracy=ratios / count,
        keys=tuple(_of_key(like) for like in commonest[:most_keys]),
    )


def _of_key(like: list[JobRecord]) -> KeyAccuracy:
    first, count = like[0], len(like)
    errors = [record.predicted_s - record.ran_ns / 1e9 for record in like]
    return KeyAccuracy(
        owner=first.owner,
        image=first.image,
        command=first.command,
        jobs=count,
        mean_ran_s=sum(record.ran_ns for record in like) / 1e9 / count,
        mean_absolute_s=sum(map(abs, errors)) / count,
        bias_s=sum(errors) / count,
    )
