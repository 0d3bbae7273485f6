"""The engine: the one object that a program needs, over one root directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hutch.engine.builder.events import BuildProgress, no_progress
from hutch.engine.context import Context
from hutch.records import Progress, silent

if TYPE_CHECKING:
    import threading
    from typing import BinaryIO, Self, Unpack

    from hutch.engine.builder.arguments import BuildArguments
    from hutch.engine.builder.cache import CachePrune
    from hutch.engine.builder.facade import BuildCacheItem, BuildResult
    from hutch.engine.builder.sources import Context as BuildContext
    from hutch.engine.disk_machines import Machines
    from hutch.engine.images import Images
    from hutch.engine.instance import Instance
    from hutch.engine.jobs.facade import Jobs, Queues
    from hutch.engine.kernels import Kernels
    from hutch.engine.migrate import Migrated
    from hutch.engine.networks import Networks
    from hutch.engine.pools import Pools
    from hutch.engine.resources import Resources
    from hutch.engine.results import (
        CheckReport,
        Completed,
        DiskUsage,
        Event,
        GcReport,
        InstanceInfo,
        PruneReport,
        ReconcileReport,
        ResetReport,
        SystemInfo,
    )
    from hutch.engine.snapshots import Snapshots
    from hutch.engine.volumes import Volumes
    from hutch.image.registry_config import RegistryConfig
    from hutch.plan.ops import Plan
    from hutch.spec.options import RunOptions
    from hutch.units import Moment

__all__ = ["Engine"]


class Engine:
    """Containers, images, networks and volumes under one root directory.

    Thread-safe; several engines, in several processes, may share a root. Closing it stops
    nothing. The default root is $HUTCH_ROOT, else /var/lib/hutch for the superuser and a
    directory beneath the user's data directory for others.
    """

    def __init__(
        self, root: str | Path | None = None, *, registry: RegistryConfig | None = None
    ) -> None:
        self._context = Context(root, registry)
        if self._context.was_rebooted():
            from hutch.engine.reconcile import after_boot

            after_boot(self._context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def root(self) -> Path:
        """The directory that holds all state."""
        return self._context.root

    @property
    def context(self) -> Context:
        """What the use cases share, for front ends that put them together in their own way."""
        return self._context

    def close(self) -> None:
        """Release what this process holds; instances go on."""
        self._context.close()

    # ---- instances ------------------------------------------------------------------------

    def run(
        self,
        image: str,
        command: Sequence[str] | str | None = None,
        *,
        input: bytes | str | None = None,
        timeout: float | None = None,
        check: bool = False,
        limit: int = 1 << 30,
        progress: Progress = silent,
        **options: Unpack[RunOptions],
    ) -> Completed:
        """Run a program in a new instance to its end and return its output and exit code.

        The instance is removed unless `remove=False`. `timeout` in seconds kills it and
        raises `OperationTimeout`; `check` raises `CommandError` for an exit code other
        than 0; more than `limit` bytes of output raise `Exhausted`.
        """
        from hutch.engine.run import run

        if input is not None:
            options["interactive"] = True
            options["stdin_once"] = True
        completed = run(
            self._context,
            image,
            command,
            input=input,
            timeout_s=timeout,
            limit=limit,
            progress=progress,
            options=dict(options),
        )
        if check and completed.exit_code != 0:
            from hutch.engine.results import CommandError
            from hutch.engine.session import join_command

            raise CommandError(completed, join_command(command or image))
        return completed

    def build(
        self,
        context: BuildContext = ".",
        *,
        dockerfile: str | None = None,
        dockerfile_data: bytes | None = None,
        outputs: Sequence[str] = (),
        stream: BinaryIO | None = None,
        stop: threading.Event | None = None,
        progress: BuildProgress = no_progress,
        **options: Unpack[BuildArguments],
    ) -> BuildResult:
        """Build an image from a Dockerfile and return it.

        `context` is a directory, a tar archive (a path, bytes or an open stream), a URL or a
        git repository (`URL#REF:DIRECTORY`). `dockerfile` names the Dockerfile,
        `dockerfile_data` gives its content. `outputs` are as `--output` has them
        (`type=local,dest=DIR`); `stream` takes what goes to `-`. Setting `stop` ends the build
        and its commands. `progress` is told what happens, from several threads, one event at a
        time. Raises
        `hutch.dockerfile.SourceError` with the line and an excerpt, and
        `hutch.dockerfile.StepFailed` where a command fails; no command runs on then.
        """
        from hutch.engine.builder.arguments import read_options
        from hutch.engine.builder.facade import build_image

        return build_image(
            self._context,
            context,
            read_options(dockerfile, options),
            progress,
            dockerfile_data=dockerfile_data,
            outputs=outputs,
            stream=stream,
            stop=stop,
        )

    def create(
        self,
        image: str,
        command: Sequence[str] | str | None = None,
        *,
        progress: Progress = silent,
        **options: Unpack[RunOptions],
    ) -> Instance:
        """Create an instance without starting it."""
        return self._create(image, command, progress, dict(options))

    def _create(
        self,
        image: str,
        command: Sequence[str] | str | None,
        progress: Progress,
        options: dict[str, Any],
    ) -> Instance:
        from hutch.engine.create import create
        from hutch.engine.instance import Instance

        record = create(
            self._context,
            image,
            command,
            name=options.pop("name", None),
            pull=options.pop("pull", None) or "missing",
            platform=options.pop("platform", None),
            progress=progress,
            options=options,
        )
        return Instance(self._context, record.id, record.name)

    def start(
        self,
        image: str,
        command: Sequence[str] | str | None = None,
        *,
        progress: Progress = silent,
        **options: Unpack[RunOptions],
    ) -> Instance:
        """Create an instance and start it. As a context manager it is removed at the end."""
        instance = self._create(image, command, progress, dict(options))
        try:
            instance.start(progress=progress)
        except BaseException:
            instance.remove(force=True, volumes=True)
            raise
        return instance

    def get(self, name_or_id: str) -> Instance:
        """Return the handle of an instance by name, identifier or unique prefix of it."""
        from hutch.engine.instance import Instance
        from hutch.engine.lookup import find_id, load

        identifier = find_id(self._context, name_or_id)
        return Instance(self._context, identifier, load(self._context, identifier).name)

    def list(
        self, *, all: bool = False, filters: Mapping[str, Sequence[str]] | None = None
    ) -> list[InstanceInfo]:
        """Describe the instances that run (with `all`, every one), newest first."""
        from hutch.engine.listing import list_instances

        return list_instances(self._context, all_states=all, filters=filters)

    def plan(self, name_or_id: str) -> Plan:
        """Return what a start of the instance would execute; nothing is done."""
        from hutch.engine.lookup import find_id
        from hutch.engine.start import plan

        return plan(self._context, find_id(self._context, name_or_id))

    def machine_arguments(self, name_or_id: str) -> tuple[str, ...]:
        """Return QEMU's argument list for a virtual machine that boots by itself; of its
        network, which only a start makes, nothing is in it. Empty for a container."""
        from hutch.engine.lookup import find_id
        from hutch.engine.start import machine_arguments

        return machine_arguments(self._context, find_id(self._context, name_or_id))

    def after_exit(self, identifier: str) -> None:
        """Do what follows an exit that nobody waited for: book it, restart, remove.

        Supervisors call this through the hidden command `hutch _exited`.
        """
        from hutch.engine.after import after_exit

        after_exit(self._context, identifier)

    def prepare_template(self, key: str) -> None:
        """Make the template of an image for the virtual machines to come.

        A start calls this through the hidden command `hutch _template`.
        """
        self._context.machines.prepare_template(key)

    def migrate(
        self,
        name_or_id: str,
        destination: str,
        *,
        with_volumes: bool = False,
        bandwidth: int | str = 0,
        downtime_s: float = 0.3,
        timeout_s: float | None = None,
        post_copy: bool = False,
        parallel: int = 0,
        compress: bool = False,
        progress: Progress = silent,
    ) -> Migrated:
        """Move an instance to another hutch: `ssh://[USER@]HOST[/ROOT]`, `tls://HOST`,
        `unix://PATH` or `exec:COMMAND`.

        A machine that runs is copied while it runs and then stands still for about
        `downtime_s`; where its QEMU cannot do that (`Migrated.way` tells), it is stopped for
        as long as its memory is sent. It is slowed down where it writes faster than it is
        copied; after `timeout_s` it is left here. With `post_copy` it goes on there when its
        memory was sent once, and fetches the rest: a link that breaks then loses it.
        `parallel` is a number of further streams for its memory, which `compress` compresses.

        On any other failure the instance stays here as it was; `OutcomeUnknown` where the link
        is lost after it was given away. `with_volumes` sends named volumes too; `bandwidth` is
        bytes a second.
        """
        from hutch.drivers.moving import Streams
        from hutch.engine.lookup import find_id
        from hutch.engine.migrate import LiveOptions, migrate
        from hutch.engine.migrate_live import check_streams
        from hutch.units import parse_bytes

        streams = Streams(
            post_copy=post_copy, channels=parallel or int(compress), compress=compress
        )
        check_streams(streams, downtime_s, timeout_s)
        return migrate(
            self._context,
            find_id(self._context, name_or_id),
            destination,
            with_volumes=with_volumes,
            live=LiveOptions(
                streams=streams,
                downtime_s=downtime_s,
                timeout_s=timeout_s,
                bandwidth=parse_bytes(bandwidth) if isinstance(bandwidth, str) else bandwidth,
            ),
            required="post_copy" if post_copy else "parallel" if streams.channels else "",
            progress=progress,
        )

    def serve_migration(self, read_fd: int, write_fd: int) -> None:
        """Take in what another hutch migrates here, over two descriptors, until it has closed
        the link. The hidden command `hutch _migrate_target` does it with stdin and stdout."""
        from hutch.engine.migrate_receive import serve

        serve(self._context, read_fd, write_fd)

    def serve_migrations(
        self,
        listen: str = ":7443",
        *,
        certificates: str = "",
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take migrations in by TLS at `HOST:PORT` until interrupted.

        `certificates` is a directory with `ca.pem`, `cert.pem` and `key.pem`, by default the
        root's `tls`. `tell` is called with a line where it listens and of whom it refused.
        """
        from hutch.engine.migrate_serve import serve_tls

        serve_tls(self._context, listen, certificates, tell=tell)

    def claim_migration(self, name_or_id: str) -> Instance:
        """Make an instance that a migration left inert this root's, without asking the other
        side: for when that is lost for good."""
        from hutch.engine.instance import Instance
        from hutch.engine.migrate_settle import claim

        record = claim(self._context, name_or_id)
        return Instance(self._context, record.id, record.name)

    # ---- the rest ---------------------------------------------------------------------------

    @cached_property
    def images(self) -> Images:
        """The images of this root."""
        from hutch.engine.images import Images

        return Images(self._context)

    @cached_property
    def kernels(self) -> Kernels:
        """The guest kernels of this root."""
        from hutch.engine.kernels import Kernels

        return Kernels(self._context)

    @cached_property
    def machines(self) -> Machines:
        """Virtual machines that start from a disk of their own."""
        from hutch.engine.disk_machines import Machines

        return Machines(self._context)

    @cached_property
    def networks(self) -> Networks:
        """The networks of this root."""
        from hutch.engine.networks import Networks

        return Networks(self._context)

    @cached_property
    def resources(self) -> Resources:
        """What the host has, who holds it, and what there is room for."""
        from hutch.engine.resources import Resources

        return Resources(self._context)

    @cached_property
    def snapshots(self) -> Snapshots:
        """The snapshots of virtual machines."""
        from hutch.engine.snapshots import Snapshots

        return Snapshots(self._context)

    @cached_property
    def jobs(self) -> Jobs:
        """The jobs of this root: submitted, scheduled by a policy, run to their end."""
        from hutch.engine.jobs.facade import Jobs

        return Jobs(self._context)

    @cached_property
    def queues(self) -> Queues:
        """The queues that jobs wait in."""
        from hutch.engine.jobs.facade import Queues

        return Queues(self._context)

    @cached_property
    def pools(self) -> Pools:
        """The storage pools of this root."""
        from hutch.engine.pools import Pools

        return Pools(self._context)

    @cached_property
    def volumes(self) -> Volumes:
        """The volumes of this root."""
        from hutch.engine.volumes import Volumes

        return Volumes(self._context)

    def events(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        filters: Mapping[str, Sequence[str]] | None = None,
        follow: bool = True,
    ) -> Iterator[Event]:
        """Yield events of this root, those of other processes included."""
        from hutch.engine.events import events

        return events(self._context, since=since, until=until, filters=filters, follow=follow)

    def df(self) -> DiskUsage:
        """Measure what the root holds on disk."""
        from hutch.engine.system import df

        return df(self._context)

    def gc(
        self,
        *,
        watermark: float | None = None,
        low: float | None = None,
        older_than: float | None = None,
        dry_run: bool = False,
    ) -> GcReport:
        """Free what nothing names and what dead processes left, and let pools give back what
        they do not use.

        With `older_than` (seconds) images go that no instance has used for so long. With
        `watermark` (percent of the root's disk) images that no instance uses go when it is
        fuller than that, those used longest ago first, until it is less full than `low`
        (5 below, by default). Both together: the old ones, as far as is needed. Instances,
        volumes and snapshots are never touched.
        """
        from hutch.engine.gc import collect

        return collect(
            self._context, watermark=watermark, low=low, older_than_s=older_than, dry_run=dry_run
        )

    def prune(
        self,
        *,
        all_images: bool = False,
        volumes: bool = False,
        filters: Mapping[str, Sequence[str]] | None = None,
    ) -> PruneReport:
        """Remove stopped instances, unused networks and dangling images; with `all_images`
        every unused image and every unused guest kernel but the one added last, with
        `volumes` unused anonymous volumes."""
        from hutch.engine.system import prune

        return prune(self._context, all_images=all_images, volumes=volumes, filters=filters)

    def reset(self, *, progress: Progress = silent) -> ResetReport:
        """Give the root up: end and remove all instances, images, volumes, pools, networks,
        machines' templates, kernels and records in it, what it has made of the host (mounts,
        bridges, packet rules, control groups), and its directory. The engine is closed then.

        Interrupted it goes on when called again. Raises `Busy` while a daemon or somebody's
        dispatcher works on the root or something in it stays mounted, `InvalidArgument` for
        a directory with files that are not hutch's. A pool's part on another disk that is
        not there is left.
        """
        from hutch.engine.reset import reset

        return reset(self._context, progress=progress)

    def build_cache(self) -> Sequence[BuildCacheItem]:
        """Describe the build cache, what was used last first."""
        from hutch.engine.builder.facade import cache_items

        return cache_items(self._context)

    def prune_build_cache(
        self,
        *,
        all_entries: bool = False,
        older_than_s: float = 0,
        keep_bytes: int = 0,
        filters: Mapping[str, Sequence[str]] | None = None,
    ) -> CachePrune:
        """Take away entries of the build cache that no image has and no build uses; with
        `all_entries` what images have too, so that their builds begin anew. `keep_bytes` are
        left of what was used last."""
        from hutch.engine.builder.facade import prune_cache

        return prune_cache(
            self._context,
            all_entries=all_entries,
            older_than_s=older_than_s,
            keep_bytes=keep_bytes,
            filters=filters,
        )

    def check(self, *, repair: bool = False, progress: Progress = silent) -> CheckReport:
        """Read blobs, root disks of machines and guest kernels against their digests, and have
        the disks of machines at rest examined. With `repair` damaged root disks are thrown
        away, to be made anew."""
        from hutch.engine.checking import check

        return check(self._context, repair=repair, progress=progress)

    def info(self) -> SystemInfo:
        """Describe the engine and its host in short."""
        from hutch.engine.system import info

        return info(self._context)

    def reconcile(self) -> ReconcileReport:
        """Put right what killed processes or a power cut left: records, kernel, disk."""
        from hutch.engine.reconcile import reconcile

        return reconcile(self._context)
