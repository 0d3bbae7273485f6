"""What CRIU says when it cannot: its first error, with the cure where one is known."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hutch.errors import HutchError, Unsupported

__all__ = ["criu_failure", "first_error", "unsavable"]

_ERROR = re.compile(r"Error \((?P<where>[^)]*)\): (?P<text>.*)")
# CRIU would like to have more descriptors, and does without; a helper's end is no reason.
_HARMLESS = ("RLIMIT_NOFILE", "exited, status=", "Unable to create tun")

_ANONYMOUS = re.compile(r"anon_inode:\[?([a-z_]+)\]?")
_SAVABLE = frozenset(
    ("eventfd", "eventpoll", "fanotify", "inotify", "pidfd", "signalfd", "timerfd")
)

# What CRIU's errors look like, what that is in a program, and what helps.
_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"is io_uring",
        "the program uses io_uring",
        "let it use epoll (UV_USE_IO_URING=0 for libuv), or run it with --vm",
    ),
    (
        r"[Ee]xternal (unix )?socket|unix: .*(peer|[Ee]xternal)|Can't dump half of",
        "a Unix socket is connected to a process outside of the container",
        "close the connection, or run it with --vm",
    ),
    (
        r"Can't lookup mount=|unreachable path|Can't look ?up mount",
        "it has a file open that is not in its file system",
        "end what `hutch exec` or a host's process handed to it",
    ),
    (
        r"in-flight|Can't dump .*socket|Unsupported socket|Unknown socket|family \d+ socket|"
        r"BUG: Unknown socket|packet socket",
        "it has a socket of a kind that CRIU cannot save",
        "close it, or run it with --vm",
    ),
    (
        r"^descriptor \d+ of|Can't dump file .* of that type|Unknown .*anon|anon_inode|"
        r"perf_event|bpf|type .* is not supported",
        "it has a descriptor of a kind that CRIU cannot save",
        "close it, or run it with --vm",
    ),
    (
        r"character device|device node|chr[ _]dev|Can't dump .*mode 2",
        "it has a device open",
        "close it, or run it with --vm",
    ),
    (
        r"ghost|link-remap|[Uu]nlinked",
        "a file that it has open was deleted",
        "close it first",
    ),
    (
        r"[Ff]ile .* has bad (size|mode)|has bad build-?ID|No such file or directory",
        "a file that it had open is not as it was",
        "restore the files that are mounted into it, or start it anew",
    ),
    (
        r"Address already in use|Can't bind inet",
        "it listens at an address that somebody else has by now",
        "end the other one; a twin needs a network of its own",
    ),
    (
        r"Can't get rlimit",
        "its processes are of another user, and this host withholds CAP_SYS_RESOURCE from us",
        "give hutch that capability, or run the container as root",
    ),
    (
        r"No space left",
        "the disk is full",
        "free disk space and retry",
    ),
    (
        r"timed? ?out|Timeout",
        "its processes did not stand still in time",
        "try again when less is going on, or with less memory in use",
    ),
    (r"is not dumpable|ptrace", "another program traces it", "end the debugger or strace first"),
)


def first_error(log: str) -> str:
    """Return the first error of a log of CRIU that counts; "" where there is none."""
    try:
        text = Path(log).read_text(errors="replace")
    except OSError:
        return ""
    for found in _ERROR.finditer(text):
        if not any(word in found["text"] for word in _HARMLESS):
            return f"{found['text'].strip()} ({found['where']})"
    return ""


def unsavable(pids: Iterable[int]) -> str:
    """Return the first descriptor of these processes that CRIU is known not to save, as text;
    "" where there is none. Its own errors do not always tell which it was."""
    for pid in sorted(pids):
        try:
            entries = os.listdir(f"/proc/{pid}/fd")
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            continue
        for fd in entries:
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            found = _ANONYMOUS.fullmatch(target)
            if found and found[1] not in _SAVABLE:
                return f"descriptor {fd} of {name} is {found[1]}"
    return ""


def criu_failure(what: str, log: str, message: str = "", *, pids: Iterable[int] = ()) -> HutchError:
    """Return the error for a CRIU that failed to `what`, from its log, and from what the
    processes `pids` have open."""
    said = first_error(log) or message or "no reason given"
    open_ = unsavable(pids)
    if open_:
        said = f"{open_}: {said}"
    for pattern, cause, cure in _CAUSES:
        if re.search(pattern, said):
            return Unsupported(f"CRIU cannot {what} it: {cause}: {said}", hint=cure)
    return Unsupported(
        f"CRIU cannot {what} it: {said}", hint="run it with --vm; `hutch commit` keeps its files"
    )
