"""System call filter profiles: Docker's JSON format (and the OCI's), checked and made flat."""

from __future__ import annotations

import re

import msgspec

from hutch.decoding import decode_json
from hutch.errors import InvalidArgument, Unsupported

__all__ = ["ACTIONS", "COMPARISONS", "Argument", "Profile", "Rule", "parse_profile"]

ACTIONS: dict[str, int] = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
COMPARISONS: dict[str, int] = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
_FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 0,  # the launcher has one thread
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 0,  # only with a listener
}
_ARCHITECTURE = re.compile(r"SCMP_ARCH_[A-Z0-9_]+")
_KERNEL = re.compile(r"(\d+)\.(\d+)")
_MAX_BYTES = 4 << 20
_MAX_ERRNO = 4095


class Argument(msgspec.Struct, frozen=True, kw_only=True):
    """A condition on one argument; `value_two` only for SCMP_CMP_MASKED_EQ, where `value`
    is the mask and `value_two` what is left under it."""

    index: int
    value: int
    value_two: int = 0
    op: str


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """An action for some calls, and when the rule counts at all.

    It counts when the instance has every one of `include_caps` and none of
    `exclude_caps`, likewise for architectures (one of them), and from `min_kernel` on.
    """

    names: tuple[str, ...]
    action: str
    errno_ret: int | None = None
    args: tuple[Argument, ...] = ()
    include_caps: tuple[str, ...] = ()
    exclude_caps: tuple[str, ...] = ()
    include_arches: tuple[str, ...] = ()
    exclude_arches: tuple[str, ...] = ()
    min_kernel: tuple[int, int] | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A whole profile. `architectures` maps a native one to those filtered beside it;
    None stands for the usual ones of the machine. `flags` are SECCOMP_FILTER_FLAG_*."""

    default_action: str
    default_errno: int | None = None
    architectures: dict[str, tuple[str, ...]] | None = None
    rules: tuple[Rule, ...] = ()
    flags: int = 0


class _Arg(msgspec.Struct):
    index: int
    value: int
    op: str
    valueTwo: int = 0


class _Filter(msgspec.Struct):
    caps: list[str] | None = None
    arches: list[str] | None = None
    minKernel: str | None = None


class _Syscall(msgspec.Struct):
    action: str
    names: list[str] | None = None
    name: str | None = None
    errnoRet: int | None = None
    errno: str | None = None
    args: list[_Arg] | None = None
    includes: _Filter | None = None
    excludes: _Filter | None = None


class _Arch(msgspec.Struct):
    architecture: str
    subArchitectures: list[str] | None = None


class _Document(msgspec.Struct):
    defaultAction: str
    defaultErrnoRet: int | None = None
    archMap: list[_Arch] | None = None
    architectures: list[str] | None = None
    syscalls: list[_Syscall] | None = None
    flags: list[str] | None = None
    listenerPath: str | None = None


def parse_profile(text: bytes | str, *, field: str = "seccomp") -> Profile:
    """Return a profile from JSON; `InvalidArgument` names the place in the document."""
    if len(text) > _MAX_BYTES:
        raise InvalidArgument(f"profile is larger than {_MAX_BYTES} bytes", field=field)
    try:
        document = decode_json(text, _Document)
    except msgspec.ValidationError as exc:
        message, _, where = str(exc).partition(" - at `$")
        path = field + where.rstrip("`")
        raise InvalidArgument(_lower_first(message), field=path) from None
    except msgspec.DecodeError as exc:
        raise InvalidArgument(f"not JSON: {_lower_first(str(exc))}", field=field) from None
    return _profile(document, field)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _profile(document: _Document, field: str) -> Profile:
    _check_action(document.defaultAction, f"{field}.defaultAction")
    _check_errno(document.defaultErrnoRet, f"{field}.defaultErrnoRet")
    if document.listenerPath:
        raise Unsupported(f"{field}.listenerPath: notification of a listener is not supported")
    flags = 0
    for index, name in enumerate(document.flags or ()):
        if name not in _FLAGS:
            raise InvalidArgument(f"unknown flag {name!r}", field=f"{field}.flags[{index}]")
        flags |= _FLAGS[name]
    return Profile(
        default_action=document.defaultAction,
        default_errno=document.defaultErrnoRet,
        architectures=_architectures(document, field),
        rules=tuple(
            _rule(entry, f"{field}.syscalls[{index}]")
            for index, entry in enumerate(document.syscalls or ())
        ),
        flags=flags,
    )


def _architectures(document: _Document, field: str) -> dict[str, tuple[str, ...]] | None:
    if document.architectures and document.archMap:
        raise InvalidArgument("cannot be combined with archMap", field=f"{field}.architectures")
    if document.architectures:
        names = document.architectures
        for index, name in enumerate(names):
            _check_architecture(name, f"{field}.architectures[{index}]")
        return {name: tuple(other for other in names if other != name) for name in names}
    if not document.archMap:
        return None
    result: dict[str, tuple[str, ...]] = {}
    for index, entry in enumerate(document.archMap):
        where = f"{field}.archMap[{index}]"
        _check_architecture(entry.architecture, f"{where}.architecture")
        for position, name in enumerate(entry.subArchitectures or ()):
            _check_architecture(name, f"{where}.subArchitectures[{position}]")
        result[entry.architecture] = tuple(entry.subArchitectures or ())
    return result


def _check_architecture(name: str, field: str) -> None:
    if not _ARCHITECTURE.fullmatch(name):
        raise InvalidArgument(f"unknown architecture {name!r}", field=field)


def _check_action(name: str, field: str) -> None:
    if name == "SCMP_ACT_NOTIFY":
        raise Unsupported(f"{field}: notification of a listener is not supported")
    if name not in ACTIONS:
        raise InvalidArgument(
            f"unknown action {name!r}", field=field, hint="one of " + ", ".join(ACTIONS)
        )


def _check_errno(number: int | None, field: str) -> None:
    if number is not None and not 0 <= number <= _MAX_ERRNO:
        raise InvalidArgument(f"must be from 0 to {_MAX_ERRNO}, got {number}", field=field)


def _rule(entry: _Syscall, field: str) -> Rule:
    if entry.name and entry.names:
        raise InvalidArgument("cannot be combined with names", field=f"{field}.name")
    names = [entry.name] if entry.name else entry.names or []
    if not names:
        raise InvalidArgument("must not be empty", field=f"{field}.names")
    _check_action(entry.action, f"{field}.action")
    _check_errno(entry.errnoRet, f"{field}.errnoRet")
    includes, excludes = entry.includes or _Filter(), entry.excludes or _Filter()
    if excludes.minKernel:
        raise InvalidArgument("only possible in includes", field=f"{field}.excludes.minKernel")
    return Rule(
        names=tuple(names),
        action=entry.action,
        errno_ret=entry.errnoRet,
        args=tuple(
            _argument(argument, f"{field}.args[{index}]")
            for index, argument in enumerate(entry.args or ())
        ),
        include_caps=tuple(includes.caps or ()),
        exclude_caps=tuple(excludes.caps or ()),
        include_arches=tuple(includes.arches or ()),
        exclude_arches=tuple(excludes.arches or ()),
        min_kernel=_kernel(includes.minKernel, f"{field}.includes.minKernel"),
    )


def _argument(entry: _Arg, field: str) -> Argument:
    if not 0 <= entry.index <= 5:
        raise InvalidArgument(f"must be from 0 to 5, got {entry.index}", field=f"{field}.index")
    for name, value in (("value", entry.value), ("valueTwo", entry.valueTwo)):
        if not 0 <= value < 1 << 64:
            raise InvalidArgument(f"out of range: {value}", field=f"{field}.{name}")
    if entry.op not in COMPARISONS:
        raise InvalidArgument(
            f"unknown comparison {entry.op!r}",
            field=f"{field}.op",
            hint="one of " + ", ".join(COMPARISONS),
        )
    return Argument(index=entry.index, value=entry.value, value_two=entry.valueTwo, op=entry.op)


def _kernel(text: str | None, field: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = _KERNEL.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"expected a version such as 4.8, got {text!r}", field=field)
    return int(match[1]), int(match[2])
