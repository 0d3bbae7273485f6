"""The options of `run`, `create`, `start` and `update`, for type checkers.

Never imported at run time: defining it costs more than building a specification. The names
are those of the command line's long options. A test keeps them equal to `build.OPTIONS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from hutch.spec.model import (
    BindMount,
    CpuTopology,
    DeviceNode,
    DiskKeySource,
    Mount,
    NetworkAttachment,
    NumaNode,
    Placement,
    PortMapping,
    RestartPolicy,
    Throttle,
    TmpfsMount,
    Ulimit,
    VolumeMount,
)

__all__ = ["RunOptions", "UpdateOptions"]

Text = str | os.PathLike[str]
Texts = str | Sequence[str]
Pairs = Mapping[str, object] | Sequence[str] | str
Size = int | str
Seconds = float | str
Network = str | Mapping[str, object] | NetworkAttachment
Throttles = Mapping[str, Size] | Sequence[str | Throttle] | str
Volume = str | os.PathLike[str] | BindMount | VolumeMount | TmpfsMount


class UpdateOptions(TypedDict, total=False):
    """What may be changed while an instance exists."""

    blkio_weight: int | None
    cpu_period: int | str | None
    cpu_quota: int | str | None
    cpu_shares: int | None
    cpus: float | str | None
    cpuset_cpus: str | None
    cpuset_mems: str | None
    device_read_bps: Throttles | None
    device_read_iops: Throttles | None
    device_write_bps: Throttles | None
    device_write_iops: Throttles | None
    disk: Size | None
    memory: Size | None
    memory_min: Size | None
    memory_reservation: Size | None
    memory_swap: Size | None
    memory_swappiness: int | None
    network: Network | Sequence[Network] | None
    oom_kill_disable: bool | None
    pids_limit: int | None
    restart: str | Mapping[str, object] | RestartPolicy | None


class RunOptions(UpdateOptions, total=False):
    """All that may be asked of a new instance."""

    accel: Literal["auto", "kvm", "tcg"] | str | None
    cpu_model: str | None
    cpu_pin: bool | None
    cpu_topology: str | Mapping[str, int] | CpuTopology | None
    cpus_max: int | None
    disk_key: Text | bytes | DiskKeySource | None
    kernel: str | None
    machine: str | None
    memory_lock: bool | None
    memory_max: Size | None
    template: bool | None
    tpm: bool | None

    add_host: Mapping[str, str] | Texts | None
    annotations: Pairs | None
    cap_add: Texts | None
    cap_drop: Texts | None
    cgroupns: Literal["private", "host"] | str | None
    device_cgroup_rules: Texts | None
    devices: str | Sequence[str | DeviceNode] | None
    disk_aio: Literal["threads", "native", "io_uring"] | str | None
    disk_cache: Literal["writeback", "none", "unsafe"] | str | None
    dns: Texts | None
    dns_options: Texts | None
    dns_search: Texts | None
    domainname: str | None
    entrypoint: Texts | None
    env: Mapping[str, object] | Texts | None
    env_file: Text | Sequence[Text] | None
    expose: int | str | Sequence[int | str] | None
    gpus: str | int | None
    group_add: str | int | Sequence[str | int] | None
    health_cmd: Texts | None
    health_interval: Seconds | None
    health_retries: int | None
    health_start_interval: Seconds | None
    health_start_period: Seconds | None
    health_timeout: Seconds | None
    hostname: str | None
    init: bool | None
    interactive: bool | None
    ip: str | None
    ip6: str | None
    ipc: str | None
    isolation: Literal["container", "vm", "auto"] | str | None
    labels: Pairs | None
    links: Texts | None
    log_driver: str | None
    log_opts: Pairs | None
    mac_address: str | None
    mounts: str | Mapping[str, object] | Sequence[str | Mapping[str, object] | Mount] | None
    name: str | None
    network_aliases: Texts | None
    no_healthcheck: bool | None
    no_new_privileges: bool | None
    numa: str | Mapping[str, object] | Sequence[str | Mapping[str, object] | NumaNode] | None
    oom_score_adj: int | None
    pid: str | None
    placement: str | Mapping[str, object] | Placement | None
    platform: str | None
    privileged: bool | None
    publish: int | str | Sequence[int | str | PortMapping] | Mapping[str, object] | None
    publish_all: bool | None
    pull: Literal["always", "missing", "never"] | str | None
    read_only: bool | None
    remove: bool | None
    security_opt: Pairs | None
    shm_size: Size | None
    stdin_once: bool | None
    stop_signal: str | int | None
    stop_timeout: Seconds | None
    storage_opts: Pairs | None
    sysctls: Pairs | None
    tmpfs: Mapping[str, str] | Texts | None
    tty: bool | None
    ulimits: Mapping[str, object] | str | Sequence[str | Ulimit] | None
    user: str | int | None
    userns: str | None
    uts: str | None
    volumes: Volume | Sequence[Volume] | Mapping[str, object] | None
    volumes_from: Texts | None
    workdir: Text | None
