"""What every driver offers: the life of an instance in twelve methods, as data in and out.

A driver has no store and no policy of its own: the engine hands it a `Launch` with all
assets prepared, and records what it answers. What only some kinds of instance can do are
protocols of their own (`Reconfigurable`, `Networked`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import msgspec

from hutch.drivers.moving import Arrival
from hutch.plan.ops import Plan
from hutch.records import Progress, silent
from hutch.spec.model import InstanceSpec, ProcessSpec, Resources

if TYPE_CHECKING:
    from hutch.linux.cgroup import Stats
    from hutch.network.model import Endpoint
    from hutch.process.supervisor import Supervisor
    from hutch.storage.compression import Readable
    from hutch.storage.diskkeys import DiskKey
    from hutch.storage.tree import Stat

__all__ = ["Driver", "ExecRequest", "Growable", "GuestFiles", "Guests", "Launch", "LaunchMount"]
__all__ += ["ForkedState", "Losable", "Pluggable"]
__all__ += ["ProcessRow", "Savable", "SavedState", "Started", "TemplateUse", "Templated"]
__all__ += ["Tree"]


class LaunchMount(msgspec.Struct, frozen=True, kw_only=True):
    """A mount whose source exists on the host. `fd` >= 0 is an open descriptor of it;
    `pid` > 0 says that the path is one in the mount namespace of that process. `ours` marks
    a small file that the engine wrote: a virtual machine is given a copy; `disk` that the
    source is one, with a file system for it alone."""

    source: str
    target: str
    read_only: bool = False
    recursive: bool = True
    propagation: str = "rprivate"
    owned: bool = False
    fd: int = -1
    pid: int = 0
    ours: bool = False
    disk: bool = False


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """A saved state that an instance goes on from instead of beginning; see `Savable`."""

    directory: str


class ForkedState(msgspec.Struct, frozen=True, kw_only=True):
    """A state that twins of a running instance go on from; see `Savable.fork`.

    `state` and `memory` (-1: it is in the state) are descriptors, `saved` what else the driver
    must know.
    """

    state: int
    memory: int
    saved: bytes

    def close(self) -> None:
        """Let go of it; twins that have started keep what they need."""
        for fd in (self.state, self.memory):
            if fd >= 0:
                os.close(fd)


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """All a driver needs to start an instance.

    `directory` is the instance's own directory on the host; `lower` the layers, highest
    first (for a virtual machine `root_disk` is them as one disk, and `disk` its writable
    one); `attach` are the flags with which the starter's link takes part in the streams
    from the first byte (`hutch.process.supervisor.attach_flags`); `join` maps "pid",
    "ipc", "net" and "uts" to the pid of the process whose namespace is joined.
    `attach_network(pid, taps)` is called between the making of the network namespace and
    the first instruction of the program, and configures it; `taps` are the interface
    indexes of a virtual machine's tap devices in that namespace, one for each of
    `endpoints`, and empty for a container. With `saved` the program is not started: it goes
    on, with the memory that it had; so it does with `arrival`, and its network cards stay
    unplugged until `Movable.plug_in`. `before_go` is called when a saved container is back and
    nothing of it runs yet; what it raises undoes the start. Without `linger` the program is
    killed when the starter's link ends, the starter's death included. `host_devices` are the
    addresses of PCI devices that a virtual machine gets whole. `memory` is a virtual machine's
    memory that was made ahead, open. `progress` is told of work that takes seconds.
    """

    id: str
    name: str
    spec: InstanceSpec
    directory: str
    lower: tuple[str, ...] = ()
    upper: str = ""
    work: str = ""
    rootfs: str = ""
    root_disk: str = ""
    disk: str = ""
    disk_key: DiskKey | None = None
    attached_keys: tuple[DiskKey | None, ...] = ()
    volatile: bool = False
    mounts: tuple[LaunchMount, ...] = ()
    join: dict[str, int] = {}
    saved: SavedState | ForkedState | None = None
    arrival: Arrival | None = None
    before_go: Callable[[], None] | None = None
    endpoints: tuple[Endpoint, ...] = ()
    host_devices: tuple[str, ...] = ()
    memory: int = -1
    attach_network: Callable[[int, Sequence[int]], None] | None = None
    exit_command: tuple[str, ...] = ()
    exit_command_always: bool = False
    linger: bool = True
    attach: int = 0
    rows: int = 0
    columns: int = 0
    progress: Progress = silent


class ExecRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A further process in a running instance."""

    id: str
    pid: int
    start_time: int
    spec: InstanceSpec
    process: ProcessSpec
    privileged: bool = False
    linger: bool = False
    attach: int = 0
    rows: int = 0
    columns: int = 0


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A started instance: its first process on the host, and the link to its supervisor."""

    pid: int
    start_time: int
    supervisor: Supervisor


class Driver(Protocol):
    """The life of one kind of instance."""

    def check(self, spec: InstanceSpec) -> None:
        """Raise `InvalidArgument` or `Unsupported` for what this host cannot give."""
        ...

    def plan(self, launch: Launch) -> Plan:
        """Return what `start` would do, having done nothing."""
        ...

    def start(self, launch: Launch) -> Started:
        """Start it; on failure nothing is left behind and the failing step is named."""
        ...

    def exec(self, request: ExecRequest) -> Supervisor:
        """Start a process inside; the caller owns the returned connection."""
        ...

    def pause(self, identifier: str) -> None:
        """Stop all its processes from being scheduled."""
        ...

    def unpause(self, identifier: str) -> None:
        """Let them go on."""
        ...

    def update(self, identifier: str, resources: Resources) -> None:
        """Change the limits of a running instance."""
        ...

    def stats(self, identifier: str) -> Stats:
        """Return what it uses now."""
        ...

    def processes(self, identifier: str) -> list[int]:
        """Return the host pids of its processes."""
        ...

    def oom_kills(self, identifier: str) -> int:
        """Return how many of its processes the kernel killed for lack of memory."""
        ...

    def kill_all(self, identifier: str) -> None:
        """Kill every process of it and wait until they are gone."""
        ...

    def cleanup(self, identifier: str) -> None:
        """Remove what the kernel keeps of it (control groups); safe to repeat."""
        ...


class Tree(Protocol):
    """The files of an instance; paths are absolute inside it and never lead out of it."""

    def stat(self, path: str, *, follow: bool) -> Stat:
        """Return what a path is; raise `NotFound`."""
        ...

    def list(self, path: str) -> Sequence[Stat]:
        """Return what a directory holds, by name."""
        ...

    def read(self, path: str, *, limit: int | None) -> bytes:
        """Return a file's content; more than `limit` bytes are refused."""
        ...

    def write(
        self,
        path: str,
        data: bytes | Iterator[bytes],
        *,
        mode: int | None,
        owner: tuple[int, int] | None,
        append: bool,
        parents: bool,
    ) -> None:
        """Write a file; what exists keeps its owner, and its mode unless one is given."""
        ...

    def mkdir(self, path: str, *, mode: int, owner: tuple[int, int] | None) -> None:
        """Make a directory with its parents."""
        ...

    def remove(self, path: str, *, recursive: bool) -> None:
        """Remove a file, a link, an empty directory, or a tree."""
        ...

    def pack(
        self, path: str, *, follow: bool, name: str | None, contents_only: bool
    ) -> Iterator[bytes]:
        """Yield a file or a tree as a tar."""
        ...

    def extract(self, path: str, stream: Readable, *, owner: tuple[int, int] | None) -> int:
        """Unpack a tar into a directory; return the number of entries."""
        ...


class GuestFiles(Tree, Protocol):
    """The files of an instance whose writable layer the host does not see."""

    def pack_upper(self) -> Iterator[bytes]:
        """Yield what was changed as a layer of an image, a tar with whiteouts."""
        ...


class ProcessRow(msgspec.Struct, frozen=True, kw_only=True):
    """A process as its own kernel numbers it; times in seconds, `started` since the epoch."""

    pid: int
    ppid: int
    uid: int
    started: float
    cpu_s: float
    tty: str
    command: str


@runtime_checkable
class Guests(Protocol):
    """A driver whose instances have a kernel of their own, and are asked about what is in them."""

    def tree(self, identifier: str) -> GuestFiles:
        """Return the files of a running instance."""
        ...

    def stored(self, launch: Launch) -> AbstractContextManager[GuestFiles]:
        """Hold the files of a stopped one; the caller has its lock."""
        ...

    def process_rows(self, identifier: str) -> list[ProcessRow]:
        """Return the processes inside a running instance."""
        ...

    def end_program(self, identifier: str) -> bool:
        """Have the guest kill the program and write out its file systems; False where it
        cannot be asked. It then ends by itself, or is to be killed when that takes too long."""
        ...

    def freeze_programs(self, identifier: str) -> None:
        """Stop the programs inside, while the guest still answers; `unpause` undoes it."""
        ...


@runtime_checkable
class Savable(Protocol):
    """A driver that can save a running instance with its memory, and go on from it."""

    def check_savable(self, spec: InstanceSpec) -> None:
        """Raise `Unsupported` for an instance whose memory cannot be saved on this host."""
        ...

    def save(self, identifier: str, target: str, *, cards: int, end_as: str = "") -> None:
        """Save a running instance, with its disk, to an empty directory.

        It goes on, after a failure too. With `end_as` the directory gets that name when all
        is on disk, and the instance ends with exit code `EXIT_SAVED`; its disk stays where
        it is. `cards` is how many networks it is in.
        """
        ...

    def save_disk(self, identifier: str, target: str) -> None:
        """Save a running instance's disk alone to an empty directory, with all that its
        programs have written so far where the guest can be asked. It goes on, after a failure
        too."""
        ...

    def awaken(self, identifier: str) -> bool:
        """Let a running instance go on that stands still because who saved it was killed; tell
        whether it did. The caller has its lock."""
        ...

    def fork(self, identifier: str, target: str, *, cards: int) -> ForkedState:
        """Save a running instance for twins, its disk to an empty directory. It goes on, after
        a failure too."""
        ...


@runtime_checkable
class Pluggable(Protocol):
    """A driver whose instances have network cards that come and go, instead of interfaces."""

    def plug_network(
        self, identifier: str, pid: int, endpoint: Endpoint, join: Callable[[int, int], None]
    ) -> None:
        """Give a running instance a card for an endpoint. `join(tap, number)` connects the
        tap of that interface index, the device of that number in the namespace of `pid`."""
        ...

    def unplug_network(
        self, identifier: str, pid: int, endpoint: Endpoint, successor: Endpoint | None
    ) -> None:
        """Take it away; `successor` is what gives the default route from now on."""
        ...


class TemplateUse(msgspec.Struct, frozen=True, kw_only=True):
    """A template: what it has on disk and in the host's memory, in bytes; `held` says that
    instances can start from it."""

    key: str
    state: int
    memory: int
    held: bool


@runtime_checkable
class Templated(Protocol):
    """A driver that keeps booted guests from which its instances start."""

    def templates(self) -> list[TemplateUse]:
        """Return the templates of the root."""
        ...

    def prune_templates(self) -> int:
        """Let go of all of them; return how many there were. What was started from one runs on."""
        ...


@runtime_checkable
class Losable(Protocol):
    """A driver whose instances can end before their programs do."""

    def why_lost(self, identifier: str) -> str:
        """Say why the last start ended with `EXIT_LOST`; "" where it was the program's own."""
        ...


@runtime_checkable
class Growable(Protocol):
    """A driver whose instances have a disk, which may grow while they run."""

    def grow_disk(self, identifier: str, size: int) -> None:
        """Let a running instance's writable disk and its file system grow to `size` bytes."""
        ...
