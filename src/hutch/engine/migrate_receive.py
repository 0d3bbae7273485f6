"""Migrate an instance from another hutch: the target's side, one process per link.

What comes is put on disk without a record that anybody could start; then it waits, inert, for
the source's decision. Until it has said `prepared`, a lost link leaves nothing here.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial

import msgspec

from hutch.decoding import decode_json
from hutch.drivers.container.checkpoint import IMAGES as CRIU_IMAGES
from hutch.engine.context import Context
from hutch.engine.create import layer_size
from hutch.engine.locking import instance_lock
from hutch.engine.machines import prepare_machine
from hutch.engine.migrate import hello
from hutch.engine.migrate_check import obstacles
from hutch.engine.migrate_container import land_container
from hutch.engine.migrate_disks import OWN_FILES, disks_of, from_disk, local_spec
from hutch.engine.migrate_land import carry_stream, confirm, decline, land, take_tail
from hutch.engine.migrate_settle import (
    activate,
    discard,
    find,
    find_prepared,
    forget,
    migration_lock,
    put,
)
from hutch.engine.records import (
    INSTANCES,
    NAMES,
    SUSPENDED,
    InstanceRecord,
    NameRecord,
    ResolvedMount,
)
from hutch.errors import AlreadyExists, HutchError, IntegrityError, NotFound, WrongState
from hutch.ids import new_instance_id
from hutch.image.records import IMAGES, ImageRecord
from hutch.image.register import register_image
from hutch.image.unpacking import ensure_unpacked, unpack_stored
from hutch.lifecycle import State
from hutch.linux.files import syncfs
from hutch.migration import messages as say
from hutch.migration.layers import take_kept
from hutch.migration.records import MigrationRecord, Phase, Role
from hutch.migration.streams import Pieces, unpack_changes, unpack_file
from hutch.migration.wire import Ended, Wire
from hutch.oci.reference import parse
from hutch.records import silent
from hutch.storage.faults import disk_errors
from hutch.storage.leases import Lease
from hutch.storage.snapshots import DISK_FILE
from hutch.storage.unpack import unpack

__all__ = ["serve"]

_LINK_S = 3600.0
_LOCK_S = 60.0
_MAX_FILE = 1 << 40
_MAX_KERNEL = 512 << 20
_READY_STATES = (State.CREATED, State.EXITED, State.SUSPENDED)


def serve(context: Context, read_fd: int, write_fd: int) -> None:
    """Answer one source until it closes the link."""
    wire = Wire(read_fd, write_fd, peer="source", timeout_s=_LINK_S)
    wire.greet()
    wire.meet()
    try:
        hello(wire)
        while True:
            _answer(context, wire, wire.receive())
    except Ended:
        return
    except BaseException as exc:
        try:
            wire.send(say.failure(exc))
        except HutchError:
            pass  # nobody is there to hear of it
        raise


def _answer(context: Context, wire: Wire, message: say.Message) -> None:
    match message:
        case say.Offer():
            with migration_lock(context, message.token, timeout_s=_LOCK_S):
                _Incoming(context, wire, message).receive()
        case say.Ask():
            migration = find(context, message.token)
            wire.send(say.Status(phase=migration.phase if migration else "unknown"))
        case say.Commit():
            with migration_lock(context, message.token, timeout_s=_LOCK_S):
                problem = _commit(context, message.token)
            wire.send(say.Committed(problem=problem))
        case say.Abort():
            with migration_lock(context, message.token, timeout_s=_LOCK_S):
                _abort(context, message.token)
            wire.send(say.Aborted())
        case say.Channel():
            carry_stream(context, wire, message)
        case say.Forget():
            forget(context, message.token)
            wire.send(say.Forgotten())
        case _:
            raise IntegrityError(f"unexpected message {type(message).__name__}")


def _commit(context: Context, token: str) -> str:
    """Activate it, and start it where it ran before; return why it does not run."""
    migration = find(context, token)
    if migration is None:
        raise NotFound(f"migration {token[:12]}: not known here")
    if migration.live:
        return confirm(context, migration)
    if migration.phase == Phase.PREPARING:
        raise WrongState(f"migration of {migration.name}: is not complete here")
    active = activate(context, migration)
    if not active.resume:
        return ""
    from hutch.engine.start import start

    try:
        link = start(context, active.instance)
    except HutchError as exc:
        return exc.message
    if link is not None:
        link.close()
    return ""


def _abort(context: Context, token: str) -> None:
    migration = find(context, token)
    if migration is None:
        return
    if migration.phase == Phase.DECLINED:
        forget(context, token)
        return
    if migration.phase == Phase.ACTIVE:
        raise WrongState(f"instance {migration.name} is this root's already")
    discard(context, migration)


class _Incoming:
    """One instance on its way in."""

    def __init__(self, context: Context, wire: Wire, offer: say.Offer) -> None:
        self._context = context
        self._wire = wire
        self._offer = offer
        self._record = _decode(offer.instance)
        self._id = new_instance_id()
        self._directory = str(context.directory(self._id))
        self._staged: dict[str, str] = {}

    def receive(self) -> None:
        """Take everything in, up to `prepared`; on failure nothing of it is left."""
        context, offer = self._context, self._offer
        if (offer.image is None) != (from_disk(self._record) is not None):
            raise IntegrityError("an image is offered for a machine with a disk, or none for it")
        found = obstacles(context, offer, self._record)
        if found:
            self._wire.send(say.Answer(obstacles=tuple(found)))
            return
        with ExitStack() as undo, context.leases.hold(purpose="migration") as lease:
            if offer.image is not None:
                lease.add(*offer.image.digests, *offer.image.chain_ids)
            self._assets()
            image = None if offer.image is None else self._image(lease, offer.image)
            migration = put(context, self._migration(Phase.PREPARING))
            undo.callback(self._undo, migration)
            with disk_errors(f"instance {self._id[:12]}"):
                os.mkdir(self._directory, 0o700)
                # Held until there is a record, or else it would be taken for an orphan.
                with instance_lock(context, self._id):
                    os.mkdir(f"{self._directory}/run", 0o700)
                    self._prepare(image)
                    self._wire.send(say.Ready())
                    if offer.live is not None:
                        self._empty_disk(offer.live.disk_size)
                    final = self._files()
                    self._insert(final, image)
                    if offer.live is not None:
                        land(context, self._wire, find_prepared(context, offer.token), offer.live)
                    elif offer.criu is not None:
                        prepared = find_prepared(context, offer.token)
                        land_container(context, self._wire, prepared, offer.criu)
            undo.pop_all()
        if not self._is_live:
            self._wire.send(say.Prepared(id=self._id))

    @property
    def _is_live(self) -> bool:
        """Whether it runs at the source until it runs here."""
        return self._offer.live is not None or self._offer.criu is not None

    def _undo(self, migration: MigrationRecord) -> None:
        """Remove it. A live machine's source may have decided meanwhile: it is to learn that
        this one never ran."""
        present = find(self._context, migration.token) or migration
        if present.live and present.phase == Phase.PREPARED:
            decline(self._context, present)
        elif present.phase != Phase.ACTIVE:
            discard(self._context, present)

    def _empty_disk(self, size: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(f"{self._directory}/{DISK_FILE}", flags, 0o600)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def _migration(self, phase: Phase, *, volumes: Collection[str] = ()) -> MigrationRecord:
        addresses = self._offer.live or self._offer.criu
        return MigrationRecord(
            token=self._offer.token,
            role=Role.TARGET,
            phase=phase,
            instance=self._id,
            name=self._record.name,
            volumes=tuple(sorted(volumes)),
            live=self._is_live,
            cards=len(addresses.addresses) if addresses else 0,
            isolation=self._record.spec.isolation,
        )

    # ---- image and kernel -------------------------------------------------------------

    def _assets(self) -> None:
        """Ask for what is missing, and take it."""
        context, offer = self._context, self._offer
        digests = offer.image.digests if offer.image is not None else ()
        missing = [digest for digest in digests if not context.content.has(digest)]
        wants_kernel = offer.kernel is not None and not self._has_kernel()
        self._wire.send(say.Answer(blobs=tuple(missing), kernel=wants_kernel))
        parts: dict[str, bytes] = {}
        while (head := self._wire.expect(say.Stream)).kind != "end":
            if head.kind == "blob" and head.name in missing:
                self._blob(head.name)
            elif head.kind == "kernel" and wants_kernel and head.size <= _MAX_KERNEL:
                parts[head.name] = self._part(head)
            else:
                raise IntegrityError(f"unexpected stream {head.kind} {head.name[:80]!r}")
        if wants_kernel and offer.kernel is not None:
            context.kernels.add_content(offer.kernel, parts)

    def _has_kernel(self) -> bool:
        assert self._offer.kernel is not None
        known = {kernel.id for kernel in self._context.kernels.list()}
        return self._offer.kernel.id in known

    def _blob(self, digest: str) -> None:
        with self._context.content.writer(digest, timeout_s=_LOCK_S) as writer:
            if writer.offset and not writer.complete:
                writer.restart()
            for piece in self._wire.stream():
                if not writer.complete:
                    writer.write(piece)
            writer.commit()

    def _part(self, head: say.Stream) -> bytes:
        path = f"{self._context.root}/tmp/kernel-{self._id}"
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        try:
            unpack_file(self._wire.stream(), path, limit=_MAX_KERNEL)
            with open(path, "rb") as file:
                return file.read()
        finally:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    def _image(self, lease: Lease, offered: ImageRecord) -> ImageRecord:
        """Return the image, registered under those of its names that are free here."""
        image = self._registered(lease, offered)
        if image.id != offered.id:
            raise IntegrityError(f"image {offered.id[:19]}: is not what its manifest says")
        return image

    def _registered(self, lease: Lease, offered: ImageRecord) -> ImageRecord:
        context = self._context
        known = context.images.by_id(offered.id)
        if known is not None:
            ensure_unpacked(known, context.content, context.layers)
            return known
        unpack_stored(offered.layers, context.content, context.layers)
        lease.add(*offered.chain_ids)
        names = [
            name
            for name in offered.names
            if parse(name).canonical() == name and context.images.find(name) is None
        ]
        return register_image(
            context.images,
            manifest=context.content.read(offered.manifest_digest),
            media_type=offered.manifest_media_type,
            config=context.content.read(offered.id),
            unpacked_sizes=[layer.unpacked_size for layer in offered.layers],
            names=names,
            action="load",
        )

    # ---- the instance -----------------------------------------------------------------

    def _prepare(self, image: ImageRecord | None) -> None:
        """Make what does not depend on the instance's files."""
        if image is None:
            return
        size = layer_size(self._record.spec)
        self._context.snapshots.make(self._id, image.chain_ids, size=size)
        if self._record.spec.isolation == "vm":
            prepare_machine(self._context, self._record.spec, image, silent)

    def _files(self) -> say.Prepare:
        """Take the instance's own files; return what the source says of it at last."""
        while True:
            message = self._wire.receive()
            if isinstance(message, say.Prepare):
                return message
            if not isinstance(message, say.Stream):
                raise IntegrityError(f"unexpected message {type(message).__name__}")
            self._take(message)

    def _take(self, head: say.Stream) -> None:
        match head.kind:
            case "upper":
                self._tree(self._context.snapshots.upper(self._id), "writable layer")
            case "ahead" if self._offer.criu is not None:
                os.mkdir(self._ahead, 0o700)
                self._tree(self._ahead, "writable layer")
            case "kept" if self._offer.criu is not None:
                upper = self._context.snapshots.upper(self._id)
                take_kept(self._wire.stream(), self._ahead, upper)
                shutil.rmtree(self._ahead)
            case "tail":
                take_tail(self._wire, self._directory, head)
            case "disk" if self._offer.live is None and head.name in self._disks():
                path = f"{self._directory}/{head.name}"
                unpack_file(self._wire.stream(), path, limit=_MAX_FILE)
            case "changes" if head.name in self._disks():
                path = f"{self._directory}/{head.name}"
                unpack_changes(self._wire.stream(), path, limit=_MAX_FILE)
            case "file":
                self._file(head.name)
            case "volume" if head.name in self._sent_volumes() - self._staged.keys():
                path = f"{self._directory}/volume-{len(self._staged)}"
                os.mkdir(path, 0o755)
                self._staged[head.name] = path
                self._tree(path, f"volume {head.name}")
            case _:
                raise IntegrityError(f"unexpected stream {head.kind} {head.name[:80]!r}")

    @property
    def _ahead(self) -> str:
        """Where the files of a container are that came before it stood still: where the
        writable layer is, which may be a file system of its own."""
        return f"{self._context.snapshots.upper(self._id)}.ahead"

    def _disks(self) -> Collection[str]:
        """Return the names of the disks that come."""
        return disks_of(self._record, self._directory) or (DISK_FILE,)

    def _sent_volumes(self) -> set[str]:
        return {volume.name for volume in self._offer.volumes if volume.sent}

    def _tree(self, path: str, label: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            unpack(Pieces(self._wire.stream()), fd, label=label)
        finally:
            os.close(fd)

    def _file(self, name: str) -> None:
        """Take a file of the instance's directory: a log, or a part of a saved memory."""
        parent, slash, base = name.rpartition("/")
        is_log = not slash and (name == "log" or name.startswith("log."))
        is_own = name in OWN_FILES and from_disk(self._record) is not None
        parents = (SUSPENDED, f"{SUSPENDED}/{CRIU_IMAGES}")
        if not base or base.startswith(".") or not (is_log or is_own or parent in parents):
            raise IntegrityError(f"unexpected file {name[:80]!r}")
        if slash:
            os.makedirs(f"{self._directory}/{parent}", 0o700, exist_ok=True)
        unpack_file(self._wire.stream(), f"{self._directory}/{name}", limit=_MAX_FILE)

    def _insert(self, final: say.Prepare, image: ImageRecord | None) -> None:
        """See all of it onto the disk, then record it, inert."""
        context = self._context
        previous = State(final.previous)
        if previous not in ((State.RUNNING,) if self._is_live else _READY_STATES):
            raise IntegrityError(f"an instance cannot arrive {previous}")
        self._check_whole(previous)
        self._volumes()
        _sync(str(context.root))
        there = _decode(final.instance)
        if (from_disk(there) is None) != (image is not None):
            raise IntegrityError("it is not what was offered")
        record = self._final(there, image)
        migration = msgspec.structs.replace(
            self._migration(Phase.PREPARED, volumes=self._sent_volumes()),
            previous=previous,
            resume=final.resume,
        )
        with context.store.write(durable=True) as tx:
            tx.insert(NAMES, record.name, NameRecord(id=record.id))
            tx.insert(INSTANCES, record.id, record)
            if image is not None:
                context.snapshots.note(tx, record.id, record.chain_ids)
                if record.spec.isolation == "vm":
                    context.kernels.note(tx, record.id, record.spec.machine.kernel)
            for name in {mount.name for mount in record.mounts if mount.type == "volume"}:
                context.volumes.acquire(name, record.id, transaction=tx)
            if image is not None and tx.get(IMAGES, image.id, ImageRecord) is None:
                raise NotFound(f"image {record.image_name}: was removed meanwhile")
            put(context, migration, tx=tx)

    def _check_whole(self, previous: State) -> None:
        """Raise unless everything that was promised has come."""
        is_machine = self._record.spec.isolation == "vm"
        wanted = list(self._disks()) if is_machine else []
        if previous == State.SUSPENDED or self._offer.criu is not None:
            wanted.append(f"{SUSPENDED}/{'saved.json' if is_machine else 'checkpoint.json'}")
        for name in wanted:
            if not os.path.exists(f"{self._directory}/{name}"):
                raise IntegrityError(f"{name} has not come")
        for name in self._sent_volumes() - self._staged.keys():
            raise IntegrityError(f"volume {name} has not come")

    def _volumes(self) -> None:
        """Make the volumes that came along, each with its files in one rename."""
        put(self._context, self._migration(Phase.PREPARING, volumes=self._sent_volumes()))
        for offered in self._offer.volumes:
            if not offered.sent:
                continue
            try:
                self._context.volumes.create_filled(
                    offered.name,
                    options={},
                    labels=offered.labels,
                    anonymous=offered.anonymous,
                    arrived=self._offer.token,  # it is this migration's to remove
                    fill=partial(os.rename, self._staged[offered.name]),
                )
            except AlreadyExists as exc:
                raise AlreadyExists(f"volume {offered.name}: was made here meanwhile") from exc

    def _final(self, there: InstanceRecord, image: ImageRecord | None) -> InstanceRecord:
        """Return the record as it is here: nothing in it is of the source's host."""
        wish = local_spec(there, self._directory)
        machine = msgspec.structs.replace(there.spec.machine, from_disk=wish)
        return msgspec.structs.replace(
            there,
            id=self._id,
            spec=msgspec.structs.replace(there.spec, machine=machine),
            image_id=image.id if image is not None else "",
            chain_ids=image.chain_ids if image is not None else (),
            state=State.MIGRATING,
            pid=0,
            start_time=0,
            supervisor=0,
            boot_id="",
            endpoints=(),
            volatile=False,
            mounts=_localised(self._context, there.mounts),
            created_ns=there.created_ns or time.time_ns(),
        )


def _decode(raw: msgspec.Raw) -> InstanceRecord:
    try:
        return decode_json(bytes(raw), InstanceRecord)
    except msgspec.DecodeError as exc:
        raise IntegrityError(f"the instance's record: {exc}") from exc


def _localised(context: Context, mounts: Sequence[ResolvedMount]) -> tuple[ResolvedMount, ...]:
    return tuple(
        msgspec.structs.replace(mount, source=context.volumes.get(mount.name).path)
        if mount.type == "volume"
        else mount
        for mount in mounts
    )


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs(fd)
    finally:
        os.close(fd)
