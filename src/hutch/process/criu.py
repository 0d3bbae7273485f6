"""Talk to CRIU's worker (`criu swrk`): the few messages of its protocol that are needed here.

The protocol is protobuf (images/rpc.proto of CRIU). Requests are made of numbered fields that
are numbers, texts or groups; of responses only the outcome is read, and every step is agreed to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from hutch.linux.capabilities import own_sets

__all__ = ["CriuAnswer", "Field", "call_criu", "criu_environment", "decode_fields"]
__all__ += ["dump_request", "restore_request"]

Field = tuple[int, "int | bool | str | bytes"]

_TYPE, _OPTS, _NOTIFY_SUCCESS = 1, 2, 3
_DUMP, _RESTORE, _NOTIFY = 1, 2, 6
_SUCCESS, _ERRNO, _MESSAGE = 2, 7, 9
_RECEIVE = 64 << 10
_CAP_SYS_RESOURCE = 24

# Numbers of criu_opts.
IMAGES_DIR_FD, PID, LEAVE_RUNNING, EXT_UNIX_SK, FILE_LOCKS = 1, 2, 3, 4, 8
LOG_LEVEL, LOG_FILE, NOTIFY_SCRIPTS, ROOT, WORK_DIR_FD = 9, 10, 12, 13, 17
RST_SIBLING, INHERIT_FD, EXT_MASTERS, MANAGE_CGROUPS_MODE = 26, 27, 30, 34
GHOST_LIMIT, EXTERNAL, FREEZE_CGROUP, TIMEOUT, SKIP_IN_FLIGHT = 35, 37, 44, 45, 46
ORPHAN_PTS_MASTER, TCP_CLOSE, NETWORK_LOCK, IMAGES_DIR = 50, 52, 64, 68
_IGNORE_CGROUPS = 0
_NO_LOCK = 3
_ERRORS_ONLY = 1


class CriuAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How a request ended; `message` is CRIU's, "" where it gave none."""

    success: bool
    errno: int = 0
    message: str = ""


def dump_request(
    *,
    pid: int,
    images: str,
    log: str,
    externals: Sequence[str],
    freezer: str,
    terminal: bool,
    timeout_s: int,
    ghost_limit: int,
) -> bytes:
    """Return the request to save the tree of `pid` into the directory `images`; it goes on,
    frozen if it was. `terminal`: its terminal's other side is ours."""
    opts: list[Field] = [
        *_common(images, log, terminal),
        (PID, pid),
        (LEAVE_RUNNING, True),
        (GHOST_LIMIT, ghost_limit),
        (FREEZE_CGROUP, freezer),
        (TIMEOUT, timeout_s),
        (SKIP_IN_FLIGHT, True),
        *((EXTERNAL, external) for external in externals),
    ]
    return _request(_DUMP, opts)


def restore_request(
    *,
    images: str,
    log: str,
    work_fd: int,
    root: str,
    externals: Sequence[str],
    inherited: Mapping[str, int],
    terminal: bool,
) -> bytes:
    """Return the request to bring a tree back, as a sibling of CRIU."""
    opts: list[Field] = [
        *_common(images, log, terminal),
        (WORK_DIR_FD, work_fd),
        (NOTIFY_SCRIPTS, True),
        (ROOT, root),
        (RST_SIBLING, True),
        *((EXTERNAL, external) for external in externals),
        *((INHERIT_FD, encode_fields([(1, key), (2, fd)])) for key, fd in inherited.items()),
    ]
    return _request(_RESTORE, opts)


def _common(images: str, log: str, terminal: bool) -> Iterator[Field]:
    yield IMAGES_DIR_FD, -1
    yield IMAGES_DIR, images
    yield LOG_LEVEL, _ERRORS_ONLY
    yield LOG_FILE, log
    yield EXT_UNIX_SK, True
    yield FILE_LOCKS, True
    yield EXT_MASTERS, True
    yield MANAGE_CGROUPS_MODE, _IGNORE_CGROUPS
    # Connections are closed in what goes on: two would answer to one peer otherwise.
    yield TCP_CLOSE, True
    yield NETWORK_LOCK, _NO_LOCK
    if terminal:
        yield ORPHAN_PTS_MASTER, True


def _request(kind: int, opts: Sequence[Field]) -> bytes:
    return encode_fields([(_TYPE, kind), (_OPTS, encode_fields(opts))])


def encode_fields(fields: Sequence[Field]) -> bytes:
    """Return protobuf fields as bytes."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value & (1 << 64) - 1)
            continue
        raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        out += _varint(number << 3 | 2) + _varint(len(raw)) + raw
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_fields(data: bytes) -> dict[int, int | bytes]:
    """Return the fields of a message, the last of each number; raise ValueError for bytes that
    are none."""
    found: dict[int, int | bytes] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("a number is cut short")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        value = varint()
        if key & 7 == 0:
            found[key >> 3] = value
        elif key & 7 == 2 and value <= len(data) - at:
            found[key >> 3] = data[at : at + value]
            at += value
        else:
            raise ValueError(f"field {key >> 3} of an unknown kind")
    return found


def criu_environment() -> dict[str, str]:
    """Return the variables for CRIU: what it finds its helpers by, and where this process lacks
    CAP_SYS_RESOURCE what tells it the limits of other users' processes."""
    variables = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C",
    }
    if not own_sets().effective >> _CAP_SYS_RESOURCE & 1:
        package = os.path.dirname(os.path.dirname(__file__))
        variables["LD_PRELOAD"] = os.path.join(package, "_native", "hutch-limits.so")
    return variables


def call_criu(
    argv: Sequence[str], request: bytes, *, env: Mapping[str, str], lock: int = -1
) -> CriuAnswer:
    """Run `argv` with CRIU's arguments for a worker and see a request through.

    It is in a session of its own, so that Ctrl-C does not end it in the middle, and goes on to
    its end when its caller is killed: for so long it holds the descriptor `lock`. Blocks as
    long as CRIU does, which has time limits.
    """
    import socket
    import subprocess

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            number = theirs.fileno()
            process = subprocess.Popen(
                [*argv, "swrk", str(number)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=dict(env),
                pass_fds=[number, *([lock] if lock >= 0 else [])],
                start_new_session=True,
            )
        try:
            return _converse(ours, request)
        finally:
            ours.close()
            process.wait()


def _converse(link: object, request: bytes) -> CriuAnswer:
    import socket

    assert isinstance(link, socket.socket)
    try:
        link.send(request)
        while True:
            data = link.recv(_RECEIVE)
            if not data:
                return CriuAnswer(success=False, message="it ended without an answer")
            fields = decode_fields(data)
            if fields.get(_TYPE) != _NOTIFY:
                break
            link.send(encode_fields([(_TYPE, _NOTIFY), (_NOTIFY_SUCCESS, True)]))
    except (OSError, ValueError) as exc:
        return CriuAnswer(success=False, message=str(exc))
    message, number = fields.get(_MESSAGE, b""), fields.get(_ERRNO, 0)
    return CriuAnswer(
        success=fields.get(_SUCCESS) == 1,
        errno=number if isinstance(number, int) else 0,
        message=message.decode(errors="replace") if isinstance(message, bytes) else "",
    )
