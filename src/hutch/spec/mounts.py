"""Volumes, bind mounts and file systems in memory: `--volume`, `--mount`, `--tmpfs`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hutch.errors import InvalidArgument
from hutch.spec.model import BindMount, Mount, TmpfsMount, VolumeMount
from hutch.spec.parse import absolute_path, flag, items, mapping, split_csv, text
from hutch.units import parse_bytes

__all__ = ["parse_mount", "parse_tmpfs", "parse_volume", "parse_volumes_from", "read_mounts"]

_PROPAGATIONS = frozenset({"private", "rprivate", "shared", "rshared", "slave", "rslave"})
_IGNORED = frozenset({"z", "Z", "cached", "delegated", "consistent", "default"})
_COPY = frozenset({"copy", "nocopy"})
_TMPFS_PLAIN = (
    "ro rw nosuid suid nodev dev noexec exec sync async dirsync remount mand nomand atime noatime "
    "diratime nodiratime relatime norelatime strictatime nostrictatime private rprivate shared "
    "rshared slave rslave unbindable runbindable bind rbind"
).split()
_TMPFS_VALUES = frozenset({"size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol"})
_TMPFS_OPPOSITE = {"nosuid": "suid", "nodev": "dev", "noexec": "exec"}
_NAME_HINT = "a volume's name is letters, digits, `_`, `.` and `-`; a host path starts with /"


def read_mounts(given: Mapping[str, Any], image_volumes: Iterable[str]) -> tuple[Mount, ...]:
    """Return all mounts of the options and the image, parents first, each target once."""
    found: list[tuple[str, Mount]] = []
    for name, parse in _READERS:
        found += [(f"{name}[{i}]", parse(v, f"{name}[{i}]")) for i, v in _members(given, name)]
    taken: dict[str, str] = {}
    for field, mount in found:
        if mount.target in taken:
            raise InvalidArgument(
                f"target {mount.target} is mounted twice",
                field=field,
                hint=f"remove it here or in {taken[mount.target]}",
            )
        taken[mount.target] = field
        _check_proc(mount, field)
    mounts = [mount for _, mount in found]
    for volume in image_volumes:
        target = absolute_path("/" + volume.lstrip("/"), "image.volumes")
        if target not in taken:
            taken[target] = "image.volumes"
            mounts.append(VolumeMount(target=target))
    if len(mounts) > 1:
        mounts.sort(key=lambda mount: mount.target.count("/"))
    return tuple(mounts)


def _check_proc(mount: Mount, field: str) -> None:
    """Refuse to put something else where programs look for processes: what protects an
    instance is in there too. The host's own, as monitoring wants it, is possible."""
    if mount.target == "/proc" and not (isinstance(mount, BindMount) and mount.source == "/proc"):
        raise InvalidArgument(
            "/proc is the instance's own", field=f"{field}.target", hint="mount it elsewhere"
        )


def _members(given: Mapping[str, Any], name: str) -> Iterable[tuple[int, Any]]:
    value = given.get(name)
    if isinstance(value, Mapping) and name == "volumes":
        return enumerate([(source, target) for source, target in value.items()])
    if isinstance(value, Mapping) and name == "tmpfs":
        return enumerate([f"{path}:{options}" for path, options in value.items()])
    if isinstance(value, Mapping):
        return enumerate([value])
    return enumerate(items(value, name))


def parse_volume(value: object, field: str = "volumes") -> Mount:
    """Read `[SOURCE:]TARGET[:OPTIONS]`; a SOURCE that starts with / is a host path."""
    if isinstance(value, (BindMount, VolumeMount, TmpfsMount)):
        return check_mount(value, field)
    if isinstance(value, tuple) and len(value) == 2:
        return _volume_pair(value[0], value[1], field)
    given = text(value, field, empty=False)
    parts = given.split(":")
    if len(parts) > 3 or "" in parts:
        raise InvalidArgument(
            f"expected [SOURCE:]TARGET[:OPTIONS], got {given!r}",
            field=field,
            hint="write a path that holds a colon with --mount",
        )
    if len(parts) == 1:
        return VolumeMount(target=absolute_path(given, f"{field}.target"))
    if len(parts) == 2 and not parts[1].startswith("/") and _is_options(parts[1]):
        raise InvalidArgument(
            f"options need a source before the target: {given!r}",
            field=field,
            hint="write NAME:TARGET:OPTIONS",
        )
    return _volume(parts[0], parts[1], parts[2] if len(parts) == 3 else "", field)


def _volume_pair(source: object, target: object, field: str) -> Mount:
    """Read one entry of a mapping: source → target, or → {"bind": target, "mode": "ro"}."""
    options = ""
    if isinstance(target, Mapping):
        unknown = set(target) - {"bind", "mode"}
        if unknown or "bind" not in target:
            raise InvalidArgument('expected {"bind": TARGET, "mode": OPTIONS}', field=field)
        options = text(target.get("mode", ""), f"{field}.mode")
        target = target["bind"]
    wanted = text(target, f"{field}.target", empty=False)
    if not options and ":" in wanted:
        wanted, _, options = wanted.partition(":")
    return _volume(text(source, f"{field}.source", empty=False), wanted, options, field)


def _is_options(given: str) -> bool:
    known = _PROPAGATIONS | _IGNORED | _COPY | {"ro", "rw"}
    return all(option in known for option in given.split(","))


def _volume(source: str, target: str, options: str, field: str) -> Mount:
    read_only, propagation, copy = _volume_options(options, field)
    target = absolute_path(target, f"{field}.target")
    if source.startswith("/"):
        if copy:
            raise InvalidArgument(f"`{copy}` is for volumes, not for a host path", field=field)
        return BindMount(
            source=absolute_path(source, f"{field}.source", root=True),
            target=target,
            read_only=read_only,
            propagation=propagation or "rprivate",
            create_source=True,
        )
    if propagation:
        raise InvalidArgument(f"`{propagation}` is for host paths, not for a volume", field=field)
    return VolumeMount(
        name=_volume_name(source, f"{field}.source"),
        target=target,
        read_only=read_only,
        copy_up=copy != "nocopy",
    )


def _volume_options(options: str, field: str) -> tuple[bool, str, str]:
    """Return (read only, propagation, copy word) from the text after the second colon."""
    access = propagation = copy = ""
    for option in options.split(",") if options else ():
        if option in ("ro", "rw") and not access:
            access = option
        elif option in _PROPAGATIONS and not propagation:
            propagation = option
        elif option in _COPY and not copy:
            copy = option
        elif option not in _IGNORED:
            raise InvalidArgument(
                f"unknown or repeated option {option!r}",
                field=field,
                hint="options are ro, rw, nocopy, z, Z and [r]private, [r]shared, [r]slave",
            )
    return access == "ro", propagation, copy


def _volume_name(name: str, field: str) -> str:
    plain = name.replace("_", "").replace(".", "").replace("-", "")
    if name.startswith((".", "~")) or os.sep in name:
        raise InvalidArgument(
            f"a relative path is not possible: {name!r}",
            field=field,
            hint="write the whole path, starting with /",
        )
    if not (name.isascii() and plain.isalnum() and name[:1].isalnum() and len(name) <= 255):
        raise InvalidArgument(f"bad volume name {name!r}", field=field, hint=_NAME_HINT)
    return name


def parse_mount(value: object, field: str = "mounts") -> Mount:
    """Read `type=bind,source=…,target=…,readonly` (the type is volume where it is not given)."""
    if isinstance(value, (BindMount, VolumeMount, TmpfsMount)):
        return check_mount(value, field)
    settings = _mount_settings(value, field)
    kind = text(settings.pop("type", "volume"), f"{field}.type")
    maker = _MAKERS.get(kind)
    if maker is None:
        raise InvalidArgument(
            f"expected bind, volume or tmpfs, got {kind!r}", field=f"{field}.type"
        )
    settings.pop("consistency", None)
    if "target" not in settings:
        raise InvalidArgument("is missing", field=f"{field}.target", hint="add target=/path")
    settings["target"] = absolute_path(settings["target"], f"{field}.target")
    mount = maker(settings, field)
    if settings:
        name = next(iter(settings))
        raise InvalidArgument(f"{name!r} is not an option of a {kind} mount", field=field)
    return mount


_ALIASES = {
    "src": "source", "dst": "target", "destination": "target", "ro": "readonly",
    "read-only": "readonly",
}  # fmt: skip


def _mount_settings(value: object, field: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    many: dict[str, list[str]] = {}
    if isinstance(value, Mapping):
        pairs = [(text(k, field).replace("_", "-"), v) for k, v in value.items()]
    else:
        pairs = []
        for part in split_csv(text(value, field, empty=False), field):
            key, equals, entry = part.strip().partition("=")
            pairs.append((key.lower(), entry if equals else "true"))
    for key, entry in pairs:
        name = _ALIASES.get(key, key)
        if name in ("volume-label", "volume-opt") and isinstance(entry, str):
            many.setdefault(name, []).append(entry)
        elif name in settings:
            raise InvalidArgument(f"{name!r} is given twice", field=field)
        else:
            settings[name] = entry
    return settings | many


def _make_bind(settings: dict[str, Any], field: str) -> Mount:
    if "source" not in settings:
        raise InvalidArgument("is missing", field=f"{field}.source", hint="add source=/host/path")
    propagation = text(settings.pop("bind-propagation", "rprivate"), f"{field}.bind-propagation")
    if propagation not in _PROPAGATIONS:
        raise InvalidArgument(
            f"expected [r]private, [r]shared or [r]slave, got {propagation!r}",
            field=f"{field}.bind-propagation",
        )
    recursive = not flag(settings.pop("bind-nonrecursive", False), f"{field}.bind-nonrecursive")
    wanted = text(settings.pop("bind-recursive", "enabled"), f"{field}.bind-recursive")
    if wanted not in ("enabled", "disabled", "writable", "readonly"):
        raise InvalidArgument(f"unknown value {wanted!r}", field=f"{field}.bind-recursive")
    return BindMount(
        source=absolute_path(settings.pop("source"), f"{field}.source", root=True),
        target=settings.pop("target"),
        read_only=flag(settings.pop("readonly", False), f"{field}.readonly"),
        recursive=recursive and wanted != "disabled",
        propagation=propagation,
        create_source=flag(settings.pop("bind-create-src", False), f"{field}.bind-create-src"),
    )


def _make_volume(settings: dict[str, Any], field: str) -> Mount:
    name = text(settings.pop("source", ""), f"{field}.source")
    subpath = text(settings.pop("volume-subpath", ""), f"{field}.volume-subpath")
    if subpath.startswith("/") or ".." in subpath.split("/"):
        raise InvalidArgument(
            f"must be relative and without .., got {subpath!r}", field=f"{field}.volume-subpath"
        )
    if subpath and not name:
        raise InvalidArgument("needs a named volume", field=f"{field}.volume-subpath")
    return VolumeMount(
        name=_volume_name(name, f"{field}.source") if name else "",
        target=settings.pop("target"),
        read_only=flag(settings.pop("readonly", False), f"{field}.readonly"),
        copy_up=not flag(settings.pop("volume-nocopy", False), f"{field}.volume-nocopy"),
        subpath=subpath,
        labels=mapping(settings.pop("volume-label", ()), f"{field}.volume-label"),
        driver=text(settings.pop("volume-driver", "local"), f"{field}.volume-driver"),
        driver_options=mapping(settings.pop("volume-opt", ()), f"{field}.volume-opt"),
    )


def _make_tmpfs(settings: dict[str, Any], field: str) -> Mount:
    if settings.pop("source", ""):
        raise InvalidArgument("a tmpfs mount has no source", field=f"{field}.source")
    size = settings.pop("tmpfs-size", None)
    mode = settings.pop("tmpfs-mode", None)
    options = ["nosuid", "nodev", "noexec"]
    if flag(settings.pop("readonly", False), f"{field}.readonly"):
        options.append("ro")
    return TmpfsMount(
        target=settings.pop("target"),
        size=None if size is None else parse_bytes(size, field=f"{field}.tmpfs-size"),
        mode=0o1777 if mode is None else _mode(mode, f"{field}.tmpfs-mode"),
        options=tuple(options),
    )


def parse_tmpfs(value: object, field: str = "tmpfs") -> Mount:
    """Read `TARGET[:OPTIONS]`; nosuid, nodev and noexec unless their opposites are given."""
    if isinstance(value, TmpfsMount):
        return check_mount(value, field)
    target, _, given = text(value, field, empty=False).partition(":")
    size: int | None = None
    mode = 0o1777
    kept: list[str] = []
    for option in given.split(",") if given else ():
        name, equals, entry = option.partition("=")
        if equals and name == "size":
            size = None if entry.endswith("%") else parse_bytes(entry, field=f"{field}.size")
            kept += [option] if entry.endswith("%") else []
        elif equals and name == "mode":
            mode = _mode(entry, f"{field}.mode")
        elif option in _TMPFS_PLAIN or (equals and entry and name in _TMPFS_VALUES):
            kept.append(option)
        else:
            raise InvalidArgument(
                f"unknown option {option!r}",
                field=field,
                hint="for example size=64m,mode=1770,exec,uid=1000",
            )
    defaults = [name for name, other in _TMPFS_OPPOSITE.items() if other not in kept]
    options = dict.fromkeys([*defaults, *kept])
    return TmpfsMount(
        target=absolute_path(target, f"{field}.target"),
        size=size,
        mode=mode,
        options=tuple(options),
    )


def _mode(value: object, field: str) -> int:
    mode = value
    if isinstance(value, str):
        digits = value.removeprefix("0o")
        octal = 0 < len(digits) <= 6 and all(c in "01234567" for c in digits)
        mode = int(digits, 8) if octal else None
    if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= 0o7777:
        raise InvalidArgument("expected octal permissions such as 1770", field=field)
    return mode


def check_mount(mount: Mount, field: str) -> Mount:
    """Check a ready-made mount by the rules that hold for a written one."""
    import msgspec

    try:
        mount = msgspec.convert(msgspec.to_builtins(mount), type(mount))
    except (msgspec.ValidationError, TypeError) as exc:
        raise InvalidArgument(str(exc), field=field) from exc
    changes: dict[str, Any] = {"target": absolute_path(mount.target, f"{field}.target")}
    if isinstance(mount, BindMount):
        changes["source"] = absolute_path(mount.source, f"{field}.source", root=True)
        if mount.propagation not in _PROPAGATIONS:
            raise InvalidArgument(
                f"unknown propagation {mount.propagation!r}", field=f"{field}.propagation"
            )
    elif isinstance(mount, VolumeMount) and mount.name:
        _volume_name(mount.name, f"{field}.name")
    elif isinstance(mount, TmpfsMount):
        _mode(mount.mode, f"{field}.mode")
    return msgspec.structs.replace(mount, **changes)


def parse_volumes_from(value: object, field: str) -> str:
    """Read `INSTANCE[:ro|rw]`."""
    given = text(value, field, empty=False)
    name, colon, mode = given.partition(":")
    if not name or (colon and mode not in ("ro", "rw", "z", "Z")):
        raise InvalidArgument(f"expected INSTANCE[:ro|rw], got {given!r}", field=field)
    return name if mode in ("", "rw", "z", "Z") else given


_Maker = Callable[[dict[str, Any], str], Mount]
_MAKERS: dict[str, _Maker] = {"bind": _make_bind, "volume": _make_volume, "tmpfs": _make_tmpfs}
_READERS: tuple[tuple[str, Callable[[object, str], Mount]], ...] = (
    ("volumes", parse_volume),
    ("mounts", parse_mount),
    ("tmpfs", parse_tmpfs),
)
