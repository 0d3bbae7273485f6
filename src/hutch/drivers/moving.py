"""What drivers offer whose instances go to another host while they run: both sides' steps.

The engine has the link to the other side, and says when; a driver does each step here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import msgspec

if TYPE_CHECKING:
    import socket

__all__ = ["Arrival", "CopyState", "Departure", "Held", "Holdable", "Landing", "Movable"]
__all__ += ["Streams"]


class Streams(msgspec.Struct, frozen=True, kw_only=True):
    """How a running machine's memory travels; both sides must mean the same. `channels` are
    streams beside the first, `compress` needs one at least; `post_copy` lets it run at the
    target before all of its memory is there."""

    post_copy: bool = False
    channels: int = 0
    compress: bool = False


class Landing(Protocol):
    """A machine at the target that waits for its memory; see `Movable` for the other side.

    The steps are in this order. Who connects to `disk.sock` and `memory.sock` of the run
    directory, which `listen` makes, carries the streams.
    """

    def listen(self) -> None:
        """Make it ready for its disk."""
        ...

    def begin(self) -> None:
        """Make it ready for its memory; the streams are connected."""
        ...

    def watch(self, fd: int) -> None:
        """Wait until a descriptor is readable; raise `Unavailable` when QEMU gives up."""
        ...

    def end_disk(self) -> None:
        """Take no more of the disk."""
        ...

    def wait_loaded(self) -> None:
        """Wait until it could run, and does not; its network cards are unplugged."""
        ...

    def go(self) -> None:
        """Let it run."""
        ...


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A running instance that another host still has. `receive` takes it over, and returns
    what of its input its program had not taken (bytes); when it returns, the instance runs
    here. What it raises undoes the start. `machine` is what the source's driver says of it."""

    cards: int
    machine: bytes
    accelerator: Literal["kvm", "tcg"]
    streams: Streams
    receive: Callable[[Landing], int]


class CopyState(msgspec.Struct, frozen=True, kw_only=True):
    """How far a machine's memory is: bytes still to send of `total`, what is sent a second,
    how often all of it was gone through, and how much the guest is slowed down (percent)."""

    remaining: int
    total: int
    sent: int
    rate: int
    passes: int
    throttle: int = 0


class Departure(Protocol):
    """A running instance that is copied to another host, step by step in this order. Left at
    any of them, it runs on here."""

    waits: bool
    """Whether it is only stopped when the target's answers have come through. Where it does
    not wait, its streams are to be held before the memory is begun."""
    stopped_at: float
    """Since when it stands still, by `time.monotonic`; 0 while it runs."""

    def mirror(self, connection: int) -> None:
        """Begin to copy the disk over a connected socket."""
        ...

    def mirrored(self) -> tuple[int, int]:
        """Return the bytes done of those to do; equal when the copy follows the disk."""
        ...

    def begin(self, connection: int) -> None:
        """Begin to copy the memory over a connected socket."""
        ...

    def begin_parallel(self) -> socket.socket:
        """Begin to copy the memory by several connections, which come to the socket that is
        returned, the caller's to close; the first of them is the one that answers come by."""
        ...

    def copying(self) -> CopyState:
        """Return how far the memory is; raise `Unavailable` when it does not get across."""
        ...

    def hold_streams(self) -> int:
        """Hold what goes in and out of the program still; return the bytes of its input that
        it has not taken."""
        ...

    def allow(self) -> None:
        """Let it be stopped when what is left can be sent in the time it may stand still. To be
        called before the target's answers come through."""
        ...

    def wait_stopped(self, timeout_s: float) -> bool:
        """Wait until it is stopped for the last of its memory, which the other side must
        allow for by its answers; False when the time is up."""
        ...

    def hurry(self) -> None:
        """Stop it now: the rest of its memory is what it is, or follows later."""
        ...

    def end_mirror(self) -> None:
        """End the copy of the disk; all of it is there."""
        ...

    def finish(self) -> bool:
        """Send the last of the memory, with `post_copy` perhaps only what it takes to run; tell
        whether all of it is there."""
        ...

    def let_go(self) -> None:
        """Leave it standing still even where this process is killed from now on."""
        ...

    def wait_complete(self, timeout_s: float) -> None:
        """With `post_copy`: wait until all of its memory has been fetched."""
        ...


@runtime_checkable
class Movable(Protocol):
    """A driver whose instances can go to another host while they run."""

    def depart(
        self, identifier: str, *, cards: int, streams: Streams, bandwidth: int, downtime_s: float
    ) -> AbstractContextManager[Departure]:
        """Copy a running instance; leaving the block before `let_go` lets it go on."""
        ...

    def describe(self, identifier: str) -> bytes:
        """Return what the target's driver must know of a running instance."""
        ...

    def run_on(self, identifier: str) -> None:
        """Let an instance go on whose copying was cut short; safe to repeat."""
        ...

    def plug_in(self, identifier: str, *, cards: int) -> None:
        """Plug in the network cards of an instance that has arrived, and set its clock."""
        ...

    def wait_arrived(self, identifier: str, fd: int) -> None:
        """With `post_copy`: wait until all the memory of an instance that runs here already is
        there. Raise `Unavailable` when it never will be; `fd` becomes readable when the source
        says something or is gone."""
        ...

    def answers(self, identifier: str) -> bool:
        """Tell whether what is inside an instance that runs is heard of."""
        ...


class Held(Protocol):
    """A running instance that stands still to be saved."""

    def save_memory(self, target: str) -> None:
        """Save its processes to an empty directory."""
        ...

    def let_go(self) -> None:
        """Leave it standing still from now on, until somebody ends or awakens it."""
        ...


@runtime_checkable
class Holdable(Protocol):
    """A driver whose instances go to another host as what is saved of them."""

    def hold_still(self, identifier: str) -> AbstractContextManager[Held]:
        """Stop a running instance; leaving the block before `let_go` lets it go on."""
        ...
