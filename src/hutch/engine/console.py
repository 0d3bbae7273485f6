"""The serial console of a virtual machine: its kernel's, beside the streams of the program."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.engine.lookup import load
from hutch.engine.records import InstanceRecord
from hutch.engine.stop import current
from hutch.errors import Unsupported, WrongState
from hutch.lifecycle import State

if TYPE_CHECKING:
    import _socket
    from typing import Self

__all__ = ["Console", "console_log", "open_console"]

_RECEIVE = 64 << 10


class Console:
    """A link to the console: bytes both ways. Close it, or use it in a `with` block."""

    def __init__(self, link: _socket.socket, held: ExitStack) -> None:
        self._link = link
        self._held = held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the link's descriptor, readable when something was written."""
        return self._link.fileno()

    def send(self, data: bytes) -> None:
        """Type this, waiting until the guest has room for it."""
        self._link.sendall(data)

    def try_send(self, data: bytes) -> int:
        """Type as much of this as the guest has room for now; return how many bytes that was."""
        import _socket

        try:
            return self._link.send(data, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except ConnectionError:
            return len(data)  # the end is told to who reads

    def receive(self) -> bytes:
        """Wait for what is written; nothing at the machine's end."""
        try:
            return self._link.recv(_RECEIVE)
        except ConnectionError:
            return b""

    def close(self) -> None:
        """Leave the console to others."""
        self._link.close()
        self._held.close()


def open_console(context: Context, identifier: str) -> Console:
    """Return a link to the console of a running machine; `Busy` while another has joined it."""
    from hutch.drivers.vm.console import connect

    record = _machine(current(context, identifier))
    if record.state not in (State.RUNNING, State.PAUSED):
        raise WrongState(f"instance {record.name} is not running", hint="start it first")
    with ExitStack() as held:
        link = connect(str(context.directory(identifier)), held)
        return Console(link, held.pop_all())


def console_log(context: Context, identifier: str, limit: int) -> bytes:
    """Return the last `limit` bytes of what was written to the console, in this start and the
    one before."""
    from hutch.drivers.vm.console import last_words

    _machine(load(context, identifier))
    return last_words(str(context.directory(identifier)), limit)


def _machine(record: InstanceRecord) -> InstanceRecord:
    if record.spec.isolation != "vm":
        raise Unsupported(
            f"instance {record.name}: a container has no console of its own",
            hint="its program's streams are shown by `hutch logs` and `hutch attach`",
        )
    if record.spec.machine.from_disk is not None:
        raise Unsupported(
            f"instance {record.name}: its serial console is its streams",
            hint="attach to it, and read its logs",
        )
    return record
