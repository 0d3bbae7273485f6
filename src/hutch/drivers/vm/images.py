"""Templates of images: a machine with an image's disks mounted, and a launch that waits.

A clone of a kernel's template still mounts the image and makes the namespaces, mounts and
devices of the program, and these are the same in every instance of an image. So the second
start of an image leaves a second template, made beside it and from nobody's instance: the
kernel's goes on with the image and an empty disk, until the launch waits for what only an
instance knows (`hutch.plan.vm.split_guest`). Later starts go on from there.

An instance's disk must be what the template's guest has mounted: one that is empty still is
replaced by a copy of the template's, and one that is not starts from the kernel's template.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.drivers.base import Launch
from hutch.drivers.vm.shares import shared
from hutch.drivers.vm.templates import IDLE_S, Template, Templates
from hutch.drivers.vm.volumes import volumes
from hutch.errors import Busy, InvalidArgument
from hutch.host.qemu import AcceleratorWish
from hutch.plan.machine.model import Shape
from hutch.plan.ops import Plan
from hutch.plan.vm import SYNC_REST, split_guest
from hutch.plan.wire import encode
from hutch.process.vmm import parked_rest
from hutch.storage.diskchain import chain
from hutch.storage.disks import Disks
from hutch.storage.sparse import copy_sparse, data_ranges

__all__ = ["DISK", "ImageRequest", "ImageTemplates", "Parked", "image_request", "most_kept"]
__all__ += ["sync_directory"]

_FORMAT = 3
# Those that let a launch look for its program; who knows what a profile of one's own forbids.
_KNOWN_FILTERS = ("default", "unconfined")
MOST_VARIABLE = "HUTCH_IMAGE_TEMPLATES"
"""How many are kept: each has a copy of the guest's memory as far as it is in use, some 80 MB.
With 0 there are none."""
_MOST = 4
DISK = "disk"
_WISH, _MAKING = ".wish-", ".making-"
# Whoever makes one has ended by then, however busy the host is.
_MAKING_S = 900.0
_CHUNK = 1 << 20


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """A file whose content a template has seen, and what tells that it is still the same."""

    path: str
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str) -> _File:
        status = os.stat(path)
        return cls(path=path, inode=status.st_ino, size=status.st_size, mtime_ns=status.st_mtime_ns)


class ImageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """All that a template of an image depends on; nothing in it is an instance's own.

    `base` is the key of the kernel's template that it goes on from, `nics` and `on_taps` say
    which cards that has, `root` is the image's disk, `empty` what the writable one is a copy
    of, `files` are the names of the files of ours, and `plan` is the first part of the launch.
    """

    base: str
    kernel: str
    accel: AcceleratorWish
    shape: Shape
    nics: int
    on_taps: bool
    root: _File
    empty: _File
    volatile: bool
    files: tuple[str, ...]
    plan: bytes

    @property
    def key(self) -> str:
        """What the template is called."""
        content = msgspec.msgpack.encode((_FORMAT, self))
        return hashlib.sha256(content).hexdigest()[:32]


class Parked(msgspec.Struct, frozen=True, kw_only=True):
    """The launch of an instance from where a template of its image has it wait: `rest`, and
    the host name that the agent has to set, "" for none."""

    rest: bytes
    hostname: str = ""


def image_request(
    launch: Launch, plan: Plan, disks: Disks, *, base: str, shape: Shape, on_taps: bool
) -> tuple[ImageRequest, Parked] | None:
    """Return what template a launch can go on from, and its own part of the plan; None where
    there can be none."""
    if (
        shared(launch)
        or volumes(launch)
        or launch.saved is not None
        or launch.spec.machine.disk_key is not None
    ):
        return None
    if chain(os.path.dirname(launch.disk)) != [launch.disk]:
        return None  # of a fork: not empty
    spec = launch.spec
    known_filter = spec.security.privileged or spec.security.seccomp in _KNOWN_FILTERS
    parts = split_guest(plan, known_filter=known_filter)
    try:
        parked = Parked(rest=parked_rest(SYNC_REST, parts.rest), hostname=parts.hostname)
    except InvalidArgument:
        return None  # an environment of more than a frame
    request = ImageRequest(
        base=base,
        kernel=spec.machine.kernel,
        accel=spec.machine.accel,
        shape=shape,
        nics=len(launch.endpoints),
        on_taps=on_taps,
        root=_File.of(launch.root_disk),
        empty=_File.of(disks.empty(os.stat(launch.disk).st_size)),
        volatile=launch.volatile,
        files=tuple(os.path.basename(m.target) for m in launch.mounts if m.ours),
        plan=encode(parts.first),
    )
    return request, parked


def most_kept(environ: Mapping[str, str]) -> int:
    """Return how many templates of images are to be kept; raise `InvalidArgument`."""
    text = environ.get(MOST_VARIABLE, "") or str(_MOST)
    if not (text.isascii() and text.isdigit()):
        raise InvalidArgument(f"expected a number, got {text!r}", field=MOST_VARIABLE)
    return int(text)


class ImageTemplates:
    """The templates of images of one root, which are in `<root>/templates` with the others."""

    def __init__(self, root: Path, templates: Templates, *, most: int) -> None:
        self._most = most
        self._directory = root / "templates"
        self._templates = templates

    def take(self, request: ImageRequest, disk: str) -> tuple[Template | None, bool]:
        """Return the template with the disk at `disk` made what its guest has mounted; or
        none, with the disk as it was, and whether there would be one if it were made."""
        key = request.key
        template = self._templates.find(key) if self._most else None
        if template is None:
            return None, True
        kept = self._templates.directory(key) / DISK
        try:
            if _same_content(disk, request.empty.path) and _replace(disk, kept):
                return template, False
        except BaseException:
            _close(template)
            raise
        _close(template)
        return None, False

    # ---- when one is made ---------------------------------------------------------------

    def wish(self, request: ImageRequest) -> str | None:
        """Note that a start would have gone on from this template. The second time within an
        hour return its key: the caller has it made (`requested`), and nobody else is told."""
        if not self._most:
            return None
        key = request.key
        making = self._directory / f"{_MAKING}{key}"
        wish = self._directory / f"{_WISH}{key}"
        if _age_s(making) < _MAKING_S:
            return None
        if _age_s(wish) < IDLE_S:
            # One of several gets it.
            with suppress(FileNotFoundError):
                os.rename(wish, making)
                os.utime(making)
                return key
            return None
        partial = f"{wish}.{os.urandom(4).hex()}"
        mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(partial, mode, 0o600), "wb") as file:
            file.write(msgspec.json.encode(request))
        os.rename(partial, wish)
        return None

    def requested(self, key: str) -> ImageRequest | None:
        """Return what is to be made under a key, None where nobody wants it any more."""
        try:
            content = (self._directory / f"{_MAKING}{key}").read_bytes()
            return decode_json(content, ImageRequest)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def made(self, key: str) -> None:
        """Forget a request that was carried out; let go of templates beyond the number that is
        kept, those first that nobody has used for longest."""
        (self._directory / f"{_MAKING}{key}").unlink(missing_ok=True)
        for entry in self._directory.glob(f"{_WISH}*"):
            if _age_s(entry) > IDLE_S:
                entry.unlink(missing_ok=True)
        used = {disk.parent.name: _age_s(disk) for disk in self._directory.glob(f"*/{DISK}")}
        for name in sorted(used, key=lambda name: used[name])[self._most :]:
            with suppress(Busy), self._templates.locked(name, timeout_s=0):
                self._templates.remove(name)

    def forget(self) -> None:
        """Withdraw all requests, and wait for those that are being carried out."""
        for entry in self._directory.glob(f"{_WISH}*"):
            entry.unlink(missing_ok=True)
        for entry in self._directory.glob(f"{_MAKING}*"):
            entry.unlink(missing_ok=True)
            with self._templates.locked(entry.name.removeprefix(_MAKING)):
                pass


def sync_directory(path: str) -> None:
    """Have the names in a directory on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _close(template: Template) -> None:
    os.close(template.memory)
    os.close(template.state)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _same_content(first: str, second: str) -> bool:
    """Tell whether two files have the same bytes, without reading holes of both."""
    with open(first, "rb", buffering=0) as one, open(second, "rb", buffering=0) as other:
        if os.fstat(one.fileno()).st_size != os.fstat(other.fileno()).st_size:
            return False
        ranges = set(data_ranges(one.fileno())) | set(data_ranges(other.fileno()))
        return all(
            os.pread(one.fileno(), size, at) == os.pread(other.fileno(), size, at)
            for start, length in ranges
            for at in range(start, start + length, _CHUNK)
            if (size := min(_CHUNK, start + length - at))
        )


def _replace(disk: str, kept: Path) -> bool:
    """Put a copy of a template's disk in the place of an empty one, at once or not at all;
    False where the template is gone."""
    partial = f"{disk}.new"
    with suppress(FileNotFoundError):
        os.unlink(partial)
    try:
        os.utime(kept)  # in use: others go before it
        copy_sparse(str(kept), partial)
    except FileNotFoundError:
        return False
    os.rename(partial, disk)
    return True
