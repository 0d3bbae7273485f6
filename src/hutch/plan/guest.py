"""What is asked of the agent in a virtual machine: calls, steps of a setup, file requests.

The format is documented in docs/reference/guest-protocol.md; `hutch.plan.guest_answers` reads
what comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import msgspec

from hutch.errors import InvalidArgument
from hutch.plan.wire import encode_fields, encode_ops

__all__ = [
    "KEEP",
    "MAX_REQUEST_BYTES",
    "Address",
    "AnySetupOp",
    "Call",
    "Cgroup",
    "Clock",
    "Disk",
    "Entropy",
    "Files",
    "Flush",
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
    "ReadFile",
    "RemoveFile",
    "Rewrite",
    "Resize",
    "Retire",
    "Route",
    "SetupOp",
    "StatFile",
    "Symlink",
    "Sysctl",
    "UnpackFiles",
    "Warm",
    "WriteContent",
    "WriteFile",
    "encode_call",
    "encode_files",
    "encode_setup",
    "group_argument",
    "path_argument",
    "shutdown_argument",
]

MAX_REQUEST_BYTES = 4 << 20
KEEP = 0xFFFFFFFF  # of a mode or an owner: leave it as it is


class Call(IntEnum):
    """The operations of a CALL channel."""

    SETUP = 1
    PING = 2
    SHUTDOWN = 3
    STATS = 4
    FREEZE = 5
    THAW = 6
    PROCESSES = 7
    QUIESCE = 8
    RESUME = 9


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
    """Set the host name, of the guest and of a main process that runs already."""

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
    """Use that many processors, which are waited for (0: all that are there), and all memory."""

    processors: int = 0


class Rewrite(SetupOp, frozen=True, kw_only=True):
    """Give a file that is there another content: it may be mounted elsewhere."""

    path: str
    content: bytes


class Flush(SetupOp, frozen=True, kw_only=True):
    """Take a network device down, and all its addresses away."""

    interface: str


class Resize(SetupOp, frozen=True, kw_only=True):
    """Wait until a block device has `size` bytes, and let the ext4 at `path` grow to it."""

    device: str
    path: str
    size: int


class Retire(SetupOp, frozen=True, kw_only=True):
    """Take an interface down and call it `aside`, so that its name is free."""

    interface: str
    aside: str


class Warm(SetupOp, frozen=True, kw_only=True):
    """Read a file or directory in the root of the image (at most 16 MB of it), so that it is
    in the page cache; one that is not there is left out."""

    path: str


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
    | Resize
    | Online
    | Rewrite
    | Flush
    | Retire
    | Warm
)

# The number and the kinds of the fields, as in `hutch.plan.wire`; native/agent/setup.c has
# the same.
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
    Resize: (16, "ssq"),
    Online: (17, "u"),
    Rewrite: (18, "sb"),
    Flush: (19, "s"),
    Retire: (20, "ss"),
    Warm: (21, "s"),
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
