"""One build: context and Dockerfile at hand, stages in parallel, an image or files at the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.dockerfile import model
from hutch.dockerfile.lint import check_dockerfile
from hutch.dockerfile.parse import parse_dockerfile
from hutch.dockerfile.scopes import Arguments, Platform
from hutch.dockerfile.source import SourceError, excerpt
from hutch.dockerfile.stages import Plan, plan_stages
from hutch.engine.builder.cache import Cache, CacheRecord
from hutch.engine.builder.events import BuildProgress, Reporter, Step
from hutch.engine.builder.leftovers import memory_directory, sweep
from hutch.engine.builder.options import BuildOptions, check_options, check_platform
from hutch.engine.builder.sources import BuildSource, open_source
from hutch.engine.builder.sources import Context as BuildContext
from hutch.engine.builder.stage import StageState, build_stage
from hutch.engine.builder.stages import Stages
from hutch.errors import HutchError, NotFound
from hutch.image.records import ImageRecord
from hutch.oci.platform import host_platform
from hutch.oci.reference import parse
from hutch.records import ProgressEvent
from hutch.storage.faults import disk_errors
from hutch.storage.scratch import scratch_directory

if TYPE_CHECKING:
    from hutch.engine.builder.remotecache import RemoteCache
    from hutch.engine.context import Context
    from hutch.image.registry_config import Credentials
    from hutch.process.supervisor import Supervisor
    from hutch.storage.leases import Lease

__all__ = ["Build", "Cancelled", "Files", "run_build"]

_MOST_PARALLEL = 8
_LOOK_S = 0.1
_IMAGE = "docker-image://"


class Cancelled(HutchError):
    """The build was ended, or another part of it failed."""


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a stage, an image or a named context: directories topmost first, and what
    names their content."""

    chain_id: str
    lower: tuple[str, ...]


class Build:
    """What the parts of one build share. Its stages run in threads of their own."""

    keep_git_dir = False

    def __init__(
        self,
        context: Context,
        options: BuildOptions,
        reporter: Reporter,
        token: str,
        stop: threading.Event | None = None,
    ) -> None:
        self.context = context
        self.options = options
        self.reporter = reporter
        self.token = token
        self.cache = Cache(context)
        self._remote: RemoteCache | None = None
        self.now_s = options.epoch_s if options.epoch_s is not None else time.time()
        self.lease: Lease
        self.source: BuildSource
        self.dockerfile: model.Dockerfile
        self.arguments: Arguments
        self.keys: dict[str, CacheRecord] = {}
        self._name = "Dockerfile"
        self._plan: Plan
        self._held = ExitStack()
        self._stop = threading.Event()
        self._asked = stop or threading.Event()
        self._links: set[Any] = set()
        self._lock = threading.Lock()
        self._stages: Stages
        self._names: dict[str, int] = {}
        self._images: dict[str, ImageRecord] = {}
        self._given = {name.lower(): text for name, text in options.contexts.items()}
        self._contexts: dict[str, Files] = {}
        self._count = 0

    # ---- the way through --------------------------------------------------------------

    def read(self, name: str, data: bytes) -> None:
        """Take the Dockerfile and plan the stages."""
        self._name = name
        self.dockerfile = parse_dockerfile(data, name)
        self._lint()
        here = host_platform()
        platform = Platform(os=here.os, architecture=here.architecture, variant=here.variant)
        self.arguments = Arguments(
            self.options.build_args,
            build=platform,
            target=platform,
            target_stage=self.options.target,
        )
        escape = self.dockerfile.directives.escape
        try:
            for argument in self.dockerfile.arguments:
                try:
                    self.arguments.declare(argument, escape)
                except SourceError as error:
                    raise self.locate(error, argument.statement) from None
            self._plan = plan_stages(
                self.dockerfile, self.arguments, self.options.target, self._given
            )
        except SourceError as error:
            if not error.excerpt:
                error.locate(name, self.dockerfile.lines)
            raise
        self._names = {s.name: s.index for s in self.dockerfile.stages if s.name}

    @property
    def total(self) -> int:
        """How many instructions the stages have that are needed."""
        return sum(1 + len(plan.stage.instructions) for plan in self._plan.stages)

    def _lint(self) -> None:
        """Tell what the checks find; a Dockerfile may ask for that to be an error."""
        findings = check_dockerfile(self.dockerfile)
        for one in findings:
            self.reporter.warn(f"{self._name}:{one.line}: {one.rule}: {one.message}")
        if findings and self.dockerfile.directives.checks_are_errors:
            one = findings[0]
            error = SourceError(f"{one.rule}: {one.message}", first=one.line, last=one.line)
            raise error.locate(self._name, self.dockerfile.lines)

    def run(self) -> StageState:
        """Build the stages that are needed and return the last; on failure, or when it is
        interrupted, every command has ended before this raises."""
        count = self.options.parallel or min(max(os.cpu_count() or 1, 2), _MOST_PARALLEL)
        plans = self._plan.stages
        self._stages = Stages([plan.stage.index for plan in plans])
        build = {plan.stage.index: partial(build_stage, self, plan) for plan in plans}
        with self._stages.built(build, min(count, len(plans))):
            try:
                while not self._stages.wait(_LOOK_S):
                    if self._asked.is_set():
                        break
            except BaseException:
                self.cancel()
                raise
            if not self._stages.all_done:
                self.cancel()
        errors = self._stages.errors()
        if errors:
            # The failure that ended the others is the one to tell.
            raise next((e for e in errors if not isinstance(e, Cancelled)), errors[0])
        for name in self.arguments.unused():
            self.reporter.warn(f"build argument {name} was given and is not used")
        return self._stages.state(self._plan.target)

    # ---- ending early -----------------------------------------------------------------

    def cancel(self) -> None:
        """End every command that runs, and let all else end at its next look."""
        self._stop.set()
        with self._lock:
            links = list(self._links)
        for link in links:
            _shut_down(link)

    def check(self) -> None:
        """Raise `Cancelled` where the build was ended."""
        if self._stop.is_set() or self._asked.is_set():
            raise Cancelled("the build was ended")

    def checks(self) -> Iterator[bool]:
        """Yield for ever, each time after a `check`."""
        while True:
            self.check()
            yield True

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than until the build is ended."""
        self._stop.wait(seconds)

    @contextmanager
    def interrupts(self, link: Supervisor) -> Iterator[None]:
        """Let `cancel` end the command of a link."""
        with self._lock:
            self._links.add(link)
        try:
            if self._stop.is_set():
                _shut_down(link)
            yield
        finally:
            with self._lock:
                self._links.discard(link)

    # ---- what steps ask for -----------------------------------------------------------

    def locate(self, error: HutchError, statement: model.Statement) -> HutchError:
        """Return an error that tells the line of an instruction."""
        lines = self.dockerfile.lines
        if isinstance(error, Cancelled):
            return error
        if isinstance(error, SourceError):
            if not error.excerpt:
                error.first = error.first or statement.first
                error.last = max(error.last, error.first, statement.last)
                error.locate(self._name, lines)
            return error
        if statement.first and not getattr(error, "excerpt", ""):
            error.message = f"{self._name}:{statement.first}: {error.message}"
            error.args = (error.message,)
            shown = excerpt(self._name, lines, statement.first, statement.last)
            error.excerpt = shown  # type: ignore[attr-defined]
        return error

    def stage(self, index: int) -> StageState:
        """Return a stage, waited for."""
        if not self._stages.is_before(index):
            # Only an ONBUILD of a base image can: nobody knew of it when the stages were planned.
            raise SourceError(f"stage {index} is built after this one")
        while not self._stages.wait_for(index, _LOOK_S):
            self.check()
        if self._stages.has_failed(index):
            raise Cancelled("a stage that this one needs failed")
        return self._stages.state(index)

    def stage_files(self, name: str) -> Files:
        """Return the files of what COPY --from or a mount names: a stage by name or number, a
        named context, or an image, which is pulled where it is not here."""
        index = self._names.get(name.lower(), -1)
        if index < 0 and name.isascii() and name.isdigit() and len(name) < 6:
            index = int(name)
        if index in self._stages:
            state = self.stage(index)
            return self._files(state.chain_ids)
        return self.context_files(name) or self._files(self.image(name, None, "").chain_ids)

    def context_files(self, name: str) -> Files | None:
        """Return the files of a named context, None where there is none or it is an image."""
        given = self._given.get(name.lower())
        if given is None or given.startswith(_IMAGE):
            return None
        return self._named_context(name.lower(), given)

    def _files(self, chain_ids: tuple[str, ...]) -> Files:
        return Files(
            chain_id=chain_ids[-1] if chain_ids else "",
            lower=self.context.layers.lower(chain_ids),
        )

    def _named_context(self, name: str, given: str) -> Files:
        with self._lock:
            if name in self._contexts:
                return self._contexts[name]
            with open_source(self, given, dockerfile="", data=b"FROM scratch") as (source, _, _):
                directory = self._held.enter_context(self.scratch("named"))
                from hutch.engine.builder.layering import copy_tree

                # As in the main context: who owns a file here means nothing in an image.
                owner = (0, 0) if os.path.isdir(given) else None
                copy_tree(source.tree, directory, owner=owner)
                files = Files(chain_id=f"context:{source.digest('.')}", lower=(directory,))
            self._contexts[name] = files
            return files

    def image(self, reference: str, step: Step | None, platform: str) -> ImageRecord:
        """Return an image, pulled where it is not here or where that was asked for."""
        given = self._given.get(reference.lower(), "")
        reference = given.removeprefix(_IMAGE) if given else reference
        with self._lock:
            known = self._images.get(reference)
        if known is not None:
            return known

        record = self._present(reference, platform) or self._fetched(reference, step, platform)
        self.lease.add(*record.digests, *record.chain_ids)
        if not all(self.context.layers.has(chain_id) for chain_id in record.chain_ids):
            from hutch.image.unpacking import ensure_unpacked

            ensure_unpacked(record, self.context.content, self.context.layers)
        with self._lock:
            self._images[reference] = record
        return record

    def _present(self, reference: str, platform: str) -> ImageRecord | None:
        """Return an image that is here and need not be looked at closer."""
        if self.options.pull or platform or self.options.platform:
            return None
        try:
            return self.context.images.get(reference)
        except NotFound:
            return None

    def _fetched(self, reference: str, step: Step | None, platform: str) -> ImageRecord:
        from hutch.engine.create import ensure_image

        def report(event: ProgressEvent) -> None:
            self.check()
            if step is not None:
                step.progress(f"{event.item[:80]}: {event.phase}", event.done, event.total)

        return ensure_image(
            self.context,
            reference,
            pull="always" if self.options.pull else "missing",
            platform=platform or self.options.platform or None,
            credentials=self.credentials(reference),
            progress=report,
        )

    def credentials(self, reference: str) -> Credentials | None:
        """Return what was given for the registry of a reference."""
        given = self.options.credentials
        return given.get(parse(reference).domain) if given else None

    def check_platform(self, platform: str) -> None:
        """Refuse the platform of a FROM that this host does not run."""
        check_platform(platform, "FROM --platform")

    def find_cached(self, key: str, parent: str, step: Step) -> CacheRecord | None:
        """Return what a step made before, here or in a cache that was named."""
        found = self.cache.find(key, parent)
        if found is not None or not self.options.cache_from:
            return found
        from hutch.engine.builder.remotecache import RemoteCache

        with self._lock:
            if self._remote is None:
                self._remote = RemoteCache(self)
        return self._remote.find(key, parent, step)

    def used(self, key: str, record: CacheRecord) -> None:
        """Note what a step came to, for caches that are written."""
        with self._lock:
            self.keys[key] = record

    def name_of(self, chain_id: str) -> str:
        """Return what an instance of a step says of its image."""
        return f"build-{chain_id.removeprefix('sha256:')[:12] or 'scratch'}"

    def next_name(self) -> str:
        """Return the name of the next instance."""
        with self._lock:
            self._count += 1
            return f"build-{self.token[:10]}-{self._count}"

    @contextmanager
    def scratch(self, purpose: str) -> Iterator[str]:
        """Yield a new directory (0755) that is gone when the block ends."""
        with scratch_directory(
            self.context.root, self.context.trash, purpose=f"build: {purpose}"
        ) as directory:
            path = f"{directory}/files"
            os.mkdir(path, 0o755)
            os.chmod(path, 0o755)
            yield path

    @contextmanager
    def memory_directory(self) -> Iterator[str]:
        """Yield a new directory in memory, or where the host has none a private one on disk."""
        with memory_directory() as path:
            if path is not None:
                yield path
                return
            with self.scratch("secret") as directory:
                yield directory

    def close(self) -> None:
        """Let go of what the build held."""
        self._held.close()


def _shut_down(link: Supervisor) -> None:
    try:
        link.shutdown()
    except (HutchError, OSError):
        pass  # it has ended by itself


@contextmanager
def run_build(
    context: Context,
    source: BuildContext,
    options: BuildOptions,
    progress: BuildProgress,
    *,
    dockerfile_data: bytes | None = None,
    stop: threading.Event | None = None,
) -> Iterator[tuple[Build, StageState]]:
    """Build, and yield the last stage while all that it stands on is held.

    Raises `SourceError` for a Dockerfile that is wrong, `StepFailed` for a command that was.
    """
    options = check_options(options)
    reporter = Reporter(progress)
    sweep(context)
    with (
        disk_errors("build"),
        scratch_directory(context.root, context.trash, purpose="build") as place,
        context.leases.hold(purpose="build") as lease,
    ):
        build = Build(context, options, reporter, os.path.basename(place), stop)
        build.lease = _SharedLease(lease)  # type: ignore[assignment]
        build.keep_git_dir = options.build_args.get("BUILDKIT_CONTEXT_KEEP_GIT_DIR") in (
            "1",
            "true",
        )
        try:
            step = reporter.begin("[internal] load context and Dockerfile")
            with open_source(
                build, source, dockerfile=options.dockerfile or None, data=dockerfile_data
            ) as (opened, name, data):
                build.source = opened
                try:
                    build.read(name, data)
                except BaseException as error:
                    step.fail(str(error))
                    raise
                step.end(total=build.total)
                yield build, build.run()
        finally:
            build.close()


class _SharedLease:
    """A lease that several threads add to."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._lock = threading.Lock()
        self._known: set[str] = set()

    def add(self, *references: str) -> None:
        """Protect these too; what is protected already costs nothing."""
        with self._lock:
            new = [reference for reference in references if reference not in self._known]
            if new:
                self._lease.add(*new)
                self._known.update(new)
