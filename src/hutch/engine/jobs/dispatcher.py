"""The dispatcher: asks the policy which jobs run now, and makes it so on real instances.

There is one per root, whoever runs it: a thread of a program that has the engine, a process
that a submission has started, a daemon. It may be killed at any time. A job is on disk as
`starting` before its instance is made, and the instance has a name that nobody else can take;
so the next dispatcher finds what there is and goes on from it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush

from hutch.engine.context import Context
from hutch.engine.jobs.attempt import (
    Attempt,
    Ended,
    Failed,
    Report,
    Started,
    remove_instance,
)
from hutch.engine.jobs.book import Book, Entry, unmet
from hutch.engine.jobs.policies import QueuePolicy, sched_job
from hutch.engine.jobs.records import JobRequest, JobState, RequestKind
from hutch.engine.jobs.recovery import recover, remove_leftovers
from hutch.engine.jobs.wakeup import Wakeup, poke
from hutch.errors import InvalidArgument
from hutch.linux.locks import lock_file
from hutch.sched import Phase

__all__ = ["Dispatcher"]

_POLL_S = 1.0
_LEAVE_S = 10.0
_LEARNED = 1000  # ended jobs that the predictors of a new dispatcher learn from
_NOT_STARTED = 125  # what `docker run` answers where no program was started


class Dispatcher:
    """The dispatcher of one root. `cores` and `memory` (bytes) are what it gives out; by
    default what this process may use."""

    def __init__(
        self, context: Context, *, cores: float | None = None, memory: int | None = None
    ) -> None:
        self._context = context
        self._book = Book(context)
        self._queues = QueuePolicy(context, cores=cores, memory=memory)
        self._reports: deque[Report] = deque()
        self._timers: list[tuple[float, int, int]] = []
        self._pausing: set[int] = set()  # to be paused as soon as they have started
        self._deferred: list[Entry] = []  # to be started when those have been paused
        self._latest = 0.0
        self._stop = threading.Event()
        self._wakeup: Wakeup | None = None
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="hutch-jobs")

    def stop(self) -> None:
        """Let `run` return soon; jobs that run go on."""
        self._stop.set()
        if self._wakeup is not None:
            self._wakeup.wake()

    def run(
        self,
        *,
        idle_s: float | None = None,
        background: bool = False,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Dispatch until `stop`, or until there was nothing to do for `idle_s` seconds.

        One in the background makes room for another that wants to be it. Raises `Busy` where
        the root has a dispatcher that does not; calls `ready` when it is the dispatcher.
        """
        locks = self._context.root / "locks"
        with (
            lock_file(locks / "dispatch.lock", timeout_s=self._make_room(background)),
            Wakeup.open(self._context.root) as self._wakeup,
        ):
            ready()
            try:
                self._loop(self._wakeup, idle_s, background)
            finally:
                self._book.flush()
                self._workers.shutdown(wait=True)

    # ---- the loop -------------------------------------------------------------------------

    def _make_room(self, background: bool) -> float:
        """Ask a dispatcher in the background to leave; return how long to wait for it."""
        return _LEAVE_S if not background and poke(self._context.root, leave=True) else 0.0

    def _loop(self, wakeup: Wakeup, idle_s: float | None, background: bool) -> None:
        self._begin()
        last_work = time.monotonic()
        poked = True
        while not self._stop.is_set() and not (background and wakeup.asked_to_leave):
            if poked:
                self._look()
            self._take_reports()
            self._check_timers()
            self._decide()
            self._book.flush()
            if self._is_busy():
                last_work = time.monotonic()
            elif idle_s is not None and time.monotonic() - last_work >= idle_s:
                return
            poked = wakeup.wait(self._patience(idle_s)) or not self._reports

    def _is_busy(self) -> bool:
        return bool(self._reports or self._queues.pending or self._queues.running)

    def _patience(self, idle_s: float | None) -> float:
        """Return for how long nothing need be done unless somebody says so."""
        if self._reports:
            return 0.0
        until = min(_POLL_S, self._queues.wake - self._now())
        if self._timers:
            until = min(until, self._timers[0][0] - self._now())
        return until if idle_s is None else min(until, max(idle_s, 0.01))

    def _now(self) -> float:
        """Return seconds since the epoch, never going back."""
        self._latest = max(self._latest, time.time())
        return self._latest

    # ---- taking in ------------------------------------------------------------------------

    def _begin(self) -> None:
        """Take up what the dispatcher before this one left."""
        self._queues.refresh()
        self._queues.clear()
        self._learn()
        for entry in self._book.load_active():
            verdict = recover(self._context, entry.record)
            if verdict.again:
                self._book.change(
                    entry,
                    "requeue",
                    state=JobState.PENDING,
                    reason=verdict.reason,
                    attempt=entry.record.attempt - 1,
                )
                self._admit(entry)
            elif verdict.lost:
                self._conclude(entry, JobState.UNKNOWN, 0, reason=verdict.reason)
            else:
                self._take_up(entry)
        self._book.flush()
        self._workers.submit(remove_leftovers, self._context)

    def _learn(self) -> None:
        """Let the predictors know what ran before."""
        for record in self._book.load_ended(_LEARNED):
            if record.state == JobState.COMPLETED:
                self._queues.learn(record)

    def _take_up(self, entry: Entry) -> None:
        """Go on with a job whose instance there is."""
        entry.job = sched_job(entry.record)
        self._queues.adopt(entry.job, self._now(), paused=entry.record.state == JobState.PREEMPTED)
        self._launch(entry)

    def _look(self) -> None:
        """Read what others have put into the store."""
        if self._queues.refresh():
            self._rebuild()
        for entry in self._book.load_new():
            reason = self._book.block(entry)
            if reason:
                self._end(entry, JobState.CANCELLED, reason=reason)
            else:
                self._admit(entry)
        for request in self._book.take_requests():
            self._ask(request)

    def _rebuild(self) -> None:
        """Begin anew with other queues; what runs goes on."""
        self._queues.clear()
        self._learn()
        self._deferred.clear()
        for entry in list(self._book.entries.values()):
            job = entry.job
            entry.job = None
            if not entry.is_active:
                self._admit(entry)
                continue
            entry.job = sched_job(entry.record)
            if job is not None:
                entry.job.served, entry.job.since, entry.job.began = (
                    job.served, job.since, job.began,
                )  # fmt: skip
            self._queues.adopt(
                entry.job, self._now(), paused=entry.record.state == JobState.PREEMPTED
            )

    def _admit(self, entry: Entry) -> None:
        """Give a job to its policy, unless something keeps it back."""
        record = entry.record
        if record.state != JobState.PENDING or entry.blockers or entry.job is not None:
            return
        if not self._queues.is_open(record.queue):
            return
        self._book.change(
            entry,
            eligible_ns=record.eligible_ns or time.time_ns(),
            predicted_s=self._queues.predict(record),
        )
        job = sched_job(entry.record)
        try:
            self._queues.submit(job, self._now())
        except InvalidArgument as exc:
            self._book.change(entry, "hold", state=JobState.HELD, reason=str(exc))
            return
        entry.job = job

    def _ask(self, request: JobRequest) -> None:
        entry = self._book.entries.get(request.job)
        if entry is None:
            return
        match request.kind:
            case RequestKind.CANCEL:
                self._cancel(entry)
            case RequestKind.HOLD if entry.record.state == JobState.PENDING:
                self._withdraw(entry)
                self._book.change(entry, "hold", state=JobState.HELD)
            case RequestKind.RELEASE if entry.record.state == JobState.HELD:
                self._book.change(
                    entry, "release", state=JobState.PENDING, reason="", eligible_ns=0
                )
                self._admit(entry)
            case RequestKind.PRIORITY:
                self._book.change(entry, priority=request.priority)
                if entry.job is not None:
                    entry.job.priority = request.priority
                    self._queues.revise(entry.job, self._now())

    def _withdraw(self, entry: Entry) -> None:
        if entry in self._deferred:
            self._deferred.remove(entry)
        self._give_back(entry)

    def _cancel(self, entry: Entry) -> None:
        if not entry.is_active:
            self._withdraw(entry)
            self._end(entry, JobState.CANCELLED)
        else:
            self._stop_program(entry, JobState.CANCELLED)

    def _stop_program(self, entry: Entry, ending: JobState) -> None:
        """End a program; what that is called is decided when its end is reported."""
        if entry.ending is None:
            entry.ending = ending
            if entry.attempt is not None and entry.record.state != JobState.STARTING:
                self._workers.submit(entry.attempt.stop)

    # ---- what attempts report -------------------------------------------------------------

    def _hear(self, report: Report) -> None:
        """Take a report, from a thread of an attempt."""
        self._reports.append(report)
        if self._wakeup is not None:
            self._wakeup.wake()

    def _take_reports(self) -> None:
        while self._reports:
            report = self._reports.popleft()
            entry = self._book.entries.get(report.job)
            if entry is None or entry.record.attempt != report.attempt:
                continue
            match report:
                case Started():
                    self._started(entry, report)
                case Ended():
                    self._ended(entry, report)
                case Failed():
                    self._give_back(entry)
                    self._conclude(entry, JobState.FAILED, _NOT_STARTED, reason=report.reason)

    def _started(self, entry: Entry, report: Started) -> None:
        record = entry.record
        if record.state == JobState.PREEMPTED:  # taken up as it was
            return
        job = entry.job
        if job is not None and job.phase == Phase.RUNNING:
            job.since = report.time_ns / 1e9
        self._book.change(
            entry,
            "start" if record.state == JobState.STARTING else "",
            state=JobState.RUNNING,
            instance=report.instance,
            mark=record.mark or report.time_ns,
            started_ns=record.started_ns or report.time_ns,
        )
        if entry.ending is not None and entry.attempt is not None:
            self._workers.submit(entry.attempt.stop)
        elif record.id in self._pausing:
            self._pause(entry)
        self._set_timer(entry)

    def _ended(self, entry: Entry, report: Ended) -> None:
        self._book.slice(entry, report.time_ns)
        self._give_back(entry)
        if not report.known:
            state = JobState.UNKNOWN
        elif entry.ending is not None:
            state = entry.ending
        elif report.exit_code or report.oom_killed or not report.kept:
            state = JobState.FAILED
        else:
            state = JobState.COMPLETED
        self._conclude(
            entry,
            state,
            report.exit_code,
            reason=report.reason,
            finished_ns=report.time_ns,
            oom_killed=report.oom_killed,
            keep=not report.kept,
        )

    def _give_back(self, entry: Entry) -> None:
        """Tell the policy that a job has ended, or is not to run."""
        job, entry.job = entry.job, None
        if job is not None and job.phase == Phase.RUNNING:
            self._queues.finish(job, self._now())
        elif job is not None and job.phase != Phase.OUTSIDE:
            self._queues.withdraw(job, self._now())

    def _conclude(
        self,
        entry: Entry,
        state: JobState,
        exit_code: int,
        *,
        reason: str = "",
        finished_ns: int = 0,
        oom_killed: bool = False,
        keep: bool = False,
    ) -> None:
        """End an attempt: once more where the job has retries left, else for good."""
        record, attempt = entry.record, entry.attempt
        entry.attempt = None
        self._pausing.discard(record.id)
        wants_again = state in (JobState.FAILED, JobState.UNKNOWN, JobState.TIMEOUT)
        if wants_again and entry.ending != JobState.CANCELLED and record.attempt <= record.retries:
            entry.ending = None
            said = reason or f"exit code {exit_code}"
            self._book.change(
                entry,
                "retry",
                state=JobState.PENDING,
                reason=f"attempt {record.attempt}: {state}, {said}",
                instance="",
                mark=0,
                ran_ns=0,
            )
            self._admit(entry)
        else:
            self._end(
                entry,
                state,
                reason=reason,
                exit_code=exit_code,
                oom_killed=oom_killed,
                finished_ns=finished_ns,
                keeps_instance=keep,
            )
        if attempt is not None and not keep:
            self._book.flush()
            self._workers.submit(remove_instance, self._context, attempt.instance)

    def _end(self, entry: Entry, state: JobState, **changes: object) -> None:
        """Book the end of a job, and look at those that wait for it."""
        number = entry.record.id
        changes["finished_ns"] = changes.get("finished_ns") or time.time_ns()
        if state == JobState.COMPLETED:
            self._queues.learn(entry.record)
        self._book.change(entry, str(state), state=state, mark=0, **changes)
        for waiting in self._book.dependents.pop(number, ()):
            dependent = self._book.entries.get(waiting)
            if dependent is None or number not in dependent.blockers:
                continue
            dependent.blockers.discard(number)
            reason = unmet(dependent.record, number, state)
            if reason:
                self._end(dependent, JobState.CANCELLED, reason=reason)
            else:
                self._admit(dependent)

    # ---- what the policy decides ----------------------------------------------------------

    def _decide(self) -> None:
        decisions = self._queues.decide(self._now())
        for job in decisions.pause:
            self._pause(self._book.entries[int(job.id)])
        self._deferred += [self._book.entries[int(job.id)] for job in decisions.start]
        # What is to be paused as soon as it has started has its cores until then.
        if self._deferred and not self._pausing:
            chosen, self._deferred = self._deferred, []
            self._begin_all(chosen)

    def _begin_all(self, chosen: list[Entry]) -> None:
        """Start or resume jobs."""
        begun: list[Entry] = []
        for entry in chosen:
            if entry.is_active:
                self._resume(entry)
            else:
                self._prepare(entry)
                begun.append(entry)
        if begun:
            self._book.flush()  # on disk before anything is made
            for entry in begun:
                self._launch(entry)

    def _prepare(self, entry: Entry) -> None:
        self._book.change(
            entry,
            state=JobState.STARTING,
            attempt=entry.record.attempt + 1,
            boot_id=self._context.boot_id,
            reason="",
        )

    def _launch(self, entry: Entry) -> None:
        entry.attempt = Attempt(self._context, entry.record, self._hear)
        entry.attempt.begin()

    def _pause(self, entry: Entry) -> None:
        if entry in self._deferred:
            self._deferred.remove(entry)
            return
        if entry.record.state == JobState.STARTING or entry.attempt is None:
            self._pausing.add(entry.record.id)
            return
        self._pausing.discard(entry.record.id)
        if entry.attempt.pause():
            self._book.slice(entry, time.time_ns())
            self._book.change(
                entry, state=JobState.PREEMPTED, preemptions=entry.record.preemptions + 1
            )

    def _resume(self, entry: Entry) -> None:
        self._pausing.discard(entry.record.id)
        if entry.record.state != JobState.PREEMPTED or entry.attempt is None:
            return
        if entry.attempt.resume():
            self._book.change(entry, state=JobState.RUNNING, mark=time.time_ns())
            if entry.job is not None:
                entry.job.since = self._now()
            self._set_timer(entry)

    # ---- time limits and estimates ---------------------------------------------------------

    def _set_timer(self, entry: Entry) -> None:
        """Look again when the job has run as long as it may, or as it was expected to."""
        record = entry.record
        bounds = [record.timeout_s]
        if entry.job is not None and math.isfinite(entry.job.estimate):
            bounds.append(entry.job.estimate)
        for bound_s in bounds:
            if bound_s and record.mark:
                at = (record.mark - record.ran_ns) / 1e9 + bound_s
                heappush(self._timers, (at, record.id, record.attempt))

    def _check_timers(self) -> None:
        now = self._now()
        while self._timers and self._timers[0][0] <= now:
            _, number, attempt = heappop(self._timers)
            entry = self._book.entries.get(number)
            if entry is None or entry.record.attempt != attempt or not entry.record.mark:
                continue
            ran_s = (entry.record.ran_ns - entry.record.mark) / 1e9 + now
            if entry.record.timeout_s and ran_s >= entry.record.timeout_s:
                self._stop_program(entry, JobState.TIMEOUT)
            elif entry.job is not None and ran_s >= entry.job.estimate:
                self._queues.correct(entry.job, now)
                self._set_timer(entry)
