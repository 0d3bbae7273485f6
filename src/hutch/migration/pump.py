"""Carry a stream of QEMU's over a link: bytes both ways, in bounded memory, until either ends."""

from __future__ import annotations

import os
import select
import socket
import threading

from hutch.migration.pace import Pace

__all__ = ["Pump", "carry"]

_PIECE = 1 << 20
# A stream that is bounded goes by pieces of so many parts of a second, and a page at least.
_PER_SECOND = 20
_PIECE_MIN = 4096


class Pump:
    """Carries bytes between a local socket and a link, each direction in a thread of its own.

    With `gate` nothing of what the other side says comes through until that is set. `sent`
    counts what has gone out, at most `bandwidth` bytes a second where that is not 0. Closing it
    ends both connections' use, not their descriptors.
    """

    def __init__(
        self,
        local: socket.socket,
        link: socket.socket,
        *,
        gate: threading.Event | None = None,
        bandwidth: int = 0,
    ) -> None:
        self.sent = 0
        self._closed = threading.Event()
        self._pace = Pace(bandwidth, sleep=self._closed.wait)
        self._local = local
        self._link = link
        self._gate = gate
        self._threads = [
            threading.Thread(target=self._out, name="hutch-pump-out", daemon=True),
            threading.Thread(target=self._in, name="hutch-pump-in", daemon=True),
        ]
        local.setblocking(True)
        link.setblocking(True)

    def __enter__(self) -> Pump:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Carry no more; both threads have ended when it returns."""
        self._closed.set()
        for end in (self._local, self._link):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other side was quicker
        if self._gate is not None:
            self._gate.set()
        for thread in self._threads:
            thread.join()

    def _out(self) -> None:
        buffer = memoryview(bytearray(self._piece()))
        try:
            while count := self._local.recv_into(buffer):
                self._pace.wait(count)
                if self._closed.is_set():
                    return  # both ends are shut down, or are about to be
                self._link.sendall(buffer[:count])
                self.sent += count
        except OSError:
            pass  # the stream is broken: who listens at its end hears of it
        _end(self._link)

    def _piece(self) -> int:
        bandwidth = self._pace.bandwidth
        return max(_PIECE_MIN, min(_PIECE, bandwidth // _PER_SECOND)) if bandwidth else _PIECE

    def _in(self) -> None:
        buffer = memoryview(bytearray(_PIECE))
        try:
            while count := self._link.recv_into(buffer):
                if self._gate is not None:
                    self._gate.wait()
                self._local.sendall(buffer[:count])
        except OSError:
            pass
        _end(self._local)


def _end(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def carry(read_fd: int, write_fd: int, local: socket.socket) -> None:
    """Carry bytes between a link's two descriptors and a local socket until both have ended,
    or one is broken. Descriptors are the caller's."""
    flows = {read_fd: (local.fileno(), bytearray()), local.fileno(): (write_fd, bytearray())}
    for fd in (read_fd, write_fd, local.fileno()):
        os.set_blocking(fd, False)
    reading = set(flows)
    try:
        while reading or any(rest for _, rest in flows.values()):
            for fd in _ready(flows, reading):
                _step(fd, flows, reading)
    except OSError:
        return  # broken: the end of this process tells the other side


def _ready(flows: dict[int, tuple[int, bytearray]], reading: set[int]) -> list[int]:
    """Wait; return the sources of the flows that can go on."""
    poll = select.poll()
    wanted: dict[int, int] = {}
    for source, (target, rest) in flows.items():
        if rest:
            wanted[target] = wanted.get(target, 0) | select.POLLOUT
        elif source in reading:
            wanted[source] = wanted.get(source, 0) | select.POLLIN
    for fd, events in wanted.items():
        poll.register(fd, events)
    found = dict(poll.poll())
    return [
        source
        for source, (target, rest) in flows.items()
        if (rest and target in found) or (not rest and source in reading and source in found)
    ]


def _step(source: int, flows: dict[int, tuple[int, bytearray]], reading: set[int]) -> None:
    target, rest = flows[source]
    try:
        if not rest:
            data = os.read(source, _PIECE)
            if not data:
                reading.discard(source)
                _finish(target)
                return
            rest += data
        del rest[: os.write(target, rest)]
    except BlockingIOError:
        return


def _finish(fd: int) -> None:
    """Say that no more comes: a socket's half is closed; a pipe ends with this process."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass
