"""Run side programs (tar, mmdebstrap, slirp4netns, credential helpers) to their end or
for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import msgspec

from hutch.errors import OperationTimeout, Unsupported

if TYPE_CHECKING:
    import subprocess

__all__ = ["CompletedCommand", "run_command", "spawn"]


class CompletedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A side program that has ended; `returncode` is -n when signal n killed it."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes


def _missing(program: str) -> Unsupported:
    return Unsupported(f"{program}: program not found", hint=f"install the program {program!r}")


def _stdin(input: bytes | None, fd: int | IO[bytes] | None) -> Any:
    import subprocess

    if input is not None:
        return None  # subprocess makes a pipe for it
    return subprocess.DEVNULL if fd is None else fd


def run_command(
    argv: Sequence[str],
    *,
    input: bytes | None = None,
    stdin_fd: int | IO[bytes] | None = None,
    stdout_fd: int | IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    timeout_s: float | None = None,
    pass_fds: Sequence[int] = (),
) -> CompletedCommand:
    """Run a program to its end and return its status and output.

    A status other than 0 is the caller's to judge. stdin is `input`, `stdin_fd` or empty;
    stdout is kept unless it goes to `stdout_fd`. Raise `Unsupported` when the program is
    missing, `OperationTimeout` after killing it.
    """
    import subprocess

    try:
        done = subprocess.run(
            list(argv),
            input=input,
            stdin=_stdin(input, stdin_fd),
            stdout=subprocess.PIPE if stdout_fd is None else stdout_fd,
            stderr=subprocess.PIPE,
            env=env,
            cwd=cwd,
            timeout=timeout_s,
            pass_fds=tuple(pass_fds),
            check=False,
        )
    except FileNotFoundError as exc:
        if cwd is not None and exc.filename == cwd:
            raise
        raise _missing(argv[0]) from exc
    except subprocess.TimeoutExpired as exc:
        raise OperationTimeout(f"{argv[0]} has not ended after {timeout_s} s") from exc
    return CompletedCommand(
        argv=tuple(argv),
        returncode=done.returncode,
        stdout=done.stdout or b"",
        stderr=done.stderr or b"",
    )


@contextmanager
def spawn(
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
    stop_timeout_s: float = 5.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of the block; leaving it ends the program.

    It gets SIGTERM, and SIGKILL when it has not ended `stop_timeout_s` later. Streams
    default to /dev/null; give `subprocess.PIPE` (-1) for a pipe.
    """
    import subprocess

    def stream(value: int | IO[bytes] | None) -> Any:
        return subprocess.DEVNULL if value is None else value

    try:
        process = subprocess.Popen(
            list(argv),
            stdin=stream(stdin),
            stdout=stream(stdout),
            stderr=stream(stderr),
            env=env,
            cwd=cwd,
            pass_fds=tuple(pass_fds),
        )
    except FileNotFoundError as exc:
        if cwd is not None and exc.filename == cwd:
            raise
        raise _missing(argv[0]) from exc
    try:
        yield process
    finally:
        _end(process, stop_timeout_s)


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    import subprocess

    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                pass
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
