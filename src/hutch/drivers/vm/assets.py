"""What one machine is put together from, and what follows from it: its record, the set-up of its
guest, the monitor's configuration."""

from __future__ import annotations

import os
from contextlib import ExitStack

import msgspec

from hutch.decoding import decode_json
from hutch.drivers.base import Launch
from hutch.drivers.vm.cards import is_user_network
from hutch.drivers.vm.images import ImageRequest, Parked
from hutch.drivers.vm.machine import MachineRecord, template_shape
from hutch.drivers.vm.making import BOOT_S, Parts, disk_cache
from hutch.drivers.vm.passing import Passed
from hutch.drivers.vm.setup import machine_setup, parked_setup, setup_request
from hutch.drivers.vm.shares import TAG, ShareServer, shared
from hutch.drivers.vm.state import Loaded, twin_setup
from hutch.drivers.vm.templates import Template
from hutch.drivers.vm.tpm import TpmServer
from hutch.drivers.vm.volumes import volumes
from hutch.errors import IntegrityError, WrongState
from hutch.network.taps import Taps, create_taps
from hutch.plan.assets import ResolvedUser
from hutch.plan.guest import SetupOp
from hutch.plan.machine.model import MICROVM
from hutch.plan.ops import Plan
from hutch.plan.vm import GUEST_SHARES
from hutch.plan.wire import encode
from hutch.process.vmm import MonitorConfig
from hutch.storage.diskchain import chain, overlay_number

__all__ = [
    "Assets",
    "before_of",
    "goes_on",
    "lend_taps",
    "machine_record",
    "may_have_template",
    "monitor_config",
]

# The least that a guest whose program has ended gets to write out its file systems.
_PUT_AWAY_S = 10.0


class Assets(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine is put together from.

    `template` or `loaded`, a saved state, is what it goes on from, if it is not booted;
    `parked` the rest of the launch where the template is an image's, `wanted` what it would
    better have gone on from. `share_port` is where the device of the shares is, or is to be
    plugged. `passed` are devices of the host.
    """

    parts: Parts
    template: Template | None = None
    parked: Parked | None = None
    wanted: ImageRequest | None = None
    loaded: Loaded | None = None
    taps: Taps | None = None
    shares: ShareServer | None = None
    share_port: str = ""
    tpm: TpmServer | None = None
    passed: Passed = Passed()

    @property
    def maps_privately(self) -> bool:
        """Whether a machine that shares nothing has its memory from a file, mapped privately."""
        return self.template is not None or (self.loaded is not None and self.loaded.memory >= 0)


def goes_on(launch: Launch) -> bool:
    """Tell whether the program runs already: in a saved state, or on another host."""
    return launch.saved is not None or launch.arrival is not None


def before_of(launch: Launch, loaded: Loaded | None) -> MachineRecord | None:
    """Return what was known of a machine that goes on, here or at another host."""
    if loaded is not None:
        return loaded.machine
    if launch.arrival is None:
        return None
    try:
        return decode_json(launch.arrival.machine, MachineRecord)
    except msgspec.DecodeError as exc:
        raise IntegrityError(f"the machine's record: {exc}") from exc


def may_have_template(launch: Launch, parts: Parts, passed: Passed) -> bool:
    """Tell whether a template can stand for this machine; none has a device of the host."""
    machine = launch.spec.machine
    if not machine.template or machine.tpm or goes_on(launch) or passed.nodes:
        return False
    # A machine without hot-plug has its shares from the start, which no template can.
    pluggable = parts.shape.machine != MICROVM or not shared(launch)
    return pluggable and template_shape(parts.shape) is not None


def lend_taps(launch: Launch, held: ExitStack) -> Taps | None:
    """Make the taps of a machine's cards; their descriptors close with `held`."""
    if not launch.endpoints or is_user_network(launch.endpoints):
        return None
    taps = create_taps(len(launch.endpoints))
    for fd in (taps.namespace, *taps.taps):
        held.callback(os.close, fd)
    return taps


# ---- the record -----------------------------------------------------------------------------


def machine_record(
    launch: Launch, assets: Assets, user: ResolvedUser, before: MachineRecord | None
) -> MachineRecord:
    """Return what is noted of an instance's machine. `before` is what was of one that goes on."""
    machine = launch.spec.machine
    record = msgspec.structs.replace(
        _parts_record(assets.parts, assets.template, user),
        shares=len(shared(launch)),
        shares_move=assets.shares is not None and assets.shares.moves,
        share_port=assets.share_port,
        volumes=len(volumes(launch)),
        tpm=assets.tpm is not None,
        overlays=tuple(map(overlay_number, chain(launch.directory)[1:])),
        pinned=machine.cpu_pin,
        disk_cache=disk_cache(launch),
        disk_aio=machine.disk_aio or "threads",
        host_devices=launch.host_devices,
    )
    return record if before is None else msgspec.structs.replace(record, memory=before.memory)


def _parts_record(parts: Parts, template: Template | None, user: ResolvedUser) -> MachineRecord:
    """Return what of the record follows from the parts."""
    plugged = parts.plugged
    return MachineRecord(
        qemu=parts.host.qemu,
        qemu_version=str(parts.host.version),
        accelerator=parts.host.accelerator,
        accelerator_reason=parts.host.reason,
        kernel=parts.kernel.release,
        kernel_id=parts.kernel.id,
        machine=parts.shape.machine,
        cpu=parts.shape.cpu,
        memory=parts.shape.memory + (plugged.requested if plugged else 0),
        vcpus=parts.shape.vcpus,
        shape=parts.shape,
        plugged=plugged.requested if plugged else -1,
        template=template.key if template else "",
        user=user,
    )


# ---- the guest and its monitor --------------------------------------------------------------


def monitor_config(launch: Launch, plan: Plan, assets: Assets) -> MonitorConfig:
    """Return how `hutch-vmm` is to treat an instance's machine; `boot` fills in the rest."""
    parked, loaded = assets.parked, assets.loaded
    under_way = goes_on(launch)
    return MonitorConfig(
        argv=(),
        setup=setup_request(_setup(launch, assets)),
        plan=b"" if under_way else parked.rest if parked else encode(plan),
        boot_timeout_s=BOOT_S,
        shutdown_timeout_s=max(launch.spec.stop_timeout_s, _PUT_AWAY_S),
        # What it has mapped of a share or a volume must get there, if nothing else has to.
        volatile=launch.volatile and assets.shares is None and not volumes(launch),
        tty=launch.spec.process.tty,
        hold=assets.template is not None or under_way,
        adopt=under_way or parked is not None,
        control=True,
        unacked=loaded.unacked if loaded else 0,
    )


def _setup(launch: Launch, assets: Assets) -> list[SetupOp]:
    """Return what the agent does before the program starts, or goes on."""
    files = _files(launch)
    if goes_on(launch):
        _check_cards(launch, assets.loaded)
        return twin_setup(launch, files)
    if assets.parked is not None:
        return parked_setup(launch, files, hostname=assets.parked.hostname)
    return machine_setup(
        launch,
        modules=assets.parts.kernel.late,
        resumed=assets.template is not None,
        files=files,
        shares=((TAG, GUEST_SHARES),) if assets.shares else (),
    )


def _check_cards(launch: Launch, loaded: Loaded | None) -> None:
    goes_on = loaded or launch.arrival
    if goes_on is not None and len(launch.endpoints) != goes_on.cards:
        raise WrongState(
            f"the saved machine has {goes_on.cards} network cards, and the instance "
            f"{len(launch.endpoints)}",
            hint="connect it to as many networks as when it was saved",
        )


def _files(launch: Launch) -> list[tuple[str, bytes]]:
    """Return the files of ours (hosts, hostname, resolv.conf), which the guest gets as copies."""
    found = []
    for mount in launch.mounts:
        if mount.ours:
            with open(mount.source, "rb") as file:
                found.append((os.path.basename(mount.target), file.read()))
    return found
