"""`console`: the serial console of a virtual machine."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from hutch.cli.command import Command
from hutch.cli.output import write_bytes
from hutch.cli.session import Invocation
from hutch.cli.terminal import KeyFilter, detach_keys, raw_mode

if TYPE_CHECKING:
    from hutch.engine.instance import Instance

__all__ = ["COMMANDS"]

_CHUNK = 4096
_UNSENT = 1 << 20
_KEYS = "ctrl-]"


def _console(invocation: Invocation) -> int:
    instance = invocation.engine.get(invocation.arguments[0])
    if instance.info().spec.machine.from_disk is not None:
        return _streams(invocation, instance)
    if invocation.flag("log"):
        write_bytes(instance.console_log())
        return 0
    keys = KeyFilter(detach_keys(invocation.options.get("detach_keys", _KEYS)))
    with instance.console() as console:
        if not os.isatty(0):
            _relay(console, keys, stdin=False)
            return 0
        with raw_mode(0):
            _relay(console, keys, stdin=True)
    return 0


def _streams(invocation: Invocation, instance: Instance) -> int:
    """The console of a machine that starts from a disk, which is its streams."""
    from hutch.cli.terminal import Streams, relay, terminal_size

    if invocation.flag("log"):
        for record in instance.logs():
            write_bytes(record.data)
        return 0
    stdin = os.isatty(0)
    session = instance.attach(stdin=stdin)
    if stdin:
        session.resize(*terminal_size())
    return relay(
        session,
        tty=True,
        streams=Streams(stdin=stdin, ends=False),
        keys=detach_keys(invocation.options.get("detach_keys", _KEYS)),
        proxy_signals=False,
    )


def _relay(console: object, keys: KeyFilter, *, stdin: bool) -> None:
    """Carry bytes both ways until the machine ends or the detach keys were typed."""
    from hutch.engine.console import Console

    assert isinstance(console, Console)
    poll = select.poll()
    poll.register(console.fileno(), select.POLLIN)
    if stdin:
        poll.register(0, select.POLLIN)
    unsent = b""
    while True:
        poll.modify(console.fileno(), select.POLLIN | (select.POLLOUT if unsent else 0))
        for fd, events in poll.poll():
            if fd == 0:
                typed = os.read(0, _CHUNK)
                out, left = keys.take(typed)
                # A guest that stands still reads nothing: the keys that leave it work still.
                unsent = (unsent + out)[:_UNSENT]
                if left or not typed:
                    console.try_send(unsent)
                    return
            elif events & ~select.POLLOUT:
                data = console.receive()
                if not data:
                    return
                write_bytes(data)
        unsent = unsent[console.try_send(unsent) :] if unsent else unsent


COMMANDS = {
    "console": Command(
        handler=_console,
        summary="Join the serial console of a virtual machine, where its kernel writes.",
        arguments="INSTANCE",
        low=1,
        high=1,
        options=(
            ("detach-keys", "", "text", "KEYS", "Keys that leave it (ctrl-])"),
            ("log", "", "flag", "", "Show what was written there until now, and end"),
        ),
        epilog="The program's own streams are not there: `hutch logs` and `hutch attach` have "
        "them. One at a time can be joined to a console. Of a machine that starts from a disk, "
        "the console is its streams, and any number can join.",
        examples=("hutch console vm", "hutch console --log vm"),
    ),
}
