"""Join this process's terminal and streams to a session: raw mode, sizes, signals, detach keys."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hutch.cli.options import UsageError
from hutch.cli.output import write_bytes

if TYPE_CHECKING:
    from types import FrameType

    from hutch.engine.session import Session

__all__ = ["KeyFilter", "Streams", "detach_keys", "raw_mode", "relay", "terminal_size"]

_CHUNK = 32768
_DEFAULT_KEYS = b"\x10\x11"  # ctrl-p, ctrl-q
_PATIENCE = 3  # of who presses Ctrl-C for a program that takes no notice; as Docker has it
_PROXIED = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGALRM")


class Streams:
    """Which of the three streams are joined; `ends` says whether the end of our input
    ends the program's."""

    def __init__(
        self, *, stdin: bool, stdout: bool = True, stderr: bool = True, ends: bool = True
    ) -> None:
        self.stdin = stdin
        self.ends = ends
        self.stdout = stdout
        self.stderr = stderr


def terminal_size() -> tuple[int, int]:
    """Return rows and columns of the terminal on stdout or stdin; (0, 0) without one."""
    for fd in (1, 0, 2):
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        return rows, columns
    return 0, 0


def detach_keys(text: str | None) -> bytes:
    """Read `ctrl-p,ctrl-q`, `ctrl-],x`; an empty text means no keys at all."""
    if text is None:
        return _DEFAULT_KEYS
    keys = bytearray()
    for word in text.split(",") if text else ():
        name = word.strip()
        control = name.lower().removeprefix("ctrl-")
        if len(name) == 1 and name.isascii():
            keys.append(ord(name))
        elif name != control and len(control) == 1 and ("a" <= control <= "z"):
            keys.append(ord(control) - 96)
        elif name != control and control in ("@", "[", "\\", "]", "^", "_"):
            keys.append(ord(control) - 64)
        else:
            raise UsageError(
                f"--detach-keys: cannot read {word!r}",
                hint="a comma-separated list of characters and ctrl-a … ctrl-z",
            )
    return bytes(keys)


def relay(
    session: Session, *, tty: bool, streams: Streams, keys: bytes, proxy_signals: bool
) -> int:
    """Carry streams both ways until the program ends; return its exit code.

    Closes the session. After the detach keys were typed the program goes on and the code
    is 0.
    """
    with ExitStack() as stack:
        stack.callback(session.close)
        wanted = list(_PROXIED) if proxy_signals else []
        if tty:
            wanted.append("SIGWINCH")
        signals = stack.enter_context(_caught(wanted)) if wanted else -1
        if tty and streams.stdin:
            stack.enter_context(raw_mode(0))
        loop = _Relay(session, streams, KeyFilter(keys if tty else b""), signals)
        if loop.run():
            return 0
        return session.wait()


class _Relay:
    """One thread that waits for output, input and signals at once."""

    def __init__(self, session: Session, streams: Streams, keys: KeyFilter, signals: int) -> None:
        self._session = session
        self._link = session.link
        self._streams = streams
        self._keys = keys
        self._signals = signals
        self._stdin_open = streams.stdin
        self._detached = False
        self._asked = 0

    def run(self) -> bool:
        """Work until the program has ended or was detached from; return the latter."""
        poll = select.poll()
        poll.register(self._link.fileno(), select.POLLIN)
        if self._signals >= 0:
            poll.register(self._signals, select.POLLIN)
        listening = False
        while not self._detached:
            if self._drain():
                return False
            ready = self._stdin_open and self._link.stdin_room > 0
            if ready != listening:
                poll.register(0, select.POLLIN) if ready else poll.unregister(0)
                listening = ready
            for fd, _ in poll.poll():
                if fd == 0:
                    self._feed()
                elif fd == self._signals:
                    self._hand_on()
                else:
                    self._receive()
        return True

    def _receive(self) -> None:
        event = self._link.next_event(0.0)
        if event is not None:
            self._show(event)

    def _drain(self) -> bool:
        """Show what has arrived; tell whether the program has ended."""
        while (event := self._link.next_event(0.0)) is not None:
            self._show(event)
        return self._link.exit_status is not None or self._link.is_over

    def _show(self, event: object) -> None:
        from hutch.process.frames import Gap, Output

        if isinstance(event, Output):
            if event.stream == 2:
                if self._streams.stderr:
                    write_bytes(event.data, 2)
            elif self._streams.stdout:
                write_bytes(event.data, 1)
        elif isinstance(event, Gap):
            from hutch.cli.session import warn

            warn("output was dropped because it was not read fast enough")

    def _feed(self) -> None:
        try:
            data = os.read(0, min(_CHUNK, self._link.stdin_room))
        except OSError:  # the terminal has gone
            data = b""
        try:
            if not data:
                self._stdin_open = False
                if self._streams.ends:
                    self._session.close_stdin()
                return
            out, self._detached = self._keys.take(data)
            if out:
                self._session.send(out)
        except ProcessLookupError:
            self._stdin_open = False

    def _hand_on(self) -> None:
        for number in os.read(self._signals, 64):
            try:
                if number == signal.SIGWINCH:
                    self._session.resize(*terminal_size())
                else:
                    self._session.signal(number)
            except OSError:
                continue  # it has just ended
            self._asked += number in (signal.SIGINT, signal.SIGTERM)
        if self._asked >= _PATIENCE:
            raise UsageError(
                f"the program has been asked to end {self._asked} times: it is left running",
                hint="`hutch ps` names it, `hutch rm -f` ends it",
                exit_code=1,
            )


class KeyFilter:
    """Find the detach keys in what is typed, holding back their beginning."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = 0

    def take(self, data: bytes) -> tuple[bytes, bool]:
        """Return what to send, and whether the keys are complete."""
        if not self._keys:
            return data, False
        out = bytearray()
        for byte in data:
            if byte != self._keys[self._held]:
                out += self._keys[: self._held]
                self._held = 0
            if byte == self._keys[self._held]:
                self._held += 1
                if self._held == len(self._keys):
                    return bytes(out), True
            else:
                out.append(byte)
        return bytes(out), False


@contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """Hand every key on; the terminal is put back at the end."""
    import termios
    import tty

    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def _caught(names: list[str]) -> Iterator[int]:
    """Turn signals into bytes (their numbers) on the descriptor that is yielded."""

    def nothing(_signum: int, _frame: FrameType | None) -> None:
        return

    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    old_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {}
    try:
        for name in names:
            number = getattr(signal, name)
            before[number] = signal.signal(number, nothing)
        yield reading
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_fd)
        os.close(reading)
        os.close(writing)
