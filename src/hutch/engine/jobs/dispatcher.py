"""The dispatcher: asks the policy which jobs run now, and makes it so on real instances.

There is one per root, whoever runs it: a thread of a program that has the engine, a process
that a submission has started, a daemon. It may be killed at any time. A job is on disk as
`starting` before its instance is made, and the instance has a name that nobody else can take;
so the next dispatcher finds what there is and goes on from it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.engine.jobs.attempt import (
    Ended,
    Failed,
    Refused,
    Relieved,
    Report,
    Started,
    remove_instances,
)
from hutch.engine.jobs.book import Book, Entry, unmet
from hutch.engine.jobs.clock import Clock
from hutch.engine.jobs.policies import QueuePolicy, sched_job
from hutch.engine.jobs.records import JobRequest, JobState, RequestKind
from hutch.engine.jobs.recovery import is_frozen, recover, remove_leftovers
from hutch.engine.jobs.relief import Relief, frozen_usage
from hutch.engine.jobs.room import Room, fits_in, is_less
from hutch.engine.jobs.timers import Timers
from hutch.engine.jobs.turns import Parts, Turns
from hutch.engine.jobs.wakeup import Wakeup, poke
from hutch.errors import InvalidArgument
from hutch.linux.locks import lock_file
from hutch.sched import Capacity, Phase

if TYPE_CHECKING:
    from hutch.resources.admission import Decision

__all__ = ["Dispatcher"]

_POLL_S = 1.0
_LEAVE_S = 10.0
_RETRY_S = 5.0  # who was refused tries again, were nothing to have changed
_REASONS = 64  # so many of those that are set aside are told why, in their records
_LEARNED = 1000  # ended jobs that the predictors of a new dispatcher learn from
_NOT_STARTED = 125  # what `docker run` answers where no program was started


class Dispatcher:
    """The dispatcher of one root. `cores` and `memory` (bytes) are what it gives out; by
    default what this process may use."""

    def __init__(
        self,
        context: Context,
        *,
        cores: float | None = None,
        memory: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._context = context
        self._clock = clock or Clock()
        self._now = self._clock.now
        self._book = Book(context)
        self._room = Room(context, cores=cores, memory=memory)
        self._queues = QueuePolicy(context, self._room.now)
        self._reports: deque[Report] = deque()
        self._timers = Timers()
        self._aside: dict[int, Entry] = {}  # for which others leave no room now
        self._ended_instances: list[str] = []  # to be removed when that is on disk
        self._try_at = 0.0
        self._freed = True
        self._stop = threading.Event()
        self._wakeup: Wakeup | None = None
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="hutch-jobs")
        self._relief = Relief(context, self._workers)
        self._turns = Turns(
            Parts(context, self._book, self._queues, self._room, self._relief, self._timers),
            hear=self._hear,
            refuse=self._refuse,
            clock=self._clock,
        )

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
                self._turns.close()

    # ---- the loop -------------------------------------------------------------------------

    def _make_room(self, background: bool) -> float:
        """Ask a dispatcher in the background to leave; return how long to wait for it."""
        return _LEAVE_S if not background and poke(self._context.root, leave=True) else 0.0

    def _loop(self, wakeup: Wakeup, idle_s: float | None, background: bool) -> None:
        self._begin()
        last_work = time.monotonic()
        poked = True
        while not self._stop.is_set() and not (background and wakeup.asked_to_leave):
            if moved_ns := self._clock.moved():
                self._go_by(moved_ns)
            if poked:
                self._look()
            self._take_reports()
            self._look_for_room(asked=poked)
            self._check_timers()
            self._turns.carry_out(self._queues.decide(self._now()))
            self._book.flush()
            self._remove_ended()
            if self._is_busy():
                last_work = time.monotonic()
            elif idle_s is not None and time.monotonic() - last_work >= idle_s:
                return
            # Who was woken by reports alone need not read what others have put into the store.
            poked = wakeup.wait(self._patience(idle_s)) or not self._reports

    def _is_busy(self) -> bool:
        return bool(self._reports or self._aside or self._queues.pending or self._queues.running)

    def _patience(self, idle_s: float | None) -> float:
        """Return for how long nothing need be done unless somebody says so."""
        if self._reports:
            return 0.0
        until = min(_POLL_S, min(self._queues.wake, self._timers.next) - self._now())
        return until if idle_s is None else min(until, max(idle_s, 0.01))

    # ---- taking in ------------------------------------------------------------------------

    def _begin(self) -> None:
        """Take up what the dispatcher before this one left."""
        self._queues.refresh()
        self._queues.clear()
        self._learn()
        self._see_room()
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
        """Go on with a job whose instance there is. Whether that is frozen is the truth, and
        not what was last written: the dispatcher before may have been killed in between."""
        now_ns = self._clock.now_ns()
        frozen = is_frozen(self._context, entry.record)
        if frozen and entry.record.state != JobState.PREEMPTED:
            self._book.slice(entry, now_ns, "paused")
            self._book.change(entry, state=JobState.PREEMPTED)
        elif not frozen and entry.record.state == JobState.PREEMPTED:
            self._book.change(entry, state=JobState.RUNNING, mark=now_ns)
        entry.job = sched_job(entry.record)
        self._queues.adopt(entry.job, self._now(), paused=frozen)
        self._turns.launch(entry)
        if frozen and entry.attempt is not None:
            self._relief.paused(entry, frozen_usage(self._context, entry.attempt.instance))

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

    def _look_for_room(self, *, asked: bool) -> None:
        """See whether there is more room, or less, when something has ended or somebody asked."""
        if not (asked or self._freed or self._aside):
            return
        self._freed = False
        before = self._room.now
        if self._see_room() or (self._aside and time.monotonic() >= self._try_at):
            self._try_at = time.monotonic() + _RETRY_S
            self._set_out(before)

    def _see_room(self) -> bool:
        """Look what others leave, and tell the policy; tell whether that is another than
        before."""
        own = set()
        for entry in self._book.active.values():
            own |= {entry.record.instance, entry.identifier}
            if entry.attempt is not None:
                own.add(entry.attempt.instance)
        if not self._room.look(own):
            return False
        self._queues.resize(self._room.now, self._now())
        return True

    def _set_out(self, before: Capacity) -> None:
        """Set jobs aside that no longer fit beside what others hold, and give those to their
        policy again that may fit now."""
        aside, self._aside = self._aside, {}
        if is_less(self._room.now, before):
            for entry in self._book.entries.values():
                job = entry.job
                if job is None or entry.is_active or job.phase != Phase.QUEUED:
                    continue
                if not fits_in(job, self._room.now):
                    self._withdraw(entry)
                    self._set_aside(entry)
        for entry in aside.values():
            self._admit(entry)

    def _refuse(self, entry: Entry, decision: Decision) -> None:
        """Let a job wait that was to start, and has found no room."""
        self._give_back(entry)
        self._set_aside(entry, decision)

    def _set_aside(self, entry: Entry, decision: Decision | None = None) -> None:
        """Let a job wait until others leave more room."""
        entry.job = None
        self._aside[entry.record.id] = entry
        if decision is not None and entry.record.reason != decision.explain():
            self._book.change(entry, reason=decision.explain())

    def _rebuild(self) -> None:
        """Begin anew with other queues; what runs goes on."""
        self._queues.clear()
        self._learn()
        self._turns.clear()
        self._aside.clear()
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

    def _go_by(self, moved_ns: int) -> None:
        """Go by a clock that somebody has set, or that a sleep of the host has left behind: what
        was measured by it moves along, so that nobody has run or waited for longer."""
        for entry in self._book.entries.values():
            record, job = entry.record, entry.job
            changes = {
                name: value + moved_ns
                for name in ("mark", "eligible_ns")
                if (value := getattr(record, name))
            }
            if changes:
                self._book.change(entry, **changes)
            if job is not None:
                job.since += moved_ns / 1e9
                job.began += moved_ns / 1e9 if job.began >= 0 else 0
        self._timers.shift(moved_ns / 1e9)
        self._rebuild()

    def _admit(self, entry: Entry) -> None:
        """Give a job to its policy, unless something keeps it back."""
        record = entry.record
        if record.state != JobState.PENDING or entry.blockers or entry.job is not None:
            return
        if not self._queues.is_open(record.queue):
            return
        foretold = self._queues.predict(record)
        if not record.eligible_ns or foretold != record.predicted_s:
            eligible_ns = record.eligible_ns or self._clock.now_ns()
            self._book.change(entry, eligible_ns=eligible_ns, predicted_s=foretold)
        job = sched_job(entry.record)
        try:
            if not self._room.admit(job):
                few = len(self._aside) < _REASONS
                self._set_aside(entry, self._room.explain(record) if few else None)
                return
            self._queues.submit(job, self._now())
        except InvalidArgument as exc:
            self._book.change(entry, "hold", state=JobState.HELD, reason=str(exc))
            return
        entry.job = job

    def _ask(self, request: JobRequest) -> None:
        if request.of is not None:
            chosen = [e for e in self._book.entries.values() if request.of.has(e.record)]
            # The youngest first: no other is admitted by the end of one that is to end too.
            for entry in reversed(chosen):
                if entry.record.id in self._book.entries:
                    self._do(entry, request)
        elif (found := self._book.entries.get(request.job)) is not None:
            self._do(found, request)

    def _do(self, entry: Entry, request: JobRequest) -> None:
        match request.kind:
            case RequestKind.CANCEL:
                self._cancel(entry)
            case RequestKind.HOLD if entry.record.state == JobState.PENDING:
                self._withdraw(entry)
                self._book.change(entry, "hold", state=JobState.HELD, reason="")
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
        self._turns.forget(entry)
        self._aside.pop(entry.record.id, None)
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

    def _hear(self, report: Report, *, wake: bool = True) -> None:
        """Take a report, from a thread of an attempt."""
        self._reports.append(report)
        if wake and self._wakeup is not None:
            self._wakeup.wake()

    def _take_reports(self) -> None:
        while self._reports:
            report = self._reports.popleft()
            if isinstance(report, Relieved):
                self._relief.relieved(report.job, report.kept)
            entry = self._book.entries.get(report.job)
            if entry is None or entry.record.attempt != report.attempt:
                continue
            match report:
                case Started():
                    self._started(entry, report)
                case Ended():
                    self._ended(entry, report)
                case Refused():
                    self._refused(entry, report.reason)
                case Relieved():
                    self._relieved(entry, report)
                case Failed():
                    self._room.drop(entry.identifier)
                    self._give_back(entry)
                    self._conclude(entry, JobState.FAILED, report.exit_code, reason=report.reason)

    def _refused(self, entry: Entry, reason: str) -> None:
        """Let a job wait that has found no room for its instance after all."""
        if entry.ending is not None:
            self._give_back(entry)
            self._conclude(entry, entry.ending, _NOT_STARTED)
        elif entry.attempt is not None and entry.attempt.is_suspended():
            self._stay_suspended(entry)
        else:
            self._not_begun(entry, reason)

    def _stay_suspended(self, entry: Entry) -> None:
        self._book.change(entry, state=JobState.PREEMPTED)
        self._relief.paused(entry, 0)
        if entry.job is not None and entry.job.phase == Phase.RUNNING:
            self._queues.put_back(entry.job, self._now())

    def _not_begun(self, entry: Entry, reason: str) -> None:
        """Undo the start of a job that has no instance."""
        self._room.drop(entry.identifier)
        entry.attempt = None
        self._turns.over(entry)
        self._give_back(entry)
        self._book.change(
            entry, state=JobState.PENDING, attempt=entry.record.attempt - 1, reason=reason
        )
        self._set_aside(entry)

    def _relieved(self, entry: Entry, report: Relieved) -> None:
        """Book what was done to a job that was paused, where it still is."""
        if report.then and entry.record.state == JobState.PREEMPTED and entry.record.slices:
            self._book.amend(entry, report.then, report.given)

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
        else:
            self._turns.started(entry)
        self._timers.bound(entry)

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
        self._freed = True
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
        self._turns.over(entry)
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
            self._ended_instances.append(attempt.instance)

    def _remove_ended(self) -> None:
        """Remove instances whose end is on disk."""
        ended, self._ended_instances = self._ended_instances, []
        if ended:
            self._workers.submit(remove_instances, self._context, ended)

    def _end(
        self, entry: Entry, state: JobState, *, finished_ns: int = 0, **changes: object
    ) -> None:
        """Book the end of a job, and look at those that wait for it."""
        number = entry.record.id
        # A start is noted when it is heard of: by then a quick program has ended.
        finished_ns = max(finished_ns or self._clock.now_ns(), entry.record.started_ns)
        if state == JobState.COMPLETED:
            self._queues.learn(entry.record)
        self._book.change(
            entry, str(state), state=state, mark=0, finished_ns=finished_ns, **changes
        )
        for waiting in self._book.dependents.pop(number, ()):
            dependent = self._book.entries.get(waiting)
            if dependent is None or number not in (dependent.blockers or ()):
                continue
            dependent.blockers = (dependent.blockers or set()) - {number}
            reason = unmet(dependent.record, number, state)
            if reason:
                self._end(dependent, JobState.CANCELLED, reason=reason)
            else:
                self._admit(dependent)

    # ---- time limits and estimates ---------------------------------------------------------

    def _check_timers(self) -> None:
        now = self._now()
        for number, attempt in self._timers.due(now):
            entry = self._book.entries.get(number)
            if entry is None or entry.record.attempt != attempt:
                continue
            if entry.record.mark:
                self._check_bounds(entry, now)
            elif entry.record.state == JobState.PREEMPTED:
                self._check_waiting(entry, now)

    def _check_bounds(self, entry: Entry, now: float) -> None:
        record, job = entry.record, entry.job
        ran_s = (record.ran_ns - record.mark) / 1e9 + now
        if record.timeout_s and ran_s >= record.timeout_s:
            self._stop_program(entry, JobState.TIMEOUT)
        elif job is not None and ran_s >= job.estimate:
            self._queues.correct(job, now, ran_s)
            self._timers.bound(entry)

    def _check_waiting(self, entry: Entry, now: float) -> None:
        """Suspend a machine that has waited for long."""
        record = entry.record
        after_s = self._queues.suspends_after(record.queue)
        waited = now - record.slices[-1].end / 1e9 if record.slices else 0.0
        if record.isolation == "vm" and 0 < after_s <= waited:
            self._relief.begin(entry, awaited=False)
