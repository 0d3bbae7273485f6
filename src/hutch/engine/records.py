"""The record of an instance in the store, and the tables the engine keeps."""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
import msgspec

from hutch.lifecycle import State
from hutch.spec.model import InstanceSpec

__all__ = ["EXECS", "INSTANCES", "NAMES", "RESERVATIONS", "SUSPENDED", "InstanceRecord"]
__all__ += ["MACHINE_SNAPSHOTS", "NameRecord", "ResolvedMount", "SnapshotRecord"]

INSTANCES = "instances"
NAMES = "instance_names"
EXECS = "execs"
RESERVATIONS = "reservations"
MACHINE_SNAPSHOTS = "machine_snapshots"
# The directory with the memory of one that is suspended, whole when it has this name.
SUSPENDED = "suspended"


class NameRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Who has a name."""

    id: str


class ResolvedMount(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A mount of the specification with its source on the host found or made."""

    type: str
    source: str
    target: str
    name: str = ""
    read_only: bool = False
    propagation: str = ""
    subpath: str = ""
    recursive: bool = True
    anonymous: bool = False
    disk: bool = False


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One instance. Times in nanoseconds since the epoch, 0 where it has not come to that.

    `stopped_by_user` keeps restart policies from starting again what somebody stopped;
    `supervisor` and `pid` are those of the last start; `boot_id` tells a reboot.
    `isolation_reason` says why it is a container or a machine, where that was left to us.
    """

    id: str
    name: str
    spec: InstanceSpec
    image_id: str
    image_name: str
    chain_ids: tuple[str, ...] = ()
    state: State = State.CREATED
    created_ns: int
    started_ns: int = 0
    finished_ns: int = 0
    exit_code: int = 0
    oom_killed: bool = False
    error: str = ""
    pid: int = 0
    start_time: int = 0
    supervisor: int = 0
    boot_id: str = ""
    restart_count: int = 0
    stopped_by_user: bool = False
    volatile: bool = False
    mounts: tuple[ResolvedMount, ...] = ()
    endpoints: tuple[str, ...] = ()
    generation: int = 0
    isolation_reason: str = ""


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot of an instance, under the key `INSTANCE/TAG`. `memory` says that it has the
    running instance, and not its files alone; `hostname` that somebody chose the name;
    `anonymous_volumes` that a container had some, of which another one has no copy."""

    id: str
    source: str
    source_name: str
    tag: str
    created_ns: int
    size: int
    memory: bool
    spec: InstanceSpec
    image_id: str
    image_name: str
    chain_ids: tuple[str, ...]
    hostname: bool = False
    volatile: bool = False
    anonymous_volumes: bool = False
