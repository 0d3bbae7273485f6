"""What clients send to make or change a container, as Docker's JSON has it."""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
from typing import Any

import msgspec

__all__ = ["ContainerBody", "EndpointBody", "HealthBody", "HostBody", "ResourceBody"]
__all__ += ["NetworkingBody", "UpdateBody", "Wire"]


class Wire(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """Base: names as in Go, and what is not known is passed over, as Docker does."""


class HealthBody(Wire, frozen=True, kw_only=True):
    """A health check; times in nanoseconds."""

    test: list[str] | None = None
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


class RateBody(Wire, frozen=True, kw_only=True):
    """A rate of one block device."""

    path: str
    rate: int


class WeightBody(Wire, frozen=True, kw_only=True):
    """A weight of one block device."""

    path: str
    weight: int


class DeviceBody(Wire, frozen=True, kw_only=True):
    """A device of the host."""

    path_on_host: str
    path_in_container: str = ""
    cgroup_permissions: str = ""


class DeviceRequestBody(Wire, frozen=True, kw_only=True):
    """Devices by what they are."""

    driver: str = ""
    count: int = 0
    device_ids: list[str] | None = msgspec.field(default=None, name="DeviceIDs")
    capabilities: list[list[str]] | None = None
    options: dict[str, str] | None = None


class UlimitBody(Wire, frozen=True, kw_only=True):
    """A limit of a process."""

    name: str
    soft: int
    hard: int


class RestartBody(Wire, frozen=True, kw_only=True):
    """A restart policy."""

    name: str = ""
    maximum_retry_count: int = 0


class LogBody(Wire, frozen=True, kw_only=True):
    """Where output goes."""

    type: str = ""
    config: dict[str, str] | None = None


class BindingBody(Wire, frozen=True, kw_only=True):
    """Where a port is published."""

    host_ip: str = ""
    host_port: str = ""


class MountBody(Wire, frozen=True, kw_only=True):
    """A mount; of its options, those that are not known are refused."""

    type: str = "volume"
    source: str = ""
    target: str = ""
    read_only: bool = False
    bind_options: dict[str, Any] | None = None
    volume_options: dict[str, Any] | None = None
    tmpfs_options: dict[str, Any] | None = None


class ResourceBody(Wire, frozen=True, kw_only=True):
    """Limits."""

    cpu_shares: int = 0
    memory: int = 0
    nano_cpus: int = 0
    cgroup_parent: str = ""
    blkio_weight: int = 0
    blkio_weight_device: list[WeightBody] | None = None
    blkio_device_read_bps: list[RateBody] | None = None
    blkio_device_write_bps: list[RateBody] | None = None
    blkio_device_read_iops: list[RateBody] | None = msgspec.field(
        default=None, name="BlkioDeviceReadIOps"
    )
    blkio_device_write_iops: list[RateBody] | None = msgspec.field(
        default=None, name="BlkioDeviceWriteIOps"
    )
    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_realtime_period: int = 0
    cpu_realtime_runtime: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    devices: list[DeviceBody] | None = None
    device_cgroup_rules: list[str] | None = None
    device_requests: list[DeviceRequestBody] | None = None
    memory_reservation: int = 0
    memory_swap: int = 0
    memory_swappiness: int | None = None
    oom_kill_disable: bool | None = None
    pids_limit: int | None = None
    ulimits: list[UlimitBody] | None = None
    cpu_count: int = 0
    cpu_percent: int = 0
    io_maximum_iops: int = msgspec.field(default=0, name="IOMaximumIOps")
    io_maximum_bandwidth: int = msgspec.field(default=0, name="IOMaximumBandwidth")


class UpdateBody(ResourceBody, frozen=True, kw_only=True):
    """What may be changed later."""

    restart_policy: RestartBody | None = None


class HostBody(UpdateBody, frozen=True, kw_only=True):
    """What of a container is the host's."""

    binds: list[str] | None = None
    log_config: LogBody | None = None
    network_mode: str = ""
    port_bindings: dict[str, list[BindingBody] | None] | None = None
    auto_remove: bool = False
    volume_driver: str = ""
    volumes_from: list[str] | None = None
    mounts: list[MountBody] | None = None
    console_size: list[int] | None = None
    annotations: dict[str, str] | None = None
    cap_add: list[str] | None = None
    cap_drop: list[str] | None = None
    cgroupns_mode: str = ""
    dns: list[str] | None = None
    dns_options: list[str] | None = None
    dns_search: list[str] | None = None
    extra_hosts: list[str] | None = None
    group_add: list[str] | None = None
    ipc_mode: str = ""
    cgroup: str = ""
    links: list[str] | None = None
    oom_score_adj: int = 0
    pid_mode: str = ""
    privileged: bool = False
    publish_all_ports: bool = False
    readonly_rootfs: bool = False
    security_opt: list[str] | None = None
    storage_opt: dict[str, str] | None = None
    tmpfs: dict[str, str] | None = None
    uts_mode: str = msgspec.field(default="", name="UTSMode")
    userns_mode: str = ""
    shm_size: int = 0
    sysctls: dict[str, str] | None = None
    runtime: str = ""
    isolation: str = ""
    masked_paths: list[str] | None = None
    readonly_paths: list[str] | None = None
    init: bool | None = None


class IpamBody(Wire, frozen=True, kw_only=True):
    """Addresses that are asked for."""

    ipv4_address: str = msgspec.field(default="", name="IPv4Address")
    ipv6_address: str = msgspec.field(default="", name="IPv6Address")
    link_local_ips: list[str] | None = msgspec.field(default=None, name="LinkLocalIPs")


class EndpointBody(Wire, frozen=True, kw_only=True):
    """What is asked of a place in a network."""

    ipam_config: IpamBody | None = msgspec.field(default=None, name="IPAMConfig")
    links: list[str] | None = None
    aliases: list[str] | None = None
    mac_address: str = ""
    driver_opts: dict[str, str] | None = None
    gw_priority: int = 0


class NetworkingBody(Wire, frozen=True, kw_only=True):
    """The networks of a container."""

    endpoints_config: dict[str, EndpointBody | None] | None = None


class ContainerBody(Wire, frozen=True, kw_only=True):
    """A container to be made."""

    hostname: str = ""
    domainname: str = ""
    user: str = ""
    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    exposed_ports: dict[str, Any] | None = None
    tty: bool = False
    open_stdin: bool = False
    stdin_once: bool = False
    env: list[str] | None = None
    cmd: list[str] | str | None = None
    healthcheck: HealthBody | None = None
    image: str = ""
    volumes: dict[str, Any] | None = None
    working_dir: str = ""
    entrypoint: list[str] | str | None = None
    network_disabled: bool = False
    mac_address: str = ""
    labels: dict[str, str] | None = None
    stop_signal: str = ""
    stop_timeout: int | None = None
    host_config: HostBody | None = None
    networking_config: NetworkingBody | None = None
