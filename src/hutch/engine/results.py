"""What calls of the engine return: results of runs, descriptions of instances, reports."""

from __future__ import annotations

import msgspec

from hutch.errors import HutchError
from hutch.lifecycle import State
from hutch.spec.model import InstanceSpec

__all__ = [
    "Change",
    "Completed",
    "CommandError",
    "DiskSize",
    "DiskUsage",
    "Event",
    "HealthState",
    "InstanceInfo",
    "MachineInfo",
    "MountInfo",
    "NetworkUsage",
    "ProcessTable",
    "PruneReport",
    "GcReport",
    "ReconcileReport",
    "ResetReport",
    "SystemInfo",
    "UsageRow",
]


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """A program that ran to its end. `exit_code` is 128+n when signal n ended it;
    `stdout` and `stderr` are raw bytes (with a terminal, all of it is `stdout`)."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    id: str = ""
    oom_killed: bool = False

    @property
    def text(self) -> str:
        """Standard output as text, with undecodable bytes replaced."""
        return self.stdout.decode("utf-8", "replace")


class CommandError(HutchError):
    """A program ended with another code than 0 and the caller had asked to be told."""

    def __init__(self, completed: Completed, command: str) -> None:
        tail = completed.stderr[-2000:].decode("utf-8", "replace").strip()
        super().__init__(
            f"command {command!r} ended with exit code {completed.exit_code}"
            + (f": {tail}" if tail else "")
        )
        self.completed = completed


class HealthState(msgspec.Struct, frozen=True, kw_only=True):
    """What the health check says: starting, healthy or unhealthy, and its last probes."""

    status: str
    failing_streak: int = 0
    log: tuple[dict[str, object], ...] = ()


class MountInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A mount of an instance as inspection shows it."""

    type: str
    target: str
    source: str = ""
    name: str = ""
    read_only: bool = False
    propagation: str = ""


class MachineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A virtual machine as its last start made it: QEMU, the accelerator with the reason for
    it, the guest's kernel, the template it went on from ("" for a boot of its own), and what
    it has now and may come to have while it runs: bytes of memory, processors."""

    qemu: str
    qemu_version: str
    accelerator: str
    accelerator_reason: str
    kernel: str
    machine: str
    cpu: str
    memory: int
    vcpus: int
    memory_max: int
    vcpus_max: int
    template: str


class InstanceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as it is now. Times in nanoseconds since the epoch, 0 for never.

    `endpoints` are those of `hutch.network` while it runs; `isolation_reason` says why
    `isolation="auto"` chose what it chose; `machine` is what the last start of a virtual
    machine decided (None for a container, and before the first start).
    """

    id: str
    name: str
    state: State
    status: str
    image: str
    image_id: str
    command: tuple[str, ...]
    created_ns: int
    started_ns: int
    finished_ns: int
    exit_code: int
    pid: int
    oom_killed: bool
    error: str
    restart_count: int
    health: HealthState | None
    mounts: tuple[MountInfo, ...]
    endpoints: tuple[msgspec.Struct, ...]
    directory: str
    spec: InstanceSpec
    chain_ids: tuple[str, ...] = ()
    isolation_reason: str = ""
    machine: MachineInfo | None = None

    @property
    def labels(self) -> dict[str, str]:
        """The labels of the instance, those of its image included."""
        return self.spec.labels


class DiskSize(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance's files take, in bytes: what it wrote, and that with its image."""

    writable: int
    total: int


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A path that differs from the image: `kind` is A (added), C (changed) or D (deleted)."""

    kind: str
    path: str


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened: `subject` is an identifier or a reference."""

    seq: int
    time_ns: int
    kind: str
    action: str
    subject: str
    attributes: dict[str, str]


class ProcessTable(msgspec.Struct, frozen=True, kw_only=True):
    """Processes of an instance as `ps` shows them."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class NetworkUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Traffic of one interface inside an instance, since its start."""

    name: str
    received_bytes: int
    received_packets: int
    received_errors: int
    received_dropped: int
    sent_bytes: int
    sent_packets: int
    sent_errors: int
    sent_dropped: int


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """Disk use of one kind of object; sizes in bytes."""

    kind: str
    total: int
    active: int
    size: int
    reclaimable: int


class DiskUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Disk use of a root, a row per kind (images, instances, volumes, kernels, snapshots of
    machines, templates, caches)."""

    rows: tuple[UsageRow, ...]


class PruneReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a prune removed, and the bytes that gave back, of disk and (by templates, of which
    there is the number) of memory."""

    instances: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    templates: int = 0
    build_cache: int = 0
    reclaimed: int = 0


class GcReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection did: how full the root's disk was before and after (percent), the
    images that went, the bytes freed, and whether the watermark was reached."""

    before: float
    after: float
    images: tuple[str, ...] = ()
    freed: int = 0
    reached: bool = True


class ReconcileReport(msgspec.Struct, frozen=True, kw_only=True):
    """What reconciliation found out of order and put right."""

    booked: tuple[str, ...] = ()
    migrations: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()
    reclaimed: int = 0


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """What is not as it was: its kind (blob, root disk, kernel, disk), name, and how it is."""

    kind: str
    name: str
    reason: str


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """How much was examined, what is damaged, and which root disks were thrown away."""

    checked: int
    damaged: tuple[Damage, ...] = ()
    repaired: tuple[str, ...] = ()


class ResetReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was removed with a root, by name, and how many images; `kept` are the files in its
    directory that are not hutch's, for which it stays."""

    root: str
    instances: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()
    images: int = 0
    kept: tuple[str, ...] = ()


class SystemInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The engine and its host in short."""

    version: str
    root: str
    rootless: bool
    kernel: str
    architecture: str
    cpus: int
    memory: int
    cgroup: str
    instances: int
    running: int
    paused: int
    stopped: int
    images: int
