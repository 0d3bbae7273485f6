"""What an instance uses: counters, network traffic, its processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hutch.drivers.base import Guests, ProcessRow
from hutch.engine.context import Context
from hutch.engine.exec import running
from hutch.engine.records import InstanceRecord
from hutch.engine.results import DiskSize, NetworkUsage, ProcessTable
from hutch.engine.stop import current
from hutch.errors import InvalidArgument, NotFound, Unsupported, WrongState
from hutch.lifecycle import State

if TYPE_CHECKING:
    from hutch.linux.cgroup import Stats

__all__ = ["disk_size", "network_stats", "stats", "stats_stream", "top"]

_LIVE = (State.RUNNING, State.PAUSED)
_TITLES = ("UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD")


def _live(context: Context, identifier: str) -> InstanceRecord:
    record = current(context, identifier)
    if record.state not in _LIVE:
        raise WrongState(f"instance {record.name} is not running", hint="start it first")
    return record


def stats(context: Context, identifier: str) -> Stats:
    """Return one reading of the counters."""
    record = _live(context, identifier)
    found = context.driver(record.spec.isolation).stats(identifier)
    if record.spec.isolation == "container" and not (found.cpu.total_ns or found.pids.current):
        from hutch.engine.uncounted import stats_beside

        return stats_beside(record.pid)
    return found


def disk_size(context: Context, identifier: str) -> DiskSize:
    """Return what an instance's files take."""
    record = current(context, identifier)
    layers = {layer.chain_id: layer.size for layer in context.layers.list()}
    shared = sum(layers.get(chain, 0) for chain in record.chain_ids)
    writable = context.snapshots.usage(record.id).bytes
    return DiskSize(writable=writable, total=writable + shared)


def stats_stream(context: Context, identifier: str, interval_s: float) -> Iterator[Stats]:
    """Yield readings until the instance ends."""
    if interval_s <= 0:
        raise InvalidArgument(f"must be above 0, got {interval_s}", field="interval")
    while True:
        try:
            yield stats(context, identifier)
        except (WrongState, NotFound):
            return
        time.sleep(interval_s)


def _shares_network(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")


def network_stats(context: Context, identifier: str) -> tuple[NetworkUsage, ...]:
    """Return the traffic of the interfaces inside, loopback left out."""
    record = _live(context, identifier)
    is_machine = record.spec.isolation == "vm"
    try:
        if is_machine and _shares_network(record.pid):
            return ()  # QEMU's own network, whose traffic is that of a program of the host
        with open(f"/proc/{record.pid}/net/dev") as file:
            lines = file.read().splitlines()[2:]
    except OSError:
        return ()
    usage = []
    for line in lines:
        name, _, rest = line.partition(":")
        numbers = [int(word) for word in rest.split()]
        if name.strip() == "lo" or len(numbers) < 12:
            continue
        # Beside the interfaces, a machine's namespace has the bridges and taps they lead to.
        if is_machine and not name.strip().startswith("eth"):
            continue
        usage.append(
            NetworkUsage(
                name=name.strip(),
                received_bytes=numbers[0],
                received_packets=numbers[1],
                received_errors=numbers[2],
                received_dropped=numbers[3],
                sent_bytes=numbers[8],
                sent_packets=numbers[9],
                sent_errors=numbers[10],
                sent_dropped=numbers[11],
            )
        )
    return tuple(usage)


def top(context: Context, identifier: str, ps_args: Sequence[str] = ()) -> ProcessTable:
    """List the processes; with arguments through the host's ps, whose output must have PID."""
    if any("\0" in word for word in ps_args):
        raise InvalidArgument("holds a NUL character", field="ps_args")
    record = running(context, identifier) if not ps_args else _live(context, identifier)
    driver = context.driver(record.spec.isolation)
    if isinstance(driver, Guests):
        return _guest_table(driver.process_rows(identifier), ps_args)
    pids = sorted(driver.processes(identifier))
    if not pids:
        from hutch.engine.uncounted import processes_beside

        pids = processes_beside(record.pid)
    if ps_args:
        return _ps(pids, ps_args)
    rows = [row for pid in pids if (row := _process_row(pid)) is not None]
    return ProcessTable(titles=_TITLES, rows=tuple(rows))


def _guest_table(processes: Sequence[ProcessRow], ps_args: Sequence[str]) -> ProcessTable:
    """Return the processes of a virtual machine, numbered as its own kernel does."""
    if ps_args:
        raise Unsupported(
            "ps_args: the host's ps does not see into a virtual machine",
            hint="leave the arguments out, or run ps inside with exec",
        )
    rows = tuple(
        (
            str(process.uid),
            str(process.pid),
            str(process.ppid),
            "0",
            _time_of_day(process.started),
            process.tty or "?",
            _clock(process.cpu_s),
            process.command,
        )
        for process in processes
    )
    return ProcessTable(titles=_TITLES, rows=rows)


def _time_of_day(seconds: float) -> str:
    try:
        return time.strftime("%H:%M", time.localtime(seconds))
    except (OverflowError, OSError):
        return "?"  # a guest may say what it likes


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _ps(pids: Sequence[int], ps_args: Sequence[str]) -> ProcessTable:
    from hutch.process.run import run_command

    # Asked for them by number, ps shows those of other users and terminals too. Some options
    # do not go with that (`f`).
    chosen = f"-q{','.join(map(str, pids))}"
    done = run_command(["ps", *ps_args, chosen], timeout_s=10)
    if done.returncode != 0:
        done = run_command(["ps", *ps_args], timeout_s=10)
    if done.returncode != 0:
        message = done.stderr.decode("utf-8", "replace").strip()
        raise InvalidArgument(f"ps: {message}", field="ps_args")
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    titles = lines[0].split() if lines else []
    if "PID" not in titles:
        raise InvalidArgument("the output of ps has no PID column", field="ps_args")
    column, wanted = titles.index("PID"), {str(pid) for pid in pids}
    rows = [line.split(None, len(titles) - 1) for line in lines[1:]]
    kept = (tuple(row) for row in rows if len(row) > column and row[column] in wanted)
    return ProcessTable(titles=tuple(titles), rows=tuple(kept))


def _process_row(pid: int) -> tuple[str, ...] | None:
    """Return the columns of `ps -ef` for one process, None when it has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            content = file.read()
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read().replace(b"\0", b" ").strip()
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
    name_end = content.rindex(b")")
    fields = content[name_end + 2 :].split()
    hertz = os.sysconf("SC_CLK_TCK")
    seconds = (int(fields[11]) + int(fields[12])) // hertz
    started = time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / hertz)
    name = content[content.index(b"(") + 1 : name_end]
    return (
        _user_name(uid),
        str(pid),
        fields[1].decode(),
        "0",
        time.strftime("%H:%M", time.localtime(started)),
        "?" if fields[4] == b"0" else f"pts/{int(fields[4]) & 0xFF}",
        _clock(seconds),
        (command or b"[" + name + b"]").decode("utf-8", "replace"),
    )


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
