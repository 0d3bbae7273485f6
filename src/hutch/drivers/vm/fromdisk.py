"""Machines that start from a disk of their own: firmware, serial console, no agent of ours.

`hutch-vmm` relays the serial port as a program's streams, so the supervisor, its log and
whoever attaches have a console; to ask the machine to end is to press its power button.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec

from hutch.drivers import failures
from hutch.drivers.base import Launch, SavedState, Started
from hutch.drivers.supervision import instance_supervision
from hutch.drivers.vm.boot import QMP_SOCKET, Booted, BootRequest, Ports, boot
from hutch.drivers.vm.cards import is_user_network, network_cards
from hutch.drivers.vm.diskkeys import DISK_KEY, secrets
from hutch.drivers.vm.host import find_host
from hutch.drivers.vm.launching import MachineLauncher
from hutch.drivers.vm.limits import disk_in_memory, group_limits, memory_of
from hutch.drivers.vm.machine import (
    ROOT_PORTS,
    Host,
    MachineRecord,
    machine_type,
    save_record,
    shape_of,
)
from hutch.drivers.vm.passing import Passed, take_devices
from hutch.drivers.vm.pinning import pin_processors
from hutch.drivers.vm.sandbox import Descriptors, listen_at
from hutch.drivers.vm.state import connect_cards, load_machine, opened
from hutch.drivers.vm.throttling import start_rates
from hutch.drivers.vm.tpm import TpmServer, serve_tpm
from hutch.errors import (
    HutchError,
    InternalError,
    InvalidArgument,
    NotFound,
    Unsupported,
    WrongState,
)
from hutch.host.firmware import find_uefi
from hutch.linux.cgroup import Group, Hierarchy
from hutch.network.model import Endpoint
from hutch.network.taps import Taps, create_taps
from hutch.plan.assets import ResolvedUser
from hutch.plan.container import SYNC_NETWORK
from hutch.plan.machine.argv import machine_arguments
from hutch.plan.machine.model import (
    MICROVM,
    Console,
    Descriptor,
    Disk,
    DiskFile,
    Display,
    Firmware,
    Machine,
    Nic,
)
from hutch.process.records import read_pid
from hutch.process.vmm import MonitorConfig
from hutch.spec.model import FromDisk, InstanceSpec
from hutch.storage.seed import Card, make_seed

__all__ = ["SCREEN_SOCKET", "SEED_FILE", "USER_DATA_FILE", "VARIABLES_FILE", "check_from_disk"]
__all__ += ["start_from_disk"]

SCREEN_SOCKET = "vnc.sock"
SEED_FILE = "seed.iso"
USER_DATA_FILE = "user-data"
VARIABLES_FILE = "uefi-variables.fd"
_QEMU_S = 150.0


def check_from_disk(spec: InstanceSpec) -> None:
    """Raise for what such a machine cannot have, and for what the host lacks for it."""
    wish = _wish(spec)
    if machine_type(spec) == MICROVM:
        raise Unsupported("machine: a machine of type microvm starts no disk", hint="use q35")
    if spec.mounts or spec.volumes_from:
        raise Unsupported(
            "mounts: a machine that starts from a disk has no agent to mount them",
            hint="attach a disk instead",
        )
    if spec.health is not None:
        raise Unsupported("health_cmd: a machine that starts from a disk has no agent to run it")
    if wish.firmware == "uefi":
        find_uefi()


def _wish(spec: InstanceSpec) -> FromDisk:
    wish = spec.machine.from_disk
    if wish is None:
        raise InternalError("the machine does not start from a disk")
    return wish


def start_from_disk(machines: MachineLauncher, hierarchy: Hierarchy, launch: Launch) -> Started:
    """Start the machine; on failure nothing of it is left."""
    with ExitStack() as undo, failures.translated(f"start of {launch.name}"):
        spec = launch.spec
        passed = take_devices(launch, undo)
        limits = group_limits(
            spec.resources,
            memory_of(spec),
            disk=disk_in_memory(launch.directory),
            nodes=passed.numbers(),
        )
        group = hierarchy.create(launch.id, limits)
        undo.callback(group.remove)
        undo.callback(group.kill_all)
        with ExitStack() as held:
            taps = None
            if launch.endpoints and not is_user_network(launch.endpoints):
                taps = create_taps(len(launch.endpoints))
                for fd in (taps.namespace, *taps.taps):
                    held.callback(os.close, fd)
            tpm = None
            if launch.spec.machine.tpm:
                sandbox = machines.sandbox
                tpm = serve_tpm(machines.launcher, sandbox, machines.root, launch, group, held)
            booted = _boot(machines, launch, group, taps, tpm, passed, held)
            undo.callback(booted.supervisor.close)
            held.callback(booted.monitor.close)
            if tpm is not None:
                tpm.wait_started()
            pid = _bring_up(launch, booted, taps)
        if spec.machine.cpu_pin:
            pin_processors(group.pids(), spec.resources.cpuset_cpus)
        known = read_pid(f"{launch.directory}/run")
        if known is None or known.pid != pid:
            raise InternalError(f"the supervisor of {launch.name} left no record of it")
        undo.pop_all()
        return Started(pid=pid, start_time=known.start_time, supervisor=booted.supervisor)


def _bring_up(launch: Launch, booted: Booted, taps: Taps | None) -> int:
    """Attach the network and wait until QEMU has opened all it was given."""
    supervisor = booted.supervisor
    with failures.launching(booted.plan, "start"):
        pid = supervisor.wait_pid()
        if launch.attach_network is not None:
            # Only now is the process in the namespace of the taps.
            supervisor.wait_sync(SYNC_NETWORK)
            launch.attach_network(pid, taps.indexes if taps else ())
            supervisor.go(SYNC_NETWORK)
        supervisor.wait_started()
    with failures.machine_failures(f"start of {launch.name}", launch.directory):
        booted.monitor.wait_qemu()
        # Without an answer QEMU is about to end, which the monitor tells better than we can.
        if _answers(f"{launch.directory}/run/{QMP_SOCKET}"):
            start_rates(launch.directory, launch.spec.resources, image=False)
            if isinstance(launch.saved, SavedState):
                _load(launch, launch.saved)
            booted.monitor.go()
        booted.monitor.wait_started(_QEMU_S)
    return pid


def _load(launch: Launch, saved: SavedState) -> None:
    """Let the machine go on where it was saved."""
    with opened(saved) as loaded:
        if len(launch.endpoints) != loaded.cards:
            raise WrongState(
                f"the saved machine has {loaded.cards} network cards, and the instance "
                f"{len(launch.endpoints)}",
                hint="connect it to as many networks as when it was saved",
            )
        load_machine(launch.directory, loaded)
        connect_cards(launch.directory, loaded.cards)


def _answers(path: str) -> bool:
    from hutch.qmp import conversation
    from hutch.qmp.machine import query_status

    try:
        # To open encrypted disks takes it seconds of processor time before it answers.
        with conversation(path, timeout_s=_QEMU_S) as monitor:
            query_status(monitor)
    except HutchError:
        return False
    return True


def _boot(
    machines: MachineLauncher,
    launch: Launch,
    group: Group,
    taps: Taps | None,
    tpm: TpmServer | None,
    passed: Passed,
    held: ExitStack,
) -> Booted:
    spec, wish = launch.spec, _wish(launch.spec)
    if wish.seed and launch.saved is None:
        _write_seed(launch)
    host = find_host(machines.root, spec.machine.accel, machines.proving_kernel())
    record = _record(host, launch)
    save_record(launch.directory, record)
    screen = _screen(launch, wish)
    held.callback(os.close, screen)

    def argv(ports: Ports, descriptors: Descriptors) -> Sequence[str]:
        nics = _cards(launch, taps, descriptors)
        machine = _machine(launch, record, ports, nics, tpm, descriptors)
        devices, iommu = passed.pieces(host.version, machines.sandbox, descriptors)
        machine = msgspec.structs.replace(machine, host_devices=devices, iommu=iommu)
        return machine_arguments(machine, version=host.version, qemu=host.qemu)

    return boot(
        machines.launcher,
        BootRequest(
            identifier=launch.id,
            root=machines.root,
            sandbox=machines.sandbox,
            qemu=host.qemu,
            directory=f"{launch.directory}/run",
            logs=launch.directory,
            supervision=instance_supervision(launch),
            argv=argv,
            config=MonitorConfig(
                argv=(),
                shutdown_timeout_s=spec.stop_timeout_s,
                tty=spec.process.tty,
                hold=True,
                console=True,
            ),
            kvm=host.accelerator == "kvm",
            lock_memory=spec.machine.memory_lock or bool(passed.nodes),
            groups=passed.groups(host.version),
            rows=launch.rows,
            columns=launch.columns,
            group=group,
            namespace=taps.namespace if taps else -1,
            host_network=is_user_network(launch.endpoints),
            network=launch.attach_network is not None,
            screen=screen,
            attach=launch.attach,
        ),
    )


def _record(host: Host, launch: Launch) -> MachineRecord:
    shape = shape_of(launch.spec, host)
    record = MachineRecord(
        qemu=host.qemu,
        qemu_version=str(host.version),
        accelerator=host.accelerator,
        accelerator_reason=host.reason,
        kernel="",
        kernel_id="",
        machine=shape.machine,
        cpu=shape.cpu,
        memory=shape.memory,
        vcpus=shape.vcpus,
        template="",
        user=ResolvedUser(uid=0, gid=0),
        shape=shape,
        pinned=launch.spec.machine.cpu_pin,
        host_devices=launch.host_devices,
    )
    if not isinstance(launch.saved, SavedState):
        return record
    # The state has the devices of the machine that was saved, with all it was given by then.
    with opened(launch.saved) as loaded:
        before = loaded.machine
    return msgspec.structs.replace(
        record,
        shape=before.shape or shape,
        memory=before.memory,
        vcpus=before.vcpus,
        plugged=before.plugged,
    )


def _machine(
    launch: Launch,
    record: MachineRecord,
    ports: Ports,
    nics: Sequence[Nic],
    tpm: TpmServer | None,
    descriptors: Descriptors,
) -> Machine:
    wish, known = _wish(launch.spec), _identity(launch)
    firmware = Firmware()
    if wish.firmware == "uefi":
        store = descriptors.add(_opened(f"{launch.directory}/{VARIABLES_FILE}", os.O_RDWR))
        firmware = Firmware(code=find_uefi().code, variables=Descriptor(store))
    if record.shape is None:
        raise InternalError(f"the record of {launch.name} does not say what the machine is")
    return Machine(
        name=launch.id[:12],
        shape=record.shape,
        boot=firmware,
        uuid=f"{known[:8]}-{known[8:12]}-4{known[13:16]}-8{known[17:20]}-{known[20:32]}",
        monitor=Descriptor(ports.qmp),
        control=Descriptor(ports.control),
        console=Console(connected=Descriptor(ports.agent)),
        secrets=tuple(secrets(launch, descriptors)),
        disks=tuple(_disks(launch, wish, descriptors)),
        nics=tuple(nics),
        display=Display() if wish.screen else None,
        root_ports=ROOT_PORTS,
        tpm=tpm.device(descriptors) if tpm else None,
        reboot=True,
        plugged=record.plugged_memory(),
        incoming=launch.saved is not None,
    )


# ---- disks ------------------------------------------------------------------------------


def _opened(path: str, mode: int) -> int:
    return os.open(path, mode | os.O_CLOEXEC)


def _disks(launch: Launch, wish: FromDisk, descriptors: Descriptors) -> list[Disk]:
    """Return the machine's disks: its own, those attached, and what is read like a CD."""

    def file(path: str, mode: int) -> Descriptor:
        try:
            return Descriptor(descriptors.add(_opened(path, mode)))
        except FileNotFoundError as exc:
            raise NotFound(f"disk {path}: is gone, and {launch.name} needs it") from exc

    base = None
    if wish.path:
        _check_base(launch, wish)
        base = DiskFile(
            file=file(wish.path, os.O_RDONLY),
            format=wish.format,
            key=DISK_KEY if wish.encrypted else "",
        )
    key = DISK_KEY if launch.spec.machine.disk_key else ""
    own = DiskFile(file=file(launch.disk, os.O_RDWR), format="qcow2", key=key, backing=base)
    disks = [Disk(image=own, serial="disk", boot_index=1, detect_zeroes=True)]
    for index, extra in enumerate(wish.disks):
        mode = os.O_RDONLY if extra.read_only else os.O_RDWR
        image = DiskFile(
            file=file(extra.path, mode),
            format=extra.format,
            key=f"key{index + 1}" if extra.key_file else "",
        )
        disks.append(Disk(image=image, serial=f"disk{index + 1}", read_only=extra.read_only))
    if wish.seed:
        # No CD: Debian's kernel for clouds has no driver for the chipset's SATA.
        seed = DiskFile(file=file(f"{launch.directory}/{SEED_FILE}", os.O_RDONLY))
        disks.append(Disk(image=seed, serial="seed", read_only=True))
    for index, path in enumerate(wish.cdroms):
        disks.append(
            Disk(
                image=DiskFile(file=file(path, os.O_RDONLY)),
                serial=f"cdrom{index}",
                read_only=True,
                kind="cdrom",
                # After the disk: an installer is started while that is empty, and not again.
                boot_index=index + 2,
            )
        )
    return disks


def _check_base(launch: Launch, wish: FromDisk) -> None:
    """Refuse a base that was written to: what the machine has kept would not fit it."""
    from hutch.storage.diskimages import stamp_of

    if stamp_of(wish.path) not in ("", wish.stamp):
        raise InvalidArgument(
            f"disk {wish.path}: was changed since {launch.name} was made of it",
            field="disk",
            hint="put the file back as it was, or make a new machine",
        )


# ---- network and screen -------------------------------------------------------------------


def _mac(launch: Launch, endpoint: Endpoint) -> str:
    """Return a card's address; QEMU's own network has none of its own for it."""
    known = _identity(launch)
    return endpoint.mac or f"52:54:00:{known[0:2]}:{known[2:4]}:{known[4:6]}"


def _identity(launch: Launch) -> str:
    """Return what the guest's UUID and addresses are made of; it outlives a migration."""
    return _wish(launch.spec).identity or launch.id


def _cards(launch: Launch, taps: Taps | None, descriptors: Descriptors) -> tuple[Nic, ...]:
    """Return the cards with the addresses by which their networks know them."""
    cards = network_cards(launch.endpoints, taps.taps if taps else (), descriptors)
    return tuple(
        msgspec.structs.replace(card, mac=_mac(launch, endpoint), mtu=endpoint.mtu)
        for card, endpoint in zip(cards, launch.endpoints, strict=True)
    )


def _screen(launch: Launch, wish: FromDisk) -> int:
    """Return what clients of the screen call at, or where there is none what nobody can."""
    if not wish.screen:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    if wish.screen == "unix":
        return listen_at(f"{launch.directory}/run", SCREEN_SOCKET)
    address, _, port = wish.screen.rpartition(":")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.strip("[]"), int(port)))
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            raise InvalidArgument(f"{wish.screen}: {reason}", field="vnc") from exc
        listener.listen(16)
        return listener.detach()


# ---- cloud-init -----------------------------------------------------------------------------


def _write_seed(launch: Launch) -> None:
    with open(f"{launch.directory}/{USER_DATA_FILE}", "rb") as file:
        user_data = file.read()
    make_seed(
        f"{launch.directory}/{SEED_FILE}",
        instance=_identity(launch),
        hostname=launch.spec.hostname,
        user_data=user_data,
        cards=_seed_cards(launch),
    )


def _seed_cards(launch: Launch) -> list[Card]:
    if is_user_network(launch.endpoints):
        return [Card(mac=_mac(launch, endpoint), dhcp=True) for endpoint in launch.endpoints]
    resolver = _resolver(launch)
    return [
        Card(
            mac=_mac(launch, endpoint),
            addresses=tuple(f"{a.address}/{a.prefix}" for a in endpoint.addresses),
            gateways=tuple(
                a.gateway for a in endpoint.addresses if endpoint.default_route and a.gateway
            ),
            nameservers=resolver.get("nameserver", ()),
            search=resolver.get("search", ()),
            mtu=endpoint.mtu,
        )
        for endpoint in launch.endpoints
    ]


def _resolver(launch: Launch) -> dict[str, tuple[str, ...]]:
    """Return name servers and search domains of the resolv.conf that was made for it."""
    found: dict[str, tuple[str, ...]] = {}
    path = next((m.source for m in launch.mounts if m.target == "/etc/resolv.conf"), "")
    if not path:
        return found
    with open(path, encoding="utf-8") as file:
        for line in file:
            key, *values = line.split() or [""]
            if key in ("nameserver", "search"):
                found[key] = (*found.get(key, ()), *values)
    return found
