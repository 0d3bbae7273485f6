"""What the two sides of a migration say to each other (docs/reference/migration.md)."""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
from functools import cache
from typing import Any

import msgspec

from hutch import errors
from hutch.drivers.moving import Streams
from hutch.drivers.vm.kernels import KernelRecord
from hutch.host.processors import HostProcessor
from hutch.image.records import ImageRecord

__all__ = ["ERRORS", "Abort", "Aborted", "Address", "Answer", "Ask", "Begin", "Begun", "Channel"]
__all__ += [
    "Commit",
    "Committed",
    "Failed",
    "Criu",
    "Forget",
    "Forgotten",
    "Hello",
    "Live",
    "Loaded",
]
__all__ += ["Message", "Offer", "Opened", "Prepare", "Prepared", "Ready", "Status", "Stream"]
__all__ += ["Switch", "Switched", "VolumeOffer", "failure"]

ERRORS: dict[str, type[errors.HutchError]] = {
    name: getattr(errors, name) for name in errors.__all__
}


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """The base of them all."""

    @staticmethod
    @cache
    def union() -> Any:
        """Return the type that any message decodes as."""
        kinds = Message.__subclasses__()
        union: Any = kinds[0]
        for kind in kinds[1:]:
            union |= kind
        return union


class Hello(Message, frozen=True, tag="hello"):
    """Both, first: the protocol's version and who speaks."""

    version: int
    hutch: str


class VolumeOffer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A volume of the instance. `sent`: its files come along; else it must be there."""

    name: str
    sent: bool
    anonymous: bool = False
    labels: dict[str, str] = {}
    size: int = 0


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance is called in one of its networks."""

    network: str
    ipv4: str = ""
    ipv6: str = ""
    mac: str = ""


class Live(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of a machine that comes while it runs: how its memory travels, the size of its disk,
    its addresses in the order of its network cards, the record of its driver, and what its
    processors are: the model without the features that it is `lacking`, or the host's own."""

    streams: Streams
    disk_size: int
    addresses: tuple[Address, ...] = ()
    machine: str = ""
    accelerator: str = ""
    cpu: str = ""
    processor: HostProcessor = HostProcessor()
    lacking: tuple[str, ...] = ()


class Criu(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of a container that comes with its memory: which CRIU saves it, on which kernel, and its
    addresses."""

    version: str
    kernel: str
    addresses: tuple[Address, ...] = ()


class Offer(Message, frozen=True, tag="offer"):
    """Source: what would come. `instance` is the record as the source's engine has it, and
    `size` what the instance's own files take; `image` is None for a machine that starts from a
    disk of its own. `qemu` is the version that a saved memory needs; `live` that it comes while
    it runs, `criu` that a container comes with its memory."""

    token: str
    instance: msgspec.Raw
    image: ImageRecord | None
    size: int
    kernel: KernelRecord | None = None
    volumes: tuple[VolumeOffer, ...] = ()
    qemu: str = ""
    live: Live | None = None
    criu: Criu | None = None


class Answer(Message, frozen=True, tag="answer"):
    """Target: what stands in the way, or else what is missing there."""

    obstacles: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    kernel: bool = False


class Stream(Message, frozen=True, tag="stream"):
    """Source: a byte stream follows. `kind` is blob, kernel, ahead and upper (a layer, before it
    stands still and then), kept (names of files that are as they came ahead), disk, changes,
    file, tail (what belongs behind the first `size` bytes of a log) or volume; `end`: no more
    of image and kernel, and no bytes."""

    kind: str
    name: str = ""
    size: int = 0


class Ready(Message, frozen=True, tag="ready"):
    """Target: image and kernel are there; now the source may stop the instance."""


class Prepare(Message, frozen=True, tag="prepare"):
    """Source: all has been sent; `instance` is the record as it is to be, `previous` its
    state once it is the target's, and `resume` that it is to be started then."""

    instance: msgspec.Raw
    previous: str
    resume: bool = False


class Prepared(Message, frozen=True, tag="prepared"):
    """Target: the instance is on disk, and inert."""

    id: str


class Channel(Message, frozen=True, tag="channel"):
    """Source, on a link of its own: from the answer on it is a stream of a machine on its way,
    `disk` or `memory`."""

    token: str
    name: str


class Opened(Message, frozen=True, tag="opened"):
    """Target: bytes from now on."""


class Begin(Message, frozen=True, tag="begin"):
    """Source: the memory is about to come, its streams are open."""


class Begun(Message, frozen=True, tag="begun"):
    """Target: it is waited for."""


class Switch(Message, frozen=True, tag="switch"):
    """Source: the machine is stopped, its disk complete; `unacked` bytes of its input were not
    taken by its program."""

    unacked: int


class Switched(Message, frozen=True, tag="switched"):
    """Target: the disk is the machine's; the last of its memory may come."""


class Loaded(Message, frozen=True, tag="loaded"):
    """Target: the machine could run here, and does not."""


class Commit(Message, frozen=True, tag="commit"):
    """Source: it has given its instance up; the target's is the one."""

    token: str


class Committed(Message, frozen=True, tag="committed"):
    """Target: it may be started. `problem` says why it was not, where that was asked for. A
    machine that came live runs: its processors since `resumed_s` after the Commit came, which
    is answered after `answered_s`."""

    problem: str = ""
    resumed_s: float = 0.0
    answered_s: float = 0.0


class Abort(Message, frozen=True, tag="abort"):
    """Source: the instance stays; what was prepared goes."""

    token: str


class Aborted(Message, frozen=True, tag="aborted"):
    """Target: nothing of it is left."""


class Ask(Message, frozen=True, tag="ask"):
    """Source, after a failure: how far is this migration at the target?"""

    token: str


class Status(Message, frozen=True, tag="status"):
    """Target: unknown, preparing, prepared, active, or declined: it never ran there."""

    phase: str


class Forget(Message, frozen=True, tag="forget"):
    """Source: it has removed its instance and will not ask again."""

    token: str


class Forgotten(Message, frozen=True, tag="forgotten"):
    """Target: it has forgotten the migration, not the instance."""


class Failed(Message, frozen=True, tag="failed"):
    """Either: it gives up; `kind` is a class of `hutch.errors`."""

    kind: str
    message: str
    hint: str = ""


def failure(exc: BaseException) -> Failed:
    """Return the message that tells an error."""
    if isinstance(exc, errors.HutchError):
        return Failed(kind=type(exc).__name__, message=exc.message, hint=exc.hint or "")
    if isinstance(exc, KeyboardInterrupt):
        return Failed(kind="Unavailable", message="interrupted")
    return Failed(kind="InternalError", message=f"{type(exc).__name__}: {exc}")
