"""A running machine's state: saved with its main process in it, and gone on from elsewhere.

What is saved is a directory with `state` (memory and devices, in QEMU's format), the disk as
it was at that moment (`diskfork`), and `saved.json`; of a fork the state is a descriptor and
lasts as long as that. While the machine stands still its own pages are copied (`capture`) and
QEMU writes the devices. Where its memory is out of reach, or too much to be copied, QEMU writes
that too: while the machine runs, where it can (`sees_emulated_writes`), and stops it for the
last of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import msgspec

from hutch.decoding import decode_json
from hutch.drivers.base import ForkedState, Launch, SavedState
from hutch.drivers.failures import last_line
from hutch.drivers.moving import Arrival
from hutch.drivers.vm.boot import QMP_SOCKET
from hutch.drivers.vm.diskfork import DiskFork
from hutch.drivers.vm.inside import write_back
from hutch.drivers.vm.machine import MachineRecord, load_record
from hutch.drivers.vm.setup import interfaces, renewal
from hutch.drivers.vm.stream import BLOCK, write_stream
from hutch.errors import IntegrityError, NotFound, Unavailable, Unsupported, WrongState
from hutch.plan import guest
from hutch.plan.vm import GUEST_FILES
from hutch.process.guest import Guest
from hutch.storage.diskchain import chain
from hutch.storage.disks import Disks

if TYPE_CHECKING:
    from hutch.drivers.vm.capture import Source
    from hutch.qmp import Monitor

__all__ = ["Loaded", "connect_cards", "fork_machine", "load_machine", "opened", "receive_machine"]
__all__ += ["STATE_FILE", "Saved", "check_movable", "immovable", "save_disk", "save_machine"]
__all__ += ["twin_setup"]
__all__ += ["check_devices", "misses_writes", "write_record", "write_state"]

STATE_FILE, _RECORD = "state", "saved.json"
# How long the memory is written while the machine runs and dirties it; then it is stopped.
_PATIENCE_S = 5.0
_PAUSE_MS = 20
# What of its own a machine may have for each twin to get a copy; more is shared by them.
_OWN_FEW = 16 << 20
# More than this is not copied while the machine stands still, if QEMU can do it otherwise.
_OWN_MOST = 1 << 30
# Memory that is not the guest's, and in every QEMU of the same command line the same.
_FIRMWARE = ("/rom@", "pc.bios", "pc.rom", "system.flash")


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What a later load must know. `unacked` is input that the process had not taken."""

    unacked: int
    cards: int
    machine: MachineRecord


def save_machine(
    directory: str, target: str, disks: Disks, *, cards: int, end_as: str = ""
) -> None:
    """Save a running machine to an existing, empty directory.

    With `end_as` the target gets that name when all is on disk, then QEMU ends, and the
    instance's own disk stays where it is. Otherwise the machine goes on, and so it does after
    any failure; what a failure left in the target is the caller's to remove.
    """
    from hutch.drivers.vm.capture import Capture
    from hutch.qmp import machine as qmp

    with ExitStack() as held:
        machine, monitor, source = held.enter_context(_movable(directory, cards, stays=end_as))
        state = held.enter_context(open(f"{target}/{STATE_FILE}", "xb"))
        capture = held.enter_context(Capture(source)) if source is not None else None
        disk = DiskFork(monitor, directory, target, machine, disks)
        if not end_as:
            disk.prepare()
        with Guest(f"{directory}/run").quiesce(monitor.fileno()) as quiet:
            if capture is None:
                devices = b""
                write_state(monitor, state.fileno(), emulated=machine.accelerator == "tcg")
            else:
                devices = _stand_still(monitor, capture.take)
            saved = Saved(unacked=quiet.unacked, cards=cards, machine=machine)
            if not end_as:
                disk.take()
                qmp.cont(monitor)
            else:
                if capture is not None:
                    _write_memory(state.fileno(), machine, capture.all_pages(), devices)
                os.fsync(state.fileno())
                for path in chain(directory):
                    _sync(path)
                write_record(target, saved)
                os.rename(target, end_as)
                _sync(os.path.dirname(end_as))
                qmp.quit(monitor)
                quiet.wait_end()
        if not end_as:
            disk.finish()
            if capture is not None:
                _write_memory(state.fileno(), machine, capture.all_pages(), devices)
            write_record(target, saved)


def save_disk(directory: str, target: str, disks: Disks) -> None:
    """Save the disk of a running machine alone, with what its programs have written until then.

    It stands still while that is frozen or copied (`diskfork`), and goes on, after any failure
    and whoever is killed; what a failure left in the target is the caller's to remove.
    """
    from hutch.qmp import conversation
    from hutch.qmp import machine as qmp

    run = f"{directory}/run"
    agent = Guest(run)
    with conversation(f"{run}/{QMP_SOCKET}") as monitor:
        disk = DiskFork(monitor, directory, target, load_record(directory), disks)
        disk.prepare()
        write_back(agent)
        with agent.quiesce(monitor.fileno()):
            qmp.stop(monitor)
            try:
                disk.take()
            finally:
                qmp.cont(monitor)
        disk.finish()


def fork_machine(directory: str, target: str, disks: Disks, *, cards: int) -> ForkedState:
    """Save a running machine to memory, for twins, and its disk to an existing directory.

    The machine goes on, and so it does after any failure; what a failure left in the target is
    the caller's to remove.
    """
    from hutch.drivers.vm.capture import Capture, FileCapture
    from hutch.qmp import machine as qmp

    with ExitStack() as held:
        machine, monitor, source = held.enter_context(_movable(directory, cards))
        state = os.memfd_create("hutch-state", os.MFD_CLOEXEC)
        undo = held.enter_context(ExitStack())
        undo.callback(os.close, state)
        capture: Capture | FileCapture | None = None
        if source is not None:
            few = source.base >= 0 and source.own_size() <= _OWN_FEW
            capture = Capture(source) if few else FileCapture(source)
            held.enter_context(capture)
        disk = DiskFork(monitor, directory, target, machine, disks)
        disk.prepare()
        with Guest(f"{directory}/run").quiesce(monitor.fileno()) as quiet:
            if capture is None:
                write_state(monitor, state, emulated=machine.accelerator == "tcg")
            else:
                devices = _stand_still(monitor, capture.take)
            disk.take()
            qmp.cont(monitor)
        disk.finish()
        memory = -1
        if isinstance(capture, Capture) and source is not None:
            _write_memory(state, machine, capture.own_pages(), devices, keep_zero=True)
            memory = os.dup(source.base)
        elif isinstance(capture, FileCapture):
            capture.finish()
            _write_memory(state, machine, (), devices)
            memory = os.dup(capture.file)
        undo.pop_all()
        saved = Saved(unacked=quiet.unacked, cards=cards, machine=machine)
        return ForkedState(state=state, memory=memory, saved=msgspec.json.encode(saved))


@contextmanager
def _movable(
    directory: str, cards: int, *, stays: str = ""
) -> Iterator[tuple[MachineRecord, Monitor, Source | None]]:
    """Hold a machine whose state can be saved: its record, its monitor and, where it can be
    taken from outside, its memory. `stays`: its volumes remain its own meanwhile."""
    from hutch.drivers.vm.capture import find_memory
    from hutch.qmp import conversation

    run = f"{directory}/run"
    machine = load_record(directory)
    if machine.shares:
        raise immovable(*SHARES)
    if machine.tpm and not stays:
        raise immovable(*TPM)
    if machine.volumes and not stays:
        raise immovable(*VOLUMES)
    check_devices(machine)
    with (
        conversation(f"{run}/{QMP_SOCKET}") as monitor,
        find_memory(run, machine.memory_started) as source,
    ):
        check_movable(monitor, cards)
        yield machine, monitor, source if source and _is_whole(monitor, machine, source) else None


def _is_whole(monitor: Monitor, machine: MachineRecord, source: Source) -> bool:
    """Tell whether this is all of the guest's memory, and little enough to be copied."""
    from hutch.qmp.memory import list_memory

    blocks = list_memory(monitor)
    others = [name for name in blocks if not _is_firmware(name)]
    if others != [BLOCK] or blocks[BLOCK] != source.size:
        return False
    live = machine.accelerator != "tcg" or monitor.version.sees_emulated_writes
    return not live or source.own_size() <= _OWN_MOST


def _stand_still(monitor: Monitor, take: Callable[[], None]) -> bytes:
    """Stop the machine, copy its memory, and return the state of its devices."""
    from hutch.qmp.machine import stop
    from hutch.qmp.memory import save_devices

    stop(monitor)
    take()
    return save_devices(monitor)


def _write_memory(
    fd: int,
    machine: MachineRecord,
    pages: Iterable[tuple[int, memoryview]],
    devices: bytes,
    *,
    keep_zero: bool = False,
) -> None:
    write_stream(
        fd,
        machine=machine.machine,
        size=machine.memory_started,
        pages=pages,
        devices=devices,
        keep_zero=keep_zero,
    )


def check_movable(monitor: Monitor, cards: int) -> None:
    """Raise for a machine with devices whose state QEMU cannot save, naming its reasons, and
    for one that is not as it would be started: it could not be loaded."""
    from hutch.qmp.devices import list_devices
    from hutch.qmp.machine import RUNNING, query_status
    from hutch.qmp.migration import query_migrate

    if query_status(monitor) not in RUNNING:
        raise WrongState(
            "the machine stands still: the host has no room for what it writes",
            hint="make room, and it goes on by itself",
        )
    names = list_devices(monitor)
    plugged = any(name.startswith("card") for name in names)
    if plugged or sum(name.startswith("nic") for name in names) != cards:
        raise Unsupported(
            "the machine's state cannot be saved: its networks were changed while it ran",
            hint="stop it and start it again first",
        )
    reasons = query_migrate(monitor).blocked_reasons
    if reasons:
        raise immovable(reasons[0], "stop it first, or run it without what holds it")


def check_devices(machine: MachineRecord) -> None:
    """Raise for a machine that has devices of the host."""
    if machine.host_devices:
        devices = ", ".join(machine.host_devices)
        raise immovable(
            f"it has devices of the host: {devices}", "stop it first, or run it without --device"
        )


# What a machine is held by that has parts outside of QEMU, and how it is let go.
SHARES = (
    "it has directories of the host (-v), which are served by a process beside it",
    "stop it first: `hutch snapshot create` and `hutch migrate` take it at rest (QEMU 9 with "
    "virtiofsd 1.13 migrates it running); or run it without -v and copy the files into it "
    "(`hutch cp`)",
)
TPM = (
    "it has a TPM, whose secrets a twin would have too",
    "`hutch suspend` saves it, and `hutch snapshot create` takes it at rest; or run it without "
    "--tpm",
)
VOLUMES = (
    "it has a volume as a disk, which only one machine can have",
    "stop it first: `hutch snapshot create` and `hutch migrate` take it at rest; or keep the "
    "files on its own disk (--disk)",
)


def immovable(reason: str, cure: str) -> Unsupported:
    return Unsupported(f"the machine's state cannot be saved: {reason}", hint=cure)


def write_state(monitor: Monitor, fd: int, *, emulated: bool) -> None:
    """Write memory and devices; when it returns the machine is stopped, its disks flushed."""
    from hutch.qmp.machine import stop
    from hutch.qmp.migration import save_state, set_parameters

    if emulated and misses_writes(monitor):
        stop(monitor)
    set_parameters(monitor, max_bandwidth=0, downtime_limit=_PAUSE_MS)
    save_state(monitor, fd, ignore_shared=False, patience_s=_PATIENCE_S)


def misses_writes(monitor: Monitor) -> bool:
    """Tell whether a QEMU that emulates would miss what the guest writes to its memory while that
    is copied: all of it before 9.0, and what is in other blocks than the first up to now. When it
    has looked for what was written to one of those, it lets the processors know of the addresses
    that this would have in the first (QEMU's `physical_memory_sync_dirty_bitmap`), and ends by an
    assertion where the first is smaller."""
    from hutch.qmp.memory import list_memory

    if not monitor.version.sees_emulated_writes:
        return True
    names = [name for name in list_memory(monitor) if not _is_firmware(name)]
    return len(names) > 1


def _is_firmware(name: str) -> bool:
    return name.startswith(_FIRMWARE) or name.endswith(".rom")


def write_record(target: str, saved: Saved) -> None:
    """Write the record, last of all: it says that the rest is there."""
    partial = f"{target}/.{_RECORD}"
    with open(partial, "wb") as file:
        file.write(msgspec.json.encode(saved))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, f"{target}/{_RECORD}")
    _sync(target)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _load(directory: str) -> Saved:
    try:
        with open(f"{directory}/{_RECORD}", "rb") as file:
            return decode_json(file.read(), Saved)
    except FileNotFoundError:
        raise NotFound(f"{directory}: there is no saved state") from None
    except msgspec.DecodeError as exc:
        raise IntegrityError(f"{directory}/{_RECORD}: {exc}") from exc


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A state that a machine is about to go on from: open descriptors, the caller's. `memory`
    is what its memory begins with, mapped privately; -1 is zeros."""

    state: int
    memory: int
    unacked: int
    cards: int
    machine: MachineRecord


@contextmanager
def opened(saved: SavedState | ForkedState) -> Iterator[Loaded]:
    """Open a saved state for one machine."""
    if isinstance(saved, ForkedState):
        record = decode_json(saved.saved, Saved)
        yield Loaded(
            state=saved.state,
            memory=saved.memory,
            unacked=record.unacked,
            cards=record.cards,
            machine=record.machine,
        )
        return
    record = _load(saved.directory)
    state = os.open(f"{saved.directory}/{STATE_FILE}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Loaded(
            state=state,
            memory=-1,
            unacked=record.unacked,
            cards=record.cards,
            machine=record.machine,
        )
    finally:
        os.close(state)


def load_machine(directory: str, loaded: Loaded) -> None:
    """Load the state into the QEMU of an instance's directory and let it run.

    Its network cards are unplugged until it has its new addresses (`connect_cards`): under
    the old ones it would be taken for the machine that it is a twin of.
    """
    from hutch.qmp import conversation
    from hutch.qmp.machine import cont
    from hutch.qmp.migration import MigrationFailed, load_state, set_parameters

    with conversation(f"{directory}/run/{QMP_SOCKET}") as monitor:
        # QEMU would tell the network of the addresses that the state has.
        set_parameters(monitor, announce_rounds=0)
        try:
            load_state(monitor, loaded.state, ignore_shared=False)
        except MigrationFailed as exc:
            said = last_line(f"{directory}/qemu.log") or exc.message
            raise Unavailable(
                f"the saved machine cannot be loaded: {said}",
                hint="its QEMU, kernel and processors must be those that it was saved with",
            ) from exc
        _set_links(monitor, loaded.cards, up=False)
        cont(monitor)


def receive_machine(directory: str, arrival: Arrival) -> int:
    """Take a machine over from another host into the QEMU of an instance's directory, and let
    it run with its cards unplugged; return the input that its program had not taken."""
    from contextlib import ExitStack

    from hutch.drivers.vm.landing import QemuLanding
    from hutch.qmp import conversation

    with ExitStack() as held:
        monitor = held.enter_context(conversation(f"{directory}/run/{QMP_SOCKET}"))
        return arrival.receive(QemuLanding(monitor, directory, arrival, held))


def connect_cards(directory: str, cards: int) -> None:
    """Plug the network cards of a loaded machine in."""
    from hutch.qmp import conversation

    if cards:
        with conversation(f"{directory}/run/{QMP_SOCKET}") as monitor:
            _set_links(monitor, cards, up=True)


def _set_links(monitor: Monitor, cards: int, *, up: bool) -> None:
    from hutch.qmp.devices import set_link

    for index in range(cards):
        set_link(monitor, f"nic{index}", up=up)


def twin_setup(launch: Launch, files: Sequence[tuple[str, bytes]]) -> list[guest.SetupOp]:
    """Return what makes a loaded machine the instance that is started: entropy, clock, host
    name, the files of ours where they are mounted, and its place in its networks."""
    # A clock that is set when the machine comes from another host would be set too early.
    made: list[guest.SetupOp] = renewal() if launch.arrival is None else []
    made.append(guest.Hostname(name=launch.spec.hostname or launch.name))
    made += [
        guest.Rewrite(path=f"{GUEST_FILES}/{name}", content=content) for name, content in files
    ]
    for endpoint in launch.endpoints:
        made.append(guest.Flush(interface=endpoint.interface))
    return made + interfaces(launch.endpoints)
