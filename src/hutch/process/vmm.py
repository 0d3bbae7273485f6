"""The host's monitor of one virtual machine, `hutch-vmm`: its configuration, and the link
over which it tells its starter how far the machine is.

The formats are documented in docs/reference/vmm.md; native/vmm/ has the same numbers.
"""

from __future__ import annotations

import _socket  # socket(7) without what the socket module brings along: 2 ms of start-up
import os
import time
from collections.abc import Callable, Sequence
from struct import Struct
from struct import error as StructError
from typing import TypeVar

import msgspec

from hutch.errors import InternalError, InvalidArgument, OperationTimeout, OutcomeUnknown
from hutch.plan import wire
from hutch.plan.ops import AnyOp
from hutch.process import frames
from hutch.process.errors import SECTIONS, STAGES, LaunchFailed, MachineFailed

__all__ = [
    "FIRST_QEMU_FD",
    "MonitorConfig",
    "MonitorLink",
    "discard_path",
    "encode_config",
    "parked_rest",
    "vmm_path",
]

# Descriptors 3 to 7 are the monitor's own: configuration, agent, agent.sock, status, log.
FIRST_QEMU_FD = 11
_INPUT_WINDOW = 64 << 10
MAX_QEMU_FDS = 64

_MAGIC = b"HVC1"
_VOLATILE, _TTY, _HOLD, _ADOPT, _CONSOLE, _CONTROL, _PARK = (1 << n for n in range(7))
_QEMU, _AGENT, _READY, _STARTED, _FAILED, _EXIT = range(1, 7)
_GO = 1
_LAUNCH_STAGE = 4

_CONFIG = Struct("<4sIIIIII")
_HEAD = Struct("<BBHI")
_FAILURE = Struct("<III")
_U32 = Struct("<I")
_I32 = Struct("<i")
_U64 = Struct("<Q")
_FRAME_MAX = 4096
_RECEIVE = 4096
_T = TypeVar("_T")


def vmm_path() -> str:
    """Return where the package keeps the monitor's binary."""
    return os.path.join(os.path.dirname(os.path.dirname(__file__)), "_native", "hutch-vmm")


def discard_path() -> str:
    """Return where the package keeps what QEMU is given to discard a template's memory."""
    return os.path.join(os.path.dirname(vmm_path()), "hutch-discard.so")


class MonitorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a monitor is to run.

    `argv` is QEMU's whole command, its program a path; descriptors named in it begin at
    `FIRST_QEMU_FD`, `qemu_fds` of them. `setup` is a whole SETUP request for the agent (or
    empty), `plan` the launch plan of the guest's main process; without one the monitor
    serves `agent.sock` until it is told to end. `boot_timeout_s` counts from QEMU's start
    (or from `MonitorLink.go`) to the start of the process; `shutdown_timeout_s` bounds the
    guest's tidying, and then QEMU's. `volatile` leaves out the tidying, `hold` waits for
    `go` before the agent is greeted, `tty` makes stdio a raw terminal.

    `adopt` takes over a process that was started under another monitor, in a machine that was
    loaded with it. `unacked` is what that monitor's `Guest.quiesce` told of its input. With
    `park`, `plan` ends in a `Rest`, and its waiting there is told as its start. Who adopts
    that has the answer for `plan` (`parked_rest`).

    `console` is for a machine without an agent: the channel is its serial port and becomes
    stdio, what calls at the listening socket is a client of the screen, and signals that ask
    to end press the power button. With it or `control` the first descriptor is a connection
    to QEMU's monitor, kept from QEMU: over it a machine that was stopped for want of room on
    the host is told to go on.
    """

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()
    qemu_fds: int = 0
    setup: bytes = b""
    plan: bytes = b""
    boot_timeout_s: float = 60.0
    shutdown_timeout_s: float = 10.0
    volatile: bool = False
    tty: bool = False
    hold: bool = False
    adopt: bool = False
    unacked: int = 0
    console: bool = False
    control: bool = False
    park: bool = False


def parked_rest(number: int, operations: Sequence[AnyOp]) -> bytes:
    """Return the `plan` for a launch that waits in `Rest(number)`; raise `InvalidArgument`
    where the operations do not fit into one frame."""
    return _U32.pack(number) + wire.encode_rest(operations)


def encode_config(config: MonitorConfig) -> bytes:
    """Return the configuration's bytes; raise `InvalidArgument` for what does not fit."""
    if not config.argv:
        raise InvalidArgument("a program is needed", field="argv")
    if not 0 <= config.qemu_fds <= MAX_QEMU_FDS:
        raise InvalidArgument(f"at most {MAX_QEMU_FDS}, got {config.qemu_fds}", field="qemu_fds")
    for field in ("setup", "plan"):
        size = len(getattr(config, field))
        if size > wire.MAX_PLAN_BYTES:
            raise InvalidArgument(f"too large: {size} bytes of {wire.MAX_PLAN_BYTES}", field=field)
    body = wire.encode_fields("SSbb", (config.argv, config.env, config.setup, config.plan))
    if config.adopt and len(config.plan) > frames.FRAME_MAX:
        raise InvalidArgument("the rest of a plan is one frame at most", field="plan")
    if not 0 <= config.unacked <= _INPUT_WINDOW:
        raise InvalidArgument(f"at most {_INPUT_WINDOW}, got {config.unacked}", field="unacked")
    flags = config.volatile * _VOLATILE | config.tty * _TTY | config.hold * _HOLD
    flags |= config.adopt * _ADOPT
    flags |= config.console * _CONSOLE
    flags |= config.control * _CONTROL
    flags |= config.park * _PARK
    times = [int(s * 1000) for s in (config.boot_timeout_s, config.shutdown_timeout_s)]
    try:
        size = _CONFIG.size + len(body)
        head = _CONFIG.pack(_MAGIC, size, flags, config.qemu_fds, *times, config.unacked)
        return head + body
    except StructError as exc:
        raise InvalidArgument(f"a timeout does not fit its field: {times} ms") from exc


class MonitorLink:
    """The starter's end of a monitor's status socket.

    Closing it before `wait_started` (before `wait_ready`, if there is no plan) abandons
    the machine; afterwards it goes on. One thread at a time.
    """

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self._rest = b""
        self._eof = False
        self._qemu_pid: int | None = None
        self._agent: bool | None = None
        self._ready: bool | None = None
        self._started_ns: int | None = None
        self._exit_code: int | None = None
        self._failure: LaunchFailed | MachineFailed | None = None

    @classmethod
    def create(cls) -> tuple[MonitorLink, _socket.socket]:
        """Return a link and the socket for the monitor, which the caller hands over and
        closes."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        return cls(ours), theirs

    def __enter__(self) -> MonitorLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Leave the monitor alone with the machine."""
        self._sock.close()

    @property
    def exit_code(self) -> int | None:
        """The exit code of the guest's process, as far as told."""
        return self._exit_code

    def go(self, *, unacked: int | None = None) -> None:
        """Let a monitor with `hold` greet the agent; `unacked` replaces its configuration's."""
        payload = b"" if unacked is None else _U32.pack(unacked)
        try:
            self._sock.sendall(_HEAD.pack(_GO, 0, 0, len(payload)) + payload)
        except (BrokenPipeError, ConnectionResetError):
            pass  # what it said before it ended is still to be read, and tells more

    def wait_qemu(self, timeout_s: float | None = 60.0) -> int:
        """Wait until QEMU runs; return its process id in the monitor's PID namespace.

        Raise `MachineFailed`, as do the other waits, and `LaunchFailed` when the plan
        failed in the guest.
        """
        return self._until(lambda: self._qemu_pid, timeout_s, "the start of QEMU")

    def wait_agent(self, timeout_s: float | None = 60.0) -> None:
        """Wait until the guest's agent has answered."""
        self._until(lambda: self._agent, timeout_s, "the agent's answer")

    def wait_ready(self, timeout_s: float | None = 60.0) -> None:
        """Wait until the guest is set up."""
        self._until(lambda: self._ready, timeout_s, "the end of the setup")

    def wait_started(self, timeout_s: float | None = 60.0) -> int:
        """Wait until the guest's process runs; return when that was (ns since the epoch)."""
        return self._until(lambda: self._started_ns, timeout_s, "the start of the process")

    def _until(self, known: Callable[[], _T | None], timeout_s: float | None, what: str) -> _T:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (value := known()) is None:
            if self._failure is not None:
                raise self._failure
            if self._eof:
                raise OutcomeUnknown(f"the machine's monitor ended before {what}")
            if not self._receive(deadline):
                raise OperationTimeout(f"the machine's monitor does not tell: {what}")
        return value

    def _receive(self, deadline: float | None) -> bool:
        self._sock.settimeout(
            None if deadline is None else max(0.000001, deadline - time.monotonic())
        )
        try:
            data = self._sock.recv(_RECEIVE)
        except TimeoutError:
            return False
        except ConnectionResetError:
            data = b""
        self._eof = not data
        data = self._rest + data
        while len(data) >= _HEAD.size:
            kind, flag, _, length = _HEAD.unpack_from(data)
            if length > _FRAME_MAX:
                raise InternalError(f"the machine's monitor sent a frame of {length} bytes")
            if len(data) < _HEAD.size + length:
                break
            self._note(kind, flag, data[_HEAD.size : _HEAD.size + length])
            data = data[_HEAD.size + length :]
        self._rest = data
        return True

    def _note(self, kind: int, flag: int, payload: bytes) -> None:
        try:
            match kind:
                case 1:
                    (self._qemu_pid,) = _U32.unpack(payload)
                case 2:
                    self._agent = True
                case 3:
                    self._ready = True
                case 4:
                    (self._started_ns,) = _U64.unpack(payload)
                case 5:
                    self._failure = _failure(flag, payload)
                case 6:
                    (self._exit_code,) = _I32.unpack(payload)
                case _:
                    raise InternalError(f"the machine's monitor sent a frame of type {kind}")
        except (StructError, IndexError) as exc:
            raise InternalError(
                f"the machine's monitor sent a malformed frame of type {kind}"
            ) from exc


def _failure(stage: int, payload: bytes) -> LaunchFailed | MachineFailed:
    section, index, errno = _FAILURE.unpack_from(payload)
    text = payload[_FAILURE.size :].decode("utf-8", "replace")
    if stage == _LAUNCH_STAGE:  # the guest's launcher reports as the host's does
        return LaunchFailed(SECTIONS[min(section, len(SECTIONS) - 1)], index, errno, text)
    return MachineFailed(STAGES[stage], index, errno, text)
