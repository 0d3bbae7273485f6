"""`RUN --mount`: what a value says, checked."""

from __future__ import annotations

import posixpath
from collections.abc import Callable

import msgspec

from hutch.dockerfile.source import SourceError
from hutch.errors import InvalidArgument

__all__ = ["RunMount", "mount_source", "parse_mount"]

_KEYS: dict[str, frozenset[str]] = {
    "bind": frozenset("target source from rw".split()),
    "cache": frozenset("target source from id ro sharing mode uid gid".split()),
    "tmpfs": frozenset("target size".split()),
    "secret": frozenset("target id required mode uid gid env".split()),
    "ssh": frozenset("target id required mode uid gid".split()),
}
_SAME = {"dst": "target", "destination": "target", "src": "source", "readonly": "ro",
         "readwrite": "rw"}  # fmt: skip
_TRUE, _FALSE = ("", "true", "1"), ("false", "0")


class RunMount(msgspec.Struct, frozen=True, kw_only=True):
    """One mount. `mode` is -1 where it is not given; `env` the variable of a secret."""

    type: str = "bind"
    target: str = ""
    source: str = ""
    from_: str = ""
    id: str = ""
    read_only: bool = False
    sharing: str = "shared"
    mode: int = -1
    uid: int = 0
    gid: int = 0
    size: int = 0
    required: bool = False
    env: str = ""


def mount_source(text: str) -> str:
    """Return the stage or image that a mount reads, "" for none: it decides what is built."""
    given = _fields(text)
    _check_kind(given.get("type", "bind"))
    found = given.get("from", "")
    if "$" in found:
        raise SourceError(
            "RUN --mount: 'from' takes no variables",
            hint="name a stage with FROM ${…} AS name, and that one here",
        )
    return found


def _check_kind(kind: str) -> None:
    if kind not in _KEYS:
        raise SourceError(
            f"RUN --mount: unknown type {kind[:40]!r}", hint=f"use one of {', '.join(_KEYS)}"
        )


def parse_mount(
    text: str, expand: Callable[[str], str], workdir: str, *, default_id: str = ""
) -> RunMount:
    """Return a mount; values are expanded but for `from`, which decides what is built.

    A relative target counts from `workdir`. `default_id` is the id of a cache that names none,
    where its target alone shall not tell.
    """
    mount_source(text)
    given = _fields(text)
    kind = given.pop("type", "bind")
    if kind == "bind" and given.pop("ro", "true") in _FALSE:
        given["rw"] = "true"
    if kind == "cache" and given.pop("rw", "true") in _FALSE:
        given["ro"] = "true"
    values = {}
    for name, value in given.items():
        if name not in _KEYS[kind]:
            raise SourceError(f"RUN --mount=type={kind}: unknown option {name[:40]!r}")
        values[name] = value if name == "from" else expand(value)
    mount = RunMount(
        type=kind,
        target=_target(kind, values, workdir),
        source=values.get("source", ""),
        from_=values.get("from", ""),
        id=values.get("id", ""),
        read_only=_boolean(values, "ro") or (kind == "bind" and not _boolean(values, "rw")),
        sharing=values.get("sharing", "shared"),
        mode=_octal(values["mode"]) if "mode" in values else -1,
        uid=_number(values, "uid"),
        gid=_number(values, "gid"),
        size=_size(values.get("size", "")),
        required=_boolean(values, "required"),
        env=values.get("env", ""),
    )
    return _completed(mount, default_id)


def _fields(text: str) -> dict[str, str]:
    import csv

    try:
        rows = list(csv.reader([text], strict=True))
    except csv.Error as error:
        raise SourceError(f"RUN --mount: {error} in {text[:60]!r}") from None
    found: dict[str, str] = {}
    for part in rows[0] if rows else []:
        name, equals, value = part.partition("=")
        name = _SAME.get(name.strip().lower(), name.strip().lower())
        if not equals and name not in ("ro", "rw", "required"):
            raise SourceError(f"RUN --mount: expected key=value, got {part[:40]!r}")
        found[name] = value
    return found


def _target(kind: str, values: dict[str, str], workdir: str) -> str:
    target = values.get("target", "")
    if not target:
        if kind in ("secret", "ssh"):
            return ""
        raise SourceError(f"RUN --mount=type={kind} needs a target")
    path = posixpath.normpath(posixpath.join(workdir or "/", target))
    path = "/" + path.lstrip("/")
    if path == "/":
        raise SourceError("RUN --mount: the target cannot be '/'")
    return path


def _completed(mount: RunMount, default_id: str) -> RunMount:
    replace = msgspec.structs.replace
    if mount.type == "cache":
        if mount.sharing not in ("shared", "private", "locked"):
            raise SourceError(
                f"RUN --mount: sharing is shared, private or locked, not {mount.sharing[:40]!r}"
            )
        return replace(mount, id=mount.id or default_id or mount.target)
    if mount.type == "secret":
        name = mount.id or posixpath.basename(mount.target)
        if not name:
            raise SourceError("RUN --mount=type=secret needs an id or a target")
        target = mount.target or ("" if mount.env else f"/run/secrets/{name}")
        return replace(mount, id=name, target=target)
    if mount.type == "ssh":
        return replace(mount, id=mount.id or "default")
    return mount


def _boolean(values: dict[str, str], name: str) -> bool:
    value = values.get(name, "false").lower()
    if value not in (*_TRUE, *_FALSE):
        raise SourceError(f"RUN --mount: {name} is true or false, not {value[:40]!r}")
    return value in _TRUE


def _octal(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise SourceError(f"RUN --mount: mode is octal, such as 0400, not {text[:20]!r}")
    return mode


def _number(values: dict[str, str], name: str) -> int:
    text = values.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 11 and int(text) < 2**32 - 1):
        raise SourceError(f"RUN --mount: {name} is a number, not {text[:20]!r}")
    return int(text)


def _size(text: str) -> int:
    from hutch.units import parse_bytes

    if not text:
        return 0
    try:
        return parse_bytes(text, field="RUN --mount: size")
    except InvalidArgument as error:
        raise SourceError(error.message, hint=error.hint) from None
