"""Machines that run: looked into, frozen, saved, forked, and given to another host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.drivers import failures
from hutch.drivers.base import Launch, ProcessRow
from hutch.drivers.confinement import Confinement
from hutch.drivers.grouped import Grouped
from hutch.drivers.vm import inside
from hutch.drivers.vm.awake import check_awake
from hutch.drivers.vm.boot import QMP_SOCKET
from hutch.drivers.vm.kernels import Kernels
from hutch.drivers.vm.launching import MachineLauncher
from hutch.drivers.vm.machine import MachineRecord, load_record
from hutch.drivers.vm.state import (
    connect_cards,
    fork_machine,
    save_disk,
    save_machine,
)
from hutch.errors import (
    HutchError,
    NotFound,
    Unsupported,
    WrongState,
)
from hutch.linux.cgroup import Stats
from hutch.process.guest import Guest
from hutch.process.launcher import Launcher
from hutch.spec.model import InstanceSpec
from hutch.storage.disks import Disks
from hutch.storage.snapshots import QCOW2_FILE

if TYPE_CHECKING:
    from hutch.drivers.base import ForkedState, GuestFiles
    from hutch.drivers.moving import Departure, Streams
    from hutch.qmp import Monitor

__all__ = ["RunningMachines"]

_PAUSE_TRIES = 3


class RunningMachines(Grouped):
    """The part of the driver that finds a machine running and leaves it so."""

    def __init__(self, root: Path, launcher: Launcher, kernels: Kernels) -> None:
        super().__init__(root)
        self._confinement = Confinement(root)
        self._machines = MachineLauncher(root, launcher, kernels)

    def _directory(self, identifier: str) -> str:
        return str(self._root / "instances" / identifier)

    def _guest(self, identifier: str) -> Guest:
        if not self._has_agent(identifier):
            raise Unsupported(
                f"instance {identifier[:12]}: a machine that starts from a disk has no agent",
                hint="use `hutch console`, or SSH over its network",
            )
        self._check_awake(identifier)
        return Guest(f"{self._directory(identifier)}/run")

    def _monitor(self, identifier: str) -> AbstractContextManager[Monitor]:
        """Return a conversation with the machine's QEMU."""
        from hutch.qmp import conversation

        self._check_awake(identifier)
        return conversation(f"{self._directory(identifier)}/run/{QMP_SOCKET}")

    def _check_awake(self, identifier: str) -> None:
        with suppress(NotFound):
            pids = self._hierarchy.load(identifier).pids()
            check_awake(f"machine {identifier[:12]}", pids)

    def _has_agent(self, identifier: str) -> bool:
        return not os.path.exists(f"{self._directory(identifier)}/{QCOW2_FILE}")

    # ---- what is inside -----------------------------------------------------------------

    def tree(self, identifier: str) -> GuestFiles:
        """Return the files of a running machine's program."""
        from hutch.drivers.vm.files import GuestTree

        return GuestTree(self._guest(identifier))

    @contextmanager
    def stored(self, launch: Launch) -> Iterator[GuestFiles]:
        """Hold the files of a stopped machine; the caller has the instance's lock."""
        from hutch.drivers.vm.files import GuestTree
        from hutch.drivers.vm.maintenance import maintained

        with maintained(self._machines, self._hierarchy, launch) as guest:
            yield GuestTree(guest)

    def process_rows(self, identifier: str) -> list[ProcessRow]:
        """Return the processes of the program, as the guest numbers them."""
        return inside.process_rows(self._guest(identifier))

    def stats(self, identifier: str) -> Stats:
        """Return what the machine costs the host in processor time, and what the guest uses
        of its memory."""
        used = self._group(identifier).stats()
        if not self._has_agent(identifier):
            return used
        found = inside.combined(used, inside.stats(self._guest(identifier)))
        # What a balloon has taken is part of the guest's total all the same.
        most = load_record(self._directory(identifier)).memory
        if found.memory.limit is not None and found.memory.limit > most:
            limited = msgspec.structs.replace(found.memory, limit=most)
            return msgspec.structs.replace(found, memory=limited)
        return found

    def oom_kills(self, identifier: str) -> int:
        """Return how often a kernel killed for lack of memory, the host's or the guest's."""
        from hutch.drivers.vm.console import count_oom_kills

        count = super().oom_kills(identifier)
        with suppress(NotFound):
            directory = self._directory(identifier)
            load_record(directory)  # there was a start
            count += count_oom_kills(directory)
        return count

    def why_lost(self, identifier: str) -> str:
        """Return the monitor's last words, where it was not the program that ended."""
        from hutch.drivers.vm.console import monitors_words

        return monitors_words(self._directory(identifier))

    def record(self, identifier: str) -> MachineRecord | None:
        """Return what the last start decided about a machine; None before the first."""
        try:
            return load_record(self._directory(identifier))
        except NotFound:
            return None

    # ---- life ---------------------------------------------------------------------------

    def pause(self, identifier: str) -> None:
        """Stop the machine's processors."""
        from hutch.qmp.machine import query_status, stop

        with self._monitor(identifier) as monitor:
            # A machine that stands still already does not heed `stop`. Its monitor process may
            # let it go on between the two, so a machine that runs after all is told again.
            for _ in range(_PAUSE_TRIES):
                stop(monitor)
                status = query_status(monitor)
                if status != "running":
                    break
            if status in ("running", "io-error"):
                raise WrongState(
                    "the machine stands still: the host has no room for what it writes",
                    hint="make room, and it goes on by itself",
                )

    def unpause(self, identifier: str) -> None:
        """Let them run, and what was frozen in the guest; its clock is set, which stood still."""
        from hutch.qmp.machine import cont

        with self._monitor(identifier) as monitor:
            cont(monitor)
        if self._has_agent(identifier):
            inside.renew(self._guest(identifier))
            inside.freeze(self._guest(identifier), frozen=False)

    def end_program(self, identifier: str) -> bool:
        """Have the guest kill the program and put its file systems away."""
        try:
            self._guest(identifier).end_process()
        except (HutchError, OSError):
            return False
        return True

    def freeze_programs(self, identifier: str) -> None:
        """Stop the program and all beside it, but for the agent."""
        inside.freeze(self._guest(identifier), frozen=True)

    def save(self, identifier: str, target: str, *, cards: int, end_as: str = "") -> None:
        """Save a running machine to a directory; see `hutch.drivers.base.Savable`."""
        directory = self._directory(identifier)
        self._check_awake(identifier)
        with failures.translated(f"save of {identifier[:12]}"):
            if self._has_agent(identifier):
                disks = Disks(self._root)
                save_machine(directory, target, disks, cards=cards, end_as=end_as)
                return
            from hutch.drivers.vm.disk_state import save_disk_machine

            save_disk_machine(directory, target, cards=cards, end_as=end_as)

    def save_disk(self, identifier: str, target: str) -> None:
        """Save a running machine's disk; see `hutch.drivers.base.Savable`."""
        directory = self._directory(identifier)
        self._check_awake(identifier)
        with failures.translated(f"snapshot of {identifier[:12]}"):
            if self._has_agent(identifier):
                save_disk(directory, target, Disks(self._root))
                return
            from hutch.drivers.vm.disk_state import copy_running

            copy_running(directory, target)

    def check_savable(self, spec: InstanceSpec) -> None:
        """Refuse nothing by its specification; what is against it is found in the machine."""

    def awaken(self, identifier: str) -> bool:
        """Let a running machine go on whose saver was killed; see `hutch.drivers.base.Savable`."""
        if self._has_agent(identifier):
            return False  # its monitor sees to that
        from hutch.drivers.vm.disk_state import awaken

        return awaken(self._directory(identifier))

    def fork(self, identifier: str, target: str, *, cards: int) -> ForkedState:
        """Save a running machine for twins; see `hutch.drivers.base.Savable`."""
        self._check_awake(identifier)
        with failures.translated(f"fork of {identifier[:12]}"):
            directory = self._directory(identifier)
            return fork_machine(directory, target, Disks(self._root), cards=cards)

    # ---- to another host and from there -------------------------------------------------

    def proving_kernel(self) -> Path | None:
        """Return a guest kernel to try KVM with, None where the root has none yet."""
        return self._machines.proving_kernel()

    def blockers(self, identifier: str, *, cards: int) -> list[str]:
        """Return what holds a running machine on this host, nothing if nothing does."""
        from hutch.drivers.vm.state import check_movable

        try:
            with self._monitor(identifier) as monitor:
                check_movable(monitor, cards)
        except Unsupported as exc:
            return [exc.message + (f" ({exc.hint})" if exc.hint else "")]
        return []

    def depart(
        self, identifier: str, *, cards: int, streams: Streams, bandwidth: int, downtime_s: float
    ) -> AbstractContextManager[Departure]:
        """Copy a running machine to another host; see `hutch.drivers.moving.Movable`."""
        from hutch.drivers.vm.departing import departing

        return departing(
            self._directory(identifier),
            cards=cards,
            streams=streams,
            bandwidth=bandwidth,
            downtime_s=downtime_s,
        )

    def describe(self, identifier: str) -> bytes:
        """Return the record of a running machine, for another host's driver."""
        return msgspec.json.encode(load_record(self._directory(identifier)))

    def run_on(self, identifier: str) -> None:
        """Let a machine go on whose copying was cut short."""
        from hutch.drivers.vm.departing import run_on

        run_on(self._directory(identifier))

    def plug_in(self, identifier: str, *, cards: int) -> None:
        """Plug in the cards of a machine that has arrived, and set its clock."""
        connect_cards(self._directory(identifier), cards)
        inside.renew(self._guest(identifier))

    def wait_arrived(self, identifier: str, fd: int) -> None:
        """With post-copy: wait until all the memory of a machine that has arrived is there."""
        from hutch.drivers.vm.landing import wait_arrived

        wait_arrived(self._directory(identifier), fd)

    def answers(self, identifier: str) -> bool:
        """Tell whether the agent of a machine answers."""
        try:
            inside.stats(self._guest(identifier))
        except HutchError:
            return False
        return True
