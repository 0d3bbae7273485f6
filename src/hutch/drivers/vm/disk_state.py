"""The state of a machine without an agent: saved, gone on from, and the files that belong to it.

Nothing in the guest is told, so it goes on as the machine it was, with its addresses, or not
at all. Whoever saves it and is killed leaves it standing still: `awaken` lets it go on.
"""

from __future__ import annotations

import os
from contextlib import suppress

from hutch.drivers.vm.boot import QMP_SOCKET
from hutch.drivers.vm.fromdisk import SEED_FILE, USER_DATA_FILE, VARIABLES_FILE
from hutch.drivers.vm.machine import load_record
from hutch.drivers.vm.state import (
    STATE_FILE,
    Saved,
    check_devices,
    check_movable,
    write_record,
    write_state,
)
from hutch.drivers.vm.tpm import STATE_DIRECTORY
from hutch.errors import HutchError
from hutch.storage.snapshots import QCOW2_FILE
from hutch.storage.sparse import copy_sparse

__all__ = [
    "TPM_FILE",
    "awaken",
    "copy_files",
    "copy_running",
    "put_back_files",
    "save_disk_machine",
]

_TPM_KEPT = "tpm2-00.permall"
TPM_FILE = f"{STATE_DIRECTORY}/{_TPM_KEPT}"
# What of an instance's directory is the machine's, and what it is called in a snapshot.
_FILES = {
    QCOW2_FILE: QCOW2_FILE,
    VARIABLES_FILE: VARIABLES_FILE,
    USER_DATA_FILE: USER_DATA_FILE,
    SEED_FILE: SEED_FILE,
    TPM_FILE: _TPM_KEPT,
}
_STOPPED = frozenset({"postmigrate", "paused", "finish-migrate"})


def save_disk_machine(directory: str, target: str, *, cards: int, end_as: str = "") -> None:
    """Save a running machine; as `hutch.drivers.vm.state.save_machine`.

    Without `end_as` its files are copied while it stands still.
    """
    from hutch.qmp import conversation
    from hutch.qmp import machine as qmp

    machine = load_record(directory)
    check_devices(machine)
    with (
        open(f"{target}/{STATE_FILE}", "xb") as state,
        conversation(f"{directory}/run/{QMP_SOCKET}") as monitor,
    ):
        check_movable(monitor, cards)
        try:
            write_state(monitor, state.fileno(), emulated=machine.accelerator == "tcg")
            saved = Saved(unacked=0, cards=cards, machine=machine)
            if end_as:
                os.fsync(state.fileno())
                _sync(f"{directory}/{QCOW2_FILE}")
                write_record(target, saved)
                os.rename(target, end_as)
                _sync(os.path.dirname(end_as))
                qmp.quit(monitor)
                return
            copy_files(directory, target)
        except BaseException:
            with suppress(HutchError):
                qmp.cont(monitor)
            raise
        qmp.cont(monitor)
    write_record(target, saved)


def copy_running(directory: str, target: str) -> None:
    """Copy the files of a running machine while it stands still: its disk is then as after a
    power cut, which nobody in it was told of."""
    from hutch.qmp import conversation
    from hutch.qmp import machine as qmp

    with conversation(f"{directory}/run/{QMP_SOCKET}") as monitor:
        qmp.stop(monitor)
        try:
            copy_files(directory, target)
        finally:
            qmp.cont(monitor)


def copy_files(directory: str, target: str) -> None:
    """Copy what is the machine's of an instance's directory; it stands still, or is at rest."""
    for name, kept in _FILES.items():
        with suppress(FileNotFoundError):
            copy_sparse(f"{directory}/{name}", f"{target}/{kept}")


def put_back_files(source: str, directory: str) -> None:
    """Put copies of a snapshot's files into an instance's directory, each replaced whole.

    The caller sees to it that a start in between is impossible.
    """
    for name, kept in _FILES.items():
        if not os.path.exists(f"{source}/{kept}"):
            continue
        if os.path.dirname(name):
            os.makedirs(f"{directory}/{os.path.dirname(name)}", mode=0o700, exist_ok=True)
        partial = f"{directory}/.{kept}"
        with suppress(FileNotFoundError):
            os.unlink(partial)
        copy_sparse(f"{source}/{kept}", partial)
        os.rename(partial, f"{directory}/{name}")


def awaken(directory: str) -> bool:
    """Let a machine go on that nobody saves any more; tell whether it stood still."""
    from hutch.qmp import conversation
    from hutch.qmp.machine import cont, query_status

    with conversation(f"{directory}/run/{QMP_SOCKET}") as monitor:
        if query_status(monitor) not in _STOPPED:
            return False
        monitor.execute("migrate_cancel")
        cont(monitor)
    return True


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
