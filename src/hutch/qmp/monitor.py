"""A connection to QEMU's monitor: commands, their answers, events. Every wait has an end."""

from __future__ import annotations

import _socket  # socket(7) without what the socket module brings along: 2 ms of start-up
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from struct import pack
from typing import Any, NoReturn

from hutch.errors import OperationTimeout, OutcomeUnknown, Unavailable
from hutch.plan.machine.version import QemuVersion
from hutch.qmp.errors import CommandFailed
from hutch.qmp.messages import (
    ANSWER_MAX,
    Answer,
    BadMessage,
    Event,
    Failure,
    Greeting,
    decode_answer,
    decode_greeting,
    decode_message,
    encode_command,
)

__all__ = ["COMMAND_S", "EVENTS_MAX", "Monitor", "conversation"]

COMMAND_S = 10.0
"""How long an ordinary command may take; under emulation on a busy host some take seconds."""
EVENTS_MAX = 256
_BUSY_OR_HUNG = "somebody else holds QEMU's monitor, or QEMU hangs: `hutch rm -f` ends it"
_RECEIVE = 64 << 10
_RECEIVES_MAX = 64  # in one look for events, which must not last as long as they come


class Monitor:
    """One conversation with QEMU, for one thread at a time.

    QEMU serves one connection; the next waits in the listening socket's queue until this
    one is closed. After an error of the connection (`OutcomeUnknown`, `Unavailable`)
    everything raises `Unavailable`; a command that was refused or whose time was up leaves
    it usable. `version` is QEMU's.
    """

    def __init__(self, sock: _socket.socket, *, timeout_s: float = COMMAND_S) -> None:
        """Take over a connected socket: read the greeting, negotiate. Closed on failure."""
        self._sock = sock
        self._received = bytearray()
        self._searched = 0  # bytes of it known to hold no end of line
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._last_id = 0
        self._closed = False
        try:
            # Waits are by poll(2) with a deadline: a send must not block either.
            sock.setblocking(False)
            self.greeting = self._read_greeting(time.monotonic() + timeout_s)
            self.execute("qmp_capabilities", timeout_s=timeout_s)
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, timeout_s: float = COMMAND_S) -> Monitor:
        """Connect to the monitor's socket; its path may be of any length.

        Raise `Unavailable` where nothing listens (QEMU is gone), `OperationTimeout` where
        somebody else holds the monitor or QEMU hangs.
        """
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            _connect(sock, os.fspath(path), timeout_s)
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout_s=timeout_s)

    @property
    def version(self) -> QemuVersion:
        return self.greeting.version

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, for select(2): readable means `next_events`."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection; QEMU goes on and takes the next one."""
        self._closed = True
        self._sock.close()

    # ---- commands ---------------------------------------------------------------------

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float = COMMAND_S,
    ) -> Any:
        """Run a command and return its answer decoded (a dict mostly); see `ask` for types.

        `fds` travel with it (`getfd`, `add-fd` take one) and stay the caller's to close.
        Raise `CommandFailed` where QEMU refuses, `OperationTimeout` when the time is up,
        which leaves open whether it happens yet, `OutcomeUnknown` when the connection is lost.
        """
        return self.ask(command, arguments, kind=Any, fds=fds, timeout_s=timeout_s)

    def ask(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        kind: Any,
        fds: Sequence[int] = (),
        timeout_s: float = COMMAND_S,
    ) -> Any:
        """Run a command as `execute` does and return its answer as the type `kind`."""
        if self._closed:
            raise Unavailable(f"qemu: {command}: the monitor is closed")
        deadline = time.monotonic() + timeout_s
        self._last_id += 1
        self._send(command, encode_command(command, arguments, self._last_id), fds, deadline)
        while True:
            message = self._next_message(command, deadline)
            if isinstance(message, Event):
                self._events.append(message)
                continue
            if message.id is not None and 0 < message.id < self._last_id:
                continue  # comes late: whoever asked has given up
            if message.id != self._last_id and not (
                message.id is None and isinstance(message, Failure)
            ):
                self._lost(command, f"an answer to command {message.id}")
            if isinstance(message, Failure):
                raise CommandFailed(command, message.kind, message.description)
            try:
                return decode_answer(message, kind)
            except BadMessage as exc:
                self._lost(command, str(exc), exc)

    # ---- events -----------------------------------------------------------------------

    def wait_event(
        self,
        names: Collection[str],
        *,
        timeout_s: float,
        match: Callable[[Event], bool] | None = None,
    ) -> Event:
        """Return the first event of these names that `match` accepts, and forget it.

        Events that came before count, up to the `EVENTS_MAX` latest. Raise
        `OperationTimeout`, or `OutcomeUnknown` when the connection is lost.
        """
        for event in self._events:
            if event.name in names and (match is None or match(event)):
                self._events.remove(event)
                return event
        deadline = time.monotonic() + timeout_s
        what = f"waiting for {' or '.join(sorted(names))}"
        if self._closed:
            raise Unavailable(f"qemu: {what}: the monitor is closed")
        while True:
            message = self._next_message(what, deadline)
            if not isinstance(message, Event):
                self._refuse_unasked(what, message)
            elif message.name in names and (match is None or match(message)):
                return message
            else:
                self._events.append(message)

    def next_events(self) -> list[Event]:
        """Return the events that have come and forget them; does not wait."""
        for _ in range(_RECEIVES_MAX):
            while not self._closed and (line := self._take_line("reading events")) is not None:
                self._note(line)
            if self._closed or not self._is_readable(0):
                break
            self._receive("reading events")
        events = list(self._events)
        self._events.clear()
        return events

    def forget_events(self, names: Collection[str]) -> None:
        """Drop events of these names that have come, before doing what causes a new one."""
        kept = [event for event in self.next_events() if event.name not in names]
        self._events.extend(kept)

    def wait_closed(self, *, timeout_s: float) -> None:
        """Wait until QEMU closes the connection, as it does at its end; then it is closed."""
        deadline = time.monotonic() + timeout_s
        while not self._closed:
            try:
                message = self._next_message("waiting for the end", deadline)
            except OutcomeUnknown:
                return
            if isinstance(message, Event):
                self._events.append(message)

    # ---- lines ------------------------------------------------------------------------

    def _note(self, line: bytes) -> None:
        message = self._decode("reading events", line)
        if isinstance(message, Event):
            self._events.append(message)
        else:
            self._refuse_unasked("reading events", message)

    def _refuse_unasked(self, what: str, message: Answer | Failure) -> None:
        if message.id is None or not 0 < message.id <= self._last_id:
            self._lost(what, f"an answer to command {message.id}")

    def _decode(self, what: str, line: bytes) -> Event | Answer | Failure:
        try:
            return decode_message(line)
        except BadMessage as exc:
            self._lost(what, str(exc), exc)

    def _next_message(self, what: str, deadline: float) -> Event | Answer | Failure:
        return self._decode(what, self._read_line(what, deadline))

    def _read_greeting(self, deadline: float) -> Greeting:
        try:
            return decode_greeting(self._read_line("greeting", deadline))
        except OutcomeUnknown as exc:
            raise Unavailable(exc.message) from exc
        except BadMessage as exc:
            raise Unavailable(f"qemu: not a monitor: {exc}") from exc

    def _read_line(self, what: str, deadline: float) -> bytes:
        while True:
            line = self._take_line(what)
            if line is not None:
                return line
            left = deadline - time.monotonic()
            # The clock counts also while bytes come: events without end are no answer.
            if left < 0 or not self._is_readable(left):
                raise OperationTimeout(
                    f"qemu: {what}: no answer in the time allowed", hint=_BUSY_OR_HUNG
                )
            self._receive(what)

    def _take_line(self, what: str) -> bytes | None:
        """Return the next whole line among the bytes received, or None."""
        while True:
            end = self._received.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._received)
                if self._searched > ANSWER_MAX:
                    self._lost(what, f"a line of more than {ANSWER_MAX} bytes")
                return None
            line = bytes(self._received[:end]).strip()
            del self._received[: end + 1]
            self._searched = 0
            if line:
                return line

    def _is_readable(self, wait_s: float) -> bool:
        return _poll(self._sock, wait_s, reading=True)

    def _receive(self, what: str) -> None:
        try:
            data = self._sock.recv(_RECEIVE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._lost(what, (exc.strerror or "broken").lower(), exc)
        if not data:
            self._lost(what, "the connection was closed")
        self._received += data

    def _send(self, command: str, data: bytes, fds: Sequence[int], deadline: float) -> None:
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array("i", fds).tobytes())]
        left = memoryview(data)
        while left:
            if not _poll(self._sock, max(0.0, deadline - time.monotonic()), reading=False):
                # Half a command may have gone out: nothing sensible can follow it.
                self.close()
                raise OperationTimeout(f"qemu: {command}: it does not read its commands")
            try:
                sent = self._sock.sendmsg([left], rights if fds else [], _socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as exc:
                self._lost(command, (exc.strerror or "broken").lower(), exc)
            left, fds = left[sent:], ()

    def _lost(self, what: str, why: str, cause: BaseException | None = None) -> NoReturn:
        self.close()
        raise OutcomeUnknown(f"qemu: {what}: connection lost: {why}") from cause


def _poll(sock: _socket.socket, wait_s: float, *, reading: bool) -> bool:
    import select

    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN if reading else select.POLLOUT)
    return bool(poll.poll(wait_s * 1000))


def _connect(sock: _socket.socket, path: str, timeout_s: float) -> None:
    directory, name = os.path.split(path)
    try:
        # By descriptor: a socket's path has room for 107 bytes only.
        fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # connect(2) blocks where the queue of a socket that nobody accepts is full, and
            # ends with EAGAIN after this time; see SO_SNDTIMEO in socket(7).
            limit = pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, limit)
            sock.connect(f"/proc/self/fd/{fd}/{name}")
        finally:
            os.close(fd)
    except BlockingIOError as exc:
        raise OperationTimeout(
            f"{path}: no connection in the time allowed", hint=_BUSY_OR_HUNG
        ) from exc
    except OSError as exc:
        raise Unavailable(
            f"{path}: {(exc.strerror or str(exc)).lower()}", hint="is the machine running?"
        ) from exc


@contextmanager
def conversation(
    path: str | os.PathLike[str], *, wait_s: float = 30.0, timeout_s: float = COMMAND_S
) -> Iterator[Monitor]:
    """Have the monitor at this socket to oneself for the length of the block.

    Several processes may want the one monitor of an instance, and QEMU keeps all but one
    waiting without a word; so they queue at a lock file beside the socket (`<path>.lock`).
    Raise `Busy` when the lock is not had within `wait_s`.
    """
    from hutch.linux.locks import lock_file

    with (
        lock_file(f"{os.fspath(path)}.lock", timeout_s=wait_s),
        Monitor.connect(path, timeout_s=timeout_s) as monitor,
    ):
        yield monitor
