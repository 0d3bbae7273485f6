"""Keep each of a machine's processors to one of the host's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from hutch.errors import InvalidArgument, Unsupported
from hutch.spec.hardware import cpu_list

__all__ = ["pin_processors"]

# As QEMU names its threads with `debug-threads=on`.
_NAME = re.compile(r"CPU (\d+)/")


def pin_processors(pids: Iterable[int], cpuset: str) -> None:
    """Let the n-th processor of the machine with these processes run on the n-th of the host's
    that are listed (all that we may use, where none is), and the others from the start again.

    Call it again when processors came. An emulated machine with room for only one has no
    thread for it alone, and is left as it is.
    """
    usable = os.sched_getaffinity(0)
    listed = cpu_list(cpuset, "cpuset_cpus") if cpuset else tuple(sorted(usable))
    found = list(_threads(pids))
    if not found:
        return
    for number, thread in found:
        place = listed[number % len(listed)]
        try:
            os.sched_setaffinity(thread, {place})
        except ProcessLookupError:
            continue
        except PermissionError as exc:
            raise Unsupported("cpu_pin: this user may not place the machine's threads") from exc
        except OSError as exc:
            raise InvalidArgument(
                f"processor {place} of the host cannot be used", field="cpuset_cpus"
            ) from exc


def _threads(pids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield each processor's number with the thread that runs it."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/comm"):
            try:
                named = _NAME.match(task.read_text())
            except OSError:
                continue
            if named is not None:
                yield int(named[1]), int(task.parent.name)
