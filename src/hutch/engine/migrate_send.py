"""What the source of a migration sends: image and kernel, then what is the instance's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

import msgspec

from hutch.drivers.container.checkpoint import IMAGES as CRIU_IMAGES
from hutch.drivers.moving import Streams
from hutch.engine.context import Context
from hutch.engine.lookup import load
from hutch.engine.migrate_disks import (
    BASE_FILE,
    OWN_FILES,
    disks_of,
    from_disk,
    obstacles_here,
)
from hutch.engine.migrate_machines import named_model
from hutch.engine.records import SUSPENDED, InstanceRecord, ResolvedMount
from hutch.errors import Busy, HutchError, OutcomeUnknown
from hutch.host.processors import host_processor, missing_features
from hutch.lifecycle import State
from hutch.migration.layers import SentFiles
from hutch.migration.messages import Address, Answer, Live, Offer, Stream, VolumeOffer
from hutch.migration.streams import SentBlocks, pack_ahead, pack_changes, pack_file
from hutch.migration.wire import Wire
from hutch.process.supervisor import Supervisor
from hutch.records import Progress, ProgressEvent
from hutch.storage.diskchain import allocated, ensure_one, is_chain
from hutch.storage.faults import disk_errors
from hutch.storage.pack import pack_diff, pack_directory
from hutch.storage.snapshots import DISK_FILE, QCOW2_FILE

__all__ = ["Sender", "addresses_of"]

_PIECE = 256 << 10
# A record of a log begins with the time in ns.
_RECORD_HEAD = 20
_LIVE = (State.STARTING, State.RUNNING, State.PAUSED)


class Sender:
    """The source's side of the streams of one migration."""

    def __init__(
        self, context: Context, wire: Wire, record: InstanceRecord, *, progress: Progress
    ) -> None:
        self._context = context
        self.wire = wire
        self.record = record
        self.progress = progress
        self.sent = 0
        self.offer: Offer
        self.answer: Answer
        self.references: tuple[str, ...] = ()
        self._ahead: SentBlocks | None = None
        self._files: SentFiles | None = None
        self._logged: dict[str, tuple[bytes, int]] = {}

    def prepare(
        self, token: str, *, with_volumes: bool, streams: Streams | None = None
    ) -> list[str]:
        """Make the offer, with `streams` of a machine that comes while it runs; return what
        stands in the way on this side."""
        context, record = self._context, self.record
        image = context.images.get(record.image_id) if from_disk(record) is None else None
        self.references = (*image.digests, *image.chain_ids) if image else ()
        obstacles = [
            f"blob {digest[:19]} of its image is not stored here any more"
            for digest in (image.digests if image else ())
            if not context.content.has(digest)
        ]
        obstacles += obstacles_here(record)
        obstacles += _unmovable(context, record)
        criu = None
        if record.state == State.RUNNING and record.spec.isolation != "vm":
            from hutch.engine.migrate_container import offer_criu

            criu, streams = offer_criu(context, record), None
        if streams is not None:
            obstacles += context.machines.blockers(record.id, cards=len(record.endpoints))
        volumes: list[VolumeOffer] = []
        for mount in record.mounts:
            if mount.type == "volume" and mount.name not in {v.name for v in volumes}:
                sent = with_volumes or mount.anonymous
                volumes.append(self._volume(mount.name, sent, mount.anonymous, obstacles))
        kernel = None
        qemu = ""
        if record.spec.isolation == "vm":
            if image is not None:
                kernel = context.kernels.get(record.spec.machine.kernel)
            if record.state in (State.RUNNING, State.SUSPENDED):
                machine = context.machines.record(record.id)
                qemu = machine.qemu_version if machine else ""
        self.offer = Offer(
            token=token,
            instance=msgspec.Raw(msgspec.json.encode(record)),
            image=image,
            size=_files_size(context, record)
            + (_memory(context, record) if streams is None else 0),
            kernel=kernel,
            volumes=tuple(volumes),
            qemu=qemu,
            live=None if streams is None else self._live(streams),
            criu=criu,
        )
        return obstacles

    def _live(self, streams: Streams) -> Live:
        """Return what the target must know of a machine that runs."""
        context, record = self._context, self.record
        machine = context.machines.record(record.id)
        assert machine is not None  # it runs
        model = named_model(machine.cpu)
        lacking = missing_features(machine.qemu, machine.accelerator, model) if model else ()
        return Live(
            streams=streams,
            disk_size=os.stat(f"{self._directory()}/{DISK_FILE}").st_size,
            addresses=addresses_of(context, record),
            machine=context.machines.describe(record.id).decode(),
            accelerator=machine.accelerator,
            cpu=machine.cpu,
            processor=host_processor(),
            lacking=lacking or (),
        )

    def _volume(self, name: str, sent: bool, anonymous: bool, obstacles: list[str]) -> VolumeOffer:
        context = self._context
        volume = context.volumes.get(name)
        if not sent:
            return VolumeOffer(name=name, sent=False)
        if volume.options:
            obstacles.append(f"volume {name} has driver options: make it at the target")
        for user in context.volumes.users(name):
            other = load(context, user)
            if user != self.record.id and other.state in _LIVE:
                obstacles.append(f"volume {name} is written to by {other.name}: stop it first")
        return VolumeOffer(
            name=name,
            sent=True,
            anonymous=anonymous,
            labels=dict(volume.labels),
            size=context.volumes.usage(name).bytes,
        )

    # ---- before it is stopped ---------------------------------------------------------

    def send_assets(self) -> None:
        """Send the blobs and the kernel that the target lacks."""
        answer, known = self.answer, set(self.references)
        for digest in answer.blobs:
            if digest in known:
                self._stream(Stream(kind="blob", name=digest), self._blob(digest))
        kernel = self.offer.kernel
        if kernel is not None and answer.kernel:
            kernels = self._context.kernels
            self._file("kernel", "vmlinux", str(kernels.vmlinux(kernel)))
            for name in (*kernel.boot, *kernel.late):
                self._file("kernel", name, str(kernels.module(kernel, name)))
        self.wire.send(Stream(kind="end"))

    def _blob(self, digest: str) -> Iterator[bytes]:
        with self._context.content.open(digest) as file:
            while data := file.read(_PIECE):
                yield data

    def send_ahead(self) -> None:
        """Send the disk of a machine that runs and writes to it: what it changes meanwhile is
        sent again when it stands still."""
        if is_chain(self._context.directory(self.record.id)):
            return  # twins share it: it is made one file when nobody writes to it
        self._ahead = {}
        disks = disks_of(self.record, self._directory())
        if BASE_FILE in disks:
            self._file("disk", BASE_FILE, disks[BASE_FILE])  # nobody writes to it
        with disk_errors(f"migration of {self.record.name}"), self._open_disk() as file:
            pieces = pack_ahead(file.fileno(), self._ahead)
            self._stream(Stream(kind="disk", name=self._disk()), pieces)

    def _disk(self) -> str:
        """Return what the file is called that a machine writes to."""
        return DISK_FILE if from_disk(self.record) is None else QCOW2_FILE

    def _open_disk(self) -> IO[bytes]:
        return open(f"{self._directory()}/{self._disk()}", "rb", buffering=0)

    def send_logs(self) -> None:
        """Send the log of an instance that goes on writing to it."""
        self._logged = {name: self._log(name, 0) for name in self._logs()}

    def send_tails(self) -> None:
        """Send what the log has got since; all of it again where it was rotated meanwhile.

        The program says no more by now; what it has said may still be on its way to the log.
        """
        self._settle_log()
        names = self._logs()
        same = {name: self._identity(name) for name in names}
        grown = same == {name: identity for name, (identity, _) in self._logged.items()}
        for name in names:
            self._log(name, self._logged[name][1] if grown else 0)

    def _settle_log(self) -> None:
        run = f"{self._directory()}/run"
        with suppress(FileNotFoundError, ConnectionError), Supervisor.connect(run) as link:
            try:
                link.query(logged=True)
            except OutcomeUnknown:
                # One that has ended has logged everything, and is not to be reached any more.
                Supervisor.connect(run).close()
                raise Busy(
                    f"instance {self.record.name} has as many clients as it can have",
                    hint="leave one of its `hutch attach`, `logs` or `wait`",
                ) from None

    def _open_log(self, name: str) -> IO[bytes]:
        fd = os.open(f"{self._directory()}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return open(fd, "rb", buffering=0)

    def _identity(self, name: str) -> bytes:
        """Return what tells a log from all others: its first record, which begins with the time.
        A new file may well have the inode of one that was removed."""
        with self._open_log(name) as file:
            return file.read(_RECORD_HEAD)

    def _log(self, name: str, start: int) -> tuple[bytes, int]:
        """Send a log from there to its end; return its identity and where that was."""
        with self._open_log(name) as file:
            status = os.fstat(file.fileno())
            identity = file.read(_RECORD_HEAD)
            file.seek(start)
            pieces = iter(lambda: file.read(min(_PIECE, status.st_size - file.tell())), b"")
            if status.st_size > start or start == 0:
                self._stream(Stream(kind="tail", name=name, size=start), pieces)
        return identity, status.st_size

    def _logs(self) -> list[str]:
        names = sorted(os.listdir(self._directory()))
        return [name for name in names if name == "log" or name.startswith("log.")]

    def _directory(self) -> str:
        return str(self._context.directory(self.record.id))

    # ---- a container that stands still ------------------------------------------------

    def send_files_ahead(self) -> None:
        """Send the writable layer of a container that goes on changing it."""
        with disk_errors(f"migration of {self.record.name}"):
            upper = self._context.snapshots.upper(self.record.id)
            self._files = SentFiles(upper)
            self._stream(Stream(kind="ahead"), pack_diff(upper))

    def send_container(self, saved: str) -> None:
        """Send what is saved of a container's memory, and what has changed in its files."""
        with disk_errors(f"migration of {self.record.name}"):
            self.send_tails()
            for directory, _, names in os.walk(saved):
                for name in sorted(names):
                    path = f"{directory}/{name}"
                    self._file("file", f"{SUSPENDED}{path.removeprefix(saved)}", path)
            kept = self._files.unchanged() if self._files else []
            upper = self._context.snapshots.upper(self.record.id)
            self._stream(Stream(kind="upper"), pack_diff(upper, skip=frozenset(kept)))
            self._stream(Stream(kind="kept"), iter([b"\0".join(kept)]))
            for volume in self.offer.volumes:
                if volume.sent:
                    self._tree(volume.name)

    # ---- when it does not run any more ------------------------------------------------

    def send_instance(self, record: InstanceRecord, state: str) -> None:
        """Send the writable layer, the volumes, the log, and a saved memory."""
        directory = str(self._context.directory(record.id))
        with disk_errors(f"migration of {record.name}"):
            if self._ahead is not None:
                with self._open_disk() as file:
                    pieces = pack_changes(file.fileno(), self._ahead)
                    self._stream(Stream(kind="changes", name=self._disk()), pieces)
            elif from_disk(record) is not None:
                for name, path in disks_of(record, directory).items():
                    self._file("disk", name, path)
            elif record.spec.isolation == "vm":
                ensure_one(directory)
                self._file("disk", DISK_FILE, f"{directory}/{DISK_FILE}")
            else:
                self._stream(
                    Stream(kind="upper"), pack_diff(self._context.snapshots.upper(record.id))
                )
            small = OWN_FILES if from_disk(record) is not None else ()
            for name in (*self._logs(), *small):
                if os.path.exists(f"{directory}/{name}"):
                    self._file("file", name, f"{directory}/{name}")
            if state == State.SUSPENDED:
                for name in sorted(os.listdir(f"{directory}/{SUSPENDED}")):
                    self._file("file", f"{SUSPENDED}/{name}", f"{directory}/{SUSPENDED}/{name}")
            for volume in self.offer.volumes:
                if volume.sent:
                    self._tree(volume.name)

    def _tree(self, volume: str) -> None:
        path = os.fsencode(self._context.volumes.get(volume).path)
        fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            pieces = pack_directory(fd, os.path.basename(path), b"", contents_only=True)
            self._stream(Stream(kind="volume", name=volume), pieces)
        finally:
            os.close(fd)

    def _file(self, kind: str, name: str, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            self._stream(Stream(kind=kind, name=name, size=size), pack_file(fd))
        finally:
            os.close(fd)

    def _stream(self, head: Stream, pieces: Iterator[bytes]) -> None:
        self.wire.send(head)
        self.sent += self.wire.send_stream(self._shown(head, pieces))

    def _shown(self, head: Stream, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Tell of the pieces as they pass."""
        item, phase, done = head.name or self.record.name, f"sending {head.kind}", 0
        if head.name.startswith(f"{SUSPENDED}/{CRIU_IMAGES}/"):
            item, phase = self.record.name, "sending memory"  # many small files and a large one
        for piece in pieces:
            done += len(piece)
            self.progress(ProgressEvent(item=item, phase=phase, done=done))
            yield piece


def addresses_of(context: Context, record: InstanceRecord) -> tuple[Address, ...]:
    """Return where a running instance is in its networks."""
    endpoints = context.networks.endpoints(record.id) if record.endpoints else ()
    return tuple(
        Address(
            network=endpoint.network,
            ipv4=endpoint.ipv4,
            ipv6=next((a.address for a in endpoint.addresses if ":" in a.address), ""),
            mac=endpoint.mac,
        )
        for endpoint in endpoints
    )


def _files_size(context: Context, record: InstanceRecord) -> int:
    """Return the bytes that its files take at the target: what is allocated of them, with a
    suspended memory, and all of a disk that its twins here have a share in."""
    directory, wish = context.directory(record.id), from_disk(record)
    size = context.snapshots.usage(record.id).bytes
    size += allocated(directory, whole=True) - allocated(directory)
    if wish is not None and os.path.exists(wish.path):
        size += os.stat(wish.path).st_blocks * 512
    return size


def _memory(context: Context, record: InstanceRecord) -> int:
    """Return the bytes that the memory of one that runs may take when it is saved."""
    if record.state == State.RUNNING and record.spec.isolation != "vm":
        return context.containers.stats(record.id).memory.usage
    if record.state == State.RUNNING:
        from hutch.drivers.vm.limits import memory_of

        return memory_of(record.spec)
    return 0


def _called(mount: ResolvedMount) -> str:
    if mount.type == "volume":
        return f"volume {mount.name}"
    return f"directory {mount.source} of this host"


def _unmovable(context: Context, record: InstanceRecord) -> list[str]:
    """Return what of its specification belongs to this host or to other instances."""
    spec = record.spec
    found = [
        f"{what} is joined to {mode.removeprefix('container:')}"
        for what, mode in (("network", spec.network_mode), ("pid", spec.pid_mode))
        if mode.startswith("container:")
    ]
    if spec.ipc_mode.startswith("container:"):
        found.append(f"ipc is joined to {spec.ipc_mode.removeprefix('container:')}")
    if record.state == State.RUNNING and spec.isolation == "vm":
        machine = context.machines.record(record.id)
        held = machine is None or machine.holds_shares
        found += [
            f"{_called(mount)} is mounted in it at {mount.target} (-v); stop it first"
            for mount in record.mounts
            if held or mount.type == "volume"
        ]
    if spec.isolation != "vm" and (spec.userns not in ("", "host") or context.rootless):
        found.append("its files have the ids of a user namespace of this host")
    try:
        if from_disk(record) is None:
            context.snapshots.load(record.id, record.chain_ids)
    except HutchError as exc:
        found.append(exc.message)
    return found
