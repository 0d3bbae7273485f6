"""A process in namespaces of its own that runs commands and reports how long each took.

Commands come as JSON lines on standard input (argv), answers go out as JSON lines:
[seconds, exit status]. Used for peers that need another view of the machine: crun refuses
the hybrid cgroup layout, so its worker runs where the unified hierarchy is not mounted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import TracebackType

import msgspec

__all__ = ["Worker"]


class Worker:
    """The starter's side: a context manager around the worker process."""

    def __init__(self, *prepare: str) -> None:
        """`prepare` are shell commands run once in the new mount namespace."""
        script = " && ".join([*prepare, 'exec "$@"'])
        self._process = subprocess.Popen(
            [
                *("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"),
                *(sys.executable, "-m", "bench.worker"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, argv: list[str]) -> float:
        """Run a command there; return the seconds it took; raise where it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(argv) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the worker ended")
        seconds, status = msgspec.json.decode(line, type=tuple[float, int])
        if status:
            raise RuntimeError(f"{argv[0]} ended with {status}")
        return seconds

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def main() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for line in sys.stdin.buffer:
        argv = msgspec.json.decode(line, type=list[str])
        began = time.perf_counter()
        done = subprocess.run(argv, stdin=null, stdout=null)
        answer = (time.perf_counter() - began, done.returncode)
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
