"""A machine's serial console: what the guest's kernel wrote there, and a link to it.

`hutch-vmm` writes the log of a start, and keeps it from growing beyond some megabytes.
"""

from __future__ import annotations

import _socket
import os
import re
from contextlib import ExitStack, suppress

from hutch.drivers.vm.boot import CONSOLE_SOCKET
from hutch.errors import Busy, Unavailable
from hutch.linux.locks import lock_file

__all__ = ["LOG", "begin_logs", "connect", "count_oom_kills", "last_words"]
__all__ += ["monitors_words"]

LOG = "console.log"
QEMU_LOG = "qemu.log"
_MONITOR = "hutch-vmm: "
# mm/oom_kill.c; a limit of a control group has "Memory cgroup out of memory".
_KILLED = re.compile(rb"out of memory: Killed process \d+", re.IGNORECASE)
_READ = 256 << 10
_WORDS = 64 << 10  # a QEMU that has lost a device may go on about it for a while


def begin_logs(directory: str) -> None:
    """Put the logs of the start before aside, in place of those of the start before that."""
    for name in (LOG, QEMU_LOG):
        with suppress(FileNotFoundError):
            os.rename(f"{directory}/{name}", f"{directory}/{name}.1")


def last_words(directory: str, limit: int) -> bytes:
    """Return the last `limit` bytes of this start's log and the one's before."""
    found = b""
    for name in (LOG, f"{LOG}.1"):
        with suppress(FileNotFoundError), open(f"{directory}/{name}", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            left = limit - len(found)
            file.seek(max(0, size - left))
            found = file.read(left) + found
    return found


def monitors_words(directory: str) -> str:
    """Return what `hutch-vmm` said of a machine that was lost, "" where it said nothing.

    Like all in that log it may be a lie of a QEMU that was taken over: it is for people.
    """
    try:
        with open(f"{directory}/{QEMU_LOG}", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _WORDS))
            lines = file.read(_WORDS).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return ""
    # QEMU may have said something of its end after it.
    words = next((line for line in reversed(lines) if line.startswith(_MONITOR)), "")
    return "".join(c if c.isprintable() else "?" for c in words.removeprefix(_MONITOR))


def count_oom_kills(directory: str) -> int:
    """Return of how many programs the guest's kernel said that it killed for want of memory
    in this start. It is the guest's word, and only about itself; of a long log the end is
    looked at."""
    try:
        with open(f"{directory}/{LOG}", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _READ))
            return len(_KILLED.findall(file.read(_READ)))
    except FileNotFoundError:
        return 0


def connect(directory: str, held: ExitStack) -> _socket.socket:
    """Return a link to the console of a running machine, its own until `held` is closed.

    QEMU serves one at a time and keeps others waiting without a word: `Busy` says so.
    """
    try:
        held.enter_context(lock_file(f"{directory}/run/{CONSOLE_SOCKET}.lock", timeout_s=0.0))
    except FileNotFoundError as exc:
        raise Unavailable("the machine has no console: it does not run") from exc
    except Busy as exc:
        raise Busy(
            "somebody else has joined the machine's console",
            hint="`hutch console --log` shows what was written there",
        ) from exc
    link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        handle = os.open(f"{directory}/run", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # By descriptor: a socket's path has room for 107 bytes only.
            link.connect(f"/proc/self/fd/{handle}/{CONSOLE_SOCKET}")
        finally:
            os.close(handle)
    except (FileNotFoundError, ConnectionError) as exc:
        link.close()
        raise Unavailable("the machine has no console: it does not run") from exc
    except BaseException:
        link.close()
        raise
    return link
