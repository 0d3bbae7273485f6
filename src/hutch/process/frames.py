"""The frames between a supervisor and its clients, and what they mean in Python.

The format is documented in docs/reference/supervisor.md; native/supervisor.h has the
same numbers.
"""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
import struct

import msgspec

from hutch.errors import InternalError
from hutch.process.errors import SECTIONS, LaunchFailed

__all__ = [
    "Acked",
    "Answer",
    "Event",
    "ExitStatus",
    "Gap",
    "Health",
    "Output",
    "Pid",
    "Started",
    "State",
    "Synced",
    "decode_frame",
    "encode_frame",
]

GO, ATTACH, STDIN, STDIN_EOF, RESIZE, SIGNAL, WAIT, QUERY, LOG_REOPEN = range(1, 10)
SHUTDOWN, DETACH, PLAN = range(10, 13)
PID, SYNC, STARTED, FAILED, OUTPUT, GAP, EXIT, STATE, HEALTH, OK, ERR, ACK = range(65, 77)

ATTACH_STDIN, ATTACH_STDOUT, ATTACH_STDERR, ATTACH_LOSSLESS = 1, 2, 4, 8
QUERY_LOGGED = 1

FRAME_HEAD = 8
FRAME_MAX = 64 << 10

_HEAD = struct.Struct("<BBHI")
_EXIT = struct.Struct("<iiQQ")
_STATE = struct.Struct("<IiiIQQ")
_PID = struct.Struct("<ii")
_FAILED = struct.Struct("<Ii")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class ExitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the process ended: `code` is 128 + `signal` for one that a signal killed."""

    code: int
    signal: int = 0
    time_ns: int = 0
    started_ns: int = 0
    core: bool = False


class Output(msgspec.Struct, frozen=True):
    """Bytes that the process wrote; `stream` is 1 for stdout (or the terminal), 2 for stderr."""

    stream: int
    data: bytes


class Gap(msgspec.Struct, frozen=True):
    """So many bytes of output were not delivered to this client: it read too slowly."""

    lost: int


class Pid(msgspec.Struct, frozen=True):
    """The process exists (or has become another one, by `Fork`)."""

    pid: int
    supervisor: int


class Synced(msgspec.Struct, frozen=True):
    """The launch waits in `Sync(number)`."""

    number: int


class Started(msgspec.Struct, frozen=True):
    """The program runs."""

    time_ns: int


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a query; `phase` is launching, running, draining or done."""

    phase: str
    pid: int
    supervisor: int
    started_ns: int
    exit_ns: int


class Health(msgspec.Struct, frozen=True):
    """The health probe changed its mind: starting, healthy or unhealthy."""

    status: str


class Acked(msgspec.Struct, frozen=True):
    """The process took so many bytes of this client's input."""

    count: int


class Answer(msgspec.Struct, frozen=True):
    """The answer to a request: `errno` is 0 when it was done."""

    request: int
    errno: int


Event = (
    Output
    | Gap
    | Pid
    | Synced
    | Started
    | State
    | Health
    | Acked
    | Answer
    | ExitStatus
    | LaunchFailed
)

_PHASES = ("launching", "running", "draining", "done")


def encode_frame(kind: int, payload: bytes = b"", flag: int = 0) -> bytes:
    """Return one frame's bytes."""
    return _HEAD.pack(kind, flag, 0, len(payload)) + payload


def parse_head(head: bytes | bytearray | memoryview, at: int = 0) -> tuple[int, int, int]:
    """Return (type, flag, payload length) of the frame head at `at`."""
    kind, flag, _, length = _HEAD.unpack_from(head, at)
    if length > FRAME_MAX:
        raise InternalError(f"the supervisor sent a frame of {length} bytes")
    return kind, flag, length


def decode_frame(kind: int, flag: int, payload: bytes) -> Event:
    """Return what a frame from the supervisor says."""
    if kind == OUTPUT:
        return Output(flag, payload)
    try:
        return _decode_control(kind, flag, payload)
    except (struct.error, IndexError) as exc:
        raise InternalError(f"the supervisor sent a malformed frame of type {kind}") from exc


def _decode_control(kind: int, flag: int, payload: bytes) -> Event:
    match kind:
        case 65:
            return Pid(*_PID.unpack(payload))
        case 66:
            return Synced(*_U32.unpack(payload))
        case 67:
            return Started(*_U64.unpack(payload))
        case 68:
            index, errno = _FAILED.unpack_from(payload)
            detail = payload[_FAILED.size :].decode("utf-8", "replace")
            return LaunchFailed(SECTIONS[flag], index, errno, detail)
        case 70:
            return Gap(*_U64.unpack(payload))
        case 71:
            code, signal, time_ns, started_ns = _EXIT.unpack(payload)
            return ExitStatus(
                code=code,
                signal=signal,
                time_ns=time_ns,
                started_ns=started_ns,
                core=bool(flag),
            )
        case 72:
            phase, pid, supervisor, _, started_ns, exit_ns = _STATE.unpack(payload)
            return State(
                phase=_PHASES[phase],
                pid=pid,
                supervisor=supervisor,
                started_ns=started_ns,
                exit_ns=exit_ns,
            )
        case 73:
            return Health(payload.decode("ascii", "replace"))
        case 74:
            return Answer(flag, 0)
        case 75:
            return Answer(flag, *_U32.unpack(payload))
        case 76:
            return Acked(*_U32.unpack(payload))
    raise InternalError(f"the supervisor sent a frame of unknown type {kind}")
