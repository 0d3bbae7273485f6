"""Whether a machine's processes run at all: one that a signal has stopped answers nobody.

Every question to QEMU or the guest has an end, but a late one; this is known at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from hutch.errors import WrongState

__all__ = ["check_awake"]

# T: by a signal; t: by a debugger. See proc_pid_stat(5).
_STOPPED = ("T", "t")
# Who answers; the server of the shares, in the same control group, does not.
_ANSWERING = ("qemu", "hutch-vmm")


def check_awake(subject: str, pids: Iterable[int]) -> None:
    """Raise `WrongState` where one of a machine's processes stands still, with the cure."""
    for pid in pids:
        name, state = _state(pid)
        if state in _STOPPED and name.startswith(_ANSWERING):
            raise WrongState(
                f"{subject} cannot answer: its {name} (process {pid}) was stopped by a signal",
                hint=f"`kill -CONT {pid}` lets it go on, `hutch rm -f` removes the machine",
            )


def _state(pid: int) -> tuple[str, str]:
    """Return a process's name and state; empty where it has gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            head, _, rest = file.read(4096).rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    return head.partition("(")[2], rest[1:2]
