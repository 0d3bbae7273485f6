"""The options of `run` and `create`, and their translation to those of the engine."""

from __future__ import annotations

import os
from typing import Any

from hutch.cli.keys import KEY_OPTION, key_source
from hutch.cli.options import Option, UsageError

__all__ = ["CREATE_OPTIONS", "RESOURCES", "accept_only", "engine_options", "read_env_file"]

RESOURCES: tuple[Option, ...] = (
    ("blkio-weight", "", "int", "10-1000", "Share of block input and output"),
    ("cpu-period", "", "text", "MICROSECONDS", "Length of a CPU period"),
    ("cpu-quota", "", "text", "MICROSECONDS", "CPU time in each period"),
    ("cpu-shares", "c", "int", "NUMBER", "CPU share against others (1024 is usual)"),
    ("cpus", "", "text", "NUMBER", "CPUs it may use, such as 1.5"),
    ("cpuset-cpus", "", "text", "LIST", "CPUs it may run on, such as 0-2,4"),
    ("cpuset-mems", "", "text", "LIST", "Memory nodes it may use"),
    ("device-read-bps", "", "list", "DEVICE:RATE", "Limit reading, bytes a second"),
    ("device-read-iops", "", "list", "DEVICE:RATE", "Limit reading, operations a second"),
    ("device-write-bps", "", "list", "DEVICE:RATE", "Limit writing, bytes a second"),
    ("device-write-iops", "", "list", "DEVICE:RATE", "Limit writing, operations a second"),
    ("memory", "m", "text", "SIZE", "Memory limit, such as 512m"),
    ("memory-min", "", "text", "SIZE", "Memory never taken back, whoever grows (cgroup v2)"),
    ("memory-reservation", "", "text", "SIZE", "Memory kept under pressure"),
    ("memory-swap", "", "text", "SIZE", "Memory plus swap; -1 for no limit"),
    ("pids-limit", "", "int", "NUMBER", "Number of processes; -1 for no limit"),
    ("restart", "", "text", "POLICY", "no, always, unless-stopped or on-failure[:N]"),
)

CREATE_OPTIONS: tuple[Option, ...] = (
    *RESOURCES,
    ("accel", "", "text", "NAME", "auto, kvm or tcg (of a virtual machine)"),
    ("add-host", "", "list", "NAME:IP", "Add a line to /etc/hosts"),
    ("annotation", "", "list", "KEY=VALUE", "Add an annotation"),
    ("attach", "a", "list", "STREAM", "Attach stdin, stdout or stderr only"),
    ("cap-add", "", "list", "NAME", "Add a capability"),
    ("cap-drop", "", "list", "NAME", "Drop a capability (ALL for all)"),
    ("cgroupns", "", "text", "MODE", "private or host"),
    ("cidfile", "", "text", "FILE", "Write the identifier to a file"),
    ("cpu-model", "", "text", "MODEL", "CPU model of a virtual machine, such as max or EPYC"),
    ("cpu-pin", "", "flag", "", "Keep each CPU of a virtual machine to one of the host's"),
    ("cpu-topology", "", "text", "SPEC", "CPUs of a virtual machine: sockets=1,cores=2,threads=2"),
    ("cpus-max", "", "int", "NUMBER", "CPUs that `update` may give a running virtual machine"),
    (
        "device",
        "",
        "list",
        "DEVICE",
        "Add a device of the host: SOURCE[:TARGET[:rwm]], VENDOR/CLASS=NAME (CDI), vfio=ADDRESS",
    ),
    ("device-cgroup-rule", "", "list", "RULE", "Allow devices, such as `c 42:* rmw`"),
    ("disk", "", "text", "SIZE", "Writable disk of a virtual machine, such as 20G"),
    ("disk-aio", "", "text", "MODE", "threads, native or io_uring, of that disk"),
    ("disk-cache", "", "text", "MODE", "writeback, none or unsafe, of that disk"),
    KEY_OPTION,
    ("disable-content-trust", "", "flag", "", "Accepted: signatures are not checked (true)"),
    ("dns", "", "list", "IP", "Name server"),
    ("dns-option", "", "list", "OPTION", "Option of the resolver"),
    ("dns-opt", "", "list", "OPTION", "The same as --dns-option"),
    ("dns-search", "", "list", "DOMAIN", "Search domain"),
    ("domainname", "", "text", "NAME", "NIS domain name"),
    ("dry-run", "", "flag", "", "Print the plan as JSON and do nothing"),
    ("entrypoint", "", "text", "PROGRAM", "Replace the image's entry point"),
    ("env", "e", "list", "NAME[=VALUE]", "Set a variable; NAME alone takes it from here"),
    ("env-file", "", "list", "FILE", "Read variables from a file"),
    ("expose", "", "list", "PORT", "Expose a port"),
    ("gpus", "", "text", "GPUS", "Add graphics processors: all, a number, or device=NAME,NAME"),
    ("group-add", "", "list", "GROUP", "Add a supplementary group"),
    ("health-cmd", "", "text", "COMMAND", "Command of the health check"),
    ("health-interval", "", "text", "DURATION", "Time between checks (30s)"),
    ("health-retries", "", "int", "NUMBER", "Failures that make it unhealthy (3)"),
    ("health-start-interval", "", "text", "DURATION", "Time between checks in that (5s)"),
    ("health-start-period", "", "text", "DURATION", "Time in which failures do not count"),
    ("health-timeout", "", "text", "DURATION", "Time a check may take (30s)"),
    ("hostname", "h", "text", "NAME", "Host name inside"),
    ("init", "", "flag", "", "Run an init that reaps processes and forwards signals"),
    ("interactive", "i", "flag", "", "Keep stdin open"),
    ("ip", "", "text", "ADDRESS", "IPv4 address on the first network"),
    ("ip6", "", "text", "ADDRESS", "IPv6 address on the first network"),
    ("ipc", "", "text", "MODE", "private, shareable, host, none or container:NAME"),
    ("isolation", "", "text", "KIND", "container, vm, or auto: what this host allows"),
    ("kernel", "", "text", "NAME", "Guest kernel of a virtual machine (`hutch vm kernel ls`)"),
    ("label", "l", "list", "KEY=VALUE", "Set a label"),
    ("label-file", "", "list", "FILE", "Read labels from a file"),
    ("link", "", "list", "NAME[:ALIAS]", "A name here for another instance, as in Docker"),
    ("log-driver", "", "text", "NAME", "local (json-file is the same) or none"),
    ("log-opt", "", "list", "KEY=VALUE", "max-size=… and max-file=…"),
    ("mac-address", "", "text", "ADDRESS", "MAC address on the first network"),
    ("machine", "", "text", "TYPE", "Machine type of a virtual machine: q35 or microvm"),
    ("memory-lock", "", "flag", "", "Keep a virtual machine's memory from being swapped out"),
    ("memory-max", "", "text", "SIZE", "Memory that `update` may give a running virtual machine"),
    ("memory-swappiness", "", "int", "0-100", "How readily memory is swapped out"),
    ("mount", "", "list", "SPEC", "Mount: type=bind,source=…,target=…[,readonly]"),
    ("name", "", "text", "NAME", "Name of the instance"),
    (
        "network",
        "",
        "list",
        "NETWORK",
        "bridge, none, host, container:NAME or a network; name=…[,ip=…][,rx-rate=…][,tx-rate=…]",
    ),
    ("net", "", "list", "NETWORK", "The same as --network"),
    ("network-alias", "", "list", "NAME", "Further name on the first network"),
    ("net-alias", "", "list", "NAME", "The same as --network-alias"),
    ("no-healthcheck", "", "flag", "", "Run no health check"),
    ("no-template", "", "flag", "", "Boot a virtual machine instead of resuming a booted one"),
    ("numa", "", "list", "SPEC", "Node of a virtual machine: cpus=0-1,memory=512M[,host=0]"),
    ("oom-kill-disable", "", "flag", "", "Let it wait instead of killing for memory"),
    ("oom-score-adj", "", "int", "NUMBER", "-1000 to 1000: who is killed first"),
    ("pid", "", "text", "MODE", "private, host or container:NAME"),
    (
        "placement",
        "",
        "text",
        "KEY=VALUE,...",
        "cpus=exclusive, numa=single, smt=full, fit=POLICY, huge=PAGE[:AMOUNT], memory=pool, "
        "merge=on, prealloc=on",
    ),
    ("platform", "", "text", "OS/ARCH", "Platform of the image"),
    ("privileged", "", "flag", "", "Give it all rights over the host"),
    ("publish", "p", "list", "PORTS", "Publish: [[IP:]HOST:]CONTAINER[/udp]"),
    ("publish-all", "P", "flag", "", "Publish all exposed ports to free ones"),
    ("pull", "", "text", "WHEN", "always, missing or never"),
    ("quiet", "q", "flag", "", "Show no progress of a pull or a template"),
    ("read-only", "", "flag", "", "Make the root file system read-only"),
    ("rm", "", "flag", "", "Remove the instance when it has exited"),
    ("security-opt", "", "list", "OPTION", "seccomp=…, apparmor=…, no-new-privileges=…"),
    ("shm-size", "", "text", "SIZE", "Size of /dev/shm (64m)"),
    ("stop-signal", "", "text", "SIGNAL", "Signal that asks it to stop"),
    ("stop-timeout", "", "int", "SECONDS", "Time until it is killed (10)"),
    ("storage-opt", "", "list", "KEY=VALUE", "size=… of the writable layer"),
    ("sysctl", "", "list", "KEY=VALUE", "Set a kernel parameter of its namespaces"),
    ("tmpfs", "", "list", "PATH[:OPTIONS]", "Mount a file system in memory"),
    ("tpm", "", "flag", "", "A TPM 2.0 for a virtual machine, kept with it"),
    ("tty", "t", "flag", "", "Give it a terminal"),
    ("ulimit", "", "list", "NAME=SOFT[:HARD]", "Set a resource limit"),
    ("user", "u", "text", "USER[:GROUP]", "Run as this user"),
    ("userns", "", "text", "MODE", "host or remap"),
    ("uts", "", "text", "MODE", "private or host"),
    ("vm", "", "flag", "", "Run it as a virtual machine"),
    ("volume", "v", "list", "[SOURCE:]TARGET[:OPTIONS]", "Mount a host path or a volume"),
    ("volume-driver", "", "text", "NAME", "local"),
    ("volumes-from", "", "list", "INSTANCE", "Mount the volumes of another instance"),
    ("workdir", "w", "text", "PATH", "Working directory inside"),
)

# Options of ours whose name on the engine differs.
_RENAMED = {
    "annotation": "annotations",
    "device": "devices",
    "device_cgroup_rule": "device_cgroup_rules",
    "dns_option": "dns_options",
    "dns_opt": "dns_options",
    "label": "labels",
    "link": "links",
    "log_opt": "log_opts",
    "mount": "mounts",
    "net": "network",
    "net_alias": "network_aliases",
    "network_alias": "network_aliases",
    "rm": "remove",
    "storage_opt": "storage_opts",
    "sysctl": "sysctls",
    "ulimit": "ulimits",
    "volume": "volumes",
}
_OURS = frozenset(
    ("attach", "cidfile", "detach", "detach_keys", "disable_content_trust", "dry_run", "env_file",
     "label_file", "no_template", "quiet", "sig_proxy", "vm", "volume_driver")
)  # fmt: skip
_MAX_FILE = 1 << 20


def engine_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options for `Engine.create`; files named are read, paths made whole."""
    options: dict[str, Any] = {}
    accept_only(values, "volume_driver", "local")
    if values.get("disable_content_trust") is False:
        raise UsageError("--disable-content-trust=false: signatures are not checked")
    for key, value in values.items():
        if key in _OURS:
            continue
        name = _RENAMED.get(key, key)
        if name in options and isinstance(value, list):
            options[name] = options[name] + value
        else:
            options[name] = value
    if "env" in values or "env_file" in values:
        options["env"] = _environment(values)
    if "label_file" in values:
        lines = [line for path in values["label_file"] for line in _file_lines(path)]
        options["labels"] = lines + options.get("labels", [])
    if "volumes" in options:
        options["volumes"] = [_whole_source(entry) for entry in options["volumes"]]
    if "mounts" in options:
        options["mounts"] = [_whole_mount(entry) for entry in options["mounts"]]
    if "security_opt" in options:
        options["security_opt"] = [_security(entry) for entry in options["security_opt"]]
    if "disk_key" in options:
        options["disk_key"] = key_source(options["disk_key"], option="--disk-key", new=True)
    if values.get("vm"):
        options["isolation"] = "vm"
    if values.get("no_template"):
        options["template"] = False
    return options


def accept_only(values: dict[str, Any], key: str, *accepted: str) -> None:
    """Refuse an option that Docker has unless it asks for what there is anyway."""
    value = values.get(key)
    if value is not None and value not in accepted:
        option = key.replace("_", "-")
        raise UsageError(f"--{option}: only {' or '.join(accepted)} is there, got {value!r}")


def _environment(values: dict[str, Any]) -> list[str]:
    entries: list[str] = []
    for path in values.get("env_file", ()):
        entries += read_env_file(path)
    return entries + from_environment(values.get("env", ()))


def from_environment(entries: list[str]) -> list[str]:
    """Give names without a value the one they have here; one not set here is left out."""
    result = []
    for entry in entries:
        if "=" in entry:
            result.append(entry)
        elif entry in os.environ:
            result.append(f"{entry}={os.environ[entry]}")
    return result


def read_env_file(path: str) -> list[str]:
    """Return the variables of a file: `NAME=VALUE` lines, `#` comments, bare names."""
    entries = []
    for line in _file_lines(path):
        name = line.partition("=")[0]
        if not name or any(c.isspace() for c in name):
            raise UsageError(f"{path}: bad variable name in {line[:80]!r}")
        entries.append(line)
    return from_environment(entries)


def _file_lines(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as exc:
        raise UsageError(f"{path}: {(exc.strerror or str(exc)).lower()}") from exc
    if len(data) > _MAX_FILE:
        raise UsageError(f"{path}: larger than {_MAX_FILE} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path}: not UTF-8 text") from exc
    stripped = (line.lstrip().rstrip("\r") for line in text.split("\n"))
    return [line for line in stripped if line and not line.startswith("#")]


def _whole_source(entry: str) -> str:
    """Make a relative host path of `-v ./x:/y` or `~/x:/y` whole."""
    source, colon, rest = entry.partition(":")
    if not colon:
        return entry
    if source.startswith("~"):
        source = os.path.expanduser(source)
    elif source.startswith("."):
        source = os.path.abspath(source)
    return source + colon + rest


def _whole_mount(entry: str) -> str:
    parts = entry.split(",")
    if not any(part in ("type=bind",) for part in parts):
        return entry
    for i, part in enumerate(parts):
        key, equals, value = part.partition("=")
        if key in ("source", "src") and equals and value and not value.startswith("/"):
            parts[i] = f"{key}={os.path.abspath(os.path.expanduser(value))}"
    return ",".join(parts)


def _security(entry: str) -> str:
    """Read the seccomp profile that an option names."""
    name, equals, value = entry.partition("=")
    if name != "seccomp" or not equals or value in ("unconfined", "default", "builtin"):
        return entry
    return "seccomp=" + "\n".join(_file_lines(value))
