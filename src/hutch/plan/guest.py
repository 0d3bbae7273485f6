"""What is asked of the agent in a virtual machine, and what it answers: bytes and values.

The format is documented in docs/reference/guest-protocol.md. A guest is not trusted: every
length of an answer is checked here, and what does not fit is an `IntegrityError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from struct import Struct
from typing import Any

import msgspec

from hutch.errors import IntegrityError, InvalidArgument
from hutch.plan.wire import encode_fields, encode_ops

__all__ = [
    "Address",
    "Answer",
    "AnySetupOp",
    "BlockStats",
    "Call",
    "Cgroup",
    "Clock",
    "Disk",
    "Entropy",
    "FileStat",
    "Files",
    "FilesHead",
    "Hostname",
    "Insmod",
    "Interface",
    "LinkUp",
    "ListFiles",
    "MakeDirectory",
    "Mkdir",
    "Mount",
    "Online",
    "PackFiles",
    "PackUpper",
    "Process",
    "ReadFile",
    "RemoveFile",
    "Route",
    "SetupOp",
    "StatFile",
    "Stats",
    "Symlink",
    "Sysctl",
    "UnpackFiles",
    "WriteContent",
    "WriteFile",
    "decode_answer",
    "decode_count",
    "decode_files_head",
    "decode_listing",
    "decode_processes",
    "decode_stat",
    "decode_stats",
    "encode_call",
    "encode_files",
    "encode_setup",
    "group_argument",
    "path_argument",
    "shutdown_argument",
]

MAX_REQUEST_BYTES = 4 << 20
MAX_DETAIL_BYTES = 64 << 10
KEEP = 0xFFFFFFFF  # of a mode or an owner: leave it as it is

_U32, _U64, _I64 = Struct("<I"), Struct("<Q"), Struct("<q")


class Call(IntEnum):
    """The operations of a CALL channel."""

    SETUP = 1
    PING = 2
    SHUTDOWN = 3
    STATS = 4
    FREEZE = 5
    THAW = 6
    PROCESSES = 7


# Requests: SETUP.


class SetupOp(msgspec.Struct, frozen=True, kw_only=True):
    """One step of setting a guest up; the first that fails ends it."""


class Entropy(SetupOp, frozen=True, kw_only=True):
    """Credit these bytes (at most 512) to the kernel's generator and reseed it."""

    data: bytes


class Clock(SetupOp, frozen=True, kw_only=True):
    """Set the wall clock."""

    seconds: int
    nanoseconds: int = 0


class Hostname(SetupOp, frozen=True, kw_only=True):
    """Set the guest's own host name."""

    name: str


class Insmod(SetupOp, frozen=True, kw_only=True):
    """Load a module from the initramfs; one that is loaded already is fine."""

    path: str
    params: str = ""


class Disk(SetupOp, frozen=True, kw_only=True):
    """Wait (at most 10 s) for the virtio disk with this serial; point `link` at its node."""

    serial: str
    link: str


class Mount(SetupOp, frozen=True, kw_only=True):
    """Mount, at a target that is made with its parents. `flags` are those of mount(2)."""

    source: str
    target: str
    fstype: str
    flags: int = 0
    data: str = ""


class Mkdir(SetupOp, frozen=True, kw_only=True):
    """Make a directory with its parents; one that is there is left as it is."""

    path: str
    mode: int = 0o755


class WriteFile(SetupOp, frozen=True, kw_only=True):
    """Put a file in place, whole, with its parents."""

    path: str
    mode: int = 0o644
    content: bytes = b""


class Interface(SetupOp, frozen=True, kw_only=True):
    """Wait for the n-th virtio network device in PCI order; name it and leave it down.

    An empty `mac` and an `mtu` of 0 keep what is there.
    """

    index: int
    name: str
    mac: bytes = b""
    mtu: int = 0


class Address(SetupOp, frozen=True, kw_only=True):
    """Give an interface an address (4 or 16 bytes) with a prefix length."""

    interface: str
    address: bytes
    prefix: int


class LinkUp(SetupOp, frozen=True, kw_only=True):
    """Set an interface up."""

    interface: str


class Route(SetupOp, frozen=True, kw_only=True):
    """Make a gateway (4 or 16 bytes) the default of its family."""

    interface: str
    gateway: bytes


class Sysctl(SetupOp, frozen=True, kw_only=True):
    """Write a kernel parameter; the key has slashes."""

    key: str
    value: str


class Symlink(SetupOp, frozen=True, kw_only=True):
    """Make a symbolic link with its parents, in place of what is there."""

    target: str
    path: str


class Cgroup(SetupOp, frozen=True, kw_only=True):
    """Make a cgroup with every controller and write `file=value` lines into it."""

    path: str
    lines: str = ""


class Online(SetupOp, frozen=True, kw_only=True):
    """Bring hot-added processors and memory into use."""


AnySetupOp = (
    Entropy
    | Clock
    | Hostname
    | Insmod
    | Disk
    | Mount
    | Mkdir
    | WriteFile
    | Interface
    | Address
    | LinkUp
    | Route
    | Sysctl
    | Symlink
    | Cgroup
    | Online
)

# The number and the kinds of the fields, as in `hutch.plan.wire`; native/agent/setup.c has
# the same. 16 is reserved.
SETUP_CODES: dict[type[SetupOp], tuple[int, str]] = {
    Entropy: (1, "b"),
    Clock: (2, "qq"),
    Hostname: (3, "s"),
    Insmod: (4, "ss"),
    Disk: (5, "ss"),
    Mount: (6, "sssqs"),
    Mkdir: (7, "su"),
    WriteFile: (8, "sub"),
    Interface: (9, "usbu"),
    Address: (10, "sbu"),
    LinkUp: (11, "s"),
    Route: (12, "sb"),
    Sysctl: (13, "ss"),
    Symlink: (14, "ss"),
    Cgroup: (15, "ss"),
    Online: (17, ""),
}

# Requests: FILES.


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """One request to the files helper, about a path in the root of the main process."""


class StatFile(Files, frozen=True, kw_only=True):
    """Ask what is at a path."""

    path: str
    follow: bool = False


class ListFiles(Files, frozen=True, kw_only=True):
    """Ask what is in a directory."""

    path: str


class ReadFile(Files, frozen=True, kw_only=True):
    """Read a file; a `limit` of 0 reads to its end."""

    path: str
    offset: int = 0
    limit: int = 0


class WriteContent(Files, frozen=True, kw_only=True):
    """Write what follows the request. `KEEP` leaves the mode (0644 for a new file) and owner."""

    path: str
    mode: int = KEEP
    uid: int = KEEP
    gid: int = KEEP
    flags: int = 0  # 1 append, 2 make parents


class MakeDirectory(Files, frozen=True, kw_only=True):
    """Make a directory with its parents."""

    path: str
    mode: int = 0o755
    uid: int = KEEP
    gid: int = KEEP


class RemoveFile(Files, frozen=True, kw_only=True):
    """Remove a file, or a directory (with what is in it only if `recursive`)."""

    path: str
    recursive: bool = False


class PackFiles(Files, frozen=True, kw_only=True):
    """Ask for a tar stream in which the path is called `name`."""

    path: str
    flags: int = 0  # 1 follow a link, 2 a directory's contents without itself
    name: str = ""


class UnpackFiles(Files, frozen=True, kw_only=True):
    """Unpack the tar stream that follows; `KEEP` takes the owners from it."""

    path: str
    uid: int = KEEP
    gid: int = KEEP


class PackUpper(Files, frozen=True, kw_only=True):
    """Ask for what the machine has written, as a layer of an image."""


FILES_CODES: dict[type[Files], tuple[int, str]] = {
    StatFile: (1, "su"),
    ListFiles: (2, "s"),
    ReadFile: (3, "sqq"),
    WriteContent: (4, "suuuu"),
    MakeDirectory: (5, "suuu"),
    RemoveFile: (6, "su"),
    PackFiles: (7, "sus"),
    UnpackFiles: (8, "suu"),
    PackUpper: (9, ""),
}


def encode_setup(operations: Sequence[SetupOp]) -> bytes:
    """Return the argument of a SETUP call.

    Raise `InvalidArgument` for a value that the format cannot carry.
    """
    items = [(*SETUP_CODES[type(op)], msgspec.structs.astuple(op)) for op in operations]
    return encode_fields("u", (len(items),)) + encode_ops(items)


def encode_call(call: Call, argument: bytes = b"") -> bytes:
    """Return a whole request of a CALL channel."""
    if len(argument) + 4 > MAX_REQUEST_BYTES:
        raise InvalidArgument(
            f"the request to the machine's agent is too large: {len(argument)} bytes",
            hint=f"at most {MAX_REQUEST_BYTES}",
        )
    return encode_fields("u", (call.value,)) + argument


def shutdown_argument(*, sync: bool = True) -> bytes:
    """Return the argument of SHUTDOWN; without `sync` nothing is written back."""
    return encode_fields("u", (0 if sync else 1,))


def path_argument(path: str) -> bytes:
    """Return the argument of FREEZE and THAW."""
    return encode_fields("s", (path,))


def group_argument(cgroup: str = "") -> bytes:
    """Return the argument of STATS (default: the main process's cgroup) and PROCESSES
    (default: every process)."""
    return encode_fields("s", (cgroup,))


def encode_files(request: Files) -> bytes:
    """Return a request to the files helper; a stream follows where it takes one."""
    code, kinds = FILES_CODES[type(request)]
    return encode_fields("u" + kinds, (code, *msgspec.structs.astuple(request)))


# Answers.


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a call came to: `errno` 0 and its `body`, or which operation failed on what."""

    errno: int
    index: int
    detail: str
    body: bytes


class BlockStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one disk has read and written since the boot."""

    name: str
    read_bytes: int
    written_bytes: int
    reads: int
    writes: int


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest and the instance in it use."""

    memory_total: int
    memory_available: int
    memory_current: int
    cpu_usage_us: int
    cpu_user_us: int
    cpu_system_us: int
    pids: int
    oom_kills: int
    blocks: tuple[BlockStats, ...]


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process, by the numbers of the guest's root namespace; times in clock ticks."""

    pid: int
    ppid: int
    uid: int
    start_ticks: int
    cpu_ticks: int
    tty: str
    command: str


class FileStat(msgspec.Struct, frozen=True, kw_only=True):
    """A file as lstat(2) and readlink(2) see it."""

    name: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    links: int
    rdev: tuple[int, int]
    target: str


class FilesHead(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of an answer of the files helper; its stream begins `size` bytes in."""

    errno: int
    detail: str
    size: int


class _Short(Exception):
    """The bytes end before the value does."""


class _Reader:
    """Take fields off bytes that somebody else made."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, layout: Struct = _U32) -> int:
        end = self.at + layout.size
        if end > len(self.data):
            raise _Short
        value: int = layout.unpack_from(self.data, self.at)[0]
        self.at = end
        return value

    def u64(self) -> int:
        return self.number(_U64)

    def blob(self, limit: int = MAX_DETAIL_BYTES) -> bytes:
        size = self.number()
        if size > limit:
            raise IntegrityError(f"the machine's agent sent a text of {size} bytes")
        if self.at + size > len(self.data):
            raise _Short
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self) -> str:
        raw = self.blob()
        if self.at >= len(self.data):
            raise _Short
        if self.data[self.at] != 0 or b"\0" in raw:
            raise IntegrityError("the machine's agent sent a text with a wrong end")
        self.at += 1
        return raw.decode("utf-8", "surrogateescape")


def _whole(what: str, data: bytes, read: Callable[[_Reader], Any]) -> Any:
    """Read `data` to its end."""
    reader = _Reader(data)
    try:
        value = read(reader)
    except _Short:
        raise IntegrityError(f"the machine's agent sent {what} that is cut off") from None
    if reader.at != len(data):
        raise IntegrityError(f"the machine's agent sent {what} with more after it")
    return value


def decode_answer(data: bytes) -> Answer:
    """Return the answer of a CALL channel, that ended after these bytes."""
    reader = _Reader(data)
    try:
        errno, index, detail = reader.number(), reader.number(), reader.text()
    except _Short:
        raise IntegrityError("the machine's agent sent an answer that is cut off") from None
    return Answer(errno=errno, index=index, detail=detail, body=data[reader.at :])


def _block(raw: bytes) -> BlockStats:
    words = raw.decode("ascii", "replace").split(" ")
    if len(words) != 5 or not all(word.isascii() and word.isdigit() for word in words[1:]):
        raise IntegrityError(f"the machine's agent sent a disk's figures as {raw[:80]!r}")
    read, written, reads, writes = (int(word) for word in words[1:])
    return BlockStats(
        name=words[0], read_bytes=read, written_bytes=written, reads=reads, writes=writes
    )


def _stats(reader: _Reader) -> Stats:
    names = Stats.__struct_fields__[:-1]
    numbers = {name: reader.u64() for name in names}
    blocks = tuple(_block(reader.blob(256)) for _ in range(min(reader.number(), 1024)))
    return Stats(**numbers, blocks=blocks)


def decode_stats(body: bytes) -> Stats:
    """Return what STATS answered."""
    stats: Stats = _whole("figures", body, _stats)
    return stats


def _process(reader: _Reader) -> Process:
    return Process(
        pid=reader.number(),
        ppid=reader.number(),
        uid=reader.number(),
        start_ticks=reader.u64(),
        cpu_ticks=reader.u64(),
        tty=reader.text(),
        command=reader.text(),
    )


def _processes(reader: _Reader) -> tuple[Process, ...]:
    found = []
    while reader.at < len(reader.data):
        found.append(_process(reader))
    return tuple(found)


def decode_processes(body: bytes) -> tuple[Process, ...]:
    """Return what PROCESSES answered."""
    processes: tuple[Process, ...] = _whole("a list of processes", body, _processes)
    return processes


def decode_files_head(data: bytes) -> FilesHead | None:
    """Return the head of an answer of the files helper; None where more bytes are needed."""
    reader = _Reader(data)
    try:
        errno, detail = reader.number(), reader.text()
    except _Short:
        return None
    return FilesHead(errno=errno, detail=detail, size=reader.at)


def _file(reader: _Reader, name: str) -> FileStat:
    mode, uid, gid = reader.number(), reader.number(), reader.number()
    size, seconds = reader.u64(), reader.number(_I64)
    nanoseconds, links = reader.number(), reader.number()
    return FileStat(
        name=name,
        mode=mode,
        uid=uid,
        gid=gid,
        size=size,
        mtime_ns=seconds * 1_000_000_000 + nanoseconds,
        links=links,
        rdev=(reader.number(), reader.number()),
        target=reader.text(),
    )


def decode_stat(body: bytes) -> FileStat:
    """Return what a `StatFile` was answered, without the head."""
    found: FileStat = _whole("a file's record", body, lambda r: _file(r, r.text()))
    return found


def _listing(reader: _Reader) -> tuple[FileStat, ...]:
    found = []
    while name := reader.text():
        if "/" in name or name in (".", ".."):
            raise IntegrityError(f"the machine's agent sent a file's name that is none: {name!r}")
        found.append(_file(reader, name))
    return tuple(found)


def decode_listing(body: bytes) -> tuple[FileStat, ...]:
    """Return what a `ListFiles` was answered, without the head.

    A listing without its end (the helper died) is an `IntegrityError`.
    """
    files: tuple[FileStat, ...] = _whole("a listing", body, _listing)
    return files


def decode_count(body: bytes) -> int:
    """Return how many entries an `UnpackFiles` made."""
    count: int = _whole("a number", body, lambda r: r.number())
    return count
