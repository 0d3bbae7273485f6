"""Start a container from a saved state: CRIU brings its processes back under a supervisor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hutch.drivers.base import ForkedState, Launch
from hutch.drivers.container.checkpoint import (
    IMAGES,
    NETWORK,
    Checkpoint,
    External,
    load_checkpoint,
)
from hutch.drivers.container.criu import criu_failure
from hutch.errors import Unsupported
from hutch.host.criu import CriuFacts
from hutch.plan import ops
from hutch.plan.container import SYNC_RESTORED
from hutch.plan.restore import Place, compile_restore, place_of, places_of
from hutch.process.criu import criu_environment, restore_request
from hutch.process.errors import LaunchFailed

__all__ = ["restore_failures", "restoring"]

_DIRECTORY = "restore"
_LOG = "restore.log"
# Where the launcher puts the streams and the network namespace for CRIU; see `ops.Restore`.
_FD_TALK = 3
_FD_STREAMS = 10
_FD_NETWORK = 13
_FD_WORK = 200


def saved_path(launch: Launch) -> str:
    """Return the directory of the saved state that a launch goes on from."""
    assert launch.saved is not None
    if isinstance(launch.saved, ForkedState):
        return os.fsdecode(launch.saved.saved)
    return launch.saved.directory


@contextmanager
def restoring(criu: CriuFacts, launch: Launch, plan: ops.Plan) -> Iterator[ops.Plan]:
    """Yield the plan that brings the processes back, for the time in which it is carried out."""
    saved = saved_path(launch)
    checkpoint = load_checkpoint(saved)
    work = f"{launch.directory}/{_DIRECTORY}"
    shutil.rmtree(work, ignore_errors=True)
    if launch.volatile:
        # The kernel refuses what was mounted so before; the save has seen it onto the disk.
        shutil.rmtree(os.path.join(launch.work, "work", "incompat"), ignore_errors=True)
    places = places_of(plan, work)
    os.mkdir(work, 0o700)
    try:
        _make_targets(places)
        restore = _operation(criu, launch, checkpoint, work, places, saved)
        with restore_failures(work):
            yield compile_restore(plan, places, restore)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make_targets(places: Sequence[Place]) -> None:
    for place in places:
        if place.is_dir:
            os.mkdir(place.path, 0o755)
        else:
            os.close(os.open(place.path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _operation(
    criu: CriuFacts,
    launch: Launch,
    checkpoint: Checkpoint,
    work: str,
    places: Sequence[Place],
    saved: str,
) -> ops.Restore:
    externals = [
        f"mnt[{external.key}]:{_source(external, places)}" for external in checkpoint.externals
    ]
    inherited: dict[str, int] = {}
    for number, name in enumerate(checkpoint.streams):
        if name:
            inherited.setdefault(name, _FD_STREAMS + number)
    if checkpoint.network:
        inherited[NETWORK] = _FD_NETWORK
    request = restore_request(
        images=f"{saved}/{IMAGES}",
        log=_LOG,
        work_fd=_FD_WORK,
        root=places[0].path,
        externals=externals,
        inherited=inherited,
        terminal=checkpoint.terminal,
    )
    return ops.Restore(
        argv=(criu.path, "swrk", str(_FD_TALK)),
        env=tuple(f"{name}={value}" for name, value in criu_environment().items()),
        work=work,
        request=request,
        hold=SYNC_RESTORED if launch.before_go is not None else -1,
    )


def _source(external: External, places: Sequence[Place]) -> str:
    """Return where the host has what is to be mounted there."""
    found = place_of(places, external.mountpoint)
    if found is not None:
        return found
    if external.device:  # where the kernel makes no nodes; what is masked is /dev/null
        return external.device
    if external.mountpoint in ("/sys", "/dev/mqueue"):
        return external.mountpoint  # of the network and the IPC namespace of the host
    raise Unsupported(
        f"mount {external.mountpoint}: was made while the container ran, and nobody knows of what",
        hint="unmount it before the container is saved",
    )


@contextmanager
def restore_failures(work: str) -> Iterator[None]:
    """Say why CRIU did not bring the processes back."""
    try:
        yield
    except LaunchFailed as exc:
        if not os.path.exists(f"{work}/{_LOG}"):
            raise
        raise criu_failure("restore", f"{work}/{_LOG}", exc.message) from exc
