"""The images of one root by name and by id: look up, list, tag, remove.

Names move: an image that gets a name takes it from the image that had it, which is left
dangling where that was its last. Nothing here touches blobs or unpacked layers: what no
record names any more is freed by garbage collection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from hutch.errors import Busy, InvalidArgument, NotFound
from hutch.image.records import IMAGE_NAMES, IMAGES, ImageName, ImageRecord
from hutch.oci.reference import Reference, is_hex, parse
from hutch.records import Records, Transaction
from hutch.storage.rootdisk import disk_key

__all__ = ["ImageUser", "Images", "Removed", "Users", "image_roots"]


class ImageUser(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that was made from an image."""

    name: str
    running: bool


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """What a removal did: familiar names `untagged`, image ids `deleted`."""

    untagged: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


Users = Callable[[Transaction, str], Iterable[ImageUser]]
"""Tells which instances use the image of this id."""


def _nobody(_transaction: Transaction, _image_id: str) -> Iterable[ImageUser]:
    return ()


def image_roots(transaction: Transaction) -> Iterator[str]:
    """Yield what images need kept: digests of blobs, chain ids of layers, root disks."""
    for _, record in transaction.items(IMAGES, ImageRecord):
        yield from record.digests
        yield from record.chain_ids
        yield disk_key(record.chain_ids)


class Images:
    """The catalogue of images in `records`; thread-safe, shared with other processes.

    `users` answers which instances hold an image, so that one in use is not removed.
    """

    def __init__(self, records: Records, *, users: Users = _nobody) -> None:
        self._records = records
        self._users = users

    # ---- look up ----------------------------------------------------------------------

    def get(self, name: str) -> ImageRecord:
        """Return the image of this reference, id or prefix of an id.

        A name goes before an id that happens to begin like it. Raises `NotFound`, or
        `InvalidArgument` where the text is no reference or a prefix of several ids.
        """
        with self._records.read() as transaction:
            return _require(transaction, name)

    def find(self, name: str) -> ImageRecord | None:
        """Return the image as `get` does, or None where there is none."""
        with self._records.read() as transaction:
            return _resolve(transaction, name)[0]

    def by_id(self, image_id: str) -> ImageRecord | None:
        """Return the image of this full id (`sha256:…`), or None."""
        with self._records.read() as transaction:
            return transaction.get(IMAGES, image_id, ImageRecord)

    def all(self) -> list[ImageRecord]:
        """Return every image, the newest first."""
        with self._records.read() as transaction:
            found = [record for _, record in transaction.items(IMAGES, ImageRecord)]
        found.sort(key=lambda record: (record.created, record.id), reverse=True)
        return found

    # ---- change -----------------------------------------------------------------------

    def add(self, record: ImageRecord, *, action: str = "pull") -> ImageRecord:
        """Store an image with its names and return it as kept.

        An image that is there already keeps its other names. The blobs and layers must
        be in the store, under a lease until this returns.
        """
        now = time.time()
        with self._records.write(durable=True) as transaction:
            old = transaction.get(IMAGES, record.id, ImageRecord)
            names, digests = record.names, record.repo_digests
            if old is not None:
                names = tuple(dict.fromkeys((*old.names, *names)))
                digests = tuple(dict.fromkeys((*old.repo_digests, *digests)))
            kept = msgspec.structs.replace(
                record,
                names=names,
                repo_digests=digests,
                added_at=old.added_at if old is not None else now,
                tagged_at=now if record.names or old is None else old.tagged_at,
            )
            for name in (*record.names, *record.repo_digests):
                _take_name(transaction, name, record.id)
            transaction.put(IMAGES, kept.id, kept)
            subject = record.names[0] if record.names else record.id
            transaction.event("image", action, record.id, name=_familiar(subject))
        return kept

    def note_digest(self, image_id: str, repo_digest: str, *, name: str) -> None:
        """Remember that an image was pushed and is known there as `repository@digest`."""
        with self._records.write() as transaction:
            record = transaction.get(IMAGES, image_id, ImageRecord)
            if record is not None and repo_digest not in record.repo_digests:
                _take_name(transaction, repo_digest, image_id)
                record = msgspec.structs.replace(
                    record, repo_digests=(*record.repo_digests, repo_digest)
                )
                transaction.put(IMAGES, image_id, record)
            transaction.event("image", "push", image_id, name=name)

    def tag(self, source: str, target: str) -> Reference:
        """Give the image `source` the name `target` (which must carry no digest)."""
        reference = parse(target, field="target")
        if reference.digest is not None:
            raise InvalidArgument(f"must not carry a digest, got {target!r}", field="target")
        name = reference.canonical()
        with self._records.write() as transaction:
            record = _require(transaction, source)
            if name not in record.names:
                _take_name(transaction, name, record.id)
                record = msgspec.structs.replace(
                    record, names=(*record.names, name), tagged_at=time.time()
                )
                transaction.put(IMAGES, record.id, record)
            transaction.event("image", "tag", record.id, name=reference.familiar())
        return reference

    def remove(self, name: str, *, force: bool = False) -> Removed:
        """Take the name away, and the image with its last name, as `docker rmi` does.

        By id, an image goes with all its names; several repositories need `force`.
        An image of a running instance is never deleted; of a stopped one with `force`.
        """
        with self._records.write() as transaction:
            record, key = _resolve(transaction, name)
            if record is None:
                raise _missing(name)
            if key is not None and _others(record, key):
                return self._untag(transaction, record, key)
            if key is None:
                repositories = {_repository(n) for n in record.names}
                if len(repositories) > 1 and not force:
                    raise Busy(
                        f"image {name}: has names in several repositories: "
                        + ", ".join(_familiar(n) for n in record.names),
                        hint="remove it by name, or with --force",
                    )
            if key is not None and force and any(True for _ in self._users(transaction, record.id)):
                return self._untag(transaction, record, key)
            self._refuse_used(transaction, record, name, force=force)
            return self._delete(transaction, record)

    def delete(self, image_id: str, *, dangling: bool = False) -> Removed | None:
        """Delete the image of this id with its names, unless an instance uses it.

        With `dangling`, only if it still has no tag. Returns None where it stays or is
        gone already: what pruning wants.
        """
        with self._records.write() as transaction:
            record = transaction.get(IMAGES, image_id, ImageRecord)
            if record is None or (dangling and record.names):
                return None
            if any(True for _ in self._users(transaction, image_id)):
                return None
            return self._delete(transaction, record)

    def used(self, image_id: str) -> tuple[ImageUser, ...]:
        """Return the instances that use an image."""
        with self._records.read() as transaction:
            return tuple(self._users(transaction, image_id))

    # ---- inside a transaction ---------------------------------------------------------

    def _refuse_used(
        self, transaction: Transaction, record: ImageRecord, name: str, *, force: bool
    ) -> None:
        users = list(self._users(transaction, record.id))
        running = [user.name for user in users if user.running]
        if running:
            raise Busy(
                f"image {name}: used by running instance {running[0]}",
                hint=f"stop and remove the instance first: hutch rm -f {running[0]}",
            )
        if users and not force:
            raise Busy(
                f"image {name}: used by stopped instance {users[0].name}",
                hint=f"remove the instance first (hutch rm {users[0].name}), or use --force",
            )

    def _untag(self, transaction: Transaction, record: ImageRecord, key: str) -> Removed:
        """Take one name away; the digests of its repository go with its last tag."""
        gone = (key, *_orphaned_digests(record, key))
        kept = msgspec.structs.replace(
            record,
            names=tuple(n for n in record.names if n not in gone),
            repo_digests=tuple(n for n in record.repo_digests if n not in gone),
        )
        transaction.put(IMAGES, kept.id, kept)
        for name in gone:
            transaction.delete(IMAGE_NAMES, name)
            transaction.event("image", "untag", record.id, name=_familiar(name))
        return Removed(untagged=tuple(_familiar(name) for name in gone))

    def _delete(self, transaction: Transaction, record: ImageRecord) -> Removed:
        untagged = (*record.names, *record.repo_digests)
        for key in untagged:
            transaction.delete(IMAGE_NAMES, key)
            transaction.event("image", "untag", record.id, name=_familiar(key))
        transaction.delete(IMAGES, record.id)
        transaction.event("image", "delete", record.id, name=record.id)
        return Removed(untagged=tuple(_familiar(n) for n in untagged), deleted=(record.id,))


def _resolve(transaction: Transaction, text: str) -> tuple[ImageRecord | None, str | None]:
    """Return the image, and the key of `image_names` by which it was found (None: by id)."""
    bare = text.removeprefix("sha256:") if isinstance(text, str) else ""
    may_be_id = len(bare) <= 64 and is_hex(bare)
    if not (may_be_id and (bare != text or len(bare) == 64)):
        try:
            key = _key(parse(text))
        except InvalidArgument:
            if not may_be_id:
                raise
        else:
            found = transaction.get(IMAGE_NAMES, key, ImageName)
            if found is not None:
                return transaction.get(IMAGES, found.id, ImageRecord), key
    if not may_be_id:
        return None, None
    matches = transaction.items(IMAGES, ImageRecord, f"sha256:{bare}")
    if len(matches) > 1:
        raise InvalidArgument(
            f"image {text}: is the beginning of {len(matches)} image ids",
            hint="give more digits",
        )
    return (matches[0][1] if matches else None), None


def _require(transaction: Transaction, name: str) -> ImageRecord:
    record, _ = _resolve(transaction, name)
    if record is None:
        raise _missing(name)
    return record


def _missing(name: str) -> NotFound:
    return NotFound(f"image {name}: not found", hint=f"hutch pull {name}")


def _key(reference: Reference) -> str:
    """Return the key of a reference: its digest decides, where it has one."""
    if reference.digest is not None:
        return f"{reference.name}@{reference.digest}"
    return reference.canonical()


def _take_name(transaction: Transaction, name: str, image_id: str) -> None:
    """Point `name` at an image, taking it from the one that had it."""
    holder = transaction.get(IMAGE_NAMES, name, ImageName)
    if holder is not None and holder.id != image_id:
        loser = transaction.get(IMAGES, holder.id, ImageRecord)
        if loser is not None:
            left = msgspec.structs.replace(
                loser,
                names=tuple(n for n in loser.names if n != name),
                repo_digests=tuple(n for n in loser.repo_digests if n != name),
            )
            transaction.put(IMAGES, left.id, left)
    transaction.put(IMAGE_NAMES, name, ImageName(id=image_id))


def _repository(name: str) -> str:
    return parse(name).name


def _familiar(name: str) -> str:
    return name if name.startswith("sha256:") else parse(name).familiar()


def _orphaned_digests(record: ImageRecord, key: str) -> tuple[str, ...]:
    """Return the digests that came along with the tag `key` and that no other tag keeps."""
    repository = _repository(key)
    if key not in record.names or any(
        name != key and _repository(name) == repository for name in record.names
    ):
        return ()
    return tuple(name for name in record.repo_digests if _repository(name) == repository)


def _others(record: ImageRecord, key: str) -> bool:
    """Tell whether an image keeps a name once `key` is gone.

    Another digest of the same repository is the same image's index, and does not count.
    """
    if any(name != key for name in record.names):
        return True
    repository = _repository(key)
    return any(_repository(name) != repository for name in record.repo_digests)
