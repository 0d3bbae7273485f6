"""Open a trace by its name: a file in one of the formats, or a generator's specification."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import msgspec

from hutch.errors import InvalidArgument, NotFound
from hutch.sched.traces.batsim import read_batsim
from hutch.sched.traces.generate import GENERATORS, generate
from hutch.sched.traces.swf import read_header, read_swf
from hutch.sched.traces.table import read_csv
from hutch.sched.workload import TraceJob

__all__ = ["FORMATS", "Trace", "kind_of", "open_trace"]

FORMATS = ("swf", "csv", "batsim")
_SUFFIXES = {".swf": "swf", ".csv": "csv", ".json": "batsim"}


class Trace:
    """A workload that can be read again and again, one job at a time.

    `cores` is the size of the machine that it was made for, or None if it does not say.
    After it was read, `skipped` is how many lines held jobs that never ran.
    """

    def __init__(
        self, name: str, read: Callable[[Trace], Iterable[TraceJob]], cores: int | None
    ) -> None:
        self.name = name
        self.cores = cores
        self.skipped = 0
        self._read = read
        self._changes: list[Callable[[TraceJob], TraceJob]] = []

    def __iter__(self) -> Iterator[TraceJob]:
        self.skipped = 0
        jobs = iter(self._read(self))
        for change in self._changes:
            jobs = map(change, jobs)
        return jobs

    def high_priority_first(self) -> Trace:
        """Take higher numbers for more urgent, from here on."""
        self._changes.append(lambda job: msgspec.structs.replace(job, priority=-job.priority))
        return self

    def killed_at_estimate(self) -> Trace:
        """End jobs when the user's estimate is over, as a batch system does."""
        self._changes.append(
            lambda job: (
                msgspec.structs.replace(job, runtime=job.estimate)
                if job.estimate is not None and job.estimate < job.runtime
                else job
            )
        )
        return self

    def sorted(self) -> Trace:
        """Put the jobs in order of submission. All of them are held in memory then."""
        read = self._read
        self._read = lambda trace: sorted(read(trace), key=lambda job: job.submit)
        return self


def open_trace(
    name: str,
    *,
    kind: str | None = None,
    flops: float | None = None,
    seed: int | None = None,
    cores: int | None = None,
    jobs: int | None = None,
) -> Trace:
    """Return the trace in a file, or the one that a generator makes: `lublin:jobs=1000`.

    The format is `kind` or is told by the name: `.swf`, `.csv`, `.json` (Batsim), each also
    with `.gz`. `seed`, `cores` and `jobs` are for generators whose text gives none; `flops`
    is the speed of a core, for Batsim's profiles. Raises `NotFound` for a file that is not
    there, `InvalidArgument` for what cannot be told; lines are read, and wrong ones found,
    when jobs are.
    """
    if name.partition(":")[0] in GENERATORS and not os.path.exists(name):
        made = generate(name, seed=seed, cores=cores, jobs=jobs)
        return Trace(name, lambda _: made.jobs(), made.cores)
    where = os.path.basename(name)
    kind = kind or kind_of(name)
    if kind not in FORMATS:
        raise InvalidArgument(
            f"unknown format: {kind!r}", field="format", hint=f"there are {', '.join(FORMATS)}"
        )
    if kind == "batsim":
        with _open(name) as file:
            data = file.buffer.read() if isinstance(file, io.TextIOWrapper) else b""
        size, found = read_batsim(data, where=where, flops=flops)
        return Trace(where, lambda _: found, size)
    if kind == "csv":
        return Trace(where, lambda _: read_csv(_lines(name, where), where=where), None)
    return Trace(where, lambda trace: _swf(name, where, trace), _cores(name, where))


def kind_of(name: str) -> str:
    """Return the format that a file's name tells."""
    stem = name.removesuffix(".gz")
    for suffix, kind in _SUFFIXES.items():
        if stem.endswith(suffix):
            return kind
    if not os.path.exists(name) and not os.path.splitext(stem)[1]:
        from difflib import get_close_matches

        near = get_close_matches(name.partition(":")[0], GENERATORS, 1)
        raise NotFound(
            f"no such trace: {name}",
            hint=f"did you mean the generator {near[0]}?"
            if near
            else f"name a file, or a generator: {', '.join(GENERATORS)}",
        )
    raise InvalidArgument(
        f"cannot tell the format of {name!r}",
        field="trace",
        hint="end the name in .swf, .csv or .json (also .gz), or give --format",
    )


def _open(name: str) -> IO[str]:
    try:
        raw = open(name, "rb")  # noqa: SIM115 - the caller closes what it is wrapped in
    except FileNotFoundError:
        raise NotFound(f"no such file: {name}") from None
    except OSError as exc:
        raise InvalidArgument(f"cannot be read: {exc.strerror}", field=name) from exc
    packed = raw.peek(2)[:2] == b"\x1f\x8b"
    stream = gzip.GzipFile(fileobj=raw) if packed else raw
    # Logs of the nineties hold names in other encodings, in lines that are comments.
    return io.TextIOWrapper(stream, encoding="utf-8", errors="replace")


def _lines(name: str, where: str) -> Iterator[str]:
    with _open(name) as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
            raise InvalidArgument(
                f"the compressed file is damaged: {exc}", field=where, hint="fetch it again"
            ) from exc
        except IsADirectoryError:
            raise InvalidArgument("is a directory", field=where) from None


def _swf(name: str, where: str, trace: Trace) -> Iterator[TraceJob]:
    def skip(_line: int) -> None:
        trace.skipped += 1

    return read_swf(_lines(name, where), where=where, skipped=skip)


def _cores(name: str, where: str) -> int | None:
    header = read_header(_lines(name, where))
    for key in ("MaxProcs", "MaxNodes"):
        word = header.get(key, "").split(" ")[0]
        if word.isdecimal() and int(word) > 0:
            return int(word)
    return None
