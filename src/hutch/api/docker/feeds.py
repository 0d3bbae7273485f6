"""The streams of one program and the clients that take part: who reads slowly makes the
program wait, as at a pipe; who leaves is forgotten."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from hutch.aio.session import Session
from hutch.api.docker.frames import frame
from hutch.api.docker.http import Gone
from hutch.engine.session import Session as EngineSession
from hutch.process.frames import Output

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.process.supervisor import Supervisor

__all__ = ["Client", "Feed", "KeyScanner", "Pipe", "SharedFeeds", "parse_keys"]

_DEFAULT_KEYS = b"\x10\x11"  # ctrl-p, ctrl-q


class Pipe(Protocol):
    """The client's end: a hijacked connection or a WebSocket."""

    async def send_head(self) -> None:
        """Tell the client that it is connected; before the first write."""

    async def read(self) -> bytes:
        """Return what it sent, b"" when it sends no more."""

    async def write(self, data: bytes) -> None:
        """Send; raise `Gone`."""

    async def wait_gone(self) -> None:
        """Return when it has left altogether."""


class Client:
    """One who takes part in a program's streams, from when there are any."""

    def __init__(
        self,
        pipe: Pipe,
        *,
        stdin: bool,
        stdout: bool,
        stderr: bool,
        multiplexed: bool,
        ends_input: bool,
        keys: bytes,
    ) -> None:
        self.pipe = pipe
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self._multiplexed = multiplexed
        self._ends_input = ends_input
        self._keys = keys
        self._ended = asyncio.Event()
        self._begun: asyncio.Future[Feed | None] = asyncio.get_running_loop().create_future()

    def start_with(self, feed: Feed) -> None:
        """The program's streams are these."""
        if not self._begun.done():
            self._begun.set_result(feed)

    def start_without(self) -> None:
        """Somebody else started it: its streams are to be joined anew."""
        if not self._begun.done():
            self._begun.set_result(None)

    def finish(self) -> None:
        """Nothing more comes."""
        self.start_without()
        self._ended.set()

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes."""
        return self._ended.is_set()

    async def begun(self) -> Feed | None:
        """Wait for the streams; None when they are to be joined anew, if there are any."""
        return await asyncio.shield(self._begun)

    async def attend(self, feed: Feed) -> None:
        """Take part until the program ends, the client leaves, or presses the detach keys."""
        try:
            await self._carry(feed.session)
        finally:
            self.finish()
            feed.discard(self)

    async def take(self, piece: Output) -> None:
        """Send a piece of output to the client; waits while it does not read."""
        if not (self.stdout if piece.stream == 1 else self.stderr):
            return
        data = frame(piece.stream, piece.data) if self._multiplexed else piece.data
        await self.pipe.write(data)

    async def _carry(self, session: Session) -> None:
        waits: set[asyncio.Future[Any]] = {
            asyncio.ensure_future(self._ended.wait()),
            asyncio.ensure_future(self.pipe.wait_gone()),
        }
        typing = asyncio.ensure_future(self._type(session))
        waits.add(typing)
        try:
            while True:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if done - {typing} or (typing in done and typing.result()):
                    return
                # Its input has ended, which says nothing about the output.
                waits.discard(typing)
        finally:
            await _cancel([*waits, typing])

    async def _type(self, session: Session) -> bool:
        """Carry input; return whether the client has detached."""
        scanner = KeyScanner(self._keys)
        while data := await self.pipe.read():
            if not self.stdin:
                continue
            typed, detached = scanner.scan(data)
            try:
                await session.send(typed)
            except OSError:
                return False
            if detached:
                return True
        if self.stdin and self._ends_input:
            await session.close_stdin()
        return False


async def _cancel(tasks: list[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Feed:
    """Carries the output of one connection to a supervisor to its clients. With `keep` it
    goes on without any, until the program has ended."""

    def __init__(self, front: Front, link: Supervisor, *, keep: bool = False) -> None:
        self.link = link
        self.session = Session(front.slow, EngineSession(link))
        self._clients: list[Client] = []
        self._keep = keep
        self.is_over = False

    def add(self, client: Client) -> None:
        """Let a client take part."""
        self._clients.append(client)
        client.start_with(self)

    def discard(self, client: Client) -> None:
        """A client has left; with the last one, the connection is given up."""
        if client in self._clients:
            self._clients.remove(client)
        if not self._clients and not self._keep:
            self.is_over = True
            self.session.close()

    async def run(self) -> int | None:
        """Carry output until the program has ended; return its exit code where it is known."""
        try:
            async for piece in self.session.output():
                if isinstance(piece, Output):
                    await self._give(piece)
            status = self.link.exit_status
            return None if status is None else status.code
        finally:
            self.is_over = True
            for client in self._clients:
                client.finish()
            self.session.close()

    async def _give(self, piece: Output) -> None:
        for client in list(self._clients):
            try:
                if not client.is_over:
                    await client.take(piece)
                    continue
            except Gone:
                client.finish()
            self.discard(client)


class SharedFeeds:
    """The connections to programs that run, one for all who join one: a supervisor has room
    for some sixty."""

    def __init__(self) -> None:
        self._feeds: dict[str, Feed] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def lock(self, identifier: str) -> asyncio.Lock:
        """Return what whoever joins a program holds meanwhile."""
        found = self._locks.get(identifier)
        if found is None:
            found = self._locks[identifier] = asyncio.Lock()
        return found

    def get(self, identifier: str) -> Feed | None:
        """Return the feed of a program, None where nobody has joined it."""
        found = self._feeds.get(identifier)
        return None if found is None or found.is_over else found

    def add(self, identifier: str, feed: Feed) -> None:
        """Have others join a feed, which is to be `run`."""
        self._feeds[identifier] = feed

    async def run(self, identifier: str, feed: Feed) -> None:
        """Run a feed that was added, until it is over."""
        try:
            await feed.run()
        finally:
            if self._feeds.get(identifier) is feed:
                del self._feeds[identifier]


class KeyScanner:
    """Finds the detach keys in what is typed; half a match is held back until it is decided."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._matched = 0

    def scan(self, data: bytes) -> tuple[bytes, bool]:
        """Return what goes to the program, and whether the keys were pressed."""
        if not self._keys:
            return data, False
        out = bytearray()
        for byte in data:
            if byte == self._keys[self._matched]:
                self._matched += 1
                if self._matched == len(self._keys):
                    return bytes(out), True
                continue
            out += self._keys[: self._matched]
            self._matched = int(byte == self._keys[0])
            if not self._matched:
                out.append(byte)
        return bytes(out), False


def parse_keys(text: str | None) -> bytes:
    """Read `ctrl-p,ctrl-q`, `ctrl-],x`, by Docker's rules; raise `ValueError`."""
    if not text:
        return _DEFAULT_KEYS
    keys = bytearray()
    for word in text.split(","):
        control = word.lower().removeprefix("ctrl-")
        if len(word) == 1 and word.isascii():
            keys.append(ord(word))
        elif word != control and len(control) == 1 and "a" <= control <= "z":
            keys.append(ord(control) - 96)
        elif word != control and control in tuple("@[\\]^_"):
            keys.append(ord(control) - 64)
        else:
            raise ValueError(f"unknown character: '{word}'")
    return bytes(keys)
