"""How this root gives out what the host has: `resources.json` in the root.

Without the file nothing is refused, kept for the host, or taken back: an instance has what the
kernel lets it have, as with Docker.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from hutch.decoding import decode_json
from hutch.errors import InvalidArgument

__all__ = ["FILE", "RUNGS", "Overcommit", "Reserved", "Settings", "Watermarks"]
__all__ += ["load_settings", "save_settings", "with_values"]

FILE = "resources.json"
Rung = Literal["balloon", "merge", "cache", "swap", "hold", "freeze", "suspend", "kill"]
RUNGS: tuple[Rung, ...] = get_args(Rung)
_MAX_FILE = 1 << 20
_LEAST_PIECE = 2 << 20


class Reserved(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept for the host: processors, and bytes of memory and of the root's disk."""

    cpus: float = 0.0
    memory: int = 0
    disk: int = 0


class Overcommit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many times over each is given out. None: without a limit, or, where something is
    reserved for the host, once."""

    cpus: float | None = None
    memory: float | None = None
    disk: float | None = None


class Watermarks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When memory is taken back: shares of all memory that are available, and stalls in percent
    of time over ten seconds (PSI). Reclaim starts below `low`, goes on until `high`, and may
    hurt (kill) below `critical`."""

    high: float = 0.15
    low: float = 0.10
    critical: float = 0.05
    stall_some: float = 20.0
    stall_full: float = 5.0


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole. `memory` bounds what all instances have together (0: all there is), and the
    control group above theirs, `parent`, is held to it unless it is the usual one, which all
    roots share. `cpu_policy` static gives
    whole processors to every instance that asks for whole ones and bounds its memory, as the
    kubelet does. `ladder` are the rungs that reclaim may take, in that order. `idle_s` is how
    long an instance must do next to nothing to be called idle. `cdi` are the directories of
    the files that describe devices. `memory_pool` is memory made ahead for machines: how many
    pieces, by their size in bytes."""

    reserved: Reserved = Reserved()
    overcommit: Overcommit = Overcommit()
    cpu_policy: Literal["shared", "static"] = "shared"
    fit: Literal["first", "best", "worst", "pack", "spread"] = "pack"
    parent: str = "hutch"
    memory: int = 0
    watermarks: Watermarks = Watermarks()
    ladder: tuple[Rung, ...] = ("balloon", "cache", "swap")
    idle_s: float = 60.0
    cdi: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    memory_pool: dict[int, int] = {}

    @property
    def limits_memory(self) -> bool:
        """Tell whether memory is given out up to a limit."""
        set_ = self.reserved.memory or self.memory
        return bool(set_) or self.overcommit.memory is not None

    @property
    def limits_cpus(self) -> bool:
        """Tell whether processor time is given out up to a limit."""
        return bool(self.reserved.cpus) or self.overcommit.cpus is not None

    @property
    def limits_disk(self) -> bool:
        """Tell whether disk space is given out up to a limit."""
        return bool(self.reserved.disk) or self.overcommit.disk is not None

    @property
    def admits(self) -> bool:
        """Tell whether anything is given out up to a limit, so that starts may be refused."""
        return self.limits_memory or self.limits_cpus or self.limits_disk


def load_settings(root: Path) -> Settings:
    """Return the settings of a root; the defaults where it has no file of them."""
    path = f"{root}/{FILE}"
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
    except FileNotFoundError:
        return Settings()
    if len(data) > _MAX_FILE:
        raise InvalidArgument(f"larger than {_MAX_FILE} bytes", field=path)
    try:
        return _checked(decode_json(data, Settings))
    except (msgspec.MsgspecError, InvalidArgument) as exc:
        hint = "correct the file, or remove it"
        raise InvalidArgument(str(exc), field=path, hint=hint) from exc


def save_settings(root: Path, settings: Settings) -> None:
    """Write the settings; readers see the old file or the new one."""
    data = msgspec.json.format(msgspec.json.encode(_checked(settings)), indent=4)
    partial = root / f".{FILE}.{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            file.write(data + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, root / FILE)
    finally:
        partial.unlink(missing_ok=True)


def with_values(settings: Settings, values: dict[str, str]) -> Settings:
    """Return the settings with some changed: `{"reserved.memory": "2G", "ladder": "cache"}`.

    `none` (and an empty text) puts a value back to its default.
    """
    plain: dict[str, Any] = msgspec.to_builtins(settings)
    for name, text in values.items():
        _assign(plain, name, text)
    try:
        return _checked(msgspec.convert(plain, Settings))
    except msgspec.ValidationError as exc:
        message, _, where = str(exc).partition(" - at `$.")
        field = where.rstrip("`") or next(iter(values), "settings")
        hint = f"some of {', '.join(RUNGS)}" if field.startswith("ladder") else None
        if choices := _choices(field):
            message = f"expected one of {', '.join(choices)}"
        raise InvalidArgument(message[:1].lower() + message[1:], field=field, hint=hint) from exc


def _choices(field: str) -> tuple[str, ...]:
    """Return what a setting may be; nothing where it is not one of a few words."""
    kind = get_type_hints(Settings).get(field)
    return get_args(kind) if get_origin(kind) is Literal else ()


def _assign(plain: dict[str, Any], name: str, text: str) -> None:
    from hutch.units import parse_bytes, parse_duration

    if name == "memory_pool":
        plain[name] = _pieces(text)
        return
    place, _, last = name.rpartition(".")
    target = plain.get(place) if place else plain
    if not isinstance(target, dict) or last not in target or isinstance(target[last], dict):
        known = sorted(_names(msgspec.to_builtins(Settings())))
        raise InvalidArgument("no such setting", field=name, hint=f"one of {', '.join(known)}")
    if text in ("", "none"):
        del target[last]
    elif last in ("memory", "disk") and place != "overcommit":
        target[last] = parse_bytes(text, field=name)
    elif last == "idle_s":
        target[last] = parse_duration(text, field=name)
    elif last in ("ladder", "cdi"):
        target[last] = [part.strip() for part in text.split(",") if part.strip()]
    elif last in ("cpu_policy", "fit", "parent"):
        target[last] = text
    else:
        try:
            target[last] = float(text)
        except ValueError:
            raise InvalidArgument(f"expected a number, got {text[:40]!r}", field=name) from None


def _pieces(text: str) -> dict[int, int]:
    """Read `512M:4,1G:2`."""
    from hutch.units import parse_bytes

    found: dict[int, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        size, colon, count = part.rpartition(":")
        if part == "none":
            continue
        if not colon or not count.isdecimal():
            raise InvalidArgument(
                f"expected SIZE:COUNT, got {part[:40]!r}", field="memory_pool", hint="as 512M:4"
            )
        found[parse_bytes(size, field="memory_pool")] = int(count)
    return {size: count for size, count in found.items() if count}


def _names(plain: dict[str, Any]) -> list[str]:
    found = []
    for name, value in plain.items():
        inner = isinstance(value, dict) and name != "memory_pool"
        found += [f"{name}.{key}" for key in value] if inner else [name]
    return found


def _checked(settings: Settings) -> Settings:
    """Return settings whose numbers go together; raise naming the one that does not."""
    for name, value in (
        ("reserved.cpus", settings.reserved.cpus),
        ("reserved.memory", settings.reserved.memory),
        ("reserved.disk", settings.reserved.disk),
        ("memory", settings.memory),
        ("idle_s", settings.idle_s),
    ):
        if not 0 <= value < 1 << 63:
            raise InvalidArgument(f"must not be negative, got {value}", field=name)
    for name in ("cpus", "memory", "disk"):
        ratio = getattr(settings.overcommit, name)
        if ratio is not None and not 0 < ratio <= 1000:
            raise InvalidArgument(f"must be above 0, got {ratio:g}", field=f"overcommit.{name}")
    for size, count in settings.memory_pool.items():
        if size < _LEAST_PIECE or size % _LEAST_PIECE or not 0 < count <= 1024:
            raise InvalidArgument(
                f"expected up to 1024 pieces of whole 2 MiB, got {count} of {size} bytes",
                field="memory_pool",
            )
    marks = settings.watermarks
    if not 0 <= marks.critical <= marks.low <= marks.high < 1:
        raise InvalidArgument(
            "must be shares with critical <= low <= high", field="watermarks", hint="as 0.05"
        )
    parts = settings.parent.split("/")
    if not all(p and p.replace("-", "").replace("_", "").isalnum() and p.isascii() for p in parts):
        raise InvalidArgument(
            f"expected names with / between them, got {settings.parent[:80]!r}", field="parent"
        )
    if not all(directory.startswith("/") for directory in settings.cdi):
        raise InvalidArgument("must be whole paths", field="cdi")
    if len(set(settings.ladder)) < len(settings.ladder):
        raise InvalidArgument("names a rung twice", field="ladder")
    return settings
