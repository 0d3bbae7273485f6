"""What programs use: `engine.jobs`, the handle of one job, and `engine.queues`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

from hutch.engine.context import Context
from hutch.engine.jobs import board, queues
from hutch.engine.jobs.records import JobRecord, JobState, QueueRecord, RequestKind, Selection
from hutch.errors import InvalidArgument, OperationTimeout
from hutch.records import Progress, silent

if TYPE_CHECKING:
    import os
    from typing import Unpack

    from hutch.engine.jobs.accuracy import Accuracy
    from hutch.engine.jobs.why import Why
    from hutch.process.logfile import LogRecord
    from hutch.sched.workload import TraceJob

__all__ = ["Job", "Jobs", "Queues"]

_POLL_FIRST_S, _POLL_MOST_S = 0.005, 0.25
_ENSURE_S = 1.0  # so often who waits sees to it that there is a dispatcher


class Chosen(TypedDict, total=False):
    """What jobs have in common that something is asked of."""

    queue: str
    owner: str
    array: int
    states: tuple[JobState, ...]


class Job:
    """The handle of one job."""

    def __init__(self, context: Context, number: int) -> None:
        self._context = context
        self.id = number

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    def info(self) -> JobRecord:
        """Describe the job as it is now."""
        return board.load_job(self._context, self.id)

    def wait(self, timeout: float | None = None) -> JobRecord:
        """Wait for its end and return its record; raise `OperationTimeout` after `timeout`
        seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        pause, ensured = _POLL_FIRST_S, -math.inf
        while True:
            record = board.load_ended(self._context, self.id)
            if record is not None:
                return record
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise OperationTimeout(f"job {self.id} has not ended after {timeout:g} s")
            if now - ensured >= _ENSURE_S:
                ensured = now
                if self.info().state.is_final:  # or it is gone: NotFound
                    continue
                board.ensure_dispatcher(self._context)
            time.sleep(pause)
            pause = min(pause * 2, _POLL_MOST_S)

    def cancel(self) -> None:
        """End it, or take it from its queue; raise `WrongState` if it has ended already."""
        board.request(self._context, self.id, RequestKind.CANCEL)

    def hold(self) -> None:
        """Keep it from being started; raise `WrongState` unless it is pending."""
        board.request(self._context, self.id, RequestKind.HOLD)

    def release(self) -> None:
        """Let a held job be started."""
        board.request(self._context, self.id, RequestKind.RELEASE)

    def set_priority(self, priority: int) -> None:
        """Change its priority; lower goes first."""
        board.request(self._context, self.id, RequestKind.PRIORITY, priority=priority)

    def why(self) -> Why:
        """Explain why it does not run (yet): what it waits for, who has what it needs."""
        from hutch.engine.jobs.why import why

        return why(self._context, self.id)

    def logs(self, *, follow: bool = False, tail: int | None = None) -> Iterator[LogRecord]:
        """Yield what its program wrote, in its last attempt; with `follow` until it ends."""
        from hutch.engine.jobs.results import job_logs

        return job_logs(self._context, self.id, follow=follow, tail=tail)

    def output(self) -> bytes:
        """Return what its program wrote to standard output."""
        return b"".join(record.data for record in self.logs() if record.stream == 1)

    def save_outputs(self, directory: str | os.PathLike[str]) -> list[str]:
        """Write the paths it was asked to keep into a directory, made if there is none; return
        their names there."""
        from hutch.engine.jobs.results import save_outputs

        return save_outputs(self._context, self.id, directory)


class Jobs:
    """The jobs of one root. They run as long as the root has a dispatcher: a process that the
    first submission starts and that ends when nothing is left to do, unless a program runs it
    by itself (`dispatching`)."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def submit(
        self,
        image: str,
        command: Sequence[str] | str | None = None,
        *,
        progress: Progress = silent,
        **options: Any,
    ) -> Job:
        """Put a job into a queue and return its handle; when it returns, the job is on disk.

        `options` are those of `Engine.run`, and: `name`, `queue` ("default"), `estimate`,
        `timeout` and `deadline` (seconds or `1h30m`; of run time, and from now), `priority`
        (lower goes first), `after` (numbers, or `7:any`), `retries`, `owner` and `group` (whose
        share it is), `outputs` (absolute paths to keep), `hold`. `cpus` (1) and `memory` are
        what it is given, and its limits.
        """
        if options.get("array") is not None:
            raise InvalidArgument("makes many jobs", field="array", hint="use submit_array")
        return self._submit(image, command, progress, options)[0]

    def submit_array(
        self,
        image: str,
        command: Sequence[str] | str | None = None,
        *,
        array: int | str | Sequence[int],
        progress: Progress = silent,
        **options: Any,
    ) -> list[Job]:
        """Put one job for each index into a queue. `HUTCH_ARRAY_INDEX` in its environment
        tells a job which it is."""
        return self._submit(image, command, progress, {**options, "array": array})

    def submit_file(
        self, data: bytes, *, source: str = "jobs", progress: Progress = silent
    ) -> list[Job]:
        """Put the jobs of a YAML specification into their queues: all of them or none."""
        from hutch.engine.jobs.specfile import read_jobs
        from hutch.engine.jobs.submit import submit

        made = submit(self._context, read_jobs(data, source=source), progress=progress)
        board.ensure_dispatcher(self._context)
        return [Job(self._context, record.id) for record in made]

    def _submit(
        self,
        image: str,
        command: Sequence[str] | str | None,
        progress: Progress,
        options: Mapping[str, Any],
    ) -> list[Job]:
        from hutch.engine.jobs.submit import Wanted, submit

        wanted = Wanted(image=image, command=command, options=options)
        made = submit(self._context, [wanted], progress=progress)
        board.ensure_dispatcher(self._context)
        return [Job(self._context, record.id) for record in made]

    def get(self, number: int) -> Job:
        """Return the handle of a job; raise `NotFound`."""
        return Job(self._context, board.load_job(self._context, number).id)

    def list(
        self,
        *,
        all: bool = False,
        queue: str | None = None,
        owner: str | None = None,
        states: Sequence[JobState] = (),
        last: int = 0,
    ) -> list[JobRecord]:
        """Return the jobs that are not over (with `all`, or where `states` says so, those too
        that are), in the order of their submission; with `last` no more than so many."""
        return board.list_jobs(
            self._context, all_states=all, queue=queue, owner=owner, states=states, last=last
        )

    def cancel(self, **of: Unpack[Chosen]) -> int:
        """End all jobs that are not over, or those of a `queue`, an `owner`, an `array` (the
        number of its first job), in `states`; return how many that were. Those that run end
        soon after."""
        return board.request_all(self._context, RequestKind.CANCEL, Selection(**of))

    def hold(self, **of: Unpack[Chosen]) -> int:
        """Keep pending jobs from being started, chosen as for `cancel`; return how many."""
        return board.request_all(self._context, RequestKind.HOLD, Selection(**of))

    def release(self, **of: Unpack[Chosen]) -> int:
        """Let held jobs be started, chosen as for `cancel`; return how many."""
        return board.request_all(self._context, RequestKind.RELEASE, Selection(**of))

    def counts(self) -> dict[tuple[str, JobState], int]:
        """Return how many jobs that are not over each queue has, by state."""
        return board.count_jobs(self._context)

    def history(self, queues: Sequence[str] = (), *, since: float = 0.0) -> Iterator[TraceJob]:
        """Return the jobs that ran to an end as a workload for `hutch.sched`; `since` in seconds
        since the epoch. Raises `NotFound` for a queue that never was."""
        from hutch.engine.jobs.history import history

        return history(self._context, queues, since_s=since)

    def prune(self, older_than: float = 0.0) -> int:
        """Forget the jobs that ended more than so many seconds ago, with what was kept of
        them; return how many."""
        return board.prune(self._context, older_than)

    def dispatch(
        self,
        *,
        cores: float | None = None,
        memory: int | None = None,
        idle: float | None = None,
        background: bool = False,
    ) -> None:
        """Be the root's dispatcher until there was nothing to do for `idle` seconds (for ever
        if None). One in the `background` makes room for another; where there is one that does
        not, raises `Busy`. `cores` and `memory` (bytes) are what is
        given out; by default what this process may use."""
        from hutch.engine.jobs.dispatcher import Dispatcher

        Dispatcher(self._context, cores=cores, memory=memory).run(
            idle_s=idle, background=background
        )

    @contextmanager
    def dispatching(
        self, *, cores: float | None = None, memory: int | None = None
    ) -> Iterator[None]:
        """Be the root's dispatcher on a thread, for the length of the block. What runs at its
        end goes on, and the next dispatcher takes it up."""
        from hutch.engine.jobs.background import on_a_thread

        with on_a_thread(self._context, cores=cores, memory=memory):
            yield


class Queues:
    """The queues of one root. `default` is made by the first job that names no other."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def create(
        self,
        name: str,
        *,
        policy: str = "fcfs",
        weight: float = 1.0,
        cpus: float = 0.0,
        predictor: str = "average",
        suspend_after: float | str = 300.0,
    ) -> QueueRecord:
        """Make a queue. `policy` is a name with parameters (`rr:quantum=0.1`), `weight` its
        share against other queues, `cpus` what its jobs may have at once (0: all), `predictor`
        how run times are foretold (`user`, `average`, `last-two`, with parameters). A virtual
        machine that was preempted is written to disk after `suspend_after` (seconds or `5m`;
        0: only where its memory is needed)."""
        return queues.create(
            self._context,
            name,
            policy=policy,
            weight=weight,
            cpus=cpus,
            predictor=predictor,
            suspend_after=suspend_after,
        )

    def update(self, name: str, **changes: Any) -> QueueRecord:
        """Change values of a queue, named as in `create`; jobs that run go on."""
        return queues.update(self._context, name, changes)

    def pause(self, name: str) -> None:
        """Start no further job of a queue."""
        queues.update(self._context, name, {"paused": True})

    def resume(self, name: str) -> None:
        """Start jobs of a queue again."""
        queues.update(self._context, name, {"paused": False})

    def get(self, name: str) -> QueueRecord:
        """Return a queue; raise `NotFound`."""
        return queues.get(self._context, name)

    def accuracy(self, name: str) -> Accuracy:
        """Measure how good the run times were that a queue foretold; raise `NotFound`."""
        from hutch.engine.jobs.accuracy import measure

        queues.get(self._context, name)
        return measure(self._context, name)

    def list(self) -> list[QueueRecord]:
        """Return the queues by name."""
        return queues.list_queues(self._context)

    def remove(self, name: str) -> None:
        """Remove a queue; raise `Busy` while jobs of it are not over."""
        queues.remove(self._context, name)
