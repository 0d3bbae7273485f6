"""Save the processes of a running container with CRIU: what is around them, and its reasons.

`<saved>/criu/` is what CRIU wrote, `<saved>/checkpoint.json` what must be known to bring it
back, `<saved>/upper` the container's files where they are kept with it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.drivers.container.criu import criu_failure
from hutch.errors import Unsupported, WrongState
from hutch.host.criu import CriuFacts
from hutch.process.criu import call_criu, criu_environment, dump_request
from hutch.process.records import PidRecord, read_pid

__all__ = ["Checkpoint", "External", "dump", "load_checkpoint", "save_checkpoint"]

FORMAT = 1
IMAGES = "criu"
NETWORK = "network"
_RECORD = "checkpoint.json"
_DUMP_S = 600
_LOG = "dump.log"
_GHOSTS = 1 << 30
_UNIX98 = range(136, 144)
_OCTAL = re.compile(r"\\([0-7]{3})")


class External(msgspec.Struct, frozen=True, kw_only=True):
    """A mount that is the host's to give: CRIU knows it by `key`. `device` is the path of the
    device node that it is, "" for anything else."""

    key: str
    mountpoint: str
    device: str = ""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What was around the processes. `streams` are CRIU's names for stdin, stdout and stderr,
    "" for one that they have not; `pid` and `start_time` whose memory it is."""

    format: int = FORMAT
    criu: str
    machine: str
    pid: int
    start_time: int
    externals: tuple[External, ...] = ()
    streams: tuple[str, str, str] = ("", "", "")
    network: bool = False
    terminal: bool = False


class _Mount(msgspec.Struct, frozen=True):
    id: int
    device: str
    root: str
    mountpoint: str
    fstype: str


def load_checkpoint(directory: str) -> Checkpoint:
    """Return the record of a saved state; raise `Unsupported` where it cannot be this host's."""
    try:
        found = decode_json(Path(directory, _RECORD).read_bytes(), Checkpoint)
    except FileNotFoundError:
        raise Unsupported(f"{directory}: holds no processes of a container") from None
    except msgspec.DecodeError as exc:
        raise Unsupported(f"{directory}/{_RECORD}: {exc}") from None
    if found.format != FORMAT or found.machine != os.uname().machine:
        raise Unsupported(
            f"{directory}: saved by another hutch or on a {found.machine}",
            hint="start the container anew; its files are there",
        )
    return found


def save_checkpoint(directory: str, checkpoint: Checkpoint) -> None:
    """Write the record of a saved state."""
    Path(directory, _RECORD).write_bytes(msgspec.json.encode(checkpoint))


def dump(
    criu: CriuFacts,
    run: str,
    target: str,
    *,
    freezer: str,
    pids: Iterable[int],
    network: bool,
    lock: int,
) -> Checkpoint:
    """Save the processes of the container whose run directory this is, which is frozen and
    stays so. `freezer` is its control group, `pids` who is in it, `network` whether its network is
    its own. CRIU holds the descriptor `lock` for as long as it works, whoever is killed.

    Raise `Unsupported` with what CRIU cannot save; nothing has changed then.
    """
    record = read_pid(run)
    if record is None:
        raise WrongState("the container is not running")
    pids = tuple(pids)
    checkpoint = _around(criu, record, pids, network=network)
    images = f"{target}/{IMAGES}"
    os.mkdir(images, 0o700)
    request = dump_request(
        pid=record.pid,
        images=images,
        log=_LOG,
        externals=list(_external_names(checkpoint, record.pid)),
        freezer=freezer,
        terminal=checkpoint.terminal,
        timeout_s=_DUMP_S,
        ghost_limit=_GHOSTS,
    )
    # From within its UTS namespace: CRIU then takes that for the host's, and leaves it to us to
    # make it with the host name of whoever goes on from here.
    argv = ["nsenter", f"--uts=/proc/{record.pid}/ns/uts", "--", criu.path]
    answer = call_criu(argv, request, env=criu_environment(), lock=lock)
    if not answer.success:
        raise criu_failure("save", f"{images}/{_LOG}", answer.message, pids=pids)
    save_checkpoint(target, checkpoint)
    return checkpoint


def _external_names(checkpoint: Checkpoint, pid: int) -> Iterator[str]:
    for external in checkpoint.externals:
        yield f"mnt[{external.mountpoint}]:{external.key}"
    for name in checkpoint.streams:
        if name.startswith("file["):
            yield name
    if checkpoint.network:
        yield f"net[{os.stat(f'/proc/{pid}/ns/net').st_ino}]:{NETWORK}"


def _around(
    criu: CriuFacts, record: PidRecord, pids: Iterable[int], *, network: bool
) -> Checkpoint:
    mounts = list(_mounts(record.pid))
    externals = tuple(
        External(
            key=f"m{number}",
            mountpoint=mount.mountpoint,
            device=f"/dev{mount.root}" if mount.fstype == "devtmpfs" else "",
        )
        for number, mount in enumerate(_externals(mounts))
    )
    terminal = _has_terminal(record.supervisor)
    names = [f"pipe:[{inode}]" if inode else "" for inode in record.streams]
    if not terminal and not names[0]:
        names[0] = _null(pids, mounts)
    return Checkpoint(
        criu=criu.version,
        machine=os.uname().machine,
        pid=record.pid,
        start_time=record.start_time,
        externals=externals,
        streams=(names[0], names[1], names[2]),
        network=network,
        terminal=terminal,
    )


def _mounts(pid: int | str) -> Iterator[_Mount]:
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            head, _, tail = line.partition(" - ")
            fields = head.split()
            path = _OCTAL.sub(lambda found: chr(int(found.group(1), 8)), fields[4])
            yield _Mount(int(fields[0]), fields[2], fields[3], path, tail.split()[0])


def _externals(mounts: list[_Mount]) -> Iterator[_Mount]:
    """Yield the mounts of file systems that the host has too: directories and files of the
    host, volumes, control groups. What is mounted for the container alone CRIU saves."""
    ours = {mount.device for mount in _mounts("self")}
    for mount in mounts:
        if mount.mountpoint == "/" or mount.device not in ours:
            continue
        if any(mark in mount.mountpoint for mark in "[]:,"):
            raise Unsupported(
                f"mount {mount.mountpoint}: CRIU takes no name with brackets, colons or commas",
                hint="mount it under another name",
            )
        yield mount


def _null(pids: Iterable[int], mounts: list[_Mount]) -> str:
    """Return CRIU's name for the host's /dev/null, which a container without input reads."""
    inside = {mount.id for mount in mounts}
    for pid in sorted(pids):
        for fd in ("0", "1", "2"):
            try:
                status = os.stat(f"/proc/{pid}/fd/{fd}")
                lines = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            known = dict(line.split(":", 1) for line in lines if ":" in line)
            mount = int(known["mnt_id"])
            if stat.S_ISCHR(status.st_mode) and mount not in inside:
                return f"file[{mount:x}:{status.st_ino:x}]"
    return ""


def _has_terminal(supervisor: int) -> bool:
    """Tell whether a supervisor holds a terminal instead of pipes."""
    for entry in os.scandir(f"/proc/{supervisor}/fd"):
        try:
            status = os.stat(entry.path)
        except FileNotFoundError:
            continue  # a client that has just left
        if stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) in _UNIX98:
            return True
    return False
