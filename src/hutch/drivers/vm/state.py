"""A running machine's state: saved with its main process in it, and gone on from elsewhere.

What is saved is a directory with `state` (memory and devices, as QEMU writes them), `disk.raw`
as it was at that moment, and `saved.json`. QEMU writes the memory while the machine runs and
stops it for the last of it, where it can (`sees_emulated_writes`); the disk is copied while it
is stopped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.decoding import decode_json
from hutch.drivers.base import Launch, SavedState
from hutch.drivers.failures import last_line
from hutch.drivers.vm.boot import QMP_SOCKET
from hutch.drivers.vm.machine import MachineRecord, load_record
from hutch.drivers.vm.setup import interfaces, renewal
from hutch.errors import IntegrityError, NotFound, Unavailable, Unsupported, WrongState
from hutch.plan import guest
from hutch.plan.vm import GUEST_FILES
from hutch.process.guest import Guest

if TYPE_CHECKING:
    from hutch.qmp import Monitor

__all__ = ["Loaded", "connect_cards", "load_machine", "opened", "save_machine", "saved_size"]
__all__ += ["STATE_FILE", "Saved", "check_movable", "twin_setup", "write_record", "write_state"]

STATE_FILE, _DISK, _RECORD = "state", "disk.raw", "saved.json"
# How long the memory is written while the machine runs and dirties it; then it is stopped.
_PATIENCE_S = 5.0
_PAUSE_MS = 20


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What a later load must know. `unacked` is input that the process had not taken."""

    unacked: int
    cards: int
    machine: MachineRecord


def save_machine(directory: str, target: str, *, cards: int, end_as: str = "") -> None:
    """Save a running machine to an existing, empty directory.

    With `end_as` the target gets that name when all is on disk, then QEMU ends, and the
    instance's own disk stays where it is. Otherwise the machine goes on, and so it does after
    any failure; what a failure left in the target is the caller's to remove.
    """
    from hutch.qmp import conversation
    from hutch.qmp import machine as qmp

    run = f"{directory}/run"
    machine = load_record(directory)
    if machine.shares:
        raise _immovable("it has directories of the host")
    with (
        open(f"{target}/{STATE_FILE}", "xb") as state,
        conversation(f"{run}/{QMP_SOCKET}") as monitor,
    ):
        check_movable(monitor, cards)
        with Guest(run).quiesce(monitor.fileno()) as quiet:
            write_state(monitor, state.fileno(), emulated=machine.accelerator == "tcg")
            saved = Saved(unacked=quiet.unacked, cards=cards, machine=machine)
            if not end_as:
                _copy_disk(f"{directory}/{_DISK}", f"{target}/{_DISK}")
                qmp.cont(monitor)
            else:
                os.fsync(state.fileno())
                _sync(f"{directory}/{_DISK}")
                write_record(target, saved)
                os.rename(target, end_as)
                _sync(os.path.dirname(end_as))
                qmp.quit(monitor)
                quiet.wait_end()
    if not end_as:
        write_record(target, saved)


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
        raise _immovable(reasons[0])


def _immovable(reason: str) -> Unsupported:
    return Unsupported(
        f"the machine's state cannot be saved: {reason}",
        hint="directories and volumes (-v) and devices of the host hold a machine where it is",
    )


def write_state(monitor: Monitor, fd: int, *, emulated: bool) -> None:
    """Write memory and devices; when it returns the machine is stopped, its disks flushed."""
    from hutch.qmp.machine import stop
    from hutch.qmp.migration import save_state, set_parameters

    if emulated and not monitor.version.sees_emulated_writes:
        stop(monitor)
    set_parameters(monitor, max_bandwidth=0, downtime_limit=_PAUSE_MS)
    save_state(monitor, fd, ignore_shared=False, patience_s=_PATIENCE_S)


def _copy_disk(source: str, target: str) -> None:
    from hutch.storage.sparse import copy_sparse

    copy_sparse(source, target)


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
    """A state that a machine is about to go on from: an open descriptor, the caller's."""

    state: int
    unacked: int
    cards: int
    machine: MachineRecord


@contextmanager
def opened(saved: SavedState) -> Iterator[Loaded]:
    """Open a saved state for one machine."""
    record = _load(saved.directory)
    state = os.open(f"{saved.directory}/{STATE_FILE}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Loaded(
            state=state, unacked=record.unacked, cards=record.cards, machine=record.machine
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
    made: list[guest.SetupOp] = renewal()
    made.append(guest.Hostname(name=launch.spec.hostname or launch.name))
    made += [
        guest.Rewrite(path=f"{GUEST_FILES}/{name}", content=content) for name, content in files
    ]
    for endpoint in launch.endpoints:
        made.append(guest.Flush(interface=endpoint.interface))
    return made + interfaces(launch.endpoints)


def saved_size(directory: str) -> int:
    """Return the bytes that a saved state takes on disk."""
    return sum(entry.stat().st_blocks * 512 for entry in Path(directory).iterdir())
