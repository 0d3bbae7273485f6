"""Privileges, namespaces shared with others, restart policy and logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hutch.errors import InvalidArgument
from hutch.spec.model import LogOptions, RestartPolicy, Security
from hutch.spec.parse import flag, integer, mapping, strings, text
from hutch.units import parse_bytes

__all__ = ["CAPABILITIES", "read_logs", "read_mode", "read_restart", "read_security"]

CAPABILITIES = frozenset(
    """AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN
    DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE
    MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP
    SETGID SETPCAP SETUID SYSLOG SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT
    SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM""".split()
)
_MODES = {
    "ipc": ("none", "private", "shareable", "host"),
    "pid": ("private", "host"),
    "uts": ("private", "host"),
    "cgroupns": ("private", "host"),
    "userns": ("host", "remap", "auto"),
}
_SHARED = frozenset({"ipc", "pid"})
_LOG_DRIVERS = {"local": "local", "json-file": "local", "none": "none"}
_LOG_IGNORED = frozenset({"mode", "compress", "max-buffer-size", "labels", "env", "tag"})


def read_capabilities(value: object, field: str) -> tuple[str, ...]:
    """Return capability names without CAP_, each once; `ALL` stands for all of them."""
    found: dict[str, None] = {}
    for i, entry in enumerate(strings(value, field)):
        name = entry.strip().upper().removeprefix("CAP_")
        if name != "ALL" and name not in CAPABILITIES:
            raise InvalidArgument(
                f"unknown capability {entry[:40]!r}", field=f"{field}[{i}]", hint=_close(name)
            )
        found[name] = None
    return tuple(found)


def _close(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, CAPABILITIES, 1)
    return f"did you mean {near[0]}?" if near else "for example NET_ADMIN; see capabilities(7)"


def read_security(given: Mapping[str, Any]) -> Security:
    """Return what the processes may do, from --privileged, --cap-* and --security-opt."""
    privileged = flag(given.get("privileged", False), "privileged")
    values: dict[str, Any] = {}
    if privileged:
        # As Docker has it: privileged lifts the filter and the masks, not only capabilities.
        values = {
            "privileged": True,
            "seccomp": "unconfined",
            "apparmor": "unconfined",
            "masked_paths": (),
            "readonly_paths": (),
            "no_new_privileges": False,
        }
    for name in ("cap_add", "cap_drop"):
        if name in given:
            values[name] = read_capabilities(given[name], name)
    if "no_new_privileges" in given:
        values["no_new_privileges"] = flag(given["no_new_privileges"], "no_new_privileges")
    if "security_opt" in given:
        for i, entry in enumerate(_security_entries(given["security_opt"])):
            values |= _security_option(entry, f"security_opt[{i}]")
    return Security(**values)


def _security_entries(value: object) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        entries = []
        for key, setting in value.items():
            if isinstance(setting, Mapping):
                import msgspec

                try:
                    setting = msgspec.json.encode(setting).decode()
                except (TypeError, ValueError, msgspec.MsgspecError) as exc:
                    raise InvalidArgument(str(exc), field=f"security_opt.{key}") from exc
            elif isinstance(setting, bool):
                setting = str(setting).lower()
            entries.append(f"{key}={setting}")
        value = entries
    return strings(value, "security_opt")


def _security_option(entry: str, field: str) -> dict[str, Any]:
    cut = min((entry.find(c) for c in "=:" if c in entry), default=len(entry))
    name, value = entry[:cut], entry[cut + 1 :]
    if name == "no-new-privileges":
        return {"no_new_privileges": flag(value, field) if value else True}
    if name == "seccomp":
        return {"seccomp": _seccomp(value, field)}
    if name == "apparmor" and value:
        return {"apparmor": value}
    if name == "systempaths" and value == "unconfined":
        return {"masked_paths": (), "readonly_paths": ()}
    if name == "label" and value:
        if value == "disable":
            return {}
        raise InvalidArgument("SELinux labels are not supported", field=field)
    raise InvalidArgument(
        f"unknown option {entry[:80]!r}",
        field=field,
        hint="seccomp=…, apparmor=…, no-new-privileges[=false], systempaths=unconfined",
    )


def _seccomp(value: str, field: str) -> str:
    if value in ("unconfined", "default"):
        return value
    if value == "builtin":
        return "default"
    if value.lstrip().startswith("{"):
        return value
    raise InvalidArgument(
        f"expected unconfined, default or a profile in JSON, got {value[:80]!r}",
        field=field,
        hint="the command line reads a profile from a file; from Python pass its text",
    )


def read_mode(given: Mapping[str, Any], name: str, default: str = "") -> str:
    """Return the mode of one namespace; `private` is the default where nothing is shared."""
    value = text(given.get(name, ""), name)
    if not value:
        return default
    if name in _SHARED and value.startswith("container:") and len(value) > len("container:"):
        return value
    allowed = _MODES[name]
    if value not in allowed:
        shared = ", container:NAME" if name in _SHARED else ""
        raise InvalidArgument(
            f"expected {', '.join(allowed)}{shared}; got {value[:80]!r}", field=name
        )
    if value == "auto":
        return "remap"
    return default if value == "private" and name in ("pid", "uts") else value


def read_restart(value: object, field: str = "restart") -> RestartPolicy:
    """Read `no`, `always`, `unless-stopped`, `on-failure[:RETRIES]` or Docker's API form."""
    if isinstance(value, RestartPolicy):
        retries = value.max_retries
        value = f"{value.name}:{retries}" if retries else value.name
    if isinstance(value, Mapping):
        name = text(value.get("Name", value.get("name", "")), field)
        count = value.get("MaximumRetryCount", value.get("max_retries", 0))
    else:
        name, colon, retries_text = text(value, field).partition(":")
        count = retries_text if colon else 0
    retries = integer(count, field, low=0, high=1_000_000)
    if retries and name != "on-failure":
        raise InvalidArgument("a number of retries goes with on-failure only", field=field)
    match name:
        case "" | "no":
            return RestartPolicy()
        case "always" | "unless-stopped" | "on-failure":
            return RestartPolicy(name=name, max_retries=retries)
    raise InvalidArgument(
        f"unknown policy {name[:40]!r}",
        field=field,
        hint="one of no, always, unless-stopped, on-failure[:RETRIES]",
    )


def read_logs(given: Mapping[str, Any]) -> LogOptions:
    """Return where output is kept; Docker's json-file is taken as hutch's own format."""
    driver = _LOG_DRIVERS.get(text(given.get("log_driver", "local"), "log_driver"))
    if driver is None:
        raise InvalidArgument(
            f"unknown driver {str(given['log_driver'])[:40]!r}",
            field="log_driver",
            hint="one of local, json-file (the same) and none",
        )
    options = mapping(given.get("log_opts", ()), "log_opts")
    size = options.pop("max-size", "-1")
    files = integer(options.pop("max-file", 1), "log_opts.max-file", low=1, high=1000)
    for name in options:
        if name not in _LOG_IGNORED:
            raise InvalidArgument(
                f"unknown option {name[:40]!r}", field="log_opts", hint="max-size and max-file"
            )
    max_bytes = 0 if size == "-1" else parse_bytes(size, field="log_opts.max-size")
    if files > 1 and not max_bytes:
        raise InvalidArgument("needs max-size", field="log_opts.max-file")
    if max_bytes and max_bytes < 1024:
        raise InvalidArgument("must be at least 1k", field="log_opts.max-size")
    return LogOptions(
        driver="none" if driver == "none" else "local", max_bytes=max_bytes, max_files=files
    )
