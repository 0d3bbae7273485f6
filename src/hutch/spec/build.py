"""Merge what a caller asks for with what the image says, into one checked `InstanceSpec`.

Pure: nothing of the host is looked at. `hutch.spec.options.RunOptions` lists the options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hutch.errors import InvalidArgument
from hutch.spec.defaults import ImageDefaults
from hutch.spec.hardware import arranged, check_hardware
from hutch.spec.limits import (
    RESOURCE_OPTIONS,
    machine_disks,
    parse_device,
    parse_device_rules,
    parse_ulimits,
    read_resources,
    read_sysctls,
)
from hutch.spec.links import parse_links
from hutch.spec.machine import MACHINE_OPTIONS, check_room, read_disk, read_machine
from hutch.spec.model import InstanceSpec
from hutch.spec.mounts import parse_volumes_from, read_mounts
from hutch.spec.networks import (
    change_rates,
    check_hostname,
    parse_exposed,
    parse_extra_hosts,
    parse_networks,
    parse_ports,
    publish_exposed,
)
from hutch.spec.parse import flag, integer, ip_address, items, mapping, strings, text
from hutch.spec.process import argv_of, read_command, read_health, read_process
from hutch.spec.security import read_logs, read_mode, read_restart, read_security
from hutch.spec.signals import parse_signal, signal_name
from hutch.units import parse_bytes, parse_duration

if TYPE_CHECKING:
    from typing import Unpack

    from hutch.spec.options import RunOptions, UpdateOptions

__all__ = ["OPTIONS", "ImageDefaults", "build", "check_name", "update"]

OPTIONS = RESOURCE_OPTIONS.union(
    MACHINE_OPTIONS,
    """add_host annotations cap_add cap_drop cgroupns device_cgroup_rules devices dns dns_options
    dns_search domainname entrypoint env env_file expose gpus group_add health_cmd health_interval
    health_retries health_start_interval health_start_period health_timeout hostname init
    interactive ip ip6 ipc isolation labels links log_driver log_opts mac_address mounts name
    network network_aliases
    no_healthcheck no_new_privileges oom_score_adj pid placement platform privileged publish
    publish_all pull read_only remove restart security_opt shm_size stdin_once stop_signal
    stop_timeout storage_opts sysctls tmpfs tty ulimits user userns uts volumes volumes_from
    workdir""".split(),
)
_NEVER_S = 315_360_000.0  # ten years: what a stop timeout of -1 (wait for ever) becomes
_NETWORK_ONLY = (
    "hostname", "dns", "dns_search", "dns_options", "add_host", "publish", "publish_all", "expose",
)  # fmt: skip


def build(
    image_ref: str,
    image: ImageDefaults,
    command: Sequence[str] | str | None = None,
    **options: Unpack[RunOptions],
) -> InstanceSpec:
    """Return the specification of an instance of `image_ref`, whose configuration is `image`.

    Options that are None count as not given. `name`, `pull` and `platform` are the engine's
    and are passed over; `env_file` is the command line's and refused. Raises
    `InvalidArgument` naming the field.
    """
    given = _known(options)
    if "env_file" in given:
        raise InvalidArgument(
            "files are not read here",
            field="env_file",
            hint="the command line reads them; from Python pass env=",
        )
    entrypoint, words = read_command(image, command, given)
    network_mode, networks = parse_networks(given)
    _check_shared_network(network_mode, given)
    mounts = read_mounts(given, image.volumes)
    values: dict[str, Any] = {}
    for name in given:
        if name not in _READERS:
            continue
        field, read = _READERS[name]
        values[field] = read(given[name], name)
    if image.labels:
        values["labels"] = {**image.labels, **values.get("labels", {})}
    _fill_ports(values, image, given, network_mode)
    _fill_modes(values, given, network_mode)
    if "devices" in given:
        values["device_names"] = _device_names(given["devices"], "devices")
    if "stop_signal" not in values and image.stop_signal:
        values["stop_signal"] = _signal(image.stop_signal, "image.stop_signal")
    isolation = values.get("isolation", "container")
    machine = read_machine(given, isolation)
    spec = InstanceSpec(
        image=text(image_ref, "image", empty=False),
        process=read_process(image, argv_of(entrypoint, words), given),
        entrypoint=entrypoint,
        command=words,
        mounts=mounts,
        network_mode=network_mode,
        networks=networks,
        resources=arranged(read_resources(given, machine=isolation == "vm"), machine),
        security=read_security(given),
        health=read_health(image, given),
        logs=read_logs(given),
        machine=machine,
        **values,
    )
    _check_whole(spec)
    return spec


def update(spec: InstanceSpec, **options: Unpack[UpdateOptions]) -> InstanceSpec:
    """Return `spec` with other limits or another restart policy; nothing else may change."""
    from msgspec.structs import replace

    allowed = RESOURCE_OPTIONS | {"disk", "network", "restart"}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in allowed:
            raise InvalidArgument(
                "cannot be changed after creation",
                field=name,
                hint="limits, rates of networks, the restart policy and a machine's disk size can",
            )
    changes: dict[str, Any] = {
        "resources": read_resources(given, spec.resources, machine=spec.isolation == "vm")
    }
    if "restart" in given:
        changes["restart"] = read_restart(given["restart"])
    if "network" in given:
        changes["networks"] = change_rates(spec.networks, given["network"])
    if "disk" in given:
        changes["machine"] = read_disk(given["disk"], spec.machine, spec.isolation)
    changed = replace(spec, **changes)
    _check_whole(changed)
    return changed


def check_name(value: object, field: str = "name") -> str:
    """Return an instance's name: letters, digits, `_`, `.` and `-`."""
    name = text(value, field).removeprefix("/")
    plain = name.replace("_", "").replace(".", "").replace("-", "")
    if not (name.isascii() and plain.isalnum() and name[:1].isalnum() and len(name) <= 128):
        raise InvalidArgument(
            f"invalid name {name[:80]!r}",
            field=field,
            hint="use letters, digits, `_`, `.` and `-`, a letter or digit first",
        )
    return name


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in OPTIONS:
            from hutch.spec.elsewhere import hint_for

            raise InvalidArgument("no such option", field=name, hint=hint_for(name, OPTIONS))
    return given


def _check_shared_network(network_mode: str, given: Mapping[str, Any]) -> None:
    """Refuse what cannot be set in a network namespace that belongs to another instance."""
    if not network_mode.startswith("container:"):
        return
    for name in _NETWORK_ONLY:
        if given.get(name):
            raise InvalidArgument(
                f"is not possible in the network of {network_mode!r}",
                field=name,
                hint="set it on the instance that owns the network",
            )


def _fill_ports(
    values: dict[str, Any], image: ImageDefaults, given: Mapping[str, Any], network_mode: str
) -> None:
    exposed = parse_exposed(given.get("expose"))
    if image.exposed_ports:
        exposed = tuple(dict.fromkeys((*exposed, *parse_exposed(image.exposed_ports, "image"))))
    ports = parse_ports(given.get("publish"))
    publish_all = flag(given.get("publish_all", False), "publish_all")
    if publish_all:
        ports = publish_exposed(ports, exposed)
    # With `host` there is nothing to map and with `none` nobody to map for: as Docker, drop them.
    if network_mode not in ("host", "none"):
        values["ports"] = ports
    values["publish_all"] = publish_all
    values["exposed"] = exposed


def _fill_modes(values: dict[str, Any], given: Mapping[str, Any], network_mode: str) -> None:
    for name, field in (("pid", "pid_mode"), ("ipc", "ipc_mode"), ("uts", "uts_mode")):
        if name in given:
            values[field] = read_mode(given, name)
    if "userns" in given:
        values["userns"] = read_mode(given, "userns")
    if "cgroupns" in given:
        values["cgroup_mode"] = read_mode(given, "cgroupns", "private")
    if "sysctls" in given:
        values["sysctls"] = read_sysctls(
            given["sysctls"],
            network_mode=network_mode,
            ipc_mode=values.get("ipc_mode", ""),
            uts_mode=values.get("uts_mode", ""),
        )


def _check_whole(spec: InstanceSpec) -> None:
    """Check what concerns several fields at once."""
    if spec.auto_remove and spec.restart.name != "no":
        raise InvalidArgument(
            "cannot be combined with a restart policy",
            field="remove",
            hint="leave out --rm or --restart",
        )
    if spec.uts_mode == "host" and (spec.hostname or spec.domainname):
        raise InvalidArgument("is not possible with uts=host", field="hostname")
    if spec.userns == "remap" and spec.security.privileged:
        raise InvalidArgument(
            "cannot be combined with privileged", field="userns", hint="use --userns host"
        )
    if spec.resources.oom_kill_disable and not spec.resources.memory:
        raise InvalidArgument("needs a memory limit", field="oom_kill_disable")
    key = spec.machine.disk_key
    if key is not None and not key.file and spec.restart.name != "no":
        raise InvalidArgument(
            "cannot be combined with a key that is given at each start",
            field="restart",
            hint="keep the key in a file: --disk-key FILE",
        )
    if spec.isolation == "vm":
        check_room(spec.resources, spec.machine)
        check_hardware(spec.resources, spec.machine)
    else:
        for name, field in machine_disks(spec.resources):
            raise InvalidArgument(
                f"{name!r} is a disk of a virtual machine",
                field=field,
                hint="name a block device of the host, such as /dev/sda",
            )
    for name in ("merge", "prealloc"):
        if getattr(spec.placement, name) and spec.isolation != "vm":
            field = f"placement.{name}"
            raise InvalidArgument("is for virtual machines", field=field, hint="add --vm")
    if spec.placement.merge and spec.placement.huge:
        raise InvalidArgument(
            "the kernel merges no huge pages",
            field="placement.merge",
            hint="leave out merge=on, or huge=",
        )
    if spec.placement.memory == "pool":
        _check_pooled(spec)
    if spec.ipc_mode.startswith("container:") and spec.isolation == "vm":
        raise InvalidArgument("is not possible with a virtual machine", field="ipc")


def _check_pooled(spec: InstanceSpec) -> None:
    field = "placement.memory"
    if spec.isolation != "vm":
        raise InvalidArgument("is for virtual machines", field=field, hint="add --vm")
    if spec.placement.huge:
        raise InvalidArgument("memory is from the pool or of huge pages, not both", field=field)
    if spec.machine.numa:
        raise InvalidArgument("memory from the pool has no nodes", field=field)
    if spec.machine.from_disk is not None:
        raise InvalidArgument("is for machines of an image", field=field)


# ---- single fields ----------------------------------------------------------------------


def _signal(value: Any, field: str) -> str:
    return signal_name(parse_signal(value, field=field))


def _stop_timeout(value: Any, field: str) -> float:
    return _NEVER_S if value in (-1, "-1") else parse_duration(value, field=field)


def _shm_size(value: Any, field: str) -> int:
    size = parse_bytes(value, field=field)
    if not size:
        raise InvalidArgument("must be more than 0", field=field)
    return size


def _isolation(value: Any, field: str) -> str:
    given = text(value, field)
    if given not in ("container", "vm"):
        raise InvalidArgument(f"expected container, vm or auto, got {given[:40]!r}", field=field)
    return given


def _hostname(value: Any, field: str) -> str:
    name = text(value, field)
    if len(name) > 64:  # __NEW_UTS_LEN
        raise InvalidArgument("longer than 64 characters", field=field)
    return check_hostname(name, field) if name else ""


def _oom_score(value: Any, field: str) -> int:
    return integer(value, field, low=-1000, high=1000)


def _dns(value: Any, field: str) -> tuple[str, ...]:
    return tuple(ip_address(entry, f"{field}[{i}]") for i, entry in enumerate(items(value, field)))


def _dns_search(value: Any, field: str) -> tuple[str, ...]:
    domains = strings(value, field)
    for i, domain in enumerate(domains):
        if domain != ".":
            check_hostname(domain, f"{field}[{i}]")
    return domains


def _dns_options(value: Any, field: str) -> tuple[str, ...]:
    options = strings(value, field)
    for i, option in enumerate(options):
        if not option or any(c.isspace() for c in option):
            raise InvalidArgument("must be one word", field=f"{field}[{i}]")
    return options


def _devices(value: Any, field: str) -> tuple[Any, ...]:
    from hutch.spec.placement import is_device_name

    return tuple(
        parse_device(v, f"{field}[{i}]")
        for i, v in enumerate(items(value, field))
        if not (isinstance(v, str) and is_device_name(v))
    )


def _device_names(value: Any, field: str) -> tuple[str, ...]:
    from hutch.spec.placement import is_device_name

    named = (v for v in items(value, field) if isinstance(v, str) and is_device_name(v))
    return tuple(dict.fromkeys(named))


def _placement(value: Any, field: str) -> Any:
    from hutch.spec.placement import read_placement

    return read_placement(value, field)


def _gpus(value: Any, field: str) -> str:
    from hutch.spec.placement import parse_gpus

    return parse_gpus(value, field)


def _volumes_from(value: Any, field: str) -> tuple[str, ...]:
    found = (parse_volumes_from(v, f"{field}[{i}]") for i, v in enumerate(items(value, field)))
    return tuple(dict.fromkeys(found))


def _storage(value: Any, field: str) -> dict[str, str]:
    options = mapping(value, field)
    for name in options:
        if name != "size":
            raise InvalidArgument(f"unknown option {name[:40]!r}", field=field, hint="size=10G")
        parse_bytes(options[name], field=f"{field}.size")
    return options


_READERS: dict[str, tuple[str, Any]] = {
    "add_host": ("extra_hosts", parse_extra_hosts),
    "annotations": ("annotations", mapping),
    "device_cgroup_rules": ("device_rules", parse_device_rules),
    "devices": ("devices", _devices),
    "dns": ("dns", _dns),
    "dns_options": ("dns_options", _dns_options),
    "dns_search": ("dns_search", _dns_search),
    "domainname": ("domainname", _hostname),
    "gpus": ("gpus", _gpus),
    "hostname": ("hostname", _hostname),
    "init": ("init", flag),
    "isolation": ("isolation", _isolation),
    "labels": ("labels", mapping),
    "links": ("links", parse_links),
    "oom_score_adj": ("oom_score_adj", _oom_score),
    "placement": ("placement", _placement),
    "read_only": ("read_only", flag),
    "remove": ("auto_remove", flag),
    "restart": ("restart", read_restart),
    "shm_size": ("shm_size", _shm_size),
    "stop_signal": ("stop_signal", _signal),
    "stop_timeout": ("stop_timeout_s", _stop_timeout),
    "storage_opts": ("storage_options", _storage),
    "ulimits": ("ulimits", parse_ulimits),
    "volumes_from": ("volumes_from", _volumes_from),
}
