"""The host's end of the agent channel, in Python and as the documentation has it."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from hutch.plan import guest, guest_answers, ops
from hutch.plan.wire import encode
from hutch.process import frames

HELLO, OPEN, DATA, EOF, CLOSE, CREDIT = range(1, 7)
CALL, SPAWN, EXEC, FILES, ADOPT = range(1, 6)
WINDOW = 65536
PAYLOAD = 32768
PADDING = b"\xff" * (PAYLOAD + 12)  # ends any frame under way and begins none
WAIT_S = 60.0
ATTACH_ALL = (
    frames.ATTACH_STDIN | frames.ATTACH_STDOUT | frames.ATTACH_STDERR | frames.ATTACH_LOSSLESS
)

_HEAD = struct.Struct("<IBBHI")


def frame(channel: int, kind: int, payload: bytes = b"", flag: int = 0) -> bytes:
    return _HEAD.pack(channel, kind, flag, 0, len(payload)) + payload


class Gone(Exception):
    """The agent closed the connection."""


class Peer:
    """One connection to an agent. Frames that arrive are sorted by their channel."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.next_id = 1
        self.channels: dict[int, Channel] = {}
        self.start_ns = 0
        self.pid = 0
        self.wait_s = WAIT_S

    def send(self, data: bytes) -> None:
        self.sock.settimeout(WAIT_S)
        self.sock.sendall(data)

    def hello(self, nonce: bytes = b"12345678", *, keep: bool = False) -> tuple[int, int]:
        """Say HELLO; return the agent's version and number of channels."""
        self.send(frame(0, HELLO, nonce + struct.pack("<I", 1), flag=keep))
        head = _HEAD.pack(0, HELLO, 0, 0, 24) + nonce
        self.channels.clear()
        deadline = time.monotonic() + self.wait_s
        while (at := self.buffer.find(head)) < 0 or len(self.buffer) < at + 36:
            self._receive(deadline)
        version, channels, self.start_ns = struct.unpack_from("<IIQ", self.buffer, at + 20)
        self.buffer = self.buffer[at + 36 :]
        return version, channels

    def _receive(self, deadline: float) -> None:
        self.sock.settimeout(max(0.001, deadline - time.monotonic()))
        data = self.sock.recv(1 << 18)
        if not data:
            raise Gone
        self.buffer += data

    def turn(self, deadline: float | None = None) -> None:
        """Take one frame."""
        deadline = deadline or time.monotonic() + self.wait_s
        while len(self.buffer) < 12:
            self._receive(deadline)
        channel, kind, flag, zero, size = _HEAD.unpack_from(self.buffer)
        assert (flag, zero) == (0, 0) and size <= PAYLOAD
        while len(self.buffer) < 12 + size:
            self._receive(deadline)
        payload, self.buffer = self.buffer[12 : 12 + size], self.buffer[12 + size :]
        self.channels[channel].take(kind, payload)

    def open(self, kind: int) -> Channel:
        channel = Channel(self, self.next_id)
        self.channels[self.next_id] = channel
        self.send(frame(self.next_id, OPEN, flag=kind))
        self.next_id += 1
        return channel

    def call(self, call: guest.Call, argument: bytes = b"") -> guest_answers.Answer:
        channel = self.open(CALL)
        channel.write(guest.encode_call(call, argument))
        channel.eof()
        return guest_answers.decode_answer(channel.rest())

    def setup(self, *operations: guest.SetupOp) -> guest_answers.Answer:
        return self.call(guest.Call.SETUP, guest.encode_setup(operations))

    def files(
        self, request: guest.Files, content: bytes = b""
    ) -> tuple[guest_answers.FilesHead, bytes]:
        channel = self.open(FILES)
        channel.write(guest.encode_files(request) + content)
        channel.eof()
        answer = channel.rest()
        head = guest_answers.decode_files_head(answer)
        assert head is not None, answer
        return head, answer[head.size :]


class Channel:
    """One channel, with the credit of both sides."""

    def __init__(self, peer: Peer, number: int) -> None:
        self.peer, self.number = peer, number
        self.credit, self.owed, self.granted = WINDOW, 0, WINDOW
        self.received = bytearray()
        self.ended, self.closing, self.error = False, False, -1
        self.generous = True  # give credit for what arrives

    def take(self, kind: int, payload: bytes) -> None:
        assert self.error < 0, "a frame after CLOSE"
        if kind == DATA:
            assert not self.ended
            self.granted -= len(payload)
            assert self.granted >= 0, "more than its credit"
            self.received += payload
            self.owed += len(payload)
            if self.generous and self.owed >= WINDOW // 2:
                self.grant()
        elif kind == EOF:
            self.ended = True
        elif kind == CREDIT:
            self.credit += struct.unpack("<I", payload)[0]
        else:
            assert kind == CLOSE
            (self.error,) = struct.unpack("<I", payload)
            del self.peer.channels[self.number]
            if not self.closing:
                self.peer.send(frame(self.number, CLOSE, bytes(4)))

    def grant(self) -> None:
        self.peer.send(frame(self.number, CREDIT, struct.pack("<I", self.owed)))
        self.granted += self.owed
        self.owed = 0

    def write(self, data: bytes) -> None:
        """Write all of it, as the agent's credit allows, unless the agent closes."""
        left = memoryview(data)
        while left and self.error < 0:
            part = bytes(left[: min(self.credit, PAYLOAD)])
            if part:
                self.peer.send(frame(self.number, DATA, part))
                self.credit -= len(part)
                left = left[len(part) :]
            else:
                self.peer.turn()

    def eof(self) -> None:
        if self.error < 0:
            self.peer.send(frame(self.number, EOF))

    def read(self, size: int) -> bytes:
        while len(self.received) < size:
            self.peer.turn()
        data = bytes(self.received[:size])
        del self.received[:size]
        return data

    def rest(self) -> bytes:
        """Return everything up to the agent's CLOSE."""
        while self.error < 0:
            self.peer.turn()
        data = bytes(self.received)
        self.received.clear()
        return data

    def close(self) -> None:
        """Close it from this side and wait for the agent's answer."""
        self.closing = True
        self.peer.send(frame(self.number, CLOSE, bytes(4)))
        self.rest()

    def closed(self) -> int:
        self.rest()
        return self.error

    def supervisor_frame(self) -> tuple[int, int, bytes]:
        kind, flag, _, size = struct.unpack("<BBHI", self.read(8))
        return kind, flag, self.read(size)


class Ran(NamedTuple):
    """What a process behind a SPAWN or EXEC channel did."""

    code: int
    stdout: bytes
    stderr: bytes


class Remote:
    """A process started over a channel; speaks with its supervisor."""

    def __init__(
        self, peer: Peer, kind: int, plan: ops.Plan | None = None, attach: int = 0
    ) -> None:
        self.channel = peer.open(kind)
        self.output = {1: b"", 2: b""}
        if plan is None:
            return
        data = encode(plan)
        ahead = frames.encode_frame(frames.ATTACH, flag=attach) if attach else b""
        self.channel.write(struct.pack("<I", len(data)) + data + ahead)

    def until(self, wanted: int) -> bytes:
        """Return the payload of the next frame of this type; collect output on the way."""
        while True:
            kind, flag, payload = self.channel.supervisor_frame()
            if kind == frames.OUTPUT:
                self.output[flag] += payload
            if kind == wanted:
                return payload
            assert kind != frames.FAILED, payload

    def until_output(self, wanted: bytes, stream: int = 1) -> None:
        while wanted not in self.output[stream]:
            self.until(frames.OUTPUT)

    def say(self, kind: int, payload: bytes = b"", flag: int = 0) -> None:
        self.channel.write(frames.encode_frame(kind, payload, flag))

    def wait(self) -> Ran:
        """Wait for the exit, and for the end of the channel."""
        code: int = struct.unpack_from("<i", self.until(frames.EXIT))[0]
        self.channel.eof()
        assert self.channel.closed() == 0
        return Ran(code, self.output[1], self.output[2])


@contextmanager
def serving(
    agent: str, *, launcher: str, root: Path, upper: Path | None = None, findings: Path
) -> Iterator[Peer]:
    """Run the agent over a socket pair; a sanitizer's finding fails the test."""
    ours, theirs = socket.socketpair()
    options = f"log_path={findings}/asan:detect_leaks=1:handle_segv=0"
    argv = [agent, "--serve", str(theirs.fileno()), "--launcher", launcher, "--root", str(root)]
    argv += ["--upper", str(upper or root)]
    process = subprocess.Popen(
        argv,
        pass_fds=[theirs.fileno()],
        env={"ASAN_OPTIONS": options, "UBSAN_OPTIONS": f"log_path={findings}/ubsan"},
    )
    theirs.close()
    try:
        with ours:
            peer = Peer(ours)
            peer.pid = process.pid
            yield peer
        assert process.wait(WAIT_S) == 0, "the agent ended badly"
    finally:
        process.kill()
        process.wait()
    found = [path.read_text() for path in findings.iterdir()]
    assert not found, found[0]


def waiting_launcher(pid: int) -> int | None:
    """Return the launcher of an agent that waits for a plan, in recvmsg(2)."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):
            if Path(f"/proc/{child}/syscall").read_text().startswith("47 0x3 "):
                return int(child)
    return None


def descriptors(pid: int) -> int:
    """Count an agent's descriptors, when it has a launcher at hand again."""
    deadline = time.monotonic() + WAIT_S
    while waiting_launcher(pid) is None:
        assert time.monotonic() < deadline, "no launcher waits"
        time.sleep(0.01)
    return len(os.listdir(f"/proc/{pid}/fd"))
