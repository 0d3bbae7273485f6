"""One attempt at a job: its instance from creation to exit, on a thread of its own.

The thread does what takes time and reports; what follows from it is the dispatcher's to decide
and to write down.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from hutch.engine import stop as stopping
from hutch.engine.context import Context
from hutch.engine.create import create_from_spec
from hutch.engine.files import Files
from hutch.engine.finish import CUT_SHORT, finish
from hutch.engine.jobs.records import (
    LABEL,
    SPECS,
    JobRecord,
    JobSpec,
    JobState,
    key_of,
    name_of_instance,
)
from hutch.engine.jobs.threads import Threads
from hutch.engine.lookup import load
from hutch.engine.records import NAMES, SUSPENDED, InstanceRecord, NameRecord
from hutch.engine.start import start
from hutch.errors import (
    AlreadyExists,
    HutchError,
    InternalError,
    NotFound,
    OperationTimeout,
    OutcomeUnknown,
    WrongState,
)
from hutch.image.records import IMAGES, ImageRecord
from hutch.lifecycle import State
from hutch.linux.cgroup.reclaim import reclaim, usage_of
from hutch.process.frames import ExitStatus
from hutch.process.supervisor import Supervisor, attach_flags
from hutch.resources.admission import NoRoom
from hutch.spec.model import InstanceSpec

__all__ = ["Attempt", "Ended", "Failed", "Hear", "Refused", "Relieved", "Report"]
__all__ += ["Started", "directory_of", "remove_instance", "remove_instances"]

# A link without any stream: it hears of the exit, and is in nobody's way.
_POLL_S = 0.002
# The dispatcher hears of a start later by that; a quantum is longer.
_QUICK_S = 0.02
_WATCH = attach_flags(stdin=False, stdout=False, stderr=False, lossless=True)


class Started(msgspec.Struct, frozen=True):
    """The program runs since `time_ns`, again if it was suspended."""

    job: int
    attempt: int
    instance: str
    time_ns: int


class Ended(msgspec.Struct, frozen=True):
    """The program has ended, or (`known` false) nobody can say what became of it. Its instance
    is to stay where it has what could not be `kept`."""

    job: int
    attempt: int
    exit_code: int
    time_ns: int
    oom_killed: bool = False
    known: bool = True
    kept: bool = True
    reason: str = ""


class Failed(msgspec.Struct, frozen=True):
    """No program was ever started; `exit_code` is what `docker run` answers then."""

    job: int
    attempt: int
    reason: str
    exit_code: int = 125


class Refused(msgspec.Struct, frozen=True):
    """There was no room for the instance; it was not made, or is suspended still."""

    job: int
    attempt: int
    reason: str


class Relieved(msgspec.Struct, frozen=True):
    """What could go of a frozen program's memory has gone: `then` says how (nothing where
    nothing could), `given` what that gave back, `kept` what it has yet; bytes."""

    job: int
    attempt: int
    then: str
    given: int
    kept: int


Report = Started | Ended | Failed | Refused | Relieved


class Hear(Protocol):
    """Who is told of an attempt, from its thread."""

    def __call__(self, report: Report, *, wake: bool = True) -> None:
        """Take a report; unless `wake`, another follows at once."""


def directory_of(context: Context, number: int) -> Path:
    """Return where what is kept of a job lies; it need not exist."""
    return context.root / "jobs" / key_of(number)


class Attempt:
    """The instance of a job's present attempt. `report` is called from another thread.
    `identifier` is what its instance will be called, for which room may have been taken."""

    def __init__(
        self,
        context: Context,
        job: JobRecord,
        report: Hear,
        *,
        identifier: str = "",
    ) -> None:
        self._context = context
        self._job = job
        self._report = report
        self.identifier = identifier
        self._resumed = threading.Event()
        self.instance = job.instance

    def begin(self, threads: Threads) -> None:
        """Make and start the instance, or take up the one that is there already."""
        threads.run(self._run)

    # ---- what the dispatcher asks ----------------------------------------------------------

    def pause(self) -> bool:
        """Freeze the program; False where it has just ended, or has not begun."""
        try:
            stopping.pause(self._context, self.instance)
        except (NotFound, WrongState):
            return False
        return True

    def resume(self) -> bool:
        """Let a frozen program go on; False where it has ended meanwhile."""
        try:
            stopping.unpause(self._context, self.instance)
        except (NotFound, WrongState):
            return False
        return True

    def is_suspended(self) -> bool:
        """Tell whether it is on disk, and is to be started to go on."""
        try:
            return load(self._context, self.instance).state == State.SUSPENDED
        except NotFound:
            return False

    def start_again(self) -> None:
        """Let a suspended machine go on; `Started` is reported when it does."""
        self._resumed.set()

    def relieve(self) -> None:
        """Take back what can go of a frozen program's memory, and report it."""
        then, given, kept = "", 0, 0
        try:
            record = load(self._context, self.instance)
            if record.state == State.PAUSED:
                groups = self._context.groups.hierarchy.load(record.id).directories
                kept = before = usage_of(groups)
                if self._suspend(record):
                    then, given, kept = "suspended", before, 0
                else:
                    given = reclaim(groups, before, swap=True)
                    then, kept = "reclaimed" if given else "", usage_of(groups)
        except Exception as exc:  # it has ended, or goes on as it is; who waits for this must hear
            print(f"hutch: job {self._job.id}: its memory stays: {exc}", file=sys.stderr)
        self._report(Relieved(self._job.id, self._job.attempt, then, given, kept))

    def _suspend(self, record: InstanceRecord) -> bool:
        """Write the memory of a frozen machine to disk and end it; False for what cannot be
        saved, which is frozen as before."""
        if record.spec.isolation != "vm":
            return False
        from hutch.engine.suspend import suspend

        # It runs for the moment between the two, which nobody counts.
        stopping.unpause(self._context, self.instance)
        try:
            suspend(self._context, self.instance)
        except (HutchError, OSError) as exc:
            print(f"hutch: job {self._job.id}: is not suspended: {exc}", file=sys.stderr)
            stopping.pause(self._context, self.instance)
            return False
        return True

    def stop(self, timeout_s: float | None = None) -> None:
        """Ask the program to end, then kill it; its end is reported as any other."""
        try:
            if load(self._context, self.instance).state == State.SUSPENDED:
                from hutch.engine.suspend import discard_suspended

                discard_suspended(self._context, self.instance)
                self._resumed.set()
            else:
                stopping.stop(self._context, self.instance, timeout_s=timeout_s)
        except (NotFound, WrongState, OutcomeUnknown):
            pass
        except (HutchError, OSError) as exc:
            print(f"hutch: job {self._job.id} is not stopped: {exc}", file=sys.stderr)

    # ---- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        job = self._job
        try:
            self.instance = self._find() or self._create()
            if job.state != JobState.PREEMPTED and self.is_suspended():
                self._resumed.set()  # it was to go on when the dispatcher before was killed
            followed = self._follow()
            while followed is None:
                remove_instance(self._context, self.instance)
                self.identifier = ""
                self.instance = self._create()
                followed = self._follow()
            end = self._keep(followed)
        except NoRoom as exc:
            remove_instance(self._context, self.instance)
            self._report(Refused(job.id, job.attempt, exc.decision.explain()))
        except HutchError as exc:
            # 126 or 127 where it was the program that could not be run.
            code = getattr(exc, "exit_code", 125)
            self._report(Failed(job.id, job.attempt, str(exc), code))
        except Exception as exc:  # the outer loop of a thread: a job must not stay active
            self._report(Failed(job.id, job.attempt, f"{type(exc).__name__}: {exc}"))
        else:
            self._report(end)

    def _find(self) -> str:
        """Return the instance of this attempt if a dispatcher before this one made it."""
        with self._context.store.read() as tx:
            named = tx.get(NAMES, name_of_instance(self._job), NameRecord)
        if named is None:
            return ""
        if load(self._context, named.id).spec.labels.get(LABEL) != str(self._job.id):
            raise AlreadyExists(
                f"the name {name_of_instance(self._job)!r} is taken by instance {named.id[:12]}",
                hint="rename or remove it, then submit the job again",
            )
        return named.id

    def _create(self) -> str:
        job = self._job
        with self._context.store.read() as tx:
            wanted = tx.get(SPECS, key_of(job.spec), JobSpec)
            if wanted is None:
                raise InternalError(f"the specification of job {job.id} is gone")
            image = tx.get(IMAGES, wanted.image_id, ImageRecord)
        if image is None:
            raise NotFound(f"image {job.image}: was removed meanwhile")
        record = create_from_spec(
            self._context,
            _for_job(wanted, job),
            image,
            name=name_of_instance(job),
            identifier=self.identifier,
            # An outcome that a power cut took is called unknown: nothing need be synced for it.
            volatile=job.isolation == "container",
        )
        return record.id

    def _follow(self) -> Ended | None:
        """Start the program unless it runs, and wait for its end. None for an instance whose
        start was cut short: it never ran, and it takes another (a layer that is not synced is
        mounted but once)."""
        while True:
            record = stopping.current(self._context, self.instance)
            if record.state in (State.EXITED, State.DEAD):
                return None if record.error == CUT_SHORT else self._end_of(record)
            if record.state == State.SUSPENDED:
                self._resumed.wait()
                self._resumed.clear()
                record = stopping.current(self._context, self.instance)
            try:
                link = self._link(record)
            except NoRoom as exc:
                if record.state != State.SUSPENDED:
                    raise
                job = self._job
                self._report(Refused(job.id, job.attempt, exc.decision.explain()))
                continue
            if link is None:
                continue
            with link:
                status = self._watch(link)
                if status is not None and self._goes_at_once():
                    return self._ended(status)
                booked = finish(self._context, self.instance)
            if booked is None:
                return self._lost("its instance was removed")

    def _watch(self, link: Supervisor) -> ExitStatus | None:
        """Report the start, wait for the end and return it; None where nobody knows it. Of a
        quick program both are reported at once."""
        job = self._job
        # Of a machine that is when it was switched on.
        began_ns = link.started_ns if job.isolation == "container" else 0
        started = Started(job.id, job.attempt, self.instance, began_ns or time.time_ns())
        status = None
        with suppress(OutcomeUnknown):
            try:
                status = link.wait(timeout_s=_QUICK_S)
            except OperationTimeout:
                self._report(started)
                return link.wait()
        self._report(started, wake=False)
        return status

    def _goes_at_once(self) -> bool:
        """Tell whether nothing need be known of the instance but how its program ended: the
        end is booked with its removal. One that somebody has suspended is to be started again."""
        job = self._job
        return (
            job.isolation == "container"
            and not job.outputs
            and not os.path.exists(self._context.directory(self.instance) / SUSPENDED)
        )

    def _ended(self, status: ExitStatus) -> Ended:
        job = self._job
        oom = self._context.driver("container").oom_kills(self.instance) > 0
        return Ended(job.id, job.attempt, status.code, status.time_ns, oom)

    def _link(self, record: InstanceRecord) -> Supervisor | None:
        """Start it, or join the program that runs; None where it has ended just now."""
        if record.state in (State.EXITED, State.DEAD):
            return None
        if record.state not in (State.RUNNING, State.PAUSED, State.STARTING):
            return start(self._context, self.instance, attach=_WATCH)
        try:
            return stopping.connect(self._context, record)
        except WrongState:
            time.sleep(_POLL_S)
            return None

    def _end_of(self, record: InstanceRecord) -> Ended:
        if record.error:
            return self._lost(record.error)
        job = self._job
        return Ended(job.id, job.attempt, record.exit_code, record.finished_ns, record.oom_killed)

    def _lost(self, reason: str) -> Ended:
        job = self._job
        return Ended(job.id, job.attempt, 0, time.time_ns(), known=False, reason=reason)

    def _keep(self, end: Ended) -> Ended:
        """Move the log, and copy what the job asked to keep, out of the instance."""
        job = self._job
        source = self._context.directory(self.instance)
        target = directory_of(self._context, job.id)
        names = _logs(source)
        outputs = job.outputs if end.known else ()
        if not names and not outputs:
            return end
        try:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in _logs(target):  # of an attempt before
                os.unlink(target / name)
            for name in names:
                os.rename(source / name, target / name)
            files = Files(self._context, self.instance)
            for i, path in enumerate(outputs):
                _pack(files, path, target / f"output-{i}.tar")
        except (HutchError, OSError) as exc:
            reason = f"its outputs are in instance {name_of_instance(job)} still: {exc}"
            return msgspec.structs.replace(end, kept=False, reason=reason)
        return end


def remove_instances(context: Context, identifiers: Sequence[str]) -> None:
    """Remove several, one after the other."""
    for identifier in identifiers:
        remove_instance(context, identifier)


def remove_instance(context: Context, identifier: str) -> None:
    """Remove a job's instance: what was to be kept has been, and its end is on disk."""
    if not identifier:
        return
    for pause_s in (0.05, 0.2, 1.0, 0.0):
        try:
            stopping.remove_ended(context, identifier, remove_volumes=True)
        except NotFound:
            return
        except HutchError as exc:
            if not pause_s:  # the next dispatcher tries again
                print(f"hutch: {identifier[:12]}, of a job, stays: {exc}", file=sys.stderr)
            time.sleep(pause_s)
        else:
            return


def _logs(directory: Path) -> list[str]:
    """Return the files of a log that is not empty, the rotated ones too."""
    try:
        with os.scandir(directory) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name.startswith("log")
                and entry.is_file(follow_symlinks=False)
                and entry.stat().st_size
            )
    except FileNotFoundError:
        return []


def _pack(files: Files, path: str, target: Path) -> None:
    """Write a path of the instance as a tar, whole or not at all. One that is not there is
    no error of the job: the archive is then missing."""
    partial = target.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            for piece in files.packed(path):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, target)
    except NotFound:
        partial.unlink(missing_ok=True)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _for_job(wanted: JobSpec, job: JobRecord) -> InstanceSpec:
    spec = wanted.instance
    env = [*spec.process.env, f"HUTCH_JOB_ID={job.id}", f"HUTCH_JOB_ATTEMPT={job.attempt}"]
    if job.array:
        env += [f"HUTCH_ARRAY_ID={job.array}", f"HUTCH_ARRAY_INDEX={job.index}"]
    return msgspec.structs.replace(
        spec,
        process=msgspec.structs.replace(spec.process, env=tuple(env)),
        labels={**spec.labels, LABEL: str(job.id)},
    )
