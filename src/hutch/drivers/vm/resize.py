"""Give a running machine more or fewer processors, more or less memory.

Processors are plugged, and taken out of use by the guest. Memory beyond what the machine began
with comes from a virtio-mem device, plugged the first time it is needed; below that, a balloon
takes it. What the guest has brought about is in the machine's record after every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec

from hutch.drivers.vm import inside
from hutch.drivers.vm.machine import MEMORY_PORT, MachineRecord
from hutch.errors import Exhausted, HutchError, Unsupported, WrongState
from hutch.plan import guest as protocol
from hutch.plan.machine.memory import MEMORY_DEVICE, plugged_memory
from hutch.plan.machine.model import MICROVM, PluggedMemory, Shape
from hutch.plan.vm import GUEST_CGROUP
from hutch.process.guest import Guest
from hutch.qmp import devices
from hutch.qmp.monitor import Monitor

__all__ = ["Resizer", "check_room"]

_PATH = f"/machine/peripheral/{MEMORY_DEVICE}"
# What a guest of x86 takes and lets go of at once: the largest block of its page allocator.
_GRAIN = 4 << 20
# A guest that does nothing for so long does nothing any more.
_PATIENCE_S = 30.0
_LOOK_S = 0.03
_ONLINE_S = 60.0
# It takes QEMU's emulation for bare metal, where disabled entries of the MADT mean nothing.
_NO_LATE_PROCESSORS = (
    "newer kernels (seen with Linux 7.2) take no processors that come later where they do not "
    "know their hypervisor, as under emulation: stop it, update, and start it again"
)
# Beyond what the program may use when memory was taken away: the kernel's own caches grow.
_MARGIN = 8 << 20
_OBJECT = "plugged"


def check_room(record: MachineRecord, *, vcpus: int, memory: int) -> None:
    """Raise `WrongState` for more than a machine was started with room for."""
    shape = _shape(record)
    most, hint = max(shape.vcpus, shape.max_vcpus), "stop it, update, and start it again"
    if shape.machine == MICROVM and (vcpus != shape.vcpus or memory > shape.memory):
        raise WrongState(
            "machine: one of type microvm gets neither processors nor memory while it runs",
            hint=hint,
        )
    if vcpus > most:
        raise WrongState(
            f"cpus: the machine was started with room for {most} processors",
            hint=f"{hint} with --cpus-max {vcpus} or more",
        )
    room = max(shape.memory, shape.max_memory)
    if memory > room:
        reason = ", whose memory is locked," if shape.lock_memory else ""
        raise WrongState(
            f"memory: the machine{reason} was started with room for {room} bytes",
            hint=hint if reason else f"{hint} with a larger --memory-max",
        )


def _shape(record: MachineRecord) -> Shape:
    if record.shape is None:
        raise WrongState(
            "the machine was started by an older hutch", hint="stop it and start it again"
        )
    return record.shape


class Resizer:
    """Changes one running machine; `keep` is given its record after every change.

    Without a `guest` (a machine that starts from a disk) nobody in it is asked to help.
    """

    def __init__(
        self,
        monitor: Monitor,
        guest: Guest | None,
        record: MachineRecord,
        keep: Callable[[MachineRecord], None],
    ) -> None:
        self._monitor = monitor
        self._guest = guest
        self._record = record
        self._keep = keep

    @property
    def _shape(self) -> Shape:
        return _shape(self._record)

    def _now(self, **changes: object) -> None:
        self._record = msgspec.structs.replace(self._record, **changes)
        self._keep(self._record)

    # ---- processors ---------------------------------------------------------------------

    def processors(self, wanted: int) -> None:
        """Let the guest use `wanted` processors.

        Those that it is to use no more stay plugged, idle: in a QEMU 7.2 that emulates, the
        next device that is plugged after a processor was unplugged is its end (double free).
        """
        there = self._shape.vcpus
        if self._guest is None:
            self._without_agent(wanted)
            return
        if there < wanted:
            self._plug(wanted)
        try:
            self._use(self._guest, wanted)
        except HutchError as exc:
            with suppress(HutchError):
                self._use(self._guest, self._record.vcpus)
            raise WrongState(
                f"cpus: the guest does not go from {self._record.vcpus} to {wanted} processors: "
                f"{exc}",
                hint=_NO_LATE_PROCESSORS if self._record.accelerator == "tcg" else None,
            ) from exc
        self._now(vcpus=wanted)

    def _without_agent(self, wanted: int) -> None:
        if wanted < self._record.vcpus:
            raise WrongState(
                "cpus: a machine that starts from a disk has no agent to give processors back",
                hint="stop it, update, and start it again",
            )
        self._plug(wanted)
        self._now(vcpus=wanted)

    def _plug(self, wanted: int) -> None:
        slots = devices.query_cpu_slots(self._monitor)
        for number in range(self._shape.vcpus, wanted):
            devices.cpu_add(self._monitor, slots[number], id=f"vcpu{number}")
            self._now(shape=msgspec.structs.replace(self._shape, vcpus=number + 1))

    def _use(self, guest: Guest, processors: int) -> None:
        operation = protocol.Online(processors=processors)
        request = protocol.encode_setup([operation])
        guest.call(protocol.Call.SETUP, request, timeout_s=_ONLINE_S)

    # ---- memory -------------------------------------------------------------------------

    def memory(self, wanted: int) -> None:
        """Let the guest have `wanted` bytes in all; what cannot be brought about is raised.

        What it cannot let go of what it was given later, where its kernel has put something
        that does not move, the balloon takes from elsewhere.
        """
        own = self._shape.memory
        limit = self._program_limit(wanted, check=wanted < self._record.memory)
        if wanted > self._record.memory:
            self._balloon_to(min(own, wanted))
        later = self._plugged(-(-max(0, wanted - own) // _GRAIN) * _GRAIN)
        left = min(own, wanted - later)
        self._balloon_to(left)
        self._limit(limit if left < own else 0)
        self._now(memory=wanted)

    def _plugged(self, wanted: int) -> int:
        """Let the guest have so much beyond its own memory; return what it has then."""
        if self._record.plugged < 0:
            if not wanted:
                return 0
            self._add_device()
        before = self._record.plugged
        wanted = min(wanted, self._shape.max_memory - self._shape.memory)
        devices.qom_set(self._monitor, _PATH, "requested-size", wanted)
        reached = _settled(self._size, wanted)
        if reached != wanted:
            # It is not to go on by itself, when nobody expects it any more.
            devices.qom_set(self._monitor, _PATH, "requested-size", min(before, reached))
            _settled(self._size, min(before, reached))
        if reached < wanted:
            raise Exhausted(
                f"memory: the guest took {reached - before} of {wanted - before} more bytes",
                hint="it needs the driver virtio_mem, and the host memory to give",
            )
        self._now(plugged=reached)
        return reached

    def _size(self) -> int:
        return int(devices.qom_get(self._monitor, _PATH, "size"))

    def _add_device(self) -> None:
        device = PluggedMemory(requested=0, port=MEMORY_PORT)
        backend, card = plugged_memory(self._shape, device, shared=self._record.shares > 0)
        names = devices.list_devices(self._monitor)
        if MEMORY_PORT not in names:
            raise Unsupported(
                "memory: the machine has no place to plug more", hint="start it again"
            )
        devices.object_add(self._monitor, backend[0], **backend[1])
        try:
            devices.device_add(self._monitor, card[0], **card[1])
        except BaseException:
            with suppress(HutchError):
                devices.object_del(self._monitor, _OBJECT)
            raise
        self._now(plugged=0)

    # ---- the program's share, and the balloon ---------------------------------------------

    def _program_limit(self, wanted: int, *, check: bool) -> int:
        """Return what the program may use of `wanted`; raise where it uses more already."""
        if self._guest is None:
            return 0
        found = inside.stats(self._guest)
        had = self._shape.memory + max(0, self._record.plugged)
        kernel = max(0, had - found.memory_total)
        used = found.memory_total - found.memory_available - self._held()
        left = wanted - kernel - _MARGIN
        if check and used > left:
            raise WrongState(
                f"memory: the guest uses {used + kernel} bytes, {wanted} are too few",
                hint="let programs in it end, or ask for less to be taken",
            )
        return left

    def _held(self) -> int:
        """Return the bytes that the balloon has taken."""
        with _balloon():
            return self._shape.memory - devices.query_balloon(self._monitor)

    def _limit(self, memory: int) -> None:
        """Limit the program's memory in the guest; 0 takes the limit away."""
        if self._guest is not None:
            lines = f"memory.max={memory or 'max'}"
            operation = protocol.Cgroup(path=GUEST_CGROUP, lines=lines)
            request = protocol.encode_setup([operation])
            self._guest.call(protocol.Call.SETUP, request, timeout_s=_ONLINE_S)

    def _balloon_to(self, wanted: int) -> None:
        """Let the balloon leave the guest so much of what it had from the start."""
        with _balloon():
            before = devices.query_balloon(self._monitor)
            if before == wanted:
                return
            devices.set_balloon(self._monitor, wanted)
        if self._guest is None:
            return
        reached = _settled(lambda: devices.query_balloon(self._monitor), wanted)
        if reached != wanted:
            devices.set_balloon(self._monitor, before)
            raise WrongState(
                f"memory: the guest gave {before - reached} of {before - wanted} bytes back",
                hint="let programs in it end, or ask for less to be taken",
            )


@contextmanager
def _balloon() -> Iterator[None]:
    from hutch.qmp.errors import CommandFailed

    try:
        yield
    except CommandFailed as exc:
        raise Unsupported(f"memory: {exc.description}", hint="the guest has no balloon") from exc


def _settled(measure: Callable[[], int], wanted: int) -> int:
    """Wait until it measures what is wanted, or nothing has changed for a while; return it."""
    seen, last = measure(), time.monotonic()
    while seen != wanted and time.monotonic() - last < _PATIENCE_S:
        time.sleep(_LOOK_S)
        now = measure()
        if now != seen:
            seen, last = now, time.monotonic()
    return seen
