"""Fork a running machine: twins that go on from where it is, each an instance of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from hutch.drivers.base import ForkedState
from hutch.engine.context import Context
from hutch.engine.create import create_from_spec
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load
from hutch.engine.records import NAMES, InstanceRecord, NameRecord
from hutch.engine.saved import new_saved, require_running, savable, saved_directory, twin_spec
from hutch.engine.start import start
from hutch.engine.stop import remove
from hutch.errors import AlreadyExists, InvalidArgument, NotFound
from hutch.spec.build import check_name
from hutch.spec.model import InstanceSpec

__all__ = ["fork"]

_MOST = 100
_AT_ONCE = 4


def fork(
    context: Context,
    identifier: str,
    *,
    count: int = 1,
    name: str | None = None,
    publish: bool = True,
) -> list[InstanceRecord]:
    """Return running twins of a running machine, which goes on.

    With several, `name` becomes NAME-1, NAME-2, …. Twins do not get the addresses and ports
    that the source has: without `publish` they have no ports, with it ports that are asked
    for by number are refused. On failure no twin is left.
    """
    driver = savable(context, load(context, identifier), "fork")
    names = _names(context, count, name)
    with new_saved(context, keep=False) as saved, ExitStack() as undo:
        directory = saved_directory(context, saved)
        with instance_lock(context, identifier):
            source = require_running(context, identifier, "fork")
            spec = _spec(source, publish)
            state = driver.fork(identifier, str(directory), cards=len(source.endpoints))
            undo.callback(state.close)
        twins = []
        for twin_name in names:
            twin = _twin(context, source, spec, twin_name, str(directory))
            undo.callback(_remove, context, twin.id)
            twins.append(twin)
        _start_all(context, twins, state)
        with context.store.write() as tx:
            for twin in twins:
                tx.event("container", "fork", source.id, name=source.name, twin=twin.id)
        undo.pop_all()
        state.close()
    return [load(context, twin.id) for twin in twins]


def _start_all(context: Context, twins: Sequence[InstanceRecord], state: ForkedState) -> None:
    """Let twins go on, some at a time; raise the first failure when none is under way."""

    def go_on(twin: InstanceRecord) -> None:
        link = start(context, twin.id, saved=state)
        if link is not None:
            link.close()

    if len(twins) == 1:
        go_on(twins[0])
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(go_on, twin) for twin in twins]:
            done.result()


def _names(context: Context, count: int, name: str | None) -> Sequence[str | None]:
    if not 1 <= count <= _MOST:
        raise InvalidArgument(f"expected a count between 1 and {_MOST}, got {count}", field="n")
    if name is None:
        return [None] * count
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    with context.store.read() as tx:
        for wanted in map(check_name, names):
            taken = tx.get(NAMES, wanted, NameRecord)
            if taken is not None:
                raise AlreadyExists(
                    f"name: {wanted!r} is taken by instance {taken.id[:12]}",
                    hint="choose another name",
                )
    return names


def _spec(source: InstanceRecord, publish: bool) -> InstanceSpec:
    """Return what twins are made from; refuse a port that two cannot have."""
    import msgspec

    spec = source.spec
    if not publish:
        return msgspec.structs.replace(spec, ports=())
    for port in spec.ports:
        if port.host_port:
            raise InvalidArgument(
                f"port {port.host_port}/{port.protocol} is published by {source.name}, and its "
                "twin would want it too",
                field="publish",
                hint="fork it with --no-publish, or publish a port without a number for the host",
            )
    return spec


def _twin(
    context: Context,
    source: InstanceRecord,
    spec: InstanceSpec,
    name: str | None,
    directory: str,
) -> InstanceRecord:
    chosen = spec.hostname != source.id[:12] and name is not None
    return create_from_spec(
        context,
        twin_spec(spec, name=name or "", hostname=chosen),
        context.images.get(source.image_id),
        name=name,
        volatile=source.volatile,
        disk=directory,
    )


def _remove(context: Context, identifier: str) -> None:
    try:
        remove(context, identifier, force=True, remove_volumes=True)
    except NotFound:
        pass
