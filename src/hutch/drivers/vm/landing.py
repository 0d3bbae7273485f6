"""A QEMU that waits for a machine which another host still has: its disk, then its memory.

QEMU is confined and connects to nobody. Its streams come through two listening sockets in the
instance's run directory; whoever carries them (another process of ours) connects there.
"""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hutch.drivers.failures import last_line
from hutch.drivers.moving import Arrival
from hutch.drivers.vm.departing import (
    COPYING_CAPABILITIES,
    WRITABLE,
    stream_parameters,
    wanted_capabilities,
)
from hutch.drivers.vm.sandbox import listen_at
from hutch.errors import HutchError, OperationTimeout, OutcomeUnknown, Unavailable, Unsupported
from hutch.qmp.devices import set_link
from hutch.qmp.errors import CommandFailed
from hutch.qmp.machine import cont, query_status
from hutch.qmp.migration import (
    migrate_incoming,
    migrate_incoming_at_name,
    set_capabilities,
    set_parameters,
)
from hutch.qmp.mirror import export_disk, unexport_disk

if TYPE_CHECKING:
    from hutch.qmp import Monitor

__all__ = ["QemuLanding", "connect_stream", "wait_arrived"]

DISK_SOCKET = "disk.sock"
MEMORY_SOCKET = "memory.sock"
_SOCKETS = {"disk": DISK_SOCKET, "memory": MEMORY_SOCKET}
_NAME = "memory.name"
_CONNECT_S = 60.0
_LOAD_S = 120.0
_LOOK_MS = 20
_LAST_WORDS = 250


class QemuLanding:
    """See `hutch.drivers.moving.Landing`."""

    def __init__(self, monitor: Monitor, directory: str, arrival: Arrival, held: ExitStack) -> None:
        self._monitor = monitor
        self._directory = directory
        self._streams = arrival.streams
        self._cards = arrival.cards
        self._held = held
        self._memory: socket.socket

    def listen(self) -> None:
        monitor, streams = self._monitor, self._streams
        wanted = wanted_capabilities(monitor.version, streams)
        off = [name for name in (*COPYING_CAPABILITIES, "x-ignore-shared") if name not in wanted]
        try:
            set_capabilities(monitor, wanted, off=off)
        except CommandFailed as exc:
            raise Unsupported(f"the target's QEMU: {exc.description}") from exc
        # It would tell the network of addresses that may not be the machine's here.
        set_parameters(monitor, announce_rounds=0, **stream_parameters(streams))
        run = f"{self._directory}/run"
        disk = listen_at(run, DISK_SOCKET)
        self._held.callback(os.close, disk)
        export_disk(monitor, WRITABLE, disk)
        self._memory = self._held.enter_context(socket.socket(fileno=listen_at(run, MEMORY_SOCKET)))
        for name in (DISK_SOCKET, MEMORY_SOCKET):
            self._held.callback(_unlink, f"{run}/{name}")

    def begin(self) -> None:
        from hutch.qmp.descriptors import send_fd

        if self._streams.channels:
            self._begin_parallel()
            return
        self._memory.settimeout(_CONNECT_S)
        try:
            stream, _ = self._memory.accept()
        except TimeoutError:
            raise OperationTimeout("the stream of the memory has not come") from None
        with stream, send_fd(self._monitor, stream.fileno()) as name:
            migrate_incoming(self._monitor, f"fd:{name}")

    def _begin_parallel(self) -> None:
        """Let QEMU listen itself; whoever carries a stream finds the name of it written down."""
        from hutch.drivers.vm.rendezvous import new_name, require_own_network

        require_own_network(self._directory)
        name = new_name()
        migrate_incoming_at_name(self._monitor, name)
        path = f"{self._directory}/run/{_NAME}"
        with open(path, "x") as file:
            file.write(name)
        self._held.callback(_unlink, path)

    def watch(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._monitor.fileno(), select.POLLIN)
        while True:
            self._look()
            if any(ready == fd for ready, _ in poll.poll()):
                return

    def _look(self) -> str:
        """Return what QEMU last said of the migration; raise when it has given up."""
        try:
            events = self._monitor.next_events()
        except HutchError as exc:
            raise self._failed(exc.message) from exc
        said = [str(event.data.get("status")) for event in events if event.name == "MIGRATION"]
        if "failed" in said:
            raise self._failed("qemu gave up")
        return said[-1] if said else ""

    def _failed(self, reason: str) -> Unavailable:
        said = last_line(f"{self._directory}/qemu.log") or reason
        return Unavailable(f"the machine cannot be taken over: {said}")

    def end_disk(self) -> None:
        unexport_disk(self._monitor, WRITABLE)

    def wait_loaded(self) -> None:
        """With post-copy it could run a moment after its devices are there, which no event
        tells of."""
        deadline = time.monotonic() + _LOAD_S
        pause = 0.0005
        try:
            while query_status(self._monitor) == "inmigrate":
                self._look()
                if time.monotonic() > deadline:
                    raise OperationTimeout("the machine has not come whole in the time allowed")
                time.sleep(pause)
                pause = min(pause * 1.5, 0.002)
        except OutcomeUnknown as exc:
            raise self._failed(exc.message) from exc
        for index in range(self._cards):
            set_link(self._monitor, f"nic{index}", up=False)

    def go(self) -> None:
        cont(self._monitor)


def connect_stream(directory: str, name: str) -> socket.socket:
    """Connect to the QEMU that waits in an instance's directory: to its `disk` or `memory`.
    Raise `Unavailable` where nobody waits."""
    run = f"{directory}/run"
    if name == "memory" and os.path.exists(f"{run}/{_NAME}"):
        from hutch.drivers.vm.rendezvous import connect_at

        with open(f"{run}/{_NAME}") as file:
            return connect_at(directory, file.read())
    handle = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # By descriptor: a socket's path has room for 107 bytes only.
        local.connect(f"/proc/self/fd/{handle}/{_SOCKETS[name]}")
    except OSError as exc:
        local.close()
        raise Unavailable("the machine does not wait for a stream") from exc
    finally:
        os.close(handle)
    return local


def wait_arrived(directory: str, fd: int) -> None:
    """Wait until the memory of a machine that runs already is complete; see
    `hutch.drivers.moving.Movable.wait_arrived`."""
    from hutch.drivers.vm.boot import QMP_SOCKET
    from hutch.qmp import conversation
    from hutch.qmp.migration import query_migrate

    source = select.poll()
    source.register(fd, select.POLLIN)
    left = _LAST_WORDS
    with conversation(f"{directory}/run/{QMP_SOCKET}") as monitor:
        while (status := query_migrate(monitor).status) not in ("completed", "none"):
            # A source that speaks has seen the end: so will this side, in a moment.
            left -= bool(source.poll(_LOOK_MS))
            if left < 0 or status in ("failed", "postcopy-paused", "postcopy-recover"):
                raise Unavailable("the rest of the machine's memory does not come any more")
            if left < _LAST_WORDS:
                time.sleep(_LOOK_MS / 1000)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
