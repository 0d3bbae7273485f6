"""The command line as its users start it: a process of its own, sometimes on a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest

from hutch.engine import Engine
from hutch.testing import ensure_image

_DEADLINE_S = 60.0


class Cli:
    """Runs `hutch` on one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.argv = [sys.executable, "-m", "hutch", "--root", str(root)]

    def __call__(
        self, *args: str, input: bytes | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end."""
        return subprocess.run(
            [*self.argv, *args],
            input=input if input is not None else b"",
            capture_output=True,
            timeout=240,
            env=None if env is None else os.environ | env,
        )

    def out(self, *args: str, input: bytes | None = None) -> str:
        """Run a command that must succeed; return what it wrote."""
        done = self(*args, input=input)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def spawn(self, *args: str) -> subprocess.Popen[bytes]:
        """Start a command with pipes."""
        return subprocess.Popen(
            [*self.argv, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, argv: list[str], rows: int = 24, columns: int = 80) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            with suppress(BaseException):
                os.execv(argv[0], argv)
            os._exit(70)
        self.seen = b""
        self.resize(rows, columns)

    def resize(self, rows: int, columns: int) -> None:
        """Change the size; the command gets SIGWINCH."""
        ioctl(self.fd, TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        """Type keys."""
        os.write(self.fd, data)

    def expect(self, text: bytes, timeout_s: float = _DEADLINE_S) -> None:
        """Wait until `text` has been shown; what came before it is forgotten."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            assert self._read(deadline), f"{text!r} not in {self.seen!r}"
        self.seen = self.seen.partition(text)[2]

    def _read(self, deadline: float) -> bool:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([self.fd], [], [], left)[0]:
            return False
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            data = b""
        self.seen += data
        return bool(data)

    def wait(self, timeout_s: float = _DEADLINE_S) -> int:
        """Wait for the end of the command; return its exit code."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """End the command if it still runs."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture(scope="session")
def busybox_root(hutch_engine: Engine) -> Path:
    """The session's root, with an image, and all that an engine opens once, opened."""
    hutch_engine.run(ensure_image(hutch_engine, "busybox"), ["true"], network="none")
    return hutch_engine.root


@pytest.fixture
def cli(busybox_root: Path) -> Cli:
    """The command line on a root that has the image `busybox`."""
    return Cli(busybox_root)


@pytest.fixture
def name(hutch_engine: Engine) -> Iterator[str]:
    """A fresh name; an instance that has it at the end is removed."""
    chosen = f"cli-{uuid.uuid4().hex[:12]}"
    yield chosen
    for info in hutch_engine.list(all=True, filters={"name": [chosen]}):
        hutch_engine.get(info.id).remove(force=True, volumes=True)


@pytest.fixture
def terminal(cli: Cli) -> Iterator[Callable[..., Terminal]]:
    """Start commands on terminals of their own."""
    made: list[Terminal] = []

    def start(*args: str, rows: int = 24, columns: int = 80) -> Terminal:
        made.append(Terminal([*cli.argv, *args], rows, columns))
        return made[-1]

    yield start
    for one in made:
        one.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = _DEADLINE_S) -> None:
    """Wait for a condition with a deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.02)
