"""Containers: prepare the kernel's side of a launch, hand the plan to the native launcher.

This is where plans meet the host: control groups are made, users and devices resolved,
namespaces of others opened, the filter compiled; then the launcher executes.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hutch.drivers import failures
from hutch.drivers.base import ExecRequest, ForkedState, Launch, Started
from hutch.drivers.container.assets import AssetBuilder
from hutch.drivers.container.health import with_health
from hutch.drivers.container.processes import (
    exec_assets,
    open_process,
    process_start_time,
)
from hutch.drivers.grouped import Grouped
from hutch.drivers.limits import device_rules, limits, resolve_devices
from hutch.errors import HutchError, NotFound, Unsupported
from hutch.linux.cgroup import Group, Stats
from hutch.plan.container import (
    SYNC_IDMAP,
    SYNC_NETWORK,
    SYNC_RESTORED,
    compile_container,
    compile_exec,
)
from hutch.plan.ops import Plan
from hutch.plan.wire import encode
from hutch.process.errors import LaunchFailed
from hutch.process.launcher import Launcher
from hutch.process.supervisor import Supervisor
from hutch.spec.model import InstanceSpec, Resources

if TYPE_CHECKING:
    from hutch.drivers.moving import Held

__all__ = ["ContainerDriver"]

_KEPT_VARIABLES = frozenset({"HOME", "LANG", "PATH", "TZ", "USER", "VIRTUAL_ENV"})


_START_S = 60.0
_RESTORE_S = 600.0

# How kernels, filters and limits of an administrator refuse namespaces and mounts.
_REFUSALS = (
    errno.EPERM,
    errno.EACCES,
    errno.ENOSPC,
    errno.EUSERS,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENODEV,
)


class ContainerDriver(Grouped):
    """The driver of containers on this host; see `hutch.drivers.base.Driver`."""

    def __init__(self, root: Path, launcher: Launcher) -> None:
        super().__init__(root)
        self._launcher = launcher
        self._assets = AssetBuilder(root, launcher)

    def check(self, spec: InstanceSpec) -> None:
        """Raise for devices, limits or namespaces that this host cannot give."""
        resolve_devices(spec)
        limits(spec.resources)

    def plan(self, launch: Launch) -> Plan:
        """Return the plan of a launch, with no control group made and no process started."""
        with ExitStack() as stack:
            prepared = self._assets.prepare(launch, stack, group=None, hierarchy=self._hierarchy)
            return compile_container(prepared.spec, prepared.assets)

    def start(self, launch: Launch) -> Started:
        """Start the container; on failure nothing of it is left."""
        with (
            ExitStack() as undo,
            failures.translated(f"start of {launch.name}"),
            ExitStack() as during,
        ):
            # It comes to be while we prepare what it will do.
            supervisor = self._launcher.spawn("hutch-supervisor", _exit_environment())
            undo.callback(supervisor.close)
            group = self._create_group(launch)
            undo.callback(group.remove)
            undo.callback(group.kill_all)
            with ExitStack() as held:
                prepared = self._assets.prepare(
                    launch, held, group=group, hierarchy=self._hierarchy
                )
                plan = compile_container(prepared.spec, prepared.assets)
                plan = with_health(plan, prepared.spec, prepared.assets, group)
                plan = during.enter_context(self._restoring(launch, plan))
                supervisor.launch(encode(plan), prepared.fds, attach=launch.attach)
            undo.callback(supervisor.close)
            with failures.launching(plan, "start"), during, self._refusals(launch):
                pid = self._bring_up(launch, prepared.assets.map_at_sync, supervisor)
            start_time = process_start_time(pid)
            undo.pop_all()
            return Started(pid=pid, start_time=start_time, supervisor=supervisor)

    @contextmanager
    def _restoring(self, launch: Launch, plan: Plan) -> Iterator[Plan]:
        """Yield the plan, or for one that goes on from a saved state that which restores it."""
        if launch.saved is None:
            yield plan
            return
        from hutch.drivers.container.restoring import restoring
        from hutch.host.criu import load_criu

        with restoring(load_criu(self._root / "cache"), launch, plan) as restored:
            yield restored

    @contextmanager
    def _refusals(self, launch: Launch) -> Iterator[None]:
        """Say so where this host lets nobody like us make containers: machines go there."""
        try:
            yield
        except (LaunchFailed, OSError) as exc:
            if exc.errno not in _REFUSALS or getattr(exc, "section", "") == "exec":
                raise
            from hutch.host.isolation import load_isolation

            found = load_isolation(self._root)
            if found.containers:
                raise
            raise Unsupported(
                f"start of {launch.name}: this host refuses containers: {found.reason}",
                hint="run it as a virtual machine: --vm, or --isolation auto",
            ) from exc

    def _create_group(self, launch: Launch) -> Group:
        rules = None
        if os.geteuid() == 0:
            rules = device_rules(launch.spec, resolve_devices(launch.spec))
        # Without root the kernel itself keeps device nodes from being made.
        return self._hierarchy.create(launch.id, limits(launch.spec.resources, rules))

    def _bring_up(self, launch: Launch, map_at_sync: bool, supervisor: Supervisor) -> int:
        """Serve the sync points, then wait until the program runs; return its pid."""
        pid = supervisor.wait_pid()
        if map_at_sync:
            supervisor.wait_sync(SYNC_IDMAP)
            self._assets.map_ids(launch, pid)
            supervisor.go(SYNC_IDMAP)
        if launch.attach_network is not None:
            try:
                launch.attach_network(pid, ())
            except (HutchError, OSError):
                # Where the launch has failed, its process is gone: that is what is told.
                supervisor.wait_sync(SYNC_NETWORK)
                raise
            supervisor.wait_sync(SYNC_NETWORK)
            supervisor.go(SYNC_NETWORK)
        if launch.before_go is not None:
            supervisor.wait_sync(SYNC_RESTORED, _RESTORE_S)
            launch.before_go()
            supervisor.go(SYNC_RESTORED)
        supervisor.wait_started(_RESTORE_S if launch.saved is not None else _START_S)
        # What CRIU brought back is another process than the one that ran it.
        return supervisor.pid or pid

    def exec(self, request: ExecRequest) -> Supervisor:
        """Start a process in a running container."""
        with ExitStack() as undo, failures.translated(f"exec in {request.id[:12]}"):
            supervisor = self._launcher.spawn("hutch-exec", {})
            undo.callback(supervisor.close)
            with ExitStack() as held:
                pidfd = held.enter_context(open_process(request.pid, request.start_time))
                group = self._group(request.id)
                assets, extra = exec_assets(self._assets, request, pidfd, group, held)
                plan = compile_exec(
                    request.process,
                    assets,
                    no_new_privileges=request.spec.security.no_new_privileges
                    and not (request.privileged or request.spec.security.privileged),
                )
                supervisor.launch(encode(plan), (pidfd, *extra), attach=request.attach)
            with failures.launching(plan, "exec"):
                supervisor.wait_started()
            undo.pop_all()
            return supervisor

    def pause(self, identifier: str) -> None:
        """Freeze all processes of the container."""
        with _kernel("pause"):
            self._group(identifier).freeze()

    def unpause(self, identifier: str) -> None:
        """Thaw them."""
        with _kernel("unpause"):
            self._group(identifier).thaw()

    def update(self, identifier: str, resources: Resources) -> None:
        """Change the limits of a running container."""
        with _kernel("update"):
            self._group(identifier).update(limits(resources))

    def stats(self, identifier: str) -> Stats:
        """Return one reading of the counters."""
        return self._group(identifier).stats()

    # ---- saved states -------------------------------------------------------------------

    def check_savable(self, spec: InstanceSpec) -> None:
        """Raise `Unsupported` where CRIU cannot save such a container."""
        from hutch.drivers.container.saving import check_savable

        check_savable(self._root, spec)

    def save(self, identifier: str, target: str, *, cards: int, end_as: str = "") -> None:
        """Save a running container with CRIU; see `hutch.drivers.base.Savable`."""
        from hutch.drivers.container.saving import save_container

        with failures.translated(f"snapshot of {identifier[:12]}"):
            save_container(self._root, self._group(identifier), identifier, target, end_as=end_as)

    def save_disk(self, identifier: str, target: str) -> None:
        """Save a running container's files; see `hutch.drivers.base.Savable`."""
        from hutch.drivers.container.saving import save_files

        with failures.translated(f"snapshot of {identifier[:12]}"):
            save_files(self._root, self._group(identifier), identifier, target)

    def hold_still(self, identifier: str) -> AbstractContextManager[Held]:
        """Freeze a running container for the block, to be saved."""
        from hutch.drivers.container.saving import held_still

        return held_still(self._root, self._group(identifier), identifier)

    def awaken(self, identifier: str) -> bool:
        """Let a running container go on whose saver was killed."""
        from hutch.drivers.container.saving import awaken

        return awaken(self._root, self._group(identifier), identifier)

    def fork(self, identifier: str, target: str, *, cards: int) -> ForkedState:
        """Save a running container for twins; see `hutch.drivers.base.Savable`."""
        from hutch.drivers.container.saving import fork_container

        with failures.translated(f"fork of {identifier[:12]}"):
            return fork_container(self._root, self._group(identifier), identifier, target)

    def group_age_s(self, identifier: str) -> float:
        """Return how long ago a control group was made, in seconds; 0 when it is gone."""
        try:
            directories = self._hierarchy.load(identifier).directories
            return time.time() - min(os.stat(path).st_mtime for path in directories.values())
        except (NotFound, FileNotFoundError, ValueError):
            return 0.0

    def groups(self) -> list[str]:
        """Return the identifiers that have a control group, for reconciliation."""
        return list(self._hierarchy.list_groups())


def _exit_environment() -> dict[str, str]:
    """Return what the exit command needs of our environment; the rest may hold secrets,
    and would stay in the supervisor's memory for the life of the container."""
    return {
        name: os.environ[name]
        for name in os.environ
        if name in _KEPT_VARIABLES or name.startswith(("HUTCH_", "XDG_", "PYTHON"))
    }


@contextmanager
def _kernel(operation: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as exc:
        raise NotFound(f"{operation}: {exc.filename}: no such control group") from exc
    except OSError as exc:
        raise failures.from_oserror(operation, exc) from exc
