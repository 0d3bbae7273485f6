"""Take part in the streams of a program: interactively, or collecting all it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.engine.finish import finish
from hutch.engine.lookup import load
from hutch.engine.results import Completed
from hutch.engine.stop import connect, current
from hutch.errors import HutchError, InvalidArgument, OperationTimeout, WrongState
from hutch.process.supervisor import Supervisor, attach_flags
from hutch.records import Progress, silent

if TYPE_CHECKING:
    from typing import Self

    from hutch.process.frames import Gap, Output

__all__ = ["Session", "attach_session", "check_feed", "collect", "collect_flags", "join_command"]
__all__ += ["end_program", "session_flags", "start_session"]

_KILL_WAIT_S = 10.0


def session_flags(
    *, stdin: bool, stdout: bool = True, stderr: bool = True, lossless: bool = True
) -> int:
    """Return the flags of a link that shows the streams to somebody."""
    return attach_flags(stdin=stdin, stdout=stdout, stderr=stderr, lossless=lossless)


def collect_flags(*, stdin: bool) -> int:
    """Return the flags of a link that collects everything."""
    return attach_flags(stdin=stdin, stdout=True, stderr=True, lossless=True)


class Session:
    """An open connection to a program's streams; close it, or use it in a `with` block.

    `output` yields pieces as they come; input may be sent from another thread. Closing
    detaches: an instance goes on, a program started with `exec_stream` is killed unless
    it was detached.
    """

    def __init__(
        self, link: Supervisor, *, context: Context | None = None, identifier: str = ""
    ) -> None:
        self._link = link
        self._context = context
        self._id = identifier
        self.oom_killed = False  # known when `wait` has seen the end of a main program

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the connection's descriptor, readable when output waits."""
        return self._link.fileno()

    @property
    def link(self) -> Supervisor:
        """The connection to the supervisor."""
        return self._link

    def output(self, timeout: float | None = None) -> Iterator[Output | Gap]:
        """Yield output (`stream` 1 or 2, `data`) until the program has ended."""
        return self._link.output(timeout)

    def send(self, data: bytes) -> None:
        """Send input; waits while the program does not read."""
        self._link.send_stdin(data)

    def close_stdin(self) -> None:
        """End the input."""
        self._link.close_stdin()

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the terminal."""
        self._link.resize(rows, columns)

    def signal(self, signum: int) -> None:
        """Send a signal to the program; nothing happens when it has ended."""
        try:
            self._link.signal(signum)
        except ProcessLookupError:
            pass

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit code. What follows an exit is done here."""
        status = self._link.wait(timeout)
        if self._context is not None:
            booked = finish(self._context, self._id)
            self.oom_killed = booked is not None and booked.oom_killed
        return status.code

    def close(self) -> None:
        """Leave the streams."""
        self._link.close()


def start_session(
    context: Context,
    identifier: str,
    *,
    rows: int = 0,
    columns: int = 0,
    progress: Progress = silent,
) -> Session:
    """Start an instance and take part in its streams from the first byte."""
    from hutch.engine.start import start

    spec = load(context, identifier).spec
    link = start(
        context,
        identifier,
        attach=session_flags(stdin=spec.process.stdin),
        rows=rows,
        columns=columns,
        progress=progress,
    )
    if link is None:
        return attach_session(context, identifier, stdin=True, stdout=True, stderr=True)
    return Session(link, context=context, identifier=identifier)


def attach_session(
    context: Context, identifier: str, *, stdin: bool, stdout: bool, stderr: bool
) -> Session:
    """Take part in the streams of a running instance."""
    record = current(context, identifier)
    link = connect(context, record)
    try:
        link.attach(stdin=stdin and record.spec.process.stdin, stdout=stdout, stderr=stderr)
    except ProcessLookupError as exc:
        link.close()
        raise WrongState(f"instance {record.name} is not running") from exc
    return Session(link, context=context, identifier=identifier)


def check_feed(input: bytes | str | None, timeout_s: object) -> bytes | None:
    """Return the input as bytes; refuse what `collect` cannot take, before anything is started."""
    _check_timeout(timeout_s)
    if isinstance(input, str):
        return input.encode("utf-8", "surrogateescape")
    if input is not None and not isinstance(input, bytes | bytearray | memoryview):
        raise InvalidArgument(f"expected bytes or text, got {type(input).__name__}", field="input")
    return input


def _check_timeout(timeout_s: object) -> None:
    if timeout_s is None:
        return
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise InvalidArgument(f"expected seconds, got {timeout_s!r}", field="timeout")
    if timeout_s != timeout_s:
        raise InvalidArgument("expected seconds, got nan", field="timeout")


def collect(
    link: Supervisor,
    *,
    input: bytes | None,
    timeout_s: float | None,
    limit: int,
    identifier: str,
) -> Completed:
    """Feed the input, gather the output, and wait for the end; closes the link.

    On a timeout or when there is too much output, the program is killed first.
    """
    try:
        status, out, err = link.collect(input, timeout_s, limit)
    except OperationTimeout as exc:
        end_program(link)
        late = OperationTimeout(f"the program did not end within {timeout_s:g} s")
        late.stdout, late.stderr = exc.stdout, exc.stderr
        raise late from None
    except BaseException:
        end_program(link)
        raise
    finally:
        link.close()
    return Completed(exit_code=status.code, stdout=out, stderr=err, id=identifier)


def end_program(link: Supervisor) -> None:
    """Kill a program whose output nobody wants any more, and wait until it is gone."""
    try:
        link.shutdown()
        link.wait(_KILL_WAIT_S)
    except (HutchError, OSError):
        pass  # the first failure is the one to tell


def join_command(command: Sequence[str] | str) -> str:
    """Return a command as one line for messages."""
    if isinstance(command, str):
        return command
    import shlex

    return shlex.join(command)
