"""Encode a launch plan into the bytes that the native launcher reads.

The format is documented in docs/reference/launch-plan.md. It is little endian and flat;
every string and list carries its length, and the reader in `native/wire.c` checks each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from struct import Struct
from struct import error as StructError
from typing import Any

import msgspec

from hutch.errors import InvalidArgument
from hutch.plan import ops

__all__ = ["CODES", "MAX_PLAN_BYTES", "MAX_SLOTS", "encode", "encode_fields", "encode_ops"]
__all__ += ["MAX_REST_BYTES", "encode_rest"]

MAX_PLAN_BYTES = 4 << 20
MAX_SLOTS = 64
MAX_REST_BYTES = (64 << 10) - 4
MAGIC = b"HPL1"

# One entry per operation: its number and the kinds of its fields, in the order in which
# the Struct declares them. u: u32, i: i32, q: u64, s: string, b: bytes, S/B: list of
# those, U: list of u32, M: list of id map lines (three u32). native/wire.c has the same.
CODES: dict[type[ops.Op], tuple[int, str]] = {
    ops.CgroupJoin: (1, "S"),
    ops.Unshare: (2, "q"),
    ops.Setns: (3, "iq"),
    ops.Fork: (4, ""),
    ops.Sync: (5, "u"),
    ops.IdMap: (6, "MM"),
    ops.Propagation: (7, "sq"),
    ops.Overlay: (8, "iSssSq"),
    ops.OpenTree: (9, "isiuqiq"),
    ops.MoveMount: (10, "iss"),
    ops.RootDir: (11, "su"),
    ops.Mount: (12, "sssSqu"),
    ops.Remount: (13, "sqquq"),
    ops.Mkdir: (14, "suuu"),
    ops.Mknod: (15, "suuuuus"),
    ops.Symlink: (16, "ss"),
    ops.WriteFile: (17, "sbuu"),
    ops.Mask: (18, "S"),
    ops.ReadOnly: (19, "S"),
    ops.PivotRoot: (20, ""),
    ops.Hostname: (21, "ss"),
    ops.Sysctl: (22, "ss"),
    ops.LinkUp: (23, "s"),
    ops.Netlink: (24, "BU"),
    ops.SetsidTty: (25, "uuuu"),
    ops.Rlimit: (26, "uqqu"),
    ops.Scheduler: (27, "iu"),
    ops.Capabilities: (28, "qqqqq"),
    ops.User: (29, "uuUu"),
    ops.Umask: (30, "u"),
    ops.NoNewPrivs: (31, ""),
    ops.Seccomp: (32, "bu"),
    ops.Chdir: (33, "suuu"),
    ops.CloseRange: (34, "u"),
    ops.Exec: (35, "SSus"),
    ops.Inherit: (36, "U"),
    ops.Rest: (37, "u"),
    ops.Attach: (38, "is"),
    ops.Restore: (39, "SSsbi"),
}

_U32 = Struct("<I").pack
_OP = Struct("<HHI").pack
_HEAD = Struct("<4sIQiIII").pack
_SUPERVISION = Struct("<IiQI").pack
_HEALTH = Struct("<QQQQI").pack
_LINE = Struct("<III").pack

_STDIN_OPEN, _STDIN_ONCE, _TTY, _LINGER, _EXIT_ALWAYS, _HEALTH_SET, _OOM_SET = (
    1 << n for n in range(7)
)


def _bytes(value: bytes) -> bytes:
    return _U32(len(value)) + value


def _string(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    if b"\0" in raw:
        raise InvalidArgument(f"a string of the plan has a NUL byte: {value!r}")
    return b"%b%b\0" % (_U32(len(raw)), raw)


def _strings(values: Sequence[str]) -> bytes:
    parts = [_U32(len(values))]
    parts += [_string(value) for value in values]
    return b"".join(parts)


def _blobs(values: Sequence[bytes]) -> bytes:
    return _U32(len(values)) + b"".join([_bytes(value) for value in values])


def _numbers(values: Sequence[int]) -> bytes:
    return _U32(len(values)) + b"".join([_U32(value) for value in values])


def _lines(values: Sequence[ops.Idmap]) -> bytes:
    return _U32(len(values)) + b"".join(
        [_LINE(line.inside, line.outside, line.size) for line in values]
    )


_Field = Callable[[Any], bytes]
_FIELDS: dict[str, _Field] = {
    "u": _U32,
    "i": Struct("<i").pack,
    "q": Struct("<Q").pack,
    "s": _string,
    "b": _bytes,
    "S": _strings,
    "B": _blobs,
    "U": _numbers,
    "M": _lines,
}
_ENCODERS: dict[type, tuple[int, tuple[_Field, ...]]] = {
    kind: (code, tuple(_FIELDS[letter] for letter in letters))
    for kind, (code, letters) in CODES.items()
}


def encode_fields(kinds: str, values: Sequence[Any]) -> bytes:
    """Return `values` as fields of these kinds; raise `InvalidArgument` for one that does
    not fit."""
    try:
        return b"".join([_FIELDS[kind](value) for kind, value in zip(kinds, values, strict=True)])
    except (StructError, OverflowError, ValueError) as exc:
        raise InvalidArgument(f"a value does not fit its field: {exc}") from exc


def encode_ops(items: Sequence[tuple[int, str, Sequence[Any]]]) -> bytes:
    """Return operations given as number, kinds of the fields, and values, one after another."""
    out: list[bytes] = []
    for code, kinds, values in items:
        body = encode_fields(kinds, values)
        out += [_OP(code, 0, len(body)), body]
    return b"".join(out)


def _encoded(op: ops.AnyOp) -> bytes:
    code, fields = _ENCODERS[type(op)]
    values = zip(fields, msgspec.structs.astuple(op), strict=True)
    body = b"".join([field(value) for field, value in values])
    return _OP(code, 0, len(body)) + body


# Most operations of a plan are those of the plan before. An environment and the content of a
# file may be secrets: they are not kept.
_as_before = lru_cache(maxsize=512)(_encoded)
_KEPT = {kind for kind, (_, letters) in CODES.items() if not set("bB") & set(letters)}
_KEPT = _KEPT - {ops.Exec} | {ops.Seccomp}


def _section(operations: Sequence[ops.AnyOp], out: list[bytes]) -> None:
    out += [_as_before(op) if type(op) in _KEPT else _encoded(op) for op in operations]


def _supervision(held: ops.Supervision, out: list[bytes]) -> None:
    flags = (
        held.stdin_open * _STDIN_OPEN
        | held.stdin_once * _STDIN_ONCE
        | held.tty * _TTY
        | held.linger * _LINGER
        | held.exit_command_always * _EXIT_ALWAYS
        | (held.health is not None) * _HEALTH_SET
        | (held.oom_score_adj is not None) * _OOM_SET
    )
    out.append(_SUPERVISION(flags, held.oom_score_adj or 0, held.log_max_bytes, held.log_max_files))
    out += [_string(held.directory), _string(held.log_path), _string(held.name)]
    out.append(_strings(held.exit_command))
    probe = held.health
    if probe is not None:
        start = probe.start_interval_s or probe.interval_s
        seconds = (probe.interval_s, probe.timeout_s, probe.start_period_s, start)
        times = [int(s * 1e9) for s in seconds]
        out += [_HEALTH(*times, probe.retries), _bytes(probe.plan)]


def encode(plan: ops.Plan) -> bytes:
    """Return the plan's bytes.

    Raise `InvalidArgument` for a value that the format cannot carry: a NUL in a string,
    a number out of its field's range, more than `MAX_PLAN_BYTES` in all.
    """
    if not 0 <= plan.slots <= MAX_SLOTS:
        raise InvalidArgument(f"a plan has at most {MAX_SLOTS} slots, got {plan.slots}")
    out: list[bytes] = [b""]
    try:
        _supervision(plan.supervision, out)
        _section(plan.prepare, out)
        _section(plan.child, out)
        size = sum(map(len, out)) + 32
        if size > MAX_PLAN_BYTES:
            raise InvalidArgument(f"the plan is too large: {size} bytes of {MAX_PLAN_BYTES}")
        counts = len(plan.prepare), len(plan.child)
        out[0] = _HEAD(MAGIC, size, plan.clone_flags, plan.cgroup_slot, plan.slots, *counts)
    except (StructError, OverflowError, ValueError) as exc:
        raise InvalidArgument(f"a value of the plan does not fit its field: {exc}") from exc
    return b"".join(out)


def encode_rest(operations: Sequence[ops.AnyOp]) -> bytes:
    """Return what a launch that waits in `Rest` is to be sent behind the number; raise
    `InvalidArgument` for what does not fit into one frame."""
    out = [_U32(len(operations))]
    try:
        _section(operations, out)
    except (StructError, OverflowError, ValueError) as exc:
        raise InvalidArgument(f"a value of the plan does not fit its field: {exc}") from exc
    encoded = b"".join(out)
    if len(encoded) > MAX_REST_BYTES:
        raise InvalidArgument(f"the plan is too large: {len(encoded)} bytes of {MAX_REST_BYTES}")
    return encoded
