"""Results of simulations as tables, JSON, CSV, pictures and a page."""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import msgspec

from hutch.cli.options import UsageError
from hutch.cli.output import print_json, table_lines
from hutch.cli.session import warn
from hutch.errors import InvalidArgument
from hutch.sched.metrics import METRICS
from hutch.sched.report.curves import cdf_picture, cdf_text
from hutch.sched.report.drawing import Picture, to_svg
from hutch.sched.report.gantt import gantt_picture, gantt_text
from hutch.sched.report.jobs import JobWriter
from hutch.sched.report.result import CSV_COLUMNS, Result, csv_cells

if TYPE_CHECKING:
    from hutch.cli.sched_run import Request
    from hutch.cli.session import Invocation

__all__ = ["Wanted", "check", "replacing", "show"]

_WHOLE = (-math.inf, math.inf)
_MOST_ROWS = 2048
_ON_A_PAGE, _ON_A_CHART = 1500, 20_000


class Wanted(msgspec.Struct, kw_only=True):
    """What is to be written, and where."""

    output: str
    per_job: str | None = None
    gantt: str | None = None
    window: tuple[float, float] | None = None
    cdf: str | None = None
    metric: str = "waiting"
    html: str | None = None
    draw: list[str] = []

    @classmethod
    def of(cls, invocation: Invocation) -> Wanted:
        """Read it from a command line."""
        options = invocation.options
        output = options.get("output") or ("json" if invocation.json else "table")
        if output not in ("table", "json", "csv"):
            raise UsageError(f"--output: expected table, json or csv, got {output!r}")
        draw = options.get("show", [])
        if wrong := [what for what in draw if what not in ("gantt", "cdf")]:
            raise UsageError(f"--show: expected gantt or cdf, got {wrong[0]!r}")
        metric = options.get("metric", "waiting")
        if metric not in METRICS:
            raise UsageError(f"--metric: no such metric: {metric!r}", hint=", ".join(METRICS))
        window = options.get("window")
        return cls(
            output=output,
            per_job=options.get("per_job"),
            gantt=options.get("gantt"),
            window=None if window is None else _window(window),
            cdf=options.get("cdf"),
            metric=metric,
            html=options.get("html"),
            draw=draw,
        )

    @property
    def curves(self) -> bool:
        """Whether points of distributions are needed."""
        return self.cdf is not None or self.html is not None or "cdf" in self.draw

    @property
    def slices(self) -> tuple[float, float] | None:
        """The window of slices that are needed; None: none are."""
        if self.gantt is None and self.html is None and "gantt" not in self.draw:
            return None
        return self.window or _WHOLE

    @property
    def most_slices(self) -> int:
        """How many are worth keeping: a page has charts of small workloads only."""
        return _ON_A_PAGE if self.gantt is None and "gantt" not in self.draw else _ON_A_CHART

    @contextmanager
    def job_writer(self, tau: float) -> Iterator[JobWriter | None]:
        """Open the file of every job's figures, if there is to be one."""
        if self.per_job is None:
            yield None
            return
        with replacing(self.per_job) as file:
            yield JobWriter(file, lines=self.per_job.endswith(".jsonl"), tau=tau)


def _window(text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        bounds = float(low or "-inf"), float(high or "inf")
    except ValueError:
        bounds = 0.0, 0.0
    if not colon or not bounds[0] < bounds[1]:
        raise UsageError(f"--window: expected FROM:TO in seconds, got {text!r}")
    return bounds


def check(wanted: Wanted, policies: int) -> None:
    """Refuse what could not be written, before anything is simulated."""
    for option, path, kinds in (
        ("gantt", wanted.gantt, (".svg", ".png")),
        ("cdf", wanted.cdf, (".svg", ".png")),
        ("html", wanted.html, (".html", ".htm")),
        ("per-job", wanted.per_job, (".csv", ".jsonl")),
    ):
        if path is None:
            continue
        if not path.endswith(kinds):
            raise UsageError(f"--{option}: expected a name in {' or '.join(kinds)}, got {path!r}")
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            raise InvalidArgument(f"no such directory: {folder}", field=option)
        if path.endswith(".png"):
            from hutch.sched.report.png import to_png

            to_png(Picture(1, 1, []))


@contextmanager
def replacing(path: str) -> Iterator[IO[str]]:
    """Open a file for writing that takes its name only once it is whole."""
    temporary = f"{path}.{os.getpid()}.new"
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(temporary, path)
    except OSError as exc:
        raise InvalidArgument(f"cannot be written: {exc.strerror}", field=path) from exc
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def show(wanted: Wanted, request: Request, results: Sequence[Result]) -> None:
    """Write everything that is wanted."""
    match wanted.output:
        case "json":
            print_json([result.figures for result in results])
        case "csv":
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(CSV_COLUMNS)
            writer.writerows(csv_cells(result) for result in results)
        case _:
            for line in _table(results):
                print(line)
    _draw_in_terminal(wanted, results)
    if wanted.gantt is not None:
        _write_gantt(wanted.gantt, request, results)
    if wanted.cdf is not None:
        curves = {result.policy: result.curve(wanted.metric) for result in results}
        _write_picture(wanted.cdf, cdf_picture(curves, wanted.metric))
    if wanted.html is not None:
        _write_page(wanted.html, request, results)


_COLUMNS = (
    ("MAKESPAN", "makespan"),
    ("UTILISATION", "utilisation"),
    ("WAITING", "waiting.mean"),
    ("P95", "waiting.p95"),
    ("TURNAROUND", "turnaround.mean"),
    ("RESPONSE", "response.mean"),
    ("SLOWDOWN", "bounded_slowdown.mean"),
    ("P95", "bounded_slowdown.p95"),
    ("FAIRNESS", "jain"),
    ("PAUSES", "preemptions"),
)


def _table(results: Sequence[Result]) -> list[str]:
    titles = ["POLICY", "JOBS", *(title for title, _ in _COLUMNS)]
    rows = [
        [r.policy, r.figures["jobs"], *(_cell(path, r.value(path)) for _, path in _COLUMNS)]
        for r in results
    ]
    lines = table_lines(titles, rows)
    guessed = [r for r in results if (r.value("estimates.accuracy") or 1) < 1]
    if guessed:
        lines += ["", *_estimates(guessed)]
    return lines


def _estimates(results: Sequence[Result]) -> list[str]:
    """Return how good the estimates were that policies were given."""
    columns = (
        ("ESTIMATES: ACCURACY", "estimates.accuracy"),
        ("MEAN ERROR", "estimates.mean_absolute_error"),
        ("TOO SHORT", "estimates.too_short"),
        ("UNKNOWN", "estimates.unknown"),
    )
    rows = [[r.policy, *(_cell(path, r.value(path)) for _, path in columns)] for r in results]
    if len({tuple(row[1:]) for row in rows}) == 1:
        rows = [["(all)", *rows[0][1:]]] if len(rows) > 1 else rows
    return table_lines(["POLICY", *(title for title, _ in columns)], rows)


def _cell(path: str, value: float | None) -> str:
    if value is None:
        return "–"
    if path in ("utilisation", "estimates.accuracy", "estimates.too_short"):
        return f"{value:.1%}"
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.3f}" if abs(value) < 1e7 else f"{value:.6g}"


def _draw_in_terminal(wanted: Wanted, results: Sequence[Result]) -> None:
    import shutil

    width = shutil.get_terminal_size((80, 24)).columns
    for what in wanted.draw:
        if what == "cdf":
            curves = {r.policy: r.curve(wanted.metric) for r in results}
            print("", *cdf_text(curves, wanted.metric, width=width), sep="\n")
            continue
        for result in results:
            print("", result.policy, *gantt_text(result.slices, width=width), sep="\n")


def _write_gantt(path: str, request: Request, results: Sequence[Result]) -> None:
    """Write a chart for each policy; of several, each under a name with its own."""
    cores = math.ceil(request.cores)
    if cores > _MOST_ROWS:
        raise InvalidArgument(f"a chart of {cores} cores would not be readable", field="gantt")
    stem, suffix = os.path.splitext(path)
    for result in results:
        if result.dropped:
            warn(
                f"{result.policy}: the chart shows the first {len(result.slices)} slices; "
                "see --window"
            )
        name = path if len(results) == 1 else f"{stem}-{_plain(result.policy)}{suffix}"
        _write_picture(name, gantt_picture(result.slices, cores, title=result.policy))


def _plain(policy: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "-" else "-" for letter in policy)


def _write_picture(path: str, picture: Picture) -> None:
    if path.endswith(".svg"):
        with replacing(path) as file:
            file.write(to_svg(picture))
        return
    from hutch.sched.report.png import to_png

    with replacing(path) as file:
        file.buffer.write(to_png(picture))  # type: ignore[attr-defined]


def _write_page(path: str, request: Request, results: Sequence[Result]) -> None:
    from hutch.sched.report.html import html_page

    settings = {}
    if request.memory is not None:
        settings["memory"] = str(request.memory)
    if request.estimator is not None:
        settings["estimator"] = request.estimator
    if request.preemption_cost:
        settings["pauses cost"] = f"{request.preemption_cost:g} s"
    page = html_page(
        results, trace=os.path.basename(request.trace), cores=request.cores, settings=settings
    )
    with replacing(path) as file:
        file.write(page)
