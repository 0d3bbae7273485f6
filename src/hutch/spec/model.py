"""What the user asked for: one immutable, validated description of an instance.

Every default that does not depend on the host is filled in here or by `hutch.spec.build`,
which merges the options of a caller with the configuration of an image.
"""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
from typing import Literal

import msgspec

__all__ = [
    "AttachedDisk",
    "BindMount",
    "CpuTopology",
    "DeviceNode",
    "DiskKeySource",
    "FromDisk",
    "HealthCheck",
    "InstanceSpec",
    "LogOptions",
    "MachineOptions",
    "Mount",
    "NetworkAttachment",
    "NumaNode",
    "Placement",
    "PortMapping",
    "ProcessSpec",
    "Resources",
    "RestartPolicy",
    "Security",
    "Throttle",
    "TmpfsMount",
    "Ulimit",
    "VolumeMount",
]


class Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of the values of a specification."""


class BindMount(Value, frozen=True, kw_only=True, omit_defaults=True, tag="bind"):
    """A host path inside the instance. `propagation` is r?(private|slave|shared)."""

    source: str
    target: str
    read_only: bool = False
    recursive: bool = True
    propagation: str = "rprivate"
    create_source: bool = False


class VolumeMount(Value, frozen=True, kw_only=True, omit_defaults=True, tag="volume"):
    """A named volume (`name` empty: an anonymous one, made with the instance). `disk`: it is
    known to be one of a virtual machine's own."""

    target: str
    name: str = ""
    read_only: bool = False
    copy_up: bool = True
    subpath: str = ""
    labels: dict[str, str] = {}
    driver: str = "local"
    driver_options: dict[str, str] = {}
    disk: bool = False


class TmpfsMount(Value, frozen=True, kw_only=True, omit_defaults=True, tag="tmpfs"):
    """A file system in memory; `size` in bytes (None: half of memory), `mode` octal bits."""

    target: str
    size: int | None = None
    mode: int = 0o1777
    options: tuple[str, ...] = ()
    copy_up: bool = False


Mount = BindMount | VolumeMount | TmpfsMount


class DeviceNode(Value, frozen=True, kw_only=True, omit_defaults=True):
    """A host device at `target` inside, with cgroup `permissions` out of r, w, m. Its mode and
    owner are those of the host's node where they are None."""

    source: str
    target: str
    permissions: str = "rwm"
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None


class NetworkAttachment(Value, frozen=True, kw_only=True, omit_defaults=True):
    """One network by name, with what is asked of the endpoint. `rx_rate` and `tx_rate` are
    what the instance may receive and send, in bits per second; 0 is no limit."""

    name: str
    aliases: tuple[str, ...] = ()
    ipv4: str = ""
    ipv6: str = ""
    mac: str = ""
    rx_rate: int = 0
    tx_rate: int = 0


class PortMapping(Value, frozen=True, kw_only=True, omit_defaults=True):
    """One published port. `host_port` 0 means any free one, with `host_port_end` the first
    free one from `host_port` to that; `host_ip` "" means all."""

    container_port: int
    host_port: int = 0
    host_port_end: int = 0
    host_ip: str = ""
    protocol: str = "tcp"


class Ulimit(Value, frozen=True, kw_only=True, omit_defaults=True):
    """A resource limit by its name without RLIMIT_ (`nofile`); -1 means unlimited."""

    name: str
    soft: int
    hard: int


class Throttle(Value, frozen=True, kw_only=True, omit_defaults=True):
    """A rate for a block device: bytes or operations per second.

    `path` may name a disk of a virtual machine: `disk` is its own, `disk1`, … those attached;
    rate 0 then means not limited.
    """

    path: str
    rate: int


class Resources(Value, frozen=True, kw_only=True, omit_defaults=True):
    """Limits as the kernel's controllers take them. None or 0 means not limited.

    `cpus` is in CPUs; `cpu_period_us` and `cpu_quota_us` in microseconds; memory in bytes;
    `memory_swap` is memory plus swap in bytes, -1 unlimited, None twice the memory.
    """

    cpus: float = 0.0
    cpu_shares: int = 0
    cpu_period_us: int = 0
    cpu_quota_us: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    memory: int = 0
    memory_reservation: int = 0
    memory_min: int = 0
    memory_swap: int | None = None
    memory_swappiness: int | None = None
    oom_kill_disable: bool = False
    pids: int = 0
    blkio_weight: int = 0
    device_read_bps: tuple[Throttle, ...] = ()
    device_write_bps: tuple[Throttle, ...] = ()
    device_read_iops: tuple[Throttle, ...] = ()
    device_write_iops: tuple[Throttle, ...] = ()

    @property
    def guarantee(self) -> int:
        """What is promised of memory, in bytes, strictly (`memory_min`) or not."""
        return max(self.memory_reservation, self.memory_min)


class Placement(Value, frozen=True, kw_only=True, omit_defaults=True):
    """Where on the host it is to run. `cpus` exclusive gives it processors of its own (empty:
    as the root's policy has it); `numa` single keeps them on one memory node; `smt` full takes
    cores whole; `fit` is which node is taken where several would do (empty: the root's);
    `huge` are bytes of huge pages by page size (0: all of a virtual machine's memory);
    `merge` lets the host merge pages of a virtual machine that others have too; `prealloc` has
    all of a virtual machine's memory taken from the host before it starts; `memory` pool takes
    it from what was made ahead."""

    cpus: Literal["", "shared", "exclusive"] = ""
    numa: Literal["any", "prefer", "single"] = "prefer"
    smt: Literal["any", "full"] = "any"
    fit: Literal["", "first", "best", "worst", "pack", "spread"] = ""
    huge: dict[int, int] = {}
    merge: bool = False
    prealloc: bool = False
    memory: Literal["", "demand", "pool"] = ""


class RestartPolicy(Value, frozen=True, kw_only=True, omit_defaults=True):
    """When to start again after an exit; `max_retries` 0 means without end."""

    name: Literal["no", "always", "unless-stopped", "on-failure"] = "no"
    max_retries: int = 0


class HealthCheck(Value, frozen=True, kw_only=True, omit_defaults=True):
    """A command run inside on a timer; times in seconds. During `start_period_s`, until it is
    healthy, `start_interval_s` is the time between two, 0 for what Docker takes."""

    command: tuple[str, ...]
    interval_s: float = 30.0
    timeout_s: float = 30.0
    retries: int = 3
    start_period_s: float = 0.0
    start_interval_s: float = 0.0

    @property
    def first_interval_s(self) -> float:
        """Return the time between two checks at the begin: 5 s or less where nothing is said."""
        return self.start_interval_s or min(5.0, self.interval_s)


class LogOptions(Value, frozen=True, kw_only=True, omit_defaults=True):
    """Where output is kept: `driver` local or none; rotation at `max_bytes`, `max_files`."""

    driver: Literal["local", "none"] = "local"
    max_bytes: int = 0
    max_files: int = 1


class Security(Value, frozen=True, kw_only=True, omit_defaults=True):
    """What the processes may do. `seccomp` is "default", "unconfined" or a JSON profile;
    capabilities are names without CAP_ ("ALL" allowed)."""

    privileged: bool = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    seccomp: str = "default"
    apparmor: str = ""
    no_new_privileges: bool = True
    masked_paths: tuple[str, ...] | None = None
    readonly_paths: tuple[str, ...] | None = None


class ProcessSpec(Value, frozen=True, kw_only=True, omit_defaults=True):
    """A process: `argv` whole, `env` as NAME=VALUE, `user` as Docker writes it
    (`name|uid[:group|gid]`), resolved in the root file system at start."""

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()
    cwd: str = "/"
    user: str = ""
    groups: tuple[str, ...] = ()
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False
    umask: int | None = None


class DiskKeySource(Value, frozen=True, kw_only=True, omit_defaults=True):
    """Where the key of an encrypted disk comes from: a file, or with "" whoever starts it."""

    file: str = ""


class AttachedDisk(Value, frozen=True, kw_only=True, omit_defaults=True):
    """A further disk, which the machine writes to unless it is read-only. One that is
    encrypted is opened by the key in `key_file`."""

    path: str
    format: Literal["raw", "qcow2", "luks"] = "raw"
    read_only: bool = False
    key_file: str = ""


class FromDisk(Value, frozen=True, kw_only=True, omit_defaults=True):
    """What a machine starts that brings its own kernel and init.

    `path` is the disk it stands on, which is never written to (empty: a new, empty disk);
    `stamp` tells whether that file is still the one it was; an `encrypted` one has the key
    of the machine's own disk. `seed` says that cloud-init
    finds its data on a disk of ours. `screen` is empty for none, `unix` for a socket in the
    instance's directory, or ADDRESS:PORT. With `user_network` QEMU itself is the network.
    `identity` is the identifier that it had where it came from, empty for its own: what its
    guest knows it by is made of that.
    """

    path: str = ""
    format: Literal["raw", "qcow2"] = "raw"
    stamp: str = ""
    encrypted: bool = False
    firmware: Literal["bios", "uefi"] = "bios"
    cdroms: tuple[str, ...] = ()
    disks: tuple[AttachedDisk, ...] = ()
    seed: bool = False
    screen: str = ""
    user_network: bool = False
    identity: str = ""


class CpuTopology(Value, frozen=True, kw_only=True, omit_defaults=True):
    """How a machine's processors are arranged; `sockets` 0 is as many as it takes."""

    sockets: int = 0
    cores: int = 1
    threads: int = 1


class NumaNode(Value, frozen=True, kw_only=True, omit_defaults=True):
    """A node that a machine's guest sees: its processors, its bytes of memory, and the nodes
    of the host that the memory is to come from (none: any)."""

    cpus: tuple[int, ...]
    memory: int
    host_nodes: tuple[int, ...] = ()


class MachineOptions(Value, frozen=True, kw_only=True, omit_defaults=True):
    """What only a virtual machine has. Empty means the default of this host's QEMU.

    `accel` is auto, kvm or tcg; `kernel` the name or identifier of a guest kernel;
    `machine` a machine type of QEMU (`q35`, `microvm`); `cpu_model` a CPU model of QEMU;
    `disk` the size in bytes of the writable disk, 0 for the default; `template` says
    whether the start may go on from a booted machine kept for that; `tpm` whether it has a
    TPM 2.0, whose state is kept with the instance; with `disk_key` its disk is encrypted.
    `from_disk` is set for a machine that has no image, and no agent of ours. `cpus_max` and
    `memory_max` (bytes) are how far it may grow while it runs, 0 for as far as the host.
    `cpu_pin` keeps each virtual processor to one of the host's, `memory_lock` its memory from
    being swapped out. `disk_cache` and `disk_aio` are how QEMU reads and writes the writable
    disk.
    """

    accel: Literal["auto", "kvm", "tcg"] = "auto"
    kernel: str = ""
    machine: str = ""
    cpu_model: str = ""
    cpus_max: int = 0
    memory_max: int = 0
    cpu_topology: CpuTopology | None = None
    cpu_pin: bool = False
    numa: tuple[NumaNode, ...] = ()
    memory_lock: bool = False
    disk_cache: Literal["", "writeback", "none", "unsafe"] = ""
    disk_aio: Literal["", "threads", "native", "io_uring"] = ""
    disk: int = 0
    template: bool = True
    tpm: bool = False
    disk_key: DiskKeySource | None = None
    from_disk: FromDisk | None = None


class InstanceSpec(Value, frozen=True, kw_only=True, omit_defaults=True):
    """All that is asked of one instance."""

    image: str
    process: ProcessSpec
    isolation: Literal["container", "vm"] = "container"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    hostname: str = ""
    domainname: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    init: bool = False
    read_only: bool = False
    auto_remove: bool = False
    mounts: tuple[Mount, ...] = ()
    volumes_from: tuple[str, ...] = ()
    devices: tuple[DeviceNode, ...] = ()
    device_rules: tuple[str, ...] = ()
    device_names: tuple[str, ...] = ()
    gpus: str = ""
    network_mode: str = "bridge"
    networks: tuple[NetworkAttachment, ...] = ()
    ports: tuple[PortMapping, ...] = ()
    publish_all: bool = False
    exposed: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    extra_hosts: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    pid_mode: str = ""
    ipc_mode: str = ""
    uts_mode: str = ""
    cgroup_mode: str = "private"
    userns: str = ""
    resources: Resources = Resources()
    ulimits: tuple[Ulimit, ...] = ()
    sysctls: dict[str, str] = {}
    shm_size: int = 64 << 20
    oom_score_adj: int = 0
    security: Security = Security()
    restart: RestartPolicy = RestartPolicy()
    health: HealthCheck | None = None
    logs: LogOptions = LogOptions()
    stop_signal: str = "SIGTERM"
    stop_timeout_s: float = 10.0
    storage_options: dict[str, str] = {}
    machine: MachineOptions = MachineOptions()
    placement: Placement = Placement()
