"""Talk to the supervisor of one process: its starter's connection, or a later one."""

from __future__ import annotations

import _socket  # socket(7) without what the socket module brings along: 2 ms of start-up
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from struct import pack
from threading import Condition, Lock
from typing import TypeVar

from hutch.errors import (
    Exhausted,
    IntegrityError,
    InternalError,
    OperationTimeout,
    OutcomeUnknown,
)
from hutch.process import frames
from hutch.process.errors import LaunchFailed, reason
from hutch.process.frames import (
    Acked,
    Answer,
    Event,
    ExitStatus,
    Gap,
    Health,
    Output,
    Pid,
    Started,
    State,
    Synced,
)

__all__ = ["Supervisor", "attach_flags", "write_all"]

STDIN_WINDOW = 64 << 10
_FOR_EVER = float("inf")
_RECEIVE = 128 << 10
_ANSWER_S = 30.0
# A supervisor in a guest may be anybody: what it can make us keep is bounded.
_EARLY_MAX = 256  # frames before the start, of 64 KiB at most
_EVENTS_MAX = 8192  # that are no output, and nobody takes
_T = TypeVar("_T")


def attach_flags(*, stdin: bool, stdout: bool, stderr: bool, lossless: bool) -> int:
    """Return the flags of an ATTACH frame."""
    return (
        stdin * frames.ATTACH_STDIN
        | stdout * frames.ATTACH_STDOUT
        | stderr * frames.ATTACH_STDERR
        | lossless * frames.ATTACH_LOSSLESS
    )


class Supervisor:
    """A connection to a supervisor.

    Any thread may ask and wait, though not a signal handler. Closing the starter's
    connection before `wait_started` abandons the launch; afterwards the process goes on
    if the plan's `linger` says so and is killed if not.
    """

    def __init__(
        self, sock: _socket.socket, *, launcher_pid: int | None = None, attached: int = 0
    ) -> None:
        self._sock = sock
        self._launcher_pid = launcher_pid
        self._rest = b""  # of a frame that has not come whole
        self._events: deque[Event] = deque()
        # Guards what was received. One thread at a time reads the socket, without it.
        self._changed = Condition(Lock())
        self._reading = False
        self._send_lock = Lock()
        self._credit = STDIN_WINDOW
        self._pid: Pid | None = None
        self._started: Started | None = None
        self._exit: ExitStatus | None = None
        self._health: str | None = None
        self._failure: LaunchFailed | None = None
        self._eof = False
        self._planless = launcher_pid is not None
        # An ATTACH that was sent ahead; nobody waits for its answer.
        self._unasked = int(bool(attached))
        self.attached = attached

    @classmethod
    def connect(cls, directory: str) -> Supervisor:
        """Connect to the running supervisor of an instance's run directory.

        Raise OSError (FileNotFoundError, ConnectionRefusedError) when there is none.
        """
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
            try:
                # By descriptor: a socket's path has room for 107 bytes only.
                sock.connect(f"/proc/self/fd/{fd}/ctl.sock")
            except BaseException:
                sock.close()
                raise
        finally:
            os.close(fd)
        return cls(sock)

    # ---- connection -------------------------------------------------------------------

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, for select(2): readable means `next_event`."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection; the launch's first process is reaped."""
        if self._planless and self._sock.fileno() >= 0:
            self._dismiss()
        self._sock.close()
        self._reap()

    def _dismiss(self) -> None:
        """Let a process go that has got no plan; when this returns, it has ended."""
        try:
            self._sock.shutdown(_socket.SHUT_WR)
            self._sock.recv(1)
        except OSError:
            pass  # it has ended already

    def _reap(self) -> None:
        pid, self._launcher_pid = self._launcher_pid, None
        if pid is None:
            return
        try:
            # It ends as soon as it has forked the supervisor, so this does not wait.
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass  # the embedding program ignores SIGCHLD or reaps everything

    def _send(self, kind: int, payload: bytes = b"", flag: int = 0) -> None:
        with self._send_lock:
            try:
                self._sock.sendall(frames.encode_frame(kind, payload, flag))
            except (BrokenPipeError, ConnectionResetError):
                pass  # what it said before it left is still to be read, and tells more

    # ---- events -----------------------------------------------------------------------

    def _receive(self, deadline: float | None) -> bool:
        """Wait until something more is known; False when the time is up.

        Called with `_changed` held, which is released while waiting.
        """
        if self._eof:
            return True
        if self._reading:  # another thread's turn: it tells what it gets
            left = None if deadline is None else deadline - time.monotonic()
            return self._changed.wait(left)
        self._reading = True
        self._changed.release()
        data: bytes | None = None
        try:
            data = self._read(deadline)
        finally:
            self._changed.acquire()
            self._reading = False
            self._changed.notify_all()
        if data is None:
            return False
        if self._launcher_pid is not None:
            self._reap()
        if data:
            self._parse(self._rest + data if self._rest else data)
        else:
            self._eof = True
        return True

    def _read(self, deadline: float | None) -> bytes | None:
        import select

        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        wait_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poll.poll(wait_ms):
            return None
        try:
            return self._sock.recv(_RECEIVE)
        except ConnectionResetError:
            return b""

    def _parse(self, data: bytes) -> None:
        at = 0
        while len(data) - at >= frames.FRAME_HEAD:
            kind, flag, length = frames.parse_head(data, at)
            begin = at + frames.FRAME_HEAD
            if begin + length > len(data):
                break
            self._note(frames.decode_frame(kind, flag, data[begin : begin + length]))
            at = begin + length
        self._rest = data[at:]

    def _note(self, event: Event) -> None:
        match event:
            case Pid():
                self._pid = event
            case Started():
                self._started = event
            case ExitStatus():
                self._exit = event
            case Acked():
                self._credit += event.count
                return
            case Health():
                self._health = event.status
            case LaunchFailed():
                self._failure = event
            case Answer(request=frames.ATTACH) if self._unasked:
                self._unasked -= 1
                return
        self._events.append(event)
        if len(self._events) % _EVENTS_MAX == 0 and self._others() > _EVENTS_MAX // 2:
            raise self._distrust()

    def _others(self) -> int:
        """Return how many events wait that are no output; that is read when somebody likes."""
        return sum(not isinstance(event, (Output, Gap)) for event in self._events)

    def _distrust(self) -> IntegrityError:
        """Listen to the supervisor no more."""
        self._eof = True
        self._events.clear()
        return IntegrityError("the supervisor says what nobody asked for, without end")

    def next_event(self, timeout_s: float | None = None) -> Event | None:
        """Return the next event, or None when the time is up or the connection is over.

        A launch that failed comes as the `LaunchFailed` error, returned rather than raised.
        In a loop of your own: when `fileno` is readable, take events with a timeout of 0
        until there is none; `stdin_room` may have changed without an event.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        late = False
        with self._changed:
            while not self._events:
                if late or not self._receive(deadline) or self._eof:
                    break
                late = _is_past(deadline)
            return self._events.popleft() if self._events else None

    @property
    def is_over(self) -> bool:
        """Whether the supervisor has closed the connection."""
        return self._eof

    @property
    def pid(self) -> int | None:
        """The process id, as far as told."""
        return self._pid.pid if self._pid else None

    @property
    def supervisor_pid(self) -> int | None:
        """The supervisor's own process id, as far as told."""
        return self._pid.supervisor if self._pid else None

    @property
    def started_ns(self) -> int:
        """When the process began (ns since the epoch), 0 where that was not told here."""
        return self._started.time_ns if self._started else 0

    @property
    def exit_status(self) -> ExitStatus | None:
        """How the process ended, as far as told."""
        return self._exit

    @property
    def health(self) -> str | None:
        """What the health probe last said on this connection."""
        return self._health

    def _until(self, known: Callable[[], _T | None], deadline: float | None, what: str) -> _T:
        """Wait until something is known; the events stay queued for `next_event`."""
        late = False
        with self._changed:
            while (value := known()) is None:
                if self._failure is not None:
                    raise self._failure
                if self._eof:
                    raise OutcomeUnknown(f"the supervisor ended before {what}")
                if late or not self._receive(deadline):
                    raise OperationTimeout(f"no answer from the supervisor: {what}")
                late = _is_past(deadline)
            return value

    def _queued(self, matches: Callable[[Event], bool]) -> Event | None:
        """Take the first event that matches out of the queue."""
        for index, event in enumerate(self._events):
            if matches(event):
                del self._events[index]
                return event
        return None

    # ---- the launch -------------------------------------------------------------------

    def launch(self, plan: bytes, fds: Sequence[int] = (), *, attach: int = 0) -> None:
        """Hand over the plan for which a spawned supervisor waits, once.

        `fds` become the plan's slots; they stay the caller's to close. `attach` (see
        `attach_flags`) attaches before the process can write anything.
        """
        memory = os.memfd_create("hutch-plan", os.MFD_CLOEXEC)
        try:
            write_all(memory, plan)
            message = frames.encode_frame(frames.PLAN, flag=attach)
            rights = pack(f"{1 + len(fds)}i", memory, *fds)
            self.attached = attach
            self._sock.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        except (BrokenPipeError, ConnectionResetError):
            pass  # that it ended before its time is told by the first wait
        finally:
            os.close(memory)
        self._planless = False

    def wait_pid(self, timeout_s: float | None = 60.0) -> int:
        """Wait until the process exists and return its id on the host.

        Raise `LaunchFailed`; so do the other waits.
        """
        return self._until(lambda: self._pid, _deadline(timeout_s), "the process id").pid

    def wait_sync(self, number: int, timeout_s: float | None = 60.0) -> None:
        """Wait until the launch stands in `Sync(number)`."""
        event = self._until(
            lambda: self._queued(lambda event: isinstance(event, Synced)),
            _deadline(timeout_s),
            f"sync {number}",
        )
        if event != Synced(number):
            raise InternalError(f"the launch stands in {event}, not in sync {number}")

    def go(self, number: int, rest: bytes = b"") -> None:
        """Let the launch go on after `Sync(number)`, or after `Rest(number)` with the rest of
        its plan."""
        self._send(frames.GO, pack("<I", number) + rest)

    def wait_started(self, timeout_s: float | None = 60.0) -> int:
        """Wait until the program runs; return when that was (ns since the epoch)."""

        def started() -> Started | None:
            if self._started is None and len(self._events) > _EARLY_MAX:
                raise self._distrust()
            return self._started

        return self._until(started, _deadline(timeout_s), "the start").time_ns

    # ---- requests ---------------------------------------------------------------------

    def _request(self, kind: int, payload: bytes = b"", flag: int = 0) -> None:
        """Send and wait for the answer; raise OSError for a refusal."""
        self._send(kind, payload, flag)
        deadline = _deadline(_ANSWER_S)
        late = False
        with self._changed:
            while True:
                event = self._queued(lambda e: isinstance(e, Answer) and e.request == kind)
                if isinstance(event, Answer):
                    if event.errno:
                        raise OSError(event.errno, reason(event.errno))
                    return
                if self._eof:
                    if self._exit is not None:
                        raise ProcessLookupError("the process has ended")
                    raise OutcomeUnknown("the supervisor ended before its answer")
                if late or not self._receive(deadline):
                    raise OperationTimeout("no answer from the supervisor")
                late = _is_past(deadline)

    def attach(
        self,
        *,
        stdin: bool = False,
        stdout: bool = True,
        stderr: bool = True,
        lossless: bool = False,
    ) -> None:
        """Ask for output from now on.

        `lossless`: the process waits for this client when it reads slowly; without it
        output beyond a bound is dropped and told as a `Gap`.
        """
        flags = attach_flags(stdin=stdin, stdout=stdout, stderr=stderr, lossless=lossless)
        self._request(frames.ATTACH, flag=flags)
        self.attached = flags

    def detach(self) -> None:
        """Ask for no more output; the connection stays."""
        self._request(frames.DETACH)
        self.attached = 0

    def signal(self, signum: int) -> None:
        """Send a signal to the process; `ProcessLookupError` when it has ended."""
        self._request(frames.SIGNAL, pack("<I", signum))

    def claim(self) -> None:
        """Say that this client will do what follows the exit: while it is connected, the
        exit command is not run."""
        self._request(frames.WAIT, flag=1)

    def shutdown(self) -> None:
        """Kill the process; the exit is reported as always."""
        self._request(frames.SHUTDOWN)

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size."""
        self._request(frames.RESIZE, pack("<HH", rows, columns))

    def log_reopen(self) -> None:
        """Open the log's path anew, after somebody has moved the file away."""
        self._request(frames.LOG_REOPEN)

    def query(self, *, logged: bool = False) -> State:
        """Ask how far the instance is; with `logged` the answer comes when all that was in its
        pipes has been written to the log."""
        self._send(frames.QUERY, flag=frames.QUERY_LOGGED if logged else 0)
        state = self._until(
            lambda: self._queued(lambda event: isinstance(event, State)),
            _deadline(_ANSWER_S),
            "its state",
        )
        assert isinstance(state, State)
        return state

    # ---- stdin ------------------------------------------------------------------------

    @property
    def stdin_room(self) -> int:
        """How many bytes `send_stdin` takes now without waiting."""
        return max(0, self._credit)

    def send_stdin(self, data: bytes | memoryview, timeout_s: float | None = None) -> None:
        """Send input (needs an attach with stdin), waiting while the process does not read.

        Output that arrives meanwhile is kept for `output`.
        """
        view, deadline = memoryview(data), _deadline(timeout_s)
        late = False
        while view:
            while self.stdin_room == 0 and not self._eof:
                with self._changed:
                    if late or not self._receive(deadline):
                        raise OperationTimeout("the process does not read its input")
                late = _is_past(deadline)
            if self._eof or self._exit is not None:
                return
            piece = view[: min(self.stdin_room, 32 << 10)]
            self._credit -= len(piece)
            self._send(frames.STDIN, bytes(piece))
            view = view[len(piece) :]

    def close_stdin(self) -> None:
        """End the input: the process reads the end of file (a terminal reads ^D)."""
        self._send(frames.STDIN_EOF)

    # ---- output and exit --------------------------------------------------------------

    def output(self, timeout_s: float | None = None) -> Iterator[Output | Gap]:
        """Yield output until the process has ended or the connection is over.

        `wait` afterwards gives the status. Raise `OperationTimeout`, `LaunchFailed`.
        """
        deadline = _deadline(timeout_s)
        late = False
        while True:
            with self._changed:
                event = self._queued(lambda e: isinstance(e, (Output, Gap)))
                if event is None and self._exit is None and not self._eof:
                    if self._failure is not None:
                        raise self._failure
                    if late or not self._receive(deadline):
                        raise OperationTimeout("the process has not ended")
                    late = _is_past(deadline)
                    continue
            if not isinstance(event, (Output, Gap)):
                return
            yield event

    def wait(self, timeout_s: float | None = None) -> ExitStatus:
        """Wait for the end of the process; output that arrives meanwhile stays queued.

        Raise `OperationTimeout`, `LaunchFailed`, or `OutcomeUnknown` when the supervisor
        was killed.
        """
        return self._until(lambda: self._exit, _deadline(timeout_s), "the exit")

    def collect(
        self,
        input: bytes | None = None,
        timeout_s: float | None = None,
        limit_bytes: int = 64 << 20,
    ) -> tuple[ExitStatus, bytes, bytes]:
        """Feed `input`, gather both streams, wait for the end.

        Raise `Exhausted` as soon as a stream has more than `limit_bytes`. After that, and
        after `OperationTimeout`, the process still runs; both have what was gathered.
        """
        streams: tuple[list[bytes], list[bytes]] = ([], [])
        try:
            status = self._collect(input, _deadline(timeout_s), limit_bytes, streams)
        except (OperationTimeout, Exhausted) as exc:
            exc.stdout, exc.stderr = (b"".join(stream)[:limit_bytes] for stream in streams)
            raise
        return status, b"".join(streams[0]), b"".join(streams[1])

    def _collect(
        self,
        input: bytes | None,
        deadline: float | None,
        limit_bytes: int,
        streams: tuple[list[bytes], list[bytes]],
    ) -> ExitStatus:
        room = [limit_bytes, limit_bytes]
        left = memoryview(input or b"")
        late = False
        if not left:
            self._end_input()
        while True:
            left = self._feed(left)
            with self._changed:
                self._gather(streams, room)
                if min(room) < 0:
                    raise Exhausted(
                        f"the program wrote more than {limit_bytes} bytes",
                        hint="raise limit=, or read the output as a stream",
                    )
                if self._exit is not None:
                    return self._exit
                if self._failure is not None:
                    raise self._failure
                if self._eof:
                    raise OutcomeUnknown("the supervisor ended before the exit")
                if late or not self._receive(deadline):
                    raise OperationTimeout("the process has not ended in the time allowed")
                late = _is_past(deadline)

    def _gather(self, streams: tuple[list[bytes], list[bytes]], room: list[int]) -> None:
        others: list[Event] = []
        for event in self._events:
            if isinstance(event, Output) and 1 <= event.stream <= 2:
                which = event.stream - 1
                room[which] -= len(event.data)
                streams[which].append(event.data)
            elif not isinstance(event, Gap):
                others.append(event)  # another thread may wait for it
        self._events = deque(others)

    def _feed(self, left: memoryview) -> memoryview:
        while left and self.stdin_room and self._exit is None:
            piece = left[: min(self.stdin_room, 32 << 10)]
            self._credit -= len(piece)
            self._send(frames.STDIN, bytes(piece))
            left = left[len(piece) :]
            if not left:
                self._end_input()
        return left

    def _end_input(self) -> None:
        if self.attached & frames.ATTACH_STDIN:
            self.close_stdin()


def write_all(fd: int, data: bytes) -> None:
    """Write all of it to a file."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _is_past(deadline: float | None) -> bool:
    """Tell whether the time is up. Looked at after each piece that came: whoever speaks
    without end would otherwise never be given up."""
    return deadline is not None and time.monotonic() > deadline


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None or timeout_s == _FOR_EVER else time.monotonic() + timeout_s
