"""Start an instance: network, files, launch, and the record of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

import msgspec

from hutch.drivers.base import ForkedState, Launch, LaunchMount, SavedState, Started
from hutch.drivers.moving import Arrival
from hutch.engine.context import Context
from hutch.engine.disk_keys import attached_keys, disk_key
from hutch.engine.etc import rewrite_linked, write_files
from hutch.engine.finish import refresh_locked
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import find_id, load, load_in, require_settled
from hutch.engine.mounts import note_volumes, open_volumes
from hutch.engine.records import INSTANCES, SUSPENDED, InstanceRecord, ResolvedMount
from hutch.engine.reserve import follow_settled, reserve_at_start
from hutch.errors import HutchError, InvalidArgument, NotFound, Unsupported, WrongState
from hutch.lifecycle import State, move
from hutch.plan.ops import Plan
from hutch.process.supervisor import Supervisor
from hutch.records import Progress, silent
from hutch.spec.model import InstanceSpec, NetworkAttachment
from hutch.storage.faults import disk_errors
from hutch.storage.snapshots import DISK_FILE, QCOW2_FILE

if TYPE_CHECKING:
    from hutch.network import Endpoint
    from hutch.storage.snapshots import OverlayAssets

__all__ = ["attachments", "land", "machine_arguments", "plan", "start"]

_STARTABLE = (State.CREATED, State.EXITED, State.RESTARTING, State.SUSPENDED)


def start(
    context: Context,
    identifier: str,
    *,
    attach: int = 0,
    rows: int = 0,
    columns: int = 0,
    restarting: bool = False,
    saved: SavedState | ForkedState | None = None,
    progress: Progress = silent,
    adjust: Callable[[Launch], Launch] | None = None,
) -> Supervisor | None:
    """Start an instance that is not running; return the link to its supervisor.

    None when it runs already. A caller that keeps the link until the exit finishes the
    instance itself; once it is closed, the supervisor sees to that. `attach` are the flags
    with which the link takes part in the streams from the first byte. `saved` is what it goes
    on from; a suspended instance goes on from what it has. `adjust` adds to the launch what
    no record is to hold.
    """
    with disk_errors(f"start of {identifier[:12]}"), instance_lock(context, identifier):
        record = refresh_locked(context, load(context, identifier))
        if record.state in (State.RUNNING, State.STARTING):
            return None
        if record.state == State.PAUSED:
            raise WrongState(f"instance {record.name} is paused", hint="unpause it instead")
        require_settled(record)
        if record.state not in _STARTABLE:
            raise WrongState(f"instance {record.name} is {record.state}: cannot be started")
        return _start_locked(
            context,
            record,
            attach=attach,
            rows=rows,
            columns=columns,
            restarting=restarting,
            saved=saved,
            progress=progress,
            adjust=adjust,
        )


def _start_locked(
    context: Context,
    record: InstanceRecord,
    *,
    attach: int,
    rows: int,
    columns: int,
    restarting: bool,
    saved: SavedState | ForkedState | None,
    progress: Progress,
    adjust: Callable[[Launch], Launch] | None,
) -> Supervisor:
    move(record.state, State.STARTING, name=record.name)
    suspended = record.state == State.SUSPENDED and saved is None
    if suspended:
        saved = SavedState(directory=str(context.directory(record.id) / SUSPENDED))
    kept = _kept_addresses(record, saved, suspended=suspended)
    if record.spec.links:
        from hutch.engine.links import note_links, require_links

        if not restarting:
            require_links(context, record)
        note_links(context, record)
    driver = context.driver(record.spec.isolation)
    with ExitStack() as undo:
        undo.callback(_write, context, record, state=record.state)
        placed = reserve_at_start(context, record, undo)
        endpoints = _prepare_network(context, record, undo, kept)
        _write(context, record, state=State.STARTING, boot_id=context.boot_id)
        try:
            open_volumes(context, record, undo)
            with ExitStack() as held:
                launch = _launch(context, placed, endpoints, held)
                launch = msgspec.structs.replace(
                    launch,
                    memory=_pooled(context, record, saved, undo, held),
                    attach=attach,
                    rows=rows,
                    columns=columns,
                    saved=saved,
                    progress=progress,
                    disk_key=disk_key(context, record),
                    attached_keys=attached_keys(record),
                    # A starter that only starts may let go a moment after the exit: then
                    # neither it nor a supervisor that still saw it would see to the rest.
                    exit_command_always=launch.exit_command_always or not attach,
                )
                started = driver.start(launch if adjust is None else adjust(launch))
        except HutchError as exc:
            undo.close()
            _record_failure(context, record, exc)
            raise
        undo.pop_all()
    try:
        event = "resume" if suspended else "start"
        _record_start(context, record, started, endpoints, event=event, restarting=restarting)
    except HutchError:
        # On a full disk, say. What runs without a record could be neither stopped nor removed.
        driver.kill_all(record.id)
        started.supervisor.close()
        raise
    if suspended:
        context.trash.discard(str(context.directory(record.id) / SUSPENDED))
    follow_settled(context, record, placed)
    rewrite_linked(context, record.id)
    return started.supervisor


def _kept_addresses(
    record: InstanceRecord, saved: SavedState | ForkedState | None, *, suspended: bool
) -> Sequence[NetworkAttachment]:
    """Return the networks with the addresses that an instance is to have again."""
    # A machine without an agent cannot be told of other addresses.
    from_disk = record.spec.machine.from_disk is not None
    if not isinstance(saved, SavedState) or not (suspended or from_disk):
        return ()
    from hutch.engine.saved import kept_addresses

    return kept_addresses(saved, attachments(record))


def _record_start(
    context: Context,
    record: InstanceRecord,
    started: Started,
    endpoints: Sequence[Endpoint],
    *,
    event: str,
    restarting: bool,
) -> None:
    _write(
        context,
        record,
        event=event,
        state=State.RUNNING,
        pid=started.pid,
        start_time=started.start_time,
        supervisor=started.supervisor.supervisor_pid or 0,
        started_ns=time.time_ns(),
        finished_ns=0,
        exit_code=0,
        error="",
        oom_killed=False,
        stopped_by_user=False,
        boot_id=context.boot_id,
        generation=record.generation + 1,
        restart_count=record.restart_count if restarting else 0,
        endpoints=tuple(endpoint.network for endpoint in endpoints),
    )


def land(
    context: Context,
    record: InstanceRecord,
    kept: Sequence[NetworkAttachment],
    arrival: Arrival | None = None,
    *,
    saved: SavedState | None = None,
    before_go: Callable[[], None] | None = None,
) -> tuple[Started, list[Endpoint]]:
    """Start an instance that another host still has, with the addresses in `kept` where they
    are to be had: a machine from its `arrival`, a container from what of it is `saved`. Its
    lock is held, its record the caller's; on failure nothing runs."""
    driver = context.driver(record.spec.isolation)
    with ExitStack() as undo:
        placed = reserve_at_start(context, record, undo)
        endpoints = _prepare_network(context, record, undo, kept)
        open_volumes(context, record, undo)
        with ExitStack() as held:
            launch = _launch(context, placed, endpoints, held)
            launch = msgspec.structs.replace(
                launch,
                arrival=arrival,
                saved=saved,
                before_go=before_go,
                spec=_on(launch.spec, arrival.accelerator) if arrival else launch.spec,
                exit_command_always=True,
            )
            started = driver.start(launch)
        undo.pop_all()
    return started, endpoints


def _on(spec: InstanceSpec, accelerator: Literal["kvm", "tcg"]) -> InstanceSpec:
    """Return the specification with that accelerator, which its memory is bound to."""
    machine = msgspec.structs.replace(spec.machine, accel=accelerator)
    return msgspec.structs.replace(spec, machine=machine)


def _pooled(
    context: Context,
    record: InstanceRecord,
    saved: SavedState | ForkedState | None,
    undo: ExitStack,
    held: ExitStack,
) -> int:
    """Take a machine's memory from what was made ahead, where it asks for that; -1 otherwise."""
    if record.spec.placement.memory != "pool" or saved is not None:
        return -1
    from hutch.drivers.vm.limits import memory_of

    fd = context.memory_pool.take(memory_of(record.spec), record.id)
    undo.callback(context.memory_pool.give_back, record.id)
    held.callback(os.close, fd)
    return fd


def _write(
    context: Context, record: InstanceRecord, *, event: str = "", **changes: object
) -> InstanceRecord:
    """Change fields of the stored record, with an event in the same transaction."""
    with context.store.write() as tx:
        present = load_in(tx, record.id)
        updated = msgspec.structs.replace(present, **changes)
        tx.put(INSTANCES, record.id, updated)
        if event == "start":
            note_volumes(tx, updated, "mount")
        if event:
            tx.event("container", event, record.id, name=present.name, image=present.image_name)
    return updated


def _record_failure(context: Context, record: InstanceRecord, exc: HutchError) -> None:
    code = getattr(exc, "exit_code", 128 if record.state == State.EXITED else 125)
    _write(context, record, exit_code=code, error=exc.message)


def plan(context: Context, identifier: str) -> Plan:
    """Return the plan a start would execute, with placeholders where only a start decides."""
    record = load(context, identifier)
    with ExitStack() as held:
        launch = _launch(context, record, [], held, starts=False)
        return context.driver(record.spec.isolation).plan(launch)


def machine_arguments(context: Context, identifier: str) -> tuple[str, ...]:
    """Return QEMU's argument list of a virtual machine's start; empty for a container."""
    record = load(context, identifier)
    if record.spec.isolation != "vm":
        return ()
    with ExitStack() as held:
        return context.machines.arguments(_launch(context, record, [], held, starts=False))


def _prepare_network(
    context: Context,
    record: InstanceRecord,
    undo: ExitStack,
    kept: Sequence[NetworkAttachment],
) -> list[Endpoint]:
    """Reserve addresses and ports; nothing for modes that have no devices of their own.

    `kept` are the networks with the addresses of before, which others may have by now.
    """
    spec = record.spec
    if not uses_networks(record):
        if spec.ports and spec.network_mode != "host":
            raise InvalidArgument(
                f"cannot be published with network {spec.network_mode!r}", field="publish"
            )
        return []
    if _has_user_network(context, record):
        return _prepare_user_network(context, record, undo)

    def prepare(wanted: Sequence[NetworkAttachment]) -> list[Endpoint]:
        return list(
            context.networks.prepare(
                record.id,
                wanted,
                name=record.name,
                hostname=spec.hostname,
                ports=spec.ports,
                dns=spec.dns,
            )
        )

    try:
        endpoints = prepare(kept or attachments(record))
    except HutchError:
        if not kept or spec.machine.from_disk is not None:
            raise
        endpoints = prepare(attachments(record))
    undo.callback(context.networks.detach, record.id)
    return endpoints


def _has_user_network(context: Context, record: InstanceRecord) -> bool:
    """Tell whether networks and bridges are out of reach: without root, and for a machine
    also where root has not the rights over the host that make namespaces."""
    if context.rootless or record.spec.isolation != "vm":
        return context.rootless
    wish = record.spec.machine.from_disk
    if wish is not None and wish.user_network:
        return True
    from hutch.host.isolation import is_privileged

    return not is_privileged()


def _prepare_user_network(
    context: Context, record: InstanceRecord, undo: ExitStack
) -> list[Endpoint]:
    """The default network of an ordinary user: an interface served by slirp4netns, or for
    a virtual machine by its QEMU."""
    from hutch.network import user

    if record.spec.network_mode != "bridge" or len(attachments(record)) > 1:
        raise Unsupported(
            f"network: {record.spec.network_mode!r} needs root",
            hint="leave the option out, or use none or host",
        )
    if any(a.rx_rate or a.tx_rate for a in attachments(record)):
        raise Unsupported("network: rates need root", hint="leave rx-rate and tx-rate out")
    if record.spec.isolation == "vm":
        endpoint = user.machine_endpoint(record.id, record.spec.ports)
        user.save_endpoint(context.directory(record.id) / "run", endpoint)
        return [endpoint]
    missing = user.unavailable()
    if missing is not None:
        raise Unsupported(f"network: {missing[0]}", hint=f"{missing[1]}, or use --network none")
    undo.callback(user.stop, context.directory(record.id) / "run")
    return [user.user_endpoint(record.id)]


def attachments(record: InstanceRecord) -> tuple[NetworkAttachment, ...]:
    """Return the networks an instance is in, the default bridge included."""
    if record.spec.networks or not uses_networks(record):
        return record.spec.networks
    return (NetworkAttachment(name=record.spec.network_mode),)


def uses_networks(record: InstanceRecord) -> bool:
    """Tell whether the instance has network devices of its own."""
    mode = record.spec.network_mode
    return mode not in ("none", "host") and not mode.startswith("container:")


def _launch(
    context: Context,
    record: InstanceRecord,
    endpoints: list[Endpoint],
    held: ExitStack,
    *,
    starts: bool = True,
) -> Launch:
    spec = record.spec
    if spec.links:
        from hutch.engine.links import with_links

        spec = with_links(context, record)
    directory = context.directory(record.id)
    assets = _layers(context, record)
    mounts = _files(context, record, endpoints)
    mounts += [_mount(context, mount, held, starts=starts) for mount in record.mounts]
    join = _joined(context, record)
    shm = _shared_memory(context, record)
    if shm is not None:
        mounts.append(shm)
    return Launch(
        id=record.id,
        name=record.name,
        spec=spec,
        directory=str(directory),
        lower=assets.lower,
        upper=assets.upper,
        work=assets.work,
        root_disk=_root_disk(context, record),
        disk=str(directory / (QCOW2_FILE if spec.machine.from_disk else DISK_FILE)),
        volatile=record.volatile,
        mounts=tuple(mounts),
        join=join,
        endpoints=tuple(endpoints),
        host_devices=_host_devices(context, spec),
        attach_network=_attacher(context, record, endpoints),
        exit_command=context.exit_command(record.id),
        exit_command_always=spec.restart.name != "no",
    )


def _layers(context: Context, record: InstanceRecord) -> OverlayAssets:
    """Return the instance's layers; those that a power cut took are unpacked again first,
    from the blobs, which were on the disk before the image had a name."""
    try:
        return context.snapshots.load(record.id, record.chain_ids)
    except NotFound:
        image = context.images.by_id(record.image_id)
        if image is None:
            raise
        from hutch.image.unpacking import ensure_unpacked

        with context.leases.hold(*image.digests, *image.chain_ids, purpose="unpack"):
            ensure_unpacked(image, context.content, context.layers)
        return context.snapshots.load(record.id, record.chain_ids)


def _host_devices(context: Context, spec: InstanceSpec) -> tuple[str, ...]:
    if spec.isolation != "vm" or not spec.device_names:
        return ()
    from hutch.engine.devices import machine_devices

    return machine_devices(context, spec)


def _root_disk(context: Context, record: InstanceRecord) -> str:
    """Return the image as a disk, made now where this is its first virtual machine."""
    if record.spec.isolation != "vm" or record.spec.machine.from_disk is not None:
        return ""
    with context.leases.hold(*record.chain_ids, purpose="root disk"):
        return context.rootdisks.ensure(record.chain_ids)


def _attacher(
    context: Context, record: InstanceRecord, endpoints: list[Endpoint]
) -> Callable[[int, Sequence[int]], None] | None:
    """Return what gives the network namespace of a process its interfaces; None for one
    that needs none, or has them from QEMU."""
    from_qemu = record.spec.isolation == "vm" and any(not e.bridge for e in endpoints)
    if from_qemu or not endpoints:
        return None

    def attach(pid: int, taps: Sequence[int]) -> None:
        if context.rootless:
            from hutch.network import user

            run = context.directory(record.id) / "run"
            published = user.start(pid, run, record.spec.ports)
            user.save_endpoint(run, msgspec.structs.replace(endpoints[0], ports=published))
            return
        for number, endpoint in enumerate(endpoints):
            if taps:
                context.networks.attach_tap(endpoint, pid, taps[number], number)
            else:
                context.networks.attach(endpoint, pid)

    return attach


def _joined(context: Context, record: InstanceRecord) -> dict[str, int]:
    """Return the pids whose namespaces are joined, by kind."""
    joined: dict[str, int] = {}
    for kind, mode in (
        ("net", record.spec.network_mode),
        ("pid", record.spec.pid_mode),
        ("ipc", record.spec.ipc_mode),
    ):
        if mode.startswith("container:"):
            other = load(context, find_id(context, mode.removeprefix("container:")))
            if other.state not in (State.RUNNING, State.PAUSED):
                raise WrongState(
                    f"{kind}: instance {other.name} is not running", hint="start it first"
                )
            joined[kind] = other.pid
            if kind == "net" and record.spec.uts_mode != "host":
                joined["uts"] = other.pid
    return joined


def _shared_memory(context: Context, record: InstanceRecord) -> LaunchMount | None:
    """Return the other instance's /dev/shm when its IPC namespace is joined."""
    mode = record.spec.ipc_mode
    if mode == "host":
        return LaunchMount(source="/dev/shm", target="/dev/shm")
    if mode.startswith("container:"):
        other = load(context, find_id(context, mode.removeprefix("container:")))
        return LaunchMount(source="/dev/shm", target="/dev/shm", pid=other.pid)
    return None


def _files(
    context: Context, record: InstanceRecord, endpoints: list[Endpoint]
) -> list[LaunchMount]:
    """Write hosts, hostname and resolv.conf and return them as mounts, as Docker does."""
    spec = record.spec
    directory = context.directory(record.id)
    taken = {mount.target for mount in record.mounts}
    if spec.network_mode.startswith("container:"):
        other = find_id(context, spec.network_mode.removeprefix("container:"))
        directory = context.directory(other)
        names = ["hosts", "hostname", "resolv.conf"]
    else:
        names = write_files(context, record, endpoints)
    return [
        LaunchMount(source=str(directory / name), target=f"/etc/{name}", ours=True)
        for name in names
        if f"/etc/{name}" not in taken and (directory / name).exists()
    ]


def _mount(context: Context, mount: ResolvedMount, held: ExitStack, *, starts: bool) -> LaunchMount:
    fd = -1
    volumes = context.volumes
    if mount.disk:
        return LaunchMount(
            source=volumes.as_disk(mount.name) if starts else volumes.disk_file(mount.name),
            target=mount.target,
            read_only=mount.read_only,
            disk=True,
        )
    # What only tells what a start would do opens nothing.
    is_closed = not starts and mount.type == "volume" and not os.path.isdir(mount.source)
    if mount.subpath and not is_closed:
        fd = volumes.open_subpath(mount.name, mount.subpath)
        held.callback(os.close, fd)
    elif not is_closed and not os.path.exists(mount.source):
        raise InvalidArgument(f"{mount.source}: no such file or directory", field="mounts")
    return LaunchMount(
        source=mount.source,
        target=mount.target,
        read_only=mount.read_only,
        recursive=mount.recursive,
        propagation=mount.propagation or "rprivate",
        owned=mount.type == "volume",
        fd=fd,
    )
