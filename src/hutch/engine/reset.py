"""Give a root up: end and remove all that is in it, and what it has made of the host.

Each step can be done again, and the store goes last: a reset that was interrupted goes on
where it was when it is asked for anew.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from hutch.engine.context import Context
from hutch.engine.jobs.wakeup import poke
from hutch.engine.lookup import all_records
from hutch.engine.reclaim import release_all
from hutch.engine.results import ResetReport
from hutch.engine.stop import remove
from hutch.errors import Busy, HutchError, InvalidArgument, NotFound
from hutch.linux.locks import lock_file
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.removal import remove_path

__all__ = ["is_root", "reset"]

_STORE = "hutch.db"
# By the store a root is known: what is left when it is gone, nobody could ask to have removed.
_LAST = ("trash", "locks", f"{_STORE}-reserve", f"{_STORE}-shm", f"{_STORE}-wal", _STORE)
_FILES = ("resources.json", "shared-cpus")
_TREES = (
    *("instances", "snapshots", "volumes", "pools", "jobs", "templates", "memory"),
    *("rootdisks", "layers", "empty", "blobs", "ingest", "kernels", "networks", "cache"),
    *("build-cache", "tmp", "trace"),
)
# What people put there themselves stays.
_THEIRS = frozenset({"registries.json", "tls", "lost+found"})
_LEAVE_S = 30.0
_TEMPLATE_S = 300.0
_ROUNDS = 5
_SETTLE_S = 0.2


def is_root(path: str | os.PathLike[str]) -> bool:
    """Tell whether a directory is the root of an engine."""
    return os.path.isfile(os.path.join(path, _STORE))


def reset(context: Context, *, progress: Progress = silent) -> ResetReport:
    """Remove everything of a root; see `Engine.reset`."""
    _require_ours(context)
    with _alone(context):
        instances = _remove_instances(context, progress)
        release_all(context)  # that the host merges equal pages, say
        _say(progress, "networks")
        networks = [one.name for one in context.networks.list() if one.bridge]
        context.networks.teardown()
        _remove_templates(context, progress)
        volumes, pools = _remove_storage(context, progress)
        _say(progress, "mounts")
        _unmount_all(str(context.root))
        _remove_groups(context)
        _say(progress, "files")
        images = len(context.images.all())
        kept = _remove_files(context)
    return ResetReport(
        root=str(context.root),
        instances=tuple(instances),
        networks=tuple(networks),
        volumes=tuple(volumes),
        pools=tuple(pools),
        images=images,
        kept=tuple(kept),
    )


def _say(progress: Progress, item: str) -> None:
    progress(ProgressEvent(item=item, phase="removing"))


def _require_ours(context: Context) -> None:
    """Refuse a directory that is more than a root: somebody's home, opened as one."""
    known = {*_TREES, *_FILES, *_LAST, *_THEIRS}
    others = sorted(set(os.listdir(context.root)) - known)
    if others:
        raise InvalidArgument(
            f"{context.root}: holds what is not hutch's: {', '.join(others[:5])}",
            field="root",
            hint="move it elsewhere first",
        )


@contextmanager
def _alone(context: Context) -> Iterator[None]:
    """Hold off the daemon, the dispatcher and a second reset."""
    locks = context.root / "locks"
    with ExitStack() as held:
        try:
            held.enter_context(lock_file(locks / "daemon", timeout_s=0.0))
        except Busy as exc:
            raise Busy(f"{context.root}: a daemon serves this root", hint="end it first") from exc
        patience = _LEAVE_S if poke(context.root, leave=True) else 0.0
        try:
            held.enter_context(lock_file(locks / "dispatch.lock", timeout_s=patience))
        except Busy as exc:
            raise Busy(f"{context.root}: a dispatcher runs its jobs", hint="end it first") from exc
        yield


def _remove_instances(context: Context, progress: Progress) -> list[str]:
    """End and remove all instances, with those that somebody makes meanwhile."""
    removed = []
    for _ in range(_ROUNDS):
        records = all_records(context)
        for record in records:
            _say(progress, record.name)
            try:
                remove(context, record.id, force=True, remove_volumes=True)
            except NotFound:
                continue
            removed.append(record.name)
        if not records:
            return removed
    raise Busy(f"{context.root}: instances are made there all the time", hint="end who does it")


def _remove_templates(context: Context, progress: Progress) -> None:
    """End those who hold templates' memory; who makes one is waited for, or it would outlive
    the root."""
    directory = context.root / "templates"
    if not directory.is_dir():
        return
    _say(progress, "templates")
    for path in directory.glob(".*.lock"):
        with lock_file(path, timeout_s=_TEMPLATE_S):
            pass
    context.machines.prune_templates()


def _remove_storage(context: Context, progress: Progress) -> tuple[list[str], list[str]]:
    """Remove volumes, then pools. Of a pool whose disk is not there only what is here goes."""
    store, pools = context.volumes, context.volumes.pools
    volumes = _each(
        (volume.name for volume in store.list()),
        lambda name: store.remove(name, force=True),
        lambda name: store.record(name).pool,
        progress,
    )
    return volumes, _each((pool.name for pool in pools.list()), pools.remove, str, progress)


def _each(
    names: Iterable[str],
    act: Callable[[str], object],
    pool_of: Callable[[str], str],
    progress: Progress,
) -> list[str]:
    removed = []
    for name in list(names):
        _say(progress, name)
        try:
            act(name)
        except HutchError:
            # What is in the root goes with it; only another disk can keep its part.
            if not pool_of(name):
                raise
            continue
        removed.append(name)
    return removed


def _unmount_all(root: str) -> None:
    """Take away the mounts beneath the root, the innermost first; nothing is deleted through
    one that stays."""
    from hutch.storage.filemounts import unmount_file

    for _ in range(_ROUNDS):
        points = _mounts_beneath(root)
        if not points:
            return
        for point in reversed(points):
            unmount_file(point)
    raise Busy(f"{points[0]}: stays mounted", hint=f"umount {points[0]}")


def _mounts_beneath(root: str) -> list[str]:
    """Return the mount points beneath a directory, in the order they were mounted."""
    top = os.path.realpath(root)
    with open("/proc/self/mountinfo", "rb") as file:
        points = [os.fsdecode(_unescape(line.split(b" ")[4])) for line in file]
    return [point for point in points if point.startswith(f"{top}/")]


def _unescape(text: bytes) -> bytes:
    """Undo proc(5)'s octal escapes of blanks."""
    for raw, escaped in ((b" ", b"\\040"), (b"\t", b"\\011"), (b"\n", b"\\012")):
        text = text.replace(escaped, raw)
    return text.replace(b"\\134", b"\\")


def _remove_groups(context: Context) -> None:
    context.groups.hierarchy.remove_parent()


def _remove_files(context: Context) -> list[str]:
    """Delete what is ours of the root, and the root if nothing else is in it; return the
    names of what is not."""
    root = context.root
    for name in (*_TREES, *_FILES):
        context.trash.discard(str(root / name))
    context.trash.drain()
    context.trash.empty()
    left = os.listdir(root / "trash") if (root / "trash").exists() else []
    if left:
        raise Busy(
            f"{root}/trash/{left[0]}: could not be deleted", hint="see who holds it, and retry"
        )
    context.close()
    # What a process made that had the root open still, the store among it, goes as well.
    for _ in range(_ROUNDS):
        for name in (*_TREES, *_FILES, *_LAST):
            remove_path(f"{root}/{name}")
        try:
            os.rmdir(root)
            return []
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EBUSY, errno.EACCES, errno.EPERM):
                raise
        kept = sorted(os.listdir(root))
        if _THEIRS.issuperset(kept):
            return kept
        time.sleep(_SETTLE_S)
    return kept
