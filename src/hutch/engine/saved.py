"""Saved states of machines on disk: their directories, who may make them, what they keep.

`<root>/snapshots/<id>/` is what the driver saved. One without a record is under work, and
its lock is held, or was left by somebody who was killed: then `reconcile_saved` removes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.drivers.base import Savable, SavedState
from hutch.engine.context import Context
from hutch.engine.finish import refresh_locked
from hutch.engine.lookup import load
from hutch.engine.records import MACHINE_SNAPSHOTS, InstanceRecord, SnapshotRecord
from hutch.errors import Unsupported, WrongState
from hutch.ids import new_id
from hutch.lifecycle import State
from hutch.records import Transaction
from hutch.spec.model import InstanceSpec, NetworkAttachment
from hutch.storage.faults import disk_errors
from hutch.storage.locking import file_lock, try_file_lock
from hutch.storage.rootdisk import disk_key

__all__ = [
    "keep_addresses",
    "kept_addresses",
    "new_saved",
    "reconcile_saved",
    "require_running",
    "savable",
    "saved_directory",
]
__all__ += ["snapshot_roots", "sync_assets", "twin_spec"]

_ADDRESSES = "addresses.json"


def savable(context: Context, record: InstanceRecord, what: str, *, memory: bool = True) -> Savable:
    """Return the driver of an instance, or raise `Unsupported` for what cannot be saved;
    without `memory` its files are all that is to be."""
    if record.spec.machine.from_disk is not None and what == "fork":
        raise Unsupported(
            f"fork of {record.name}: a machine that starts from a disk has no agent to make a "
            "twin of it another machine",
            hint="stop it, `hutch snapshot` it, and `hutch snapshot restore --name NEW`",
        )
    machine = record.spec.machine
    if machine.disk_key is not None and machine.from_disk is None and what != "suspend":
        # It would go on, with others, on overlays over what is encrypted.
        raise Unsupported(
            f"{what} of {record.name}: its disk is encrypted, and is not shared",
            hint="`hutch cp` and `hutch commit` copy its files",
        )
    driver = context.driver(record.spec.isolation)
    if not isinstance(driver, Savable):
        raise Unsupported(f"{what} of {record.name}: its driver saves no memory")
    if memory:
        try:
            driver.check_savable(record.spec)
        except Unsupported as exc:
            raise Unsupported(f"{what} of {record.name}: {exc.message}", hint=exc.hint) from exc
    if record.spec.isolation != "vm" and what == "fork":
        from hutch.engine.container_states import check_copyable

        check_copyable(record, what)
    return driver


def require_running(context: Context, identifier: str, what: str) -> InstanceRecord:
    """Return the record of an instance that runs; its lock is held."""
    record = refresh_locked(context, load(context, identifier))
    if record.state != State.RUNNING:
        hint = "unpause it first" if record.state == State.PAUSED else "start it first"
        raise WrongState(f"instance {record.name} is {record.state}: no {what}", hint=hint)
    return record


def sync_assets(context: Context) -> None:
    """See the layers and root disks onto the host's disk that a saved state stands on: what
    may be incomplete is thrown away after a reboot, and the state could not be loaded."""
    with disk_errors("layers and root disks"):
        context.layers.sync()
        context.rootdisks.sync()


def _parent(context: Context) -> Path:
    return context.root / "snapshots"


def saved_directory(context: Context, identifier: str) -> Path:
    """Return where a saved state is."""
    return _parent(context) / identifier


@contextmanager
def new_saved(context: Context, *, keep: bool) -> Iterator[str]:
    """Yield the identifier of a new, empty directory for a saved state.

    It is removed at the end of the block, with `keep` only when the block failed.
    """
    identifier = new_id()
    directory = saved_directory(context, identifier)
    with disk_errors("snapshot"):
        _parent(context).mkdir(mode=0o700, exist_ok=True)
        with file_lock(f"{_parent(context)}/.{identifier}.lock"):
            directory.mkdir(mode=0o700)
            done = False
            try:
                yield identifier
                done = True
            finally:
                if not (done and keep):
                    context.trash.discard(str(directory))


def reconcile_saved(context: Context) -> list[str]:
    """Remove directories that no record names and nobody works on, and records without one."""
    parent = _parent(context)
    try:
        names = [name for name in os.listdir(parent) if not name.startswith(".")]
    except FileNotFoundError:
        names = []
    gone = []
    for name in names:
        with try_file_lock(f"{parent}/.{name}.lock") as mine:
            if mine and name not in _known(context):
                context.trash.discard(str(parent / name))
                gone.append(name)
    with context.store.write() as tx:
        for key, record in tx.items(MACHINE_SNAPSHOTS, SnapshotRecord):
            if not (parent / record.id).is_dir():
                tx.delete(MACHINE_SNAPSHOTS, key)
                context.kernels.forget(tx, record.id)
                gone.append(record.id)
    return gone


def _known(context: Context) -> set[str]:
    with context.store.read() as tx:
        return {record.id for _, record in tx.items(MACHINE_SNAPSHOTS, SnapshotRecord)}


def snapshot_roots(transaction: Transaction) -> Iterator[str]:
    """Yield the layers and root disks that snapshots stand on."""
    for _, record in transaction.items(MACHINE_SNAPSHOTS, SnapshotRecord):
        yield from record.chain_ids
        yield disk_key(record.chain_ids)


class _Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance was called in one network."""

    network: str
    ipv4: str
    ipv6: str
    mac: str


def keep_addresses(context: Context, record: InstanceRecord, directory: Path) -> None:
    """Write down the addresses of an instance that is being saved."""
    kept = [
        _Addresses(
            network=endpoint.network,
            ipv4=endpoint.ipv4,
            ipv6=next((a.address for a in endpoint.addresses if ":" in a.address), ""),
            mac=endpoint.mac,
        )
        for endpoint in (context.networks.endpoints(record.id) if record.endpoints else ())
    ]
    (directory / _ADDRESSES).write_bytes(msgspec.json.encode(kept))


def kept_addresses(
    saved: SavedState, wanted: Sequence[NetworkAttachment]
) -> list[NetworkAttachment]:
    """Return the networks that a saved instance is in, with the addresses it had."""
    try:
        content = Path(saved.directory, _ADDRESSES).read_bytes()
        known = {kept.network: kept for kept in decode_json(content, list[_Addresses])}
    except (FileNotFoundError, msgspec.DecodeError):
        return []
    made = []
    for network in wanted:
        kept = known.get(network.name)
        if kept is not None:
            network = msgspec.structs.replace(network, ipv4=kept.ipv4, ipv6=kept.ipv6, mac=kept.mac)
        made.append(network)
    return made


def twin_spec(spec: InstanceSpec, *, name: str, hostname: bool) -> InstanceSpec:
    """Return the specification of another instance with a saved machine in it: its own host
    name, and none of the addresses that were asked for."""
    networks = tuple(
        msgspec.structs.replace(network, ipv4="", ipv6="", mac="") for network in spec.networks
    )
    return msgspec.structs.replace(spec, hostname=name if hostname else "", networks=networks)
