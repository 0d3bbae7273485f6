"""Machines without a machine: the monitor under the real launcher, with any program in the
place of QEMU and the test itself at the guest's end of the agent's channel."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec

from hutch.plan import flags, ops, wire
from hutch.process import (
    Guest,
    Launcher,
    MonitorConfig,
    MonitorLink,
    Supervisor,
    attach_flags,
    encode_config,
)
from hutch.process import frames as fr

HELLO, OPEN, DATA, EOF, CLOSE, CREDIT = range(1, 7)
CALL, SPAWN, EXEC, FILES, ADOPT = range(1, 6)
WINDOW = 64 << 10
SLEEP = ("/bin/sleep", "1000")
COLLECT = attach_flags(stdin=True, stdout=True, stderr=True, lossless=True)
WAIT_S = 60.0


class Frame(msgspec.Struct, frozen=True):
    channel: int
    type: int
    flag: int = 0
    payload: bytes = b""

    def encoded(self) -> bytes:
        return struct.pack("<IBBHI", self.channel, self.type, self.flag, 0, len(self.payload)) + (
            self.payload
        )


class Peer:
    """The guest's end of the agent's channel, driven by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rest = b""
        self.credit: dict[int, int] = {}  # what may be sent
        self.kept: list[Frame] = []
        self.ending: set[int] = set()  # closed here, the monitor's CLOSE is to come

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send(self, channel: int, type: int, payload: bytes = b"", flag: int = 0) -> None:
        self.raw(Frame(channel, type, flag, payload).encoded())

    def _read(self) -> Frame:
        while True:
            if self.rest[:4] == b"\xff" * 4:  # what ends a frame that was cut off
                self.rest = self.rest.lstrip(b"\xff")
            if len(self.rest) >= 12:
                channel, type, flag, zero, length = struct.unpack_from("<IBBHI", self.rest)
                assert zero == 0 and length <= 32 << 10
                if len(self.rest) >= 12 + length:
                    payload = self.rest[12 : 12 + length]
                    self.rest = self.rest[12 + length :]
                    return Frame(channel, type, flag, payload)
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError("the monitor closed the channel")
            self.rest += data

    def frame(self) -> Frame:
        """Return the next frame but CREDIT, which is only counted, and answers to CLOSE."""
        if self.kept:
            return self.kept.pop(0)
        while True:
            frame = self._read()
            if frame.type == OPEN:
                self.credit[frame.channel] = WINDOW
            if frame.type == CLOSE and frame.channel in self.ending:
                self.ending.remove(frame.channel)
                continue
            if frame.type != CREDIT:
                return frame
            self.credit[frame.channel] += struct.unpack("<I", frame.payload)[0]

    def expect(self, type: int, channel: int | None = None) -> Frame:
        frame = self.frame()
        assert frame.type == type and channel in (None, frame.channel), frame
        return frame

    def welcome(self) -> None:
        """Answer the HELLO."""
        hello = self.expect(HELLO, 0)
        nonce, version = struct.unpack("<QI", hello.payload)
        assert version == 1
        self.send(0, HELLO, struct.pack("<QIIQ", nonce, 1, 512, 123))

    def opened(self, kind: int) -> int:
        frame = self.expect(OPEN)
        assert frame.flag == kind, frame
        return frame.channel

    def collected(self, channel: int, size: int) -> bytes:
        """Receive exactly so many bytes of a channel, granting them anew."""
        data = b""
        while len(data) < size:
            frame = self.expect(DATA, channel)
            data += frame.payload
            self.send(channel, CREDIT, struct.pack("<I", len(frame.payload)))
        assert len(data) == size, (len(data), size)
        return data

    def to_eof(self, channel: int) -> bytes:
        data = b""
        while (frame := self.frame()).type == DATA:
            assert frame.channel == channel
            data += frame.payload
            self.send(channel, CREDIT, struct.pack("<I", len(frame.payload)))
        assert (frame.type, frame.channel) == (EOF, channel), frame
        return data

    def data(self, channel: int, data: bytes) -> None:
        """Send bytes, waiting for credit; frames that come meanwhile are kept."""
        view = memoryview(data)
        while view:
            while not self.credit[channel]:
                frame = self._read()
                if frame.type == CREDIT:
                    self.credit[frame.channel] += struct.unpack("<I", frame.payload)[0]
                else:
                    self.kept.append(frame)
            piece = view[: min(self.credit[channel], 32 << 10)]
            self.credit[channel] -= len(piece)
            self.send(channel, DATA, bytes(piece))
            view = view[len(piece) :]

    def close(self, channel: int, errno: int = 0) -> None:
        self.ending.add(channel)
        self.send(channel, CLOSE, struct.pack("<I", errno))

    def closed(self, channel: int) -> int:
        frame = self.expect(CLOSE, channel)
        return int(struct.unpack("<I", frame.payload)[0])

    def answer(
        self, channel: int, errno: int = 0, index: int = 0, detail: bytes = b"", rest: bytes = b""
    ) -> None:
        """Answer a CALL and end it."""
        head = struct.pack("<III", errno, index, len(detail)) + detail + b"\0"
        self.data(channel, head + rest)
        self.send(channel, EOF)
        self.close(channel)

    def shutdown(self) -> None:
        """Answer the SHUTDOWN at the end."""
        channel = self.opened(CALL)
        assert self.to_eof(channel) == struct.pack("<II", 3, 0)
        self.answer(channel)


class Process:
    """The main process as the guest's supervisor would tell of it."""

    def __init__(self, peer: Peer, plan: bytes) -> None:
        self.peer = peer
        self.channel = peer.opened(SPAWN)
        size = struct.unpack("<I", peer.collected(self.channel, 4))[0]
        self.rest = b""
        assert self.read(size) == plan
        assert self.frame() == (fr.ATTACH, 15, b"")

    def read(self, size: int) -> bytes:
        while len(self.rest) < size:
            frame = self.peer.expect(DATA, self.channel)
            self.rest += frame.payload
            self.peer.send(self.channel, CREDIT, struct.pack("<I", len(frame.payload)))
        data, self.rest = self.rest[:size], self.rest[size:]
        return data

    def frame(self) -> tuple[int, int, bytes]:
        """Return the next frame that the monitor sends: type, flag, payload."""
        kind, flag, length = fr.parse_head(self.read(8))
        return kind, flag, self.read(length)

    def tell(self, kind: int, payload: bytes = b"", flag: int = 0) -> None:
        self.peer.data(self.channel, fr.encode_frame(kind, payload, flag))

    def started(self) -> None:
        self.tell(fr.STARTED, struct.pack("<Q", 5))

    def output(self, data: bytes, stream: int = 1) -> None:
        for at in range(0, len(data), 30000):
            self.tell(fr.OUTPUT, data[at : at + 30000], stream)

    def exit(self, code: int) -> None:
        self.tell(fr.EXIT, struct.pack("<iiQQ", code, 0, 1, 2))
        # A monitor that tidies nothing up may have ended at the word.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.peer.close(self.channel)


class Machine(msgspec.Struct, kw_only=True):
    """A monitor that runs, and everything that a test talks to it with."""

    supervisor: Supervisor
    link: MonitorLink
    peer: Peer
    guest: Guest
    config: MonitorConfig
    log: Path

    def boot(self) -> Process:
        """Go through a start as the guest; return the process."""
        self.peer.welcome()
        if self.config.setup:
            channel = self.peer.opened(CALL)
            assert self.peer.to_eof(channel) == self.config.setup
            self.peer.answer(channel)
        process = Process(self.peer, self.config.plan)
        process.started()
        self.link.wait_started(WAIT_S)
        return process

    def template(self) -> None:
        """The same without a process."""
        self.peer.welcome()
        self.link.wait_ready(WAIT_S)


PLAN = wire.encode(ops.Plan(child=(ops.Exec(argv=("/bin/true",), env=()),)))
NAMESPACES = flags.CLONE_NEWPID | flags.CLONE_NEWNS | flags.CLONE_NEWIPC | flags.CLONE_NEWUTS


class Machines:
    """Starts monitors with the launcher, in a PID namespace of their own."""

    def __init__(self, launcher: Launcher, vmm: str, env: tuple[str, ...], directory: Path) -> None:
        self.launcher = launcher
        self.vmm = vmm
        self.env = env
        self.directory = directory

    def _plan(self, tty: bool, fds: int, stdin: bool) -> ops.Plan:
        child: list[ops.AnyOp] = [
            ops.Propagation(path="/", flags=flags.MS_REC | flags.MS_PRIVATE),
            ops.RootDir(path="/"),
            ops.Mount(
                fstype="devpts",
                target="/dev/pts",
                source="devpts",
                options=("newinstance", "ptmxmode=0666", "mode=0620"),
            ),
            ops.PivotRoot(),
            ops.SetsidTty(tty=tty, rows=24, columns=80),
            ops.Inherit(slots=tuple(range(fds))),
            ops.Exec(argv=(self.vmm,), env=self.env),
        ]
        held = ops.Supervision(tty=tty, stdin_open=stdin, linger=False)
        return ops.Plan(clone_flags=NAMESPACES, child=tuple(child), slots=fds, supervision=held)

    @contextmanager
    def run(
        self,
        *,
        qemu: tuple[str, ...] = SLEEP,
        plan: bytes = PLAN,
        configuration: bytes | None = None,
        stdin: bool = True,
        attach: int = COLLECT,
        qemu_has_agent: bool = False,
        screen: int | None = None,
        connection: socket.socket | None = None,
        said: int | None = None,
        shares: socket.socket | None = None,
        **options: object,
    ) -> Iterator[Machine]:
        """Run a monitor for the length of the block; its end is the monitor's.

        `screen` takes the place of agent.sock, `connection` is the monitor's connection to QEMU.
        With `qemu_has_agent` the guest's end of the channel is the program's descriptor 11,
        and the test has only its copy. `said` is the read end of the console's pipe, `shares`
        the connection to a server of shared directories.
        """
        with ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.callback(ours.close)
            ours.settimeout(WAIT_S)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(self.directory / "agent.sock"))
            stack.callback(os.unlink, self.directory / "agent.sock")
            listener.listen(300)
            link, status = MonitorLink.create()
            stack.enter_context(link)
            fds = [0, theirs.fileno(), listener.fileno(), status.fileno()]
            for name in ("qemu.log", "console.log"):
                fds.append(os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
                stack.callback(os.close, fds[-1])
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, null)
            fds.append(null if said is None else said)
            fds.append(null if shares is None else shares.fileno())
            own = len(fds)
            if screen is not None:
                fds[2] = screen
            if connection is not None:
                fds.append(connection.fileno())
            if qemu_has_agent:
                ours.settimeout(None)  # programs in the place of QEMU wait when they read
                fds.append(ours.fileno())
            config = MonitorConfig(
                argv=qemu,
                plan=plan,
                qemu_fds=len(fds) - own,
                **options,  # type: ignore[arg-type]
            )
            fds[0] = _memory(encode_config(config) if configuration is None else configuration)
            stack.callback(os.close, fds[0])
            supervisor = stack.enter_context(
                self.launcher.start(self._plan(config.tty, len(fds), stdin), fds, attach=attach)
            )
            for end in (theirs, status):
                end.close()
            if qemu_has_agent:
                ours.close()
            stack.callback(_end, supervisor)
            supervisor.wait_started(WAIT_S)
            yield Machine(
                supervisor=supervisor,
                link=link,
                peer=Peer(ours),
                guest=Guest(str(self.directory)),
                config=config,
                log=self.directory / "qemu.log",
            )


def _end(supervisor: Supervisor) -> None:
    try:
        supervisor.shutdown()
        supervisor.wait(WAIT_S)
    except ProcessLookupError:
        pass


def _memory(data: bytes) -> int:
    fd = os.memfd_create("configuration", os.MFD_CLOEXEC)
    os.write(fd, data)
    return fd
