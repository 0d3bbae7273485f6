"""A real QEMU without a guest, and a fake one that says what a test wants it to."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hutch.process.run import spawn

__all__ = ["GREETING", "OK", "QEMU", "Talk", "fake_qemu", "qemu"]

QEMU = os.environ.get("HUTCH_TEST_QEMU", "qemu-system-x86_64")
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"},'
    b' "capabilities": ["oob"]}}\r\n'
)
Talk = Callable[[socket.socket], object]
OK = b'{"return": {}, "id": %d}\r\n'


@contextmanager
def qemu(directory: Path, *arguments: str) -> Iterator[Path]:
    """Run QEMU with this monitor socket, listening before QEMU starts; yields its path."""
    path = directory / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        argv = [
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-S"),
            *("-accel", "tcg", "-m", "16"),
            *("-chardev", f"socket,id=qmp,fd={listening.fileno()},server=on,wait=off"),
            *("-mon", "chardev=qmp,mode=control"),
            *arguments,
        ]
        with (
            open(directory / "qemu.log", "ab") as log,
            spawn(argv, stderr=log, pass_fds=[listening.fileno()]) as process,
        ):
            listening.close()  # QEMU's alone, so that nothing listens once it has gone
            yield path
            process.kill()


@contextmanager
def fake_qemu(talk: Talk) -> Iterator[socket.socket]:
    """Let `talk` play QEMU at the other end of the socket that is yielded."""
    ours, theirs = socket.socketpair()

    def play() -> None:
        with theirs:
            try:
                talk(theirs)
            except OSError:
                pass  # the client has had enough

    thread = threading.Thread(target=play)
    thread.start()
    try:
        with ours:
            yield ours
    finally:
        # The monitor may have closed its own copy of the descriptor only.
        ours.close()
        thread.join()
