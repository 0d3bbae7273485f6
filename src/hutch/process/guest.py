"""Talk to the agent in a virtual machine, through the `agent.sock` of its run directory.

Each connection is one channel to the agent (docs/reference/vmm.md): a call, a process
beside the main one, or a stream of files. `hutch.plan.guest` has the requests' encoding.
"""

from __future__ import annotations

import _socket  # socket(7) without what the socket module brings along: 2 ms of start-up
import errno
import os
import select
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from struct import Struct

from hutch.errors import (
    Busy,
    IntegrityError,
    OperationTimeout,
    OutcomeUnknown,
    Unavailable,
    WrongState,
)
from hutch.plan.guest_answers import decode_answer
from hutch.plan.ops import Plan
from hutch.plan.wire import encode
from hutch.process import frames
from hutch.process.errors import GuestCallFailed, reason
from hutch.process.supervisor import Supervisor

__all__ = ["Channel", "Guest", "Quiet", "guest_silence"]

SOCKET = "agent.sock"
_CALL, _EXEC, _FILES, _QUIESCE, _END = 1, 3, 4, 128, 129
_QUIET = Struct("<II")
_DISMISS = b"\x01"
_RECEIVE = 64 << 10
_ANSWER_MAX = 64 << 20
# An emulated guest on a busy host takes its time, but not this long for one piece.
SILENCE_S = 60.0
# After which it may be the reader of its output that is waited for.
_HELD_BACK_S = 0.25
_SILENT = "`hutch console` shows whether its kernel lives; `hutch restart` starts it anew"
_U32 = Struct("<I").pack


@contextmanager
def guest_silence(what: str) -> Iterator[None]:
    """Say of a supervisor in a guest that was waited for in vain whose it is."""
    try:
        yield
    except OperationTimeout as exc:
        raise OperationTimeout(f"no answer from the machine: {what}", hint=_SILENT) from exc


class Channel:
    """One connection to the agent: bytes both ways, each direction with its own end.

    One thread may send while another receives. The guest is not trusted to answer: whoever
    waits for it waits until a deadline, or as long as something comes or goes.
    """

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, for select(2)."""
        return self._sock.fileno()

    def close(self) -> None:
        """End both directions; the agent stops what it does for this channel."""
        self._sock.close()

    def abort(self) -> None:
        """End both directions for another thread that still waits to send or receive."""
        try:
            self._sock.shutdown(_socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already

    def _ready(self, event: int, left: float) -> None:
        poll = select.poll()
        poll.register(self._sock.fileno(), event)
        if not poll.poll(max(0.0, left) * 1000):
            raise OperationTimeout("no answer from the machine's agent", hint=_SILENT)

    def send(self, data: bytes | memoryview) -> bool:
        """Send all of it, waiting while the guest does not read; False when the guest has
        ended the channel: what it said is still to be received.

        Raise `OperationTimeout` when the guest has read nothing for `SILENCE_S`.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                self._ready(select.POLLOUT, SILENCE_S)
            except (BrokenPipeError, ConnectionResetError):
                return False
        return True

    def end(self) -> None:
        """Say that no more will be sent."""
        try:
            self._sock.shutdown(_socket.SHUT_WR)
        except OSError:
            pass  # the other side was quicker

    def receive(self, size: int = _RECEIVE, deadline: float | None = None) -> bytes:
        """Return some bytes, at most `size`, or none at the end.

        Raise `OperationTimeout` when the monotonic clock has reached `deadline`, or, without
        one, when nothing has come for `SILENCE_S`.
        """
        while True:
            try:
                return self._sock.recv(size)
            except BlockingIOError:
                left = SILENCE_S if deadline is None else deadline - time.monotonic()
                self._ready(select.POLLIN, left)
            except ConnectionResetError:
                return b""

    def receive_all(self, deadline: float | None = None, *, limit: int = _ANSWER_MAX) -> bytes:
        """Return everything up to the end; more than `limit` bytes raise `IntegrityError`."""
        pieces = []
        size = 0
        while piece := self.receive(deadline=deadline):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise IntegrityError(f"the machine's agent answers with more than {limit} bytes")
            if deadline is not None and time.monotonic() > deadline:
                raise OperationTimeout(
                    "the answer of the machine's agent does not end", hint=_SILENT
                )
        return b"".join(pieces)

    def detach(self) -> _socket.socket:
        """Give the socket away; the channel is used no more."""
        self._sock.setblocking(True)
        return self._sock


class Quiet:
    """A main process whose streams stand still; `unacked` is input that it did not take."""

    def __init__(self, channel: Channel, unacked: int) -> None:
        self._channel = channel
        self.unacked = unacked

    def dismiss(self) -> None:
        """Hold nothing any more, and let nobody let the machine go on: that is the caller's
        affair from now on."""
        self._channel.send(_DISMISS)

    def wait_end(self, timeout_s: float = 60.0) -> None:
        """Wait until the machine, which was told to end, has ended: until then it is held."""
        self._channel.receive_all(time.monotonic() + timeout_s)


class Guest:
    """The agent of one running virtual machine."""

    def __init__(self, directory: str) -> None:
        """`directory` is the instance's run directory."""
        self._directory = directory

    def _open(self, kind: int, *fds: int) -> Channel:
        try:
            fd = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
                try:
                    # By descriptor: a socket's path has room for 107 bytes only.
                    sock.connect(f"/proc/self/fd/{fd}/{SOCKET}")
                except BaseException:
                    sock.close()
                    raise
            finally:
                os.close(fd)
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise Unavailable(f"the machine does not run: {self._directory}/{SOCKET}") from exc
        head = b"HVA1" + bytes((kind, 0, 0, 0))
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array("i", fds))] if fds else []
        try:
            sock.sendmsg([head], rights)
        except (BrokenPipeError, ConnectionResetError):
            pass  # what it says, or does not say, is for the caller to read
        return Channel(sock)

    def call(self, op: int, payload: bytes = b"", timeout_s: float | None = 60.0) -> bytes:
        """Ask the agent for one operation; return what its answer has beside the status.

        Raise `GuestCallFailed` for a refusal, `OutcomeUnknown` when the machine ended,
        `OperationTimeout` when the agent is silent, `IntegrityError` when it is not to be believed.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._open(_CALL) as channel:
            channel.send(_U32(op) + payload)
            channel.end()
            answer = channel.receive_all(deadline, limit=_ANSWER_MAX)
        if not answer:
            raise OutcomeUnknown(f"the machine's agent did not answer call {op}")
        said = decode_answer(answer)
        if said.errno:
            raise GuestCallFailed(op, said.index, said.errno, said.detail)
        return said.body

    def exec(self, plan: Plan | bytes, *, attach: int = 0) -> Supervisor:
        """Start a process beside the main one, whose pidfd is slot 0 of the plan.

        The supervisor in the guest is talked to as one on the host; `attach` (see
        `attach_flags`) attaches before the process can write anything. Without a main
        process the launch fails with ESRCH.
        """
        data = encode(plan) if isinstance(plan, Plan) else plan
        channel = self._open(_EXEC)
        try:
            ahead = frames.encode_frame(frames.ATTACH, flag=attach) if attach else b""
            channel.send(_U32(len(data)) + data + ahead)
        except BaseException:
            channel.close()
            raise
        return Supervisor(channel.detach(), attached=attach)

    def end_process(self) -> None:
        """Kill the main process in the guest, whose machine then puts its file systems away.

        Nothing is waited for: the exit is the supervisor's to tell.
        """
        self._open(_END).close()

    @contextmanager
    def quiesce(self, monitor: int, timeout_s: float = 30.0) -> Iterator[Quiet]:
        """Hold the main process's streams still, so that the machine's state can be saved.

        On entry all it has said is in the pipes to its supervisor on the host, which may not have
        logged it yet, and nothing is under way to it. `monitor` is the connection to QEMU: where
        this process is killed within the block, `hutch-vmm` lets the machine go on; left by an
        exception it does so as well. `WrongState` when the process has ended.
        """
        deadline = time.monotonic() + timeout_s
        with self._open(_QUIESCE, monitor) as channel:
            answer = b""
            while len(answer) < _QUIET.size:
                soon = min(deadline, time.monotonic() + _HELD_BACK_S)
                try:
                    piece = channel.receive(_QUIET.size - len(answer), soon)
                except OperationTimeout:
                    if soon == deadline:
                        raise
                    self._take_output()
                    continue
                if not piece:
                    raise OutcomeUnknown("the machine ended before its streams were still")
                answer += piece
            error, unacked = _QUIET.unpack(answer)
            if error == errno.EBUSY:
                raise Busy("the machine's state is being saved already")
            if error:
                raise WrongState(f"the program has ended or cannot be held: {reason(error)}")
            yield Quiet(channel, unacked)
            channel.send(_DISMISS)

    def _take_output(self) -> None:
        """Have the supervisor take what the process has said, though a client that does not read
        holds it back: `hutch-vmm` is still to be rid of it."""
        # Without an answer it is as it was; whoever waits goes on to.
        with suppress(OSError, OutcomeUnknown), Supervisor.connect(self._directory) as link:
            link.query(logged=True)

    def files(self) -> Channel:
        """Open a stream to the files helper; the caller speaks its requests and closes it."""
        return self._open(_FILES)
